"""Is noise that comes late the same noise, and how much faster is a step?

A table of a million rows, of which text reads a few (words by their rank, so Zipf's law), is
trained privately to tell from four words whether a common one follows. Steps of the method and of
the baseline take turns on the same batches.

What must hold beside the speed:

- a step writes rows of its batch, not the table
- draws that are not merged give, however late, the table of draws at once to the bit
- noise of one instead of normal noise, which shows each forgotten or doubled step, sums up to 1e-6
- merged noise has the variance of all its steps and is normal, for rows that are read and for rows
  that never are; the same statistics find a forgotten flush and a forgotten merge
- the model is as good
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import Corpus, corpus
from memwise.catalogue import load
from memwise.train.engine.ledger import EachStep, Noise, normal
from memwise.train.engine.private import PrivatePolicy, PrivateSGD
from memwise.train.measure import bytes_of
from memwise.train.policies.lazydp import LazyDP

_N_ROWS, _WIDTH, _BATCH, _N_WORDS = 1_000_000, 32, 512, 4
_N_FEW_ROWS = 100_000  # of the tables on which exactness is looked at
_N_WARM, _N_TIMED, _N_STEPS, _N_LATE = 3, 40, 200, 20
_LR = 0.5  # the best of five on the training text
_N_COMMON = 50  # words that are to be told from all others: half of the text
_N_JUDGED, _JUDGED_TOGETHER = 64, 256  # windows and their examples
_N_SAMPLED = 4000  # rows of each kind whose noise is looked at
_LONG_RUN = 1000  # steps before a flush
_KS_1_PERCENT = 1.628  # critical value of sqrt(n) times Kolmogorov's distance


class _Clicks(nn.Module):
    """Whether a common word follows four words; as a recommender predicts a click."""

    def __init__(self, n_rows: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.words = nn.Embedding(n_rows, _WIDTH)
        self.hidden, self.out = nn.Linear(_N_WORDS * _WIDTH, 64), nn.Linear(64, 1)
        self.to(dtype)
        for param in self.parameters():
            std = 0.1 if param is self.words.weight else param.shape[-1] ** -0.5
            nn.init.normal_(param, std=std, generator=draws)

    def forward(self, examples: Tensor) -> Tensor:
        """Loss in nat (B,) of examples (B, 5): four words, and the one that is judged."""
        x = F.relu(self.hidden(self.words(examples[:, :-1]).flatten(1)))
        common = (examples[:, -1] < _N_COMMON).to(x.dtype)
        return F.binary_cross_entropy_with_logits(self.out(x)[:, 0], common, reduction="none")


@dataclass(frozen=True)
class _Words:
    """Ranks of the words of a text, the commonest 0; words that training lacks share a rank."""

    train: Tensor
    valid: Tensor

    def batch(self, t: int, seed: int) -> Tensor:
        """Examples (512, 5) of the training text."""
        draws = torch.Generator().manual_seed(seed * 100_003 + t)
        at = torch.randint(len(self.train) - _N_WORDS, (_BATCH, 1), generator=draws)
        return self.train[at + torch.arange(_N_WORDS + 1)]


@dataclass(frozen=True)
class _DrawByDraw(LazyDP):
    """The draws of each step, late."""

    def deferred(self) -> Noise:
        return EachStep()


@dataclass(frozen=True)
class _One(EachStep):
    """Noise of one."""

    def draw(self, key: int, rows: Tensor, t: int, d: int) -> Tensor:
        return torch.ones(len(rows), d, device=rows.device)


@dataclass(frozen=True)
class _Ones(LazyDP):
    def deferred(self) -> Noise:
        return _One()


@dataclass(frozen=True)
class _Last:
    """The noise of the last step alone in the place of all that a row lacks."""

    def parts(
        self, key: int, rows: Tensor, paid: Tensor, variance: Tensor, d: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        std = (variance[-1] - variance[-2]).sqrt().float()
        yield rows, normal(key, rows, len(variance) - 1, d) * std


@dataclass(frozen=True)
class _Unmerged(LazyDP):
    """Merging forgotten."""

    def deferred(self) -> Noise:
        return _Last()


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Time of a step; the noise of rows; the loss of what was trained."""
    words = _words(corpus(data))
    baseline = load(f"train/{method.card.baseline}")()
    speed = _speed(method, baseline, words, seed)
    return [speed, _noise(method, baseline, words, seed), _loss(method, baseline, words, seed)]


def _words(text: Corpus) -> _Words:
    train, valid = (
        re.findall(r"[a-z']+|[^a-z'\s]", bytes(part.to(torch.uint8).numpy()).decode().lower())
        for part in (text.train, text.valid)
    )
    ranks = {word: rank for rank, (word, _) in enumerate(Counter(train).most_common())}
    return _Words(
        torch.tensor([ranks[word] for word in train]),
        torch.tensor([ranks.get(word, len(ranks)) for word in valid]),
    )


