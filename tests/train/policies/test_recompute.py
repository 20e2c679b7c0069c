"""Recompute: only the inputs of blocks are kept."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwise.bench.training import ByteLM  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.engine.activations import compress_activations  # noqa: E402
from memwise.train.policies.recompute import Recompute  # noqa: E402


@pytest.mark.parametrize("every", [1, 2])
def test_blocks_keep_their_inputs_alone_and_gradients_are_equal(every: int) -> None:
    model, ids = ByteLM(32, 4, 2, 16), torch.arange(4 * 17).view(4, 17)
    model(ids).backward()
    exact = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with compress_activations(model, Recompute(every)) as tape:
        model(ids).backward()
    blocks = tape.report().by_action["recompute"]
    # The first block's input is the sum of two embeddings, which nobody else keeps.
    assert blocks.held_bytes == 4 // every * 4 * 16 * 32 * 4
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), exact, strict=True))


def test_a_step_of_zero_is_refused() -> None:
    with pytest.raises(InvalidKnob):
        Recompute(0)
