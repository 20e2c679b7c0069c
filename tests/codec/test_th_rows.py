"""Rows that are written without checks are the bytes that the checked codec writes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwise.codec.spec import parse  # noqa: E402
from memwise.codec.th import codec  # noqa: E402
from memwise.codec.th_rows import Bound, Rows, Scratch  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

NAMES = (
    "dyn4/group128", "dyn4/group16", "dyn8/group256", "int8/row", "int3/group32", "int2/row",
    "uint4/group64", "nf4/group64:f16", "linear4/group128", "linear8/row", "e4m3/group16",
    "e4m3/expand128", "sign/row", "bf16", "fp32", "linear4/rank1", "dyn8/rank1",
    "int4/group16/byte",
)  # fmt: skip
SHAPES = ((12, 128), (16, 7), (1, 300), (32, 24))


def matrix(name: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[:, :3] = 0
    return x.abs() if name.startswith("linear") else x


def rows_of(name: str, shape: tuple[int, int]) -> slice:
    """The last rows that cut no group."""
    group = max(parse(name).scale.group, 1)
    first = next(r for r in range(shape[0] // 2, -1, -1) if r * shape[1] % group == 0)
    return slice(first, shape[0])


def bound(rows: Rows, place: slice) -> tuple[Bound, torch.Tensor]:
    """The second of two blocks, and what is bound to it."""
    scratch, n_rows = Scratch(), place.stop - place.start
    scratch.lay_out(2, n_rows, rows.shape[1], torch.device("cpu"))
    return scratch.bind(rows, 1, n_rows), scratch.block(1, n_rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_decoded_as_the_codec_decodes_them(name: str, shape: tuple[int, int]) -> None:
    packed = codec(name).encode(matrix(name, shape, 0))
    place = rows_of(name, shape)
    out = bound(Rows(parse(name), packed.arrays, shape), place)[0].decode(place.start)
    assert torch.equal(out, codec(name).decode(packed, place))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_encoded_as_the_codec_encodes_them(name: str, shape: tuple[int, int]) -> None:
    mine, theirs = (codec(name).encode(matrix(name, shape, 0)) for _ in range(2))
    place = rows_of(name, shape)
    fresh = matrix(name, shape, 1)[place] * 0.3
    if name.endswith("rank1"):
        fresh = torch.minimum(fresh.abs(), matrix(name, shape, 0)[place].abs())
    codec(name).encode_rows(theirs, place, fresh)
    target, block = bound(Rows(parse(name), mine.arrays, shape), place)
    block.copy_(fresh)
    target.encode(place.start, torch.Generator())
    for part, array in theirs.arrays.items():
        assert torch.equal(mine.arrays[part], array), part


@pytest.mark.parametrize("name", ["int8/tensor", "int8/column", "bf16/entropy", "int4/row/bitmap"])
def test_codecs_without_rows_of_their_own_are_refused(name: str) -> None:
    with pytest.raises(InvalidKnob, match="row by row"):
        Rows(parse(name), {}, (4, 8))
