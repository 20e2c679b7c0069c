"""Memory tokens behind each segment, whose keys and values are all that stays of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from memwise.catalogue import Card
from memwise.context.engine.zones import SegmentPolicy, ZoneCompressor


@dataclass(frozen=True)
class LoMA(SegmentPolicy):
    """Keep the keys and values of trained memory tokens; drop those of the tokens that they read.

    Behind every `ratio * memory` tokens stand `memory` memory tokens, at the last positions of
    their groups. They see the segment, one another and all earlier memory. The model is trained to
    go on with the text and to repeat each segment from its memory alone; all of it is trained.

    Attributes:
        ratio: tokens that a slot stands for.
        memory: memory tokens of a segment.

    Raises:
        InvalidKnob: a knob below 1.

    Note:
        Positions of the repetition are those of what is written, whose first input is a trained
        mark; the memory of other segments is hidden from it.
    """

    card = Card(
        paper=114,
        claim="Llama-2-7B repeats what it read from a cache of a quarter, with hardly any loss",
        check="repeat_segments",
        baseline="mean_pooled",
        better="higher",
        margin=0.05,
        requires=("torch",),
        negative="a small byte model repeats .942 of the bytes at 4 a slot, and mean-pooled slots "
        "that are trained alike .936; .856 against .973 at 2 a slot, .891 against .837 at 8",
    )

    ratio: int = 4
    memory: int = 8

    def __call__(self, model: nn.Module, seed: int = 0) -> ZoneCompressor:
        return ZoneCompressor(self, model, seed)
