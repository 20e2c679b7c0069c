"""Baseline: stochastic gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memwise.catalogue import Card
from memwise.train.engine import rules
from memwise.train.engine.optimizer import OptimizerPolicy


@dataclass(frozen=True)
class SGDM(OptimizerPolicy):
    """Keep one faded sum of the gradients in float32, four bytes a number."""

    rule: ClassVar[rules.Rule] = rules.SGDM()
    card = Card(
        paper=None,
        claim="the steps of torch's SGD with momentum",
        check="optimizer_states",
        baseline="adamw",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )
