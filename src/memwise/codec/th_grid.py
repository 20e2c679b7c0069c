"""Levels of the grids in torch: from scaled coordinates to codes, and the table back.

A grid works in place on the scratch of one block: `work.y` holds the scaled coordinates and is used
up, `work.codes` gets the codes.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from memwise.codec import tables
from memwise.codec.spec import INTEGERS, LEARNED, MINIFLOATS, Spec
from memwise.codec.th_pack import Tensor, Work

LLOYD_ROUNDS = 30
FLOAT_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MINIFLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Levels(Protocol):
    """What a coordinate can become.

    Attributes:
        low: scaled coordinates below are beyond the grid.
        peak: the scaled magnitude that the largest coordinate of a share gets.
        table: (2^bits,) float32, the level of every code.
    """

    @property
    def low(self) -> float: ...  # noqa: D102

    @property
    def peak(self) -> float: ...  # noqa: D102

    @property
    def table(self) -> Tensor: ...  # noqa: D102

    def nearest(self, work: Work) -> None:
        """Codes of the nearest levels; of the even code where two are equally near."""

    def stochastic(self, work: Work, generator: torch.Generator) -> None:
        """Codes of one of the two levels around, drawn so that the mean is the coordinate."""


@dataclass(frozen=True)
class Steps:
    """Even steps: the integers, and the linear tables, whose code i stands for (i + 1) / 2^bits.

    Attributes:
        first: least number of steps.
        last: largest number of steps.
        bits: bits of a code.
        low: scaled coordinates below are beyond the grid.
        peak: the scaled magnitude of the largest coordinate.
        table: (2^bits,) float32.
        stretch: steps a unit.
        shift: steps that are taken off.
    """

    first: int
    last: int
    bits: int
    low: float
    peak: float
    table: Tensor
    stretch: float = 1.0
    shift: float = 0.0

    def nearest(self, work: Work) -> None:
        """Codes of the nearest levels, ties to even."""
        self._count(work)
        self._write(work, work.y.round_())

    def stochastic(self, work: Work, generator: torch.Generator) -> None:
        """Codes of the levels below or above."""
        self._count(work)
        whole = torch.floor(work.y, out=work.other)
        draw = work.uniform(generator)
        whole += torch.gt(work.y.sub_(whole), draw, out=draw)
        self._write(work, whole)

    def _count(self, work: Work) -> None:
        if self.stretch != 1:
            work.y.mul_(self.stretch).sub_(self.shift)

    def _write(self, work: Work, steps: Tensor) -> None:
        # Through 32 bits: two fast conversions, where floats to bytes are one slow one.
        index = work.index.copy_(steps.clamp_(self.first, self.last))
        if self.first < 0:
            index.bitwise_and_((1 << self.bits) - 1)
        work.codes.copy_(index)


@dataclass(frozen=True)
class Signs:
    """Minus and plus one; -0.0 counts as 0.0, which is plus.

    Attributes:
        table: (2,) float32.
        low: nothing is beyond.
        peak: one.
    """

    table: Tensor
    low: float = -1.0
    peak: float = 1.0

    def nearest(self, work: Work) -> None:
        """One where the coordinate is zero or above."""
        work.codes.copy_(work.y.ge_(0))

    def stochastic(self, work: Work, generator: torch.Generator) -> None:
        """One with the probability (y + 1) / 2."""
        draw = work.uniform(generator)
        work.codes.copy_(torch.gt(work.y.add_(1).mul_(0.5), draw, out=draw))


@dataclass(frozen=True)
class Table:
    """Any levels in rising order.

    A code is the number of borders at or below the coordinate.

    Attributes:
        table: (2^bits,) float32, rising.
        low: the first level, or 0 where that is above zero.
        peak: one.
    """

    table: Tensor
    low: float
    peak: float = 1.0

    def nearest(self, work: Work) -> None:
        """Codes of the nearest levels, of the even code where two are equally near."""
        _count(work, *_borders(self.table, "middle"))

    def stochastic(self, work: Work, generator: torch.Generator) -> None:
        """Codes of the levels below or above."""
        _count(work, *_borders(self.table, "level"))
        _draw(work, self.table, generator)


@dataclass(frozen=True)
class Known(Table):
    """A table of the grammar, whose codes are found without a search.

    At most one border lies among all numbers with the same upper 16 bits: a look-up by these bits
    gives the count up to there, and one comparison with the next border makes it exact.

    Attributes:
        grid: name of the grid.
    """

    grid: str = ""

    def nearest(self, work: Work) -> None:
        """Codes of the nearest levels, of the even code where two are equally near."""
        _look_up(work, *_look_up_table(self.grid, "middle", self.table.device))

    def stochastic(self, work: Work, generator: torch.Generator) -> None:
        """Codes of the levels below or above."""
        _look_up(work, *_look_up_table(self.grid, "level", self.table.device))
        _draw(work, self.table, generator)


@dataclass(frozen=True)
class Minifloat:
    """Eight-bit floats, the codes being their bits.

    Attributes:
        kind: torch's type.
        mantissa: stored bits of the mantissa.
        least: exponent of the least number above zero.
        low: the largest number, negative.
        peak: the largest number.
        table: (256,) float32.
    """

    kind: torch.dtype
    mantissa: int
    least: int
    low: float
    peak: float
    table: Tensor

    def nearest(self, work: Work) -> None:
        """Torch's rounding, to nearest even."""
        work.codes.copy_(work.y.clamp_(self.low, self.peak).to(self.kind).view(torch.uint8))

    def stochastic(self, work: Work, generator: torch.Generator) -> None:
        """Codes of the numbers below or above."""
        draw_float(work, self.mantissa, self.least, generator)
        self.nearest(work)


