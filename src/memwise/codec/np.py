"""Codecs on numpy alone, and search on the codes.

Shapes: n rows, d coordinates, b = ceil(d / 8) bytes of sign bits, W = ceil(b / 8) words of them,
m queries.

The contract that every backend obeys, bit for bit: input is rounded to float32 first; a scale that
is a sum is summed in float64 and rounded once; a code is `rint(x / scale)` with the scale *as
stored*, ties to even; a sign bit is 1 where x >= 0 (-0.0 counts as 0.0), lowest bit first, spare
bits 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memwise.codec.spec import Spec, parse
from memwise.errors import InvalidKnob

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]
Words: TypeAlias = NDArray[np.uint64]

GRIDS = ("fp32", "fp16", "int8", "sign")
INT8_LEVELS = 127
# Rows a chunk: 16k pay numpy's call overhead, whole columns pay memory bandwidth. One scan of 1M x
# 384 bits took 1.2 copies of the codes with 64k, 2.1 with 16k, 3.1 unchunked, 7.9 row-major.
CHUNK = 1 << 16
EXCLUDED = np.uint16(0xFFFF)


@dataclass(frozen=True)
class Coded:
    """What a codec stored for one tensor.

    Attributes:
        codec: name of the codec, saved with the data.
        shape: shape of the tensor that was encoded.
        arrays: the stored arrays, as `Spec.layout` lists them.
    """

    codec: str
    shape: tuple[int, ...]
    arrays: Mapping[str, NDArray[Any]]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the storages behind the arrays: a view counts as all that it keeps alive."""
        roots = [_root(array) for array in self.arrays.values()]
        return sum({id(root): root.nbytes for root in roots}.values())


