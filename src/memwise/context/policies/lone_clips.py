"""Baseline: clips that are read alone, and a question that gets the clips like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.clips import ClipPolicy

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class LoneClips(ClipPolicy):
    """Keep a few tokens of each clip as it looks by itself; nothing goes from clip to clip."""

    card = Card(
        paper=None,
        claim="no propagation: 0 tokens from the clip before",
        check="clip_memory",
        baseline="uniform_clips",
        better="higher",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    def carry(self, summary: Tensor) -> Tensor | None:
        """Nothing."""
        return None
