"""What any word of the question attends to most, in any head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin, pin_out, smooth
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class SharpProbe(CachePolicy):
    """Keep what one token of the question attends to strongly in one head, with its neighbours.

    Attributes:
        kernel: neighbours that share the highest score among them, in tokens; odd.
        sinks: first tokens that stay, in tokens.
        queries: newest tokens that stand for a question where none is given, in tokens.

    Raises:
        InvalidKnob: a knob below 1.
    """

    card = Card(
        paper=None,
        claim="memwise's own: 1 word and 1 head find a fact, which a mean over all of them hides",
        check="needle",
        baseline="finch",
        better="lower",
        margin=0.2,
        requires=("torch",),
    )

    kernel: int = 21
    sinks: int = 4
    queries: int = 16

    def __post_init__(self) -> None:
        self._positive(kernel=self.kernel, sinks=self.sinks, queries=self.queries)

    @property
    def window(self) -> int:
        """The newest queries."""
        return self.queries

    @property
    def floor(self) -> int:
        """The sinks, and one that is chosen."""
        return self.sinks + 1

    def score(self, step: Step) -> Tensor:
        """The strongest attention, pooled so that a fact is kept with its tail."""
        return pin(smooth(pin_out(step.strongest, self.sinks), self.kernel), self.sinks)
