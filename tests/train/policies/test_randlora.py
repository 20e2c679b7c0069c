"""RandLoRA: of full rank, shared bases, and PEFT's own numbers."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.train import measure  # noqa: E402
from memwise.train.policies.randlora import RandLoRA  # noqa: E402


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(96, 48), nn.Linear(48, 80), nn.Linear(80, 80))
    draws = torch.Generator().manual_seed(2)
    for param in net.parameters():
        param.data = torch.randn(param.shape, generator=draws) / 8
    return net


def shake(handle) -> None:
    draws = torch.Generator().manual_seed(1)
    for param in handle.parameters():
        param.data = torch.randn(param.shape, generator=draws).to(param.dtype) / 10


def change(site) -> torch.Tensor:
    return site.delta.weight(site.base).detach()


def test_the_change_is_of_full_rank() -> None:
    handle = RandLoRA(rank=8)(model().double())
    shake(handle)
    ranks = [int(torch.linalg.matrix_rank(change(site))) for site in handle.sites.values()]
    assert ranks == [48, 48, 80]


def test_the_change_is_the_sum_of_the_paper() -> None:
    handle = RandLoRA(rank=8, alpha=24)(model())
    shake(handle)
    for site in handle.sites.values():
        delta = site.delta
        least, most = min(delta.shape), max(delta.shape)
        a, b = delta.bases.A[:, :least], delta.bases.B[:, :most]
        total = sum(
            b[j] @ torch.diag(delta.lam[:, j]) @ a @ torch.diag(delta.gam[j])
            for j in range(delta.lam.shape[1])
        )
        total = 3 * (total if delta.shape[1] <= delta.shape[0] else total.T)
        torch.testing.assert_close(change(site), total, rtol=1e-4, atol=1e-5)


def test_bases_exist_once_are_never_saved_and_come_from_the_seed() -> None:
    net, other = model(), model()
    handle = RandLoRA(rank=8)(net, seed=4)
    bases = {id(site.delta.bases) for site in handle.sites.values()}
    assert len(bases) == 1
    saved = measure.bytes_of(handle.state_dict())
    assert saved == 4 * sum(p.numel() for p in handle.parameters())
    assert all("bases" not in name for name in net.state_dict())
    shake(handle)
    again = RandLoRA(rank=8)(other, seed=4)
    again.load(handle.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(net(x), other(x))


@pytest.mark.filterwarnings("ignore")
def test_logits_are_pefts() -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = model().double(), model().double()
    handle = RandLoRA(rank=8, alpha=24)(ours)
    shake(handle)
    config = peft.RandLoraConfig(r=8, randlora_alpha=24, target_modules=["0", "1", "2"])
    wrapped = peft.get_peft_model(theirs, config).double()
    delta = handle.sites["0"].delta
    layers = wrapped.base_model.model
    theirs_a, theirs_b = layers[0].randlora_A["default"], layers[0].randlora_B["default"]
    delta.bases.A = theirs_a[:, 0].double().clone()  # (R, min)
    most, n_bases, rank = theirs_b.shape
    for i, site in enumerate(handle.sites.values()):
        n = site.delta.lam.shape[1]
        # PEFT pairs column k of its flat B with (rank k // n, base k % n) of A.
        flat = theirs_b[:, :n].reshape(most, n * rank)
        delta.bases.B = flat.view(most, rank, n).permute(2, 0, 1).double().clone()
        layers[i].randlora_lambda["default"].data = site.delta.lam.data
        layers[i].randlora_gamma["default"].data = site.delta.gam.data
        x = torch.randn(3, site.base.shape[1], dtype=torch.float64)
        torch.testing.assert_close(ours[i](x), layers[i](x), rtol=1e-5, atol=1e-7)
    assert n_bases == 10