def round_float(spec: Spec, work: Work, generator: torch.Generator | None) -> Tensor:
    """The coordinates of a block in the floating format of the grid."""
    kind = FLOAT_TYPES[spec.grid.name]
    if generator is not None and spec.rounding.kind == "stochastic":
        if kind == torch.bfloat16:
            draw_bf16(work, generator)
        elif kind == torch.float16:
            draw_float(work, 10, -24, generator)
    return work.y.to(kind)


def draw_bf16(work: Work, generator: torch.Generator) -> None:
    """Moves every coordinate to the bf16 number below or above it: 16 random bits, then a cut."""
    work.words.random_(-(2**63), None, generator=generator)
    work.words.bitwise_and_(0x0000FFFF_0000FFFF)
    work.y.view(torch.int32).add_(work.index).bitwise_and_(-(1 << 16))


def draw_float(work: Work, mantissa: int, least: int, generator: torch.Generator) -> None:
    """Moves every coordinate to the number below or above it in a narrower floating format.

    Args:
        work: scratch; `y` is replaced.
        mantissa: stored bits of the mantissa.
        least: exponent of the least number above zero.
        generator: the source of the draws.
    """
    # A step is the power of two that is written into the exponent's bits alone.
    exponent = (work.y.view(torch.int32) >> 23).bitwise_and_(0xFF)
    step = exponent.sub_(mantissa).clamp_(min=least + 127).bitwise_left_shift_(23)
    step = step.view(torch.float32)
    whole = torch.floor(work.y.div_(step), out=work.other)
    draw = work.uniform(generator)
    whole += torch.gt(work.y.sub_(whole), draw, out=draw)
    torch.mul(whole, step, out=work.y)


def levels(spec: Spec, device: torch.device, learned: Tensor | None = None) -> Levels:
    """The levels of a codec's grid; a learned grid brings its own."""
    if learned is not None:
        return Table(learned, -1.0)
    return _known(spec.grid.name, device)


@cache
def _known(name: str, device: torch.device) -> Levels:
    if name in MINIFLOATS:
        kind = _MINIFLOATS[name]
        table = torch.arange(256, dtype=torch.uint8, device=device).view(kind).float()
        peak = torch.finfo(kind).max
        mantissa, least = (3, -9) if name == "e4m3" else (2, -16)
        return Minifloat(kind, mantissa, least, -peak, peak, table)
    if name == "sign":
        return Signs(torch.tensor([-1.0, 1.0], device=device))
    if name in INTEGERS or name.startswith("linear"):
        return _steps(name, device)
    table = torch.tensor(tables.levels(name), dtype=torch.float64, device=device).float()
    return Known(table, -1.0, grid=name)


def _steps(name: str, device: torch.device) -> Steps:
    bits = int(name[-1])
    codes = torch.arange(1 << bits, dtype=torch.float32, device=device)
    last = (1 << bits) - 1
    if name.startswith("linear"):
        table = (codes + 1) / (1 << bits)
        return Steps(0, last, bits, 0.0, 1.0, table, float(1 << bits), 1.0)
    if name.startswith("u"):
        return Steps(0, last, bits, 0.0, float(last), codes)
    half = last // 2
    return Steps(
        -half,
        half,
        bits,
        float(-half),
        float(half),
        torch.where(codes > half, codes - last - 1, codes),
    )


