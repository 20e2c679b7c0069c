"""The adapter engine: gradients of dense autograd, nothing dense kept, and a model as it was."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from memwise.errors import InvalidKnob, UnsupportedModel  # noqa: E402
from memwise.train import measure  # noqa: E402
from memwise.train.engine import adapted, bases  # noqa: E402
from memwise.train.engine.adapted import AdaptedLinear  # noqa: E402
from memwise.train.engine.adapters import AdapterPolicy, Site, pack  # noqa: E402
from memwise.train.engine.bases import Base  # noqa: E402
from memwise.train.engine.deltas import (  # noqa: E402
    Delta,
    LowRank,
    MaskedLowRank,
    RandomBases,
    RandomFullRank,
    Scales,
)
from memwise.train.engine.switching import AdapterBank, LayerSwitch  # noqa: E402


@dataclass(frozen=True)
class Low(AdapterPolicy):
    rank: int = 3

    def delta(self, site: Site) -> Delta:
        return LowRank(site.base.shape, self.rank, 6.0, site.draws, site.dtype)


@dataclass(frozen=True)
class PackedLow(Low):
    codec: str = "nf4/group16"

    def encode(self, name: str, weight: Any) -> Any:
        return pack(self.codec, weight)


@dataclass(frozen=True)
class Scaled(AdapterPolicy):
    codec: str = "uint4/group16"

    def encode(self, name: str, weight: Any) -> Any:
        return pack(self.codec, weight)

    def delta(self, site: Site) -> Delta:
        return Scales(site.base)


@dataclass(frozen=True)
class Masked(Low):
    def delta(self, site: Site) -> Delta:
        return MaskedLowRank(site.base.shape, self.rank, 6.0, site.draws, site.dtype)


@dataclass(frozen=True)
class Full(AdapterPolicy):
    def delta(self, site: Site) -> Delta:
        if not site.common:
            site.common["bases"] = RandomBases(list(site.shapes), 4, site.seed, site.dtype)
        return RandomFullRank(site.base.shape, site.common["bases"], 2.0)


ALL = (Low(), PackedLow(), Scaled(), Scaled("int3/row"), Masked(), Full())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Any) -> Any:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tiny(nn.Module):
    """Embedding, blocks, and a head that is the embedding."""

    def __init__(self, width: int = 16, n_blocks: int = 3, recompute: bool = False) -> None:
        super().__init__()
        self.tok = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(n_blocks))
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.tok.weight
        self.recompute = recompute

    def forward(self, ids: Any) -> Any:
        x = self.tok(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.recompute else block(x)
        return self.head(x)


def tiny(dtype: Any = torch.float32, **knobs: Any) -> Tiny:
    model = Tiny(**knobs)
    draws = torch.Generator().manual_seed(5)
    for param in model.parameters():
        param.data = torch.randn(param.shape, generator=draws) / math.sqrt(param.shape[-1])
    return model.to(dtype)


def ids() -> Any:
    return torch.arange(20).view(2, 10) % 11


def shake(handle: Any) -> None:
    """Trained numbers away from their start, by a part of their size."""
    draws = torch.Generator().manual_seed(9)
    for param in handle.parameters():
        noise = torch.randn(param.shape, generator=draws, dtype=torch.float64).to(param.dtype)
        size = 0.1 * param.detach().abs().mean() + 0.02
        param.data += noise * size


def linear(dtype: Any, n_out: int = 24, n_in: int = 32, bias: bool = True) -> Any:
    layer = nn.Linear(n_in, n_out, bias=bias)
    draws = torch.Generator().manual_seed(n_out)
    layer.weight.data = torch.randn((n_out, n_in), generator=draws) / 6
    layer.weight.data[:, ::3] = 0
    return layer.to(dtype)


def one(policy: AdapterPolicy, layer: Any) -> tuple[Any, Any]:
    model = nn.Sequential(layer)
    handle = policy(model)
    shake(handle)
    return model, handle


# --- products and gradients


@pytest.mark.parametrize("policy", ALL, ids=repr)
@pytest.mark.parametrize("shape", [(24, 32), (48, 16)])
@pytest.mark.parametrize("block", [1 << 17, 40])
def test_gradients_are_those_of_dense_autograd(policy, shape, block, monkeypatch) -> None:
    monkeypatch.setattr(bases, "BLOCK", block)
    model, handle = one(policy, linear(torch.float64, *shape))
    site = handle.sites["0"]
    delta, base = site.deltas["default"], site.base
    draws = torch.Generator().manual_seed(1)
    x = torch.randn((2, 5, shape[1]), generator=draws, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn((2, 5, shape[0]), generator=draws, dtype=torch.float64)

    got = torch.autograd.grad((model(x) * wanted).sum(), [x, *handle.parameters()])
    frozen = torch.cat([w.clone() for _, w in base.blocks(torch.float64)])
    change = delta.weight(base).double()
    if isinstance(delta, MaskedLowRank):  # its mask is dropped for the adapters, kept for x
        free = delta.B @ delta.A * delta.scale
        change = free + (change - free).detach()
    dense = x @ (frozen + change).T + base.bias
    torch.testing.assert_close(model(x), dense, rtol=1e-6, atol=1e-6)
    oracle = torch.autograd.grad((dense * wanted).sum(), [x, *handle.parameters()])
    for mine, theirs in zip(got, oracle, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_no_matrix_of_the_weights_size_is_kept_for_backward(policy) -> None:
    layer = linear(torch.float32, 192, 256, bias=False)
    model, _ = one(policy, layer)
    x = torch.randn(4, 256, requires_grad=True)
    found = measure.saved(model, lambda: model(x).sum())
    assert found.held_bytes <= x.numel() * 4  # the input alone
    kept = measure.peak(lambda: model(x)).kept_bytes
    assert kept < 192 * 256 * 4 // 2


def test_a_packed_weight_leaves_no_dense_one_behind() -> None:
    model = nn.Sequential(linear(torch.float32, 192, 256))
    before = measure.bytes_of(model)
    Scaled("uint4/group64")(model)
    assert measure.bytes_of(model) < before / 4


@pytest.mark.parametrize("policy", [Low(), PackedLow(), Scaled(), Masked(), Full()], ids=repr)
def test_a_bfloat16_model_trains_float32_numbers(policy) -> None:
    model = tiny(torch.bfloat16)
    handle = policy(model)
    loss = model(ids()).float().logsumexp(-1).sum()
    loss.backward()
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in handle.parameters())
    held = measure.saved(model, lambda: model(ids()).sum()).by_op()
    assert all("weight" not in name for name in held)


def test_a_linear_map_of_transformers_is_taken_with_its_weight_transposed() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(24, 16)).double()
    nn.init.normal_(model[0].bias)
    x = torch.randn(3, 16, dtype=torch.float64)
    before = model(x)
    handle = Low()(model)
    torch.testing.assert_close(model(x), before)
    shake(handle)
    adapted_output = model(x)
    assert handle.merge()
    torch.testing.assert_close(model(x), adapted_output)
    handle.remove()
    torch.testing.assert_close(model(x), adapted_output)
    assert type(model[0]) is Conv1D


# --- what is adapted


@pytest.mark.parametrize("policy", [Low(), Masked(), Full()], ids=repr)
def test_a_fresh_adapter_changes_no_bit_of_a_dense_model(policy) -> None:
    model = tiny()
    before = model(ids())
    handle = policy(model)
    if isinstance(policy, Masked):  # multiplies by itself, in blocks
        torch.testing.assert_close(model(ids()), before)
    else:
        assert torch.equal(model(ids()), before)
    shake(handle)
    assert not torch.allclose(model(ids()), before)
    handle.set_active(None)
    assert torch.equal(model(ids()), before)


def test_removing_puts_the_very_same_modules_back() -> None:
    model = tiny()
    model.tok.weight.requires_grad_(False)
    modules = dict(model.named_modules())
    before, flags = model(ids()), [p.requires_grad for p in model.parameters()]
    keys = list(model.state_dict())
    handle = Low()(model)
    assert set(keys) <= set(model.state_dict())
    shake(handle)
    handle.remove()
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(ids()), before)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_by_default_the_maps_of_the_blocks_are_adapted_and_a_tied_head_never() -> None:
    model = tiny()
    handle = Low()(model)
    assert sorted(handle.sites) == sorted(
        f"blocks.{i}.{n}" for i in range(3) for n in ("up", "down")
    )
    assert isinstance(model.head, nn.Linear)
    handle.remove()
    with pytest.raises(InvalidKnob, match="embedding"):
        Low()(model, target="head")
    with pytest.raises(InvalidKnob, match="no linear map"):
        Low()(model, target="q_proj")
    model.head = nn.Linear(16, 11)
    assert "head" in Low()(model, target=lambda name, module: True).sites


def test_only_deltas_are_trained() -> None:
    model = tiny()
    handle = Low()(model)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in handle.parameters()}


def test_a_module_that_is_used_twice_is_wrapped_once() -> None:
    model = tiny()
    model.blocks[1] = model.blocks[0]
    handle = Low()(model)
    assert model.blocks[1].up is model.blocks[0].up
    assert isinstance(model.blocks[1].up, AdaptedLinear)
    assert len(handle.sites) == 4
    shake(handle)
    y = model(ids())
    assert handle.merge()
    torch.testing.assert_close(model(ids()), y)


def test_a_weight_of_two_maps_is_packed_once_and_not_merged_into() -> None:
    model = tiny()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    dense = Low()(model)
    assert "another module" in str(dense.report())
    before = model.blocks[0].up.weight.clone()
    shake(dense)
    assert not dense.merge()
    assert torch.equal(model.blocks[0].up.weight, before)
    dense.remove()
    Scaled()(model)
    assert model.blocks[0].up.weight_codes is model.blocks[1].up.weight_codes


def test_names_are_not_taken_twice() -> None:
    model = tiny()
    Low()(model)
    with pytest.raises(InvalidKnob, match="choose other names"):
        Low(5)(model)
    second = Low(5)(model, names=("other",))
    assert list(model.blocks[0].up.deltas) == ["default", "other"]
    assert model.blocks[0].up.active == "other"
    second.remove()
    assert list(model.blocks[0].up.deltas) == ["default"]


# --- merging, saving


@pytest.mark.parametrize("policy", [Low(), Full(), Masked()], ids=repr)
def test_merging_into_dense_weights_keeps_the_outputs(policy) -> None:
    model = tiny(torch.float64)
    model.blocks[0].up.weight.data[::2] = 0
    handle = policy(model)
    shake(handle)
    y = model(ids())
    assert handle.merge()
    torch.testing.assert_close(model(ids()), y)
    handle.remove()
    torch.testing.assert_close(model(ids()), y)
    if isinstance(policy, Masked):
        assert (model.blocks[0].up.weight[::2] == 0).all()


def test_nothing_is_merged_into_packed_codes() -> None:
    model = tiny()
    handle = PackedLow()(model)
    shake(handle)
    y = model(ids())
    assert not handle.merge()
    assert torch.equal(model(ids()), y)
    assert "lose the delta" in str(handle.report())


@pytest.mark.parametrize("codec", ["uint4/group16", "int3/row", "nf4/group16", "uint2/group8"])
def test_trained_scales_are_merged_and_codes_stay(codec) -> None:
    model = tiny()
    handle = Scaled(codec)(model)
    shake(handle)
    codes = {n: b.clone() for n, b in model.named_buffers() if n.endswith("codes")}
    y = model(ids())
    assert handle.merge()
    torch.testing.assert_close(model(ids()), y, rtol=1e-4, atol=1e-5)
    now = dict(model.named_buffers())
    assert all(torch.equal(now[name], code) for name, code in codes.items())


@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_saved_deltas_come_back_bit_for_bit(policy) -> None:
    model, other = tiny(), tiny()
    handle = policy(model, seed=3)
    shake(handle)
    file = io.BytesIO()
    torch.save(handle.state_dict(), file)
    file.seek(0)
    again = policy(other, seed=3)
    again.load(torch.load(file, weights_only=True))
    assert torch.equal(model(ids()), other(ids()))
    with pytest.raises(InvalidKnob, match="do not fit"):
        Low(7)(tiny()).load(handle.state_dict())


def test_a_saved_adapted_model_loads_whole() -> None:
    model, other = tiny(), tiny()
    shake(Scaled()(model))
    Scaled()(other)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(model(ids()), other(ids()))


def test_codes_and_scales_keep_their_types_when_the_model_is_cast() -> None:
    model = tiny()
    handle = PackedLow()(model)
    kinds = {n: b.dtype for n, b in model.named_buffers()}
    codes = {n: b.clone() for n, b in model.named_buffers()}
    model.to(torch.bfloat16)
    assert {n: b.dtype for n, b in model.named_buffers()} == kinds
    assert all(torch.equal(b, codes[n]) for n, b in model.named_buffers())
    assert {p.dtype for p in handle.parameters()} == {torch.bfloat16}


def test_the_report_counts_storages() -> None:
    model = tiny()
    n_params = sum(p.numel() for p in model.parameters())
    handle = PackedLow()(model)
    report = handle.report()
    assert report.trained == sum(p.numel() for p in handle.parameters())
    assert report.total == n_params + report.trained
    assert report.bytes["deltas"] == 4 * report.trained
    assert report.bytes["packed"] == sum(b.nbytes for _, b in model.named_buffers())
    assert "numbers trained" in str(report)


# --- layers, banks, recomputation


def test_freezing_drops_states_and_stops_the_layer() -> None:
    model = tiny()
    handle = Low()(model)
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.1)
    switch = LayerSwitch(handle, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(ids()).logsumexp(-1).sum().backward()
        optimizer.step()

    step()
    step()
    switch.select([2])
    held = {id(p) for p in optimizer.state}
    assert held == {id(p) for p in handle.of_layer(2)}
    before = [p.detach().clone() for p in handle.of_layer(0)]
    moving = [p.detach().clone() for p in handle.of_layer(2)]
    step()
    assert all(map(torch.equal, before, handle.of_layer(0)))
    assert not all(map(torch.equal, moving, handle.of_layer(2)))
    switch.select([0, 1, 2])
    step()
    assert not all(map(torch.equal, before, handle.of_layer(0)))
    with pytest.raises(InvalidKnob, match="layer 7"):
        handle.freeze_layers({7})


def test_below_the_lowest_trained_layer_nothing_is_saved() -> None:
    model = tiny()
    handle = Low()(model)
    handle.freeze_layers({0, 1})
    found = measure.saved(model, lambda: model(ids()))
    assert {site.module.split(".")[1] for site in found.sites if "blocks" in site.module} == {"2"}


def test_a_damped_layer_adds_a_part_of_its_delta() -> None:
    model = nn.Sequential(nn.ModuleList([linear(torch.float64)])[0])
    handle = Low()(model)
    shake(handle)
    x = torch.randn(3, 32, dtype=torch.float64)
    whole = model(x)
    handle.set_active(None)
    alone = model(x)
    handle.set_active("default")
    model[0].gain = 0.25
    torch.testing.assert_close(model(x), alone + 0.25 * (whole - alone))


def test_a_bank_picks_the_set_that_owns_the_number() -> None:
    model = tiny()
    handle = Low()(model, names=("early", "late"))
    bank = AdapterBank(handle, [10])
    for key, name in ((0, "early"), (9.9, "early"), (10, "late"), (99, "late")):
        bank.at(key)
        assert {m.active for m in handle.sites.values()} == {name}
    model(ids()).sum().backward()
    assert all(p.grad is None for p in handle.parameters("early"))
    assert all(p.grad is not None for p in handle.parameters("late"))
    with pytest.raises(InvalidKnob, match="edges"):
        AdapterBank(handle, [3, 2])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_recomputed_blocks_behind_a_frozen_embedding_get_gradients() -> None:
    model, plain = tiny(recompute=True), tiny()
    handle, peer = Low()(model), Low()(plain)
    shake(handle)
    shake(peer)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(ids()).sum().backward()
    handle.require_input_grads()
    model(ids()).sum().backward()
    plain(ids()).sum().backward()
    for mine, theirs in zip(handle.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_blocks_are_the_largest_stack() -> None:
    model = tiny()
    model.extra = nn.ModuleList([nn.Linear(2, 2)])
    assert adapted.blocks(model)[0] == "blocks"
    with pytest.raises(UnsupportedModel, match="ModuleList"):
        adapted.blocks(nn.Linear(2, 2))


def test_scales_refuse_what_has_none_of_their_own() -> None:
    base = Base(torch.zeros(4, 6), None, None)
    with pytest.raises(InvalidKnob, match="dense"):
        Scales(base)
    crossed = Base(None, pack("uint4/group4", torch.randn(4, 6)), None)
    with pytest.raises(InvalidKnob, match="cross the rows"):
        Scales(crossed)


def test_what_a_policy_refuses_leaves_the_model_untouched() -> None:
    model = tiny()
    model.blocks[-1].add_module("odd", nn.Linear(33, 8))
    with pytest.raises(InvalidKnob):
        Scaled()(model)
    assert not any(isinstance(m, AdaptedLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
