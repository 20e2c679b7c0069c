"""Contextual Memory Reweaving beside a loop over layers, tokens and entries."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.context.conftest import tokens  # noqa: E402

from memwise.context.engine.editor import edited  # noqa: E402
from memwise.context.policies.contextual_memory_reweaving import (  # noqa: E402
    ContextualMemoryReweaving,
)
from memwise.errors import InvalidKnob  # noqa: E402

EXACT = {"atol": 1e-12, "rtol": 0.0}
POLICY = ContextualMemoryReweaving(
    depths=(0.4, 0.9), gates=(0.0, 1.0), strength=0.2, novel=4.0, decay=0.9
)


def _surprising(model: Any, ids: Any) -> list[list[int]]:
    logp = model(ids).logits.double().log_softmax(-1)
    n_rows, n = ids.shape
    return [
        [t for t in range(1, n) if -logp[row, t - 1, ids[row, t]] > POLICY.novel]
        for row in range(n_rows)
    ]


def _woven(hidden: Any, at: int, entries: Any, held: list[int], gate: float) -> Any:
    """One state with what is remembered (D,), an entry at a time."""
    width = len(hidden)
    weights = []
    for place, entry in zip(held, entries, strict=True):
        like = sum(float(a * b) for a, b in zip(hidden, entry, strict=True)) / math.sqrt(width)
        weights.append(like + (at - place) * math.log(POLICY.decay))
    most = max(weights)
    powers = [math.exp(weight - most) for weight in weights]
    found = sum(p * entry for p, entry in zip(powers, entries, strict=True)) / sum(powers)
    spread = ((found - found.mean()) ** 2).mean()
    found = (found - found.mean()) / (spread + 1e-5) ** 0.5
    return hidden + POLICY.strength * gate * (hidden**2).mean() ** 0.5 * found


def test_the_second_pass_is_that_of_a_loop(model: Any) -> None:
    first, second = tokens(2, 20), tokens(2, 6, seed=1)
    layers = POLICY.layers(model.config.num_hidden_layers)
    gates = [math.exp(g) / sum(map(math.exp, POLICY.gates)) for g in POLICY.gates]
    with torch.no_grad():
        held = _surprising(model, first)
        whole = model(first, output_hidden_states=True)

        def loop(index: int) -> Any:
            def hook(module: Any, args: Any) -> Any:
                new = args[0].clone()
                for row, places in enumerate(held):
                    entries = whole.hidden_states[layers[index]][row, places]
                    for i in range(6):
                        own = args[0][row, i]
                        new[row, i] = _woven(own, 20 + i, entries, places, gates[index])
                return (new, *args[1:])

            return hook

        handles = [
            model.model.layers[layer].register_forward_pre_hook(loop(index))
            for index, layer in enumerate(layers)
        ]
        theirs = model(second, past_key_values=whole.past_key_values).logits
        for handle in handles:
            handle.remove()
        with edited(model, POLICY, budget="64KiB"):
            cache = model(first).past_key_values
            mine = model(second, past_key_values=cache).logits
        plain = model(second, past_key_values=model(first).past_key_values).logits
    assert min(map(len, held)) > 3
    torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0.0)
    assert (mine - plain).abs().max() > 1e-3


def test_a_text_that_goes_in_at_once_does_not_see_itself(model: Any) -> None:
    ids = tokens(2, 20)
    with torch.no_grad(), edited(model, POLICY, budget="64KiB"):
        mine = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(mine, model(ids).logits, **EXACT)


def test_the_ring_is_the_same_whether_tokens_come_one_by_one(model: Any) -> None:
    ids, rings = tokens(1, 20), []
    policy = ContextualMemoryReweaving(depths=(0.3,), gates=(0.0,), strength=0.0, novel=4.0)
    for step in (20, 1):
        cache = None
        with torch.no_grad(), edited(model, policy, budget="64KiB") as editor:
            for first in range(0, 20, step):
                cache = model(ids[:, first : first + step], past_key_values=cache).past_key_values
        rings.append(editor.memory)
    assert rings[0].at.tolist() == rings[1].at.tolist()
    assert [t for t in rings[0].at[0].tolist() if t >= 0] == _surprising(model, ids)[0]


def test_generate_fills_the_ring(model: Any) -> None:
    with edited(model, POLICY, budget="64KiB") as editor:
        model.generate(tokens(1, 12), max_new_tokens=6, do_sample=False)
    assert editor.memory.n_seen == 17  # the last new token is never read
    assert editor.memory.n_bytes <= 1 << 16


@pytest.mark.parametrize(
    "knobs", [{"depths": (1.5, 0.0, 0.0)}, {"decay": 0.0}, {"gates": (0.0,)}, {"depths": ()}]
)
def test_knobs_that_cannot_work_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(InvalidKnob):
        ContextualMemoryReweaving(**knobs)