def pair_table(spec: Spec, table: Tensor) -> Tensor:
    """Two levels for every two codes, as one number of 64 bits, so that one look-up gets both."""
    if spec.grid.name in LEARNED:
        return _pairs(table)
    return _known_pairs(spec.grid.name, table.device)


@cache
def _known_pairs(name: str, device: torch.device) -> Tensor:
    return _pairs(_known(name, device).table)


def _pairs(table: Tensor) -> Tensor:
    n = len(table)
    first, second = table.repeat(n), table.repeat_interleave(n)
    return torch.stack([first, second], dim=1).view(torch.int64).view(-1)


@cache
def _look_up_table(grid: str, border: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes at the lower end of every run of equal upper bits, (65536,) uint8; and the borders.

    The runs stand in the order of their bits as a signed number plus 32768: negative ones first.
    """
    (borders,) = _borders(_known(grid, device).table, border)
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=device) << 16
    # Among negative numbers the lower end has the larger magnitude, all lower bits one.
    ends = torch.where(bits < 0, bits | 0xFFFF, bits).view(torch.float32).nan_to_num(0.0)
    codes = torch.bucketize(ends, borders, right=True).to(torch.uint8)
    return codes, torch.cat([borders, borders.new_tensor([torch.inf])])


def _borders(table: Tensor, border: str) -> tuple[Tensor]:
    """The least float32 that belongs to every level but the first."""
    if border == "level":
        return (torch.cat([table[1:-1], table.new_tensor([torch.inf])]),)
    middle = (table[:-1].double() + table[1:].double()) / 2  # exact
    least = middle.float()
    above = torch.nextafter(least, least.new_tensor(torch.inf))
    least = torch.where(least.double() < middle, above, least)
    odd = torch.arange(1, len(table), device=table.device) % 2 == 1
    return (torch.where(odd & (least.double() == middle), above, least),)


def _look_up(work: Work, codes: Tensor, borders: Tensor) -> None:
    """Counts the borders at or below every coordinate, by its upper 16 bits and one comparison."""
    index = work.index
    torch.bitwise_right_shift(work.y.view(torch.int32), 16, out=index).add_(1 << 15)
    torch.index_select(codes, 0, index, out=work.codes)
    index.copy_(work.codes)
    torch.index_select(borders, 0, index, out=work.other)
    # The bits of 1.0, shifted by 29, are 1: no operation mixes types, which would cost two more
    # arrays of the block's size.
    passed = torch.ge(work.y, work.other, out=work.other).view(torch.int32).bitwise_right_shift_(29)
    work.codes.copy_(index.add_(passed))


def _count(work: Work, borders: Tensor) -> None:
    """Counts the borders at or below every coordinate, for tables that are used once."""
    work.codes.copy_(torch.bucketize(work.y, borders, right=True))


def _draw(work: Work, table: Tensor, generator: torch.Generator) -> None:
    """Moves codes of the level below up by one, as often as the coordinate lies near the next."""
    index = work.index.copy_(work.codes)
    lower = torch.index_select(table, 0, index, out=work.other)
    work.y.sub_(lower)
    gap = table.diff(append=table[-1:])
    wide = torch.index_select(gap, 0, index)
    work.y.div_(wide)
    draw = work.uniform(generator)
    work.codes.add_(torch.gt(work.y, draw, out=draw).to(torch.uint8))


def fit(sample: Tensor, bits: int) -> Tensor:
    """Levels (2^bits,) float32 of least squared error for scaled coordinates: Lloyd's rounds.

    Starts at the quantiles; a level that no coordinate is nearest to stays where it is.
    """
    if not len(sample):
        return torch.linspace(-1, 1, 1 << bits, device=sample.device)
    y = sample.double().sort().values
    sums = torch.cat([y.new_zeros(1), y.cumsum(0)])
    places = (torch.arange(1 << bits, device=y.device) + 0.5) * len(y) / (1 << bits)
    table = y[places.long()]
    for _ in range(LLOYD_ROUNDS):
        ends = torch.searchsorted(y, (table[:-1] + table[1:]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_tensor([len(y)])])
        count = ends.diff()
        mean = sums[ends].diff() / count.clamp(min=1)
        table = torch.where(count > 0, mean, table)
    return table.float()
