"""What a paper adds to the engine: which slots stay, and where they are put.

A policy holds knobs and nothing else. All that it is asked comes with one argument, a `Step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import torch
import torch.nn.functional as F

from memwise.catalogue import Card
from memwise.errors import InvalidKnob

if TYPE_CHECKING:
    from memwise.context.engine.attention import Branch
    from memwise.context.engine.plan import Shape
    from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class CachePolicy:
    """What stays in the slots of the full-attention layers when they are full.

    Attributes:
        columns: numbers that are noted of each slot, by name, with what a new slot has. A slot with
            a `mass` counts as so many tokens.
        raw_keys: keys are held bare of positions, so that they can be merged and moved.
        needs_text: surprisal is asked for, so hidden states pass through the output layer.
        any_length: texts may be longer than what the model was made for.
        needs_inputs: queries, keys and values of new tokens are asked for, bare of positions.
    """

    columns: ClassVar[Mapping[str, float]] = {}
    raw_keys: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False
    any_length: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    card: ClassVar[Card]

    @property
    def window(self) -> int:
        """Newest queries that are kept in each layer, for `Step.attention`."""
        return 0

    @property
    def floor(self) -> int:
        """Slots below which this policy cannot work."""
        return 1

    def probe(self, vocabulary: int) -> tuple[int, ...]:
        """Tokens that are shown to the model before slots are chosen, and forgotten after.

        Args:
            vocabulary: tokens that the model knows.
        """
        return ()

    def weights(self, shape: Shape) -> Mapping[str, Tensor]:
        """What it was trained to know, by name; it lies beside the slots and counts as they do.

        Args:
            shape: of the model's cache.
        """
        return {}

    def observe(self, step: Step) -> None:
        """Note what is to be noted of the tokens that have just come, layer by layer."""

    def score(self, step: Step) -> Tensor:
        """How much each slot is worth, (B, H, n); the highest stay."""
        raise NotImplementedError

    def merge(self, step: Step, kept: Tensor) -> None:
        """Fold what is about to go into the slots (B, H, m) that stay, in place."""

    def place(self, step: Step) -> Tensor | None:
        """Positions (B, H, n) to which the slots that stayed are put; None leaves them."""
        return None

    def branches(self, query_at: Tensor, key_at: Tensor, n_old: int) -> Sequence[Branch] | None:
        """Distances that are not what places say; None for plain attention.

        Args:
            query_at: (B, q), positions of the new tokens.
            key_at: (B, H, n), those of the slots, the new tokens last.
            n_old: slots before the new tokens.
        """
        return None

    def _positive(self, **knobs: int) -> None:
        for name, value in knobs.items():
            if value < 1:
                raise InvalidKnob(f"{name}={value} must be 1 or more")


def smooth(score: Tensor, kernel: int) -> Tensor:
    """The highest score among `kernel` neighbours (B, H, n): a fact is kept with its tail."""
    if kernel == 1:
        return score
    floor = score.nan_to_num(neginf=torch.finfo(score.dtype).min)
    return F.max_pool1d(floor, kernel, 1, kernel // 2)[..., : score.shape[-1]]


def spread(score: Tensor, kernel: int) -> Tensor:
    """The mean score of `kernel` neighbours (B, H, n): a run of tokens counts, a lone one less."""
    mean = F.avg_pool1d(score, kernel, 1, kernel // 2, count_include_pad=False)
    return mean[..., : score.shape[-1]]


def pin(score: Tensor, sinks: int = 0, recent: int = 0) -> Tensor:
    """The score (B, H, n), with the first and the newest slots above all others."""
    pinned = score.clone()
    pinned[..., :sinks] = torch.inf
    if recent:
        pinned[..., -recent:] = torch.inf
    return pinned


def pin_out(score: Tensor, sinks: int) -> Tensor:
    """The score (B, H, n) without the first slots', which all attention rests on."""
    score = score.clone()
    score[..., :sinks] = 0.0
    return score
