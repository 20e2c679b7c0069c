"""Baseline: what the newest queries attend to (SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin, smooth
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class SnapKV(CachePolicy):
    """Keep what the newest queries attend to, with its neighbours; the rest is dropped.

    Attributes:
        queries: newest queries whose attention counts, in tokens.
        kernel: neighbours that share the highest attention among them, in tokens; odd.
        sinks: first tokens that stay, in tokens.

    Raises:
        InvalidKnob: a knob below 1.
    """

    card = Card(
        paper=None,
        claim="3.6 times faster decoding and 8.2 times less memory at 16k tokens",
        check="needle",
        baseline="streaming_llm",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    queries: int = 16
    kernel: int = 7
    sinks: int = 4

    def __post_init__(self) -> None:
        self._positive(queries=self.queries, kernel=self.kernel, sinks=self.sinks)

    @property
    def window(self) -> int:
        """The newest queries."""
        return self.queries

    @property
    def floor(self) -> int:
        """Sinks and newest queries, and one that is chosen."""
        return self.sinks + self.queries + 1

    def score(self, step: Step) -> Tensor:
        """Attention that slots get, pooled."""
        return pin(smooth(step.received, self.kernel), self.sinks, self.queries)
