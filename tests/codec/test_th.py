import io
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from memwise.codec import np as on_numpy  # noqa: E402
from memwise.codec import parse, tables  # noqa: E402
from memwise.codec.spec import BITS, FLOATS, LEARNED  # noqa: E402
from memwise.codec.th import Packed, codec  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

SHARED = ["int8/row", "int8/row:f16", "sign", "sign/row", "sign/row:f16", "fp16", "fp32"]
GRIDS = [g for g in BITS if g not in FLOATS]
SCALES = ["tensor", "row", "column", "rank1", "group8", "group5", "expand16", "row:f16"]
NEAREST = [
    f"{g}/{s}"
    for g in GRIDS
    for s in SCALES
    if not ((g.startswith("uint") or g == "sign") and s in ("rank1", "expand16"))
]
EVERY = [*FLOATS, "sign", *NEAREST]
calm = settings(derandomize=True, deadline=None, max_examples=60)
PEAKS = {"e4m3": 448.0, "e5m2": 57344.0}


def matrix(*shape, seed=0, grid="", dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x.abs() if grid.startswith("linear") else x).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def level_list(grid):
    """The levels of a grid by code, from their definitions."""
    bits = BITS[grid]
    if grid == "sign":
        return [-1.0, 1.0]
    if grid.startswith("uint"):
        return [float(i) for i in range(1 << bits)]
    if grid.startswith("int"):
        half = (1 << bits - 1) - 1
        return [float(i) if i <= half else float(i - (1 << bits)) for i in range(1 << bits)]
    if grid in PEAKS:
        n_mantissa, bias = (3, 7) if grid == "e4m3" else (2, 15)
        out = []
        for code in range(256):
            exponent, mantissa = (code & 127) >> n_mantissa, code & ((1 << n_mantissa) - 1)
            size = mantissa / 2**n_mantissa + (exponent > 0)
            value = size * 2.0 ** (max(exponent, 1) - bias)
            value = value if value <= PEAKS[grid] else math.nan
            out.append(-value if code > 127 else value)
        return out
    return [float(np.float32(level)) for level in tables.levels(grid)]


def peak_of(grid):
    if grid.startswith(("int", "uint")):
        return float((1 << BITS[grid] - (grid[0] == "i")) - 1)
    return PEAKS.get(grid, 1.0)


