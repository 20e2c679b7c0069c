"""Baseline: matrices as they are, one after the other, what fits staying in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.weight_policy import WeightPolicy, check_grid

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class LayerStream(WeightPolicy):
    """Keep what the budget holds and read every other matrix of the layers, whole, in each pass.

    Attributes:
        grid: number format in the file: fp32, fp16 or bf16; "" keeps the model's own.
    """

    card = Card(
        paper=None,
        claim="what layer-wise offloading does: 1 read of every matrix a pass",
        check="sparse_weights",
        baseline="layer_stream",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)

    def codec(self, weight: Tensor) -> str:
        return self.grid
