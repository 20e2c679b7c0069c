"""Slices and token subsets: the same numbers from less memory."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.engine.sliced import Chain, groups, sliced  # noqa: E402
from memwise.train.engine.tokens import TokenGate  # noqa: E402
from memwise.train.measure import peak, saved  # noqa: E402


class Free(nn.Module):
    """An elementwise step that leaves some axes free."""

    def __init__(self, *free: int) -> None:
        super().__init__()
        self.free = free

    def forward(self, x):
        return x * 2 + 1


class Wide(Free):
    """A step with in-betweens four times its input."""

    def forward(self, x):
        return torch.cat([x, x, x, x], -1).exp().unflatten(-1, (4, -1)).mean(-2)


class Normed(Free):
    """A step that reduces over axis 1."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


def values(*shape: int):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_slices_give_the_same_values_whatever_their_size(size: int) -> None:
    layer, x = nn.Linear(4, 6, dtype=torch.float64), values(2, 7, 4)
    with torch.no_grad():
        torch.testing.assert_close(sliced(layer, 1, size, x), layer(x))


def test_several_inputs_are_cut_alike() -> None:
    x, y = values(2, 7, 4), values(2, 7, 5)
    got = sliced(lambda a, b: torch.cat([a, b], -1), 1, 2, x, y)
    assert torch.equal(got, torch.cat([x, y], -1))


def test_the_output_may_be_given() -> None:
    x = values(2, 7, 4)
    out = torch.empty_like(x)
    assert sliced(torch.sin, -2, 2, x, out=out) is out
    assert torch.equal(out, x.sin())


def test_an_axis_that_is_not_free_is_noticed() -> None:
    with pytest.raises(InvalidKnob, match="not free"):
        sliced(lambda x: x[:, :1], 1, 2, values(2, 6))
    with pytest.raises(InvalidKnob, match="one length"):
        sliced(torch.add, 0, 2, values(2, 6), values(3, 6))
    with pytest.raises(InvalidKnob, match="size=0"):
        sliced(torch.sin, 0, 0, values(2, 6))


def test_the_longest_run_of_one_free_axis_is_a_group() -> None:
    steps = [Free(1, 2), Free(2), Free(1, 2), Free(1), Free(), Free(1)]
    found = [(axis, len(group)) for axis, group in groups(steps)]
    assert found == [(2, 3), (1, 1), (None, 1), (1, 1)]
    alone = [(axis, len(group)) for axis, group in groups(steps, grouped=False)]
    assert alone == [(1, 1), (2, 1), (1, 1), (1, 1), (None, 1), (1, 1)]


@pytest.mark.parametrize("grouped", [True, False])
def test_a_sliced_chain_gives_the_values_of_the_plain_one(grouped: bool) -> None:
    chain = Chain(Wide(1), Free(1), Normed(2), Free(1, 2), Wide(2))
    x = values(2, 6, 8)
    want = chain(x)
    chain.n_slices, chain.grouped = 3, grouped
    torch.testing.assert_close(chain(x), want)


def test_a_wrong_axis_gives_other_values() -> None:
    chain, x = Chain(Normed(1)), values(2, 6, 8)
    want = chain(x)
    chain.n_slices = 3
    assert not torch.allclose(chain(x), want)


def test_a_group_peaks_lower_than_its_steps_alone_and_those_than_the_plain_chain() -> None:
    chain, x = Chain(*(Wide(1) for _ in range(3))), values(4, 64, 256)

    def highest(n_slices: int | None, grouped: bool) -> float:
        chain.n_slices, chain.grouped = n_slices, grouped
        return peak(lambda: chain(x)).peak_bytes / x.nbytes

    plain, alone, together = highest(None, True), highest(16, False), highest(16, True)
    assert together < alone < plain
    assert together < 1.8  # output, and in-betweens of 1/16


def test_kept_tokens_stay_in_order_with_their_positions() -> None:
    gate = TokenGate.best(torch.tensor([[0.1, 0.9, 0.5, 0.8], [0.7, 0.1, 0.2, 0.6]]), 2)
    assert gate.kept.tolist() == [[1, 3], [0, 3]]
    positions = torch.arange(4).expand(2, 4)
    assert torch.equal(gate.gather(positions), gate.kept)


def test_tokens_that_are_left_out_pass_through() -> None:
    x = values(2, 6, 3)
    gate = TokenGate.random((2, 6), 4, torch.Generator().manual_seed(0))
    y = gate.around(lambda part: part + 1, x)
    moved = torch.zeros(2, 6, dtype=torch.bool).scatter(1, gate.kept, True)
    assert torch.equal(y[moved], x[moved] + 1)
    assert torch.equal(y[~moved], x[~moved])


def test_gradients_reach_all_tokens_and_the_function() -> None:
    x, weight = values(2, 6, 3).requires_grad_(), values(3, 3).requires_grad_()
    gate = TokenGate.best(values(2, 6), 3)
    assert torch.autograd.gradcheck(
        lambda x, w: gate.around(lambda part: (part @ w).tanh(), x), (x, weight)
    )


def test_what_is_left_out_keeps_no_bytes() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
    x = torch.zeros(2, 128, 64, requires_grad=True)

    def held(n_kept: int) -> int:
        gate = TokenGate.best(values(2, 128), n_kept)
        return saved(layers, lambda: layers(gate.gather(x)).sum()).held_bytes

    assert held(32) < 0.3 * held(128)


@pytest.mark.parametrize("n_kept", [0, 5])
def test_keeping_none_or_more_than_all_is_refused(n_kept: int) -> None:
    with pytest.raises(InvalidKnob, match="n_kept"):
        TokenGate.best(torch.zeros(1, 4), n_kept)
