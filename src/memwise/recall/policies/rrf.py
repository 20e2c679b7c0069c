"""Baseline: words and meaning, fused by rank."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.recall.engine.graph import rrf
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Ranking, Recipe
from memwise.recall.engine.retrieve import deeper


@dataclass(frozen=True)
class RRF(Policy):
    """Keep every turn and rank by reciprocal rank fusion of BM25 and cosine.

    Attributes:
        c: constant of 1 / (c + rank); the customary 60 lets the weaker arm win too often.
        depth: rows that each arm contributes.
    """

    card = Card(
        paper=None,
        claim="the customary fusion of words and vectors by their ranks",
        check="turn_ranking",
        baseline="dense",
        better="higher",
        margin=0.05,
        requires=("embed",),
        kind="baseline",
    )
    c: float = 5.0
    depth: int = 200

    def rank(self, step: Step) -> Ranking:
        query = deeper(step.query, self.depth)
        arms = [step.rank(recipe, query) for recipe in (Recipe.words(), Recipe.meaning())]
        return rrf([arm.rows for arm in arms], self.c, step.query.k)
