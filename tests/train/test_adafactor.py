"""Adafactor: torch's own steps on vectors and matrices, a float64 loop on all else, in any cut."""

from __future__ import annotations

import io
import math
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.engine import optimizer as engine  # noqa: E402
from memwise.train.engine.optimizer import plane  # noqa: E402
from memwise.train.engine.rules import Adafactor as Rule  # noqa: E402
from memwise.train.measure import bytes_of, peak  # noqa: E402
from memwise.train.policies.adafactor import Adafactor  # noqa: E402

SHAPES = ((24, 32), (40,), (1536,), (1, 7), (9, 1), (1,))
HYPER = {"lr": 0.05, "beta2_decay": -0.7, "d": 1.0, "weight_decay": 0.1}


def params(*shapes: tuple[int, ...], dtype: Any = torch.float32) -> list[Any]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=draws).to(dtype).requires_grad_() for s in shapes]


def gradient(shape: Any, i: int, t: int) -> Any:
    """Of rows and columns of very different size, so that a wrong factor shows."""
    draws = torch.Generator().manual_seed(100 * t + i)
    grad = torch.randn(shape, generator=draws)
    grad = grad * torch.logspace(-3, 1, shape[-1]) if t % 3 else grad * 1e-3
    return grad * torch.logspace(0, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))


def run(optimizer: Any, given: list[Any], first: int, last: int) -> None:
    for t in range(first, last):
        for i, param in enumerate(given):
            param.grad = gradient(param.shape, i, t).to(param.dtype)
        optimizer.step()


def loop(given: list[Any], n_steps: int, lr: float, beta2_decay: float, d: float,
         weight_decay: float, eps: tuple[float, float]) -> list[Any]:  # fmt: skip
    """Algorithm 4 and 5 of the paper, number by number of a matrix, in float64."""
    found = []
    for i, param in enumerate(given):
        shape = plane(param.shape) if param.ndim > 1 else (1, param.numel())
        w, (n, m) = param.detach().double().view(shape).clone(), shape
        rows, cols, full = torch.zeros(n).double(), torch.zeros(m).double(), torch.zeros(n, m)
        full = full.double()
        for t in range(1, n_steps + 1):
            g = gradient(param.shape, i, t - 1).double().view(shape)
            share = t**beta2_decay
            rows += share * (torch.stack([sum(g[r] ** 2) / m for r in range(n)]) - rows)
            cols += share * (torch.stack([sum(g[:, c] ** 2) / n for c in range(m)]) - cols)
            full += share * (g**2 - full)
            expected = torch.outer(rows, cols) / max(float(rows.mean()), eps[0])
            expected = full if param.ndim < 2 else expected
            update = g / expected.clamp(min=eps[0] ** 2).sqrt()
            update /= max(1.0, math.sqrt(float((update**2).mean())) / d)
            size = max(eps[1], math.sqrt(float((w**2).mean()))) * min(lr, t**-0.5)
            w = w * (1 - lr * weight_decay) - size * update
        found.append(w.view(param.shape))
    return found


def test_its_steps_are_torchs_on_vectors_and_matrices() -> None:
    mine, theirs = params(*SHAPES), params(*SHAPES)
    run(Adafactor()(mine, **HYPER), mine, 0, 20)
    peer = partial(torch.optim.Adafactor, foreach=False)
    run(peer(theirs, **HYPER), theirs, 0, 20)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 1 << 15])
def test_its_steps_are_the_plain_loops_in_float64_in_any_cut(block, monkeypatch) -> None:
    monkeypatch.setattr(engine, "BLOCK", block)
    shapes = ((6, 5), (7,), (3, 2, 4), (1, 4))
    mine = params(*shapes)
    hyper = {**HYPER, "d": 0.8}
    wanted = loop(mine, 8, **hyper, eps=Rule().defaults()["eps"])
    run(Adafactor()(mine, **hyper), mine, 0, 8)
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a.detach().double(), b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cut_changes_less_than_a_rounding(dtype, monkeypatch) -> None:
    whole, cut = params(*SHAPES, dtype=dtype), params(*SHAPES, dtype=dtype)
    run(Adafactor()(whole, **HYPER), whole, 0, 8)
    monkeypatch.setattr(engine, "BLOCK", 1)
    run(Adafactor()(cut, **HYPER), cut, 0, 8)
    limit = torch.finfo(dtype).eps * 8
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one(dtype) -> None:
    one, two = params(*SHAPES, dtype=dtype), params(*SHAPES, dtype=dtype)
    run(Adafactor()(one, **HYPER), one, 0, 9)
    before = Adafactor()(two, **HYPER)
    run(before, two, 0, 5)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = Adafactor()(two, lr=0.5)
    after.load_state_dict(torch.load(file, weights_only=True))
    kept = [v for s in after.state.values() for v in s.values() if torch.is_tensor(v)]
    assert {v.dtype for v in kept} == {torch.float32}
    run(after, two, 5, 9)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_matrix_keeps_a_column_and_a_row_and_a_step_copies_nothing() -> None:
    given = params((1024, 640))
    optimizer = Adafactor()(given)
    run(optimizer, given, 0, 1)
    assert bytes_of(optimizer.state) == 4 * (1024 + 640)
    assert peak(optimizer.step).peak_bytes <= 1 << 19


def test_a_gradient_of_zeros_moves_nothing() -> None:
    given = params((4, 6), (5,))
    before = [p.detach().clone() for p in given]
    optimizer = Adafactor()(given)
    for param in given:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"eps": (1e-30,)}, r"eps=\(1e-30,\)"),
        ({"eps": (-1.0, 0.0)}, "not below 0"),
        ({"beta2_decay": 0.8}, "beta2_decay=0.8"),
        ({"d": 0.0}, "d=0.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ],
)
def test_what_cannot_be_is_refused(hyper, message) -> None:
    with pytest.raises(InvalidKnob, match=message):
        Adafactor()(params((2, 3)), **hyper)
