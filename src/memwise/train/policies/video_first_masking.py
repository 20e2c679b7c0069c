"""Long clips for the bytes of short ones: most of the input tokens are left out while training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.train.engine.tokens import TokenGate


class TubeletEncoder(Protocol):
    """What can be masked: an encoder in two steps."""

    def tubelets(self, video: Tensor) -> Tensor:
        """The pixels (B, T, P) of each tubelet."""

    def encode(self, tubelets: Tensor, places: Tensor) -> Tensor:
        """The embedding (B, D) of any number of tubelets (B, K, P), at these places (B, K)."""


@dataclass(frozen=True)
class VideoFirstMasking:
    """Train a joint space-time encoder on a random part of the tubelets of each clip.

    While training a random part of the tubelets, drawn anew for each clip, is gathered with the
    places that they have; all others are dropped before anything is computed from them. In `eval`
    all are used. The paper ends the training with a short time
    without masking: set `mask_ratio` of the wrapper to 0.

    Attributes:
        mask_ratio: part of the tubelets that is left out.
    """

    card = Card(
        paper=77,
        claim="masking up to 75 % is the most robust trade; videos of 4.3 minutes at 1 frame/s",
        check="masked_clips",
        baseline="plain_blocks",
        better="lower",
        margin=0.7,
        requires=("torch",),
    )
    mask_ratio: float = 0.75

    def __call__(self, encoder: nn.Module, seed: int = 0) -> MaskedEncoder:
        """The encoder, masked while it trains; weights are shared with it.

        Args:
            encoder: has `tubelets` and `encode` as in `TubeletEncoder`.
            seed: of the draws.

        Raises:
            InvalidKnob: the ratio is not in [0, 1).
        """
        if not 0 <= self.mask_ratio < 1:
            raise InvalidKnob(f"mask_ratio={self.mask_ratio!r} must be in [0, 1)")
        return MaskedEncoder(encoder, self.mask_ratio, seed)


class MaskedEncoder(nn.Module):
    """An encoder that sees a random part of the tubelets while it trains.

    Args:
        encoder: the encoder in two steps.
        mask_ratio: part of the tubelets that is left out.
        seed: of the draws.
    """

    def __init__(self, encoder: nn.Module, mask_ratio: float, seed: int) -> None:
        super().__init__()
        self.encoder, self.mask_ratio = encoder, mask_ratio
        self._draws = torch.Generator().manual_seed(seed)

    def forward(self, video: Tensor) -> Tensor:
        """The embedding (B, D) of each clip."""
        encoder = cast(TubeletEncoder, self.encoder)
        x = encoder.tubelets(video)
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        if self.training and self.mask_ratio:
            n_kept = max(1, round(x.shape[1] * (1 - self.mask_ratio)))
            gate = TokenGate.random((x.shape[0], x.shape[1]), n_kept, self._draws)
            gate = TokenGate(gate.kept.to(x.device))  # drawn alike on all devices
            x, places = gate.gather(x), gate.kept
        return encoder.encode(x, places)
