"""Baseline: Adam on gradients that are projected on their leading singular vectors (GaLore)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.train.engine.optimizer import OptimizerPolicy
from memwise.train.engine.subspace import Refitted, fits


@dataclass(frozen=True)
class GaLore(OptimizerPolicy):
    """Keep both moments of a gradient's projection, and the basis that it is projected on.

    The basis is the leading singular vectors, on the shorter side, of the gradient every `gap`
    steps. What is dropped is the part of each gradient outside of it. Vectors, and matrices that
    are no larger than the subspace, are trained as by AdamW.

    Attributes:
        rank: columns of the basis.
        gap: steps from fit to fit.
        scale: factor of the steps in the subspace.

    Raises:
        InvalidKnob: rank or gap is below 1.

    Note:
        Zhao et al. 2024, arXiv 2403.03507. A randomized range finder takes the place of the full
        SVD, whose workspace would cost more than the states that are saved.
    """

    rank: int = 64
    gap: int = 200
    scale: float = 0.25

    card = Card(
        paper=None,
        claim="pre-training near full rank with a fraction of the states",
        check="low_rank_gradients",
        baseline="adamw",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    def __post_init__(self) -> None:
        if self.rank < 1 or self.gap < 1:
            raise InvalidKnob(f"rank={self.rank}, gap={self.gap}: give at least 1")

    def subspace(self, shape: Sequence[int]) -> Refitted | None:
        return Refitted(self.rank, self.scale, gap=self.gap) if fits(shape, self.rank) else None
