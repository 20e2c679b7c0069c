"""What a paper adds to the weight store: how matrices lie in the file, and which rows are read.

Shapes: N tokens, D width, F neurons of a feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.codec.spec import FLOATS
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class WeightPolicy:
    """Whole matrices, one after the other. A policy holds knobs and nothing else."""

    card: ClassVar[Card]

    @property
    def layout(self) -> str:
        """What a file depends on: one that was made with another is refused."""
        return repr(self)

    def codec(self, weight: Tensor) -> str:
        """How a matrix is stored; "" for its own bytes.

        Raises:
            InvalidKnob: there is no way for matrices of this type.
        """
        return ""


@dataclass(frozen=True)
class NeuronPolicy(WeightPolicy):
    """All but feed-forward layers stays resident; of those, rows are read as neurons fire.

    Attributes:
        together: a neuron's row of each matrix lie side by side, so that one read brings them.
    """

    together: ClassVar[bool] = True

    @property
    def window(self) -> int:
        """Newest tokens whose neurons stay; 0 lets all go after each pass."""
        return 0

    def learn(self, x: Tensor, fires: Tensor, gate: Tensor) -> Mapping[str, Tensor]:
        """What will be known of a layer when neurons are predicted; it is stored in the file.

        Args:
            x: (N, D), what the feed-forward layer was given.
            fires: (N, F), bool.
            gate: (F, D), the matrix whose product decides about that.
        """
        return {}

    def predict(self, x: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """The neurons (N, F), bool, that will fire for x (N, D)."""
        raise NotImplementedError


def check_grid(grid: str) -> None:
    """Refuse a number format that matrices are not stored in."""
    if grid and grid not in FLOATS:
        raise InvalidKnob(
            f"grid={grid!r}: matrices are stored in {', '.join(FLOATS)}, or as they are"
        )
