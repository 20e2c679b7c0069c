"""Five digits in a real text, read back through a bounded cache of Gemma-3-270M.

An essay of 1,000 tokens holds one sentence with a code, further before its end than the model's
sliding layers look back. Judged is the teacher-forced nll of each digit of the answer, in nats;
chance among ten digits is 2.30. The slots of each full-attention layer are counted after the text:
where the question is known it stands in the text and counts, else it comes afterwards.

Results of an item are kept in the cache folder until code, model or item change, so a run that was
stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from memwise import catalogue
from memwise.bench.data import data_folder
from memwise.context.engine.host import bounded, bytes_for
from memwise.context.engine.policy import CachePolicy
from memwise.errors import InvalidKnob
from memwise.models import GEMMA_SHA256, LocalModel, cache_folder

N_TOKENS, CHUNK = 1000, 128
READ = 0.693  # nats: a digit is likelier than everything else together
_WINDOW = 512  # of the model's sliding layers
_THINGS = (
    "harbor gate", "night train", "glass library", "copper mill", "island clinic", "winter garden",
    "stone bridge", "old observatory", "river ferry", "mountain hut",
)  # fmt: skip
_KINDS = ("secret access code", "locker number", "room key number")
_DECOYS = (
    " In the end {} visitors were counted.", " The invoice named a sum of {} crowns.",
    " The parcel bore the number {}.", " About {} bricks had been laid.",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A text, a question and its answer, as tokens.

    Attributes:
        context: the text with the code.
        needle: positions of the sentence that holds it.
        ask: the question.
        lead: the answer up to the first digit.
        digits: five tokens.
        wrong: a question for something that is not in the text.
    """

    context: tuple[int, ...]
    needle: range
    ask: tuple[int, ...]
    lead: tuple[int, ...]
    digits: tuple[int, ...]
    wrong: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """What a cache gave back of an item.

    Attributes:
        nll: of each digit, in nats.
        kept: tokens of the needle that are left, mean of the full-attention layers.
        held_bytes: of the cache, after the text.
        full_bytes: that a cache without a budget would hold.
    """

    nll: tuple[float, ...]
    kept: float
    held_bytes: int
    full_bytes: int

    @property
    def mean(self) -> float:
        """Nat per digit."""
        return sum(self.nll) / len(self.nll)

    @property
    def is_read(self) -> bool:
        """Every digit is likelier than everything else together."""
        return max(self.nll) < READ


