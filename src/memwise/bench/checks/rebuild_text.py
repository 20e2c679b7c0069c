"""Texts that are written out again from vectors, and keys that are found among segments.

Two small Llamas over bytes, each with an encoder, are trained from the same weights on the same
windows of books: one whose encoder hands on what the method says, one with the baseline's vectors,
as many bytes of them. Both write out pieces of Wikipedia that nobody trained on, each byte after
their own.

What must hold: vectors of another text are of little use, and so are none.

Rows beside it: BLEU-4 over bytes; and two keys of five digits in some segments, of which a last
line, compressed with the rest, asks for one. For that the trained models go on learning, to write
the line and then the digits; the ablation learns to write the digits at once.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.engine import Row, paired_interval
from memwise.bench.soft import byte_llama, train
from memwise.bench.training import Corpus, corpus
from memwise.catalogue import load
from memwise.context.engine.soft import SoftCache
from memwise.context.engine.vectors import VectorCompressor

_GROUP, _SEGMENT = 4, 64  # bytes
_N_STEPS, _SIZE, _N_PIECES = 400, 16, 96
_LONGEST = 1.0  # gradients are cut to that length: without it the baseline hardly starts to learn
_APART = 0.2  # of accuracy, that writing from the right vectors is above the rest at least
_COLOURS = (b"red ", b"blue", b"gold", b"grey")
_N_DIGITS = 5
_KEY_STEPS, _KEY_SIZE, _N_KEYS = 300, 8, 64
_TRAINED, _BEYOND = (1, 2, 4), 8  # segments of a text


@dataclass(frozen=True)
class Asked:
    """Texts with keys, and what is asked.

    Attributes:
        ids: (B, n), the texts, each with two keys and a last line that asks for one.
        line: (B, 8), that line.
        digits: (B, 5), its answer.
    """

    ids: Tensor
    line: Tensor
    digits: Tensor


class Keys(nn.Module):
    """Training to answer: its call on texts gives the loss, after keys were put into them.

    Args:
        compressor: that is trained.
        writes_line: whether the line that asks is written out before the digits.
        seed: of keys and their places.
    """

    def __init__(self, compressor: VectorCompressor, writes_line: bool, seed: int) -> None:
        super().__init__()
        self.compressor, self.writes_line = compressor, writes_line
        self.draws = np.random.default_rng(seed)

    def forward(self, ids: Tensor) -> Tensor:
        """Nat a byte of what is to be written; of texts of 1, 2 or 4 segments."""
        n_segments = int(self.draws.choice(_TRAINED))
        asked = _ask(ids[:, : n_segments * _SEGMENT], self.draws)
        told = [asked.line, asked.digits] if self.writes_line else [asked.digits]
        return self.compressor.answer_loss(self.compressor.learnt(asked.ids), torch.cat(told, 1))

    def right(self, asked: Asked) -> NDArray[np.float64]:
        """Share of digits that the model writes rightly on its own (texts,)."""
        n_line = asked.line.shape[1] if self.writes_line else 0
        cache = self.compressor.compress(asked.ids)
        written = self.compressor.answer(cache, n_line + _N_DIGITS)[:, n_line:]
        return (written == asked.digits).double().mean(1).numpy()


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Share of bytes that are written rightly, their BLEU-4, and digits of keys."""
    text = corpus(data)
    pieces = text.windows(_N_PIECES, _SEGMENT - 1)
    knobs = {"group": _GROUP, "segment": _SEGMENT}
    policies = (method, load(f"context/{method.card.baseline}")())
    start = time.perf_counter()
    own, other = (_trained(replace(p, **knobs), text, seed) for p in policies)
    seconds = (time.perf_counter() - start) / 2
    with torch.no_grad():
        cache = own.compress(pieces[:1])
        written = [c.repeat(c.compress(pieces)) for c in (own, other)]
    mine, theirs = ((found == pieces).double().mean(1).numpy() for found in written)
    nothing, swapped = _without(own, pieces)
    floor = mine.mean() - _APART
    rebuilt = Row(
        f"bytes written rightly, {_GROUP} bytes a vector", float(mine.mean()),
        float(theirs.mean()), paired_interval(mine, theirs, seed), _N_PIECES,
        {"no vectors": nothing, "vectors of another text": swapped,
         "pieces without a mistake": float((mine == 1).mean()),
         "pieces without a mistake, baseline": float((theirs == 1).mean())},
        {"no vectors are of little use": nothing < floor,
         "the vectors of another text are of little use": swapped < floor},
        bytes=cache.n_bytes + own.extra_bytes, baseline_bytes=cache.n_bytes + other.extra_bytes,
        seconds=seconds, data=f"WikiText-2, pieces of {_SEGMENT} bytes",
        note=f"bytes are those of the encoder and of one piece's slots ({cache.n_bytes})",
    )  # fmt: skip
    scores = [np.array([_bleu4(w, p) for w, p in zip(found.tolist(), pieces.tolist(), strict=True)])
              for found in written]  # fmt: skip
    bleu = Row(
        "BLEU-4 over bytes", float(scores[0].mean()), float(scores[1].mean()),
        paired_interval(scores[0], scores[1], seed), _N_PIECES, primary=False, data=rebuilt.data,
    )  # fmt: skip
    return [rebuilt, bleu, *_keys(own, other, text, seed)]


