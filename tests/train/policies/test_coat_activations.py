"""COAT's activations: half of bf16's bytes, scales by the kind of operation."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.engine.activations import compress_activations  # noqa: E402
from memwise.train.policies.coat_activations import CoatActivations  # noqa: E402


def net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 64), nn.GELU()
    ).to(dtype)  # fmt: skip


def inputs(dtype: torch.dtype) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(96, 64, generator=draws).to(dtype)


def test_saved_tensors_take_about_half_of_bf16() -> None:
    model, x = net(torch.bfloat16), inputs(torch.bfloat16)
    with compress_activations(model, CoatActivations()) as tape:
        y = model(x)
    assert y.requires_grad
    report = tape.report()
    # The norm's input, the SiLU's, the second layer's and the GELU's; the batch stays.
    norm, act = 2 * 96 + 96 * 64 * (1 + 2 / 16), 2 * 96 * 64 * (1 + 2 / 16)
    assert report.by_kind["act"].held_bytes == act
    assert report.by_kind["linear"].held_bytes == x.numel() * 2 + 96 * 64 + 4
    assert report.by_kind["norm"].held_bytes <= norm + 4 * 96 * 2
    coded = [s for a, s in report.by_action.items() if a.startswith("e4m3")]
    assert sum(s.held_bytes for s in coded) <= 0.57 * sum(s.plain_bytes for s in coded)


def test_gradients_come_close_and_outputs_are_exact() -> None:
    model, x = net(torch.float32), inputs(torch.float32)
    plain = model(x)
    plain.square().mean().backward()
    exact = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with compress_activations(model, CoatActivations()):
        y = model(x)
        y.square().mean().backward()
    assert torch.equal(y, plain)
    for mine, theirs in zip(model.parameters(), exact, strict=True):
        assert 0 < (mine.grad - theirs).norm() < 0.06 * theirs.norm()


def test_zeros_and_tiny_groups_survive_their_scales() -> None:
    model = nn.Sequential(nn.SiLU())
    x = inputs(torch.float32) * torch.logspace(-20, 0, 96)[:, None]
    x[5] = 0
    x.requires_grad_()
    (exact,) = torch.autograd.grad(model(x * 1).sum(), x)
    with compress_activations(model, CoatActivations()):
        (mine,) = torch.autograd.grad(model(x * 1).sum(), x)
    assert torch.allclose(mine, exact, atol=0.04)


def test_a_group_below_one_is_refused() -> None:
    with pytest.raises(InvalidKnob):
        CoatActivations(0)
