"""Baseline: Adafactor, whose second moment is a column times a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memwise.catalogue import Card
from memwise.train.engine import rules
from memwise.train.engine.optimizer import OptimizerPolicy


@dataclass(frozen=True)
class Adafactor(OptimizerPolicy):
    """Keep the mean square of the gradient of each row and each column of a matrix, in float32.

    What is dropped is all of the second moment that is not a column times a row, and the first
    moment. Steps are relative to the size of the weights: it wants a learning rate ten times
    AdamW's.
    """

    rule: ClassVar[rules.Rule] = rules.Adafactor()
    card = Card(
        paper=None,
        claim="n + d numbers of state for a matrix (n, d) (arXiv 1804.04235)",
        check="optimizer_states",
        baseline="adamw",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )
