"""LoRA and QLoRA as PEFT and plain decoding know them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.codec.th import codec  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.policies.lora import LoRA  # noqa: E402
from memwise.train.policies.qlora import QLoRA  # noqa: E402


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 5))
    draws = torch.Generator().manual_seed(2)
    for param in net.parameters():
        param.data = torch.randn(param.shape, generator=draws) / 8
    return net


def x() -> torch.Tensor:
    return torch.randn(7, 64, generator=torch.Generator().manual_seed(3))


def test_lora_learns_a_target_while_the_base_stays() -> None:
    net = model()
    before = net[0].weight.clone()
    handle = LoRA()(net)
    wanted = torch.randn(7, 5, generator=torch.Generator().manual_seed(4))
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.03)
    losses = []
    for _ in range(100):
        loss = (net(x()) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 * losses[0]
    assert torch.equal(net[0].weight, before)


def test_the_change_has_the_rank_that_was_asked_for() -> None:
    net = model()
    handle = LoRA(rank=3)(net, target="0")
    handle.sites["0"].delta.B.data.normal_(generator=torch.Generator().manual_seed(0))
    change = handle.sites["0"].delta.weight(handle.sites["0"].base)
    assert int((torch.linalg.svdvals(change.detach().double()) > 1e-5).sum()) == 3
    with pytest.raises(InvalidKnob, match="rank=0"):
        LoRA(rank=0)(model())


def test_the_same_seed_draws_the_same_adapter() -> None:
    first, second, other = (LoRA()(model(), seed=seed) for seed in (1, 1, 2))
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_lora_is_pefts() -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = model(), model()
    handle = LoRA(rank=4, alpha=12)(ours, target="0")
    handle.sites["0"].delta.B.data.normal_(generator=torch.Generator().manual_seed(0))
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"]))
    layer = wrapped.base_model.model[0]
    layer.lora_A["default"].weight.data = handle.sites["0"].delta.A.data
    layer.lora_B["default"].weight.data = handle.sites["0"].delta.B.data
    torch.testing.assert_close(ours(x()), wrapped(x()))


def test_qlora_multiplies_with_the_decoded_weight() -> None:
    net = model()
    decoded = codec("nf4/group64").fake(net[0].weight.detach())
    plain = nn.functional.linear(x(), decoded, net[0].bias)
    QLoRA()(net, target="0")
    torch.testing.assert_close(net[0](x()), plain)
    assert "weight" not in dict(net[0].named_parameters())
