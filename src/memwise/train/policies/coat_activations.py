"""COAT's activations (arXiv 2410.19313): everything saved for the backward pass in eight bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memwise.budget import Budget
from memwise.catalogue import Card
from memwise.train.engine.act_actions import Planned, Quant
from memwise.train.engine.activations import ActivationPolicy, Site


@dataclass(frozen=True)
class CoatActivations(ActivationPolicy):
    """Keep what operations save as 8-bit floats, with coarser scales where a matrix product reads.

    Inputs of linear layers and convolutions share one scale a tensor; what norms, activation
    functions, products and attention save has one for every few numbers. Dropped after the forward
    pass is what e4m3 cannot hold. A tensor that several operations save is coded once, by the first
    of them. Small tensors, parameters and the batch stay as they are.

    Attributes:
        group: numbers that share a scale outside of linear layers.

    Note:
        Only what is saved is in eight bits; matrix products run in the model's own type, so there
        is no gain in speed. Group scales are kept in half precision. Gradients are not coded.

    Raises:
        InvalidKnob: group is below 1.
    """

    group: int = 16

    card = Card(
        paper=27,
        claim="1.54 times less memory end to end than bf16, with states; activations about half",
        check="activations",
        baseline="keep",
        better="lower",
        margin=0.45,
        requires=("torch",),
    )

    def __post_init__(self) -> None:
        self._fine()

    def _fine(self) -> Quant:
        return Quant(f"e4m3/group{self.group}:f16")

    def plan(self, sites: Sequence[Site], budget: Budget | None) -> Mapping[str, Planned]:
        coarse = Quant("e4m3/tensor")
        return {
            site.name: coarse if site.kind in ("linear", "conv") else self._fine() for site in sites
        }
