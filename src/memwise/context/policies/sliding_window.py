"""Baseline: the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class SlidingWindow(CachePolicy):
    """Keep the newest tokens; all older ones are dropped when slots are full."""

    card = Card(
        paper=None,
        claim="attention on the newest tokens alone: 0 memory of the first",
        check="needle",
        baseline="random",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    any_length = True

    @property
    def floor(self) -> int:
        """One."""
        return 1

    def score(self, step: Step) -> Tensor:
        """The newer the better."""
        return step.pos.float()
