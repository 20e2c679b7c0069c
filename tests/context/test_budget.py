"""The budget holds at every moment: what a bounded cache adds, by the profiler's running sum."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import gemma, methods_of, tokens  # noqa: E402

from memwise.catalogue import load  # noqa: E402
from memwise.context.engine.host import bounded, bytes_for  # noqa: E402
from memwise.context.engine.policy import CachePolicy  # noqa: E402
from memwise.train.measure import bytes_of, peak  # noqa: E402

N_SLOTS, CHUNK = 192, 16


@pytest.mark.parametrize("name", methods_of(CachePolicy))
def test_a_long_text_never_takes_more_than_the_budget(name: str) -> None:
    """The peak of a long text in chunks, less that of one chunk's own activations."""
    model, policy = gemma(), load(f"context/{name}")()
    ids = tokens(1, 480)
    budget = bytes_for(model, policy, N_SLOTS, chunk=CHUNK)
    # All logits of the text, and hidden states, are the caller's.
    with torch.no_grad():
        body, plain = model.get_decoder(), copy.deepcopy(model).get_decoder()

        def bounded_run() -> None:
            with bounded(model, policy, budget, chunk=CHUNK) as cache:
                for first in range(0, ids.shape[1], CHUNK):
                    body(ids[:, first : first + CHUNK], past_key_values=cache)
                assert max(layer.slots.n for layer in cache.slot_layers) <= N_SLOTS + CHUNK + len(
                    cache.probe
                )
                assert bytes_of([layer.tensors() for layer in cache.bounded_layers]) <= budget

        # Attention over as many slots makes logits, masks and activations in any case.
        n_seen = N_SLOTS + 2 * CHUNK
        past = plain(ids[:, :n_seen], use_cache=True).past_key_values
        activations = peak(lambda: plain(ids[:, n_seen : n_seen + CHUNK], past_key_values=past))
        assert peak(bounded_run).peak_bytes - activations.peak_bytes <= budget
