"""Control for forgetting: what was recalled least often goes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.records import Instant, Item, Op, Touch


@dataclass(frozen=True)
class Lfu(Policy):
    """Keep every turn; over the byte budget what was recalled least often goes first, oldest first.

    Attributes:
        strengthened: hits of a search, best first, that count as recalled.
    """

    card = Card(
        paper=None,
        claim="what the number of recalls alone is worth for forgetting",
        check="byte_stream",
        baseline="fifo",
        better="higher",
        margin=0.0,
        kind="control",
    )
    strengthened: int = 3

    def on_recall(self, step: Step) -> Sequence[Op]:
        return [Touch([c.item for c in step.found[: self.strengthened]])]

    def retention(self, items: Sequence[Item], now: Instant) -> Sequence[float]:
        return [float(item.uses) for item in items]

    def why_forgotten(self, item: Item, now: Instant) -> str:
        return f"recalled {item.uses} times"
