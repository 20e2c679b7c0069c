"""Texts that are repeated from compressed segments, and read on behind them.

Two small Llamas over bytes are trained from the same weights on the same windows of books: one with
the method's slots, one with the baseline's, as many bytes of them. They learn with few bytes a slot
first and go on with more. Each time both repeat pieces of Wikipedia that nobody trained on, each
byte after the true ones, from the slots alone.

What must hold: a model trained in the same way whose repetition sees no memory cannot do it, nor
can the method's with the memory of another text; more slots a byte repeat better.

A row beside it, at one ratio: nat a byte of what follows a compressed segment, against the newest
raw keys and values in as many bytes, of a model that was trained to read only.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.engine import Row, paired_interval
from memwise.bench.soft import byte_llama, train
from memwise.bench.training import Corpus, corpus
from memwise.catalogue import load
from memwise.context.engine.soft import SoftCache, cross_entropy
from memwise.context.engine.zones import SegmentCompressor

N_STEPS = {2: 250, 4: 300, 8: 350}  # of training, by bytes a slot
AT = 4  # bytes a slot at which reading on is judged
_N_SLOTS, _N_SEGMENTS = 8, 2
_BYTES_A_STEP, _LONGEST = 1024, 1.0  # gradients are cut to that length
_N_PIECES, _JUDGED = 96, 16  # judged: first bytes behind a segment
_APART = 0.2  # of accuracy, that repeating from the right memory is above the rest at least


@dataclass(frozen=True)
class Trained:
    """A compressor after training, and what it repeats.

    Attributes:
        compressor: the model.
        right: (pieces, bytes), which bytes of the pieces it repeats rightly.
        seconds: of its training.
    """

    compressor: SegmentCompressor
    right: NDArray[np.bool_]
    seconds: float

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Of each piece."""
        return np.asarray(self.right.mean(1), np.float64)

    def exact(self, n: int) -> float:
        """Share of segments of so many bytes that are repeated without a mistake."""
        return float(self.right.reshape(-1, n).all(1).mean())


