"""Few-Bit Backward: packed intervals, an exact output, a gradient that more bits bring closer."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.engine.activations import compress_activations  # noqa: E402
from memwise.train.policies.few_bit_backward import FewBitBackward  # noqa: E402

ACTS = [
    nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(2.0),
    nn.ELU(0.5), nn.Mish(), nn.ReLU(), nn.LeakyReLU(0.2), nn.SiLU(inplace=True),
]  # fmt: skip


def inputs() -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(40, 128, generator=draws, dtype=torch.float64)


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_output_is_exact_and_the_input_costs_bits(act: nn.Module, bits: int) -> None:
    model, x = nn.Sequential(act), inputs().requires_grad_()
    with compress_activations(model, FewBitBackward(bits)) as tape:
        y = model(x * 1)
        exact = isinstance(act, nn.ReLU | nn.LeakyReLU)
        assert tape.held_bytes == x.numel() * (1 if exact else bits) // 8
    assert torch.equal(y, act(x.detach().clone()))


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_more_bits_bring_the_gradient_closer(act: nn.Module) -> None:
    model, x = nn.Sequential(act), inputs().requires_grad_()
    (exact,) = torch.autograd.grad(model(x * 1).sum(), x)
    errors = []
    for bits in (1, 2, 3, 4):
        with compress_activations(model, FewBitBackward(bits)):
            (mine,) = torch.autograd.grad(model(x * 1).sum(), x)
        errors.append(float((mine - exact).square().mean()))
    if isinstance(act, nn.ReLU | nn.LeakyReLU):
        assert max(errors) == 0
    else:
        # Borders are the best for a uniform input, which this one is not.
        assert errors[3] < errors[2] < errors[1] < errors[0]
        assert errors[3] < 0.02 * float(exact.square().mean())


def test_a_transposed_input_meets_its_own_codes() -> None:
    model, x = nn.Sequential(nn.ReLU()), inputs().requires_grad_()
    (exact,) = torch.autograd.grad(model((x * 1).t()).square().sum(), x)
    with compress_activations(model, FewBitBackward()):
        (mine,) = torch.autograd.grad(model((x * 1).t()).square().sum(), x)
    assert torch.equal(mine, exact)


def test_the_report_tells_how_little_calls_of_functions_are_reached() -> None:
    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(x)

    with compress_activations(Calls(), FewBitBackward()) as tape:
        x = inputs().requires_grad_() * 1
        y = torch.nn.functional.gelu(x)
    assert y.requires_grad
    assert tape.report().reached_ratio == 0


def test_five_bits_are_refused() -> None:
    with pytest.raises(InvalidKnob, match="bits=5"):
        FewBitBackward(5)
