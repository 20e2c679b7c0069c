"""Full-rank changes from frozen random bases that all layers share."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.train.engine.adapters import AdapterPolicy, Site
from memwise.train.engine.deltas import RandomBases, RandomFullRank


@dataclass(frozen=True)
class RandLoRA(AdapterPolicy):
    """Train only how random matrices of low rank are weighted in a sum of full rank.

    dW = (alpha / rank) sum_j B_j diag(lam_j) A diag(gam_j), j up to ceil(min(O, I) / rank). Kept:
    lam and gam of each layer, and the seed. Dropped: A and B_j from every checkpoint, since they
    are drawn again; in memory they exist once, and layers take slices.

    Attributes:
        rank: of each base; a smaller one means more bases and more trained numbers.
        alpha: factor of the sum, times the rank.

    Note:
        The bases are dense and uniform; the paper's sparse ternary ones are left out.
    """

    card = Card(
        paper=66,
        claim="closes much of LoRA's gap to full tuning, at equal numbers: full rank, not rank 32",
        check="adapt_rank",
        baseline="lora",
        better="lower",
        margin=0.05,
        requires=("torch",),
    )
    rank: int = 32
    alpha: float = 640.0

    def delta(self, site: Site) -> RandomFullRank:
        if "bases" not in site.common:
            shapes = list(site.shapes)
            site.common["bases"] = RandomBases(shapes, self.rank, site.seed, site.dtype)
        return RandomFullRank(site.base.shape, site.common["bases"], self.alpha / self.rank)
