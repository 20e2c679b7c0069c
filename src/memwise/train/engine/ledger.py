"""The row ledger: what the rows of a table owe, paid when they are next read.

A step that changes every row of a table, by noise, costs as much as the table is large, and most
rows are not read for a long time. So the ledger notes, for each row, the last step whose noise it
has, and for each step how large that noise is. A row pays before it is read, and all rows pay
before the table is saved or handed on. That is exact where what is owed adds to the weights and
depends on nothing else, which is so for plain SGD and not for momentum, Adam or decay.

Noise is a function of key, row and step: it is the same whichever other rows are read, and when.

Shapes: n rows of d coordinates, r of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor

BLOCK = 1 << 18  # coordinates of noise that are drawn at once by a flush: 1 MiB, and some scratch
_FIRST_STEPS = 1 << 10  # room for steps in a new ledger

# The finalizer of SplitMix64 (Steele et al. 2014), and its increment, as signed numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_ROUNDS = (
    (30, 0xBF58476D1CE4E5B9 - (1 << 64)),
    (27, 0x94D049BB133111EB - (1 << 64)),
    (31, 1),
)


class Noise(Protocol):
    """How the noise that rows owe is drawn."""

    def parts(
        self, key: int, rows: Tensor, paid: Tensor, variance: Tensor, d: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What is to be subtracted from rows, part after part.

        Args:
            key: of the table.
            rows: (r,) int64, each once; all of them owe something.
            paid: (r,) int64, last step whose noise a row has.
            variance: (t + 1,) float64, of the noise of all steps up to each; t is the last one.
            d: coordinates of a row.

        Yields:
            Some of the rows and their noise (., d), float32.
        """


@dataclass(frozen=True)
class Aggregated:
    """One draw of the summed variance in the place of one a step: the sum has that distribution."""

    def parts(
        self, key: int, rows: Tensor, paid: Tensor, variance: Tensor, d: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows at once."""
        due = (variance[-1] - variance[paid]).sqrt_().float()
        yield rows, normal(key, rows, len(variance) - 1, d).mul_(due[:, None])


@dataclass(frozen=True)
class EachStep:
    """The very draws that each step would have made: bit for bit the table without a ledger."""

    def parts(
        self, key: int, rows: Tensor, paid: Tensor, variance: Tensor, d: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Step after step, those rows that lack it."""
        for t in range(int(paid.min()) + 1, len(variance)):
            late = rows[paid < t]
            std = (variance[t] - variance[t - 1]).sqrt_().float()
            yield late, self.draw(key, late, t, d).mul_(std)

    def draw(self, key: int, rows: Tensor, t: int, d: int) -> Tensor:
        """The unscaled noise of a step, (r, d) float32."""
        return normal(key, rows, t, d)


@dataclass(frozen=True)
class RowLedger:
    """A table, and who owes what: a view of the tensors in `state`, where all of it is kept.

    Attributes:
        weight: the table (n, d), changed in place.
        state: `now`, the number of steps; `paid`, (n,) int32; `variance`, float64, of the noise of
            all steps up to each, with room for more.
        noise: how it is drawn.
        key: of this table's draws.
    """

    weight: Tensor
    state: dict[str, Any]
    noise: Noise
    key: int

    def open(self) -> None:
        """Begin with no row owing anything."""
        n, device = len(self.weight), self.weight.device
        variance = torch.zeros(_FIRST_STEPS, dtype=torch.float64, device=device)
        paid = torch.zeros(n, dtype=torch.int32, device=device)
        self.state.update({"now": 0, "paid": paid, "variance": variance})

    def owe(self, std: float) -> None:
        """Note the noise of one more step, of this standard deviation, for every row."""
        now, variance = self.state["now"], self.state["variance"]
        if now + 1 == len(variance):
            variance = torch.cat([variance, torch.zeros_like(variance)])
            self.state["variance"] = variance
        variance[now + 1] = variance[now] + std**2
        self.state["now"] = now + 1

    @torch.no_grad()
    def pay(self, rows: Tensor) -> None:
        """Give rows (r,), int64 and each once, the noise that they lack."""
        now, paid = self.state["now"], self.state["paid"]
        rows = rows[paid[rows] < now]
        if not len(rows):
            return
        owed = self.noise.parts(
            self.key, rows, paid[rows].long(), self.state["variance"][: now + 1],
            self.weight.shape[1],
        )  # fmt: skip
        for some, noise in owed:
            self.weight.index_add_(0, some, noise.to(self.weight.dtype), alpha=-1)
        paid[rows] = now

    def flush(self) -> None:
        """Give all rows what they lack."""
        n, d = self.weight.shape
        step = max(1, BLOCK // d)
        for first in range(0, n, step):
            last = min(n, first + step)
            self.pay(torch.arange(first, last, device=self.weight.device))

    def n_due(self) -> int:
        """Rows that owe something."""
        return int((self.state["paid"] < self.state["now"]).sum())


def normal(key: int, rows: Tensor, t: int, d: int) -> Tensor:
    """Standard normal numbers (r, d), float32, that follow from key, row, step and column alone.

    A hash of 64 bits a pair of numbers, by the transform of Box and Muller.
    """
    step = torch.tensor(t, device=rows.device) * _GOLDEN
    of_row = _mix(_mix(rows * _GOLDEN + key) + step)
    pairs = torch.arange(1, (d + 1) // 2 + 1, device=rows.device) * _GOLDEN
    bits = _mix(of_row[:, None] + pairs)  # (r, d / 2)
    low = (bits & 0xFFFFFFFF).float().mul_(math.tau * 2**-32)
    high = bits.bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF).float()
    radius = high.add_(0.5).mul_(2**-32).log_().mul_(-2).sqrt_()
    found = torch.cat([radius * low.cos(), radius.mul_(low.sin_())], 1)
    return found[:, :d]


def _mix(x: Tensor) -> Tensor:
    """Spread each of the 64 bits of every number over all of them, in place."""
    for shift, factor in _ROUNDS:
        # torch shifts the sign in from the left: those bits are cut off.
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)
        x *= factor
    return x
