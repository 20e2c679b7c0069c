"""Baseline: words alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memwise.catalogue import Card
from memwise.recall.engine.policy import Policy
from memwise.recall.engine.rank import Recipe


@dataclass(frozen=True)
class BM25(Policy):
    """Keep every turn and rank by Okapi BM25 over stems."""

    card = Card(
        paper=None,
        claim="what the words alone are worth",
        check="turn_ranking",
        baseline="random_recall",
        better="higher",
        margin=0.1,
        kind="baseline",
    )
    recipe: ClassVar[Recipe] = Recipe.words()
