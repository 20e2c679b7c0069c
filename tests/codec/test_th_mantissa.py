"""Short mantissas: the nearest of their grid, the largest of a group without loss, few bytes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwise.codec.th_mantissa import BITS, GROUP, lengthen, shorten  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.measure import bytes_of  # noqa: E402

SHAPES = ((3,), (1, 512), (40, 1000), (7, 11, 13))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()


def nearest(x: float, top: float, n_bits: int) -> float:
    """Oracle: the nearest multiple of its own unit, in Python's numbers."""
    if x == 0:
        return 0.0
    y, unit = abs(x) / top, 1.0
    while y / unit >= 2:
        unit *= 2
    while y / unit < 1:
        unit /= 2
    steps = round(y / unit * 2**n_bits) / 2**n_bits  # ties to even
    return steps * unit * top * (1 if x > 0 else -1)


@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_becomes_the_nearest_of_its_grid(shape: tuple[int, ...], n_bits: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 50  # without ties
    short = shorten(x, n_bits)
    found = lengthen(short)
    assert found.shape == x.shape
    flat, got = x.flatten().tolist(), found.flatten().tolist()
    for first in range(0, min(len(flat), 3 * GROUP), GROUP):
        part = flat[first : first + GROUP]
        top = float(torch.tensor(part).abs().max())
        while top >= 2:
            top /= 2
        while 0 < top < 1:
            top *= 2
        top = int(top * 128) / 128
        for a, b in zip(part, got[first : first + GROUP], strict=True):
            # The quotient is rounded once, to float32, before it is compared.
            assert b == pytest.approx(nearest(a, top, n_bits), rel=1e-6)


@pytest.mark.parametrize("n_bits", BITS)
def test_the_largest_of_each_group_loses_nothing_and_errors_are_bounded(n_bits: int) -> None:
    x = randn(8, GROUP)
    found = lengthen(shorten(x, n_bits))
    largest = x.abs().argmax(1)
    rows = torch.arange(8)
    assert torch.equal(found[rows, largest], x[rows, largest])
    assert found.dtype == x.dtype
    error = (found.float() - x.float()).abs() / x.float().abs()
    assert error.max() <= 2.0 ** -(n_bits + 1) + 2**-8


def test_zeros_and_signs_stay() -> None:
    x = torch.tensor([0.0, -0.0, 1.5, -3.0] * 200)
    found = lengthen(shorten(x, 1))
    assert torch.equal(found, x)
    assert torch.equal(found.signbit(), x.signbit())
    assert torch.equal(lengthen(shorten(torch.zeros(600), 0)), torch.zeros(600))
    assert lengthen(shorten(torch.zeros(0, 4), 3)).shape == (0, 4)


def test_bytes_are_those_of_sign_mantissa_and_entropy() -> None:
    x = randn(512, 1024)
    counts = (x.view(torch.int16).flatten().int() >> 7 & 0xFF).bincount().double()
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    for n_bits in BITS:
        n_bytes = bytes_of(shorten(x, n_bits))
        # Dividing by the tops moves some exponents; Huffman codes are not the entropy itself.
        assert n_bytes * 8 / x.numel() == pytest.approx(n_bits + 1 + entropy, abs=0.2)


def test_what_has_no_short_mantissa_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="NaN"):
        shorten(torch.tensor([1.0, float("nan")]), 3)
    with pytest.raises(InvalidKnob, match="bits"):
        shorten(torch.ones(4), 5)
