"""Baseline: AdamW with both moments in float32."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.train.engine.optimizer import OptimizerPolicy


@dataclass(frozen=True)
class AdamW(OptimizerPolicy):
    """Keep both moments of every parameter in float32: eight bytes a number; drop nothing."""

    card = Card(
        paper=None,
        claim="the steps of torch's fused AdamW",
        check="optimizer_states",
        baseline="lion",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )
