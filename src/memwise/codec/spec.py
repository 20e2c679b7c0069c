"""The grammar of codec names and the bytes they stand for; free of any array library.

    name = grid [ "/" scale ] [ "/" rounding ] [ "/" packing ]

    grid      fp32 fp16 bf16 | e4m3 e5m2 | int8 int4 int3 int2 | uint8 uint4 uint3 uint2 | sign
              | nf4 dyn8 dyn4 linear8 linear4 | learned2 learned3 learned4 learned8
    scale     tensor row column rank1 groupN expandN, with ":f16" for scales in half precision
    rounding  stochastic                    (nearest, ties to even, is left out of the name)
    packing   byte entropy bitmap sparse    (dense, bit after bit, is left out of the name)

Examples: `int8/row`, `sign`, `sign/row:f16`, `int4/group32/stochastic`, `e4m3/expand128`. A name is
saved beside the data, so its meaning never changes: what changes gets another name.

How codes lie in bytes (n rows of d coordinates, N = n d):

    dense    (n, ceil(d bits / 8)) bytes, lowest bit first; int* are two's complement
    byte     (n, d), one code a byte
    entropy  blocks (see `blocks`) of one byte a coordinate, each a raw deflate stream of Huffman
             codes alone; floats are rotated left by a bit, so that the exponent fills the byte that
             is coded, and keep their other bytes as they are
    bitmap   a bit a coordinate, 0 for zeros (-0.0 is one); then the codes of the others, dense
    sparse   the same for floats, but only +0.0 is left out: what has their format already comes
             back to the bit, with -0.0, infinity and NaN
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from memwise.errors import InvalidKnob

FLOATS = {"fp32": 32, "fp16": 16, "bf16": 16}
MINIFLOATS = {"e4m3": 8, "e5m2": 8}
INTEGERS = {f"{sign}int{bits}": bits for sign in ("", "u") for bits in (8, 4, 3, 2)}
TABLES = {"nf4": 4, "dyn8": 8, "dyn4": 4, "linear8": 8, "linear4": 4}
LEARNED = {f"learned{bits}": bits for bits in (2, 3, 4, 8)}
BITS = {**FLOATS, **MINIFLOATS, **INTEGERS, "sign": 1, **TABLES, **LEARNED}

SCALES = ("none", "tensor", "row", "column", "rank1", "group", "expand")
SCALE_BYTES = {"f32": 4, "f16": 2}
ROUNDINGS = ("nearest", "stochastic")
PACKINGS = ("dense", "byte", "entropy", "bitmap", "sparse")
DATA_DEPENDENT = ("entropy", "bitmap", "sparse")  # how many bytes is known after encoding
BLOCK = 1 << 15  # 16k pay a tenth more for the calls, 64k leave the cache of a core


@dataclass(frozen=True)
class Grid:
    """The levels a coordinate can take, before scaling.

    Attributes:
        name: int* symmetric without the lowest code; uint* affine with a zero point; sign is -1 and
            +1; nf4, dyn* (decades, signed), linear* (i / 2^bits from i = 1: positive, no zero) and
            learned* are tables of levels in rising order; the rest are floating formats.
    """

    name: str

    def __post_init__(self) -> None:
        """Refuses a name that is not in the grammar."""
        if self.name not in BITS:
            raise InvalidKnob(f"no grid is called {self.name!r}; choose one of {', '.join(BITS)}")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return BITS[self.name]

    @property
    def affine(self) -> bool:
        """Whether codes count up from a stored zero point, the least coordinate."""
        return self.name.startswith("uint")

    @property
    def has_zero(self) -> bool:
        """Whether zero is one of the levels, so that zeros stay zeros."""
        return not (self.affine or self.name in ("sign", "linear4", "linear8", *LEARNED))


@dataclass(frozen=True)
class Scale:
    """Which coordinates share a factor, and how that factor is stored.

    Attributes:
        kind: none, tensor, row (the last axis), column, rank1 (least of a row and a column factor),
            group (runs of `group` in flat order), expand (group with a power: COAT).
        group: coordinates of one group; 0 for the other kinds.
        dtype: f32 or f16.
    """

    kind: str = "none"
    group: int = 0
    dtype: str = "f32"

    def __post_init__(self) -> None:
        """Refuses unknown kinds and groups that cannot be."""
        if self.kind not in SCALES or self.dtype not in SCALE_BYTES:
            raise InvalidKnob(
                f"scale {self.kind!r} in {self.dtype!r} is unknown; choose one of "
                f"{', '.join(SCALES)} in {' or '.join(SCALE_BYTES)}"
            )
        if (self.group > 0) != (self.kind in ("group", "expand")) or self.group < 0:
            raise InvalidKnob(
                f"scale {self.kind!r} with groups of {self.group}; group and expand need a size "
                "above 0 ('group32'), the others take none"
            )
        if self.kind == "none" and self.dtype != "f32":
            raise InvalidKnob("scale 'none' stores nothing; leave its dtype out")

    @property
    def name(self) -> str:
        """The part of the codec's name, for instance `group32:f16`; empty without a scale."""
        if self.kind == "none":
            return ""
        return self.kind + (str(self.group) if self.group else "") + self._suffix

    @property
    def _suffix(self) -> str:
        return "" if self.dtype == "f32" else f":{self.dtype}"


