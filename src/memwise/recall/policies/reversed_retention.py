"""Ablation of MemoryBank: its curve with strength on the wrong side of the fraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.records import Instant, Item, Op, Touch


@dataclass(frozen=True)
class ReversedRetention(Policy):
    """Forget by R = exp(-t S): what is recalled often fades *faster*.

    This is what exp(-t / 5 * S) does when a programming language reads it from left to right.

    Attributes:
        strengthened: hits of a search, best first, that count as recalled.
    """

    card = Card(
        paper=None,
        claim="keeps less of the re-asked evidence than the curve as it was meant",
        check="byte_stream",
        baseline="fifo",
        better="lower",
        margin=0.0,
        kind="control",
    )
    strengthened: int = 3

    def on_recall(self, step: Step) -> Sequence[Op]:
        return [Touch([c.item for c in step.found[: self.strengthened]])]

    def retention(self, items: Sequence[Item], now: Instant) -> Sequence[float]:
        return [-max(0, now - item.last_use) * item.strength for item in items]

    def why_forgotten(self, item: Item, now: Instant) -> str:
        return f"strength {item.strength:.0f}, the curve reversed"