def factors(packed, spec, name="scale"):
    """The factor of every coordinate as a loop over the definition of the scale."""
    stored = packed.arrays[name].double().tolist()
    shape, group = packed.shape, spec.scale.group
    width = shape[-1]
    out = []
    for i in range(math.prod(shape)):
        match spec.scale.kind:
            case "tensor":
                out.append(stored[0])
            case "row":
                out.append(stored[i // width])
            case "column":
                out.append(stored[i % width])
            case "rank1":
                at = np.unravel_index(i, shape)
                starts = np.cumsum([0, *shape[:-1]])
                out.append(min(stored[s + a] for s, a in zip(starts, at, strict=True)))
            case _:
                out.append(stored[i // group])
    return out


def oracle(packed, spec, codes):
    """Decodes a list of codes in float64."""
    grid = spec.grid.name
    levels = packed.arrays["levels"].tolist() if grid in LEARNED else level_list(grid)
    y = [levels[code] for code in codes]
    if spec.scale.kind == "none":
        return y
    peak = peak_of(grid) if spec.scale.kind == "rank1" else 1.0
    y = [a * b / peak for a, b in zip(y, factors(packed, spec), strict=True)]
    if "zero" in packed.arrays:
        y = [a + b for a, b in zip(y, factors(packed, spec, "zero"), strict=True)]
    if spec.scale.kind == "expand":
        centre, power = factors(packed, spec, "centre"), factors(packed, spec, "power")
        y = [
            math.copysign(abs(a) ** (1 / k), a) * c
            for a, c, k in zip(y, centre, power, strict=True)
        ]
    return y


def stored_codes(packed, spec):
    """Codes bit by bit from the dense bytes."""
    bits, width = spec.grid.bits, packed.shape[-1]
    rows = packed.arrays["codes"].contiguous().view(torch.uint8).tolist()
    out = []
    for row in rows:
        joined = sum(byte << 8 * i for i, byte in enumerate(row))
        out += [joined >> bits * i & ((1 << bits) - 1) for i in range(width)]
        assert joined >> bits * width == 0  # spare bits are zero
    return out


@pytest.mark.parametrize("name", NEAREST)
def test_bytes_decode_to_what_the_definition_says(name):
    spec = parse(name)
    for shape in [(3, 8), (2, 3, 7), (5, 1), (1, 33)]:
        x = matrix(*shape, grid=name)
        packed = codec(name).encode(x)
        wanted = oracle(packed, spec, stored_codes(packed, spec))
        decoded = codec(name).decode(packed)
        torch.testing.assert_close(
            decoded.double().view(-1), torch.tensor(wanted).double(), rtol=2e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", [n for n in NEAREST if n[:4] != "sign" and "expand" not in n])
def test_codes_are_the_nearest_levels(name):
    spec = parse(name)
    x = matrix(4, 24, seed=3, grid=name)
    packed = codec(name).encode(x)
    got = codec(name).decode(packed).double().view(-1).tolist()
    grid = spec.grid.name
    levels = packed.arrays["levels"].tolist() if grid in LEARNED else level_list(grid)
    if grid.startswith("int"):
        levels = [level for level in levels if level >= -peak_of(grid)]
    scale = factors(packed, spec)
    zero = factors(packed, spec, "zero") if "zero" in packed.arrays else [0.0] * len(scale)
    peak = peak_of(grid) if spec.scale.kind == "rank1" else 1.0
    for value, result, s, z in zip(x.view(-1).tolist(), got, scale, zero, strict=True):
        best = min(abs(level * s / peak + z - value) for level in levels if level == level)
        assert abs(result - value) <= best + 1e-5 * (abs(value) + abs(z) + 1e-3)


@pytest.mark.parametrize("grid", ["nf4", "dyn4", "dyn8", "linear4", "linear8", "int4", "int8"])
def test_every_float_beside_a_border_gets_the_right_code(grid):
    levels = sorted(level_list(grid)[: (1 << BITS[grid])])
    peak = peak_of(grid)
    levels = np.array([v for v in levels if abs(v) <= peak], np.float64)
    middle = (levels[:-1] + levels[1:]) / 2
    near = middle.astype(np.float32)
    near = np.concatenate(
        [near, np.nextafter(near, np.float32(-9e9)), np.nextafter(near, np.float32(9e9))]
    )
    near = np.concatenate([near[np.abs(near) <= peak], [0.0, -0.0, 1e-45, 1e-38, peak]])
    if grid.startswith("linear"):
        near = np.abs(near)
    near = near.astype(np.float32)
    c = codec(f"{grid}/tensor/byte")
    got = c.encode(torch.from_numpy(near)).arrays["codes"].view(-1).numpy()
    for value, code in zip(near.astype(np.float64), got, strict=True):
        gaps = np.abs(levels - value)
        best = np.flatnonzero(gaps == gaps.min())
        # Two's complement counts from zero; the tables from their first level.
        names = best if not grid.startswith("int") else levels[best].astype(int)
        even = names[names % 2 == 0] if len(names) == 2 else names
        assert code == int(even[0]) % (1 << BITS[grid]), value


@calm
@given(st.sampled_from(SHARED), st.integers(0, 9), st.integers(0, 70), st.integers(0, 99))
def test_numpy_and_torch_store_the_same_bytes_and_read_each_other(name, n, width, seed):
    x = matrix(n, width, seed=seed) * 10.0 ** ((seed % 9) - 4)
    if width and n:
        x[0, 0] = -0.0
        x[-1] *= seed % 3  # rows of zeros
    ours, theirs = codec(name).encode(x), on_numpy.codec(name).encode(x.numpy())
    assert ours.to_numpy().shape == theirs.shape
    assert set(ours.arrays) == set(theirs.arrays)
    for key, array in theirs.arrays.items():
        assert ours.to_numpy().arrays[key].dtype == array.dtype
        assert ours.to_numpy().arrays[key].tobytes() == array.tobytes()
    decoded = on_numpy.codec(name).decode(theirs)
    assert codec(name).decode(Packed.from_numpy(theirs)).numpy().tobytes() == decoded.tobytes()
    assert on_numpy.codec(name).decode(ours.to_numpy()).tobytes() == decoded.tobytes()


@pytest.mark.parametrize("packing", ["", "/byte", "/entropy", "/bitmap", "/sparse"])
@pytest.mark.parametrize("name", EVERY)
def test_every_name_keeps_its_bytes_its_rows_and_its_state(name, packing):
    full = name + packing
    grid = parse(name).grid
    refused = {
        "/byte": name in FLOATS, "/bitmap": not grid.has_zero, "/sparse": name not in FLOATS
    }  # fmt: skip
    if refused.get(packing, False):
        with pytest.raises(InvalidKnob):
            codec(full)
        return
    c = codec(full)
    for shape in [(6, 9), (2, 3, 16), (1, 1), (0, 4), (3, 0)]:
        x = matrix(*shape, grid=name)
        x[..., ::3] = 0
        packed = c.encode(x)
        whole = c.decode(packed)
        assert whole.shape == x.shape
        torch.testing.assert_close(whole, codec(name).decode(codec(name).encode(x)))
        if packing not in ("/entropy", "/bitmap", "/sparse"):
            assert packed.nbytes == c.nbytes(shape)
        rows = whole.reshape(math.prod(shape[:-1]), shape[-1])
        assert torch.equal(c.decode(packed, slice(1, 4)), rows[1:4])
        file = io.BytesIO()
        torch.save(packed.state(), file)
        file.seek(0)
        again = Packed.from_state(torch.load(file, weights_only=True))
        assert (again.codec, again.shape, again.dtype) == (full, shape, torch.float32)
        assert torch.equal(c.decode(again), whole)


@pytest.mark.parametrize(
    "name", ["int4/group64", "nf4/row", "e4m3/tensor", "linear4/rank1", "bf16"]
)
@pytest.mark.parametrize("packing", ["", "/entropy"])
def test_tensors_of_many_blocks_are_those_of_one(name, packing):
    for shape in [(3, 50_000), (40_000, 3), (1, 70_001)]:
        x = matrix(*shape, grid=name)
        c = codec(name + packing)
        packed = c.encode(x)
        whole = c.decode(packed)
        row = slice(shape[0] - 1, shape[0])
        assert torch.equal(c.decode(packed, row), whole[row])
        size = x.abs().max() / {
            "int4/group64": 14,
            "nf4/row": 6,
            "e4m3/tensor": 28,
            "bf16": 256,
        }.get(name, 16)
        assert (whole - x).abs().max() <= size * 1.001


@pytest.mark.parametrize("name", ["int4", "uint4", "int2", "sign", "nf4", "dyn4", "dyn8", "e4m3"])
def test_stochastic_rounding_has_the_coordinate_as_its_mean(name):
    n, scale = 20_000, "row"
    values = torch.tensor(
        [0.0, 1.0, -0.88, 0.3, -0.07, 0.81, 0.999, 0.004, 1e-5]
    )  # dyn4: > -0.8875
    x = values[:, None].expand(-1, n).T.contiguous()
    c = codec(f"{name}/{scale}/stochastic")
    decoded = c.decode(c.encode(x, seeded(1))).double()
    error = decoded.std(dim=0) / math.sqrt(n)
    bias = (decoded.mean(dim=0) - values.double()).abs()
    assert (bias <= 4.5 * error + 1e-6).all()


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_stochastic_halves_are_fair_down_to_subnormal_numbers(name):
    n = 40_000
    values = torch.tensor([1.001, -3.1415926, 65000.1, 3e-6, -3.1e-8, 0.0])
    c = codec(f"{name}/stochastic")
    decoded = c.decode(c.encode(values.expand(n, -1), seeded(2))).double()
    error = decoded.std(dim=0) / math.sqrt(n)
    assert ((decoded.mean(dim=0) - values.double()).abs() <= 4.5 * error + 1e-12).all()
    kind = torch.bfloat16 if name == "bf16" else torch.float16
    assert torch.equal(decoded.float().to(kind).double(), decoded)


def test_stochastic_rounding_only_takes_the_two_levels_around():
    for name in ("int4", "dyn4", "nf4", "e4m3", "linear4"):
        x = matrix(64, 64, grid=name)
        c = codec(f"{name}/tensor/stochastic")
        packed = c.encode(x, seeded())
        scale = float(packed.arrays["scale"][0])
        levels = np.sort([v * scale for v in level_list(name) if abs(v) <= peak_of(name)])
        got, x = c.decode(packed).double().numpy(), x.double().numpy()
        at = np.clip(np.searchsorted(levels, x), 1, len(levels) - 1)
        gap = levels[at] - levels[at - 1]
        assert (np.abs(got - x) <= gap * 1.0001).all()


def test_draws_repeat_with_the_seed_and_need_one():
    c = codec("int4/row/stochastic")
    x = matrix(9, 50)
    first, again = (c.encode(x, seeded(7)).arrays["codes"] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, c.encode(x, seeded(8)).arrays["codes"])
    with pytest.raises(InvalidKnob, match="Generator"):
        c.encode(x)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_entropy_coding_keeps_every_bit(name):
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    ints = torch.int32 if name == "fp32" else torch.int16
    if name == "fp32":
        bits = torch.randint(-(2**31), 2**31 - 1, (300, 300), generator=seeded()).to(ints)
    else:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(ints).view(256, 256)
    x = bits.view(kind)  # infinities, every NaN, subnormal numbers
    c = codec(f"{name}/entropy")
    again = c.decode(c.encode(x))
    same = again.view(ints) == bits
    assert (same | x.isnan()).all()
    assert torch.equal(again.isnan(), x.isnan())
    if name != "fp32":
        assert same.all()


def test_entropy_coding_of_weights_takes_two_thirds_of_bf16():
    x = (matrix(512, 512) * 0.02).bfloat16()
    packed = codec("bf16/entropy").encode(x)
    assert 0.60 * x.nbytes < packed.nbytes < 0.70 * x.nbytes
    assert torch.equal(codec("bf16/entropy").decode(packed), x)


def test_a_bitmap_pays_for_what_is_not_zero():
    x = matrix(256, 256) * (torch.rand(256, 256, generator=seeded()) < 0.3)
    packed = codec("fp16/bitmap").encode(x)
    assert packed.nbytes == 2 * int((x != 0).sum()) + x.numel() // 8
    assert torch.equal(codec("fp16/bitmap").decode(packed), x.half().float())


@pytest.mark.parametrize("name", [n for n in NEAREST if not n.startswith("uint")])
def test_zeros_come_back_as_zeros(name):
    zeros = torch.zeros(4, 40)
    assert torch.equal(codec(name).decode(codec(name).encode(zeros)), zeros)
    if parse(name).grid.has_zero:
        x = matrix(4, 40)
        x[:, ::2] = 0
        decoded = codec(name).decode(codec(name).encode(x))
        assert (decoded[:, ::2] == 0).all()


@pytest.mark.parametrize("name", ["linear4/rank1", "linear4/group8", "linear8/row"])
def test_a_second_moment_that_is_not_zero_is_not_stored_as_zero(name):
    v = matrix(16, 32) ** 2 * 1e-9
    v[3] = 0
    decoded = codec(name).decode(codec(name).encode(v))
    assert ((decoded > 0) | (v == 0)).all()
    assert (decoded[3] == 0).all()
    with pytest.raises(InvalidKnob, match="signed grid"):
        codec(name).encode(-v)


def test_expansion_lowers_the_error_of_moments_and_survives_wide_ranges():
    m = matrix(64, 128).sign() * (0.5 * matrix(64, 128, seed=1)).exp() * 1e-4
    for x, gain in ((m, 3.0), (m**2, 3.0)):
        plain, wide = (codec(f"e4m3/{s}128") for s in ("group", "expand"))
        before = (plain.decode(plain.encode(x)) - x).square().mean()
        after = (wide.decode(wide.encode(x)) - x).square().mean()
        assert after * gain < before
    x = 10.0 ** torch.linspace(-37, 37, 128)[None]
    decoded = codec("e4m3/expand128").decode(codec("e4m3/expand128").encode(x))
    assert (decoded.log10() - x.log10()).abs().max() < 2.5
    alike = torch.full((1, 128), -3.0)
    torch.testing.assert_close(
        codec("e4m3/expand128").decode(codec("e4m3/expand128").encode(alike)), alike
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", EVERY)
def test_numbers_that_no_code_can_hold_are_refused(name, bad):
    x = matrix(3, 40, grid=name)
    x[1, 17] = bad
    with pytest.raises(InvalidKnob, match="NaN or infinity"):
        codec(name).encode(x)


def test_other_inputs_that_cannot_be_stored_are_refused():
    big = torch.full((2, 2), 1e9)
    for name in ("fp16", "int8/row:f16", "nf4/tensor:f16"):
        with pytest.raises(InvalidKnob, match="half precision"):
            codec(name).encode(big)
    with pytest.raises(InvalidKnob, match="too large for bf16"):
        codec("bf16").encode(torch.full((1,), 3.4e38))
    with pytest.raises(InvalidKnob, match="convert"):
        codec("int8/row").encode(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(InvalidKnob, match="axis"):
        codec("int8/row").encode(torch.tensor(1.0))
    with pytest.raises(InvalidKnob, match="cannot decode"):
        codec("int8/row").decode(codec("fp16").encode(big / 1e9))


@pytest.mark.parametrize("name", ["int8/row", "dyn4/group128", "sign/row", "bf16", "e4m3/expand16"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_rounded_to_float32_first_and_come_back_in_their_type(name, kind):
    x = matrix(5, 48, dtype=kind)
    packed, plain = codec(name).encode(x), codec(name).encode(x.float())
    assert packed.dtype == kind
    for key, array in plain.arrays.items():
        assert torch.equal(packed.arrays[key].view(torch.uint8), array.view(torch.uint8))
    decoded = codec(name).decode(packed)
    assert decoded.dtype == kind
    assert torch.equal(decoded, codec(name).decode(plain).to(kind))


def test_the_layout_of_the_input_does_not_matter():
    x = matrix(40, 24)
    c = codec("nf4/group16")
    for view in (x.T, x[::2, ::3], x.requires_grad_(), x.expand(3, 40, 24)):
        packed = c.encode(view)
        assert torch.equal(c.decode(packed), c.decode(c.encode(view.detach().clone())))
        assert not c.decode(packed).requires_grad


@pytest.mark.parametrize("name", ["int8/row", "nf4/row:f16", "int4/row", "uint8/row"])
def test_subnormal_numbers_stay_finite_and_small(name):
    x = torch.tensor([[1e-45, -1e-45, 0.0], [3e-39, 1e-39, -2e-39], [1e-38, 5e-39, 0.0]])
    decoded = codec(name).decode(codec(name).encode(x))
    assert decoded.isfinite().all()
    assert (decoded - x).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name", ["int8/row", "int4/group8", "nf4/group64", "e4m3/expand16", "bf16"]
)
def test_rows_written_one_part_at_a_time_equal_the_whole(name):
    x, y = matrix(16, 24, seed=1), matrix(16, 24, seed=2)
    c = codec(name)
    packed = c.encode(x)
    for start in range(0, 16, 8):
        c.encode_rows(packed, slice(start, start + 8), y[start : start + 8])
    assert torch.equal(c.decode(packed), c.decode(c.encode(y)))


def test_rows_that_share_factors_with_others_are_not_clipped():
    x = matrix(6, 10)
    for name in ("int8/tensor", "dyn4/column", "linear4/rank1", "uint4/tensor"):
        c = codec(name)
        x = x.abs()
        packed = c.encode(x)
        before = c.decode(packed)
        with pytest.raises(InvalidKnob, match="beyond"):
            c.encode_rows(packed, slice(0, 2), x[:2] * 2)
        assert torch.equal(c.decode(packed), before)
        c.encode_rows(packed, slice(0, 2), x[:2])
        assert torch.equal(c.decode(packed), before)
    with pytest.raises(InvalidKnob, match="multiples of 4 rows"):
        codec("int4/group40").encode_rows(codec("int4/group40").encode(x), slice(0, 2), x[:2])
    with pytest.raises(InvalidKnob, match="no fixed place"):
        codec("bf16/entropy").encode_rows(codec("bf16/entropy").encode(x), slice(0, 2), x[:2])


def test_decoding_writes_where_it_is_told():
    c, x = codec("int4/row"), matrix(8, 30)
    packed = c.encode(x)
    out = torch.empty(3, 30, dtype=torch.bfloat16)
    assert c.decode(packed, slice(2, 5), out) is out
    assert torch.equal(out, c.decode(packed)[2:5].bfloat16())
    with pytest.raises(InvalidKnob, match="contiguous"):
        c.decode(packed, out=torch.empty(30, 8))


def test_fake_decodes_forward_and_passes_the_gradient_through():
    x = matrix(4, 16).requires_grad_()
    c = codec("int2/row")
    y = c.fake(x)
    assert torch.equal(y, c.decode(c.encode(x)))
    weight = matrix(4, 16, seed=9)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_learned_levels_beat_fixed_ones_on_their_own_data():
    x = torch.distributions.Laplace(0.0, 1.0).icdf(torch.linspace(0.001, 0.999, 4096))[None]
    errors = {}
    for name in ("learned3/tensor", "int3/tensor", "learned4/tensor", "nf4/tensor"):
        errors[name] = (codec(name).decode(codec(name).encode(x)) - x).square().mean()
    assert errors["learned3/tensor"] < 0.7 * errors["int3/tensor"]
    assert errors["learned4/tensor"] < errors["nf4/tensor"]


def test_encoding_and_decoding_hold_less_than_half_a_mebibyte_beside_the_result():
    x, out = matrix(512, 1024, grid="linear4"), torch.empty(512, 1024)
    for name in ("dyn4/group128", "linear4/rank1", "int8/row", "nf4/group64"):
        c = codec(name)
        packed = c.encode(x)
        events = [torch.profiler.ProfilerActivity.CPU]
        for step in (partial(c.encode, x), partial(c.decode, packed, out=out)):
            with torch.profiler.profile(activities=events, profile_memory=True) as seen:
                step()
            held = peak = 0
            for event in seen.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    held += event.nbytes()
                    peak = max(peak, held)
            assert peak <= packed.nbytes + (1 << 19)


def test_names_and_numpy_load_without_torch():
    code = "import sys; sys.modules['torch'] = None; import memwise, memwise.codec.np"
    subprocess.run([sys.executable, "-c", code], check=True)
