"""Control: every token stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class FullCache(CachePolicy):
    """Keep everything, also beyond the trained length; where it does not fit, the newest stay."""

    card = Card(
        paper=None,
        claim="what a cache without a budget gives: 0 tokens are dropped",
        check="needle_blind",
        baseline="random",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="control",
    )

    any_length = True

    def score(self, step: Step) -> Tensor:
        """The newer the better."""
        return step.pos.float()
