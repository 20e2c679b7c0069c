"""Baseline: heavy hitters of attention so far, and the newest (H2O, arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class H2O(CachePolicy):
    """Keep the slots that gathered most attention since they came, and the newest; the rest goes.

    Attributes:
        recent: newest tokens that stay, in tokens.
        queries: queries of a forward pass whose attention is added up, in tokens.

    Raises:
        InvalidKnob: a knob below 1.
    """

    card = Card(
        paper=None,
        claim="up to 29 times the throughput at 20 % of the cache",
        check="needle",
        baseline="streaming_llm",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    columns: ClassVar[dict[str, float]] = {"gathered": 0.0}

    recent: int = 16
    queries: int = 128

    def __post_init__(self) -> None:
        self._positive(recent=self.recent, queries=self.queries)

    @property
    def window(self) -> int:
        """The queries of a forward pass."""
        return self.queries

    @property
    def floor(self) -> int:
        """The newest, and one heavy hitter."""
        return self.recent + 1

    def observe(self, step: Step) -> None:
        """Add up the attention that slots get."""
        step["gathered"].add_(step.received_now)

    def score(self, step: Step) -> Tensor:
        """What was gathered."""
        return pin(step["gathered"], recent=self.recent)
