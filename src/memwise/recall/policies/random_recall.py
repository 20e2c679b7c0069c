"""Control: anything."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from memwise.catalogue import Card
from memwise.recall.engine.graph import admitted
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Ranking
from memwise.recall.engine.records import SOURCES


@dataclass(frozen=True)
class RandomRecall(Policy):
    """Keep every turn and return some of them, drawn anew for each query text.

    Attributes:
        seed: of the draws.
    """

    card = Card(
        paper=None,
        claim="chance",
        check="turn_ranking",
        baseline="most_recent",
        better="higher",
        margin=0.0,
        kind="control",
    )
    seed: int = 0

    def rank(self, step: Step) -> Ranking:
        rows = [item.row for item in admitted(step, step.index.sources.rows.tolist(), SOURCES)]
        rng = np.random.default_rng((self.seed, zlib.crc32(step.query.text.encode())))
        drawn = [rows[i] for i in rng.permutation(len(rows))[: step.query.k]]
        return Ranking(drawn, [1 / n for n, _ in enumerate(drawn, 1)])
