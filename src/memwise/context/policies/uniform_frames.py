"""Baseline: every n-th frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.features import FeatureMemory, FeaturePolicy

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class UniformFrames(FeaturePolicy):
    """Keep frames at even distances; when there is no place, every other one goes.

    The frame that follows at twice the distance is the next that is kept.
    """

    card = Card(
        paper=None,
        claim="frames at even distances: 0 averaging",
        check="scenes",
        baseline="newest_frames",
        better="higher",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    def add(self, memory: FeatureMemory, frame: Tensor, time: int, seen: Any = None) -> None:
        """Kept if it stands at the present distance; full means that the distance doubles."""
        every = 1
        if memory.n > 1:
            every = int(memory.times[1] - memory.times[0])
        if memory.n and time - int(memory.times[-1]) < every:
            return
        memory.put(frame, time)
        if memory.is_full:
            self.make_room(memory)

    def make_room(self, memory: FeatureMemory) -> None:
        """Drop every other frame, the last of a pair first."""
        for place in range((memory.n // 2) * 2 - 1, 0, -2):
            memory.drop(place)
