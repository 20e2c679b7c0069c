"""Baseline for paging: one search, its best results, one answer."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.recall.engine.policy import Policy


@dataclass(frozen=True)
class SingleShot(Policy):
    """Keep every turn; a context is filled once with what the question finds."""

    card = Card(
        paper=None,
        claim="fills the window once: solves nested key-value retrieval at depth 0 alone",
        check="nested_kv",
        baseline="memgpt",
        better="lower",
        margin=0.0,
        kind="baseline",
    )
