"""Control: any tokens, drawn evenly from all that came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class Random(CachePolicy):
    """Keep the first tokens and others at random; each has the same chance, whenever it came.

    Attributes:
        seed: of the draws.
        sinks: first tokens that stay, in tokens.

    Raises:
        InvalidKnob: a knob below 1.
    """

    card = Card(
        paper=None,
        claim="the floor: 0 choice",
        check="needle",
        baseline="streaming_llm",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="control",
    )

    seed: int = 0
    sinks: int = 4

    def __post_init__(self) -> None:
        self._positive(sinks=self.sinks)

    @property
    def floor(self) -> int:
        """The sinks, and one more."""
        return self.sinks + 1

    def score(self, step: Step) -> Tensor:
        """The draw of a token, the same at every choice."""
        return pin(step.at_random(self.seed), self.sinks)
