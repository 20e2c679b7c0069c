"""Reversible sequences: the values and gradients of the same formula under ordinary autograd, from
bytes that do not grow with depth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.engine.reversible import ReversibleSequence  # noqa: E402
from memwise.train.measure import peak, saved  # noqa: E402

WIDTH = 12


class Mix(nn.Module):
    """A function of all other parts."""

    def __init__(self, parts: int, p: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        wide = WIDTH // parts * (parts - 1)
        self.a = nn.Linear(wide, 16, dtype=dtype)
        self.b = nn.Linear(16, WIDTH // parts, dtype=dtype)
        self.drop = nn.Dropout(p)

    def forward(self, *others):
        return self.b(self.drop(torch.tanh(self.a(torch.cat(others, -1)))))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH // 2, dtype=torch.float64)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def chain(parts: int, layers: int, make: Callable[[], nn.Module]) -> ReversibleSequence:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return ReversibleSequence(parts, [make() for _ in range(parts * layers)])


def hidden(dtype=torch.float64, tokens: int = 5):
    draws = torch.Generator().manual_seed(1)
    return torch.randn(3, tokens, WIDTH, generator=draws, dtype=dtype).requires_grad_()


def gradients(forward, model, x, seed: int = 3):
    """Output, gradient of the input and gradients of the weights, all generators seeded."""
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        y = forward(x)
    weights = [w for w in model.parameters() if w.requires_grad]
    found = torch.autograd.grad(y.square().sum(), [x, *weights], allow_unused=True)
    return [y.detach(), *found]


def assert_alike(mine: Sequence, theirs: Sequence, tolerance: float = 1e-11) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_values_and_gradients_are_those_of_autograd(parts: int) -> None:
    model = chain(parts, 3, lambda: Mix(parts))
    x = hidden()
    assert_alike(gradients(model, model, x), gradients(model.plain, model, x))


@pytest.mark.parametrize("parts", [2, 4])
def test_the_inverse_brings_the_input_back(parts: int) -> None:
    model, x = chain(parts, 24, lambda: Mix(parts)), hidden()
    torch.testing.assert_close(model.inverse(model(x)), x.detach(), rtol=1e-11, atol=1e-11)


def test_the_plain_formula_is_that_of_the_paper() -> None:
    model, x = chain(3, 1, lambda: Mix(3)), hidden()
    x1, x2, x3 = x.chunk(3, -1)
    f, g, h = model.fns
    y1 = x1 + f(x2, x3)
    y2 = x2 + g(y1, x3)
    y3 = x3 + h(y1, y2)
    assert torch.equal(model.plain(x), torch.cat([y1, y2, y3], -1))


def test_dropout_draws_the_same_masks_again() -> None:
    model, x = chain(2, 3, lambda: Mix(2, p=0.3)), hidden()
    mine = gradients(model, model, x)
    assert_alike(mine, gradients(model.plain, model, x))
    assert not torch.equal(mine[0], gradients(model, model, x, seed=4)[0])


def test_the_backward_pass_leaves_the_generators_as_they_are() -> None:
    model, x = chain(2, 2, lambda: Mix(2, p=0.3)), hidden()
    y = model(x)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_batchnorm_statistics_are_updated_once() -> None:
    model, x = chain(2, 2, Norm), hidden()
    other = copy.deepcopy(model)
    mine = gradients(model, model, x)
    assert_alike(mine, gradients(other.plain, other, x), 1e-8)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert all(int(fn.norm.num_batches_tracked) == 1 for fn in model.fns)


def test_shared_and_frozen_weights_get_the_right_gradients() -> None:
    one, two = Mix(2), Mix(2)
    two.a.weight.requires_grad_(False)
    model = ReversibleSequence(2, [one, two, one, one])
    x = hidden()
    assert_alike(gradients(model, model, x), gradients(model.plain, model, x))
    model(x).sum().backward()
    assert two.a.weight.grad is None
    first = one.a.weight.grad.clone()
    model(x).sum().backward()
    torch.testing.assert_close(one.a.weight.grad, 2 * first)


def test_a_weight_that_is_used_outside_too_gets_the_sum() -> None:
    model, x = chain(2, 1, lambda: Mix(2)), hidden()
    weight = model.fns[0].a.weight

    def outside(forward):
        return lambda x: forward(x) * weight.sum()

    mine = gradients(outside(model), model, x)
    assert_alike(mine, gradients(outside(model.plain), model, x))


def test_gradients_reach_the_weights_when_the_input_needs_none() -> None:
    model, x = chain(2, 2, lambda: Mix(2)), hidden().detach()
    model(x).sum().backward()
    mine = [w.grad.clone() for w in model.parameters()]
    model.zero_grad()
    model.plain(x).sum().backward()
    assert_alike(mine, [w.grad for w in model.parameters()])


def test_functions_that_give_a_constant_or_their_input_are_fine() -> None:
    class Zero(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    model, x = ReversibleSequence(2, [Zero(), nn.Identity(), Mix(2), Zero()]), hidden()
    assert_alike(gradients(model, model, x), gradients(model.plain, model, x))


def test_autocast_is_replayed_outside_of_it() -> None:
    model = chain(2, 2, lambda: Mix(2, dtype=torch.float32))
    x = hidden(torch.float32)

    def lower(forward):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return forward(x)

        return run

    mine = gradients(lower(model), model, x)
    theirs = gradients(lower(model.plain), model, x)
    full = gradients(model, model, x)
    assert_alike(mine[:1], theirs[:1], 1e-6)
    assert_alike(mine, theirs, 0.02)
    assert not torch.equal(mine[0], full[0])


def test_a_deep_chain_in_bfloat16_does_not_drift() -> None:
    model, x = chain(2, 48, lambda: Mix(2, dtype=torch.float32)), hidden(torch.float32)
    true = torch.cat([g.flatten() for g in gradients(model.plain, model, x)[1:]])
    model, x = model.bfloat16(), x.detach().bfloat16().requires_grad_()

    def wrong(forward) -> float:
        found = torch.cat([g.flatten() for g in gradients(forward, model, x)[1:]])
        return float((found.float() - true).norm() / true.norm())

    assert model(x).dtype == torch.bfloat16
    assert wrong(model) < 1.5 * wrong(model.plain)


def test_autocast_leaves_the_gradient_of_a_weight_that_is_used_again() -> None:
    model, x = chain(2, 1, lambda: Mix(2, dtype=torch.float32)), hidden(torch.float32)
    first = model.fns[0].b
    with torch.autocast("cpu", torch.bfloat16):
        model(x)  # its graph is dropped; what it cast must not stay behind without a gradient
        first(torch.ones(1, 16)).sum().backward()
    assert first.weight.grad is not None


def test_a_weight_that_was_changed_in_between_is_noticed() -> None:
    model, x = chain(2, 1, lambda: Mix(2)), hidden()
    y = model(x)
    with torch.no_grad():
        model.fns[0].a.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_graph_can_be_kept_and_used_twice() -> None:
    model, x = chain(2, 2, lambda: Mix(2)), hidden()
    y = model(x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y, x)[0])


def test_what_is_kept_does_not_grow_with_depth() -> None:
    x = hidden(tokens=2000)

    def kept(layers: int) -> tuple[int, int]:
        model = chain(2, layers, lambda: Mix(2))
        return saved(model, lambda: model(x)).held_bytes, peak(lambda: model(x)).kept_bytes

    assert kept(16) == kept(4) == (x.nbytes, x.nbytes)


def test_a_function_that_draws_keeps_the_state_of_its_generator_and_no_more() -> None:
    x, state = hidden(tokens=2000), torch.get_rng_state().nbytes
    model = ReversibleSequence(2, [Mix(2, p=0.1), Mix(2)] * 4)
    assert saved(model, lambda: model(x)).held_bytes == x.nbytes + 4 * state


def test_the_peak_of_a_step_does_not_grow_with_depth() -> None:
    x = hidden(tokens=4000)

    def highest(layers: int) -> int:
        model = chain(2, layers, lambda: Mix(2))
        return peak(lambda: model(x).sum().backward()).peak_bytes

    assert highest(16) <= 1.1 * highest(4)


def test_volumes_are_split_by_channel() -> None:
    draws = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 3, 3, 3, generator=draws, dtype=torch.float64).requires_grad_()
    fns = [nn.Conv3d(2, 2, 3, padding=1, dtype=torch.float64) for _ in range(4)]
    model = ReversibleSequence(2, fns, dim=1)
    assert_alike(gradients(model, model, x), gradients(model.plain, model, x))


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="2 with 3 functions"):
        ReversibleSequence(2, [nn.Identity()] * 3)
    with pytest.raises(InvalidKnob, match="width of 3"):
        ReversibleSequence(2, [nn.Identity()] * 2)(torch.zeros(1, 3))
