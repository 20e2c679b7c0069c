"""Train the scales of quantized weights; their codes never change."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from memwise.catalogue import Card
from memwise.codec.th import Packed
from memwise.train.engine.adapters import AdapterPolicy, Site, pack
from memwise.train.engine.deltas import Scales


@dataclass(frozen=True)
class PEQA(AdapterPolicy):
    """Round the weights to a few bits once, then train the scale of each group alone.

    W' = (s0 + ds) (q - z). Kept: the codes q and zero points z, frozen, and one trained number a
    group. Dropped: the dense weights. A task is a vector of scales; merging writes it into the
    packed weights, so that inference costs nothing extra.

    Attributes:
        codec: of the weights; scaled by row or by group.

    Note:
        Scales come from the smallest and largest weight of a group, not from a search.
    """

    card = Card(
        paper=177,
        claim="LLaMA-7B on WikiText-2: 3-bit perplexity 6.19 against 19.47 of LoRA, then OPTQ",
        check="adapters",
        baseline="lora",
        better="lower",
        margin=0.01,
        requires=("torch",),
        negative="at 3 bits a small byte model ends at 2.094 nat, and at 2.012 with LoRA that is "
        "rounded afterwards, as 3 bits cost it 1 %; at 2 bits it is 2.109 against 2.137",
    )
    codec: str = "uint3/group64"

    def encode(self, name: str, weight: Tensor) -> Packed:
        return pack(self.codec, weight)

    def delta(self, site: Site) -> Scales:
        return Scales(site.base)
