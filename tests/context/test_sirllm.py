"""SirLLM: which tokens stay, by a loop over a list, and how their surprise fades."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import gemma, llama, tokens  # noqa: E402

from memwise.catalogue import load  # noqa: E402
from memwise.context.engine.host import bounded, bytes_for  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

CHUNK = 8


def policy(**knobs: Any) -> Any:
    return load("context/sirllm")(**knobs)


def told(model: Any, parts: list[Any], own: Any, n_slots: int) -> Any:
    """The cache after each part went through the model in a call of its own."""
    budget = bytes_for(model, own, n_slots, chunk=CHUNK)
    with torch.no_grad(), bounded(model, own, budget, chunk=CHUNK) as cache:
        for part in parts:
            model(part, past_key_values=cache)
    return cache


def surprise(cache: Any, layer: int = 0) -> Any:
    slots = cache.slot_layers[layer].slots
    return slots.columns["surprise"][0, 0, : slots.n]


def test_surprise_is_the_models_own_where_nothing_has_gone(model: Any) -> None:
    ids = tokens(1, 30)
    with torch.no_grad():
        logp = model(ids).logits[0, :-1].log_softmax(-1)
    expected = -logp.gather(1, ids[0, 1:, None])[:, 0]
    cache = told(model, [ids], policy(), 40)
    for layer in range(len(cache.slot_layers)):
        found = surprise(cache, layer)
        torch.testing.assert_close(found[1:].double(), expected, atol=1e-4, rtol=0)
        assert found[0] == 0


@pytest.mark.parametrize("recent", [0, 3])
def test_what_stays_is_what_a_list_would_keep(recent: int) -> None:
    """The least surprising of a list goes, until as many are left as there are slots."""
    model, ids, n_slots = gemma(), tokens(1, 60), 20
    own = policy(recent=recent)
    budget = bytes_for(model, own, n_slots, chunk=CHUNK)
    held: list[tuple[int, float]] = []
    with torch.no_grad(), bounded(model, own, budget, chunk=CHUNK) as cache:
        for first in range(0, 60, CHUNK):
            part = ids[:, first : first + CHUNK]
            model(part, past_key_values=cache)
            n_new = part.shape[1]
            if len(held) + n_new > n_slots + CHUNK:
                middle = held[own.sinks : len(held) - recent]
                n_free = n_slots - own.sinks - recent
                stay = {at for at, _ in sorted(middle, key=lambda one: one[1])[-n_free:]}
                held = [
                    one
                    for i, one in enumerate(held)
                    if i < own.sinks or i >= len(held) - recent or one[0] in stay
                ]
            held += zip(range(first, first + n_new), surprise(cache)[-n_new:].tolist(), strict=True)
            for kept in cache.report().kept.values():
                assert kept == [at for at, _ in held]


def test_the_surprise_of_earlier_turns_fades_once_a_turn() -> None:
    model, ids = llama(), tokens(1, 40)
    turns = [ids[:, :20], ids[:, 20:21], ids[:, 21:22], ids[:, 22:40]]
    kept, faded = (told(model, turns, policy(decay=decay), 60) for decay in (1.0, 0.5))
    ratio = surprise(faded)[1:] / surprise(kept)[1:]
    torch.testing.assert_close(ratio[:21], torch.full((21,), 0.5))
    torch.testing.assert_close(ratio[21:], torch.ones(18))


def test_a_turn_of_several_chunks_fades_nothing_of_its_own() -> None:
    model, ids = llama(), tokens(1, 40)
    kept, faded = (told(model, [ids], policy(decay=decay), 60) for decay in (1.0, 0.0))
    assert torch.equal(surprise(kept), surprise(faded))


def test_with_decay_the_newer_of_two_equal_facts_outlives_the_older() -> None:
    """The same tokens are told twice, and as many slots are left as one telling has."""
    model, fact = llama(), tokens(1, 12, seed=3)
    turns = [tokens(1, 4), tokens(1, 1), fact, fact[:, :1], fact]

    def newer(decay: float) -> float:
        cache = told(model, turns, policy(decay=decay), 16)
        cache.compress()
        kept = [at for at in cache.report().kept[0] if at >= 5]
        return sum(at >= 18 for at in kept) / len(kept)

    assert newer(0.2) > 0.8 > newer(1.0)


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"decay": 1.5}, "decay=1.5 is a ratio"),
        ({"decay": -0.1}, "give a number from 0 to 1"),
        ({"recent": -1}, "give 0 or more"),
        ({"sinks": 0}, "must be 1 or more"),
    ],
)
def test_bad_knobs_are_refused(knobs: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidKnob, match=complaint):
        policy(**knobs)
