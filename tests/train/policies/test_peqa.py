"""PEQA: the scales move, the codes never do."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.codec.th import codec  # noqa: E402
from memwise.train.policies.peqa import PEQA  # noqa: E402


def layer() -> nn.Module:
    net = nn.Sequential(nn.Linear(128, 24, bias=False))
    net[0].weight.data = torch.randn(24, 128, generator=torch.Generator().manual_seed(2)) / 8
    return net


def test_a_weight_is_scale_times_code_less_zero_point() -> None:
    net = layer()
    packed = codec("uint3/group64").encode(net[0].weight.detach())
    plain = codec("uint3/group64").decode(packed).view(24, 2, 64)
    scale, zero = (packed.arrays[name].view(24, 2, 1) for name in ("scale", "zero"))
    codes = ((plain - zero) / scale).round()  # q
    point = -zero / scale  # z
    handle = PEQA()(net)
    delta = handle.sites["0"].delta
    delta.scale.data *= 1 + 0.1 * torch.rand(24, 2, generator=torch.Generator().manual_seed(1))
    moved = (delta.scale[..., None] * (codes - point)).view(24, 128)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x), x @ moved.T, rtol=1e-4, atol=1e-5)


def test_training_moves_one_number_a_group_and_no_code() -> None:
    net = layer()
    handle = PEQA()(net)
    assert sum(p.numel() for p in handle.parameters()) == 24 * 2
    codes = net[0].weight_codes.clone()
    start = handle.state_dict()
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    fresh = net(x).detach()
    optimizer = torch.optim.Adam(handle.parameters(), lr=1e-3)
    for _ in range(20):
        loss = (net(x) - 1.2 * fresh).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * 0.04 * fresh.square().mean()
    assert torch.equal(net[0].weight_codes, codes)
    handle.load(start)
    assert torch.equal(net(x), fresh)


def test_a_group_of_one_value_does_no_harm() -> None:
    net = layer()
    net[0].weight.data[0] = 0.25
    handle = PEQA()(net)
    y = net(torch.ones(1, 128))
    y.sum().backward()
    assert y[0, 0] == 32
    assert all(p.grad.isfinite().all() for p in handle.parameters())
