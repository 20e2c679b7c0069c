"""ApiQ: rounded blocks that give what they gave, on the grid, with a delta that does something."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.codec.th import codec  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.engine.adapters import pack  # noqa: E402
from memwise.train.engine.bases import Base  # noqa: E402
from memwise.train.engine.calibrate import ClippedLowRank, calibrate  # noqa: E402
from memwise.train.policies.apiq import ApiQ  # noqa: E402
from memwise.train.policies.qlora import QLoRA  # noqa: E402

POLICY = ApiQ(codec="uint2/group16", rank=4, n_epochs=40, lr=4e-3, clip_lr=1e-2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        draws = torch.Generator().manual_seed(0)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=draws) / 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def batches(seed: int = 0) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(8, 32, generator=draws)
    return [torch.randn(24, 8, generator=draws) @ mix / 3 for _ in range(3)]


def error(model: nn.Module, plain: nn.Module) -> float:
    with torch.no_grad():
        found = [(model(x) - plain(x)).square().mean() for x in batches()]
    return float(torch.stack(found).mean())


def test_the_outputs_stay_closer_than_by_rounding() -> None:
    plain, rounded, fitted = Stack(), Stack(), Stack()
    QLoRA(codec=POLICY.codec)(rounded)
    handle = POLICY(fitted, batches=batches())
    assert error(fitted, plain) < 0.25 * error(rounded, plain)
    assert all(site.delta.B.abs().sum() > 0 for site in handle.sites.values())
    assert all(site.base.weight is None for site in handle.sites.values())
    trained = sum(p.numel() for p in handle.parameters())
    assert trained == 3 * 2 * 4 * (32 + 64)


def test_what_was_fitted_is_what_is_packed() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    base = Base(weight, None, None)
    delta = ClippedLowRank(base, "uint2/group16", 2, 1.0, torch.Generator().manual_seed(0))
    delta.low.data.normal_(1.0, 1.0, generator=torch.Generator().manual_seed(2))
    delta.high.data.normal_(1.0, 1.0, generator=torch.Generator().manual_seed(3))
    packed = pack("uint2/group16", delta.bounded(base).detach())
    torch.testing.assert_close(codec("uint2/group16").decode(packed), delta.rounded(base).detach())


def test_the_second_block_is_given_what_the_first_one_now_puts_out() -> None:
    model = Stack()
    seen = []

    def fit(number, block, inputs, wanted) -> None:
        with torch.no_grad():
            seen.append((inputs.run(block, 0), wanted[0]))
            block.down.bias += 1

    calibrate(model, batches(), fit)
    plain = Stack()
    x = batches()[0]
    assert torch.equal(*seen[0])
    with torch.no_grad():
        second = plain.blocks[1](plain.blocks[0](x))
        torch.testing.assert_close(seen[1][1], second)
        torch.testing.assert_close(seen[1][0], plain.blocks[1](plain.blocks[0](x) + 1))


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="batches"):
        POLICY(Stack())
    with pytest.raises(InvalidKnob, match="not clipped"):
        replace(POLICY, codec="nf4/group16")(Stack(), batches=batches())