def _made(policy: PrivatePolicy, n_rows: int, seed: int, **model: Any) -> tuple[_Clicks, Any]:
    net = _Clicks(n_rows, **model)
    return net, policy(net, lr=_LR, batch_size=_BATCH, seed=seed)


def _step(model: _Clicks, optimizer: PrivateSGD, batch: Tensor, scale: float = 1.0) -> float:
    """A whole step; its seconds."""
    start = time.perf_counter()
    optimizer.backward(model(batch) * scale)
    optimizer.step()
    return time.perf_counter() - start


# --- speed


def _speed(method: Any, baseline: Any, words: _Words, seed: int) -> Row:
    runs = [_made(policy, _N_ROWS, seed) for policy in (method, baseline)]
    for t in range(_N_WARM):
        for model, optimizer in runs:
            _step(model, optimizer, words.batch(t, seed))
    times = np.array(
        [
            [_step(*one, words.batch(t, seed)) for one in runs]
            for t in range(_N_WARM, _N_WARM + _N_TIMED)
        ]
    )
    model, optimizer = runs[0]
    written, in_batches = _rows_written(model, optimizer, words, seed)
    start = time.perf_counter()
    optimizer.flush()
    flush = time.perf_counter() - start
    mine, theirs = times.mean(0)
    merged, apart = (_late_flush(policy, words, seed) for policy in (method, _DrawByDraw()))
    turns = times[:, 0] / times[:, 1]  # what slows the machine for a while slows both of a turn
    share = (_LONG_RUN * mine + flush) / (_LONG_RUN * theirs)
    held, others = (
        bytes_of(list(net.parameters())) + bytes_of(worker.state) for net, worker in runs
    )
    return Row(
        "time of a step beside the baseline's", float(turns.mean()), 1.0,
        paired_interval(turns, np.ones_like(turns), seed), len(turns),
        {
            "with a flush every 1000 steps": share,
            "ms a step": 1e3 * mine,
            "ms a step, baseline": 1e3 * theirs,
            "rows that two steps write": float(written),
            "rows that their batches read": float(in_batches),
            f"ms of a flush of {_N_FEW_ROWS} rows after {_N_LATE} steps": 1e3 * merged,
            "the same, draw by draw": 1e3 * apart,
        },
        {
            "ten times faster with a flush every 1000 steps, too": share < 0.1,
            "no more rows are written than are read": written <= in_batches,
            "late draws, not merged, are the table of draws at once to the bit":
                _difference(_DrawByDraw(), torch.float32, words, seed) == 0.0,
            "noise of one sums up to 1e-6":
                _difference(_Ones(), torch.float64, words, seed) <= 1e-6,
            "merging makes a flush five times faster": merged < apart / 5,
        },
        bytes=held, seconds=float(times[:, 0].sum()), baseline_bytes=others,
        data="words of books and WikiText-2, a table of 1e6 x 32, batches of 512",
        note=f"{theirs / mine:.0f} times the steps a second; a flush takes {flush:.2f} s; the "
        "baseline's noise is drawn by torch's own generator, twice as fast a number",
    )  # fmt: skip


def _rows_written(
    model: _Clicks, optimizer: PrivateSGD, words: _Words, seed: int
) -> tuple[int, int]:
    """Rows of the table that two steps change, and rows that their batches read."""
    table, batches = model.words.weight, [words.batch(10_000 + i, seed) for i in range(2)]
    before = table.detach().clone()
    for batch in batches:
        _step(model, optimizer, batch)
    changed = int((table.detach() != before).any(1).sum())
    return changed, len(torch.unique(torch.cat(batches)[:, :-1]))


