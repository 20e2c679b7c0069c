"""The optimizer engine: torch's own numbers where nothing is encoded, and the same codes whichever
way a parameter is cut into blocks."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest

torch = pytest.importorskip("torch")

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.engine import optimizer as engine  # noqa: E402
from memwise.train.engine.optimizer import OptimizerPolicy  # noqa: E402
from memwise.train.engine.rules import SGDM, AdamW, Lion, Rule  # noqa: E402

SHAPES = ((24, 32), (40,), (3, 8, 5), (1,), (1536,))
BYTES = {"exp_avg": "int8/group16", "exp_avg_sq": "linear8/rank1"}
NIBBLES = {"exp_avg": "dyn4/group16", "exp_avg_sq": "linear4/rank1"}


@dataclass(frozen=True)
class Stored(OptimizerPolicy):
    """States in given codecs; vectors, which have no columns to share, by groups alone."""

    names: Mapping[str, str] = field(default_factory=dict)

    def codecs(self, shape: Sequence[int]) -> Mapping[str, str]:
        if math.prod(shape) < 8:
            return {}
        return {
            state: name if len(shape) > 1 else name.replace("rank1", "group16")
            for state, name in self.names.items()
        }


@dataclass(frozen=True)
class StoredSGD(Stored):
    rule: ClassVar[Rule] = SGDM()


@dataclass(frozen=True)
class StoredLion(Stored):
    rule: ClassVar[Rule] = Lion()


def params(dtype: Any = torch.float32) -> list[Any]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=draws).to(dtype).requires_grad_() for s in SHAPES]


def run(optimizer: Any, given: list[Any], first: int, last: int) -> None:
    for t in range(first, last):
        draws = torch.Generator().manual_seed(t)
        for param in given:
            param.grad = torch.randn(param.shape, generator=draws).to(param.dtype)
        optimizer.step()


def bits(state: Mapping[Any, Mapping[str, Any]]) -> list[Any]:
    return [v for one in state.values() for v in one.values() if torch.is_tensor(v)]


@pytest.mark.parametrize(
    ("policy", "peer", "hyper"),
    [
        (
            Stored(),
            partial(torch.optim.AdamW, fused=True),
            {"weight_decay": 0.1, "betas": (0.9, 0.95)},
        ),
        (
            StoredSGD(),
            partial(torch.optim.SGD, foreach=False),
            {"weight_decay": 0.1, "momentum": 0.9},
        ),
    ],
)
def test_without_codecs_the_steps_are_torchs_own_to_the_bit(policy, peer, hyper) -> None:
    mine, theirs = params(), params()
    run(policy(mine, lr=0.01, **hyper), mine, 0, 20)
    run(peer(theirs, lr=0.01, **hyper), theirs, 0, 20)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_lion_is_the_plain_loop() -> None:
    mine = params(torch.float32)
    loop = [p.detach().double().clone() for p in mine]
    momentum = [torch.zeros_like(p) for p in loop]
    optimizer = StoredLion()(mine, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for t in range(10):
        run(optimizer, mine, t, t + 1)
        draws = torch.Generator().manual_seed(t)
        for w, m in zip(loop, momentum, strict=True):
            grad = torch.randn(w.shape, generator=draws).double()
            w.mul_(1 - 0.01 * 0.1).sub_(0.01 * torch.sign(0.9 * m + 0.1 * grad))
            m.mul_(0.99).add_(0.01 * grad)
    for a, b in zip(mine, loop, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("names", [BYTES, NIBBLES, {"exp_avg": "int8/row"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_change_no_bit(names, dtype, monkeypatch) -> None:
    whole, cut = params(dtype), params(dtype)
    first = Stored(names)(whole, lr=0.01)
    run(first, whole, 0, 8)
    monkeypatch.setattr(engine, "BLOCK", 1)
    second = Stored(names)(cut, lr=0.01)
    run(second, cut, 0, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    pairs = zip(bits(first.state), bits(second.state), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("names", [BYTES, NIBBLES])
def test_a_step_is_decode_rule_encode(names) -> None:
    """Against the plain way: every state of a parameter decoded, moved and encoded as a whole."""
    mine, loop = params(), params()
    policy = Stored(names)
    run(policy(mine, lr=0.01), mine, 0, 8)
    rule, hyper = AdamW(), {"lr": 0.01, **AdamW().defaults()}
    held: dict[tuple[int, str], Any] = {}
    for t in range(8):
        draws = torch.Generator().manual_seed(t)
        for i, param in enumerate(loop):
            shape = engine.plane(param.shape)
            grad = torch.randn(param.shape, generator=draws).view(shape)
            codecs = {n: engine._codec(c) for n, c in policy.codecs(param.shape).items()}
            states = {
                n: codecs[n].decode(held[i, n]) if n in codecs else held[i, n]
                for n in rule.states
                if (i, n) in held
            } or {n: torch.zeros(shape) for n in rule.states}
            weight = param.detach().view(shape)
            rule.apply(weight, grad, states, hyper, t + 1, torch.empty(shape))
            for n, state in states.items():
                held[i, n] = codecs[n].encode(state) if n in codecs else state
    assert all(torch.equal(a, b) for a, b in zip(mine, loop, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [BYTES, NIBBLES, {}, {"exp_avg": "int8/row/stochastic"}])
def test_a_resumed_run_is_the_uninterrupted_one(names, dtype) -> None:
    one, two = params(dtype), params(dtype)
    straight, before = Stored(names)(one, lr=0.01), Stored(names)(two, lr=0.01)
    run(straight, one, 0, 9)
    run(before, two, 0, 5)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = Stored(names)(two, lr=0.5)
    after.load_state_dict(torch.load(file, weights_only=True))
    for old, new in zip(bits(before.state), bits(after.state), strict=True):
        assert (old.dtype, old.untyped_storage().nbytes()) == (
            new.dtype,
            new.untyped_storage().nbytes(),
        )
        assert torch.equal(old, new)
    run(after, two, 5, 9)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_state_of_other_codecs_is_refused() -> None:
    given = params()
    saved = Stored(BYTES)(given)
    run(saved, given, 0, 1)
    with pytest.raises(InvalidKnob, match="was saved with 'exp_avg=int8/group16"):
        Stored(NIBBLES)(given).load_state_dict(saved.state_dict())


def test_four_bits_take_an_eighth_of_the_bytes() -> None:
    given = [torch.randn(256, 512, requires_grad=True)]
    names = {"exp_avg": "dyn4/group128", "exp_avg_sq": "linear4/rank1"}
    optimizer = Stored(names)(given)
    run(optimizer, given, 0, 1)
    held = sum(t.untyped_storage().nbytes() for t in bits(optimizer.state))
    assert held <= 0.135 * 2 * 4 * given[0].numel()


def test_groups_schedulers_clipping_and_closures_work_as_usual() -> None:
    given = params()
    groups = [{"params": given[:2], "lr": 0.1}, {"params": given[2:], "weight_decay": 0.0}]
    optimizer = Stored(BYTES)(groups, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    before = [p.detach().clone() for p in given]

    def closure() -> Any:
        optimizer.zero_grad()
        loss = sum((p.float() ** 2).sum() for p in given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(given, 1.0)
        return loss

    loss = optimizer.step(closure)
    schedule.step()
    assert loss.item() > 0
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005]
    assert all(not torch.equal(a, b) for a, b in zip(before, given, strict=True))


def test_a_parameter_that_is_not_contiguous_moves_like_its_copy() -> None:
    base = torch.randn(32, 24, generator=torch.Generator().manual_seed(3))
    turned, plain = base.clone().t().requires_grad_(), base.t().contiguous().requires_grad_()
    for param in (turned, plain):
        run(Stored(NIBBLES)([param], lr=0.01), [param], 0, 4)
    assert torch.equal(turned, plain)


def test_parameters_without_a_gradient_stay_and_have_no_state() -> None:
    given = params()
    optimizer = Stored(BYTES)(given)
    given[0].grad = torch.ones_like(given[0])
    before = given[1].detach().clone()
    optimizer.step()
    assert torch.equal(before, given[1])
    assert set(optimizer.state) == {given[0]}


@pytest.mark.parametrize(
    ("names", "hyper", "message"),
    [
        ({}, {"lr": -1.0}, "lr=-1.0"),
        ({}, {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({}, {"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({}, {"momentum": 0.9}, "knows no 'momentum'; known: lr, betas, eps, weight_decay"),
        ({"exp_avg": "int8/tensor"}, {}, "row by row"),
        ({"exp_avg": "int8/row/entropy"}, {}, "row by row"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(names, hyper, message) -> None:
    given = params()
    with pytest.raises(InvalidKnob, match=message):
        run(Stored(names)(given, **hyper), given, 0, 1)


def test_a_sparse_gradient_is_refused() -> None:
    table = torch.nn.Embedding(10, 8, sparse=True)
    optimizer = Stored(BYTES)(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InvalidKnob, match="dense"):
        optimizer.step()


def test_parameters_draw_for_themselves() -> None:
    given = [torch.zeros(16, 32, requires_grad=True) for _ in range(2)]
    for param in given:
        param.grad = torch.linspace(-1, 1, 512).view(16, 32)
    optimizer = Stored({"exp_avg": "int4/row/stochastic"})(given)
    optimizer.step()
    first, second = (optimizer.state[param]["exp_avg.codes"] for param in given)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_no_code_can_hold_moves_nothing(bad) -> None:
    given = params()
    optimizer = Stored(BYTES)(given)
    run(optimizer, given, 0, 1)
    before = [p.detach().clone() for p in given]
    for param in given:
        param.grad = torch.ones_like(param)
    given[2].grad[0, 0, 0] = bad
    with pytest.raises(InvalidKnob, match="NaN or infinite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
