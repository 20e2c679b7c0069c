"""Baseline: room for the longest text that a request may have."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.budget import BudgetLike
from memwise.catalogue import Card
from memwise.context.engine.scheduler import BatchScheduler, Reserving


@dataclass(frozen=True)
class WorstCaseReservation(Reserving):
    """Keep room for every token up to a request's limit, so that none ever gives way."""

    card = Card(
        paper=None,
        claim="what reserving for the longest text gives: 1 times its tokens a second",
        check="batch_admission",
        baseline="worst_case_reservation",
        better="higher",
        margin=0.0,
        kind="baseline",
    )

    def __call__(self, budget: BudgetLike, token_bytes: int) -> BatchScheduler:
        """A scheduler under a budget of keys and values.

        Args:
            budget: in bytes.
            token_bytes: keys and values of one token in all layers.
        """
        return BatchScheduler(self, budget, token_bytes)
