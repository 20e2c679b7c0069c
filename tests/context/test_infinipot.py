"""InfiniPot: which slots stay, by a loop over lists, and what a run of surprises is worth."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import llama, tokens  # noqa: E402

from memwise.catalogue import load  # noqa: E402
from memwise.context.engine.host import bounded, bytes_for  # noqa: E402
from memwise.context.engine.policy import spread  # noqa: E402
from memwise.context.engine.step import Step  # noqa: E402

SEEN: dict[int, Any] = {}
N_SLOTS = 24


def kept_and_seen(**knobs: Any) -> tuple[dict[int, Any], dict[int, Any]]:
    """Slots that stay of a text, and what the policy saw when it chose them, by layer."""
    kind = load("context/infinipot")

    class Watched(kind):  # type: ignore[misc, valid-type]
        def score(self, step: Step) -> Any:
            SEEN[step.layer] = (step["novelty"].clone(), step.received.clone())
            return super().score(step)

    model, policy, ids = llama(), Watched(**knobs), tokens(1, 60)
    budget = bytes_for(model, policy, N_SLOTS, chunk=60)
    with torch.no_grad(), bounded(model, policy, budget, chunk=60) as cache:
        model(ids, past_key_values=cache)
        cache.compress()
        kept = {layer.index: layer.slots.pos[0, :, :N_SLOTS] for layer in cache.slot_layers}
    return kept, dict(SEEN)


def shared(values: list[float], kernel: int, how: Any) -> list[float]:
    half = kernel // 2
    return [how(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("novel", [0.0, 0.4, 0.75, 1.0])
@pytest.mark.parametrize("catalyst", [(), (5, 7, 9)])
def test_a_share_stays_for_novelty_and_the_rest_for_attention(
    novel: float, catalyst: tuple[int, ...]
) -> None:
    kernel, sinks = 5, 4
    kept, seen = kept_and_seen(novel=novel, catalyst=catalyst, kernel=kernel, sinks=sinks)
    for layer, by_head in kept.items():
        for head in range(2):
            novelty, attention = (found[0, head].double().tolist() for found in seen[layer])
            for values in (novelty, attention):
                values[:sinks] = [0.0] * sinks
            novelty = shared(novelty, kernel, mean)
            attention = shared(attention, kernel, max)
            free = list(range(sinks, 60))
            n_novel = int(novel * (N_SLOTS - sinks))
            order = sorted(range(60), key=lambda i: -novelty[i])
            best = [i for i in order[:n_novel] if i >= sinks]
            rest = [i for i in free if i not in best]
            rest.sort(key=lambda i: -attention[i])
            n_rest = N_SLOTS - sinks - len(best)
            expected = {*range(sinks), *best, *rest[:n_rest]}
            # Neighbours that share a score tie at the edge, where any of them may stay.
            edge = attention[rest[n_rest - 1]] if n_rest else None
            differ = expected ^ set(by_head[head].tolist())
            assert all(i in rest and attention[i] == edge for i in differ)


def test_a_run_of_unexpected_tokens_is_worth_more_than_a_lone_one() -> None:
    score = torch.zeros(1, 1, 40)
    score[..., 5] = 9.0
    score[..., 20:25] = 3.0
    assert spread(score, 5)[0, 0].argmax() == 22
    assert spread(score, 1) is not score
    assert torch.equal(spread(score, 1), score)


def test_the_mean_at_an_edge_is_of_what_is_there() -> None:
    score = torch.arange(4.0).view(1, 1, 4)
    assert spread(score, 3).flatten().tolist() == [0.5, 1.0, 2.0, 2.5]
    assert spread(score, 2).shape == score.shape
