"""What queries retrieve, against the model's own attention weights."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import gemma, llama, tokens  # noqa: E402

from memwise.catalogue import load  # noqa: E402
from memwise.context.engine.host import bounded, bytes_for  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

N_TOKENS, CHUNK = 30, 7
each = pytest.mark.parametrize("name", ["attendre_often", "attendre_recent"])


def retrieved(model: Any, ids: Any, k: int) -> list[Any]:
    """Who retrieves whom (B, H, G, T, T) in each layer, from eager attention weights."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    found = []
    for probs in weights:
        at = probs.topk(k, -1).indices
        hits = torch.zeros_like(probs).scatter_(-1, at, 1.0) * (probs > 0)
        found.append(hits.unflatten(1, (2, -1)))
    return found


def columns(model: Any, ids: Any, policy: Any, column: str) -> dict[int, Any]:
    """A column of each full layer, after all tokens came in chunks and none went."""
    budget = bytes_for(model, policy, N_TOKENS, chunk=CHUNK, batch=len(ids))
    with torch.no_grad(), bounded(model, policy, budget, chunk=CHUNK) as cache:
        model(ids, past_key_values=cache)
    return {layer.index: layer.slots.columns[column][..., :N_TOKENS] for layer in cache.slot_layers}


@pytest.mark.parametrize("make", [llama, gemma])
def test_hits_are_the_queries_that_have_a_slot_among_their_best(make: Any) -> None:
    model, ids = make(), tokens(2, N_TOKENS)
    mine = columns(model, ids, load("context/attendre_often")(k=3), "hits")
    expected = retrieved(model, ids, 3)
    for layer, hits in mine.items():
        assert torch.equal(hits, expected[layer].sum((2, 3)).float())


def test_a_slot_was_used_when_the_last_chunk_that_retrieved_it_ended() -> None:
    model, ids = llama(), tokens(2, N_TOKENS)
    mine = columns(model, ids, load("context/attendre_recent")(k=2), "used")
    ends = torch.tensor([min(t // CHUNK * CHUNK + CHUNK, N_TOKENS) - 1 for t in range(N_TOKENS)])
    for hits, used in zip(retrieved(model, ids, 2), mine.values(), strict=True):
        last = (hits.amax(2) * (ends[:, None] + 1)).amax(2) - 1
        expected = torch.maximum(last, torch.arange(N_TOKENS).to(last))
        assert torch.equal(used, expected.float())


@each
def test_what_queries_retrieve_stays_and_the_newest_beside_it(name: str) -> None:
    policy = load(f"context/{name}")(k=2, recent=3)
    step = _Step(20)
    if name == "attendre_often":
        step["hits"][..., 4], step["hits"][..., 9] = 5.0, 2.0
    else:
        step["used"].copy_(step.pos)
        step["used"][..., 4], step["used"][..., 9] = 19.0, 18.0
    order = policy.score(step).flatten().argsort(descending=True).tolist()
    assert set(order[:3]) == {17, 18, 19}
    assert order[3:6] == [4, 9, 16]


class _Step(dict[str, Any]):
    """Slots of one head of which nothing is known."""

    def __init__(self, n: int) -> None:
        super().__init__(hits=torch.zeros(1, 1, n), used=torch.zeros(1, 1, n))
        self.pos = torch.arange(n, dtype=torch.int32)[None, None]


@each
@pytest.mark.parametrize("knobs", [{"k": 0}, {"recent": 0}, {"queries": 0}])
def test_knobs_below_one_are_refused(name: str, knobs: dict[str, int]) -> None:
    with pytest.raises(InvalidKnob, match="must be 1 or more"):
        load(f"context/{name}")(**knobs)
