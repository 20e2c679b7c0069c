"""The editor: a policy changes what passes through a model, and nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.context.conftest import MODELS, SIZES, methods_of, tokens  # noqa: E402

from memwise.catalogue import load  # noqa: E402
from memwise.context.engine.edit import Edit, EditPolicy, Pass, Rows  # noqa: E402
from memwise.context.engine.editor import edited  # noqa: E402
from memwise.context.engine.host import bounded, bytes_for  # noqa: E402
from memwise.context.engine.ring import HiddenRing  # noqa: E402
from memwise.context.policies.streaming_llm import StreamingLLM  # noqa: E402
from memwise.errors import BudgetExceeded, InvalidKnob, UnsupportedModel  # noqa: E402

EXACT = {"atol": 1e-12, "rtol": 0.0}
METHODS = [f"context/{name}" for name in methods_of(EditPolicy)]


@dataclass(frozen=True)
class Same(EditPolicy):
    """Gives back all that it is given."""

    def edit_probs(self, rows: Rows) -> Any:
        return rows.probs

    def edit_output(self, edit: Edit) -> Any:
        return edit.states

    def edit_hidden(self, edit: Edit) -> Any:
        return edit.states


@dataclass(frozen=True)
class Blind(EditPolicy):
    """Nobody but itself sees one token."""

    token: int = 3

    def edit_probs(self, rows: Rows) -> Any:
        hidden = (rows.keys_at == self.token)[:, None, None]
        hidden = hidden & (rows.at != self.token)[:, None, :, None]
        probs = rows.probs.masked_fill(hidden, 0.0)
        return probs / probs.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Adds(EditPolicy):
    """Adds a number to what a layer's attention gives, or to what enters it."""

    layer: int = 1
    output: float = 0.0
    hidden: float = 0.0

    def layers(self, n_layers: int) -> Any:
        return (self.layer,)

    def edit_output(self, edit: Edit) -> Any:
        return edit.states + self.output if self.output else None

    def edit_hidden(self, edit: Edit) -> Any:
        return edit.states + self.hidden if self.hidden else None


@dataclass(frozen=True)
class Remembers(EditPolicy):
    """Remembers tokens of even numbers and changes nothing."""

    def memory_layers(self, n_layers: int) -> Any:
        return (1, 2)

    def remember(self, passed: Pass) -> Any:
        return passed.ids % 2 == 0


def _logits(model: Any, ids: Any, **rest: Any) -> Any:
    with torch.no_grad():
        return model(ids, **rest).logits


def _edited(model: Any, policy: Any, ids: Any, **rest: Any) -> Any:
    with edited(model, policy):
        return _logits(model, ids, **rest)


def _strength_zero(name: str) -> tuple[Any, dict[str, Any]]:
    policy = load(name)(strength=0.0)
    return policy, {"budget": "64KiB"} if policy.memory_layers(3) else {}


@pytest.mark.parametrize("name", METHODS)
def test_strength_zero_is_the_plain_model(model: Any, name: str) -> None:
    ids = tokens(2, 30)
    policy, rest = _strength_zero(name)
    if hasattr(policy, "memories"):
        policy = type(policy)(memories=((3, 4),), layer=1, strength=0.0)
    with edited(model, policy, **rest):
        first = _logits(model, ids)
    torch.testing.assert_close(first, _logits(model, ids), **EXACT)


def test_what_is_given_back_as_it_was_changes_nothing(model: Any) -> None:
    ids = tokens(2, 30)
    torch.testing.assert_close(_edited(model, Same(), ids), _logits(model, ids), **EXACT)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_an_edit_of_probabilities_is_what_a_mask_does(kind: str) -> None:
    model, ids, n = MODELS[kind](), tokens(2, 70), 70
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    seen[4:, 3] = False
    near = seen.triu(-7)  # a window of 8
    full, slide = (m[None, None].expand(2, 1, n, n) for m in (seen, near))
    mask = full if kind == "llama" else {"full_attention": full, "sliding_attention": slide}
    theirs = _logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(_edited(model, Blind(), ids), theirs, **EXACT)


