"""Baseline for timelines: the same memories, each for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from memwise.catalogue import Card
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Recipe
from memwise.recall.engine.records import Add, Op


@dataclass(frozen=True)
class IsolatedMemories(Policy):
    """Keep every sentence that the extractor finds, with its speaker and time; link nothing."""

    card = Card(
        paper=None,
        claim="holds the old and the new value of a change only where both resemble the question",
        check="timelines",
        baseline="theanine",
        better="lower",
        margin=0.0,
        kind="baseline",
    )
    recipe: ClassVar[Recipe] = Recipe(kinds=("fact",))

    def on_turns(self, step: Step) -> Sequence[Op]:
        return [
            Add(
                "fact", fact.text, sources=(turn := step.turns[fact.source],), actor=turn.actor,
                at=turn.at if fact.valid_from is None else fact.valid_from, session=turn.session,
                extractor=step.extract.name,
                data={"subject": fact.subject, "relation": fact.relation, "object": fact.object},
            )
            for fact in step.extract.facts(step.turns)
        ]  # fmt: skip
