"""Slots that are retrieved often stay; the least frequently attended go (LFA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class AttendreOften(CachePolicy):
    """Keep the slots that queries retrieved most often, and the newest; the rest goes.

    A query retrieves the slots that it attends to most. A slot has as many hits as queries
    retrieved it since it came; of as many hits, the newer slot stays.

    Attributes:
        k: slots that a query retrieves, in tokens.
        recent: newest tokens that stay, in tokens.
        queries: queries of a forward pass that are looked at, in tokens.

    Raises:
        InvalidKnob: a knob below 1.

    Note:
        Hits are counted once a forward pass, over all heads that share the slot. The newest tokens
        stay although they have had no time to be retrieved.
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

    columns: ClassVar[dict[str, float]] = {"hits": 0.0}

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
        """Count who was retrieved."""
        step["hits"].add_(step.retrieved(self.k))

    def score(self, step: Step) -> Tensor:
        """Hits; less than one more for being new."""
        newer = step.pos / (step.pos.amax() + 1.0)
        return pin(step["hits"] + newer, recent=self.recent)