def test_an_added_output_is_added_to_the_hidden_states() -> None:
    model, ids = MODELS["llama"](), tokens(1, 9)
    layer = model.model.layers[1].self_attn.o_proj
    layer.bias = torch.nn.Parameter(torch.full((SIZES["hidden_size"],), 0.3, dtype=torch.float64))
    theirs = _logits(model, ids)
    layer.bias = None
    torch.testing.assert_close(_edited(model, Adds(output=0.3), ids), theirs, **EXACT)


def test_an_added_output_is_added_after_the_norm_that_follows_attention() -> None:
    model, ids = MODELS["gemma"](), tokens(1, 9)
    norm = model.model.layers[1].post_attention_layernorm
    handle = norm.register_forward_hook(lambda module, args, out: out + 0.3)
    theirs = _logits(model, ids)
    handle.remove()
    torch.testing.assert_close(_edited(model, Adds(output=0.3), ids), theirs, **EXACT)


def test_hidden_states_are_those_that_enter_the_layer(model: Any) -> None:
    ids = tokens(2, 9)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids) + 0.5
    theirs = _logits(model, None, inputs_embeds=embeds)
    mine = _edited(model, Adds(layer=0, hidden=0.5), ids)
    torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("policy", [Blind(), Adds(output=0.3), Adds(hidden=0.3)])
def test_decoding_with_a_cache_is_the_same_as_all_at_once(model: Any, policy: Any) -> None:
    ids, cache, parts = tokens(2, 24), transformers.DynamicCache(config=model.config), []
    with edited(model, policy):
        for first, end in ((0, 10), (10, 17), *((i, i + 1) for i in range(17, 24))):
            parts.append(_logits(model, ids[:, first:end], past_key_values=cache))
    torch.testing.assert_close(torch.cat(parts, 1), _edited(model, policy, ids), **EXACT)


@pytest.mark.parametrize("policy", [Blind(), Adds(output=0.3)])
def test_padded_rows_are_as_they_are_alone(model: Any, policy: Any) -> None:
    ids = tokens(2, 14)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    at = (mask.cumsum(1) - 1).clamp_min(0)
    both = _edited(model, policy, ids, attention_mask=mask, position_ids=at)
    alone = _edited(model, policy, ids[1:, 5:])
    torch.testing.assert_close(both[1:, 5:], alone, **EXACT)


def test_generate_goes_through_the_policy(model: Any) -> None:
    ids, policy, given = tokens(2, 12), Blind(), tokens(2, 12)
    for _ in range(5):
        best = _edited(model, policy, given)[:, -1:].argmax(-1)
        given = torch.cat([given, best], 1)
    with edited(model, policy):
        found = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, given)


def test_the_model_is_as_it_was_afterwards_also_after_an_error(model: Any) -> None:
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="halt"), edited(model, Same()):
        raise RuntimeError("halt")
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert model.config._attn_implementation == before
    assert not hooks
    assert "forward" not in vars(model.get_decoder())


def test_two_policies_edit_together_unless_both_edit_probabilities(model: Any) -> None:
    ids = tokens(1, 9)
    with edited(model, Blind()), edited(model, Adds(output=0.3)):
        inner = _logits(model, ids)
    with edited(model, Adds(output=0.3)), edited(model, Blind()):
        torch.testing.assert_close(_logits(model, ids), inner, **EXACT)
    with (
        edited(model, Blind()), edited(model, Same()),
        pytest.raises(InvalidKnob, match="already"),
    ):  # fmt: skip
        _logits(model, ids)


def test_a_bounded_cache_works_inside_and_keeps_its_exactness(model: Any) -> None:
    ids, policy = tokens(1, 40), Adds(hidden=0.3)
    budget = bytes_for(model, StreamingLLM(), 60, chunk=8)
    with edited(model, policy), bounded(model, StreamingLLM(), budget, chunk=8) as cache:
        mine = _logits(model, ids, past_key_values=cache)
    torch.testing.assert_close(mine, _edited(model, policy, ids), **EXACT)


def test_what_would_be_edited_in_silence_is_refused(model: Any) -> None:
    ids, budget = tokens(1, 9), bytes_for(model, StreamingLLM(), 60)
    with (
        edited(model, Blind()), bounded(model, StreamingLLM(), budget) as cache,
        pytest.raises(InvalidKnob, match="not the editor's"),
    ):  # fmt: skip
        _logits(model, ids, past_key_values=cache)
    with bounded(model, StreamingLLM(), budget), pytest.raises(InvalidKnob, match="bounded"):
        edited(model, Blind()).__enter__()
    with edited(model, Blind()), pytest.raises(InvalidKnob, match="attention_mask"):
        _logits(model, ids, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))


