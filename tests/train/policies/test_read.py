"""READ: a recurrence over depth beside a backbone that keeps nothing."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from memwise.errors import InvalidKnob, UnsupportedModel  # noqa: E402
from memwise.train import measure  # noqa: E402
from memwise.train.policies.read import READ  # noqa: E402


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x + torch.tanh(self.map(x)), 1


class Backbone(nn.Module):
    def __init__(self, n_blocks: int = 3, width: int = 16) -> None:
        super().__init__()
        self.tok = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Layer(width) for _ in range(n_blocks))
        self.head = nn.Linear(width, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok(ids)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


def backbone(n_blocks: int = 3) -> Backbone:
    model = Backbone(n_blocks)
    draws = torch.Generator().manual_seed(0)
    for param in model.parameters():
        param.data = torch.randn(param.shape, generator=draws) / 3
    return model


def ids() -> torch.Tensor:
    return torch.arange(12).view(2, 6) % 10


def test_it_starts_as_the_backbone_and_leaves_it_as_it_was() -> None:
    model = backbone()
    before = model(ids())
    side = READ(width=8)(model)
    assert torch.equal(model(ids()), before)
    side.net.up.weight.data.fill_(0.1)
    changed = model(ids())
    assert not torch.equal(changed, before)
    saved = side.state_dict()
    side.remove()
    assert torch.equal(model(ids()), before)
    assert all(p.requires_grad for p in model.parameters())
    again = READ(width=8)(model)
    again.load(saved)
    assert torch.equal(model(ids()), changed)
    with pytest.raises(InvalidKnob, match="width"):
        READ(width=4)(backbone()).load(saved)


def test_the_output_is_a_loop_over_depth_at_each_token() -> None:
    model = backbone().double()
    side = READ(width=8)(model)
    net = side.net
    net.up.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    got = model(ids())
    side.remove()
    state = model.tok(ids())[1, 4]
    h, states = torch.zeros(1, 8, dtype=torch.float64), [state]
    for block in model.blocks:
        states.append(block(states[-1])[0])
    for state in states:
        seen = F.layer_norm(state, (16,))[None]
        h = net.cell(torch.tanh(net.see(seen) + net.join(h)), h)
    wanted = model.head(states[-1] + net.up(h)[0])
    torch.testing.assert_close(got[1, 4], wanted)


def test_the_backbone_saves_nothing_and_its_depth_costs_no_numbers() -> None:
    model = backbone()
    side = READ(width=4)(model)
    found = measure.saved(model, lambda: model(ids()).sum())
    assert sum(n for name, n in found.by_module().items() if ".map" in name) == 0
    model(ids()).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert side.net.up.weight.grad is not None
    sizes = {sum(p.numel() for p in READ()(backbone(n)).parameters()) for n in (2, 6)}
    assert len(sizes) == 1
    assert not side.merge()


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModel):
        READ()(nn.Sequential(nn.Linear(3, 3)))
