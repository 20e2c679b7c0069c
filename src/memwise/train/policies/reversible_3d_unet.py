"""A segmentation network for volumes whose blocks keep nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.train.engine.reversible import ReversibleSequence, seeded


@dataclass(frozen=True)
class Reversible3DUNet:
    """Run y1 = x1 + F(x2), y2 = x2 + G(y1) at each resolution, F and G inverted bottlenecks.

    Kept are the output of each run of blocks, and what the strided convolution, the upsampling and
    the head between them need. All in-betweens of all blocks are dropped; they are six times as
    wide as the hidden state, so they are most of what a plain network keeps.

    Attributes:
        n_blocks: pairs (F, G) in each run.
        expansion: width of a bottleneck's inside, in widths of a part.
        n_groups: groups of each GroupNorm, which serves a batch of one.

    Note:
        The paper's expansion is not certain. Skip connections are added, not put side by side, so
        that the decoder needs no further convolution.
    """

    card = Card(
        paper=200,
        claim="at fixed memory 3x larger volumes, or 25 % more depth, or 2x the channels",
        check="reversible",
        baseline="plain_blocks",
        better="higher",
        margin=1.0,
        requires=("torch",),
    )
    n_blocks: int = 2
    expansion: int = 6
    n_groups: int = 4

    def __call__(
        self, channels: Sequence[int] = (16, 32), n_inputs: int = 1, n_classes: int = 4,
        seed: int = 0,
    ) -> UNet3D:  # fmt: skip
        """A network from volumes (B, n_inputs, X, Y, Z) to scores (B, n_classes, X, Y, Z).

        Args:
            channels: width at each resolution, the finest first; each next one halves the sides.
            n_inputs: channels of the volumes.
            n_classes: classes of a voxel.
            seed: of the initial weights.

        Raises:
            InvalidKnob: a width cannot be split into two parts of whole groups.
        """
        for width in channels:
            if width % (2 * self.n_groups):
                raise InvalidKnob(
                    f"channels={tuple(channels)}: {width} is not two parts of {self.n_groups} "
                    "groups; give multiples of both"
                )
        net = UNet3D(self, channels, n_inputs, n_classes)
        seeded(net, seed)
        return net

    def blocks(self, width: int) -> ReversibleSequence:
        """A run of blocks at one resolution."""
        fns = [_MBConv(width // 2, self.expansion, self.n_groups) for _ in range(2 * self.n_blocks)]
        return ReversibleSequence(2, fns, dim=1)


class UNet3D(nn.Module):
    """Runs of reversible blocks down and up the resolutions, ordinary layers between them."""

    def __init__(
        self, policy: Reversible3DUNet, channels: Sequence[int], n_inputs: int, n_classes: int
    ) -> None:
        super().__init__()
        self.stem = nn.Conv3d(n_inputs, channels[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv3d(a, b, 2, stride=2) for a, b in pairwise(channels))
        self.up = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in pairwise(channels))
        self.encoder = nn.ModuleList(policy.blocks(width) for width in channels)
        self.decoder = nn.ModuleList(policy.blocks(width) for width in channels[:-1])
        self.head = nn.Conv3d(channels[0], n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, n_inputs, X, Y, Z) -> (B, n_classes, X, Y, Z)
        """Scores of each voxel."""
        x = self.encoder[0](self.stem(x))
        skips = []
        for down, blocks in zip(self.down, list(self.encoder)[1:], strict=True):
            skips.append(x)
            x = blocks(down(x))
        for up, blocks, skip in reversed(list(zip(self.up, self.decoder, skips, strict=True))):
            # The 1x1x1 convolution first: it costs an eighth on the coarse grid.
            x = blocks(skip + F.interpolate(up(x), size=skip.shape[2:], mode="nearest"))
        scores: Tensor = self.head(x)
        return scores


class _MBConv(nn.Sequential):
    """Expand, a depthwise 3x3x3 convolution, project; each with its norm."""

    def __init__(self, width: int, expansion: int, n_groups: int) -> None:
        wide = width * expansion
        super().__init__(
            nn.Conv3d(width, wide, 1),
            nn.GroupNorm(n_groups, wide),
            nn.SiLU(),
            nn.Conv3d(wide, wide, 3, padding=1, groups=wide),
            nn.GroupNorm(n_groups, wide),
            nn.SiLU(),
            nn.Conv3d(wide, width, 1),
            nn.GroupNorm(n_groups, width),
        )
