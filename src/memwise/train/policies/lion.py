"""Baseline: Lion, whose only state is one momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memwise.catalogue import Card
from memwise.train.engine import rules
from memwise.train.engine.optimizer import OptimizerPolicy


@dataclass(frozen=True)
class Lion(OptimizerPolicy):
    """Keep one momentum in float32, four bytes a number; move by the sign of its interpolation.

    It wants a learning rate three to ten times smaller than AdamW's.
    """

    rule: ClassVar[rules.Rule] = rules.Lion()
    card = Card(
        paper=None,
        claim="half of AdamW's states (arXiv 2302.06675)",
        check="optimizer_states",
        baseline="adamw",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )
