"""Baseline: every frame of a clip is edited alone."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.context.engine.anchors import FramePolicy


@dataclass(frozen=True)
class LoneFrames(FramePolicy):
    """Keep nothing of one frame for another."""

    card = Card(
        paper=None,
        claim="what an image editor gives: 0 bytes go from frame to frame",
        check="edited_clips",
        baseline="lone_frames",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    def anchors(self, n_frames: int) -> tuple[int, ...]:
        """None."""
        return ()
