"""Control: all tokens of all segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.consolidate import Seen, SegmentPolicy

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class WholeSegments(SegmentPolicy):
    """Keep all activations of all segments: the most that a memory can be worth."""

    card = Card(
        paper=None,
        claim="the ceiling: 1 memory for each token",
        check="segment_memory",
        baseline="lone_segments",
        better="higher",
        margin=0.0,
        requires=("torch",),
        kind="control",
    )

    def keep(self, seen: Seen) -> Tensor:
        """All tokens."""
        return seen.tokens