class Blind(nn.Module):
    """Trained alike without memory: it reads plainly, and repeats from nothing.

    Args:
        compressor: whose model is trained.
    """

    def __init__(self, compressor: SegmentCompressor) -> None:
        super().__init__()
        self.compressor = compressor

    def repeated(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of repeating a text's two segments, which it never saw."""
        segments = torch.cat(ids.chunk(_N_SEGMENTS, 1))
        n_layers = len(self.compressor.host.shape.layer_types)
        at = torch.arange(segments.shape[1])
        logits = self.compressor.spell(SoftCache(n_layers), segments, at)
        return torch.cat(logits.chunk(_N_SEGMENTS), 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Nat a byte of reading, and of repeating."""
        read = self.compressor.model(ids).logits
        return cross_entropy(read[:, :-1], ids[:, 1:]) + cross_entropy(self.repeated(ids), ids)


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Accuracy of repetition at some ratios, and nat per byte of reading on."""
    text = corpus(data)
    baseline = load(f"context/{method.card.baseline}")()
    course, other_course = (_course(policy, text, seed) for policy in (method, baseline))
    rows: list[Row] = []
    for ratio, own in course.items():
        row = _repetition(ratio, own, other_course[ratio], text, seed)
        if rows:
            worse = row.value < rows[-1].value
            row = replace(row, behaves={**row.behaves, "more bytes a slot repeat worse": worse})
        rows.append(row)
    blind = Blind(replace(baseline, ratio=AT, memory=_N_SLOTS)(byte_llama(seed), seed))
    for ratio in (ratio for ratio in N_STEPS if ratio <= AT):
        _fit(blind, ratio, text, seed)
    at = list(N_STEPS).index(AT)
    rows[at] = _with_blind(rows[at], blind, _pieces(text, AT))
    return [*rows, _reading_on(course[AT], blind, text, seed)]


def _repetition(ratio: int, own: Trained, other: Trained, text: Corpus, seed: int) -> Row:
    swapped = _swapped(own.compressor, _pieces(text, ratio))
    n_bytes, other_bytes = (_held(c.compressor, _pieces(text, ratio)) for c in (own, other))
    return Row(
        f"accuracy of repetition, {ratio} bytes a slot", float(own.accuracy.mean()),
        float(other.accuracy.mean()), paired_interval(own.accuracy, other.accuracy, seed),
        _N_PIECES,
        {"exact segments": own.exact(ratio * _N_SLOTS),
         "exact segments of the baseline": other.exact(ratio * _N_SLOTS),
         "memory of another text": swapped},
        {"the memory of another text is of little use": swapped < own.accuracy.mean() - _APART},
        bytes=n_bytes, baseline_bytes=other_bytes, seconds=own.seconds,
        data=f"WikiText-2, pieces of {_N_SEGMENTS * ratio * _N_SLOTS} bytes",
    )  # fmt: skip


def _pieces(text: Corpus, ratio: int) -> Tensor:
    return text.windows(_N_PIECES, _N_SEGMENTS * ratio * _N_SLOTS - 1)


def _fit(model: nn.Module, ratio: int, text: Corpus, seed: int) -> None:
    length = _N_SEGMENTS * ratio * _N_SLOTS
    size = _BYTES_A_STEP // length
    train(model, text, N_STEPS[ratio], size, length, seed + ratio, _LONGEST)


def _course(policy: Any, text: Corpus, seed: int) -> dict[int, Trained]:
    """What is learned with ever more bytes a slot, each from where the last one ended."""
    compressor = replace(policy, memory=_N_SLOTS)(byte_llama(seed), seed)
    found = {}
    for ratio in N_STEPS:
        compressor.policy = replace(compressor.policy, ratio=ratio)
        start = time.perf_counter()
        _fit(compressor, ratio, text, seed)
        seconds = time.perf_counter() - start
        pieces = _pieces(text, ratio)
        with torch.no_grad():
            _, repeated = compressor.both(pieces)
        right = (repeated.argmax(-1) == pieces).numpy()
        found[ratio] = Trained(copy.deepcopy(compressor), right, seconds)
    return found


def _held(compressor: SegmentCompressor, pieces: Tensor) -> int:
    """Bytes that one piece leaves."""
    return compressor.compress(pieces[:1]).n_bytes


@torch.no_grad()
def _swapped(compressor: SegmentCompressor, pieces: Tensor) -> float:
    """Accuracy of the first segment from the memory of another piece."""
    first = pieces[:, : compressor.policy.n_segment]
    memory = compressor.compress(first.roll(1, 0)).part(0, compressor.policy.n_slots, 0)
    logits = compressor.spell(memory, first, torch.arange(first.shape[1]))
    return float((logits.argmax(-1) == first).double().mean())


@torch.no_grad()
def _with_blind(row: Row, blind: Blind, pieces: Tensor) -> Row:
    found = float((blind.repeated(pieces).argmax(-1) == pieces).double().mean())
    return replace(
        row, controls={**row.controls, "trained without memory": found},
        behaves={**row.behaves, "without memory it is not repeated": found < row.value - _APART},
    )  # fmt: skip


@torch.no_grad()
def _reading_on(own: Trained, blind: Blind, text: Corpus, seed: int) -> Row:
    """What follows a segment, behind its slots and behind as many raw ones."""
    n, t = own.compressor.policy.n_segment, own.compressor.policy.n_slots
    pieces = _pieces(text, AT)[:, : n + _JUDGED]
    compressed = own.compressor.compress(pieces[:, :n])
    plain = blind.compressor
    raw = {name: _newest(c, pieces[:, :n], m) for name, c, m in (
        ("window", plain, t), ("its own window", own.compressor, t), ("all raw", plain, n),
        ("last byte alone", plain, 1),
    )}  # fmt: skip
    n_bytes, window_bytes = (cache.n_bytes // _N_PIECES for cache in (compressed, raw["window"]))
    mine = _nll(own.compressor, compressed, pieces, n)
    found = {
        name: _nll(own.compressor if name == "its own window" else plain, cache, pieces, n)
        for name, cache in raw.items()
    }
    window = found.pop("window")
    return Row(
        f"nat per byte behind a segment, {AT} bytes a slot", float(mine.mean()),
        float(window.mean()), paired_interval(mine, window, seed), _N_PIECES,
        {name: float(values.mean()) for name, values in found.items()}, primary=False,
        bytes=n_bytes, baseline_bytes=window_bytes, data=f"WikiText-2, {_JUDGED} bytes a piece",
        note="lower is better; the baseline is the newest raw slots of a model that was trained "
        "to read only; the first of the judged bytes is seen after none of the others",
    )  # fmt: skip


def _newest(compressor: SegmentCompressor, ids: Tensor, n_slots: int) -> SoftCache:
    """The newest slots that reading plainly leaves."""
    n = ids.shape[1]
    cache = SoftCache(len(compressor.host.shape.layer_types))
    compressor.run(compressor.embed(ids), torch.arange(n), cache)
    cache.keep(torch.arange(n - n_slots, n), n)
    return cache


def _nll(
    compressor: SegmentCompressor, cache: SoftCache, pieces: Tensor, n: int
) -> NDArray[np.float64]:
    """Mean nat per byte (pieces,) of what follows the first of the judged bytes."""
    rest = pieces[:, n:]
    logits = compressor.run(compressor.embed(rest), torch.arange(n, n + rest.shape[1]), cache)
    nll = F.cross_entropy(logits[:, :-1].mT, rest[:, 1:], reduction="none")
    return nll.double().mean(1).numpy()
