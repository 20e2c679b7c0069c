"""Baseline: plain autograd."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.train.engine.activations import ActivationPolicy


@dataclass(frozen=True)
class Keep(ActivationPolicy):
    """Keep what autograd keeps, from the forward to the backward pass; drop nothing."""

    card = Card(
        paper=None,
        claim="what torch's autograd keeps",
        check="activations",
        baseline="recompute",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )
