"""Personalize a diffusion model of few bits: a set of scales for each range of timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from memwise.catalogue import Card
from memwise.codec.th import Packed
from memwise.errors import InvalidKnob
from memwise.train.engine.adapters import AdapterPolicy, Handle, Site, Target, pack
from memwise.train.engine.deltas import Scales
from memwise.train.engine.switching import AdapterBank


@dataclass(frozen=True)
class QuantizedDiffusionPersonalization(AdapterPolicy):
    """Round the weights once, and train scales that belong to a range of timesteps.

    Large timesteps settle what a picture shows, small ones how it looks in detail: scales that are
    trained for the one leave the other alone. Kept: codes, frozen, the old scales, and one trained
    number a group for each trained range. Dropped: the dense weights.

    Attributes:
        codec: of the weights; scaled by row or by group.
        edges: where ranges meet, as shares of all timesteps; none = PEQA at all of them.
        selected: number of the one range that is trained, the others keep the old scales (S1); None
            trains a set for each (S2).

    Note:
        Ranges are chosen by hand, as in the paper. Weights are rounded by smallest and largest of a
        group, not calibrated over timesteps as Q-Diffusion does.
    """

    card = Card(
        paper=187,
        claim="subject fidelity of 4-bit PEQA with a higher prompt fidelity (CLIP-T, DreamBooth)",
        check="adapt_digits",
        baseline="peqa",
        better="higher",
        margin=0.02,
        requires=("torch",),
    )
    codec: str = "uint4/group64"
    edges: tuple[float, ...] = (0.5,)
    selected: int | None = 0

    def encode(self, name: str, weight: Tensor) -> Packed:
        return pack(self.codec, weight)

    def delta(self, site: Site) -> Scales:
        return Scales(site.base)

    def __call__(
        self, model: nn.Module, target: Target = None, *, seed: int = 0,
        names: Sequence[str] = (),
    ) -> Handle:  # fmt: skip
        """A set of deltas for each range, named range0, range1, ... unless told otherwise."""
        ranges = tuple(names) or tuple(f"range{i}" for i in range(len(self.edges) + 1))
        if self.selected is not None and not 0 <= self.selected < len(ranges):
            raise InvalidKnob(f"selected={self.selected}: there are {len(ranges)} ranges, from 0")
        handle = super().__call__(model, target, seed=seed, names=ranges)
        for i, name in enumerate(ranges):
            for param in handle.parameters(name):
                param.requires_grad_(self.selected in (None, i))
        return handle

    def bank(self, handle: Handle, n_timesteps: int) -> AdapterBank:
        """What activates the set of a timestep, for training and for sampling."""
        return AdapterBank(handle, [edge * n_timesteps for edge in self.edges])

    def trained(self, n_timesteps: int) -> list[tuple[int, int]]:
        """First and last timestep, the last left out, of each range that is trained."""
        ends = [0, *(-int(-edge * n_timesteps // 1) for edge in self.edges), n_timesteps]
        ranges = list(pairwise(ends))
        return ranges if self.selected is None else [ranges[self.selected]]
