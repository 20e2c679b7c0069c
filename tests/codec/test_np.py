import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from memwise.codec import np as codecs
from memwise.codec.np import codec, dot, hamming, nearest, word_major
from memwise.errors import InvalidKnob

NAMES = ["fp32", "fp16", "int8/row", "int8/row:f16", "sign", "sign/row", "sign/row:f16"]
calm = settings(derandomize=True, deadline=None, max_examples=60)
names = st.sampled_from(NAMES)


def tensors(limit=1000.0, min_dims=1):
    shapes = hnp.array_shapes(min_dims=min_dims, max_dims=3, min_side=0, max_side=20)
    return hnp.arrays(np.float32, shapes, elements=st.floats(-limit, limit, width=32))


def matrix(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


@calm
@given(names, tensors())
def test_nbytes_equals_the_measured_storages(name, x):
    c = codec(name)
    assert c.encode(x).nbytes == c.nbytes(x.shape)


@calm
@given(names, tensors())
def test_encoding_what_was_decoded_changes_nothing(name, x):
    c = codec(name)
    once = c.decode(c.encode(x))
    assert once.shape == x.shape
    assert once.dtype == np.float32
    if name != "sign/row:f16":  # the mean of equal magnitudes may round to the next half
        np.testing.assert_array_equal(c.decode(c.encode(once)), once)


@calm
@given(tensors(limit=float(np.float32(1e30))))
def test_int8_errs_by_half_a_step_at_most(x):
    step = np.abs(x).max(axis=-1, initial=0, keepdims=True) / np.float32(127)
    error = np.abs(codec("int8/row").decode(codec("int8/row").encode(x)) - x)
    assert (error <= step * 0.50001 + np.finfo(np.float32).tiny).all()


@calm
@given(tensors())
def test_int8_with_half_precision_scales_errs_by_little_more(x):
    absmax = np.abs(x).max(axis=-1, initial=0, keepdims=True)
    error = np.abs(codec("int8/row:f16").decode(codec("int8/row:f16").encode(x)) - x)
    assert (error <= absmax * (0.5 / 127 + 2**-11) * 1.001 + np.finfo(np.float16).tiny).all()


@calm
@given(tensors())
def test_sign_keeps_signs_and_its_scale_leaves_the_least_squared_error(x):
    c = codec("sign/row")
    decoded = c.decode(c.encode(x))
    mean = np.abs(x.astype(np.float64)).mean(axis=-1) if x.size else np.zeros(x.shape[:-1])
    squared = ((decoded - x.astype(np.float64)) ** 2).sum(axis=-1)
    wanted = (x.astype(np.float64) ** 2).sum(axis=-1) - x.shape[-1] * mean**2
    np.testing.assert_allclose(squared, wanted, rtol=1e-4, atol=1e-3)
    plain = codec("sign").decode(codec("sign").encode(x))
    np.testing.assert_array_equal(plain, np.where(x >= 0, 1, -1))


@calm
@given(tensors())
def test_fp16_is_numpys_rounding(x):
    np.testing.assert_array_equal(
        codec("fp16").decode(codec("fp16").encode(x)), x.astype(np.float16).astype(np.float32)
    )


@calm
@given(names, tensors(min_dims=2), st.data())
def test_a_range_of_rows_equals_that_range_of_the_whole(name, x, data):
    c = codec(name)
    coded = c.encode(x)
    n_rows = int(np.prod(x.shape[:-1]))
    start, stop = data.draw(st.integers(0, n_rows)), data.draw(st.integers(0, n_rows + 2))
    whole = c.decode(coded).reshape(n_rows, x.shape[-1])
    np.testing.assert_array_equal(c.decode(coded, slice(start, stop)), whole[start:stop])


@calm
@given(names, tensors(min_dims=2))
def test_row_blobs_have_one_size_and_bring_everything_back(name, x):
    c = codec(name)
    coded = c.encode(x)
    blobs = c.to_bytes(coded)
    assert {len(blob) for blob in blobs} <= {c.row_nbytes(x.shape[-1])}
    again = c.from_bytes(blobs, x.shape[-1])
    assert again.nbytes == coded.nbytes
    for key, array in coded.arrays.items():
        assert again.arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(again.arrays[key], array)


# Worked out by hand: ties (63.5, 0.5, 1.5), -0.0, a row of zeros, one byte and a bit of signs.
GOLDEN = np.array(
    [
        [1.0, 0.5, -0.25, -1.0, 0.375, -0.125, 3.0, -2.0, 0.0],
        [0.0] * 9,
        [-0.0, 1e-3, -1e-3, 2.5e-3, -254.0, 127.0, 1.0, -1.0, 3.0],
    ],
    np.float32,
)
GOLDEN_ROWS = {
    "fp16": [
        "003c003800b400bc003600b0004200c00000",
        "000000000000000000000000000000000000",
        "0080191419941f19f0dbf057003c00bc0042",
    ],
    "int8/row": [
        "2a15f5d610fb7fab000683c13c",
        "0000000000000000000000803f",
        "00000000814000000200000040",
    ],
    "int8/row:f16": ["2a15f5d610fb7fab000c26", "000000000000000000003c", "0000000081400000020040"],
    "sign": ["5301", "ff01", "6b01"],
    "sign/row": ["5301abaa6a3f", "ff0100000000", "6b01bc8e2b42"],
    "sign/row:f16": ["5301553b", "ff010000", "6b015c51"],
}


@pytest.mark.parametrize("name", GOLDEN_ROWS)
def test_stored_bytes_are_those_of_the_contract(name):
    c = codec(name)
    assert [row.hex() for row in c.to_bytes(c.encode(GOLDEN))] == GOLDEN_ROWS[name]


def test_zero_rows_and_tiny_rows_stay_finite():
    x = np.array([[0, 0], [1e-45, -1e-45], [1e-7, 5e-8], [-0.0, 1e-38]], np.float32)
    for name in NAMES:
        decoded = codec(name).decode(codec(name).encode(x))
        assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(codec("int8/row").decode(codec("int8/row").encode(x))[0], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_no_code_can_hold_are_refused(name, bad):
    with pytest.raises(InvalidKnob, match="NaN or infinity"):
        codec(name).encode([[1.0, bad]])


def test_half_precision_refuses_what_it_cannot_hold():
    for name in ("fp16", "int8/row:f16", "sign/row:f16"):
        with pytest.raises(InvalidKnob, match="half precision"):
            codec(name).encode(np.full((1, 2), 1e9))


def test_numpy_refuses_stochastic_rounding_before_it_sees_data():
    with pytest.raises(InvalidKnob, match="stochastic"):
        codec("int8/row/stochastic")


@pytest.mark.parametrize(
    "name", ["nf4/row", "int8/column", "int8/row/byte", "bf16", "fp32/entropy"]
)
def test_numpy_says_which_codecs_it_has(name):
    with pytest.raises(InvalidKnob, match="numpy has no arithmetic"):
        codec(name)


def test_another_codecs_rows_are_refused():
    coded = codec("int8/row").encode(matrix(2, 8))
    with pytest.raises(InvalidKnob, match="cannot decode"):
        codec("int8/row:f16").decode(coded)
    with pytest.raises(InvalidKnob, match="12 bytes"):
        codec("int8/row").from_bytes([b"short"], 8)


def test_a_view_counts_as_the_storage_it_keeps_alive():
    whole = codec("int8/row").encode(matrix(10, 8))
    part = codecs.Coded(whole.codec, (1, 8), {k: a[:1] for k, a in whole.arrays.items()})
    assert part.nbytes == whole.nbytes


@calm
@given(st.integers(0, 40), st.integers(1, 300), st.integers(1, 4), st.integers(0, 99))
def test_hamming_equals_the_naive_loop(n, width, m, seed):
    c = codec("sign")
    x, q = matrix(n, width, seed), matrix(m, width, seed + 100)
    got = hamming(
        word_major(c.encode(x).arrays["codes"]),
        c.encode(q).arrays["codes"],
    )
    wanted = [[sum((a >= 0) != (b >= 0) for a, b in zip(u, v, strict=True)) for v in x] for u in q]
    np.testing.assert_array_equal(got, np.array(wanted, np.uint16).reshape(m, n))
    assert got.dtype == np.uint16


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 16])
def test_chunks_change_no_distance_and_no_tie(monkeypatch, chunk):
    monkeypatch.setattr(codecs, "CHUNK", chunk)
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 4, (500, 9), dtype=np.uint8)  # few values, so ties abound
    query = codes[3]
    wanted = np.bitwise_count(codes ^ query).sum(axis=1)
    words = word_major(codes)
    np.testing.assert_array_equal(hamming(words, query), wanted)
    allow = rng.random(500) < 0.3
    for mask in (None, allow, np.zeros(500, bool)):
        for k in (0, 1, 20, 600):
            rows, distances = nearest(words, query, k, mask)
            order = np.lexsort((np.arange(500), wanted))
            order = order if mask is None else order[mask[order]]
            np.testing.assert_array_equal(rows, order[:k])
            np.testing.assert_array_equal(distances, wanted[order[:k]])


