"""IST: a few blocks in training, and an importance that follows the loss."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.train.policies.ist import IST  # noqa: E402


class Chain(nn.Module):
    """Blocks of which only the one at `useful` reaches the output."""

    def __init__(self, useful: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        draws = torch.Generator().manual_seed(0)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=draws) / 4
        self.useful = useful

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [block(x) for block in self.blocks]
        return sum(o * (1.0 if i == self.useful else 0.01) for i, o in enumerate(outputs))


def test_only_the_chosen_blocks_have_states_and_gradients() -> None:
    model = Chain(2)
    policy = IST(trained_ratio=1 / 3, every=2, rate=0.0)
    handle = policy(model)
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.01)
    sampler = policy.sampler(handle, optimizer)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    seen = set()
    for _ in range(20):
        chosen = sampler(lambda: model(x).square().mean())
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert len(chosen) == 2
        assert {id(p) for i in chosen for p in handle.of_layer(i)} == {
            id(p) for p in optimizer.state
        }
        seen.add(tuple(chosen))
    assert len(seen) > 3
    assert all(site.gain == 1 for site in handle.sites.values())


def test_the_block_that_lowers_the_loss_becomes_important() -> None:
    model = Chain(4)
    policy = IST(trained_ratio=0.2, every=1, n_candidates=4)
    handle = policy(model)
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.01)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(80):  # all blocks, so that there is something to measure
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    sampler = policy.sampler(handle, optimizer, seed=1)
    for _ in range(40):
        sampler(lambda: model(x).square().mean())
    assert sampler.importance.argmax() == 4
    again = policy.sampler(handle, optimizer, seed=1)
    for _ in range(40):
        again(lambda: model(x).square().mean())
    assert torch.equal(sampler.importance, again.importance)
