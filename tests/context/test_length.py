"""Distances that are not what places say, against loops over pairs in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import MODELS, llama, tokens  # noqa: E402

from memwise.context.engine.host import bounded, bytes_for  # noqa: E402
from memwise.context.policies.lm_infinite import LMInfinite  # noqa: E402
from memwise.context.policies.self_extend import SelfExtend  # noqa: E402
from memwise.context.policies.streaming_llm import StreamingLLM  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

ANGLES = 2e-5  # transformers computes angles in float32


def run(model: Any, ids: Any, policy: Any, n_slots: int, chunk: int) -> Any:
    budget = bytes_for(model, policy, n_slots, chunk=chunk, batch=len(ids))
    with torch.no_grad(), bounded(model, policy, budget, chunk=chunk) as cache:
        return model(ids, past_key_values=cache).logits


def turned(x: Any, at: float, theta: float) -> Any:
    """A vector at a position, half by half as transformers does."""
    half = x.shape[-1] // 2
    angle = at * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def by_pairs(model: Any, ids: list[int], distance: Any) -> Any:
    """Logits of a Llama whose every pair is seen at a distance, or (None) not at all."""
    body, config = model.model, model.config
    theta = config.rope_parameters["rope_theta"]
    width, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    x = body.embed_tokens(torch.tensor(ids))
    for layer in body.layers:
        seen = layer.input_layernorm(x)
        own = layer.self_attn
        q, k, v = (
            part(seen).view(len(ids), -1, width) for part in (own.q_proj, own.k_proj, own.v_proj)
        )
        mixed = torch.zeros_like(q)
        for i in range(len(ids)):
            for head in range(q.shape[1]):
                at = [(j, distance(i, j)) for j in range(i + 1)]
                at = [(j, d) for j, d in at if d is not None]
                logits = torch.stack(
                    [
                        turned(q[i, head], d, theta) @ k[j, head // groups] / math.sqrt(width)
                        for j, d in at
                    ]
                )
                share = logits.softmax(0)
                mixed[i, head] = sum(
                    p * v[j, head // groups] for p, (j, _) in zip(share, at, strict=True)
                )
        x = x + own.o_proj(mixed.flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(body.norm(x))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_lm_infinite_is_its_mask_and_its_distances(chunk: int) -> None:
    model, ids = llama(), tokens(1, 22)
    sinks, reach = 2, 6

    def distance(i: int, j: int) -> int | None:
        if i - j < reach:
            return i - j
        return reach if j < sinks else None

    expected = by_pairs(model, ids[0].tolist(), distance)
    mine = run(model, ids, LMInfinite(sinks=sinks, reach=reach), sinks + reach, chunk)[0]
    torch.testing.assert_close(mine, expected, atol=ANGLES, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_self_extend_shares_positions_among_far_tokens(chunk: int) -> None:
    model, ids = llama(), tokens(1, 22)
    near, group = 5, 3

    def distance(i: int, j: int) -> int:
        if i - j < near:
            return i - j
        return i // group - j // group + near - near // group

    expected = by_pairs(model, ids[0].tolist(), distance)
    mine = run(model, ids, SelfExtend(group=group, near=near), 30, chunk)[0]
    shifted = by_pairs(model, ids[0].tolist(), lambda i, j: distance(i, j) + (i - j >= near))
    assert (shifted - expected).abs().max() > 1e3 * ANGLES
    torch.testing.assert_close(mine, expected, atol=ANGLES, rtol=0)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(
    "policy", [SelfExtend(group=1, near=4), SelfExtend(near=64), LMInfinite(reach=64)]
)
def test_what_reaches_as_far_as_the_text_changes_nothing(name: str, policy: Any) -> None:
    model, ids = MODELS[name](), tokens(2, 33)
    with torch.no_grad():
        plain = model(ids).logits
    torch.testing.assert_close(run(model, ids, policy, 40, 7), plain, atol=1e-12, rtol=0)


def test_a_text_beyond_the_trained_length_wants_a_policy_that_reaches_further() -> None:
    model, ids = llama(), tokens(1, 40)
    model.config.max_position_embeddings = 32
    with pytest.raises(InvalidKnob, match="made for 32"):
        run(model, ids, StreamingLLM(), 20, 8)
    assert run(model, ids, LMInfinite(sinks=2, reach=16), 20, 8).isfinite().all()


@pytest.mark.parametrize("knobs", [{"reach": 0}, {"sinks": 0}])
def test_knobs_below_one_are_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(InvalidKnob):
        LMInfinite(**knobs)
