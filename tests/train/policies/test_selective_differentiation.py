"""Selective differentiation: no input is kept for a gradient that nobody asks for."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.train.engine.activations import compress_activations  # noqa: E402
from memwise.train.policies.selective_differentiation import (  # noqa: E402
    SelectiveDifferentiation,
)

CONVS = [
    nn.Conv1d(4, 8, 3, padding=1),
    nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False),
    nn.Conv3d(4, 4, 3, dilation=2, padding=2),
    nn.ConvTranspose1d(4, 8, 3, stride=2),
    nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1, groups=4),
    nn.ConvTranspose3d(4, 4, 2),
]


def inputs(layer: nn.Module) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    sides = [9] * (layer.weight.ndim - 2)
    return torch.randn(2, 4, *sides, generator=draws, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("frozen", ["", "weight", "bias", "both"])
@pytest.mark.parametrize("layer", CONVS, ids=lambda layer: type(layer).__name__)
def test_convolutions_give_equal_gradients_and_keep_what_they_need(
    layer: nn.Module, frozen: str
) -> None:
    net, x = nn.Sequential(layer).double(), inputs(layer)
    for name, param in layer.named_parameters():
        param.requires_grad_(frozen not in (name, "both"))
    asked = [x, *(p for p in layer.parameters() if p.requires_grad)]
    exact = torch.autograd.grad(net(x * 1).square().sum(), asked)
    with compress_activations(net, SelectiveDifferentiation()) as tape:
        y = net(x * 1)
        kept = tape.held_bytes
        mine = torch.autograd.grad(y.square().sum(), asked)
    assert kept == (x.numel() * 8 if layer.weight.requires_grad else 0)
    assert all(torch.equal(a, b) for a, b in zip(mine, exact, strict=True))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_a_frozen_batch_norm_in_evaluation_keeps_nothing(kind: type[nn.Module]) -> None:
    net = nn.Sequential(kind(4)).double().eval()
    net[0].weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    net[0].weight.requires_grad_(False)
    sides = [5] * {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[kind]
    x = torch.randn(3, 4, *sides, dtype=torch.float64, requires_grad=True)
    asked = [x, net[0].bias]
    exact = torch.autograd.grad(net(x * 1).square().sum(), asked)
    with compress_activations(net, SelectiveDifferentiation()) as tape:
        y = net(x * 1)
        assert tape.held_bytes == 0
        mine = torch.autograd.grad(y.square().sum(), asked)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(mine, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_keeps_one_copy(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.RMSNorm((4, 16))).to(dtype)
    x = torch.randn(6, 4, 16, dtype=dtype, requires_grad=True)
    asked = [x, net[0].weight]
    exact = torch.autograd.grad(net(x * 1).pow(3).sum(), asked)
    with compress_activations(net, SelectiveDifferentiation()) as tape:
        y = net(x * 1)
        assert tape.held_bytes <= x.numel() * x.element_size() + 6 * 8
        mine = torch.autograd.grad(y.pow(3).sum(), asked)
    for a, b in zip(mine, exact, strict=True):
        assert (a - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()


def test_one_module_serves_two_calls_with_different_needs() -> None:
    layer = nn.Conv1d(2, 2, 3, padding=1)
    net = nn.Sequential(layer, layer)
    x = torch.randn(1, 2, 8)
    net(x).square().sum().backward()
    exact = layer.weight.grad.clone()
    net.zero_grad()
    with compress_activations(net, SelectiveDifferentiation()):
        net(x).square().sum().backward()
    assert torch.allclose(layer.weight.grad, exact)
