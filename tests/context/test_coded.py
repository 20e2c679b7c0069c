"""Slots in a codec: what is held, what attention makes of it, and the bytes that it saves."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import gemma, tokens  # noqa: E402

from memwise.codec.th import codec  # noqa: E402
from memwise.context.engine.attention import attend, attend_blocks  # noqa: E402
from memwise.context.engine.host import bounded, bytes_for  # noqa: E402
from memwise.context.engine.plan import Shape, Uniform, budget_for, plan  # noqa: E402
from memwise.context.engine.store import Coded, Slots  # noqa: E402
from memwise.context.policies.keydiff import KeyDiff  # noqa: E402
from memwise.context.policies.snapkv import SnapKV  # noqa: E402
from memwise.context.policies.streaming_llm import StreamingLLM  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.measure import bytes_of, peak  # noqa: E402

NAMES = ["bf16", "int8/row", "int4/group4", "uint4/group8", "nf4/group8", "e4m3/row"]


def drawn(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=dtype)


@pytest.mark.parametrize("sizes", [(5,), (3, 4, 2), (1, 1, 1, 6)])
def test_attention_over_blocks_is_attention(sizes: tuple[int, ...]) -> None:
    n = sum(sizes)
    query = drawn(2, 6, 3, 8, dtype=torch.float64)
    keys, values = (drawn(2, 2, n, 8, seed=s, dtype=torch.float64) for s in (1, 2))
    seen = drawn(2, 2, 3, n, seed=3) > 0
    seen[..., -1] = True
    seen[0, 0, 0, : sizes[0]] = sizes[0] == n  # a block of which a row sees nothing
    blocks = zip(keys.split(sizes, 2), values.split(sizes, 2), strict=True)
    mine = attend_blocks(query, blocks, seen, 0.3)
    torch.testing.assert_close(mine, attend(query, keys, values, seen, 0.3), atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_old_vectors_are_what_the_codec_makes_of_them_and_the_newest_are_exact(name: str) -> None:
    keys, values = drawn(2, 3, 11, 8), drawn(2, 3, 11, 8, seed=1)
    slots = Slots(keys[:, :, 0], values[:, :, 0], 12, {}, codec=name, room=4)
    for first, last in [(0, 4), (4, 5), (5, 8), (8, 11)]:
        at = torch.arange(first, last).expand(2, -1)
        slots.append(keys[:, :, first:last], values[:, :, first:last], at)
    rounded = codec(name).fake(keys.flatten(0, 2)).view_as(keys)
    held = slots.keys.read(0, 11)
    assert torch.equal(held[:, :, :8], rounded[:, :, :8])
    assert torch.equal(held[:, :, 8:], keys[:, :, 8:])
    assert torch.equal(slots.values.read(9, 11), values[:, :, 9:11])

    chosen = torch.tensor([1, 5, 9, 10]).expand(2, 3, -1)
    slots.keep(chosen)
    assert torch.equal(slots.keys.read(0, 4), rounded[:, :, chosen[0, 0]])
    assert slots.pos[0, 0, :4].tolist() == [1, 5, 9, 10]
    slots.append(keys[:, :, :2], values[:, :, :2], torch.arange(2).expand(2, -1))
    slots.drop_last(1)
    slots.keep_last(2)
    assert torch.equal(slots.keys.read(0, 2), rounded[:, :, [10, 0]])


def test_a_codec_that_keeps_everything_changes_nothing(model: Any) -> None:
    model.float()
    ids = tokens(2, 40)
    for policy in (StreamingLLM(), KeyDiff(), SnapKV(queries=3)):
        with torch.no_grad():
            logits = []
            for name in (None, "fp32"):
                budget = bytes_for(model, policy, 12, chunk=5, batch=2, codec=name)
                with bounded(model, policy, budget, chunk=5, codec=name) as cache:
                    logits.append(model(ids, past_key_values=cache).logits)
        assert logits[0].std() > 0.1
        torch.testing.assert_close(logits[0], logits[1], atol=2e-4, rtol=0)


def test_fewer_bits_are_further_from_what_was_said(model: Any) -> None:
    model.float()
    ids = tokens(1, 60)
    error = {}
    with torch.no_grad():
        plain = model(ids).logits[:, -20:]
        for name in ("int8/row", "int4/group4", "int2/group4"):
            budget = bytes_for(model, StreamingLLM(), 80, chunk=4, codec=name)
            with bounded(model, StreamingLLM(), budget, chunk=4, codec=name) as cache:
                mine = model(ids, past_key_values=cache).logits[:, -20:]
            error[name] = ((mine - plain).norm() / plain.norm()).item()
    assert error["int8/row"] < 0.1
    assert error["int8/row"] < error["int4/group4"] / 2 < error["int2/group4"] / 3


def test_a_saved_cache_in_codes_goes_on_to_the_bit(model: Any, tmp_path: Any) -> None:
    model.float()
    ids, policy = tokens(1, 33), StreamingLLM()
    budget = bytes_for(model, policy, 12, chunk=5, codec="int8/row")
    with torch.no_grad(), bounded(model, policy, budget, chunk=5, codec="int8/row") as cache:
        model(ids[:, :28], past_key_values=cache)
        cache.save(tmp_path / "kept")
        here = model(ids[:, 28:], past_key_values=cache).logits
    with torch.no_grad(), bounded(model, policy, budget, chunk=5, codec="int8/row") as cache:
        cache.load(tmp_path / "kept")
        assert torch.equal(model(ids[:, 28:], past_key_values=cache).logits, here)
    with (
        bounded(model, policy, 2 * budget, chunk=5, codec="bf16") as cache,
        pytest.raises(InvalidKnob, match="another"),
    ):
        cache.load(tmp_path / "kept")


@pytest.mark.parametrize("name", ["int8/tensor", "int4/group3", "int8/row/stochastic", "nonsense"])
def test_codecs_that_cannot_hold_one_vector_alone_are_refused(model: Any, name: str) -> None:
    with (
        pytest.raises(InvalidKnob),
        bounded(model, StreamingLLM(), "1MiB", chunk=4, codec=name),
    ):
        pass


@pytest.mark.parametrize("policy", [StreamingLLM(), KeyDiff(), SnapKV()])
def test_a_long_text_in_codes_never_takes_more_than_the_budget(policy: Any) -> None:
    model = gemma().float()
    ids, chunk, n_slots = tokens(1, 700), 16, 320
    budget = bytes_for(model, policy, n_slots, chunk=chunk, codec="int8/row")
    with torch.no_grad():
        body, plain = model.get_decoder(), copy.deepcopy(model).get_decoder()

        def run() -> None:
            with bounded(model, policy, budget, chunk=chunk, codec="int8/row") as cache:
                for first in range(0, ids.shape[1], chunk):
                    body(ids[:, first : first + chunk], past_key_values=cache)
                assert min(layer.slots.n for layer in cache.slot_layers) >= n_slots
                assert isinstance(cache.slot_layers[0].slots.keys, Coded)
                assert bytes_of([layer.tensors() for layer in cache.bounded_layers]) <= budget

        n_seen = n_slots + 2 * chunk
        past = plain(ids[:, :n_seen], use_cache=True).past_key_values
        activations = peak(lambda: plain(ids[:, n_seen : n_seen + chunk], past_key_values=past))
        assert peak(run).peak_bytes - activations.peak_bytes <= budget


def test_eight_bits_hold_more_than_twice_the_slots() -> None:
    shape = Shape(
        ("full_attention",) * 16, n_heads=2, n_query_heads=8, width=64, window=0, itemsize=4
    )
    budget = budget_for(shape, StreamingLLM(), 4096, 128, 0, 1)
    coded = replace(shape, codec="int8/row")
    assert plan(coded, StreamingLLM(), budget, 128, 0, 1, Uniform()).n_slots[0] > 2 * 4096
