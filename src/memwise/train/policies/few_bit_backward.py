"""Few-Bit Backward (arXiv 2202.00441): a step function in place of an activation's derivative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memwise.budget import Budget
from memwise.catalogue import Card
from memwise.train.engine.act_actions import FewBit, Planned
from memwise.train.engine.activations import ActivationPolicy, Site


@dataclass(frozen=True)
class FewBitBackward(ActivationPolicy):
    """Keep, of the input of an activation function, which of 2^bits intervals it lies in.

    The output is exact. The input is dropped after the forward pass; the gradient is the incoming
    one times the mean slope of the interval. Borders are those of least squared error of the
    derivative, by dynamic programming. Codes are packed: three bits are three bits. ReLU and leaky
    ReLU take one bit and stay exact.

    Attributes:
        bits: 1 to 4.

    Note:
        Reaches functions that are modules (`nn.GELU`), not calls of `F.gelu`; the report says which
        share of the bytes that is.

    Raises:
        InvalidKnob: bits is out of range.
    """

    bits: int = 3

    card = Card(
        paper=180,
        claim="3-bit GELU saves 13.8 % of the peak of RoBERTa's fine-tuning; 4-bit is lossless",
        check="activations",
        baseline="keep",
        better="lower",
        margin=0.138,
        requires=("torch",),
    )

    def __post_init__(self) -> None:
        FewBit(self.bits)

    def plan(self, sites: Sequence[Site], budget: Budget | None) -> Mapping[str, Planned]:
        return {site.name: FewBit(self.bits) for site in sites if site.kind == "act"}
