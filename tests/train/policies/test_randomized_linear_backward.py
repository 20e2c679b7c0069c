"""Randomized linear backward: a share of the tokens' bytes, exact but for the weight's gradient."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.engine.activations import compress_activations  # noqa: E402
from memwise.train.policies.randomized_linear_backward import (  # noqa: E402
    RandomizedLinearBackward,
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).double()


def inputs() -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(4, 50, 64, generator=draws, dtype=torch.float64)


@pytest.mark.parametrize("sketch", ["gaussian", "rademacher", "rows"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_linear_layers_hold_their_share_of_the_tokens(sketch: str, ratio: float) -> None:
    net = model()
    with compress_activations(net, RandomizedLinearBackward(ratio, sketch)) as tape:
        y = net(inputs())
        seeds = 2 * 8
        assert tape.held_bytes == ratio * 200 * (64 + 128) * 8 + seeds
    assert torch.allclose(y, net(inputs()), rtol=1e-12)


def test_all_rows_give_the_exact_gradient_and_biases_are_always_exact() -> None:
    net = model()
    net(inputs()).square().sum().backward()
    exact = [p.grad.clone() for p in net.parameters()]
    for ratio in (0.2, 1.0):
        net.zero_grad()
        with compress_activations(net, RandomizedLinearBackward(ratio, "rows")):
            net(inputs()).square().sum().backward()
        for mine, theirs in zip(net.parameters(), exact, strict=True):
            if ratio == 1 or mine.ndim == 1:
                assert torch.allclose(mine.grad, theirs)


def test_a_frozen_layer_keeps_nothing_of_its_input() -> None:
    net = model().requires_grad_(False)
    x = inputs().requires_grad_()
    with compress_activations(net, RandomizedLinearBackward()) as tape:
        net(x).sum().backward()
    assert tape.peak_bytes == 0


def test_an_input_that_another_operation_keeps_is_not_sketched_beside_it() -> None:
    net = nn.Sequential(nn.Tanh(), nn.Linear(64, 64)).double()
    x = inputs().requires_grad_()
    exact = torch.autograd.grad(net(x).square().sum(), net[1].weight)[0]
    with compress_activations(net, RandomizedLinearBackward(0.1)) as tape:
        y = net(x)
        assert tape.held_bytes == x.numel() * 8  # the output of tanh, once
        (mine,) = torch.autograd.grad(y.square().sum(), net[1].weight)
    assert torch.equal(mine, exact)


def test_a_recomputed_forward_pass_brings_its_own_seed() -> None:
    net = model()

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    again, total = Again(), torch.zeros(64, 128, dtype=torch.float64)
    again(inputs()).square().sum().backward()
    exact = net[1].weight.grad.clone()
    for seed in range(30):
        net.zero_grad()
        torch.manual_seed(seed)
        with compress_activations(again, RandomizedLinearBackward(0.5, "rows")):
            again(inputs()).square().sum().backward()
        total += net[1].weight.grad
    # Sums of two different sketches would have the mean 0.
    assert (total / 30 - exact).norm() < 0.5 * exact.norm()


@pytest.mark.parametrize("knobs", [(0.0, "rows"), (1.5, "rows"), (0.5, "dct")])
def test_knobs_out_of_range_are_refused(knobs: tuple[float, str]) -> None:
    with pytest.raises(InvalidKnob):
        RandomizedLinearBackward(*knobs)
