"""Baseline: clips at even distances, whatever the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.clips import ClipPolicy

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class UniformClips(ClipPolicy):
    """Keep a few tokens of each clip, carried on; a question gets clips at even distances."""

    card = Card(
        paper=None,
        claim="the same clips for every question: 0 selection",
        check="clip_memory",
        baseline="lone_clips",
        better="higher",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    def pick(self, scores: Tensor, n_picked: int) -> Tensor:
        """The middles of equal stretches."""
        n_clips = scores.shape[1]
        middles = (torch.arange(n_picked, device=scores.device) * 2 + 1) * n_clips
        return (middles // (2 * n_picked)).expand(len(scores), -1)
