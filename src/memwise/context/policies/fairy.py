"""Fairy: a few frames are edited together, and every other frame attends to them."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.context.engine.anchors import FramePolicy
from memwise.errors import InvalidKnob


@dataclass(frozen=True)
class Fairy(FramePolicy):
    """Keep keys and values of a few frames that lie evenly, at each step; drop all others'.

    Attributes:
        n_anchors: frames that all others attend to; a shorter clip has only anchors.

    Note:
        The paper also trains its model further, with source and target moved alike. That is left
        to whoever trains the denoiser.

    Raises:
        InvalidKnob: fewer than one anchor.
    """

    card = Card(
        paper=60,
        claim="120 frames of 512 x 384 in 14 s, at least 44 times faster than earlier work",
        check="edited_clips",
        baseline="lone_frames",
        better="lower",
        margin=0.25,
        requires=("torch",),
        negative="frames differ by .27 of what lone frames do, but by .59 with anchors of other "
        "clips, and .42 alone with the same noise: a part of the gain is averaging",
    )

    n_anchors: int = 3

    def __post_init__(self) -> None:
        if self.n_anchors < 1:
            raise InvalidKnob(f"n_anchors={self.n_anchors}: give 1 or more")

    def anchors(self, n_frames: int) -> tuple[int, ...]:
        """The middles of as many equal parts of the clip."""
        n = min(self.n_anchors, n_frames)
        return tuple((2 * i + 1) * n_frames // (2 * n) for i in range(n))