@dataclass(frozen=True)
class Rounding:
    """How a scaled coordinate becomes a level: the nearest, or a fair draw of the two around it.

    Attributes:
        kind: nearest (ties to even) or stochastic (needs a seeded generator). A draw is fair to
            what is rounded, which under `expand` is the power. Stochastic signs take the largest
            magnitude as their factor, as a mean would clip.
    """

    kind: str = "nearest"

    def __post_init__(self) -> None:
        """Refuses unknown kinds."""
        if self.kind not in ROUNDINGS:
            raise InvalidKnob(f"rounding {self.kind!r} is unknown; use {' or '.join(ROUNDINGS)}")


@dataclass(frozen=True)
class Packing:
    """How codes lie in bytes.

    Attributes:
        kind: dense (lowest bit first, rows start at a byte), byte (one code a byte), entropy
            (Huffman-coded exponents), bitmap (zeros left out) or sparse (bits of +0.0 left out).
    """

    kind: str = "dense"

    def __post_init__(self) -> None:
        """Refuses unknown kinds."""
        if self.kind not in PACKINGS:
            raise InvalidKnob(f"packing {self.kind!r} is unknown; use one of {', '.join(PACKINGS)}")


@dataclass(frozen=True)
class Array:
    """One stored array of a codec: little endian, C order.

    Attributes:
        dtype: numpy's short name: u1, i1, f2, f4; u2 holds the bits of bf16.
        shape: elements along each axis.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(self.dtype[1:]) * math.prod(self.shape)


@dataclass(frozen=True)
class Spec:
    """A codec without its arithmetic: four independent choices with one name.

    Attributes:
        grid: the levels.
        scale: which coordinates share a factor.
        rounding: how a coordinate finds its level.
        packing: how codes lie in bytes.
    """

    grid: Grid
    scale: Scale = field(default_factory=Scale)
    rounding: Rounding = field(default_factory=Rounding)
    packing: Packing = field(default_factory=Packing)

    def __post_init__(self) -> None:
        """Refuses a grid without the scale it needs, or with one that it cannot use."""
        scaled = self.scale.kind != "none"
        if self.grid.name in FLOATS and scaled:
            raise InvalidKnob(
                f"{self.grid.name!r} carries its own exponents; leave out {self.scale.name!r}"
            )
        if self.grid.name not in FLOATS and self.grid.name != "sign" and not scaled:
            raise InvalidKnob(
                f"{self.grid.name!r} needs a scale, for instance '{self.grid.name}/row'"
            )

    @property
    def name(self) -> str:
        """The shortest name that `parse` turns into this spec again."""
        parts = [self.grid.name, self.scale.name]
        parts += [self.rounding.kind] if self.rounding.kind != "nearest" else []
        parts += [self.packing.kind] if self.packing.kind != "dense" else []
        return "/".join(part for part in parts if part)

    def layout(self, shape: Sequence[int]) -> Mapping[str, Array]:
        """The stored arrays for a tensor of `shape`, whose last axis is the row.

        Raises:
            InvalidKnob: if the parts do not go together, or their bytes depend on the data.
        """
        arrays = self.scales(shape)
        if self.packing.kind in DATA_DEPENDENT:
            raise InvalidKnob(
                f"codec {self.name!r} has no layout before it has seen data; encode, then ask "
                "`nbytes` of the result"
            )
        n_rows, width = math.prod(shape[:-1]), shape[-1]
        dtype = "u1" if self.packing.kind == "byte" else _CODES.get(self.grid.name, "u1")
        n_bits = 8 if self.packing.kind == "byte" else self.grid.bits
        n_codes = -(-width * n_bits // 8) if n_bits < 8 else width
        return {"codes": Array(dtype, (n_rows, n_codes)), **arrays}

    def scales(self, shape: Sequence[int]) -> Mapping[str, Array]:
        """The stored arrays beside the codes: factors, zero points, powers and learned levels.

        Raises:
            InvalidKnob: if the parts do not go together.
        """
        self._refuse(shape)
        dtype = f"f{SCALE_BYTES[self.scale.dtype]}"
        count = self._factors(shape)
        arrays = {"scale": Array(dtype, (count,))} if count is not None else {}
        if self.scale.kind == "expand":
            # The centre of second moments lies far below the smallest half.
            arrays |= {"power": arrays["scale"], "centre": Array("f4", arrays["scale"].shape)}
        if self.grid.affine:
            arrays["zero"] = arrays["scale"]
        if self.grid.name in LEARNED:
            arrays["levels"] = Array("f4", (1 << self.grid.bits,))
        return arrays

    def nbytes(self, shape: Sequence[int]) -> int:
        """Exact bytes of a stored tensor of `shape`, scales included."""
        return sum(array.nbytes for array in self.layout(shape).values())

    def _factors(self, shape: Sequence[int]) -> int | None:
        """How many factors a tensor of `shape` has; rank1 has one for every index of every axis."""
        match self.scale.kind:
            case "tensor":
                return 1
            case "row":
                return math.prod(shape[:-1])
            case "column":
                return shape[-1]
            case "rank1":
                return sum(shape)
            case "group" | "expand":
                return -(-math.prod(shape) // self.scale.group)
        return None

    def _refuse(self, shape: Sequence[int]) -> None:
        """Says which parts of the name do not go together."""
        if not shape:
            raise InvalidKnob("a codec needs at least one axis; reshape the number to (1,)")
        scale, packing = self.scale.kind, self.packing.kind
        if (self.grid.affine or self.grid.name == "sign") and scale in ("rank1", "expand"):
            raise InvalidKnob(
                f"codec {self.name!r}: {scale} works on largest magnitudes, which "
                f"{self.grid.name!r} does not use; take row, column or a group"
            )
        if scale == "rank1" and len(shape) < 2:
            raise InvalidKnob(
                f"codec {self.name!r} needs two axes, got shape {tuple(shape)}: one axis would "
                "keep a factor a coordinate; take a group"
            )
        if packing == "byte" and self.grid.name in FLOATS:
            raise InvalidKnob(f"codec {self.name!r}: a float does not fit a byte; leave out 'byte'")
        if packing == "sparse" and self.grid.name not in FLOATS:
            raise InvalidKnob(
                f"codec {self.name!r}: 'sparse' keeps the bits of floats ({', '.join(FLOATS)}); "
                "take 'bitmap' for other grids"
            )
        if packing == "bitmap" and not self.grid.has_zero:
            raise InvalidKnob(
                f"codec {self.name!r}: a bitmap leaves zeros out, and {self.grid.name!r} has no "
                "level at zero"
            )


@dataclass(frozen=True)
class Block:
    """Coordinates that are encoded together: whole rows, or a part of one row.

    Attributes:
        first: first row.
        n_rows: rows.
        column: first column.
        width: columns.
        start: place of the first coordinate in flat order; the others follow without a gap.
    """

    first: int
    n_rows: int
    column: int
    width: int
    start: int

    @property
    def size(self) -> int:
        """Coordinates of the block."""
        return self.n_rows * self.width

    @property
    def rows(self) -> slice:
        """The rows of the block."""
        return slice(self.first, self.first + self.n_rows)

    @property
    def columns(self) -> slice:
        """The columns of the block."""
        return slice(self.column, self.column + self.width)

    @property
    def flat(self) -> slice:
        """The coordinates of the block in flat order."""
        return slice(self.start, self.start + self.size)


def blocks(n_rows: int, width: int, first: int = 0, size: int = BLOCK) -> Iterator[Block]:
    """Cuts rows `first` to `first + n_rows` into blocks of at most `size` coordinates.

    A row counts as a multiple of eight coordinates, so that its codes fill whole bytes. The entropy
    packing stores one stream a block: `size` is part of its format.
    """
    padded = max(8, -(-width // 8) * 8)
    if padded <= size:
        step = size // padded
        for row in range(first, first + n_rows if width else first, step):
            yield Block(row, min(step, first + n_rows - row), 0, width, row * width)
        return
    for row in range(first, first + n_rows):
        for column in range(0, width, size):
            yield Block(row, 1, column, min(size, width - column), row * width + column)


_CODES = {"fp32": "f4", "fp16": "f2", "bf16": "u2", "int8": "i1"}  # the others are bytes
_SCALE = re.compile(r"(tensor|row|column|rank1|group|expand)(\d*)(?::(f32|f16))?")


def parse(name: str) -> Spec:
    """Turns a codec's name into its four parts; `parse(spec.name) == spec`.

    Raises:
        InvalidKnob: if a part is unknown, doubled or out of order.
    """
    grid, *words = name.split("/")
    parts = [_part(word, name) for word in words]
    kinds = [type(part) for part in parts]
    if kinds != [kind for kind in (Scale, Rounding, Packing) if kind in kinds]:
        raise InvalidKnob(
            f"codec {name!r} doubles a part or has them out of order; write "
            "grid/scale/rounding/packing"
        )
    return Spec(
        Grid(grid),
        next((part for part in parts if isinstance(part, Scale)), Scale()),
        next((part for part in parts if isinstance(part, Rounding)), Rounding()),
        next((part for part in parts if isinstance(part, Packing)), Packing()),
    )


def _part(word: str, name: str) -> Scale | Rounding | Packing:
    """The part that a word of a codec's name stands for."""
    if word in ROUNDINGS:
        return Rounding(word)
    if word in PACKINGS:
        return Packing(word)
    match = _SCALE.fullmatch(word)
    if match is None:
        raise InvalidKnob(
            f"codec {name!r}: {word!r} is neither a scale (row, group32, row:f16), nor a rounding "
            f"({', '.join(ROUNDINGS)}), nor a packing ({', '.join(PACKINGS)})"
        )
    kind, group, dtype = match.groups()
    return Scale(kind, int(group or 0), dtype or "f32")
