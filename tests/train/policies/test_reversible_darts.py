"""Reversible-DARTS: the mixture and its gradients, and what the search keeps."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.policies.plain_blocks import PlainBlocks  # noqa: E402
from memwise.train.policies.reversible_darts import ReversibleDARTS  # noqa: E402

OPS = ReversibleDARTS().ops


def hidden(width: int = 16):
    draws = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, width, generator=draws, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("n_parts", [2, 4])
def test_weights_and_alphas_get_the_gradients_of_the_plain_network(n_parts: int) -> None:
    net = ReversibleDARTS(n_parts=n_parts)(16, 3).double()
    plain, x = PlainBlocks()(net), hidden()
    for one in (net, plain):
        one(x).square().sum().backward()
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_a_mixture_is_the_sum_of_its_operations_by_softmax_of_alpha() -> None:
    net = ReversibleDARTS()(16, 1).double()
    mixture, x = net.fns[0], hidden(8)
    with torch.no_grad():
        mixture.alpha.copy_(torch.arange(5.0))
        shares = torch.arange(5.0).double().exp() / torch.arange(5.0).double().exp().sum()
        z = mixture.norm(x)
        want = sum(s * op(z) for s, op in zip(shares, mixture.ops.values(), strict=True))
        torch.testing.assert_close(mixture(x), want)
        torch.testing.assert_close(mixture.ops["identity"](z), z)
        assert not mixture.ops["zero"](z).any()


def test_all_layers_share_one_alpha_a_part() -> None:
    net = ReversibleDARTS()(16, 4)
    assert len(net.alphas()) == 2
    assert all(fn.alpha is net.alphas()[i % 2] for i, fn in enumerate(net.fns))
    n_weights = sum(1 for _ in net.parameters())
    assert len(net.weights()) == n_weights - 2


def test_the_best_operation_of_each_part_is_kept() -> None:
    net = ReversibleDARTS()(16, 2)
    with torch.no_grad():
        net.alphas()[0][OPS.index("ffn")] = 1
        net.alphas()[1][OPS.index("conv3")] = 1
    assert net.chosen() == ["ffn", "conv3"]
    derived = net.derived()
    assert [list(fn.ops) for fn in derived.fns] == [["ffn"], ["conv3"]] * 2
    assert derived(hidden().float()).shape == (2, 6, 16)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = (ReversibleDARTS()(16, 1, seed) for seed in (0, 0, 1))
    x = hidden().float()
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), other(x))


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="width=10"):
        ReversibleDARTS()(10, 1)
    with pytest.raises(InvalidKnob, match="'lstm'"):
        ReversibleDARTS(ops=("lstm",))(16, 1)
