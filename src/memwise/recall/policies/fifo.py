"""Baseline for forgetting: the oldest goes first."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.recall.engine.policy import Policy


@dataclass(frozen=True)
class Fifo(Policy):
    """Keep every turn; over the byte budget the oldest goes first, recalled or not."""

    card = Card(
        paper=None,
        claim="what keeping the newest is worth under the same byte budget",
        check="byte_stream",
        baseline="random_eviction",
        better="higher",
        margin=0.0,
        kind="baseline",
    )
