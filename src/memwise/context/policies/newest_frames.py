"""Baseline: the newest frames."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.context.engine.features import FeatureMemory, FeaturePolicy


@dataclass(frozen=True)
class NewestFrames(FeaturePolicy):
    """Keep the newest frames; the oldest goes when there is no place."""

    card = Card(
        paper=None,
        claim="first in, first out: 0 memory of the beginning",
        check="scenes",
        baseline="random_frames",
        better="higher",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    def make_room(self, memory: FeatureMemory) -> None:
        """Drop the oldest."""
        memory.drop(0)
