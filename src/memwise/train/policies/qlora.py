"""Two thin trained matrices beside every frozen one, which is stored in four bits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from memwise.catalogue import Card
from memwise.codec.th import Packed
from memwise.train.engine.adapters import AdapterPolicy, Site, pack
from memwise.train.engine.deltas import LowRank


@dataclass(frozen=True)
class QLoRA(AdapterPolicy):
    """Store the frozen weights in a few bits, round to nearest, and train LoRA on top.

    Kept: codes and scales of the weights, A and B (Dettmers et al. 2023). Dropped: the dense
    weights, for good; they are decoded in blocks of rows whenever they are multiplied with.

    Attributes:
        rank: of the change.
        alpha: its factor, times the rank.
        codec: name of the codec of the frozen weights.
    """

    card = Card(
        paper=None,
        claim="LoRA's quality on weights of 4 bits",
        check="adapters",
        baseline="lora",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )
    rank: int = 8
    alpha: float = 16.0
    codec: str = "nf4/group64"

    def encode(self, name: str, weight: Tensor) -> Packed:
        return pack(self.codec, weight)

    def delta(self, site: Site) -> LowRank:
        return LowRank(site.base.shape, self.rank, self.alpha, site.draws, site.dtype)
