"""Gradients seen in a subspace: the dense formula, and subspaces that are where they should be."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from memwise.train.engine.subspace import leading, overlap  # noqa: E402
from memwise.train.policies.galore import GaLore  # noqa: E402
from memwise.train.policies.online_subspace_descent import (  # noqa: E402
    Moving,
    OnlineSubspaceDescent,
)

POLICIES = (GaLore(rank=4, gap=3), OnlineSubspaceDescent(rank=4))


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps(optimizer: Any, params: list[Any], first: int, last: int) -> None:
    for t in range(first, last):
        for i, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=draws(100 * t + i))
        optimizer.step()


def made() -> list[Any]:
    shapes = ((12, 20), (20, 12), (9,), (4, 30))
    return [torch.randn(s, generator=draws(7)).requires_grad_() for s in shapes]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_step_is_the_dense_formula(shape: tuple[int, int]) -> None:
    """R = P^T G or G P; Adam on R; W <- (1 - lr decay) W + scale P D: plain, in float64."""
    lr, decay, scale, rank = 0.01, 0.1, 0.5, 4
    param = torch.randn(shape, generator=draws(1)).requires_grad_()
    optimizer = GaLore(rank=rank, gap=3, scale=scale)([param], lr=lr, weight_decay=decay)
    weight, m, v = param.detach().double().clone(), 0.0, 0.0
    for t in range(1, 8):
        param.grad = torch.randn(shape, generator=draws(t))
        grad = param.grad.double()
        optimizer.step()
        basis = optimizer.state[param]["basis"].double()
        low = basis.T @ grad if shape[0] <= shape[1] else grad @ basis
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        move = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
        back = basis @ move if shape[0] <= shape[1] else move @ basis.T
        weight = (1 - lr * decay) * weight - lr * scale * back
    torch.testing.assert_close(param.detach().double(), weight, atol=1e-5, rtol=1e-5)


def test_the_basis_is_that_of_the_full_svd() -> None:
    spectrum = torch.logspace(0, -3, 40)
    left = torch.linalg.qr(torch.randn(40, 40, generator=draws(1)))[0]
    right = torch.linalg.qr(torch.randn(90, 40, generator=draws(2)))[0]
    grad = (left * spectrum) @ right.T
    for matrix in (grad, grad.T):
        found = leading(matrix, 8, draws(3))
        torch.testing.assert_close(found.T @ found, torch.eye(8), atol=1e-5, rtol=0)
        cosines = torch.linalg.svdvals(left[:, :8].T @ found)
        assert math.acos(min(1.0, float(cosines.min()))) < 0.05


def test_overlap_does_not_see_signs_and_order() -> None:
    basis, other = torch.linalg.qr(torch.randn(30, 10, generator=draws(1)))[0].split(5, dim=1)
    assert overlap(basis, -basis.flip(1)) == pytest.approx(1.0, abs=1e-5)
    assert overlap(basis, other) == pytest.approx(0.0, abs=1e-5)


def test_a_moving_basis_follows_gradients_that_turn_and_a_frozen_one_does_not() -> None:
    space = Moving(rank=3, rate=0.01)
    first, second = torch.linalg.qr(torch.randn(20, 6, generator=draws(5)))[0].split(3, dim=1)
    state: dict[str, Any] = {}
    for t in range(1, 301):
        within = first if t < 2 else second
        grad = within @ torch.randn(3, 50, generator=draws(t))
        state["step"] = t
        space.fit(grad, state, draws(t))
        if t == 1:
            started = overlap(second, torch.linalg.qr(space.basis(state))[0])
        space.follow(grad, state, draws(t))
    span = torch.linalg.qr(space.basis(state))[0]
    assert started < 0.01
    assert overlap(second, span) > 0.99
    torch.testing.assert_close(
        space.basis(state).T @ space.basis(state), torch.eye(3), atol=0.1, rtol=0
    )


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_a_resumed_run_is_the_uninterrupted_one(policy: Any) -> None:
    one, two = made(), made()
    straight, before = policy(one, lr=0.01), policy(two, lr=0.01)
    steps(straight, one, 0, 9)
    steps(before, two, 0, 5)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = policy(two, lr=0.5)
    after.load_state_dict(torch.load(file, weights_only=True))
    steps(after, two, 5, 9)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_states_are_as_small_as_the_projection(policy: Any) -> None:
    given = made()
    optimizer = policy(given)
    steps(optimizer, given, 0, 1)
    assert optimizer.state[given[0]]["exp_avg"].shape == (4, 20)
    assert optimizer.state[given[1]]["exp_avg"].shape == (20, 4)
    assert optimizer.state[given[2]]["exp_avg"].shape == (1, 9)
    assert optimizer.state[given[3]]["exp_avg"].shape == (4, 30)  # no larger than the subspace


def test_stepping_in_the_backward_pass_moves_alike_and_keeps_no_gradient() -> None:
    one, two = made(), made()
    straight, inside = GaLore(rank=4)(one, lr=0.01), GaLore(rank=4)(two, lr=0.01)
    for _ in range(3):
        sum((p**3).sum() for p in one).backward()
        straight.step()
        straight.zero_grad()
        with inside.step_in_backward():
            sum((p**3).sum() for p in two).backward()
        assert all(p.grad is None for p in two)
        inside.step()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
