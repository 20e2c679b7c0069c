"""Control for forgetting: what was recalled least recently goes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.records import Instant, Item, Op, Touch


@dataclass(frozen=True)
class Lru(Policy):
    """Keep every turn; over the byte budget the least recently recalled or told goes first.

    Attributes:
        strengthened: hits of a search, best first, that count as recalled.
    """

    card = Card(
        paper=None,
        claim="what the time of the last recall alone is worth for forgetting",
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
        return [float(item.last_use) for item in items]

    def why_forgotten(self, item: Item, now: Instant) -> str:
        return f"last used {(now - item.last_use) / 86_400e6:.1f} days ago"
