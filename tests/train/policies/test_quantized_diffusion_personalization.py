"""A set of scales for each range of timesteps; the others neither move nor take part."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.policies.quantized_diffusion_personalization import (  # noqa: E402
    QuantizedDiffusionPersonalization,
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64))


def x():
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def policy(**knobs):
    return QuantizedDiffusionPersonalization(codec="uint4/group32", **knobs)


def moved(handle) -> set[str]:
    return {n for n in handle.names if any(p.grad is not None for p in handle.parameters(n))}


@pytest.mark.parametrize(("t", "owner"), [(0, "range0"), (49, "range0"), (50, "range1")])
def test_only_the_set_of_the_timestep_gets_a_gradient(t, owner) -> None:
    net = model()
    handle = policy(selected=None)(net)
    policy().bank(handle, 100).at(t)
    net(x()).sum().backward()
    assert moved(handle) == {owner}


def test_with_one_selected_range_the_old_scales_serve_the_others() -> None:
    net = model()
    own = policy(selected=0)
    handle = own(net)
    bank = own.bank(handle, 100)
    before = net(x()).detach()
    for param in handle.parameters():
        assert param.requires_grad == any(param is p for p in handle.parameters("range0"))
        if param.requires_grad:
            param.data.mul_(1.5)
    bank.at(10)
    assert not torch.equal(net(x()), before)
    bank.at(90)
    assert torch.equal(net(x()), before)
    assert own.trained(100) == [(0, 50)]


def test_ranges_meet_without_a_gap() -> None:
    own = policy(edges=(0.255, 0.7), selected=None)
    assert own.trained(100) == [(0, 26), (26, 70), (70, 100)]
    bank = own.bank(own(model()), 100)
    for name, (first, last) in zip(bank.handle.names, own.trained(100), strict=True):
        assert {bank.name(t) for t in range(first, last)} == {name}


def test_a_range_that_is_not_there_is_refused_before_the_weights_are_packed() -> None:
    net = model()
    with pytest.raises(InvalidKnob, match="there are 2 ranges"):
        policy(selected=2)(net)
    assert type(net[0]) is nn.Linear
