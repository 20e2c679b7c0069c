"""Control: the tokens that will be asked for, named beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class Oracle(CachePolicy):
    """Keep given positions, the first tokens and the newest; the rest is dropped.

    Attributes:
        positions: of tokens in the text that will be needed.
        sinks: first tokens that stay, in tokens.

    Raises:
        InvalidKnob: a knob below 1.
    """

    card = Card(
        paper=None,
        claim="the ceiling: 100 % of what is needed",
        check="needle",
        baseline="random",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="control",
    )

    positions: tuple[int, ...] = ()
    sinks: int = 4

    def __post_init__(self) -> None:
        self._positive(sinks=self.sinks)

    @property
    def floor(self) -> int:
        """The sinks, and one more."""
        return self.sinks + 1

    def score(self, step: Step) -> Tensor:
        """What will be needed, then the newest."""
        named = torch.tensor(self.positions, dtype=torch.int32, device=step.pos.device)
        score = step.pos.float().masked_fill(torch.isin(step.pos, named), torch.inf)
        return pin(score, self.sinks)
