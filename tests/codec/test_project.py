"""Projections: right in the mean where they say so, the same when drawn again, never whole."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwise.codec.project import KINDS, Drawn, Leading, Projection, leading  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.measure import peak  # noqa: E402


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrix(projection: Projection, n: int) -> torch.Tensor:
    """M, from what the projection does to the unit matrix."""
    return projection.across(torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_projection_is_right_in_the_mean(kind: str) -> None:
    n, k, n_draws = 24, 8, 3000
    total = torch.zeros(n, n, dtype=torch.float64)
    for seed in range(n_draws):
        m = matrix(Drawn(n, k, seed, kind), n)
        total += m @ m.T
    # An entry deviates by about sqrt(1 / k), those on the diagonal by sqrt(n / k) at most.
    assert (total / n_draws - torch.eye(n)).abs().max() < 5 * (n / k / n_draws) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_its_three_uses_are_of_one_matrix_over_many_blocks(kind: str) -> None:
    n, k = 1400, 500  # three blocks
    projection = Drawn(n, k, 7, kind)
    m = matrix(projection, n)
    assert m.count_nonzero() == (k if kind == "rows" else n * k)
    x, y = randn(n, 3), randn(4, k, seed=1)
    torch.testing.assert_close(projection.down(x), m.T @ x)
    torch.testing.assert_close(projection.across(x.T.contiguous()), x.T @ m)
    out = randn(4, n, seed=2)
    wanted = out + 0.3 * y @ m.T
    projection.add_back(out, y, 0.3)
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_again_it_is_the_same_to_the_bit_and_leaves_torchs_draws_alone(kind: str) -> None:
    x, before = randn(1400, 2, dtype=torch.float32), torch.random.get_rng_state()
    first, again = (Drawn(1400, 300, 5, kind).down(x) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(first, Drawn(1400, 300, 6, kind).down(x))


@pytest.mark.parametrize("use", ["down", "across", "add_back"])
def test_no_use_holds_the_whole_matrix(use: str) -> None:
    n, k = 8192, 1024  # 32 MiB, eight of which would be one block too many
    projection = Drawn(n, k, 0)
    x, y = randn(4, n, dtype=torch.float32), randn(4, k, dtype=torch.float32)
    column = x.T.contiguous()
    works = {
        "down": lambda: projection.down(column),
        "across": lambda: projection.across(x),
        "add_back": lambda: projection.add_back(x, y),
    }
    assert peak(works[use]).peak_bytes < 8 << 20


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_nor_does_adding_back_hold_another_one_of_the_target(kind: torch.dtype) -> None:
    out, y = torch.zeros(4096, 1024, dtype=kind), randn(4096, 64, dtype=kind)
    taken = peak(lambda: Drawn(1024, 64, 0).add_back(out, y, 0.1)).peak_bytes
    assert taken < 5 << 20
    assert out.count_nonzero() == out.numel()


def test_half_precision_sums_in_float32() -> None:
    x = randn(4096, 2, dtype=torch.bfloat16)
    projection = Drawn(4096, 64, 3)
    exact = projection.down(x.double())
    error = (projection.down(x).double() - exact).norm() / exact.norm()
    assert error < 2**-8


def test_leading_directions_are_those_of_the_singular_value_decomposition() -> None:
    left, _ = torch.linalg.qr(randn(40, 40))
    right, _ = torch.linalg.qr(randn(60, 40, seed=1))
    x = left @ torch.diag(0.6 ** torch.arange(40.0, dtype=torch.float64)) @ right.T
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    found = Leading.of(x, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(5, dtype=torch.float64))
    back = torch.zeros(60, 40, dtype=torch.float64)
    found.add_back(back, found.down(x).T.contiguous())
    torch.testing.assert_close(back.T, u[:, :5] @ torch.diag(s[:5]) @ v[:5], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.across(x.T), x.T @ found.basis)
    torch.testing.assert_close(found.basis, leading(x, 5, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("n", "k", "kind"), [(4, 5, "gaussian"), (4, 0, "rows"), (4, 2, "fourier")]
)
def test_projections_that_cannot_be_are_refused(n: int, k: int, kind: str) -> None:
    with pytest.raises(InvalidKnob):
        Drawn(n, k, 0, kind)
