"""Baseline: what the newest query attends to (TOVA, arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class TOVA(CachePolicy):
    """Keep what the newest token attends to, averaged over heads; the rest is dropped.

    Attributes:
        sinks: first tokens that stay, in tokens.

    Raises:
        InvalidKnob: a knob below 1.
    """

    card = Card(
        paper=None,
        claim="within 0.5 perplexity of the full cache at an eighth of it",
        check="needle",
        baseline="streaming_llm",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    sinks: int = 1

    def __post_init__(self) -> None:
        self._positive(sinks=self.sinks)

    @property
    def window(self) -> int:
        """One query."""
        return 1

    @property
    def floor(self) -> int:
        """A sink, the newest, and one that is chosen."""
        return self.sinks + 2

    def score(self, step: Step) -> Tensor:
        """Attention that slots get of one query; all heads choose together."""
        return pin(step.received.mean(1, keepdim=True).expand_as(step.pos), self.sinks, 1)
