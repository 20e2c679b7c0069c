"""Vectors of an encoder in a decoder's layers, against a decoder that is handed them by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import SIZES, gemma, llama, tokens  # noqa: E402

from memwise.context.policies.last_layer_vectors import LastLayerVectors  # noqa: E402
from memwise.context.policies.rcc import RCC  # noqa: E402
from memwise.errors import InvalidKnob, UnsupportedModel  # noqa: E402

ANGLES = 2e-5  # transformers computes angles in float32
SMALL, LAST = RCC(group=3, segment=6), LastLayerVectors(group=3, segment=6)


def turned(x: Any, at: int, theta: float) -> Any:
    half = x.shape[-1] // 2
    angle = at * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def by_hand(compressor: Any, segments: list[Any], words: Any, every_layer: bool) -> Any:
    """Logits of words (q, d) behind the vectors of segments, one query after another."""
    model, group = compressor.model, compressor.policy.group
    config = model.config
    theta, width = config.rope_parameters["rope_theta"], config.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads
    hidden: list[list[Any]] = [[] for _ in model.model.layers]
    for ids in segments:
        told = []
        for first in range(0, len(ids), group):
            some = ids[first : first + group]
            told += [*compressor.encoder.embed_tokens(some), compressor.marks[0]]
        states = compressor.encoder(
            inputs_embeds=torch.stack(told)[None], output_hidden_states=True
        ).hidden_states
        for i, own in enumerate(hidden):
            state = states[i + 1] if every_layer else states[-1]
            own += [state[0, j] for j in range(len(told)) if j % (group + 1) == group]
    n_slots = len(hidden[0])
    ends = [group * (j + 1) - 1 for j in range(n_slots)]
    at = [*ends, *range(group * n_slots, group * n_slots + len(words))]
    x = words
    for i, layer in enumerate(model.model.layers):
        own, extra = layer.self_attn, compressor.projections[i]
        slots = torch.stack([extra.norm(h) for h in hidden[i]])
        seen = layer.input_layernorm(x)
        k = torch.cat([extra.keys(slots), own.k_proj(seen)]).unflatten(1, (-1, width))
        v = torch.cat([extra.values(slots), own.v_proj(seen)]).unflatten(1, (-1, width))
        q = own.q_proj(seen).unflatten(1, (-1, width))
        mixed = torch.zeros_like(q)
        for row in range(len(x)):
            n_seen = n_slots + row + 1
            for head in range(q.shape[1]):
                query = turned(q[row, head], at[n_slots + row], theta)
                keys = [turned(k[j, head // groups], at[j], theta) for j in range(n_seen)]
                share = torch.stack([query @ key / math.sqrt(width) for key in keys]).softmax(0)
                mixed[row, head] = share @ v[:n_seen, head // groups]
        x = x + own.o_proj(mixed.flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


@torch.no_grad()
@pytest.mark.parametrize(("policy", "every_layer"), [(SMALL, True), (LAST, False)])
def test_a_layer_of_the_decoder_sees_its_own_layers_vectors(policy: Any, every_layer: bool) -> None:
    compressor, ids = policy(llama(), seed=1), tokens(1, 12)
    cache = compressor.compress(ids)
    assert (cache.n_held, cache.get_seq_length()) == (4, 12)
    answer = tokens(1, 5, seed=9)
    logits = compressor.spell(cache, answer, torch.arange(12, 17))
    words = torch.cat([compressor.marks[1:], compressor.embed(answer[0, :-1])])
    expected = by_hand(compressor, [ids[0, :6], ids[0, 6:]], words, every_layer)
    torch.testing.assert_close(logits[0], expected, atol=ANGLES, rtol=0)


@torch.no_grad()
def test_segments_know_nothing_of_each_other_but_their_places() -> None:
    compressor, ids = SMALL(llama()), tokens(1, 12)
    both = compressor.compress(ids)
    other = compressor.compress(torch.cat([tokens(1, 6, seed=5), ids[:, 6:]], 1))
    for own, changed in zip(both.layers, other.layers, strict=True):
        torch.testing.assert_close(own.keys[:, :, 2:], changed.keys[:, :, 2:], atol=0, rtol=0)
        assert (own.values[:, :, :2] - changed.values[:, :, :2]).abs().min(0).values.max() > 0


@torch.no_grad()
def test_tokens_after_the_last_whole_group_stay_as_they_are() -> None:
    compressor, ids = SMALL(llama()), tokens(2, 11)
    cache = compressor.compress(ids)
    assert (cache.n_held, cache.get_seq_length()) == (3 + 2, 11)
    pairs = 2 * 3 * 2 * cache.n_held * 2 * SIZES["head_dim"] * 8  # k and v, layers, rows, heads
    assert cache.n_bytes == pairs
    with pytest.raises(InvalidKnob, match="not all in slots"):
        compressor.repeat(cache)


@torch.no_grad()
def test_generate_goes_on_behind_the_slots() -> None:
    model, ids = llama(), tokens(1, 12)
    compressor = SMALL(model)
    prompt = tokens(1, 3, seed=4)
    cache = compressor.compress(ids)
    out = model.generate(
        cache.prompt(prompt), past_key_values=cache, max_new_tokens=4, do_sample=False
    )[0, 12:]
    text = prompt
    for _ in range(4):
        words = compressor.embed(text)[0]
        logits = by_hand(compressor, [ids[0, :6], ids[0, 6:]], words, True)
        text = torch.cat([text, logits[None, -1:].argmax(-1)], 1)
    assert out.tolist() == text[0].tolist()


@torch.no_grad()
def test_what_is_repeated_alone_is_what_is_likeliest_after_itself() -> None:
    compressor, ids = SMALL(llama()), tokens(2, 12)
    cache = compressor.compress(ids)
    written = compressor.repeat(cache)
    logits = compressor.spell(cache, written, torch.arange(12, 24))
    assert torch.equal(logits.argmax(-1), written)


def test_a_frozen_decoder_has_no_gradient_and_is_not_saved(tmp_path: Path) -> None:
    model, ids = llama(), tokens(2, 12)
    compressor = RCC(group=3, segment=6, trains_decoder=False)(model)
    torch.autograd.backward(compressor(ids))
    assert all(p.grad is None for p in model.parameters())
    trained = compressor.trained()
    assert all(name.split(".")[0] in ("marks", "encoder", "projections") for name in trained)
    reached = {name for name, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
    # The last layer's keys and values come of the last norm, and everything below is reached.
    assert reached == set(trained)
    torch.optim.SGD(trained.values(), 0.1).step()
    compressor.save(tmp_path / "soft")
    fresh = RCC(group=3, segment=6, trains_decoder=False)(llama(), seed=3)
    fresh.load(tmp_path / "soft")
    assert fresh(ids) == compressor(ids)


def test_the_encoder_counts_as_bytes_beside_the_model() -> None:
    model = llama()
    n_encoder = sum(p.numel() for p in model.model.parameters())
    layer = model.model.layers[0]
    parts = (layer.input_layernorm, layer.self_attn.k_proj, layer.self_attn.v_proj)
    n_projection = sum(p.numel() for part in parts for p in part.parameters())
    extra = n_encoder + 3 * n_projection + 2 * SIZES["hidden_size"]
    assert SMALL(model).extra_bytes == LAST(llama()).extra_bytes == 8 * extra


def test_models_whose_layers_slide_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="sliding layers"):
        SMALL(gemma())


@pytest.mark.parametrize("policy", [RCC, LastLayerVectors])
@pytest.mark.parametrize("knobs", [{"group": 0}, {"segment": 0}, {"group": 3, "segment": 8}])
def test_knobs_that_give_no_groups_are_refused(policy: Any, knobs: dict[str, int]) -> None:
    with pytest.raises(InvalidKnob):
        policy(**knobs)
