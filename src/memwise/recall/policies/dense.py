"""Baseline: meaning alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memwise.catalogue import Card
from memwise.recall.engine.policy import Policy
from memwise.recall.engine.rank import Recipe


@dataclass(frozen=True)
class Dense(Policy):
    """Keep every turn and rank by the cosine of its vector with the query's."""

    card = Card(
        paper=None,
        claim="what the vectors alone are worth",
        check="turn_ranking",
        baseline="random_recall",
        better="higher",
        margin=0.1,
        requires=("embed",),
        kind="baseline",
    )
    recipe: ClassVar[Recipe] = Recipe.meaning()
