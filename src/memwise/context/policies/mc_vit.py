"""A vision transformer with a consolidated memory of earlier segments in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.consolidate import METHODS, Seen, SegmentPolicy, consolidate
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class MCViT(SegmentPolicy):
    """Keep, of what each layer saw of a segment, a tenth: means of groups of tokens; drop the rest.

    Its call builds an encoder that reads a video segment by segment. Memories grow by the same
    small number with each segment, and nothing is dropped later. A ratio of 1 keeps all tokens.

    Attributes:
        kept_ratio: memories of a segment as a part of its tokens, above 0 up to 1.
        method: "kmeans" for means of groups, "coreset" for tokens that lie far apart, "random" for
            a random subset.

    Note:
        The paper's encoder is a pretrained one that is trained further with this; weights of an
        encoder of another policy fit here. Groups form around the coreset, not around random
        tokens, so that k-means draws no random numbers.

    Raises:
        InvalidKnob: the ratio is outside of (0, 1], or there is no such method.
    """

    card = Card(
        paper=167,
        claim="about 10 times less memory and compute than attention to all activations, as good",
        check="segment_memory",
        baseline="lone_segments",
        better="higher",
        margin=0.05,
        requires=("torch",),
    )

    kept_ratio: float = 0.1
    method: str = "kmeans"

    def __post_init__(self) -> None:
        if not 0 < self.kept_ratio <= 1:
            raise InvalidKnob(f"kept_ratio={self.kept_ratio}: give a number above 0 up to 1")
        if self.method not in METHODS:
            raise InvalidKnob(f"method={self.method!r}: give one of {', '.join(METHODS)}")

    def keep(self, seen: Seen) -> Tensor:
        """As many as the ratio says, rounded, and at least one."""
        n_kept = max(1, round(self.kept_ratio * seen.tokens.shape[1]))
        return consolidate(seen.tokens, n_kept, self.method, seen.draws)
