"""Do heads that learnt which tokens answers want keep a code that nobody has asked for yet?

Heads for the three full-attention layers of Gemma-3-270M are trained in some minutes on short texts
with questions and answers: facts planted in books, and real questions with their passages (NQ). The
code of `needle` is a kind of fact that they never saw, in another kind of text, five times as long.
They are kept in the cache folder, as the Gemma terms cover them, until code or data change.

Judged are nat per digit at 128 and at 64 slots of 1,000 tokens, the question unknown, and how many
of the tokens that the answer attends to most are among those that the heads put first.

What must hold: the full cache and an oracle of as many slots read the code, random slots do not,
and heads that were never trained do worse than trained ones in both respects.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memwise.bench.data import books, data_folder
from memwise.bench.engine import Row, paired_interval
from memwise.bench.needle import Item, Reading, items, oracle_for, readings
from memwise.catalogue import load
from memwise.context.engine import retaining
from memwise.context.engine.host import Host
from memwise.context.engine.retaining import Lesson
from memwise.models import LocalModel, cached, local_model

N_ITEMS, N_FEW, N_SLOTS, FEW_SLOTS = 16, 8, 128, 64
N_LESSONS, N_STEPS, HIDDEN = 160, 480, 256
_LR = 1e-3
_TEXT_TOKENS, _WANTED = 160, 0.1  # of a lesson; share of tokens that count as wanted
_N_STUDIED = 4
_NO_BETTER = 1.5  # nats: what is not read; chance among ten digits is 2.3
_FACTS = (
    (" The phone extension of {who} is {number}.", "What is the phone extension of {who}?",
     " The phone extension of {who} is {number}"),
    (" {who} was born in {town}.", "Where was {who} born?", " {who} was born in {town}"),
    (" The train to {town} leaves at {hour} from platform {digit}.",
     "When does the train to {town} leave?", " The train to {town} leaves at {hour}"),
    (" {who} paid {number} dollars for the house.", "How much did {who} pay for the house?",
     " {who} paid {number} dollars"),
    (" The favourite animal of {who} is the {animal}.", "What is the favourite animal of {who}?",
     " The favourite animal of {who} is the {animal}"),
    (" {who} works as a {job} in {town}.", "What is the work of {who}?", " {who} works as a {job}"),
)  # fmt: skip
_WORDS = {
    "who": ("Anna Berg", "Tom Reyes", "Mira Novak", "Paul Okafor", "Ines Duarte", "Karl Lund",
            "Rosa Blum", "Omar Haddad", "Lucy Tran", "Ivan Petrov"),
    "town": ("Lisbon", "Oslo", "Quito", "Bremen", "Nagoya", "Leeds", "Tunis", "Perth", "Turin"),
    "animal": ("otter", "falcon", "badger", "lynx", "heron", "camel", "tortoise", "moth"),
    "job": ("baker", "surgeon", "plumber", "judge", "pilot", "weaver", "geologist", "tailor"),
}  # fmt: skip


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Nat per digit in more and in fewer slots, and wanted tokens that heads miss."""
    lm = local_model()
    trained = replace(method, heads=str(heads(lm, data) / "heads.safetensors"))
    todo = items(lm.tokenizer, data, N_ITEMS, False, seed)
    few = todo[:: N_ITEMS // N_FEW]
    missed = _missed(lm, trained, method, todo[:: N_ITEMS // _N_STUDIED], seed)
    return [
        _row(lm, trained, method, todo, N_SLOTS, seed),
        _row(lm, trained, method, few, FEW_SLOTS, seed),
        missed,
    ]


def heads(lm: LocalModel, data: Path | None) -> Path:
    """Folder of the trained heads, from the cache where it is there."""
    sources = (Path(__file__), Path(retaining.__file__), data_folder(data) / _NQ)
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]

    def build(folder: Path) -> None:
        found = retaining.train_heads(
            lm.model, lessons(lm, data, N_LESSONS, 0), n_steps=N_STEPS, hidden=HIDDEN, lr=_LR
        )
        retaining.save_heads(found, folder / "heads.safetensors")

    return cached(f"locret-heads-{code}", build)


_NQ = "nq_oracle/nq_dev.jsonl.gz"


def lessons(lm: LocalModel, data: Path | None, n: int, seed: int) -> list[Lesson]:
    """Planted facts and real questions in turn.

    Args:
        lm: Gemma-3-270M.
        data: folder of the data sets.
        n: how many.
        seed: of pieces, places and words.
    """
    draws = random.Random(seed)
    texts = [text for _, text in books(data_folder(data))]
    real = _questions(data_folder(data) / _NQ, draws)
    found = list[Lesson]()
    for i in range(n):
        text = draws.choice(texts)
        at = draws.randrange(len(text) - 8 * _TEXT_TOKENS)
        hay = _encode(lm, text[at : at + 8 * _TEXT_TOKENS])
        says, ask, answer = next(real) if i % 2 else _fact(draws)
        hay = hay[: max(40, _TEXT_TOKENS - len(_encode(lm, says)))]
        cut = draws.randrange(len(hay))
        context = [lm.tokenizer.bos_token_id, *hay[:cut], *_encode(lm, says), *hay[cut:]]
        asked = _encode(lm, f"\n\nQuestion: {ask}\nAnswer:")
        answered = _encode(lm, answer)
        found.append(Lesson((*context, *asked, *answered), len(answered)))
    return found


def _fact(draws: random.Random) -> tuple[str, str, str]:
    words = {name: draws.choice(choices) for name, choices in _WORDS.items()}
    words["number"] = str(draws.randrange(10, 10 ** draws.randint(2, 6)))
    words["digit"] = str(draws.randint(1, 9))
    words["hour"] = f"{draws.randint(1, 12)}:{draws.randint(10, 59)}"
    says, ask, answer = draws.choice(_FACTS)
    return says.format(**words), ask.format(**words), answer.format(**words)


def _questions(path: Path, draws: random.Random) -> Iterator[tuple[str, str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    draws.shuffle(entries)
    for entry in entries:
        gold = next(one for one in entry["ctxs"] if one["isgold"])
        text, answer = gold["text"][:500], entry["answers"][0]
        if answer in text:
            yield f" {text}", f"{entry['question']}?", f" {answer}"


def _encode(lm: LocalModel, text: str) -> list[int]:
    found: list[int] = lm.tokenizer(text, add_special_tokens=False).input_ids
    return found


def _row(
    lm: LocalModel, trained: Any, method: Any, todo: list[Item], n_slots: int, seed: int
) -> Row:
    policies = {
        name: load(f"context/{name}")() for name in (method.card.baseline, "keydiff", "random")
    }
    oracle = load("context/oracle")()

    def read(policy_of: Callable[[Item], Any], slots: int = n_slots) -> NDArray[np.float64]:
        return _nats(readings(lm, policy_of, todo, slots, False))

    mine = readings(lm, lambda _: trained, todo, n_slots, False)
    theirs = readings(lm, lambda _: policies[method.card.baseline], todo, n_slots, False)
    controls = {
        "full cache": read(lambda _: policies["random"], 0),
        "oracle": read(lambda item: oracle_for(oracle, item)),
        "random": read(lambda _: policies["random"]),
        "untrained heads": read(lambda _: method),
        "keydiff": read(lambda _: policies["keydiff"]),
    }
    means = {name: float(nats.mean()) for name, nats in controls.items()}
    values, base = _nats(mine), _nats(theirs)
    n_read = sum(one.is_read for one in mine)
    return Row(
        f"nat per digit, {n_slots} slots", float(values.mean()), float(base.mean()),
        paired_interval(values, base, seed), len(values), means,
        {
            "full cache and oracle read it": max(means["full cache"], means["oracle"]) < 0.3,
            "random slots do not": means["random"] > _NO_BETTER,
            "untrained heads are worse": means["untrained heads"] > values.mean(),
        },
        primary=n_slots == N_SLOTS, bytes=mine[0].held_bytes, baseline_bytes=theirs[0].held_bytes,
        data=f"{n_slots} slots a full layer of 1,000 tokens of essays, question unknown",
        note=f"{n_read} of {len(mine)} codes read in full; "
        f"{np.mean([one.kept for one in mine]):.0f} of {len(todo[0].needle)} tokens of the "
        f"sentence left; bytes include the heads",
    )  # fmt: skip


def _missed(lm: LocalModel, trained: Any, method: Any, todo: Sequence[Item], seed: int) -> Row:
    shape = Host(lm.model).shape
    seen = [
        retaining.study(
            lm.model,
            Lesson(item.context + item.ask + item.lead + item.digits, len(item.lead + item.digits)),
        )
        for item in todo
    ]

    def missed(weights: retaining.Weights) -> NDArray[np.float64]:
        return np.array(
            [
                np.mean([_miss(one, retaining.retained(weights, layer, one.inputs))
                         for layer, one in by_layer.items()])
                for by_layer in seen
            ]
        )  # fmt: skip

    mine, theirs = (missed(dict(heads.weights(shape))) for heads in (trained, method))
    return Row(
        f"wanted tokens that heads miss, top {_WANTED:.0%}", float(mine.mean()),
        float(theirs.mean()), paired_interval(mine, theirs, seed), len(mine),
        {"chance": 1 - _WANTED}, {"trained heads miss fewer": mine.mean() < theirs.mean()},
        primary=False, data="1,000 tokens of essays",
        note="the baseline here is heads that were never trained",
    )  # fmt: skip


def _miss(seen: retaining.Seen, score: Any) -> float:
    n = int(_WANTED * len(score))
    first = [set(x[:, 0].topk(n).indices.tolist()) for x in (seen.wanted, score)]
    return 1 - len(first[0] & first[1]) / n


def _nats(found: list[Reading]) -> NDArray[np.float64]:
    return np.array([one.mean for one in found])