def _late_flush(policy: Any, words: _Words, seed: int) -> float:
    """Median seconds of a flush after steps that left most rows without their noise."""
    found = []
    for _ in range(3):
        model, optimizer = _made(policy, _N_FEW_ROWS, seed)
        for t in range(_N_LATE):
            _step(model, optimizer, words.batch(t, seed))
        start = time.perf_counter()
        optimizer.flush()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _difference(policy: LazyDP, dtype: torch.dtype, words: _Words, seed: int) -> float:
    """Largest difference between weights whose noise came late, and at once in every step."""
    (late, lazy), (soon, eager) = (_made(policy, _N_FEW_ROWS, seed, dtype=dtype) for _ in range(2))
    for t in range(_N_LATE):
        _step(late, lazy, words.batch(t, seed))
        _step(soon, eager, words.batch(t, seed))
        eager.flush()
    lazy.flush()
    pairs = zip(late.parameters(), soon.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


# --- the noise


def _noise(method: Any, baseline: Any, words: _Words, seed: int) -> Row:
    """Losses count zero, so that the table moves by its noise alone."""
    rates = [_LR * (1 + t % 3) for t in range(_N_LATE)]
    batches = [words.batch(t, seed) for t in range(_N_LATE)]
    reads = torch.stack(
        [torch.bincount(b[:, :-1].flatten(), minlength=_N_FEW_ROWS) > 0 for b in batches]
    ).sum(0)
    kinds = {
        "rows that were read": (reads > 0).nonzero().flatten()[:_N_SAMPLED],
        "rows that were never read": (reads == 0).nonzero().flatten()[:_N_SAMPLED],
    }
    std = sum((rate / _BATCH) ** 2 for rate in rates) ** 0.5

    def scaled(policy: PrivatePolicy, flush: bool = True) -> dict[str, NDArray[np.float64]]:
        model, optimizer = _made(policy, _N_FEW_ROWS, seed)
        before = model.words.weight.detach().clone()
        for rate, batch in zip(rates, batches, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            _step(model, optimizer, batch, scale=0.0)
        if flush:
            optimizer.flush()
        moved = (model.words.weight.detach() - before).double() / std
        return {kind: moved[rows].numpy() for kind, rows in kinds.items()}

    mine, theirs = scaled(method), scaled(baseline)
    forgotten, last = scaled(method, flush=False), scaled(_Unmerged())
    per_row, others = (
        np.concatenate([(x**2).mean(1) for x in found.values()]) for found in (mine, theirs)
    )
    never = "rows that were never read"
    tested = {kind: _distance(x) for kind, x in mine.items()}
    spread = {kind: float((x**2).mean()) for kind, x in mine.items()}
    return Row(
        "variance of a row's noise beside that of all steps", float(per_row.mean()),
        float(others.mean()), paired_interval(per_row, others, seed), len(per_row),
        {
            **spread,
            "never read, flush forgotten": float((forgotten[never] ** 2).mean()),
            "never read, merge forgotten": float((last[never] ** 2).mean()),
            **{f"distance from normal, {kind}": value for kind, value in tested.items()},
            "the same, merge forgotten": _distance(last[never]),
        },
        {
            "variances within 2 %": all(abs(value - 1) < 0.02 for value in spread.values()),
            "no distance from normal beyond 1 % of chance":
                max(tested.values()) < _KS_1_PERCENT,
            "a forgotten flush and a forgotten merge are found":
                min(_distance(forgotten[never]), _distance(last[never])) > _KS_1_PERCENT,
        },
        primary=False, data=f"{_N_LATE} steps at changing rates, gradients of zero",
        note="distances are Kolmogorov's times the root of the numbers; 1.63 is met by chance once "
        "in a hundred",
    )  # fmt: skip


def _distance(x: NDArray[np.float64]) -> float:
    """Kolmogorov's distance of numbers from a standard normal, times the root of how many."""
    x = np.sort(x.ravel())
    below = torch.special.ndtr(torch.from_numpy(x)).numpy()
    steps = np.arange(x.size + 1) / x.size
    worst = max(float((steps[1:] - below).max()), float((below - steps[:-1]).max()))
    return worst * math.sqrt(x.size)


# --- what was learned


def _loss(method: Any, baseline: Any, words: _Words, seed: int) -> Row:
    mine, theirs, plain = (
        _trained(policy, words, seed) for policy in (method, baseline, LazyDP(0.0, method.max_norm))
    )
    judged = _judged(words)
    share = float((judged[..., -1] < _N_COMMON).double().mean())
    chance = -share * np.log(share) - (1 - share) * np.log(1 - share)
    return Row(
        "nat an example", float(mine.mean()), float(theirs.mean()),
        paired_interval(mine, theirs, seed), len(mine),
        {"without noise": float(plain.mean()), "share of common words alone": float(chance)},
        {
            "within 1 % of the baseline": abs(mine.mean() - theirs.mean()) < 0.01 * theirs.mean(),
            "something was learned": mine.mean() < 0.98 * chance,
        },
        primary=False, data=f"{_N_STEPS} steps, judged on WikiText-2",
    )  # fmt: skip


def _trained(policy: Any, words: _Words, seed: int) -> NDArray[np.float64]:
    """Loss of each window of text that nobody trained on."""
    model, optimizer = _made(policy, _N_ROWS, seed)
    for t in range(_N_STEPS):
        _step(model, optimizer, words.batch(t, seed))
    with torch.no_grad():
        return np.array([float(model(window).mean()) for window in _judged(words)])


def _judged(words: _Words) -> Tensor:
    """Windows of examples (64, 256, 5) that lie evenly in the validation text."""
    n = _N_JUDGED * _JUDGED_TOGETHER
    at = torch.linspace(0, len(words.valid) - _N_WORDS - 1, n).long()[:, None]
    found: Tensor = words.valid[at + torch.arange(_N_WORDS + 1)]
    return found.view(_N_JUDGED, _JUDGED_TOGETHER, -1)