def _trained(policy: Any, text: Corpus, seed: int) -> VectorCompressor:
    compressor: VectorCompressor = policy(byte_llama(seed), seed)
    train(compressor, text, _N_STEPS, _SIZE, _SEGMENT, seed, _LONGEST)
    return compressor


@torch.no_grad()
def _without(compressor: VectorCompressor, pieces: Tensor) -> tuple[float, float]:
    """Accuracy from no vectors and from another piece's, each byte after the true ones."""
    at = torch.arange(_SEGMENT, 2 * _SEGMENT)
    nothing = SoftCache(len(compressor.host.shape.layer_types))
    found = [
        compressor.spell(cache, pieces, at).argmax(-1)
        for cache in (nothing, compressor.compress(pieces.roll(1, 0)))
    ]
    none, other = ((written == pieces).double().mean().item() for written in found)
    return none, other


def _keys(own: VectorCompressor, other: VectorCompressor, text: Corpus, seed: int) -> list[Row]:
    """Digits that are found, in as many segments as trained with and in more."""
    learners = [
        Keys(copy.deepcopy(own), True, seed), Keys(copy.deepcopy(other), True, seed),
        Keys(copy.deepcopy(own), False, seed),
    ]  # fmt: skip
    length = max(_TRAINED) * _SEGMENT
    for learner in learners:
        train(learner, text, _KEY_STEPS, _KEY_SIZE, length, seed + 1, _LONGEST)
    rows = []
    for n_segments in (*_TRAINED, _BEYOND):
        ids = text.windows(_N_KEYS, n_segments * _SEGMENT - 1)
        asked = _ask(ids, np.random.default_rng(seed + 1))
        mine, theirs, at_once = (learner.right(asked) for learner in learners)
        rows.append(
            Row(
                f"digits found in {n_segments} segments", float(mine.mean()), float(theirs.mean()),
                paired_interval(mine, theirs, seed), _N_KEYS,
                {"the line that asks is not written first": float(at_once.mean()), "chance": 0.1},
                primary=False, data="WikiText-2 with two keys",
            )
        )  # fmt: skip
    return rows


def _ask(ids: Tensor, draws: np.random.Generator) -> Asked:
    """Put two keys into different halves of texts (B, n), and a last line that asks for one."""
    ids, lines, answers = ids.clone(), [], []
    for row in ids:
        colours = draws.permutation(len(_COLOURS))[:2]
        digits = [b"%05d" % draws.integers(10**_N_DIGITS) for _ in colours]
        line = b"ask " + _COLOURS[colours[asked := int(draws.integers(2))]]
        keys = [b"[%s=%s]" % (_COLOURS[c], d) for c, d in zip(colours, digits, strict=True)]
        half = (len(row) - len(line)) // 2
        for i, key in enumerate(keys):
            first = i * half + int(draws.integers(half - len(key) + 1))
            row[first : first + len(key)] = _bytes(key)
        row[-len(line) :] = _bytes(line)
        lines.append(_bytes(line))
        answers.append(_bytes(digits[asked]))
    return Asked(ids, torch.stack(lines), torch.stack(answers))


def _bytes(some: bytes) -> Tensor:
    return torch.tensor(list(some))


def _bleu4(written: list[int], true: list[int]) -> float:
    """BLEU-4 of equally long texts over their bytes; a count of 0 counts as a half."""
    shares = []
    for n in range(1, 5):
        found, there = (
            Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
            for ids in (written, true)
        )
        shares.append(max((found & there).total(), 0.5) / found.total())
    return math.exp(sum(map(math.log, shares)) / 4)
