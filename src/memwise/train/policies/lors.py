"""Tune a pruned model so that it stays pruned, without a dense matrix in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.train.engine.adapters import AdapterPolicy, Site
from memwise.train.engine.deltas import MaskedLowRank


@dataclass(frozen=True)
class LoRS(AdapterPolicy):
    """Train W + M * (B A) on a pruned W, where M tells its weights that are not zero.

    Kept for the backward pass: the inputs, A and B. Dropped: the masked product, which is formed
    again in blocks of rows, and the mask in the gradient of A and B (straight through), so that no
    gradient has the size of a weight. After merging, every zero is still a zero.

    Attributes:
        rank: of the change before it is masked.
        alpha: its factor, times the rank.

    Note:
        A starts random and B at zero, as in LoRA; the paper starts A from the first gradient.
    """

    card = Card(
        paper=63,
        claim="40 % less training memory than SPP and SQFT at 50 % sparsity, higher accuracy",
        check="adapt_sparse",
        baseline="lora",
        better="lower",
        margin=0.01,
        requires=("torch",),
    )
    rank: int = 8
    alpha: float = 16.0

    def delta(self, site: Site) -> MaskedLowRank:
        return MaskedLowRank(site.base.shape, self.rank, self.alpha, site.draws, site.dtype)
