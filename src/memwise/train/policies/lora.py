"""Two thin trained matrices beside every frozen one."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.train.engine.adapters import AdapterPolicy, Site
from memwise.train.engine.deltas import LowRank


@dataclass(frozen=True)
class LoRA(AdapterPolicy):
    """Freeze the weights as they are and train W + (alpha / rank) B A (Hu et al. 2021).

    Kept for the backward pass: the inputs of each map. Dropped: gradients and optimizer states of
    all but A and B.

    Attributes:
        rank: of the change.
        alpha: its factor, times the rank.
    """

    card = Card(
        paper=None,
        claim="the quality of full tuning from under 1 % of the numbers",
        check="adapters",
        baseline="lora",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )
    rank: int = 8
    alpha: float = 16.0

    def delta(self, site: Site) -> LowRank:
        return LowRank(site.base.shape, self.rank, self.alpha, site.draws, site.dtype)
