"""Baseline: each segment of a video alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.consolidate import Seen, SegmentPolicy

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class LoneSegments(SegmentPolicy):
    """Keep nothing of a segment: the vision transformer before it had a memory."""

    card = Card(
        paper=None,
        claim="a short context: 0 memories",
        check="segment_memory",
        baseline="whole_segments",
        better="higher",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    def keep(self, seen: Seen) -> Tensor:
        """None of the tokens."""
        return seen.tokens[:, :0]
