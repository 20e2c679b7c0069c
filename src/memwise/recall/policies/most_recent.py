"""Control: what was said last."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.recall.engine.graph import admitted
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Ranking
from memwise.recall.engine.records import SOURCES


@dataclass(frozen=True)
class MostRecent(Policy):
    """Keep every turn and return the newest ones, whatever is asked."""

    card = Card(
        paper=None,
        claim="what the newest turns are worth to a question",
        check="turn_ranking",
        baseline="random_recall",
        better="higher",
        margin=0.0,
        kind="control",
    )

    def rank(self, step: Step) -> Ranking:
        turns = admitted(step, step.index.sources.rows.tolist(), SOURCES)
        newest = sorted(turns, key=lambda item: (-item.at, -item.row))
        rows = [item.row for item in newest[: step.query.k]]
        return Ranking(rows, [1 / n for n, _ in enumerate(rows, 1)])
