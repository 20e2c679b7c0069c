"""The engine's own recipe: what a memory does when no paper's policy is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Recipe
from memwise.recall.engine.records import Op


@dataclass(frozen=True)
class Plain(Policy):
    """Keep every turn, note the facts that rules find in it, rank by words, meaning and neighbours.

    `search` and `context` return turns; facts lift the turns they rest on and answer `facts()` and
    `timeline()`. What an assistant says is kept, but not taken for a fact.
    """

    recipe: ClassVar[Recipe] = Recipe(facts=0.3)

    def on_turns(self, step: Step) -> Sequence[Op]:
        return step.facts([turn for turn in step.turns if turn.actor != "assistant"])
