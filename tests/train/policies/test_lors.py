"""LoRS: zeros stay zeros, and the backward pass is dense nowhere."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.train import measure  # noqa: E402
from memwise.train.policies.lora import LoRA  # noqa: E402
from memwise.train.policies.lors import LoRS  # noqa: E402


def pruned(side: int = 64) -> nn.Module:
    net = nn.Sequential(nn.Linear(side, side, bias=False))
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(side, side, generator=draws) / 8
    net[0].weight.data = weight * (weight.abs() > weight.abs().median())
    return net


def train(net: nn.Module, handle, n_steps: int) -> list[float]:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    wanted = x.roll(1, dims=1)
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.01)
    losses = []
    for _ in range(n_steps):
        loss = (net(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_it_learns_and_merges_without_filling_a_zero() -> None:
    net = pruned()
    zeros = net[0].weight == 0
    handle = LoRS()(net)
    losses = train(net, handle, 60)
    assert losses[-1] < 0.6 * losses[0]
    y = net(torch.eye(64))
    assert handle.merge()
    handle.remove()
    torch.testing.assert_close(net(torch.eye(64)), y)
    assert (net[0].weight[zeros] == 0).all()
    assert (net[0].weight != 0).sum() == (~zeros).sum()


def test_plain_lora_fills_them() -> None:
    net = pruned()
    zeros = net[0].weight == 0
    handle = LoRA()(net)
    train(net, handle, 5)
    assert handle.merge()
    assert (net[0].weight[zeros] != 0).any()


def test_the_peak_of_a_step_is_less_than_one_matrix() -> None:
    side = 1024
    net = pruned(side)
    handle = LoRS()(net)
    x = torch.randn(8, side, requires_grad=True)

    def step() -> None:
        for tensor in (x, *handle.parameters()):
            tensor.grad = None
        net(x).sum().backward()

    step()
    assert measure.peak(step).peak_bytes < 0.75 * side * side * 4
    assert measure.saved(net, lambda: net(x)).held_bytes <= x.numel() * 4