@dataclass(frozen=True)
class Codec:
    """Encodes and decodes with numpy; stateless, so it can be shared.

    Attributes:
        spec: grid, scale, rounding and packing.

    Raises:
        InvalidKnob: if numpy has no arithmetic for the spec.
    """

    spec: Spec

    def __post_init__(self) -> None:
        """Refuses, before any data is touched, what could not be encoded."""
        known = self.spec.grid.name in GRIDS and self.spec.scale.kind in ("none", "row")
        if not known or self.spec.packing.kind != "dense":
            raise InvalidKnob(
                f"numpy has no arithmetic for {self.spec.name!r}; it has fp32, fp16, int8/row and "
                "sign, the last two with scales in f32 or f16"
            )
        if self.spec.rounding.kind != "nearest":
            raise InvalidKnob(
                f"codec {self.spec.name!r}: numpy rounds to nearest only; leave out "
                f"{self.spec.rounding.kind!r}"
            )

    def nbytes(self, shape: Sequence[int]) -> int:
        """Exact bytes that `encode` stores for a tensor of `shape`."""
        return self.spec.nbytes(shape)

    def encode(self, x: ArrayLike) -> Coded:
        """Stores `x` of shape (..., d); every row along the last axis is independent.

        Raises:
            InvalidKnob: if `x` has no axis, or holds a number that the codec cannot store.
        """
        values = np.asarray(x, dtype=np.float32)
        layout = self.spec.layout(values.shape)
        rows = values.reshape(layout["codes"].shape[0], values.shape[-1])  # (n, d)
        if not np.isfinite(rows).all():
            raise InvalidKnob(
                f"codec {self.spec.name!r} got NaN or infinity; clean the input first"
            )
        arrays = self._encode_rows(rows)
        return Coded(self.spec.name, values.shape, arrays)

    def decode(self, coded: Coded, rows: slice | None = None) -> Floats:
        """The tensor again, or the given range of its rows as (n, d), in float32."""
        if coded.codec != self.spec.name:
            raise InvalidKnob(f"codec {self.spec.name!r} cannot decode {coded.codec!r}")
        some = slice(None) if rows is None else rows
        arrays = {name: array[some] for name, array in coded.arrays.items()}
        x = self._decode_rows(arrays, coded.shape[-1])
        return x.reshape(coded.shape) if rows is None else x

    def row_nbytes(self, width: int) -> int:
        """Bytes of one row of `width` coordinates as `to_bytes` writes it."""
        return self.spec.nbytes((1, width))

    def to_bytes(self, coded: Coded) -> list[bytes]:
        """One little-endian blob of `row_nbytes` a row: the codes, then the scale."""
        width = coded.shape[-1]
        size, n_rows = self.row_nbytes(width), len(coded.arrays["codes"])
        rows = np.empty((n_rows, size), np.uint8)
        for name, (start, stop) in self._places(width).items():
            array = coded.arrays[name].reshape(n_rows, 1) if name == "scale" else coded.arrays[name]
            little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
            rows[:, start:stop] = little.view(np.uint8)
        joined = rows.tobytes()
        return [joined[i * size : (i + 1) * size] for i in range(n_rows)]

    def from_bytes(self, blobs: Iterable[bytes], width: int) -> Coded:
        """The rows of `width` coordinates that `to_bytes` wrote, in the order given.

        Raises:
            InvalidKnob: if a blob is not exactly `row_nbytes(width)` long.
        """
        rows = list(blobs)
        size = self.row_nbytes(width)
        wrong = next((len(row) for row in rows if len(row) != size), size)
        if wrong != size:
            raise InvalidKnob(
                f"a row of {width} coordinates is {size} bytes in {self.spec.name!r}, not {wrong}; "
                "was it written by another codec or width?"
            )
        raw = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), size)
        places, arrays = self._places(width), {}
        for name, array in self.spec.layout((len(rows), width)).items():
            part = np.ascontiguousarray(raw[:, slice(*places[name])]).view(f"<{array.dtype}")
            arrays[name] = part.astype(array.dtype, copy=False).reshape(array.shape)
        return Coded(self.spec.name, (len(rows), width), arrays)

    def _places(self, width: int) -> dict[str, tuple[int, int]]:
        """First and last byte of every array within a row's blob."""
        sizes = {name: array.nbytes for name, array in self.spec.layout((1, width)).items()}
        stops = list(accumulate(sizes.values()))
        return dict(zip(sizes, pairwise([0, *stops]), strict=True))

    def _encode_rows(self, x: Floats) -> dict[str, NDArray[Any]]:
        match self.spec.grid.name:
            case "fp32":
                return {"codes": x.copy()}
            case "fp16":
                return {"codes": self._half(x)}
            case "sign":
                codes = np.packbits(x >= 0, axis=1, bitorder="little")
                if self.spec.scale.kind == "none":
                    return {"codes": codes}
                # The mean magnitude is the factor of least squared error for a sign.
                mean = np.abs(x).sum(axis=1, dtype=np.float64) / max(x.shape[1], 1)
                return {"codes": codes, "scale": self._stored(mean.astype(np.float32))}
        absmax = np.abs(x).max(axis=1, initial=0)
        least = np.finfo(self._scale_dtype).tiny
        # Subnormal scales are too coarse to divide by; a row of zeros takes 1 for the same reason.
        wanted = np.where(absmax > 0, np.maximum(absmax / np.float32(INT8_LEVELS), least), 1)
        scale = self._stored(wanted)
        codes = np.rint(x / scale.astype(np.float32)[:, None]).astype(np.int8)
        return {"codes": codes, "scale": scale}

    def _decode_rows(self, arrays: Mapping[str, NDArray[Any]], width: int) -> Floats:
        codes = arrays["codes"]
        if self.spec.grid.name == "sign":
            bits = np.unpackbits(codes, axis=1, count=width, bitorder="little")
            x = bits.astype(np.float32) * 2 - 1
        else:
            x = codes.astype(np.float32)
        return x * arrays["scale"].astype(np.float32)[:, None] if "scale" in arrays else x

    @property
    def _scale_dtype(self) -> type[np.float32] | type[np.float16]:
        return np.float16 if self.spec.scale.dtype == "f16" else np.float32

    def _stored(self, scale: Floats) -> NDArray[Any]:
        return self._half(scale) if self.spec.scale.dtype == "f16" else scale.astype(np.float32)

    def _half(self, x: Floats) -> NDArray[np.float16]:
        if x.size and float(np.abs(x).max()) > float(np.finfo(np.float16).max):
            raise InvalidKnob(
                f"codec {self.spec.name!r}: {float(np.abs(x).max()):g} is too large for half "
                "precision (65504); scale the input or store f32"
            )
        return x.astype(np.float16)


def codec(name: str | Spec) -> Codec:
    """The numpy codec of a name such as `int8/row` or `sign`."""
    return Codec(parse(name) if isinstance(name, str) else name)


