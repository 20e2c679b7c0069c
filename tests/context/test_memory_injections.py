"""Memory-Injections beside a sum over rows of the output layer."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.context.conftest import MODELS, tokens  # noqa: E402

from memwise.context.engine.editor import edited  # noqa: E402
from memwise.context.policies.memory_injections import MemoryInjections  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

EXACT = {"atol": 1e-12, "rtol": 0.0}


def _injected(model: Any, policy: Any, ids: Any) -> Any:
    with torch.no_grad(), edited(model, policy):
        return model(ids).logits


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_the_memory_is_added_to_what_attention_adds(kind: str) -> None:
    model, ids = MODELS[kind](), tokens(2, 9)
    vector = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    for token in (5, 9):  # each once, however often it comes
        vector += model.get_output_embeddings().weight[token].detach()
    if kind == "gemma":
        vector *= model.get_input_embeddings().embed_scale.item()
    block = model.model.layers[1]
    site = block.post_attention_layernorm if kind == "gemma" else block.self_attn.o_proj
    handle = site.register_forward_hook(lambda module, args, out: out + 3.0 * vector)
    with torch.no_grad():
        theirs = model(ids).logits
    handle.remove()
    policy = MemoryInjections(memories=((5, 9, 5),), layer=1, strength=3.0)
    torch.testing.assert_close(_injected(model, policy, ids), theirs, **EXACT)


def test_each_row_has_its_own_memory(model: Any) -> None:
    ids = tokens(2, 9)
    knobs = {"layer": 1, "strength": 2.0}
    both = _injected(model, MemoryInjections(memories=((5,), (7, 8)), **knobs), ids)
    for row, memory in enumerate(((5,), (7, 8))):
        alone = _injected(model, MemoryInjections(memories=(memory,), **knobs), ids[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], alone, **EXACT)


def test_no_memory_is_the_plain_model(model: Any) -> None:
    ids = tokens(2, 9)
    with torch.no_grad():
        plain = model(ids).logits
    torch.testing.assert_close(_injected(model, MemoryInjections(layer=1), ids), plain, **EXACT)


def test_layers_and_memories_that_do_not_fit_are_refused(model: Any) -> None:
    with pytest.raises(InvalidKnob, match="the first is 0"):
        MemoryInjections(layer=-1)
    with pytest.raises(InvalidKnob, match="layer=40"):
        edited(model, MemoryInjections(layer=40)).__enter__()
    three = MemoryInjections(memories=((5,),) * 3, layer=0)
    with pytest.raises(InvalidKnob, match="3 memories for a batch of 2"):
        _injected(model, three, tokens(2, 9))
