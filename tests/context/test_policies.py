"""What every cache policy has to keep to, and the attention that scores are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import gemma, llama, methods_of, tokens  # noqa: E402

from memwise.catalogue import load  # noqa: E402
from memwise.context.engine.host import bounded, bytes_for  # noqa: E402
from memwise.context.engine.policy import CachePolicy, pin, smooth  # noqa: E402
from memwise.context.engine.step import Step  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

each_policy = pytest.mark.parametrize("name", methods_of(CachePolicy))


def run(
    model: Any, ids: Any, policy: CachePolicy, n_slots: int, question: tuple[int, ...] = ()
) -> Any:
    given = {"chunk": 8, "question": question}
    budget = bytes_for(model, policy, n_slots, batch=len(ids), **given)
    with torch.no_grad(), bounded(model, policy, budget, **given) as cache:
        return model(ids, past_key_values=cache).logits, cache


@each_policy
def test_a_budget_for_all_tokens_changes_nothing(model: Any, name: str) -> None:
    ids = tokens(2, 60)
    mine, _ = run(model, ids, load(f"context/{name}")(), 61)
    with torch.no_grad():
        torch.testing.assert_close(mine, model(ids).logits, atol=1e-12, rtol=0)


@each_policy
def test_a_batch_is_its_rows_when_slots_go(name: str) -> None:
    model, policy, ids = gemma(), load(f"context/{name}")(), tokens(2, 150)
    together, cache = run(model, ids, policy, 40)
    assert all(layer.slots.n < 150 for layer in cache.slot_layers)
    for row in range(2):
        alone, _ = run(model, ids[row : row + 1], policy, 40)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-10, rtol=0)


@each_policy
def test_a_run_that_was_saved_goes_on_as_one_that_was_not(name: str, tmp_path: Any) -> None:
    model, policy, ids = llama(), load(f"context/{name}")(), tokens(1, 200)
    budget = bytes_for(model, policy, 40, chunk=8)
    with torch.no_grad(), bounded(model, policy, budget, chunk=8) as cache:
        model(ids[:, :104], past_key_values=cache)
        cache.save(tmp_path / "kv")
        straight = model(ids[:, 104:], past_key_values=cache).logits
    with torch.no_grad(), bounded(model, policy, budget, chunk=8) as cache:
        cache.load(tmp_path / "kv")
        assert torch.equal(model(ids[:, 104:], past_key_values=cache).logits, straight)


@each_policy
def test_fewer_slots_than_a_policy_needs_are_refused_or_enough(name: str) -> None:
    policy = load(f"context/{name}")()
    _, cache = run(llama(), tokens(1, 120), policy, policy.floor)
    assert all(n == policy.floor for n in cache.plan.n_slots.values())


@dataclass(frozen=True)
class Tells(CachePolicy):
    """Gives what it sees to a test."""

    @property
    def window(self) -> int:
        return 5

    def score(self, step: Step) -> Any:
        SEEN[step.layer] = (step.received, step.strongest, step.pos.clone())
        return step.pos.float()


SEEN: dict[int, Any] = {}


@pytest.mark.parametrize("question", [(), (7, 9, 11)])
def test_received_and_strongest_are_the_models_own_attention(
    model: Any, question: tuple[int, ...]
) -> None:
    """Against eager attention weights of the whole text, in which nothing was let go."""
    ids = tokens(2, 30)
    SEEN.clear()
    given = {"chunk": 30, "question": question}
    budget = bytes_for(model, Tells(), 29, batch=2, **given)
    with torch.no_grad(), bounded(model, Tells(), budget, **given) as cache:
        model(ids, past_key_values=cache)
        cache.compress()
    whole = torch.cat([ids, torch.tensor([question] * 2, dtype=torch.long)], 1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(whole, output_attentions=True).attentions
    for layer, (received, strongest, _) in SEEN.items():
        probs = weights[layer][:, :, 30:] if question else weights[layer][:, :, 25:]
        probs = probs.unflatten(1, (2, -1))[..., :30]  # (B, H, G, q, n)
        expected = probs.mean(2).sum(2).float()
        torch.testing.assert_close(received, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(strongest, probs.amax((2, 3)).float(), atol=1e-5, rtol=0)


def test_a_probe_leaves_no_trace(model: Any) -> None:
    """What comes after a choice is as if the question had never gone through the model."""
    ids = tokens(1, 40)
    asked, cache = run(model, ids, Tells(), 60, (7, 9, 11))
    plain, _ = run(model, ids, Tells(), 60)
    torch.testing.assert_close(asked, plain, atol=1e-12, rtol=0)
    with torch.no_grad(), bounded(model, Tells(), bytes_for(model, Tells(), 45)) as other:
        model(ids, past_key_values=other)
        before = {k: v.clone() for k, v in _slots(other).items()}
        other.compress()
        assert all(torch.equal(v, before[k]) for k, v in _slots(other).items())
    assert cache.n_seen == 40


def _slots(cache: Any) -> dict[str, Any]:
    return {
        f"{layer.index} {name}": tensor[:, :, : layer.slots.n]
        for layer in cache.bounded_layers
        for name, tensor in layer.slots.tensors().items()
    }


def test_smoothing_lifts_neighbours_and_nothing_else() -> None:
    score = torch.zeros(1, 1, 9)
    score[..., 4] = 1.0
    assert smooth(score, 3).flatten().tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert smooth(score, 1) is score


def test_pinned_slots_come_first() -> None:
    order = pin(torch.arange(6.0).view(1, 1, 6), sinks=1, recent=2).flatten()
    assert order.isinf().tolist() == [True, False, False, False, True, True]


def test_random_slots_are_the_same_whenever_they_are_chosen() -> None:
    step_a, step_b = [], []
    for chunk, found in ((8, step_a), (16, step_b)):
        policy = load("context/random")()
        model = llama()
        budget = bytes_for(model, policy, 20, chunk=chunk)
        with torch.no_grad(), bounded(model, policy, budget, chunk=chunk) as cache:
            model(tokens(1, 96), past_key_values=cache)
            cache.compress()
            found.append(cache.report().kept)
    assert step_a == step_b


@pytest.mark.parametrize("knobs", [{"sinks": 0}, {"kernel": 0}])
def test_knobs_below_one_are_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(InvalidKnob, match="must be 1 or more"):
        load("context/sharp_probe")(**knobs)
