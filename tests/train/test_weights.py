"""Stored weights: the dense map's numbers, steps of decode, move, encode, and no float copy."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.codec.spec import parse  # noqa: E402
from memwise.codec.th import Codec  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.engine import optimizer as engine  # noqa: E402
from memwise.train.engine.optimizer import OptimizerPolicy  # noqa: E402
from memwise.train.engine.rules import SGDM, Rule  # noqa: E402
from memwise.train.engine.subspace import Refitted, fits  # noqa: E402
from memwise.train.engine.weights import StoredWeight, store_weights  # noqa: E402
from memwise.train.measure import bytes_of  # noqa: E402

NAMES = ("uint8/group16/stochastic", "int8/row", "bf16/stochastic", "nf4/group16")


@dataclass(frozen=True)
class Plain(OptimizerPolicy):
    """AdamW in float32."""


@dataclass(frozen=True)
class PlainSGD(OptimizerPolicy):
    """SGD with momentum in float32."""

    rule: ClassVar[Rule] = SGDM()


@dataclass(frozen=True)
class Projected(OptimizerPolicy):
    """AdamW in a subspace of rank 3."""

    def subspace(self, shape: Sequence[int]) -> Refitted | None:
        return Refitted(3, 0.5, gap=2) if fits(shape, 3) else None


def seeded(seed: int) -> Any:
    return torch.Generator().manual_seed(seed)


def model(dtype: Any = torch.float32) -> Any:
    made = nn.Sequential(nn.Linear(20, 12), nn.GELU(), nn.Linear(12, 20, bias=False))
    for i, param in enumerate(made.parameters()):
        param.data = torch.randn(param.shape, generator=seeded(i)) * 0.3
    return made.to(dtype)


def train(net: Any, optimizer: Any, first: int, last: int) -> None:
    for t in range(first, last):
        x = torch.randn(6, 20, generator=seeded(1000 + t)).to(net[0].bias.dtype)
        (net(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_map_is_the_dense_map_of_its_decoded_weight(name: str) -> None:
    stored, dense = model(torch.float64), model(torch.float64)
    made = store_weights(stored, name)
    for key, module in made.items():
        dense.get_submodule(key).weight.data = module.weight.dense()
    x = torch.randn(2, 3, 20, dtype=torch.float64, generator=seeded(5), requires_grad=True)
    z = x.detach().clone().requires_grad_()
    for net, given in ((stored, x), (dense, z)):
        net(given).square().sum().backward()
    torch.testing.assert_close(stored(x), dense(x))
    torch.testing.assert_close(x.grad, z.grad)
    mine, theirs = (dict(net.named_parameters()) for net in (stored, dense))
    assert mine.keys() == theirs.keys()
    for key, param in mine.items():
        torch.testing.assert_close(param.grad, theirs[key].grad)


@pytest.mark.parametrize(
    "policy", [Plain(), PlainSGD(), Projected()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("name", ["uint8/group16", "int8/row", "fp32", "bf16"])
def test_a_step_is_decode_move_encode(policy: Any, name: str) -> None:
    net, loop = model(), model()
    made = store_weights(net, name)
    with torch.no_grad():
        for key, module in made.items():
            loop.get_submodule(key).weight.copy_(module.weight.dense())
    named = dict(loop.named_parameters())
    # Stored maps list the bias first; a parameter's draws follow its place in the list.
    mine = policy(net.parameters(), lr=0.02)
    plain = policy([named[key] for key, _ in net.named_parameters()], lr=0.02)
    coder = Codec(parse(name))
    for t in range(6):
        train(net, mine, t, t + 1)
        train(loop, plain, t, t + 1)
        for key in made:
            weight = loop.get_submodule(key).weight
            weight.data = coder.fake(weight.data)
    for key, module in made.items():
        torch.testing.assert_close(
            module.weight.dense(), loop.get_submodule(key).weight, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("policy", [Plain(), Projected()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["uint8/group16/stochastic", "int8/row/stochastic", "nf4/row"])
def test_a_resumed_run_is_the_uninterrupted_one(policy: Any, name: str) -> None:
    one, two = model(), model()
    store_weights(one, name)
    store_weights(two, name)
    straight, before = policy(one.parameters(), lr=0.01), policy(two.parameters(), lr=0.01)
    train(one, straight, 0, 9)
    train(two, before, 0, 5)
    file = io.BytesIO()
    torch.save([two.state_dict(), before.state_dict()], file)
    file.seek(0)
    codes, states = torch.load(file, weights_only=True)
    three = model()
    store_weights(three, name)
    after = policy(three.parameters(), lr=0.5)
    three.load_state_dict(codes)
    after.load_state_dict(states)
    train(three, after, 5, 9)
    left, right = one.state_dict(), three.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert all(left[key].dtype == right[key].dtype for key in left)


def test_blocks_change_nothing_but_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = model(), model()
    for net, size in ((whole, engine.BLOCK), (cut, 1)):
        monkeypatch.setattr(engine, "BLOCK", size)
        store_weights(net, "uint8/group16")
        train(net, Plain()(net.parameters(), lr=0.01), 0, 5)
    left, right = whole.state_dict(), cut.state_dict()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_stochastic_rounding_moves_by_less_than_a_level_and_nearest_does_not() -> None:
    signs = torch.randn(64, 64, generator=seeded(2)).sign()
    moved = {}
    for name in ("uint8/group64", "uint8/group64/stochastic"):
        net = nn.Linear(64, 64, bias=False)
        net.weight.data = torch.randn(64, 64, generator=seeded(1))
        weight = store_weights(net_in := nn.Sequential(net), name)["0"].weight
        before = weight.dense()
        optimizer = Plain()(net_in.parameters(), lr=5e-4, weight_decay=0.0)  # 1/40 of a level
        for _ in range(40):
            weight.grad = signs.clone()
            optimizer.step()
        moved[name] = float(((before - weight.dense()) * signs).mean())
    assert moved["uint8/group64/stochastic"] == pytest.approx(0.02, rel=0.1)
    assert moved["uint8/group64"] < 0.005


def large_floats(n_bytes: int) -> dict[int, Any]:
    """All tensors of the process whose floats take so many bytes."""
    gc.collect()
    return {
        id(t): t
        for t in gc.get_objects()
        if type(t) is torch.Tensor
        and t.is_floating_point()
        and t.untyped_storage().nbytes() >= n_bytes
    }


def test_no_float_copy_of_a_weight_is_kept() -> None:
    net = nn.Sequential(nn.Linear(256, 256, bias=False))
    n_bytes = bytes_of(net)
    others = large_floats(n_bytes)  # of other tests
    store_weights(net, "uint8/group256/stochastic")
    assert bytes_of(net) < 0.27 * n_bytes
    optimizer = Projected()(net.parameters(), lr=0.01)
    net(torch.randn(4, 256, generator=seeded(0))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert not large_floats(n_bytes).keys() - others.keys()
    assert bytes_of(net) < 0.27 * n_bytes
    assert bool(net[0].weight.isnan().all())  # who reads the placeholder notices


def test_copies_and_pickles_have_codes_of_their_own() -> None:
    net = model()
    store_weights(net, "uint8/group16")
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        before = net[0].weight.dense()
        train(twin, Plain()(twin.parameters(), lr=0.1), 0, 1)
        assert isinstance(twin[0].weight, StoredWeight)
        assert torch.equal(net[0].weight.dense(), before)
        assert not torch.equal(twin[0].weight.dense(), before)
        assert bytes_of(twin[0]) == bytes_of(net[0])


def test_another_type_keeps_the_codes() -> None:
    net = model()
    store_weights(net, "uint8/group16")
    params, codes = list(net.parameters()), net[0].weight.packed.arrays["codes"].clone()
    net.to(torch.bfloat16)
    assert all(a is b for a, b in zip(params, net.parameters(), strict=True))
    assert torch.equal(net[0].weight.packed.arrays["codes"], codes)
    assert net[0].weight.dense().dtype == torch.bfloat16
    train(net, Plain()(net.parameters(), lr=0.1), 0, 2)
    assert net[0].weight.grad is None
    assert bytes_of(net[0].weight) < 12 * 20 * 2


def test_maps_that_share_a_weight_still_do() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[1].weight = net[0].weight
    store_weights(net, "uint8/group16")
    assert net[0].weight is net[1].weight
    net(torch.ones(1, 8)).sum().backward()
    Plain()(net.parameters()).step()


def test_a_step_in_the_backward_pass_moves_alike() -> None:
    one, two = model(), model()
    for net in (one, two):
        store_weights(net, "uint8/group16/stochastic")
    straight, inside = (
        Projected()(one.parameters(), lr=0.01),
        Projected()(two.parameters(), lr=0.01),
    )
    train(one, straight, 0, 3)
    with inside.step_in_backward():
        train(two, inside, 0, 3)
    left, right = one.state_dict(), two.state_dict()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_what_cannot_be_stored_is_refused_and_the_model_is_whole() -> None:
    for name, message in (("uint8/tensor", "row by row"), ("int8/rank1", "share factors")):
        net = model()
        with pytest.raises(InvalidKnob, match=message):
            store_weights(net, name)
        assert type(net[0]) is nn.Linear
    with pytest.raises(InvalidKnob, match="nothing matches"):
        store_weights(model(), "int8/row", target="attention")
    net = model()
    store_weights(net, "int8/row")
    with pytest.raises(InvalidKnob, match="nothing matches"):
        store_weights(net, "int8/row")


def test_codes_of_another_codec_are_refused() -> None:
    net, other = model(), model()
    store_weights(net, "int8/row")
    store_weights(other, "dyn8/row")
    with pytest.raises(RuntimeError, match="dyn8/row"):
        net.load_state_dict(other.state_dict())


def test_a_gradient_that_no_code_can_hold_moves_nothing() -> None:
    net = model()
    store_weights(net, "uint8/group16")
    before = net[0].weight.dense()
    for param in net.parameters():
        param.grad = torch.full(param.shape, torch.nan)
    with pytest.raises(InvalidKnob, match="NaN or infinite"):
        Plain()(net.parameters()).step()
    assert torch.equal(net[0].weight.dense(), before)