def test_models_of_another_kind_are_refused() -> None:
    config = transformers.T5Config(
        d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=9
    )
    with pytest.raises(UnsupportedModel):
        edited(transformers.T5ForConditionalGeneration(config), Same()).__enter__()


def test_a_decoder_alone_is_edited_unless_its_words_are_needed(model: Any) -> None:
    ids, decoder = tokens(1, 9), model.get_decoder()
    with torch.no_grad(), edited(decoder, Adds(hidden=0.3)):
        decoder(ids)
    policy = load("context/memory_injections")(memories=((5,),), layer=0)
    with edited(decoder, policy), pytest.raises(UnsupportedModel, match="output layer"):
        decoder(ids)


# --- what is remembered


def test_a_ring_holds_the_states_of_chosen_tokens(model: Any) -> None:
    ids = tokens(2, 12)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    with edited(model, Remembers(), budget="64KiB") as editor:
        _logits(model, ids)
    ring = editor.memory
    assert ring is not None
    for row in range(2):
        held = [t for t in range(12) if ids[row, t] % 2 == 0]
        assert ring.at[row][: len(held)].tolist() == held
        assert (ring.at[row][len(held) :] == -1).all()
        for layer in (1, 2):
            mine = ring.states(layer)[row, : len(held)]
            torch.testing.assert_close(mine, states[layer][row, held], **EXACT)


def test_a_ring_is_the_same_token_by_token_and_overwrites_the_oldest(model: Any) -> None:
    ids, rings = tokens(1, 20), []
    budget = 5 * (2 * 32 * 8 + 8) + 32 * 8 + 8  # five places
    for step in (20, 7, 1):
        cache = transformers.DynamicCache(config=model.config)
        with edited(model, Remembers(), budget=budget) as editor:
            for first in range(0, 20, step):
                _logits(model, ids[:, first : first + step], past_key_values=cache)
        rings.append(editor.memory)
    newest = [t for t in range(20) if ids[0, t] % 2 == 0][-5:]
    for ring in rings:
        assert sorted(ring.at[0].tolist()) == newest
        torch.testing.assert_close(ring.states(1), rings[0].states(1), **EXACT)
        assert ring.n_bytes <= budget
        assert ring.n_places == 5


def test_a_ring_is_counted_cleared_copied_and_handed_on(model: Any) -> None:
    ids = tokens(1, 8)
    with edited(model, Remembers(), budget="8KiB") as editor:
        assert editor.memory.n_bytes == 0
        _logits(model, ids)
    ring, copied = editor.memory, editor.memory.clone()
    assert 0 < ring.n_bytes <= 8192
    assert ring.n_bytes == sum(now for _, _, now, _ in ring.ledger)
    ring.reset()
    assert ring.n_bytes == 0
    assert copied.n_seen == 8
    with edited(model, Remembers(), memory=copied) as again:
        _logits(model, ids)
    assert again.memory is copied
    assert copied.n_seen == 16


def test_a_ring_says_what_does_not_fit(model: Any) -> None:
    with edited(model, Remembers(), budget="1KiB"), pytest.raises(BudgetExceeded, match="budget="):
        _logits(model, tokens(2, 8))
    with edited(model, Remembers(), budget="64KiB"):
        _logits(model, tokens(2, 8))
        with pytest.raises(InvalidKnob, match="reset"):
            _logits(model, tokens(1, 8))
    for rest in ({}, {"budget": "1KiB", "memory": HiddenRing((1, 2), 32, "1KiB")}):
        with pytest.raises(InvalidKnob, match="give budget="):
            edited(model, Remembers(), **rest).__enter__()
    with pytest.raises(InvalidKnob, match="remembers nothing"):
        edited(model, Same(), budget="1KiB").__enter__()
    with pytest.raises(InvalidKnob, match="wants layers"):
        edited(model, Remembers(), memory=HiddenRing((1,), 32, "1KiB")).__enter__()
