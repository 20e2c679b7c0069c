"""A code in a long essay, read back from a few segments that were chosen by a question.

An essay of 2,000 tokens is cut into segments of 128; three of them stay, the head among them. Then
Gemma-3-270M reads what stays, the question, and the code. Judged is nat per digit.

What must hold: the whole text and an oracle's segments are read, any segments are not. Beside it:
the newest segments, those that MiniLM finds nearest to the question, and how often a segment stays
into which one plain sentence was put again and again, which makes a model sure of anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memwise.bench.engine import Row, paired_interval
from memwise.bench.needle import Item, items
from memwise.catalogue import load
from memwise.context.engine.excerpt import Prompt
from memwise.context.policies.random_segments import RandomSegments
from memwise.models import LocalModel, local_model
from memwise.recall.engine.embed import embedder

N_ITEMS, N_TOKENS, N_KEPT = 10, 2000, 3
_SAID = " The weather was fine on that day, as it had been on the day before."
_NO_BETTER = 1.5  # nats: what is not read; chance among ten digits is 2.3


@dataclass(frozen=True)
class _Told(RandomSegments):
    """The head, and the segments that a function likes best."""

    likes: Callable[[Prompt], Sequence[float]] = lambda prompt: range(len(prompt.units))

    def score(self, prompt: Prompt) -> Sequence[float]:
        """What the function says."""
        return [np.inf, *self.likes(prompt)[1:]]


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Nat per digit."""
    lm = local_model()
    todo = items(lm.tokenizer, data, N_ITEMS, False, seed, N_TOKENS)
    near = embedder("minilm")

    def nearest(prompt: Prompt) -> Sequence[float]:
        parts = [prompt.text[slice(*span)] for span in prompt.units]
        asked = near.encode([prompt.question], "query")[0]
        cosines: list[float] = (near.encode(parts) @ asked).tolist()
        return cosines

    def with_code(item: Item) -> Callable[[Prompt], Sequence[float]]:
        code = lm.tokenizer.decode(item.digits)
        return lambda prompt: [float(code in prompt.text[slice(*span)]) for span in prompt.units]

    arms: dict[str, Callable[[Item], Any]] = {
        "mine": lambda item: method,
        "baseline": lambda item: load(f"context/{method.card.baseline}")(),
        "oracle": lambda item: _Told(likes=with_code(item)),
        "newest": lambda item: _Told(),
        "MiniLM": lambda item: _Told(likes=nearest),
    }
    nats = {
        name: np.array([_read(lm, item, arm(item)) for item in todo]) for name, arm in arms.items()
    }
    mine, base = nats.pop("mine"), nats.pop("baseline")
    controls = {name: float(values.mean()) for name, values in nats.items()}
    controls["whole text"] = float(np.mean([_nats(lm, item, _text(lm, item)) for item in todo]))
    controls["sentences said again that stay"] = _fooled(lm, method, todo)
    return [
        Row(
            "nat per digit", float(mine.mean()), float(base.mean()),
            paired_interval(mine, base, seed), len(mine), controls,
            {
                "whole text and oracle are read": max(controls["whole text"], controls["oracle"])
                < 0.3,
                "any segments are not": bool(base.mean() > _NO_BETTER),
            },
            data=f"essays of {N_TOKENS} tokens, {N_KEPT} segments of {method.length} stay",
        )
    ]  # fmt: skip


def _text(lm: LocalModel, item: Item) -> str:
    text: str = lm.tokenizer.decode(item.context[1:])
    return text


def _question(lm: LocalModel, item: Item) -> str:
    question: str = lm.tokenizer.decode(item.ask)
    return question


def _read(lm: LocalModel, item: Item, policy: Any) -> float:
    compressor = policy(lm.model, lm.tokenizer)
    room = N_KEPT * policy.length + 2 * N_KEPT  # a seam may cost a token
    return _nats(lm, item, compressor.compress(_text(lm, item), room, _question(lm, item)).text)


@torch.no_grad()
def _nats(lm: LocalModel, item: Item, text: str) -> float:
    before = [lm.tokenizer.bos_token_id, *lm.tokenizer(text, add_special_tokens=False).input_ids]
    ids = torch.tensor([[*before, *item.ask, *item.lead, *item.digits[:-1]]])
    logits = lm.model(ids, logits_to_keep=len(item.digits)).logits[0].float()
    nll = -logits.log_softmax(-1)[torch.arange(len(item.digits)), torch.tensor(item.digits)]
    return float(nll.mean())


def _fooled(lm: LocalModel, method: Any, todo: Sequence[Item]) -> float:
    """Share of texts of which a segment of one plain sentence stays, put in their middle."""
    n_stay = 0
    for item in todo[: len(todo) // 2]:
        text = _text(lm, item)
        middle = text.index(" ", len(text) // 2)
        again = _SAID * (method.length // len(lm.tokenizer(_SAID).input_ids) * 2)
        fooled = text[:middle] + again + text[middle:]
        compressor = method(lm.model, lm.tokenizer)
        kept = compressor.compress(fooled, N_KEPT * method.length, _question(lm, item)).text
        n_stay += kept.count(_SAID) > 2
    return n_stay / (len(todo) // 2)
