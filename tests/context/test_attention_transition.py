"""Attention-Transition beside a loop over rows and heads, as the reference has it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.context.conftest import MODELS, tokens  # noqa: E402

from memwise.context.engine.edit import Rows  # noqa: E402
from memwise.context.engine.editor import edited  # noqa: E402
from memwise.context.policies.attention_transition import AttentionTransition  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

KNOBS = {"inner": 0.4, "outer": 0.3, "strength": 3.0, "window": 15, "begin": 2}


@dataclass(frozen=True)
class Watched(AttentionTransition):
    """Notes what it was given and what it gave, by layer and row."""

    seen: list[Any] = field(default_factory=list)

    def edit_probs(self, rows: Rows) -> Any:
        new = super().edit_probs(rows)
        given = rows.probs.clone()
        self.seen.append((rows.layer, rows.at, given, given if new is None else new, rows.seen))
        return new


def _naive(probs: Any, seen: Any, at: int, layer: int, n_layers: int, n: int) -> Any:
    """One row of one head (n,), a weight at a time."""
    policy, out = AttentionTransition(**KNOBS), probs.tolist()
    last = n - policy.window
    size = math.ceil((last - policy.begin - 3) / (n_layers + 3))
    first = (layer + 3) * size + policy.begin + 3
    if first <= at < min(first + size, last):
        target, tau = range(first - 3 * size, first - 2 * size), policy.inner / (first - 2)
    elif at >= last and layer >= 1:
        size = math.ceil((last - 3) / (n_layers + 3))
        start = (layer + 2) * size + 3
        target, tau = range(start, min(start + size, last)), policy.outer / last
    else:
        return out
    target = [j for j in target if seen[j]]
    if not any(out[j] > tau for j in target):
        return out
    out = [weight if weight >= tau else 0.0 for weight in out]
    missing = 1 - sum(out)
    parts = {j: 100 if out[j] >= tau else 5 for j in target}
    for j, part in parts.items():
        out[j] += policy.strength * missing * part / sum(parts.values())
    return out


def _watch(model: Any, ids: Any, **rest: Any) -> list[Any]:
    policy = Watched(**KNOBS)
    with torch.no_grad(), edited(model, policy):
        model(ids, **rest)
    return policy.seen


def test_rows_are_those_of_a_loop(model: Any) -> None:
    n, n_layers, n_changed = 70, model.config.num_hidden_layers, 0
    for layer, at, given, mine, seen in _watch(model, tokens(2, n)):
        for row in range(2):
            for head in range(4):
                for i, place in enumerate(at[row].tolist()):
                    own = _naive(given[row, head, i], seen[row, 0, i], place, layer, n_layers, n)
                    theirs = torch.tensor(own, dtype=torch.float64)
                    torch.testing.assert_close(mine[row, head, i], theirs, atol=1e-12, rtol=0.0)
                    n_changed += int((theirs != given[row, head, i]).any())
    assert n_changed > 100


def test_a_padded_text_is_moved_as_it_is_alone() -> None:
    model, ids = MODELS["llama"](), tokens(2, 70)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :11] = 0
    at = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), edited(model, AttentionTransition(**KNOBS)):
        both = model(ids, attention_mask=mask, position_ids=at).logits
        alone = model(ids[1:, 11:]).logits
    torch.testing.assert_close(both[1:, 11:], alone, atol=1e-12, rtol=0.0)


def test_what_is_decoded_and_short_prompts_are_left_alone(model: Any) -> None:
    short = tokens(1, 15)
    with torch.no_grad():
        plain = model(short).logits
        with edited(model, AttentionTransition(**KNOBS)):
            torch.testing.assert_close(model(short).logits, plain, atol=1e-12, rtol=0.0)
    policy = Watched(**KNOBS)
    with torch.no_grad(), edited(model, policy):
        cache = model(tokens(1, 60)).past_key_values
        policy.seen.clear()
        model(tokens(1, 1, seed=1), past_key_values=cache)
    assert policy.seen
    assert all(given is mine for _, _, given, mine, _ in policy.seen)


def test_the_last_layer_is_left_alone_and_others_change_the_model(model: Any) -> None:
    layers = {layer for layer, *_ in _watch(model, tokens(1, 70))}
    assert layers == set(range(model.config.num_hidden_layers - 1))
    with torch.no_grad():
        plain = model(tokens(1, 70)).logits
        with edited(model, AttentionTransition(**KNOBS)):
            mine = model(tokens(1, 70)).logits
    assert (mine - plain).abs().max() > 1e-3


def test_renormalised_rows_sum_to_one(model: Any) -> None:
    policy = Watched(**KNOBS, renormalise=True)
    with torch.no_grad(), edited(model, policy):
        model(tokens(1, 70))
    for _, _, _, mine, _ in policy.seen:
        torch.testing.assert_close(mine.sum(-1), torch.ones_like(mine[..., 0]))


@pytest.mark.parametrize("knobs", [{"strength": -1.0}, {"window": 0}, {"inner": -0.1}])
def test_knobs_that_cannot_work_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(InvalidKnob):
        AttentionTransition(**knobs)