def items(
    tokenizer: Any, data: Path | None, n: int, decoys: bool, seed: int = 0, n_tokens: int = N_TOKENS
) -> list[Item]:
    """Items on essays, the needle at depths of 0.05 to 0.40.

    Args:
        tokenizer: of the model.
        data: folder of the data sets.
        n: how many.
        decoys: put four other numbers of five digits into the text.
        seed: of codes and places.
        n_tokens: of each text.

    Raises:
        InvalidKnob: no essays, or a tokenizer that joins digits.
    """

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    essays = sorted((data_folder(data) / "pg_essays").glob("*.txt"))
    essays = [path for path in essays if path.stat().st_size > 6 * n_tokens]
    if not essays:
        raise InvalidKnob("the data folder has no pg_essays of enough length")
    draws, found = random.Random(seed), []
    for i in range(n):
        hay = encode(essays[(i * 7) % len(essays)].read_text("utf-8"))
        kind, thing = _KINDS[i % len(_KINDS)], _THINGS[i % len(_THINGS)]
        code = "".join(draws.choices("0123456789", k=5))
        says = f" The {kind} for the {thing} is {code}"
        stops = [j + 1 for j in range(len(hay)) if tokenizer.decode([hay[j]]).endswith(".")]
        hay = hay[:n_tokens]
        if decoys:
            for k, line in enumerate(_DECOYS):
                other = encode(line.format("".join(draws.choices("0123456789", k=5))))
                at = min(stops, key=lambda j, k=k: abs(j - (2 * k + 1) * n_tokens // 8))  # type: ignore[misc]
                hay[at:at] = other
                stops = [j if j <= at else j + len(other) for j in stops if j != at]
        depth = 0.05 + 0.35 * i / max(1, n - 1)
        at = min(stops, key=lambda j: abs(j - depth * n_tokens))
        plant, answer = encode(f"{says}. Remember it."), encode(says)
        context = [tokenizer.bos_token_id, *hay[:at], *plant, *hay[at:]][:n_tokens]
        needle = range(1 + at, 1 + at + len(plant))
        if [tokenizer.decode([t]) for t in answer[-5:]] != list(code):
            raise InvalidKnob("this tokenizer joins digits; the needle test wants one token each")
        if len(context) - needle.stop <= _WINDOW:
            raise InvalidKnob(f"item {i}: the needle lies within the model's window")
        question = "\n\nQuestion: What is the {} for the {}?\nAnswer:"
        asks = encode(question.format(kind, thing))
        wrong = encode("\n\nQuestion: Which song did the painter whistle?\nAnswer:")
        lead, digits = answer[:-5], answer[-5:]
        found.append(
            Item(tuple(context), needle, tuple(asks), tuple(lead), tuple(digits), tuple(wrong))
        )
    return found


def readings(
    lm: LocalModel, policy_of: Callable[[Item], CachePolicy], todo: Sequence[Item], n_slots: int,
    known: bool, asked: str = "ask",
) -> list[Reading]:  # fmt: skip
    """What a policy gives back of each item.

    Args:
        lm: Gemma-3-270M.
        policy_of: the policy for an item; the oracle knows where the needle lies.
        todo: the items.
        n_slots: that stay in each full-attention layer after the text; 0 = all.
        known: whether the question stands in the text, and the policy may look at it.
        asked: in the light of which question: "ask", or the "wrong" one.
    """
    return [_remembered(lm, policy_of(item), item, n_slots, known, asked) for item in todo]


def _remembered(
    lm: LocalModel, policy: CachePolicy, item: Item, n_slots: int, known: bool, asked: str
) -> Reading:
    parts = [_code(policy), repr(policy), repr(item), n_slots, known, asked, GEMMA_SHA256, CHUNK]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    path = cache_folder() / "needle" / f"{key}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        return Reading(tuple(kept.pop("nll")), **kept)
    found = _read(lm, policy, item, n_slots, known, asked)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(vars(found)))
    os.replace(part, path)
    return found


def _code(policy: CachePolicy) -> str:
    """Hash of the sources: the policy's, and what of the engine a bounded cache is made of."""
    name = type(policy).__module__.rpartition(".")[2]
    own = catalogue.PACKAGE / "context" / "policies" / f"{name}.py"
    return hashlib.sha256(own.read_bytes() + b"".join(_engine())).hexdigest()


@cache
def _engine() -> list[bytes]:
    folder, todo, found = catalogue.PACKAGE / "context" / "engine", ["host"], {}
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = (folder / f"{name}.py").read_bytes()
            todo += re.findall(r"memwise\.context\.engine\.(\w+)", found[name].decode())
    return [Path(__file__).read_bytes(), *(found[name] for name in sorted(found))]


@torch.no_grad()
def _read(
    lm: LocalModel, policy: CachePolicy, item: Item, n_slots: int, known: bool, asked: str
) -> Reading:
    question = getattr(item, asked) if known else ()
    slots = n_slots or len(item.context) + 100
    budget = bytes_for(lm.model, policy, slots, chunk=CHUNK, question=question)
    with bounded(lm.model, policy, budget, chunk=CHUNK, question=question) as kept:
        text = item.context + (item.ask if known else ())
        lm.model.get_decoder()(torch.tensor([text]), past_key_values=kept)
        kept.compress()
        report = kept.report()
        left = [len(set(held) & set(item.needle)) for held in report.kept.values()]
        rest = (() if known else item.ask) + item.lead + item.digits
        out = lm.model(torch.tensor([rest[:-1]]), past_key_values=kept, logits_to_keep=5)
    logp = out.logits[0].float().log_softmax(-1)
    nll = -logp[torch.arange(5), torch.tensor(item.digits)]
    return Reading(
        tuple(nll.tolist()), sum(left) / len(left), sum(report.held_bytes.values()),
        report.full_bytes,
    )  # fmt: skip


def oracle_for(oracle: CachePolicy, item: Item) -> CachePolicy:
    """The oracle, told where the needle of an item lies."""
    return replace(oracle, positions=tuple(item.needle))  # type: ignore[call-arg]
