"""Passages that the model did not expect, kept whole, with no question in sight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin, smooth
from memwise.context.engine.step import Step
from memwise.context.engine.store import EMPTY
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class SurprisingPassages(CachePolicy):
    """Keep stretches of tokens that are unexpected on the whole; single odd words do not count.

    A token is worth the mean, over as many tokens around it as a short sentence has, of the square
    root of the surprisal: the root keeps one rare name from outweighing a sentence of facts. The
    newest tokens stay until what is around them is known.

    Attributes:
        width: tokens of a stretch, in tokens; odd.
        kernel: neighbours that share the highest worth among them, in tokens; odd.
        sinks: first tokens that stay, in tokens.

    Raises:
        InvalidKnob: a knob below 1, or an even width.
    """

    card = Card(
        paper=None,
        claim="memwise's own: means over 21 tokens find facts that no question points at",
        check="needle_blind",
        baseline="keydiff",
        better="lower",
        margin=0.2,
        requires=("torch",),
    )

    columns: ClassVar[dict[str, float]] = {"surprise": 0.0, "passage": 0.0}
    needs_text = True

    width: int = 21
    kernel: int = 7
    sinks: int = 4

    def __post_init__(self) -> None:
        self._positive(width=self.width, kernel=self.kernel, sinks=self.sinks)
        if self.width % 2 == 0:
            raise InvalidKnob(f"width={self.width} has no middle: give an odd number")

    @property
    def floor(self) -> int:
        """The sinks, the newest, and one that is chosen."""
        return self.sinks + self.width // 2 + 1

    def observe(self, step: Step) -> None:
        """Add what has come to the means of its neighbours, on both sides."""
        n_new = step.n_new
        n_near = min(self.width // 2, step.n - n_new)
        filled = step.pos[..., -n_new:] != EMPTY
        step["surprise"][..., -n_new:] = step.surprisal[:, None].sqrt() * filled
        near = step["surprise"][..., -n_new - n_near :].clone()
        step["passage"][..., -n_new:] = self._mean(near)[..., n_near:]
        near[..., :n_near] = 0.0  # these are counted already
        step["passage"][..., -n_new - n_near : -n_new] += self._mean(near)[..., :n_near]

    def score(self, step: Step) -> Tensor:
        """The means, shared among neighbours so that a fact is kept with its tail."""
        return pin(smooth(step["passage"], self.kernel), self.sinks, self.width // 2)

    def _mean(self, x: Tensor) -> Tensor:
        return F.avg_pool1d(x, self.width, 1, self.width // 2)
