"""Means of surprisal over passages: the same however the text came in pieces."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import llama, tokens  # noqa: E402

from memwise.context.engine.host import bounded, bytes_for  # noqa: E402
from memwise.context.policies.surprising_passages import SurprisingPassages  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402


@pytest.mark.parametrize("pieces", [(60,), (7, 16, 1, 1, 1, 30, 4)])
def test_a_token_is_worth_the_mean_around_it(pieces: tuple[int, ...]) -> None:
    """Against a plain loop over the surprisal of the whole text."""
    model, ids, policy = llama(), tokens(1, 60), SurprisingPassages(width=9)
    with torch.no_grad():
        logp = model(ids).logits[0].log_softmax(-1)
        budget = bytes_for(model, policy, 64, chunk=16)
        with bounded(model, policy, budget, chunk=16) as cache:
            first = 0
            for n in pieces:
                model(ids[:, first : first + n], past_key_values=cache)
                first += n
            found = cache.slot_layers[0].slots.columns["passage"][0, 0, :60].double()
    root = [0.0] + [float(-logp[t - 1, ids[0, t]]) ** 0.5 for t in range(1, 60)]
    naive = [sum(root[max(0, t - 4) : t + 5]) / 9 for t in range(60)]
    torch.testing.assert_close(found, torch.tensor(naive).double(), atol=1e-5, rtol=0)


def test_dropped_neighbours_have_counted_before_they_went() -> None:
    model, ids, policy = llama(), tokens(1, 300), SurprisingPassages(width=9, kernel=1)
    tables = []
    for n_slots in (40, 320):
        budget = bytes_for(model, policy, n_slots, chunk=16)
        with torch.no_grad(), bounded(model, policy, budget, chunk=16) as cache:
            model(ids[:, :48], past_key_values=cache)
            cache.compress()
            slots = cache.slot_layers[0].slots
            worth = slots.columns["passage"][0, 0, : slots.n].tolist()
            tables.append(dict(zip(slots.pos[0, 0, : slots.n].tolist(), worth, strict=True)))
    few, all_ = tables
    assert len(few) == 40
    assert few == {at: pytest.approx(all_[at]) for at in few}
    chosen = sorted(few)[4:-4]
    dropped = [all_[at] for at in all_ if at not in few]
    assert min(few[at] for at in chosen) >= max(dropped)


@pytest.mark.parametrize("knobs", [{"width": 8}, {"width": 0}, {"kernel": 0}, {"sinks": 0}])
def test_widths_without_a_middle_and_knobs_below_one_are_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(InvalidKnob):
        SurprisingPassages(**knobs)
