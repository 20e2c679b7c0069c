"""Modes that tokens are folded into, against a loop over tokens in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import llama, tokens  # noqa: E402

from memwise.context.engine.host import bounded, bytes_for  # noqa: E402
from memwise.context.policies.camelot import CAMELoT  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

N_SLOTS, CHUNK = 20, 6


@dataclass(eq=False)
class Slot:
    """A token or a mode of one head."""

    key: Any
    value: Any
    written: int
    count: int = 1


def first_layer(model: Any, ids: list[int]) -> tuple[Any, Any]:
    """Bare keys and values (T, H, D), which there follow from the token alone."""
    layer = model.model.layers[0]
    seen = layer.input_layernorm(model.model.embed_tokens(torch.tensor(ids)))
    own = layer.self_attn
    return tuple(part(seen).view(len(ids), -1, own.head_dim) for part in (own.k_proj, own.v_proj))  # type: ignore[return-value]


def by_tokens(keys: Any, values: Any, policy: CAMELoT) -> tuple[list[Slot], list[Slot]]:
    """Modes and window of one head, after all tokens came in chunks."""
    n_modes = int(policy.share * N_SLOTS)
    modes: list[Slot] = []
    window: list[Slot] = []
    for first in range(0, len(keys), CHUNK):
        n_new = min(CHUNK, len(keys) - first)
        if len(modes) + len(window) + n_new > N_SLOTS + CHUNK:
            while len(modes) < n_modes:
                modes.append(window.pop(0))
            leaving = window[: len(window) - (N_SLOTS - n_modes)]
            window = window[len(leaving) :]
            before = [mode.key for mode in modes]
            folded: dict[int, list[Slot]] = {}
            novel = []
            for slot in leaving:
                cosines = [torch.cosine_similarity(slot.key, key, 0).item() for key in before]
                best = max(range(len(before)), key=cosines.__getitem__)
                if cosines[best] > policy.alike:
                    folded.setdefault(best, []).append(slot)
                else:
                    novel.append(slot)
            for best, slots in folded.items():
                mode = modes[best]
                for slot in slots:
                    c = mode.count
                    mode.key = (c * mode.key + slot.key) / (c + 1)
                    mode.value = (c * mode.value + slot.value) / (c + 1)
                    mode.count, mode.written = c + 1, slot.written
            modes += novel
            while len(modes) > n_modes:
                modes.remove(min(modes, key=lambda mode: mode.written))
        window += [Slot(keys[t], values[t], t) for t in range(first, first + n_new)]
    return modes, window


@pytest.mark.parametrize(("alike", "share"), [(0.3, 0.5), (0.6, 0.25), (1.0, 0.5), (0.0, 0.8)])
@torch.no_grad()
def test_slots_are_the_running_means_of_a_loop_over_tokens(alike: float, share: float) -> None:
    model, policy = llama(), CAMELoT(alike=alike, share=share)
    ids = 2 + torch.randperm(59, generator=torch.Generator().manual_seed(0))[None]  # no two alike
    with bounded(model, policy, bytes_for(model, policy, N_SLOTS, chunk=CHUNK), chunk=CHUNK) as kv:
        model(ids, past_key_values=kv)
        slots = kv.slot_layers[0].slots
    keys, values = first_layer(model, ids[0].tolist())
    for head in range(keys.shape[1]):
        modes, window = by_tokens(keys[:, head], values[:, head], policy)
        expected = modes + window
        assert slots.n == len(expected)
        mine = slots.keys.read(0, slots.n)[0, head], slots.values.read(0, slots.n)[0, head]
        theirs = (torch.stack([getattr(s, name) for s in expected]) for name in ("key", "value"))
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
        counts = slots.columns["count"][0, head, : slots.n].tolist()
        assert counts == [slot.count for slot in expected]


@torch.no_grad()
def test_modes_stand_right_before_the_window() -> None:
    model, policy, ids = llama(), CAMELoT(alike=0.3), tokens(2, 90)
    budget = bytes_for(model, policy, N_SLOTS, chunk=CHUNK, batch=2)
    with bounded(model, policy, budget, chunk=CHUNK) as kv:
        model(ids, past_key_values=kv)
        kv.compress()
        for layer in kv.slot_layers:
            place = layer.slots.place[:, :, : layer.slots.n]
            assert (place[:, :, :10] == 79).all()
            assert place[:, :, 10:].eq(torch.arange(80, 90)).all()


@torch.no_grad()
def test_padding_is_folded_into_nothing() -> None:
    """It goes first, and no token is counted twice for it."""
    model, policy, ids = llama(), CAMELoT(alike=0.3), tokens(1, 90)
    mask = torch.ones(1, 96, dtype=torch.long)
    mask[:, :6] = 0
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    budget = bytes_for(model, policy, N_SLOTS, chunk=CHUNK)
    with bounded(model, policy, budget, chunk=CHUNK) as kv:
        model(padded, attention_mask=mask, position_ids=at, past_key_values=kv)
        kv.compress()
        for layer in kv.slot_layers:
            total = layer.slots.columns["count"][:, :, : layer.slots.n]
            assert layer.slots.pos[:, :, : layer.slots.n].min() >= 0
            assert total.max() > 1
            assert total.sum(-1).max() <= 90


@pytest.mark.parametrize("knobs", [{"alike": 1.5}, {"alike": -0.1}, {"share": 2.0}])
def test_knobs_outside_of_zero_and_one_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(InvalidKnob, match="from 0 to 1"):
        CAMELoT(**knobs)
