"""Slots that were retrieved lately stay; the least recently attended go (LRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class AttendreRecent(CachePolicy):
    """Keep the slots that queries retrieved last, and the newest; the rest goes.

    A query retrieves the slots that it attends to most. A slot that was never retrieved counts from
    when it came.

    Attributes:
        k: slots that a query retrieves, in tokens.
        recent: newest tokens that stay, in tokens.
        queries: queries of a forward pass that are looked at, in tokens.

    Raises:
        InvalidKnob: a knob below 1.

    Note:
        A slot's last use is known to one forward pass, that of its chunk.
    """

    card = Card(
        paper=120,
        claim="eviction by use is as good on TriviaQA as FIFO with far more memory, on 2 LLMs",
        check="mentioned_again",
        baseline="sliding_window",
        better="lower",
        margin=0.5,
        requires=("torch",),
    )

    columns: ClassVar[dict[str, float]] = {"used": 0.0}

    k: int = 8
    recent: int = 16
    queries: int = 128

    def __post_init__(self) -> None:
        self._positive(k=self.k, recent=self.recent, queries=self.queries)

    @property
    def window(self) -> int:
        """The queries of a forward pass."""
        return self.queries

    @property
    def floor(self) -> int:
        """The newest, and one that is retrieved."""
        return self.recent + 1

    def observe(self, step: Step) -> None:
        """Note the time of those that were retrieved."""
        used = step["used"]
        used[:, :, -step.n_new :] = step.pos[:, :, -step.n_new :].float()
        now = step.pos.amax(-1, keepdim=True).float()
        used.copy_(torch.where(step.retrieved(self.k) > 0, now, used))

    def score(self, step: Step) -> Tensor:
        """The later the better; of the same time, the newer."""
        newer = step.pos / (step.pos.amax() + 1.0)
        return pin(step["used"] + newer, recent=self.recent)
