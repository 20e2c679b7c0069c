"""Slots that the question attends to, chunk after chunk (Finch, arXiv 2408.00167)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin, pin_out, smooth
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class Finch(CachePolicy):
    """Keep what the question attends to, of the slots so far and the chunk; the rest is dropped.

    Attributes:
        kernel: neighbours that share the highest attention among them, in tokens; odd.
        sinks: first tokens that stay, in tokens.
        queries: newest tokens that stand for a question where none is given, in tokens.

    Raises:
        InvalidKnob: a knob below 1.
    """

    card = Card(
        paper=131,
        claim="2.35 to 93 times compression",
        check="needle",
        baseline="streaming_llm",
        better="lower",
        margin=1.0,
        requires=("torch",),
    )

    kernel: int = 7
    sinks: int = 4
    queries: int = 16

    def __post_init__(self) -> None:
        self._positive(queries=self.queries, kernel=self.kernel, sinks=self.sinks)

    @property
    def window(self) -> int:
        """The newest queries."""
        return self.queries

    @property
    def floor(self) -> int:
        """Sinks, and one that is chosen."""
        return self.sinks + 1

    def score(self, step: Step) -> Tensor:
        """Attention that slots get of the question, pooled."""
        return pin(smooth(pin_out(step.received, self.sinks), self.kernel), self.sinks)