def test_a_growing_array_can_be_scanned_up_to_its_last_row():
    codes = np.random.default_rng(2).integers(0, 256, (100, 48), dtype=np.uint8)
    room = np.zeros((6, 400), np.uint64)
    room[:, :100] = word_major(codes)
    np.testing.assert_array_equal(
        hamming(room[:, :100], codes[:2]), hamming(word_major(codes), codes[:2])
    )


def test_rows_too_wide_to_count_are_refused():
    with pytest.raises(InvalidKnob, match="65,471"):
        word_major(np.zeros((1, 8192), np.uint8))


@calm
@given(names, st.integers(1, 30), st.integers(1, 40), st.integers(0, 99))
def test_dot_scores_the_decoded_rows_in_the_order_asked(name, n, width, seed):
    coded = codec(name).encode(matrix(n, width, seed))
    decoded = codec(name).decode(coded)
    queries = matrix(2, width, seed + 1)
    rows = np.random.default_rng(seed).integers(0, n, 7)
    np.testing.assert_allclose(
        dot(coded, queries, rows), queries @ decoded[rows].T, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(dot(coded, queries[0]), decoded @ queries[0], rtol=1e-4, atol=1e-4)


def test_sign_codes_with_rescoring_find_almost_what_exact_search_finds():
    rng = np.random.default_rng(3)
    centres = matrix(50, 384, 4)
    x = centres[rng.integers(0, 50, 4000)] + 0.7 * matrix(4000, 384, 5)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    words, int8 = word_major(codec("sign").encode(x).arrays["codes"]), codec("int8/row").encode(x)
    found = 0
    for q in x[:50] + 0.02 * matrix(50, 384, 6):
        rows, _ = nearest(words, codec("sign").encode(q).arrays["codes"][0], 200)
        top = rows[np.argsort(-dot(int8, q, rows), kind="stable")[:10]]
        found += len(set(top) & set(np.argsort(-(x @ q))[:10]))
    assert found >= 0.9 * 500
