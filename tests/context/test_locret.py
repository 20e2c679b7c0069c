"""Locret: heads against a naive loop, labels against eager attention, and what training gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import gemma, llama, tokens  # noqa: E402

from memwise.catalogue import load  # noqa: E402
from memwise.context.engine.host import Host, bounded, bytes_for  # noqa: E402
from memwise.context.engine.policy import CachePolicy  # noqa: E402
from memwise.context.engine.retaining import (  # noqa: E402
    Lesson,
    load_heads,
    retained,
    save_heads,
    study,
    train_heads,
    untrained,
)
from memwise.context.engine.step import Step  # noqa: E402
from memwise.errors import InvalidKnob, StoreCorrupt  # noqa: E402

CHUNK = 8


@dataclass(frozen=True)
class Sees(CachePolicy):
    """Keeps everything, and what it saw of new tokens."""

    needs_inputs = True

    seen: dict[int, list[Any]] = field(default_factory=dict, compare=False)

    def observe(self, step: Step) -> None:
        self.seen.setdefault(step.layer, []).extend(step.inputs())


@dataclass(frozen=True)
class Bare(Sees):
    """The same with keys that are held bare of positions."""

    raw_keys = True


def locret(**knobs: Any) -> Any:
    return load("context/locret")(**knobs)


def lessons(n: int) -> list[Lesson]:
    return [Lesson(tuple(tokens(1, 40, seed=i)[0].tolist()), 5) for i in range(n)]


def projected(model: Any, ids: Any, layer: int) -> Any:
    """Queries, keys and values of a layer before they are turned (B, q, F), by its modules."""
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[layer]
        block = model.model.layers[layer]
        x = block.input_layernorm(hidden)
        attention = block.self_attn
        parts = []
        for name in ("q", "k", "v"):
            part = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim))
            norm = getattr(attention, f"{name}_norm", None)
            parts.append((norm(part) if norm else part).flatten(2))
    return torch.cat(parts, -1)


@pytest.mark.parametrize("kind", [Sees, Bare])
def test_inputs_are_the_layers_own_projections_bare_of_positions(model: Any, kind: Any) -> None:
    ids, policy = tokens(2, 50), kind()
    budget = bytes_for(model, policy, 60, chunk=40, batch=2)
    with torch.no_grad(), bounded(model, policy, budget, chunk=40) as cache:
        model(ids, past_key_values=cache)
    for layer, seen in policy.seen.items():
        expected = projected(model, ids, layer)
        torch.testing.assert_close(torch.cat(seen, 1), expected, atol=1e-10, rtol=0)


def test_a_head_is_two_matrices_with_a_silu_between() -> None:
    shape = Host(llama()).shape
    weights = untrained(shape, 6, 0)
    inputs = torch.randn(3, (4 + 2 * 2) * 8, generator=torch.Generator().manual_seed(1))
    found = retained(weights, 1, inputs)
    for row in range(3):
        hidden = []
        for unit in range(6):
            x = float(weights["1.up"][unit] @ inputs[row] + weights["1.up_bias"][unit])
            hidden.append(x / (1 + math.exp(-x)))
        for head in range(2):
            total = sum(float(weights["1.down"][head, u]) * hidden[u] for u in range(6))
            expected = total + float(weights["1.down_bias"][head])
            assert abs(float(found[row, head]) - expected) < 1e-5


def test_a_token_is_scored_once_and_no_later_text_changes_it(model: Any) -> None:
    def scores(ids: Any) -> Any:
        policy = locret(hidden=8)
        budget = bytes_for(model, policy, 80, chunk=CHUNK)
        with torch.no_grad(), bounded(model, policy, budget, chunk=CHUNK) as cache:
            model(ids, past_key_values=cache)
            return [
                layer.slots.columns["retained"][:, :, :30].clone() for layer in cache.slot_layers
            ]

    one, other = tokens(1, 60), tokens(1, 60)
    other[:, 30:] = tokens(1, 30, seed=9)
    for mine, theirs in zip(scores(one), scores(other), strict=True):
        assert mine.std() > 0
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_each_head_keeps_its_own_best_the_first_and_the_newest() -> None:
    """Against the scores of a run in which nothing went; the first layer would have ties."""
    model, ids, n_slots = llama(), tokens(1, 64), 30
    policy = locret(hidden=8, stabilizers=6)
    everything = bytes_for(model, policy, 64, chunk=64)
    with torch.no_grad(), bounded(model, policy, everything, chunk=64) as cache:
        model(ids, past_key_values=cache)
    scores = cache.slot_layers[1].slots.columns["retained"][0]
    budget = bytes_for(model, policy, n_slots, chunk=64)
    with torch.no_grad(), bounded(model, policy, budget, chunk=64) as cache:
        model(ids, past_key_values=cache)
        cache.compress()
    kept = cache.slot_layers[1].slots.pos[0, :, :n_slots]
    for head in range(2):
        middle = scores[head, 4:58].topk(20).indices + 4
        expected = sorted([*range(4), *middle.tolist(), *range(58, 64)])
        assert kept[head].tolist() == expected
    assert kept[0].tolist() != kept[1].tolist()


def test_what_a_lesson_wants_is_the_greatest_logit_of_the_answers_queries(model: Any) -> None:
    """Against eager attention, whose logarithm is the logits but for a constant of each row."""
    ids = lessons(1)[0].ids
    seen = study(model, Lesson(ids, 1))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(torch.tensor([ids]), output_attentions=True).attentions
    for layer, one in seen.items():
        assert one.inputs.shape == (38, (4 + 2 * 2) * 8)
        rows = weights[layer][0, :, 38, :38].log().unflatten(0, (2, 2))  # (H, G, n)
        above = one.wanted.T[:, None] - rows
        constant = above.amin(-1, keepdim=True)
        assert (above - constant).amin(1).max() < 1e-5  # one of the heads made each of them


def test_more_answer_never_wants_a_token_less(model: Any) -> None:
    ids = lessons(1)[0].ids
    short, long = study(model, Lesson(ids[:36], 1)), study(model, Lesson(ids, 5))
    for layer, one in short.items():
        assert (long[layer].wanted[:34] >= one.wanted - 1e-6).all()
        assert (long[layer].wanted[:34] > one.wanted + 1e-3).any()


def test_training_brings_heads_nearer_to_what_is_wanted(model: Any) -> None:
    todo = lessons(6)
    first = untrained(Host(model).shape, 16, 0)
    trained = train_heads(model, todo[:5], n_steps=60, hidden=16, lr=1e-2, warmup=5)

    def error(weights: Any) -> float:
        total = 0.0
        for lesson in todo[:5]:
            for layer, seen in study(model, lesson).items():
                total += float((retained(weights, layer, seen.inputs) - seen.wanted).abs().mean())
        return total

    assert error(trained) < 0.7 * error(first)


def test_training_is_the_same_whenever_it_is_done() -> None:
    model = llama()
    one, two = (train_heads(model, lessons(3), n_steps=7, hidden=4) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_heads_come_back_from_their_file(tmp_path: Any) -> None:
    model = gemma()
    trained = train_heads(model, lessons(2), n_steps=3, hidden=4)
    save_heads(trained, tmp_path / "heads.safetensors")
    policy = locret(heads=str(tmp_path / "heads.safetensors"))
    found = policy.weights(Host(model).shape)
    assert all(torch.equal(found[name], trained[name]) for name in trained)


def test_heads_count_against_the_budget() -> None:
    model = llama()
    small, large = locret(hidden=4), locret(hidden=400)
    more = bytes_for(model, large, 30) - bytes_for(model, small, 30)
    shape = Host(model).shape
    assert more == sum(
        a.nbytes - b.nbytes
        for a, b in zip(large.weights(shape).values(), small.weights(shape).values(), strict=True)
    )
    with torch.no_grad(), bounded(model, large, bytes_for(model, large, 30)) as cache:
        model(tokens(1, 10), past_key_values=cache)
    held = cache.report().held_bytes["weights of the policy"]
    assert held == sum(tensor.nbytes for tensor in large.weights(shape).values())


def test_a_saved_cache_goes_on_with_the_same_heads_only(tmp_path: Any) -> None:
    model, path = llama(), tmp_path / "heads.safetensors"
    shape = Host(model).shape
    save_heads(untrained(shape, 4, 0), path)
    policy = locret(heads=str(path))
    budget = bytes_for(model, policy, 40, chunk=CHUNK)
    with torch.no_grad(), bounded(model, policy, budget, chunk=CHUNK) as cache:
        model(tokens(1, 20), past_key_values=cache)
        cache.save(tmp_path / "kv")
    save_heads(untrained(shape, 4, 1), path)
    changed = pytest.raises(InvalidKnob, match="another policy")
    with bounded(model, policy, budget, chunk=CHUNK) as cache, changed:
        cache.load(tmp_path / "kv")


def test_files_without_such_heads_are_refused(tmp_path: Any) -> None:
    shape = Host(llama()).shape
    with pytest.raises(InvalidKnob, match="no such file"):
        load_heads(tmp_path / "none", shape)
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(StoreCorrupt, match="no retaining heads"):
        load_heads(tmp_path / "text", shape)
    save_heads(untrained(Host(gemma()).shape, 4, 0), tmp_path / "other")
    with pytest.raises(InvalidKnob, match="another model"):
        load_heads(tmp_path / "other", shape)


@pytest.mark.parametrize("n_answer", [0, 39, 40])
def test_an_answer_without_a_text_is_refused(n_answer: int) -> None:
    with pytest.raises(InvalidKnob, match="an answer wants a text"):
        study(llama(), Lesson(lessons(1)[0].ids, n_answer))


def test_no_lessons_and_bad_knobs_are_refused() -> None:
    with pytest.raises(InvalidKnob, match="no lessons"):
        train_heads(llama(), [])
    for name in ("sinks", "stabilizers", "hidden"):
        with pytest.raises(InvalidKnob, match="must be 1 or more"):
            locret(**{name: 0})
