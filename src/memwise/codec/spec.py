"""The grammar of codec names and the bytes they stand for; free of any array library.

    name = grid [ "/" scale ] [ "/" rounding ] [ "/" packing ]

    grid      fp32 fp16 bf16 | e4m3 e5m2 | int8 int4 int3 int2 | uint8 uint4 uint3 uint2 | sign
              | nf4 dyn8 dyn4 linear8 linear4 | learned2 learned3 learned4 learned8
    scale     tensor row column rank1 groupN expandN, with ":f16" for scales in half precision
    rounding  stochastic                    (nearest, ties to even, is left out of the name)
    packing   byte entropy bitmap           (dense, bit after bit, is left out of the name)

Examples: `int8/row`, `sign`, `sign/row:f16`, `int4/group32/stochastic`, `e4m3/expand128`. A name is
saved beside the data, so its meaning never changes: what changes gets another name.
"""

import math
import re
from collections.abc import Mapping, Sequence
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
PACKINGS = ("dense", "byte", "entropy", "bitmap")


@dataclass(frozen=True)
class Grid:
    """The levels a coordinate can take, before scaling.

    Attributes:
        name: int* symmetric without the lowest code; uint* affine with a zero point; sign is -1 and
            +1; nf4, dyn*, linear*, learned* are tables of levels; the rest are floating formats.
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
        kind: nearest (ties to even) or stochastic (needs a seeded generator).
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
            (Huffman-coded exponents) or bitmap (zeros left out).
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
        dtype: numpy's short name: u1, i1, f2, f4.
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
            InvalidKnob: if the combination is in the grammar but has no layout yet.
        """
        if not shape:
            raise InvalidKnob("a codec needs at least one axis; reshape the number to (1,)")
        n_rows, width = math.prod(shape[:-1]), shape[-1]
        dense = self.packing.kind == "dense"
        if not dense or self.scale.kind not in ("none", "row") or self.grid.name not in _CODES:
            raise InvalidKnob(
                f"codec {self.name!r} has no layout yet; laid out are fp32, fp16, int8/row and "
                "sign, the last two with scales in f32 or f16"
            )
        codes = -(-width // 8) if self.grid.name == "sign" else width
        arrays = {"codes": Array(_CODES[self.grid.name], (n_rows, codes))}
        if self.scale.kind == "row":
            arrays["scale"] = Array(f"f{SCALE_BYTES[self.scale.dtype]}", (n_rows,))
        return arrays

    def nbytes(self, shape: Sequence[int]) -> int:
        """Exact bytes of a stored tensor of `shape`, scales included."""
        return sum(array.nbytes for array in self.layout(shape).values())


_CODES = {"fp32": "f4", "fp16": "f2", "int8": "i1", "sign": "u1"}
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
