"""Blocks of rows of a stored matrix, decoded and encoded again and again, as optimizers do.

The same bytes as `codec.th`, without what costs time there: arguments are trusted, scratch is lent
by the caller, and what is encoded is used up.

Shapes: n rows of d coordinates, r rows in a block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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

    def bind(self, x: Tensor, work: Work) -> "Bound":
        """What decodes to `x`, and encodes it, at any place.

        Args:
            x: a block (r, d), float32 and contiguous, that cuts no group; it is used up by
                encoding.
            work: scratch `around` r d coordinates, a few more if d is odd.
        """
        return _Lean(self, x, work) if self._is_lean(x) else _General(self, x, work)

    def _is_lean(self, x: Tensor) -> bool:
        spec = self.spec
        return (
            spec.packing.kind == "dense"
            and spec.rounding.kind == "nearest"
            and spec.grid.bits in (4, 8)
            and not spec.grid.affine
            and spec.scale.kind in ("row", "group", "rank1")
            and x.shape[1] % 2 == 0
            and x.numel() % max(spec.scale.group, 1) == 0
        )


class Bound(Protocol):
    """A block of rows that can be read from and written to any place of a stored matrix."""

    def decode(self, first: int) -> Tensor:
        """The block, holding the rows from `first` on."""

    def encode(self, first: int, generator: torch.Generator) -> None:
        """Store the block as the rows from `first` on; its numbers are finite, and used up.

        Factors of these rows alone are found anew; those of rank1 must reach already.
        """


class _Lean:
    """Eight or two times four bits a byte: all views are made beforehand, a dozen calls a block."""

    def __init__(self, rows: Rows, x: Tensor, work: Work) -> None:
        spec, arrays = rows.spec, rows.arrays
        n, d = rows.shape
        self._spec, self._grid = spec, levels(spec, x.device)
        self._x, self._work = x, work.over(x.view(-1))
        self._n_rows, self._width = x.shape
        self._codes = arrays["codes"].view(torch.uint8).view(-1)
        self._n_bytes = x.numel() * spec.grid.bits // 8
        self._twos = self._work.codes.view(torch.int16)  # little-endian: the first code is below
        self._seen, self._kind = self._work.y, th_store.TORCH_TYPES.get(spec.grid.name)
        self._table, self._index = self._grid.table, self._work.index
        if spec.grid.bits == 4:
            self._table, self._index = pair_table(spec, self._table), self._index[: self._n_bytes]
            self._seen = self._seen.view(torch.int64)
        self._share = d if spec.scale.kind == "row" else spec.scale.group
        if spec.scale.kind == "rank1":
            self._other = self._work.other.view(x.shape)
            of_rows, of_columns = arrays["scale"].split([n, d])
            self._factors = of_rows[:, None], of_columns[None]
            divisors = arrays["scale"].masked_fill(arrays["scale"] == 0, 1).split([n, d])
            self._divisors = divisors[0][:, None], divisors[1][None]
            self._peak = x.new_tensor(self._grid.peak)
        else:
            self._shares = x.view(-1, self._share)
            self._scale = arrays["scale"][:, None]
            self._high, self._low = x.new_empty(2, x.numel() // self._share, 1)

    def decode(self, first: int) -> Tensor:
        codes = self._bytes(first)
        if self._kind is not None:
            self._seen.copy_(codes.view(self._kind))
        else:
            torch.index_select(self._table, 0, self._index.copy_(codes), out=self._seen)
        if self._share:
            self._shares.mul_(self._scale[self._place(first)])
            return self._x
        return self._x.mul_(self._least(first, self._factors))

    def encode(self, first: int, generator: torch.Generator) -> None:
        if self._share:
            torch.amax(self._shares, 1, keepdim=True, out=self._high)
            torch.amin(self._shares, 1, keepdim=True, out=self._low)
            largest = torch.maximum(self._high, self._low.neg_(), out=self._high)
            scale = self._scale[self._place(first)]
            scale.copy_(th_scale.for_peak(self._spec, largest, self._grid.peak))
            if th_scale.keeps_zero_scale(self._spec):
                scale = scale.masked_fill(scale == 0, 1)
            self._shares.div_(scale)
        else:
            self._x.div_(self._least(first, self._divisors))
        self._grid.nearest(self._work)
        codes = self._work.codes
        if self._spec.grid.bits == 4:
            codes = self._twos.bitwise_or_(self._twos >> 4)
        self._bytes(first).copy_(codes)

    def _bytes(self, first: int) -> Tensor:
        begin = first * self._width * self._spec.grid.bits // 8
        return self._codes[begin : begin + self._n_bytes]

    def _place(self, first: int) -> slice:
        begin = first * self._width // self._share
        return slice(begin, begin + self._n_rows * self._width // self._share)

    def _least(self, first: int, factors: tuple[Tensor, Tensor]) -> Tensor:
        of_rows, of_columns = factors
        torch.minimum(of_rows[first : first + self._n_rows], of_columns, out=self._other)
        return self._other if self._grid.peak == 1 else self._other.div_(self._peak)


class _General:
    """Every other codec of rows, by the parts that `codec.th` is made of."""

    def __init__(self, rows: Rows, x: Tensor, work: Work) -> None:
        self._rows, self._x, self._work = rows, x, work

    def decode(self, first: int) -> Tensor:
        spec, block = self._rows.spec, self._block(first)
        codes = self._rows.arrays["codes"][block.rows]
        if spec.grid.name in FLOATS:
            return self._x.copy_(codes.view(FLOAT_TYPES[spec.grid.name]))
        # Codes are looked up two by two: a row of an odd width needs room for one level more.
        odd = block.width % 2 and spec.grid.bits < 8
        room = self._x.new_empty(block.n_rows * (block.width + 1)) if odd else self._x.view(-1)
        place, known = self._work.over(room), levels(spec, self._x.device)
        y = th_store.look_up(spec, known.table, codes, block, place)
        other = place.other[: block.size]
        th_scale.multiply(spec, self._rows.arrays, self._rows.shape, block, y, other, known.peak)
        return self._x.copy_(y) if odd else self._x

    def encode(self, first: int, generator: torch.Generator) -> None:
        spec, arrays, block = self._rows.spec, self._rows.arrays, self._block(first)
        place = self._work.over(self._x.view(-1))
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
