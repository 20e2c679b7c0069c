"""Baseline: torch's checkpointing of a model's blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memwise.budget import Budget
from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.train.engine.act_actions import Planned
from memwise.train.engine.act_actions import Recompute as Again
from memwise.train.engine.activations import ActivationPolicy, Site


@dataclass(frozen=True)
class Recompute(ActivationPolicy):
    """Keep the inputs of blocks alone and run each block again in the backward pass.

    Blocks are modules of one class in a list. What a block saves is dropped after its forward pass
    and stands once more, for one block at a time, in the backward pass.

    Attributes:
        every: 1 = all blocks are recomputed, 2 = every second one, and so on.

    Raises:
        InvalidKnob: every is below 1.
    """

    every: int = 1

    card = Card(
        paper=None,
        claim="gradients as without it; about a third more time",
        check="activations",
        baseline="keep",
        better="lower",
        margin=0.3,
        requires=("torch",),
        kind="baseline",
    )

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InvalidKnob(f"every={self.every}: recompute every 1st, 2nd, ... block")

    def plan(self, sites: Sequence[Site], budget: Budget | None) -> Mapping[str, Planned]:
        blocks = [site.name for site in sites if site.kind == "block"]
        return {name: Again() for name in blocks[:: self.every]}
