"""Baseline for facts: every one that was ever written stays, and nothing closes another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memwise.catalogue import Card
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Recipe
from memwise.recall.engine.records import Op


@dataclass(frozen=True)
class AppendOnly(Policy):
    """Keep every fact that was written; what is outdated stands beside what replaced it.

    A question is answered by the fact that is most like it.
    """

    card = Card(
        paper=None,
        claim="precision of what is kept decays with every session",
        check="bitemporal",
        baseline="last_write_wins",
        better="higher",
        margin=0.0,
        kind="baseline",
    )
    recipe = Recipe(kinds=("fact",))

    def on_turns(self, step: Step) -> Sequence[Op]:
        return [
            replace(fact, valid_from=None, valid_to=None, vector=True)
            for fact in step.facts(step.turns)
        ]
