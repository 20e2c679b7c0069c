"""Baseline: the mean of neighbouring keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from memwise.catalogue import Card
from memwise.context.engine.zones import PoolingCompressor, SegmentPolicy


@dataclass(frozen=True)
class MeanPooled(SegmentPolicy):
    """Keep the mean of each group of keys and of values; drop what was averaged.

    The model is trained as with memory tokens: to go on, and to repeat a segment from its means.

    Attributes:
        ratio: tokens that a slot stands for.
        memory: slots of a segment.

    Raises:
        InvalidKnob: a knob below 1.
    """

    card = Card(
        paper=None,
        claim="averaging without memory tokens: 1 slot a group",
        check="repeat_segments",
        baseline="mean_pooled",
        better="higher",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    ratio: int = 4
    memory: int = 8

    def __call__(self, model: nn.Module, seed: int = 0) -> PoolingCompressor:
        return PoolingCompressor(self, model, seed)
