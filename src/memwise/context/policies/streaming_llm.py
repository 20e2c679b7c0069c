"""Baseline: the first tokens, where attention gathers, and the newest (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class StreamingLLM(CachePolicy):
    """Keep a few first tokens and the newest; all between is dropped when slots are full.

    Keys stay where they are: queries see the first tokens as far away as they are.

    Attributes:
        sinks: first tokens that stay, in tokens.

    Raises:
        InvalidKnob: fewer than 1 sink.
    """

    card = Card(
        paper=None,
        claim="22.2 times faster than sliding windows that are computed anew, at 4 million tokens",
        check="needle",
        baseline="random",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    sinks: int = 4

    def __post_init__(self) -> None:
        self._positive(sinks=self.sinks)

    @property
    def floor(self) -> int:
        """The sinks, and one newest."""
        return self.sinks + 1

    def score(self, step: Step) -> Tensor:
        """The newer the better."""
        return pin(step.pos.float(), sinks=self.sinks)
