"""A streaming memory of clips that carries its summaries on and is asked afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.context.engine.clips import ClipPolicy


@dataclass(frozen=True)
class VideoStreaming(ClipPolicy):
    """Keep a few tokens of each clip, read with the clip before; a question gets the clips like it.

    Frames are dropped once their clip was read. Summaries and indicators of all clips stay; what
    the reader gets is the same number of tokens for any length of video.

    Attributes:
        n_summary: tokens that a clip becomes.
        n_picked: clips that a question gets; the paper's number is not certain.

    Note:
        The paper's small model is the lower half of a pretrained language model, first trained to
        summarise single clips. Here the transformer is new, of any size, and trained by the caller.

    Raises:
        InvalidKnob: a knob below 1.
    """

    card = Card(
        paper=62,
        claim="1.3B + 7B parameters and a constant number of tokens: best on 3 long-video tests",
        check="clip_memory",
        baseline="lone_clips",
        better="higher",
        margin=0.1,
        requires=("torch",),
    )

    n_summary: int = 4
    n_picked: int = 2