def word_major(codes: Bytes) -> Words:
    """Sign codes (n, b) as (W, n) words: the layout in which `hamming` and `nearest` scan."""
    n_rows, n_bytes = codes.shape
    n_words = -(-n_bytes // 8)
    if n_words * 64 >= EXCLUDED:
        raise InvalidKnob(f"{n_bytes * 8} sign bits a row; distances are counted up to 65,471 bits")
    padded = np.zeros((n_rows, n_words * 8), np.uint8)
    padded[:, :n_bytes] = codes
    return np.ascontiguousarray(padded.view("<u8").T.astype(np.uint64))


def hamming(words: Words, queries: Bytes) -> NDArray[np.uint16]:
    """Differing bits between every query and every row.

    Args:
        words: (W, n) from `word_major`; a slice along n of a larger array will do.
        queries: sign codes, (b,) or (m, b).

    Returns:
        (n,) for one query, (m, n) for several.
    """
    q = word_major(np.atleast_2d(queries))  # (W, m)
    out = np.empty((q.shape[1], words.shape[1]), np.uint16)
    scratch = _Scratch.of(words)
    for start in range(0, words.shape[1], CHUNK):
        chunk = words[:, start : start + CHUNK]
        for i in range(q.shape[1]):
            scratch.distances(chunk, q[:, i], out[i, start : start + CHUNK])
    return out[0] if queries.ndim == 1 else out


def nearest(
    words: Words, query: Bytes, k: int, allow: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    """The k rows with the fewest differing bits among those allowed; ties go to the lower row.

    Never holds more than one chunk of distances, so its memory does not grow with n.

    Args:
        words: (W, n) from `word_major`.
        query: sign code, (b,).
        k: rows wanted; fewer come back only where fewer are allowed.
        allow: (n,) rows that may be found; all of them if not given.

    Returns:
        Row numbers and distances, nearest first.
    """
    q = word_major(query[None])[:, 0]
    scratch = _Scratch.of(words)
    best = np.empty(0, np.int64)  # distance << 40 | row, so that one sort settles ties as well
    limit = EXCLUDED
    for start in range(0, words.shape[1] if k > 0 else 0, CHUNK):
        chunk = words[:, start : start + CHUNK]
        distance = scratch.distances(chunk, q, scratch.sums[: chunk.shape[1]])
        if allow is not None:
            distance[~allow[start : start + CHUNK]] = EXCLUDED
        row = np.flatnonzero(distance < limit)
        best = np.concatenate([best, distance[row].astype(np.int64) << 40 | (row + start)])
        if len(best) > k:
            best = np.partition(best, k - 1)[:k]
        if len(best) == k:
            limit = np.uint16(best.max() >> 40)
    best.sort()
    return best & ((1 << 40) - 1), (best >> 40).astype(np.uint16)


def dot(coded: Coded, queries: Floats, rows: NDArray[np.integer[Any]] | None = None) -> Floats:
    """Inner products of decoded rows with queries: the rescoring after a scan of sign codes.

    Args:
        coded: rows in any codec of this module.
        queries: (d,) or (m, d).
        rows: row numbers to score, in any order; all if not given.

    Returns:
        (r,) for one query, (m, r) for several.
    """
    some = coded.arrays if rows is None else {k: array[rows] for k, array in coded.arrays.items()}
    n_rows = len(some["codes"])
    part = Coded(coded.codec, (n_rows, coded.shape[-1]), some)
    decoded = codec(coded.codec).decode(part)  # (r, d)
    return np.asarray(queries, np.float32) @ decoded.T


@dataclass(frozen=True)
class _Scratch:
    """Buffers of one scan, so that no chunk allocates."""

    differ: Words
    counts: Bytes
    total: Bytes
    sums: NDArray[np.uint16]

    @classmethod
    def of(cls, words: Words) -> "_Scratch":
        """Buffers for chunks of an array (W, n)."""
        n = min(words.shape[1], CHUNK)
        counts, total = np.empty((2, n), np.uint8)
        return cls(np.empty(n, np.uint64), counts, total, np.empty(n, np.uint16))

    def distances(self, chunk: Words, query: Words, out: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Writes the distances of a chunk (W, c) to one query (W,) into `out` (c,)."""
        n = chunk.shape[1]
        differ, counts, total = self.differ[:n], self.counts[:n], self.total[:n]
        out[:] = 0
        # Three words count to 192 at most, so they add up in one byte before the wider sum.
        for first in range(0, len(chunk), 3):
            for word in range(first, min(first + 3, len(chunk))):
                np.bitwise_xor(chunk[word], query[word], out=differ)
                np.bitwise_count(differ, out=total if word == first else counts)
                if word > first:
                    np.add(total, counts, out=total)
            np.add(out, total, out=out)
        return out


def _root(array: NDArray[Any]) -> NDArray[Any]:
    """The array that owns the memory behind a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
