"""Baseline for facts: one value a subject and relation, and the newest write is it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memwise.catalogue import Card
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Recipe
from memwise.recall.engine.records import Add, Expire, Item, Op


@dataclass(frozen=True)
class LastWriteWins(Policy):
    """Keep one fact for each subject and functional relation: whatever was written last.

    When a fact was true is not asked, so what comes late counts as news. Other relations keep all
    that is written.
    """

    card = Card(
        paper=None,
        claim="at most 60 % of questions on changing values, when writes come out of order",
        check="bitemporal",
        baseline="append_only",
        better="higher",
        margin=0.0,
        kind="baseline",
    )
    recipe = Recipe(kinds=("fact",))

    def on_turns(self, step: Step) -> Sequence[Op]:
        facts = [
            replace(fact, valid_from=None, valid_to=None, vector=True)
            for fact in step.facts(step.turns)
        ]
        held: dict[tuple[str, str], Item | Add] = {
            _slot(item): item for item in step.about({fact.actor for fact in facts}, "fact")
        }
        ops: list[Op] = []
        for fact in facts:
            if fact.data["functional"]:
                if _slot(fact) in held:
                    ops.append(Expire(held[_slot(fact)], "overwritten"))
                held[_slot(fact)] = fact
            ops.append(fact)
        return ops


def _slot(fact: Item | Add) -> tuple[str, str]:
    return fact.actor.casefold(), str(fact.data["relation"])
