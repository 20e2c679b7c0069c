"""Control: frames at random."""

from __future__ import annotations

import random
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.context.engine.features import FeatureMemory, FeaturePolicy


@dataclass(frozen=True)
class RandomFrames(FeaturePolicy):
    """Keep a random sample: every frame that was seen is as likely to be held as any other.

    Attributes:
        seed: of the choice.
    """

    card = Card(
        paper=None,
        claim="every frame with equal chance: 0 knowledge of what is in it",
        check="scenes",
        baseline="newest_frames",
        better="higher",
        margin=0.0,
        requires=("torch",),
        kind="control",
    )

    seed: int = 0

    def make_room(self, memory: FeatureMemory) -> None:
        """Drop the new one with the chance that a reservoir gives it, else one of the others."""
        draws = random.Random(self.seed * 1_000_003 + memory.n_seen)
        held = memory.n - 1
        stays = draws.random() < held / memory.n_seen
        memory.drop(draws.randrange(held) if stays else held)
