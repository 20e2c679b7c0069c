"""Codecs on torch: every name of the grammar, on any device, block by block.

Shapes: n rows of d coordinates, N = n d.

Obeys the contract of `codec.np` bit for bit where both have a codec, and the layout of `codec.spec`
everywhere. A block has at most 32k coordinates and its scratch is 0.4 MiB, so encoding and decoding
hold no second copy of the tensor.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memwise.codec import np as on_numpy
from memwise.codec import th_scale, th_store
from memwise.codec.spec import DATA_DEPENDENT, FLOATS, LEARNED, Block, Spec, blocks, parse
from memwise.codec.th_grid import FLOAT_TYPES, fit, levels, round_float
from memwise.codec.th_pack import Tensor, Work
from memwise.errors import InvalidKnob

SAMPLE = 1 << 16  # coordinates that a learned table is fitted to


@dataclass(frozen=True)
class Packed:
    """What a codec stored for one tensor.

    Attributes:
        codec: name of the codec, saved with the data.
        shape: shape of the tensor that was encoded.
        dtype: its type, in which it is decoded.
        arrays: the stored arrays, as `Spec.layout` lists them; `encode_rows` writes into them.
    """

    codec: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    arrays: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the arrays: a view counts as all that it keeps alive."""
        storages = [array.untyped_storage() for array in self.arrays.values()]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def state(self) -> dict[str, Any]:
        """Only tensors, numbers and strings, so that `torch.load(weights_only=True)` takes it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "codec": self.codec,
            "shape": list(self.shape),
            "dtype": dtype,
            "arrays": dict(self.arrays),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Packed":
        """What `state` was taken of; the arrays are shared, not copied."""
        dtype = getattr(torch, state["dtype"])
        return cls(state["codec"], tuple(state["shape"]), dtype, dict(state["arrays"]))

    def to_numpy(self) -> on_numpy.Coded:
        """The same bytes for `codec.np`, without a copy where they lie on the CPU."""
        arrays = {name: array.cpu().numpy() for name, array in self.arrays.items()}
        return on_numpy.Coded(self.codec, self.shape, arrays)

    @classmethod
    def from_numpy(cls, coded: on_numpy.Coded) -> "Packed":
        """What `codec.np` stored, without a copy; decodes to float32."""
        arrays = {name: torch.from_numpy(array) for name, array in coded.arrays.items()}
        return cls(coded.codec, coded.shape, torch.float32, arrays)


@dataclass(frozen=True)
class Codec:
    """Encodes and decodes with torch; stateless, so it can be shared.

    Attributes:
        spec: grid, scale, rounding and packing.

    Raises:
        InvalidKnob: if the parts of the spec do not go together.
    """

    spec: Spec

    def __post_init__(self) -> None:
        """Refuses, before any data is touched, what could not be encoded."""
        self.spec.scales((1, 1))

    def nbytes(self, shape: Sequence[int]) -> int:
        """Exact bytes that `encode` stores for a tensor of `shape`.

        Raises:
            InvalidKnob: for entropy, bitmap and sparse, whose bytes depend on the data.
        """
        return self.spec.nbytes(shape)

    @torch.no_grad()
    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Packed:
        """Stores `x` of shape (..., d), any floating type; copied once if it is not contiguous.

        Args:
            x: the tensor; rounded to float32 first.
            generator: source of the draws of stochastic codecs, on the device of `x`.

        Raises:
            InvalidKnob: if `x` has no axis or is not floating, holds a number that the codec cannot
                store, or a generator is missing.
        """
        self._check(x, generator)
        self.spec.scales(x.shape)
        flat = x.detach().reshape(-1)
        arrays = {} if self._lossless(x.dtype) else self._scales(flat, x.shape)
        parts = self._codes(flat, x.shape, slice(0, math.prod(x.shape[:-1])), arrays, generator)
        stored = th_store.write(self.spec, parts, x.shape, x.device)
        return Packed(self.spec.name, tuple(x.shape), x.dtype, stored | arrays)

    @torch.no_grad()
    def decode(
        self, packed: Packed, rows: slice | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The tensor again, or the given range of its rows as (r, d).

        Args:
            packed: what this codec stored.
            rows: a range of the rows (n, d); all, in the shape that was encoded, if not given.
            out: contiguous tensor of any floating type to write to; otherwise one of the type that
                was encoded is made.
        """
        self._own(packed)
        n_rows, width = math.prod(packed.shape[:-1]), packed.shape[-1]
        place = _range(rows, n_rows)
        start, stop = place.start, place.stop
        shape = packed.shape if rows is None else (stop - start, width)
        codes = packed.arrays["codes"]
        if out is None:
            out = torch.empty(shape, dtype=packed.dtype, device=codes.device)
        if tuple(out.shape) != tuple(shape) or not out.is_contiguous():
            raise InvalidKnob(
                f"out has shape {tuple(out.shape)}, and {tuple(shape)} is decoded; give a "
                "contiguous tensor of that shape"
            )
        target = out.view(stop - start, width)
        for block, y in self._decoded(packed, place):
            low, high = max(block.first, start), min(block.rows.stop, stop)
            part = y[low - block.first : high - block.first]
            target[low - start : high - start, block.columns] = part
        return out

    @torch.no_grad()
    def encode_rows(
        self, packed: Packed, rows: slice, x: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """Stores `x` (r, d) in place of a range of rows.

        Factors of these rows alone are found anew. Factors that other rows share (tensor, column,
        rank1) and learned levels stay as they are: put larger ones into `packed.arrays` first.

        Raises:
            InvalidKnob: if a group reaches beyond the rows, `x` is beyond the shared factors, or
                the packing has no fixed place for a row.
        """
        self._own(packed)
        self._check(x, generator)
        place = self._target(packed, rows, x)
        flat, arrays = x.detach().reshape(-1), packed.arrays
        if self.spec.scale.kind in ("tensor", "column", "rank1"):
            self._fits(flat, packed, place)
        else:
            for name, fresh in self._factors(flat, x.shape).items():
                arrays[name][self._shared(packed.shape, place)] = fresh
        for block, part in self._codes(flat, packed.shape, place, arrays, generator):
            th_store.place(self.spec, part, block, arrays["codes"])

    def fake(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Decodes what it encoded, with the gradient of the identity (straight through)."""
        through: Tensor = _Fake.apply(x, self, generator)  # type: ignore[no-untyped-call]
        return through

    def _lossless(self, dtype: torch.dtype) -> bool:
        """Whether bit patterns are kept, so that NaN and infinity may pass."""
        kind = FLOAT_TYPES.get(self.spec.grid.name)
        exact = kind is not None and torch.promote_types(dtype, kind) == kind
        return exact and self.spec.packing.kind in ("entropy", "sparse")

    def _check(self, x: Tensor, generator: torch.Generator | None) -> None:
        if not x.is_floating_point():
            raise InvalidKnob(f"codec {self.spec.name!r} got {x.dtype}; convert to a float first")
        if self.spec.rounding.kind == "stochastic" and generator is None:
            raise InvalidKnob(f"codec {self.spec.name!r} draws; pass a seeded torch.Generator")

    def _own(self, packed: Packed) -> None:
        if packed.codec != self.spec.name:
            raise InvalidKnob(f"codec {self.spec.name!r} cannot decode {packed.codec!r}")

    def _factors(self, flat: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
        """The stored factors, zero points, powers and centres for `flat` (N,)."""
        is_float = self.spec.grid.name in FLOATS
        known = self.spec.grid.name not in LEARNED and not is_float
        peak = levels(self.spec, flat.device).peak if known else 1.0
        found = th_scale.find(self.spec, flat, shape, peak)
        if is_float:
            self._require_range(flat)
        return found

    def _scales(self, flat: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
        """All stored arrays beside the codes: the factors, and levels where they are learned."""
        found = self._factors(flat, shape)
        if self.spec.grid.name in LEARNED:
            stride = max(1, -(-flat.numel() // SAMPLE))
            every = slice(0, math.prod(shape[:-1]))
            scaled = self._scaled(flat, shape, every, th_scale.divisors(self.spec, found), 1.0)
            parts = [work.y[-block.start % stride :: stride].clone() for block, work in scaled]
            sample = torch.cat(parts) if parts else flat.new_empty(0)
            found["levels"] = fit(sample, self.spec.grid.bits)
        return found

    def _require_range(self, flat: Tensor) -> None:
        """Refuses finite numbers that the format would turn into infinity."""
        kind = FLOAT_TYPES[self.spec.grid.name]
        low, high = torch.aminmax(flat) if len(flat) else (flat.new_zeros(()),) * 2
        largest = max(-float(low), float(high))
        if largest > torch.finfo(kind).max:
            raise InvalidKnob(
                f"codec {self.spec.name!r}: {largest:g} is too large for "
                f"{'half precision (65504)' if kind == torch.float16 else self.spec.grid.name}; "
                "scale the input or store fp32"
            )

    def _codes(
        self,
        flat: Tensor,
        shape: Sequence[int],
        rows: slice,
        arrays: Mapping[str, Tensor],
        generator: torch.Generator | None,
    ) -> Iterator[tuple[Block, Tensor]]:
        """Codes of the rows, whose coordinates are `flat`, block by block in scratch memory."""
        if self.spec.grid.name in FLOATS:
            yield from self._floats(flat, shape, rows, generator)
            return
        grid = levels(self.spec, flat.device, arrays.get("levels"))
        divisors = th_scale.divisors(self.spec, arrays)
        for block, work in self._scaled(flat, shape, rows, divisors, grid.peak):
            if generator is not None and self.spec.rounding.kind == "stochastic":
                grid.stochastic(work, generator)
            else:
                grid.nearest(work)
            yield block, work.codes

    def _floats(
        self, flat: Tensor, shape: Sequence[int], rows: slice, generator: torch.Generator | None
    ) -> Iterator[tuple[Block, Tensor]]:
        """The floats of the rows in the format of the grid."""
        kind = FLOAT_TYPES[self.spec.grid.name]
        if flat.dtype == kind:  # not through float32, which would quieten a signalling NaN
            width = shape[-1]
            for block in blocks(rows.stop - rows.start, width, rows.start):
                begin = block.start - rows.start * width
                yield block, flat[begin : begin + block.size]
            return
        for block, work in self._scaled(flat, shape, rows, {}, 1.0):
            yield block, round_float(self.spec, work, generator)

    def _scaled(
        self,
        flat: Tensor,
        shape: Sequence[int],
        rows: slice,
        divisors: Mapping[str, Tensor],
        peak: float,
    ) -> Iterator[tuple[Block, Work]]:
        """Coordinates of the rows in the range of the grid, block by block in scratch memory."""
        width = shape[-1]
        whole = th_store.scratch(rows.stop - rows.start, width, flat.device)
        for block in blocks(rows.stop - rows.start, width, rows.start):
            work = whole.cut(block.size)
            begin = block.start - rows.start * width
            work.y.copy_(flat[begin : begin + block.size])
            th_scale.divide(self.spec, divisors, shape, block, work, peak)
            yield block, work

    def _decoded(self, packed: Packed, rows: slice) -> Iterator[tuple[Block, Tensor]]:
        """Blocks that hold the rows, as (r, w) float32 in scratch memory or in the float's type."""
        arrays, device = packed.arrays, packed.arrays["codes"].device
        parts = th_store.read(self.spec, arrays, packed.shape, rows)
        if self.spec.grid.name in FLOATS:
            yield from parts
            return
        grid = levels(self.spec, device, arrays.get("levels"))
        work = th_store.scratch(math.prod(packed.shape[:-1]), packed.shape[-1], device)
        for block, codes in parts:
            y = th_store.look_up(self.spec, grid.table, codes, block, work)
            other = work.other[: block.size]
            th_scale.multiply(self.spec, arrays, packed.shape, block, y, other, grid.peak)
            yield block, y

    def _target(self, packed: Packed, rows: slice, x: Tensor) -> slice:
        """The rows that `encode_rows` writes to, if they have places of their own."""
        n_rows, width = math.prod(packed.shape[:-1]), packed.shape[-1]
        place = _range(rows, n_rows)
        wanted = (place.stop - place.start, width)
        if tuple(x.shape) != wanted:
            raise InvalidKnob(f"rows {rows} take {wanted}, got {tuple(x.shape)}")
        if self.spec.packing.kind in DATA_DEPENDENT:
            raise InvalidKnob(
                f"codec {self.spec.name!r} has no fixed place for a row; encode the whole tensor"
            )
        group = max(self.spec.scale.group, 1)
        if place.start * width % group or (place.stop < n_rows and place.stop * width % group):
            raise InvalidKnob(
                f"rows {place.start} to {place.stop} of {width} cut a group of {group}; take "
                f"multiples of {math.lcm(group, max(width, 1)) // max(width, 1)} rows"
            )
        return place

    def _shared(self, shape: Sequence[int], rows: slice) -> slice:
        """The factors that belong to the rows alone."""
        if self.spec.scale.kind == "row":
            return rows
        group = max(self.spec.scale.group, 1)
        return slice(rows.start * shape[-1] // group, -(-rows.stop * shape[-1] // group))

    def _fits(self, flat: Tensor, packed: Packed, rows: slice) -> None:
        """Refuses coordinates beyond what the stored factors reach."""
        grid = levels(self.spec, flat.device, packed.arrays.get("levels"))
        divisors = th_scale.divisors(self.spec, packed.arrays)
        slack = 1e-3 * grid.peak
        for _, work in self._scaled(flat, packed.shape, rows, divisors, grid.peak):
            inside = (work.y >= grid.low - slack) & (work.y <= grid.peak + slack)
            if not bool(inside.all()) and self.spec.grid.name != "sign":
                raise InvalidKnob(
                    f"codec {self.spec.name!r}: rows {rows.start} to {rows.stop} are NaN or beyond "
                    "the factors that all rows share; put larger ones into packed.arrays first"
                )


class _Fake(torch.autograd.Function):
    """Forward as stored, backward as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Codec, generator: torch.Generator | None) -> Tensor:
        """The decoded tensor."""
        return own.decode(own.encode(x, generator))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient as it came."""
        return grads[0], None, None


def codec(name: str | Spec) -> Codec:
    """The torch codec of a name such as `dyn4/group128` or `int8/row/stochastic`."""
    return Codec(parse(name) if isinstance(name, str) else name)


def _range(rows: slice | None, n_rows: int) -> slice:
    """A range of rows with both ends, in order."""
    start, stop, step = (slice(None) if rows is None else rows).indices(n_rows)
    if step != 1:
        raise InvalidKnob(f"rows {rows} leave some out; take a range without a step")
    return slice(start, max(start, stop))
