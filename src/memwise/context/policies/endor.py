"""Endor (arXiv 2406.11674): pruned matrices lie on the disk as a bitmap and what is not zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.codec.th_grid import FLOAT_TYPES
from memwise.context.engine.weight_policy import WeightPolicy, check_grid
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class Endor(WeightPolicy):
    """Keep every weight that is not zero, and a bit for each; zeros are not read from the disk.

    A matrix of m rows and n columns takes m n / 8 bytes and those of its non-zero numbers. It is
    expanded by the thread that read it, just before it is used. Nothing is lost: -0.0 and NaN count
    as numbers. `memwise.context.prune` makes the zeros.

    Attributes:
        grid: number format in the file: fp32, fp16 or bf16; "" keeps the model's own.

    Raises:
        InvalidKnob: there is no such format, or none for matrices of this type.

    Note:
        Expansion is a search for set bits and a scatter on one core, which may be slower than the
        disk; the paper's is a kernel on a GPU. `verdict()` of what `streamed` yields says whether
        the format pays on a machine. Quantised numbers, which the paper adds, are left out.
    """

    card = Card(
        paper=155,
        claim="offloaded OPT-66B 1.70 times and Llama2-70B 1.78 times as fast, at 50 % zeros",
        check="sparse_weights",
        baseline="layer_stream",
        better="lower",
        margin=0.41,
        requires=("torch",),
        negative="on a disk of 1.8 GB/s a cold load takes 1.59 times as long, as one core decodes "
        "0.81 GB/s; it takes 0.63 of the time from a link of 25 MB/s, and pays below 177 MB/s",
    )

    grid: str = ""

    def __post_init__(self) -> None:
        check_grid(self.grid)

    def codec(self, weight: Tensor) -> str:
        own = {kind: name for name, kind in FLOAT_TYPES.items()}
        grid = self.grid or own.get(weight.dtype)
        if grid is None:
            raise InvalidKnob(f"no bitmap for {weight.dtype}; give grid='fp32', 'fp16' or 'bf16'")
        return f"{grid}/sparse"
