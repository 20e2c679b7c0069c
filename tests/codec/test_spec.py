import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwise.codec import Grid, Packing, Rounding, Scale, Spec, parse
from memwise.codec.spec import BITS, FLOATS, PACKINGS, ROUNDINGS, blocks
from memwise.errors import InvalidKnob

scales = st.one_of(
    st.builds(
        Scale,
        st.sampled_from(["tensor", "row", "column", "rank1"]),
        st.just(0),
        st.sampled_from(["f32", "f16"]),
    ),
    st.builds(
        Scale,
        st.sampled_from(["group", "expand"]),
        st.integers(1, 4096),
        st.sampled_from(["f32", "f16"]),
    ),
)
specs = st.builds(
    Spec,
    st.sampled_from([name for name in BITS if name not in FLOATS]).map(Grid),
    scales,
    st.sampled_from(ROUNDINGS).map(Rounding),
    st.sampled_from(PACKINGS).map(Packing),
)


@settings(derandomize=True, deadline=None)
@given(specs)
def test_a_spec_survives_the_trip_through_its_name(spec):
    assert parse(spec.name) == spec


@pytest.mark.parametrize(
    "name",
    [
        "int8/row",
        "sign",
        "sign/row:f16",
        "fp16",
        "int4/group32/stochastic",
        "nf4/group64:f16",
        "e4m3/expand128",
        "linear4/rank1",
        "bf16/entropy",
        "learned3/column/byte",
    ],
)
def test_names_that_are_saved_with_data_keep_their_spelling(name):
    assert parse(name).name == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("int9/row", "int9"),
        ("int8", "needs a scale"),
        ("fp16/row", "own exponents"),
        ("int8/row/row", "doubles"),
        ("int8/stochastic/row", "out of order"),
        ("int8/group", "size"),
        ("int8/row32", "size"),
        ("int8/group0", "size"),
        ("int8/row:f64", "row:f64"),
        ("int8/row/", "neither"),
        ("", "no grid"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(name, said):
    with pytest.raises(InvalidKnob, match=said):
        parse(name)


@pytest.mark.parametrize(
    ("name", "shape", "n_bytes"),
    [
        ("sign", (10, 384), 480),
        ("sign", (3, 9), 6),
        ("sign/row", (3, 9), 6 + 12),
        ("sign/row:f16", (3, 9), 6 + 6),
        ("int8/row", (2, 5, 7), 70 + 40),
        ("int8/row:f16", (7,), 7 + 2),
        ("fp16", (4, 4), 32),
        ("fp32", (0, 8), 0),
        ("sign", (4, 0), 0),
        ("bf16", (3, 5), 30),
        ("int4/row", (3, 5), 9 + 12),
        ("int3/row", (2, 8), 6 + 8),
        ("int4/row/byte", (3, 5), 15 + 12),
        ("uint4/group4:f16", (3, 5), 9 + 8 + 8),
        ("dyn4/group128", (4, 128), 256 + 16),
        ("linear4/rank1", (4, 6), 12 + 40),
        ("linear4/rank1", (2, 3, 4), 12 + 36),
        ("e4m3/expand128", (2, 256), 512 + 48),
        ("e4m3/expand128:f16", (2, 256), 512 + 32),
        ("learned2/tensor", (4, 4), 4 + 4 + 16),
        ("int8/column", (4, 6), 24 + 24),
    ],
)
def test_nbytes_is_exact_without_data(name, shape, n_bytes):
    assert parse(name).nbytes(shape) == n_bytes


@pytest.mark.parametrize(
    "name", ["int8/row/entropy", "bf16/entropy", "nf4/row/bitmap", "bf16/sparse"]
)
def test_what_depends_on_the_data_has_no_layout(name):
    with pytest.raises(InvalidKnob, match="has seen data"):
        parse(name).nbytes((2, 2))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("uint4/rank1", "largest magnitudes"),
        ("sign/expand8", "largest magnitudes"),
        ("fp16/byte", "does not fit"),
        ("linear4/row/bitmap", "no level at zero"),
        ("uint8/row/bitmap", "no level at zero"),
        ("int8/row/sparse", "keeps the bits of floats"),
        ("int8/rank1", "two axes"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(name, said):
    with pytest.raises(InvalidKnob, match=said):
        parse(name).layout((2,))


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 70), st.integers(0, 70), st.integers(0, 9), st.sampled_from([8, 24, 64]))
def test_blocks_cover_every_coordinate_once_and_in_order(n_rows, width, first, size):
    cut = list(blocks(n_rows, width, first, size))
    places = [i for block in cut for i in range(block.flat.start, block.flat.stop)]
    assert places == list(range(first * width, (first + n_rows) * width))
    for block in cut:
        assert block.size <= size
        assert block.start == block.first * width + block.column
        assert block.column % 8 == 0
        assert block.n_rows == 1 or block.width == width


def test_a_number_without_axes_is_refused():
    with pytest.raises(InvalidKnob, match="axis"):
        parse("fp32").layout(())


def test_bad_parts_are_refused_when_they_are_built():
    for build in (
        lambda: Scale("diagonal"),
        lambda: Scale("row", dtype="f8"),
        lambda: Scale("none", dtype="f16"),
        lambda: Scale("group", -1),
        lambda: Rounding("up"),
        lambda: Packing("zip"),
    ):
        with pytest.raises(InvalidKnob):
            build()
