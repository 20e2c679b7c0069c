"""Texts of any length: the first and the newest tokens, none further than was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.attention import Branch
from memwise.context.engine.policy import CachePolicy, pin
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class LMInfinite(CachePolicy):
    """See the first tokens and the newest, and no distance that the model was not trained on.

    Kept are the first tokens and the newest; what lies between is not seen, and is dropped when
    slots are full. The first tokens are seen at a distance of at most `reach`. With slots for
    `sinks + reach` tokens nothing is lost that would be seen.

    Attributes:
        sinks: first tokens that are seen from everywhere, in tokens.
        reach: newest tokens that are seen, and the greatest distance, in tokens; the length that
            the model was trained with.

    Raises:
        InvalidKnob: a knob below 1.
    """

    card = Card(
        paper=134,
        claim="perplexity flat to 32k tokens and beyond for models trained at 2k-4k; 2.7x decoding",
        check="length",
        baseline="full_cache",
        better="lower",
        margin=0.0,
        requires=("torch",),
    )

    raw_keys = True
    any_length = True

    sinks: int = 10
    reach: int = 4096

    def __post_init__(self) -> None:
        self._positive(sinks=self.sinks, reach=self.reach)

    @property
    def floor(self) -> int:
        """The sinks, and the newest."""
        return self.sinks + 1

    def score(self, step: Step) -> Tensor:
        """The first, then the newer the better."""
        return pin(step.pos.float(), self.sinks)

    def branches(self, query_at: Tensor, key_at: Tensor, n_old: int) -> Sequence[Branch]:
        """Near pairs as they stand; from far away, the first tokens at a distance of `reach`."""

        def near(query: Tensor, key: Tensor) -> Tensor:
            return query - key < self.reach

        def far(query: Tensor, key: Tensor) -> Tensor:
            return (query - key >= self.reach) & (key < self.sinks)

        capped = Branch(torch.full_like(query_at, self.reach), torch.zeros_like(key_at), far)
        return (Branch(query_at, key_at, near), capped)
