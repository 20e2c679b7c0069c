"""Private training: the clipped sum of a plain loop, noise that arrives late and is the same."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from memwise.errors import InvalidKnob, MemwiseError, UnsupportedModel  # noqa: E402
from memwise.train.engine import ledger  # noqa: E402
from memwise.train.engine.ledger import Aggregated, EachStep, Noise, RowLedger, normal  # noqa: E402
from memwise.train.engine.private import PrivatePolicy, epsilon  # noqa: E402
from memwise.train.measure import bytes_of, peak  # noqa: E402
from memwise.train.policies.dpsgd import DPSGD  # noqa: E402
from memwise.train.policies.lazydp import LazyDP  # noqa: E402

N, D = 40, 6


@dataclass(frozen=True)
class Unmerged(LazyDP):
    """The draws that each step would have made."""

    def deferred(self) -> Noise:
        return EachStep()


@dataclass(frozen=True)
class Ones(EachStep):
    """Noise of one, so that a forgotten or doubled step shows in the sum."""

    def draw(self, key: int, rows: Any, t: int, d: int) -> Any:
        return torch.ones(len(rows), d)


@dataclass(frozen=True)
class Counted(LazyDP):
    def deferred(self) -> Noise:
        return Ones()


class Model(torch.nn.Module):
    """Two tables, one of them read twice, a map over positions, and one used twice."""

    def __init__(self, n: int = N, dtype: Any = torch.float64) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(1)
        self.words, self.places = torch.nn.Embedding(n, D), torch.nn.Embedding(9, D)
        self.mix, self.out = torch.nn.Linear(D, D), torch.nn.Linear(D, 1, bias=False)
        self.to(dtype)
        for param in self.parameters():
            param.data.copy_(torch.randn(param.shape, generator=draws))

    def forward(self, ids: Any) -> Any:
        """One loss an example of ids (B, T)."""
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]).expand_as(ids))
        x = torch.tanh(self.mix(torch.tanh(self.mix(x))))
        more = self.words(ids[:, :1]).squeeze(1)
        return (self.out(x.mean(1) * more).squeeze(1) - 1).square()


def batch(t: int, n: int = N) -> Any:
    """Few rows, some twice in an example; and not all of them ever."""
    draws = torch.Generator().manual_seed(t)
    return torch.randint(0, n // 2, (5, 4), generator=draws)


def train(optimizer: Any, model: Any, first: int, last: int, each: Any = lambda: None) -> None:
    for t in range(first, last):
        optimizer.backward(model(batch(t)))
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)  # a schedule
        optimizer.step()
        each()


def made(policy: Any, **model: Any) -> tuple[Any, Any]:
    net = Model(**model)
    return net, policy(net, lr=0.1, batch_size=5, seed=7)


def weights(model: Any) -> list[Any]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: Any, two: Any) -> bool:
    return all(map(torch.equal, weights(one), weights(two)))


# --- the clipped sum


def clipped_sum(model: Any, ids: Any, most: float) -> list[Any]:
    """One example after another, by plain autograd."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for one in ids:
        grads = torch.autograd.grad(model(one[None]).sum(), list(model.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        for t, g in zip(total, grads, strict=True):
            t += g * min(1.0, most / (norm + 1e-6))
    return total


@pytest.mark.parametrize("most", [1e9, 1.0, 0.05])
@pytest.mark.parametrize("policy", [DPSGD, LazyDP])
def test_a_step_moves_by_the_clipped_gradients_of_a_plain_loop(policy: Any, most: float) -> None:
    model, optimizer = made(policy(noise_multiplier=0.0, max_norm=most))
    plain = Model()
    for t in range(3):
        optimizer.backward(model(batch(t)))
        optimizer.step()
        for param, grad in zip(plain.parameters(), clipped_sum(plain, batch(t), most), strict=True):
            param.data -= 0.1 / 5 * grad
    for a, b in zip(weights(model), weights(plain), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_several_small_batches_are_one_large_batch() -> None:
    (one, whole), (two, parts) = (made(DPSGD(noise_multiplier=0.0)) for _ in range(2))
    whole.backward(one(batch(0)))
    for part in batch(0).split([2, 3]):
        parts.backward(two(part))
    whole.step()
    parts.step()
    for a, b in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_parameters_stay_and_count_in_no_norm() -> None:
    model = Model()
    for frozen in (model.places.weight, model.mix.weight, model.out.weight):
        frozen.requires_grad_(False)
    before = weights(model)
    optimizer = LazyDP(noise_multiplier=0.0, max_norm=0.01)(model, lr=1.0, batch_size=1)
    optimizer.backward(model(batch(0)[:1]))
    optimizer.step()
    moved = [float((a - b).norm()) for a, b in zip(weights(model), before, strict=True)]
    assert math.hypot(*moved) == pytest.approx(0.01, rel=1e-3)
    assert sum(m > 0 for m in moved) == 2


# --- noise that comes late


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_late_draws_give_the_table_of_draws_at_once_to_the_bit(dtype: Any) -> None:
    late, lazy = made(Unmerged(), dtype=dtype)
    soon, eager = made(Unmerged(), dtype=dtype)
    train(lazy, late, 0, 12)
    train(eager, soon, 0, 12, each=eager.flush)
    assert not torch.equal(late.words.weight, soon.words.weight)
    lazy.flush()
    assert same(late, soon)


def test_rows_read_in_every_step_see_the_same_noise_merged_or_not() -> None:
    (one, merged), (two, apart) = made(LazyDP()), made(Unmerged())
    train(merged, one, 0, 6, each=merged.flush)
    train(apart, two, 0, 6, each=apart.flush)
    assert same(one, two)


def test_noise_of_one_arrives_once_a_step_and_row() -> None:
    """Against a dense loop without any ledger."""
    model, optimizer = made(Counted(noise_multiplier=0.5, max_norm=2.0))
    for layer in (model.mix, model.out):
        layer.requires_grad_(False)
    optimizer = Counted(noise_multiplier=0.5, max_norm=2.0)(model, lr=0.1, batch_size=5)
    plain = Model()
    for t in range(10):
        rate = 0.1 / (1 + t)
        optimizer.backward(model(batch(t)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        tables = [plain.words.weight, plain.places.weight]
        total = [torch.zeros_like(p) for p in tables]
        for one in batch(t):
            grads = torch.autograd.grad(plain(one[None]).sum(), tables)
            norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
            for s, g in zip(total, grads, strict=True):
                s += g * min(1.0, 2.0 / (norm + 1e-6))
        for table, s in zip(tables, total, strict=True):
            table.data -= rate / 5 * (s + 0.5 * 2.0)
    optimizer.flush()
    for a, b in zip(weights(model), weights(plain), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_row_has_all_its_noise_when_it_is_read_and_others_wait() -> None:
    model, optimizer = made(LazyDP())
    train(optimizer, model, 0, 5)
    kept = optimizer.state[model.words.weight]
    before = model.words.weight.detach().clone()
    ids = torch.tensor([[3, 3, 39]])
    model.words(ids)
    assert [int(kept["paid"][row]) for row in (3, 39)] == [5, 5]
    moved = (model.words.weight.detach() != before).any(1)
    assert moved.nonzero().flatten().tolist() == [3, 39]
    model.words(ids)
    assert torch.equal((model.words.weight.detach() != before).any(1), moved)


def test_merged_noise_has_the_variance_of_all_steps_under_a_schedule() -> None:
    n, d = 20_000, 8
    rates = [0.1, 0.4, 0.2, 0.3]
    table = torch.zeros(n, d)
    book = RowLedger(table, {}, Aggregated(), 11)
    book.open()
    for rate in rates:
        book.owe(rate)
        book.pay(torch.arange(100))
    late = table[100:]
    assert not late.any()
    book.flush()
    expected = math.sqrt(sum(rate**2 for rate in rates))
    assert float(late.std()) == pytest.approx(expected, rel=0.01)
    assert float(late.mean()) == pytest.approx(0.0, abs=0.01 * expected)
    assert book.n_due() == 0


def test_noise_is_normal_and_follows_from_row_and_step_alone() -> None:
    stats = pytest.importorskip("scipy.stats")
    noise = normal(3, torch.arange(4000), 5, 33)
    assert stats.kstest(noise.flatten().double().numpy(), "norm").pvalue > 0.01
    rows = torch.tensor([17, 3999, 0])
    assert torch.equal(normal(3, rows, 5, 33), noise[rows])
    others = [normal(4, torch.arange(4000), 5, 33), normal(3, torch.arange(4000), 6, 33)]
    columns = torch.stack([noise[:, 0], noise[:, 1], noise[:, 17], *(o[:, 0] for o in others)])
    assert float((torch.corrcoef(columns) - torch.eye(5)).abs().max()) < 0.06


def test_a_ledger_grows_with_the_steps(monkeypatch: Any) -> None:
    monkeypatch.setattr(ledger, "_FIRST_STEPS", 2)
    small, few = made(Unmerged())
    train(few, small, 0, 9)
    monkeypatch.undo()
    large, many = made(Unmerged())
    train(many, large, 0, 9)
    few.flush()
    many.flush()
    assert same(small, large)


# --- what is saved


def test_a_saved_model_owes_nothing() -> None:
    model, optimizer = made(LazyDP())
    train(optimizer, model, 0, 5)
    before = model.words.weight.detach().clone()
    saved = model.state_dict()
    assert bool((saved["words.weight"] != before)[N // 2 :].all())  # rows that were never read
    assert torch.equal(saved["words.weight"], model.words.weight)


@pytest.mark.parametrize("policy", [LazyDP(), Unmerged(), DPSGD()])
@pytest.mark.parametrize("model_first", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one(policy: Any, model_first: bool) -> None:
    one, straight = made(policy, dtype=torch.float32)
    train(straight, one, 0, 5)
    parts = [one.state_dict, straight.state_dict]
    file = io.BytesIO()
    torch.save([part() for part in (parts if model_first else parts[::-1])], file)
    train(straight, one, 5, 9)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    weights_of, state = loaded if model_first else loaded[::-1]
    two = Model(dtype=torch.float32)
    after = policy(two, lr=0.5, batch_size=5, seed=1)
    two.load_state_dict(weights_of)
    after.load_state_dict(state)
    for kept in after.state.values():
        assert (kept["paid"].dtype, kept["variance"].dtype) == (torch.int32, torch.float64)
    train(after, two, 5, 9)
    straight.flush()
    after.flush()
    assert same(one, two)
    assert "secret" in state["private"]["warning"]
    assert after.epsilon(1e-5, 1000) == straight.epsilon(1e-5, 1000) > 0


def test_saving_changes_no_draw_where_none_are_merged() -> None:
    (one, saved), (two, straight) = made(Unmerged()), made(Unmerged())
    train(saved, one, 0, 4)
    one.state_dict()
    train(saved, one, 4, 8)
    train(straight, two, 0, 8)
    saved.flush()
    straight.flush()
    assert same(one, two)


def test_the_state_of_another_kind_is_refused() -> None:
    (_, lazy), (_, eager) = made(LazyDP()), made(DPSGD())
    with pytest.raises(InvalidKnob, match="LazyDP cannot go on"):
        lazy.load_state_dict(eager.state_dict())


def test_a_closed_model_is_as_any_other_and_a_copy_before_is_refused() -> None:
    model, optimizer = made(LazyDP())
    train(optimizer, model, 0, 3)
    with pytest.raises(MemwiseError, match="copy"):
        copy.deepcopy(model)(batch(0))
    optimizer.close()
    assert torch.equal(copy.deepcopy(model)(batch(0)), model(batch(0)))
    assert all(not module._forward_pre_hooks for module in model.modules())


# --- bytes, and what cannot be


def test_a_step_takes_the_bytes_of_its_batch_and_a_ledger_four_a_row() -> None:
    n = 100_000
    model, optimizer = made(LazyDP(), n=n, dtype=torch.float32)

    def step() -> None:
        optimizer.backward(model(batch(0)))
        optimizer.step()

    step()
    assert peak(step).peak_bytes < n * D * 4 / 50
    assert bytes_of(optimizer.state) == 4 * (n + 9) + 2 * 8 * 1024


def test_an_empty_batch_still_makes_its_noise() -> None:
    model, optimizer = made(DPSGD())
    before = weights(model)
    optimizer.backward(torch.zeros(0))
    optimizer.step()
    assert all(bool((a != b).all()) for a, b in zip(weights(model), before, strict=True))


def test_epsilon_is_that_of_opacus() -> None:
    """Of opacus 1.6.0's analysis.rdp on the same orders."""
    assert epsilon(1.0, 0.01, 1000, 1e-5) == pytest.approx(2.107753075451561, rel=1e-9)
    assert epsilon(0.6, 0.001, 10000, 1e-6) == pytest.approx(4.269520018447939, rel=1e-9)
    assert epsilon(2.0, 1.0, 10, 1e-5) == pytest.approx(8.087861628831664, rel=1e-9)
    assert epsilon(1.0, 0.01, 0, 1e-5) == 0.0
    assert epsilon(0.0, 0.01, 1, 1e-5) == math.inf


def test_a_plain_backward_is_refused_before_anything_moves() -> None:
    model, optimizer = made(LazyDP())
    before = weights(model)
    model(batch(0)).sum().backward()
    with pytest.raises(InvalidKnob, match=r"optimizer\.backward"):
        optimizer.step()
    assert all(map(torch.equal, weights(model), before))


def test_an_example_that_is_not_finite_is_refused_and_not_taken_in() -> None:
    model, optimizer = made(LazyDP(noise_multiplier=0.0))
    before = weights(model)
    with pytest.raises(InvalidKnob, match="NaN or infinite"):
        optimizer.backward(model(batch(0)) * math.nan)
    optimizer.step()
    assert all(map(torch.equal, weights(model), before))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)), "1 is a LayerNorm"),
        (torch.nn.Embedding(4, 2, padding_idx=0), "padding_idx"),
        (torch.nn.Linear(2, 2, dtype=torch.bfloat16), "float32"),
        (torch.nn.Identity(), "no linear map"),
    ],
)
def test_models_that_it_cannot_train_privately_are_refused(model: Any, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        LazyDP()(model, batch_size=1)


def test_shared_parameters_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(UnsupportedModel, match="shares"):
        LazyDP()(model, batch_size=1)


def test_examples_on_another_axis_are_refused() -> None:
    model, optimizer = made(LazyDP())
    with pytest.raises(UnsupportedModel, match="first one everywhere"):
        optimizer.backward(model(batch(0))[:3])


def test_an_output_changed_in_place_is_differentiated_or_refused() -> None:
    draws = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = DPSGD(noise_multiplier=0.0, max_norm=1e9)(layer, lr=1.0, batch_size=1)
    x = torch.randn(4, 3, generator=draws)
    (exact,) = torch.autograd.grad(layer(x).tanh().sum(), layer.weight)
    before = layer.weight.detach().clone()
    optimizer.backward(layer(x).tanh_().sum(1))
    optimizer.step()
    torch.testing.assert_close(before - layer.weight.detach(), exact)
    with pytest.raises(UnsupportedModel, match="in place"):
        optimizer.backward(layer(x.view(2, 2, 3)).tanh_().sum((1, 2)))


@pytest.mark.parametrize("policy", [LazyDP, DPSGD, PrivatePolicy])
def test_impossible_knobs_are_refused(policy: Any) -> None:
    for knobs in ({"noise_multiplier": -1.0}, {"max_norm": 0.0}):
        with pytest.raises(InvalidKnob, match="noise_multiplier"):
            policy(**knobs)
    with pytest.raises(InvalidKnob, match="batch_size=0"):
        policy()(Model(), batch_size=0)
