"""Blocks of rows of a stored matrix, decoded and encoded again and again, as optimizers do.

The same bytes as `codec.th`, without what costs time there: arguments are trusted, scratch is lent
by the caller, and what is encoded is used up.

Shapes: n rows of d coordinates, r rows in a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from memwise.codec import th_scale, th_store
from memwise.codec.spec import FLOATS, LEARNED, Block, Spec
from memwise.codec.th_grid import FLOAT_TYPES, levels, pair_table, round_float
from memwise.codec.th_pack import Tensor, Work
from memwise.errors import InvalidKnob

SCALES = ("none", "row", "group", "expand", "rank1")


@dataclass(frozen=True)
class Rows:
    """The rows of a matrix (n, d) that a codec holds.

    Attributes:
        spec: its codec.
        arrays: what is stored; `encode` writes into them.
        shape: (n, d).

    Raises:
        InvalidKnob: rows of such a codec cannot be encoded alone.
    """

    spec: Spec
    arrays: Mapping[str, Tensor]
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        """Refuses codecs whose rows have no places or factors of their own."""
        grid = self.spec.grid.name
        if (
            self.spec.scale.kind not in SCALES
            or self.spec.packing.kind not in ("dense", "byte")
            or grid in LEARNED
        ):
            raise InvalidKnob(
                f"codec {self.spec.name!r} cannot be written row by row: that needs one of the "
                f"scales {', '.join(SCALES)}, known levels and codes that have fixed places"
            )


class Bound(Protocol):
    """A block of rows that can be read from and written to any place of a stored matrix."""

    def decode(self, first: int) -> Tensor:
        """The block, holding the rows from `first` on."""

    def encode(self, first: int, generator: torch.Generator) -> None:
        """Store the block as the rows from `first` on; its numbers are finite, and used up.

        Factors of these rows alone are found anew; those of rank1 must reach already.
        """


class Scratch:
    """Float32 blocks and what codecs need beside them, 8 bytes a coordinate; made once a step."""

    def __init__(self) -> None:
        self._floats = self._other = torch.empty(0)
        self._words = torch.empty(0, dtype=torch.int64)
        self._views: dict[tuple[str, int, tuple[int, ...]], _Views] = {}
        self._blocks: Sequence[Tensor] = ()
        self._layout = (0, 0, 0)

    def lay_out(self, count: int, rows: int, width: int, device: torch.device) -> None:
        """Make room for so many blocks (rows, width)."""
        size, spare = count * rows * width, rows * (width + width % 2)
        if (
            self._floats.numel() < size
            or self._other.numel() < spare
            or self._other.device != device
        ):
            self._views.clear()
            self._blocks = ()  # first let go, so that old and new never stand side by side
            self._floats = self._other = self._words = torch.empty(0)
            self._floats = torch.empty(size, device=device)
            self._other = torch.empty(spare, device=device)
            self._words = torch.empty(-(-spare // 2), dtype=torch.int64, device=device)
        if (count, rows, width) != self._layout:
            self._layout = (count, rows, width)
            self._views.clear()
        self._blocks = list(self._floats[:size].view(count, rows, width))

    def block(self, place: int, rows: int) -> Tensor:
        """The first rows of a block, contiguous."""
        return self._blocks[place][:rows]

    def other(self, like: Tensor) -> Tensor:
        """Room of this shape, which decoding and encoding overwrite."""
        return self._other[: like.numel()].view(like.shape)

    def bind(self, rows: Rows, place: int, n_rows: int) -> Bound:
        """What decodes rows of a matrix to a block, and encodes them from it.

        The number of rows must cut no group.
        """
        x, spec = self.block(place, n_rows), rows.spec
        if not _is_lean(spec, x):
            return _General(rows, x, self._work(x))
        # Blocks of many parameters have one shape; a view costs as much as a small operation.
        key = (spec.name, place, tuple(x.shape))
        if key not in self._views:
            self._views[key] = _Views(spec, x, self._work(x))
        return _Lean(rows, self._views[key])

    def _work(self, x: Tensor) -> Work:
        n = x.numel()
        words = self._words[: (n + 1) // 2]
        other = self._other[:n]
        # The lean way is done with one before it needs the other.
        codes = other.view(torch.uint8)[:n]
        return Work(x.view(-1), other, words, words.view(torch.int32)[:n], codes)


def _is_lean(spec: Spec, x: Tensor) -> bool:
    return (
        spec.packing.kind == "dense"
        and spec.rounding.kind == "nearest"
        and spec.grid.bits in (4, 8)
        and not spec.grid.affine
        and spec.scale.kind in ("row", "group", "rank1")
        and x.shape[1] % 2 == 0
        and x.numel() % max(spec.scale.group, 1) == 0
    )


class _Views:
    """All views of scratch that coding a block (r, d) with dense four or eight bits needs."""

    def __init__(self, spec: Spec, x: Tensor, work: Work) -> None:
        self.x, self.work, self.grid = x, work, levels(spec, x.device)
        self.n_bytes = x.numel() * spec.grid.bits // 8
        self.twos = work.codes.view(torch.int16)  # little-endian: the first code is below
        self.kind = th_store.TORCH_TYPES.get(spec.grid.name)
        self.seen, self.table, self.index = work.y, self.grid.table, work.index
        if spec.grid.bits == 4:
            self.seen, self.table = work.y.view(torch.int64), pair_table(spec, self.table)
            self.index = work.index[: self.n_bytes]
        self.other, self.peak = work.other.view(x.shape), x.new_tensor(self.grid.peak)
        self.share = x.shape[1] if spec.scale.kind == "row" else spec.scale.group
        if self.share:
            self.shares = x.view(-1, self.share)
            self.high, self.low = x.new_empty(2, len(self.shares), 1)


class _Lean:
    """Four or eight bits a code, factors of rows, groups or rank1: a dozen calls a block."""

    def __init__(self, rows: Rows, views: _Views) -> None:
        self._views, self._spec = views, rows.spec
        self._n_rows, self._width = views.x.shape
        self._codes = rows.arrays["codes"].view(torch.uint8).view(-1)
        self._scale = scale = rows.arrays["scale"]
        if not views.share:
            n = rows.shape[0]
            self._factors = scale[:n, None], scale[n:]
            filled = scale.masked_fill(scale == 0, 1)
            self._divisors = filled[:n, None], filled[n:]
        else:
            self._scale = scale[:, None]

    def decode(self, first: int) -> Tensor:
        views, codes = self._views, self._bytes(first)
        if views.kind is not None:
            views.seen.copy_(codes.view(views.kind))
        else:
            torch.index_select(views.table, 0, views.index.copy_(codes), out=views.seen)
        if views.share:
            views.shares.mul_(self._scale[self._place(first)])
            return views.x
        return views.x.mul_(self._least(first, self._factors))

    def encode(self, first: int, generator: torch.Generator) -> None:
        views = self._views
        if views.share:
            torch.amax(views.shares, 1, keepdim=True, out=views.high)
            torch.amin(views.shares, 1, keepdim=True, out=views.low)
            largest = torch.maximum(views.high, views.low.neg_(), out=views.high)
            scale = self._scale[self._place(first)]
            scale.copy_(th_scale.for_peak(self._spec, largest, views.grid.peak))
            if th_scale.keeps_zero_scale(self._spec):
                scale = scale.masked_fill(scale == 0, 1)
            views.shares.div_(scale)
        else:
            views.x.div_(self._least(first, self._divisors))
        views.grid.nearest(views.work)
        codes = views.work.codes
        if self._spec.grid.bits == 4:
            codes = views.twos.bitwise_or_(views.twos >> 4)
        self._bytes(first).copy_(codes)

    def _bytes(self, first: int) -> Tensor:
        begin = first * self._width * self._spec.grid.bits // 8
        return self._codes[begin : begin + self._views.n_bytes]

    def _place(self, first: int) -> slice:
        begin = first * self._width // self._views.share
        return slice(begin, begin + self._n_rows * self._width // self._views.share)

    def _least(self, first: int, factors: tuple[Tensor, Tensor]) -> Tensor:
        of_rows, of_columns = factors
        views = self._views
        torch.minimum(of_rows[first : first + self._n_rows], of_columns, out=views.other)
        return views.other if views.grid.peak == 1 else views.other.div_(views.peak)


class _General:
    """Every other codec of rows, by the parts that `codec.th` is made of."""

    def __init__(self, rows: Rows, x: Tensor, work: Work) -> None:
        self._rows, self._x = rows, x
        self._work = replace(work, codes=torch.empty(x.numel(), dtype=torch.uint8, device=x.device))

    def decode(self, first: int) -> Tensor:
        spec, block = self._rows.spec, self._block(first)
        codes = self._rows.arrays["codes"][block.rows]
        if spec.grid.name in FLOATS:
            return self._x.copy_(codes.view(FLOAT_TYPES[spec.grid.name]))
        # Codes are looked up two by two: a row of an odd width needs room for one level more.
        odd, known = block.width % 2 and spec.grid.bits < 8, levels(spec, self._x.device)
        size = block.n_rows * (block.width + 1)
        work = Work.of(size, self._x.device) if odd else self._work
        y = th_store.look_up(spec, known.table, codes, block, work)
        other = self._work.other
        th_scale.multiply(spec, self._rows.arrays, self._rows.shape, block, y, other, known.peak)
        return self._x.copy_(y) if odd else self._x

    def encode(self, first: int, generator: torch.Generator) -> None:
        spec, arrays, block = self._rows.spec, self._rows.arrays, self._block(first)
        place = self._work
        if spec.grid.name in FLOATS:
            th_store.place(spec, round_float(spec, place, generator), block, arrays["codes"])
            return
        grid = levels(spec, self._x.device)
        th_scale.renew(spec, arrays, block, self._x, grid.peak)
        divisors = th_scale.divisors(spec, arrays)
        th_scale.divide(spec, divisors, self._rows.shape, block, place, grid.peak)
        if spec.rounding.kind == "stochastic":
            grid.stochastic(place, generator)
        else:
            grid.nearest(place)
        th_store.place(spec, place.codes, block, arrays["codes"])

    def _block(self, first: int) -> Block:
        width = self._rows.shape[1]
        return Block(first, len(self._x), 0, width, first * width)
