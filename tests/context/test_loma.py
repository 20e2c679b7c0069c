"""Memory tokens: one masked pass, reading step by step, and loops over pairs say the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import MODELS, SIZES, gemma, llama, tokens  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from memwise.context.engine.zones import READS, REMEMBERS, REPEATS, Zones, slots_at  # noqa: E402
from memwise.context.policies.loma import LoMA  # noqa: E402
from memwise.context.policies.mean_pooled import MeanPooled  # noqa: E402
from memwise.errors import InvalidKnob, StoreCorrupt, UnsupportedModel  # noqa: E402

ANGLES = 2e-5  # transformers computes angles in float32
SMALL = LoMA(ratio=3, memory=2)


def turned(x: Any, at: int, theta: float) -> Any:
    half = x.shape[-1] // 2
    angle = at * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def by_pairs(model: Any, x: Any, at: list[int], sees: Any) -> Any:
    """Logits of a Llama of embeddings (T, d), pair by pair."""
    config = model.config
    theta, width = config.rope_parameters["rope_theta"], config.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        seen, own = layer.input_layernorm(x), layer.self_attn
        q, k, v = (
            part(seen).view(len(x), -1, width) for part in (own.q_proj, own.k_proj, own.v_proj)
        )
        mixed = torch.zeros_like(q)
        for i in range(len(x)):
            columns = [j for j in range(len(x)) if sees(i, j)]
            for head in range(q.shape[1]):
                query = turned(q[i, head], at[i], theta)
                keys = [turned(k[j, head // groups], at[j], theta) for j in columns]
                share = torch.stack([query @ key / math.sqrt(width) for key in keys]).softmax(0)
                mixed[i, head] = share @ v[columns, head // groups]
        x = x + own.o_proj(mixed.flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


@torch.no_grad()
def test_training_is_a_loop_over_the_pairs_that_the_paper_lets_see_each_other() -> None:
    model, ids = llama(), tokens(1, 12)
    compressor = SMALL(model)
    rows: list[tuple[str, int, int]] = []  # kind, segment, position
    words = []
    for s in range(2):
        text = ids[0, 6 * s : 6 * s + 6]
        rows += [("read", s, 6 * s + i) for i in range(6)]
        rows += [("memory", s, 6 * s + 2), ("memory", s, 6 * s + 5)]
        rows += [("repeat", s, 6 * s + i) for i in range(6)]
        words += [*compressor.embed(text), *compressor.marks[[0, 0, 1]]]
        words += [*compressor.embed(text[:-1])]

    def sees(i: int, j: int) -> bool:
        (mine, own, _), (theirs, other, _) = rows[i], rows[j]
        if mine == "repeat":
            return own == other and (theirs == "memory" or (theirs == "repeat" and j <= i))
        if theirs == "read":
            return own == other and (mine == "memory" or j <= i)
        return theirs == "memory" and (other < own or (mine == "memory" and own == other))

    expected = by_pairs(model, torch.stack(words), [at for _, _, at in rows], sees)
    read, repeated = compressor.both(ids)
    kinds = [kind for kind, _, _ in rows]
    for found, kind in ((read, "read"), (repeated, "repeat")):
        mine = expected[[i for i, k in enumerate(kinds) if k == kind]]
        torch.testing.assert_close(found[0], mine, atol=ANGLES, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("how", "near"), [("sdpa", 1e-10), ("eager", 1e-3)])  # softmax in float32
def test_one_pass_with_a_mask_is_compressing_step_by_step(how: str, near: float) -> None:
    model, ids = llama(), tokens(2, 24)
    model.set_attn_implementation(how)
    compressor = LoMA(ratio=4, memory=2)(model)
    for one, steps in zip(compressor.both(ids), compressor.by_steps(ids), strict=True):
        torch.testing.assert_close(one, steps, atol=near, rtol=0)


def test_repetition_sees_what_was_read_only_through_memory() -> None:
    compressor, ids = SMALL(llama()), tokens(1, 12)
    zones = Zones.of(2, 6, 2)
    cut = zones.sees & ~((zones.kind[:, None] == REMEMBERS) & (zones.kind == READS))
    words = compressor.embed(ids).detach().requires_grad_()
    told = compressor.embed(ids).detach().requires_grad_()
    laid = []
    for s in range(2):
        own = slice(6 * s, 6 * s + 6)
        shown = told[:, own][:, :-1]
        laid += [words[:, own], compressor.marks[[0, 0, 1]][None], shown]
    for sees, reaches in ((zones.sees, True), (cut, False)):
        logits = compressor.run(torch.cat(laid, 1), zones.at, None, sees)
        repeated = logits[:, zones.kind == REPEATS]
        (flow,) = torch.autograd.grad(repeated.square().sum(), words, retain_graph=True)
        assert bool((flow.abs().sum(-1) > 1e-9).all()) is reaches
        assert bool((flow == 0).all()) is not reaches


def test_the_gradient_of_one_segments_repetition_stays_in_it() -> None:
    zones = Zones.of(3, 6, 2)
    repeats = zones.kind == REPEATS
    assert not (zones.sees & repeats[:, None] & (zones.segment[:, None] != zones.segment)).any()
    assert not (zones.sees & ~repeats[:, None] & repeats).any()
    later = (zones.segment > zones.segment[:, None]) & zones.sees
    assert not later.any()
    reading = (zones.kind == READS)[:, None] & (zones.kind == READS)
    assert not (zones.sees & reading & (zones.segment[:, None] != zones.segment)).any()


def test_memory_stands_at_the_ends_of_its_groups() -> None:
    assert slots_at(12, 3).tolist() == [3, 7, 11]
    zones = Zones.of(2, 6, 2)
    assert zones.at[zones.kind == REMEMBERS].tolist() == [2, 5, 8, 11]
    assert zones.at[zones.kind == READS].tolist() == list(range(12))
    assert zones.at[zones.kind == REPEATS].tolist() == list(range(12))


@torch.no_grad()
@pytest.mark.parametrize("policy", [SMALL, MeanPooled(ratio=3, memory=2)])
def test_only_slots_stay_and_positions_go_on(policy: Any) -> None:
    model, ids = llama(), tokens(2, 15)
    cache = policy(model).compress(ids)
    assert cache.n_held == 2 * 2 + 3  # two segments, and three tokens as they are
    assert cache.get_seq_length() == 15
    pairs = 2 * 3 * 2 * cache.n_held * 2 * SIZES["head_dim"] * 8  # k and v, layers, rows, heads
    assert cache.n_bytes == pairs


@torch.no_grad()
def test_generate_goes_on_as_a_mask_over_everything_says() -> None:
    model, ids = llama(), tokens(1, 15)
    compressor = SMALL(model)
    cache = compressor.compress(ids[:, :12])
    tail = ids[:, 12:]
    out = model.generate(
        cache.prompt(tail), past_key_values=cache, max_new_tokens=4, do_sample=False
    )[0, 12:]
    zones = Zones.of(2, 6, 2)
    held = zones.kind != REPEATS
    text = tail
    for _ in range(4):
        n_old, n_new = int(held.sum()), text.shape[1]
        sees = torch.zeros(n_old + n_new, n_old + n_new, dtype=torch.bool)
        sees[:n_old, :n_old] = zones.sees[held][:, held]
        sees[n_old:, :n_old] = zones.kind[held] == REMEMBERS
        sees[n_old:, n_old:] = torch.ones(n_new, n_new).tril().bool()
        marks = compressor.marks[[0, 0]][None]
        words = [compressor.embed(ids[:, :6]), marks, compressor.embed(ids[:, 6:12]), marks]
        words.append(compressor.embed(text))
        at = torch.cat([zones.at[held], torch.arange(12, 12 + n_new)])
        logits = compressor.run(torch.cat(words, 1), at, None, sees)
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    assert out.tolist() == text[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("policy", [SMALL, MeanPooled(ratio=3, memory=2)])
def test_what_is_repeated_alone_is_what_is_likeliest_after_itself(policy: Any) -> None:
    compressor, ids = policy(llama()), tokens(2, 12)
    cache = compressor.compress(ids)
    written = compressor.repeat(cache)
    assert cache.n_held == 4
    for i in range(2):
        own = written[:, 6 * i : 6 * i + 6]
        logits = compressor.spell(
            cache.part(2 * i, 2 * i + 2, 6 * i), own, torch.arange(6 * i, 6 * i + 6)
        )
        assert torch.equal(logits.argmax(-1), own)


@torch.no_grad()
def test_pooling_averages_bare_keys_and_puts_them_at_the_ends_of_their_groups() -> None:
    model, ids = llama(), tokens(1, 6)
    plain = DynamicCache(config=model.config)
    model(ids, past_key_values=plain)
    pooled = MeanPooled(ratio=3, memory=2)(model).compress(ids)
    theta = model.config.rope_parameters["rope_theta"]
    for own, full in zip(pooled.layers, plain.layers, strict=True):
        for slot in range(2):
            group = range(3 * slot, 3 * slot + 3)
            for head in range(2):
                bare = [turned(full.keys[0, head, j], -j, theta) for j in group]
                key = turned(torch.stack(bare).mean(0), 3 * slot + 2, theta)
                torch.testing.assert_close(own.keys[0, head, slot], key, atol=ANGLES, rtol=0)
                value = full.values[0, head, list(group)].mean(0)
                torch.testing.assert_close(own.values[0, head, slot], value)


@torch.no_grad()
def test_pooling_single_tokens_changes_nothing() -> None:
    model, ids = llama(), tokens(2, 12)
    plain = model(ids).logits
    read, _ = MeanPooled(ratio=1, memory=4)(model).by_steps(ids)
    torch.testing.assert_close(read, plain, atol=1e-10, rtol=0)


def test_what_was_trained_is_saved_and_loaded(tmp_path: Path) -> None:
    ids = tokens(2, 12)
    trained = SMALL(llama())
    optimizer = torch.optim.SGD(trained.trained().values(), 0.1)
    torch.autograd.backward(trained(ids))
    optimizer.step()
    trained.save(tmp_path / "soft")
    fresh = SMALL(llama(), seed=3)
    assert fresh(ids) != trained(ids)
    fresh.load(tmp_path / "soft")
    assert fresh(ids) == trained(ids)
    with pytest.raises(InvalidKnob, match="was saved of LoMA"):
        LoMA(ratio=2, memory=2)(llama()).load(tmp_path / "soft")
    (tmp_path / "soft").write_bytes(b"nothing")
    with pytest.raises(StoreCorrupt):
        fresh.load(tmp_path / "soft")


def test_all_of_the_model_is_trained_and_the_marks_are_all_that_is_added() -> None:
    model = llama()
    compressor = SMALL(model)
    assert len(compressor.trained()) == len(list(model.parameters())) + 1
    assert compressor.extra_bytes == 2 * SIZES["hidden_size"] * 8


def test_the_same_seed_gives_the_same_marks() -> None:
    first, again, other = (SMALL(llama(), seed=s).marks for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_models_whose_layers_slide_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="sliding layers"):
        SMALL(gemma())


def test_attention_without_a_mask_of_pairs_is_refused() -> None:
    model = MODELS["llama"]()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModel, match="flash_attention_2"):
        SMALL(model)


def test_a_part_of_a_segment_is_not_trained_on() -> None:
    with pytest.raises(InvalidKnob, match="13 tokens are no whole segments of 6"):
        SMALL(llama())(tokens(1, 13))


def test_a_text_of_no_tokens_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="nothing to compress"):
        SMALL(llama()).compress(tokens(1, 0))


@pytest.mark.parametrize("policy", [LoMA, MeanPooled])
@pytest.mark.parametrize("knobs", [{"ratio": 0}, {"memory": 0}])
def test_knobs_below_one_are_refused(policy: Any, knobs: dict[str, int]) -> None:
    with pytest.raises(InvalidKnob):
        policy(**knobs)
