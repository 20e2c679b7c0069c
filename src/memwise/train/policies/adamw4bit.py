"""AdamW with both moments in four bits (4-bit Optimizers, arXiv 2309.01507)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.train.engine.optimizer import OptimizerPolicy


@dataclass(frozen=True)
class AdamW4bit(OptimizerPolicy):
    """Keep each moment as a code of four bits, and factors that groups of numbers share.

    The first moment lies on the signed dynamic-exponent levels, in groups along the flat order. The
    second lies on 1/16 to 16/16, without zero: a second moment that is rounded to zero makes its
    step explode. Its factor is the smaller one of its row's and its column's largest. What is
    dropped, at every step, is what four bits cannot hold of both.

    Attributes:
        group: numbers that share a factor.
        least_size: parameters with fewer numbers stay in float32.

    Raises:
        InvalidKnob: a knob is below 1.
    """

    group: int = 128
    least_size: int = 4096

    card = Card(
        paper=192,
        claim="matches 32-bit AdamW on language, vision and instruction tuning",
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
        # A vector has no second axis to take the smaller factor of.
        second = "rank1" if len(shape) > 1 else f"group{self.group}"
        return {"exp_avg": f"dyn4/group{self.group}", "exp_avg_sq": f"linear4/{second}"}
