"""A short buffer of frames that is folded into a long memory, neighbours that are alike first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.features import FeatureMemory, FeaturePolicy
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor

_LONG, _SHORT = 0, 1


@dataclass(frozen=True)
class MovieChat(FeaturePolicy):
    """Keep scenes: neighbouring frames are averaged, the most alike first.

    New frames stand in a short buffer. When it is full, the most similar neighbours in it are
    averaged until `left` frames remain, which go to the long memory; where that is full, it is
    folded in the same way. Nothing is dropped, all is averaged.

    Attributes:
        buffer: frames of the short buffer.
        left: frames that the buffer becomes.
        weighted: average by the number of frames that are folded already; the paper does not.

    Note:
        The paper's stretched positions belong to its language model and are not here. Its questions
        about one moment read the buffer too; here a reader sees `frames`, which hold both.

    Raises:
        InvalidKnob: `left` is not from 1 to below `buffer`.
    """

    card = Card(
        paper=49,
        claim="over 10,000 frames on 24 GB: 21.3 KB a frame instead of about 200 MB",
        check="scenes",
        baseline="uniform_frames",
        better="higher",
        margin=0.0,
        requires=("torch",),
    )

    buffer: int = 18
    left: int = 2
    weighted: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.left < self.buffer:
            raise InvalidKnob(f"left={self.left}: give a number from 1 to below {self.buffer}")

    @property
    def least(self) -> int:
        """The buffer, and what one buffer becomes."""
        return self.buffer + self.left

    def add(self, memory: FeatureMemory, frame: Tensor, time: int, seen: Any = None) -> None:
        """Into the buffer, which is folded when it is full."""
        memory.put(frame, time, kind=_SHORT)
        n_long = int((memory.kinds == _LONG).sum())
        if memory.n - n_long < self.buffer:
            return
        self._fold(memory, n_long, self.left)
        for place in range(n_long, memory.n):
            memory.mark(place, _LONG)
        most = memory.n_places - self.buffer
        if memory.n > most:
            self._fold(memory, 0, most)

    def _fold(self, memory: FeatureMemory, first: int, n_left: int) -> None:
        while memory.n - first > n_left:
            memory.fold(first + self.next(memory.alike(first)), self.weighted)

    def next(self, alike: Tensor) -> int:
        """Which neighbours become one, from how alike they are."""
        return int(alike.argmax())
