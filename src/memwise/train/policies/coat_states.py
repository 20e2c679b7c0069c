"""AdamW with both moments in eight-bit floats of expanded range (COAT, arXiv 2410.19313)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.train.engine.optimizer import OptimizerPolicy


@dataclass(frozen=True)
class CoatStates(OptimizerPolicy):
    """Keep each moment as e4m3 floats, with scale, power and centre for each group.

    The numbers of a group are raised to the power that stretches, or squeezes, their range to that
    of the format, so that no code is left unused. What is dropped, at every step, is what eight
    bits cannot hold of that.

    Attributes:
        group: numbers that share a range.
        least_size: parameters with fewer numbers stay in float32.

    Raises:
        InvalidKnob: a knob is below 1.
    """

    group: int = 128
    least_size: int = 4096

    card = Card(
        paper=27,
        claim="states in FP8 at nearly lossless training; expansion cuts their error",
        check="optimizer_states",
        baseline="adamw",
        better="lower",
        margin=0.0,
        requires=("torch",),
    )

    def __post_init__(self) -> None:
        if self.group < 1 or self.least_size < 1:
            raise InvalidKnob(f"group={self.group}, least_size={self.least_size}: give at least 1")

    def codecs(self, shape: Sequence[int]) -> Mapping[str, str]:
        if math.prod(shape) < self.least_size:
            return {}
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), f"e4m3/expand{self.group}")
