"""Reversible-3D-UNet: the plain network's values and gradients, whatever the number of blocks."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.measure import peak  # noqa: E402
from memwise.train.policies.plain_blocks import PlainBlocks  # noqa: E402
from memwise.train.policies.reversible_3d_unet import Reversible3DUNet  # noqa: E402


def volume(side: int = 8):
    draws = torch.Generator().manual_seed(0)
    return torch.randn(1, 1, side, side, side, generator=draws, dtype=torch.float64)


def test_values_and_gradients_are_those_of_the_plain_network() -> None:
    net = Reversible3DUNet(expansion=2)((8, 16)).double()
    plain, x = PlainBlocks()(net), volume()
    torch.testing.assert_close(net(x), plain(x))
    for one in (net, plain):
        one(x).square().sum().backward()
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-8)


def test_the_plain_twin_shares_no_weights() -> None:
    net = Reversible3DUNet()((8,))
    plain = PlainBlocks()(net)
    with torch.no_grad():
        net.stem.weight.add_(1)
    assert not torch.equal(net.stem.weight, plain.stem.weight)


def test_the_plain_twin_of_a_plain_network_is_plain() -> None:
    plain = PlainBlocks()(Reversible3DUNet()((8,)))
    x = volume().float()
    assert torch.equal(PlainBlocks()(plain)(x), plain(x))


@pytest.mark.parametrize("channels", [(8,), (8, 16), (8, 16, 24)])
def test_scores_have_the_shape_of_the_volume_at_any_depth(channels: tuple[int, ...]) -> None:
    net = Reversible3DUNet(n_blocks=1, expansion=1)(channels, n_inputs=2, n_classes=3)
    assert net(torch.zeros(2, 2, 8, 4, 8)).shape == (2, 3, 8, 4, 8)


def test_odd_sides_are_brought_back() -> None:
    net = Reversible3DUNet(n_blocks=1, expansion=1)((8, 16))
    assert net(torch.zeros(1, 1, 7, 5, 6)).shape == (1, 4, 7, 5, 6)


def test_the_peak_of_a_step_does_not_grow_with_blocks() -> None:
    def highest(n_blocks: int) -> int:
        net = Reversible3DUNet(n_blocks=n_blocks)((8,)).double()
        x = volume(12)
        net(x).sum().backward()
        return peak(lambda: net(x).sum().backward()).peak_bytes

    assert highest(4) <= 1.1 * highest(1)


def test_widths_that_are_not_two_parts_of_whole_groups_are_refused() -> None:
    with pytest.raises(InvalidKnob, match="12 is not two parts"):
        Reversible3DUNet()((16, 12))
