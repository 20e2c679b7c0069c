"""Texts longer than trained: far tokens share positions by groups."""

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
class SelfExtend(CachePolicy):
    """See near tokens as trained and far ones in groups that share a position.

    Kept is everything that fits; when slots are full, the first tokens and the newest. A model that
    was trained with L tokens reaches `(L - near) * group + near`.

    Attributes:
        group: far tokens that share a position, in tokens; 1 changes nothing.
        near: newest tokens that are seen as trained, in tokens.
        sinks: first tokens that stay, in tokens.

    Raises:
        InvalidKnob: a knob below 1.
    """

    card = Card(
        paper=161,
        claim="Llama-2-7B from 4k to over 16k tokens, 100 % passkey retrieval there",
        check="length",
        baseline="full_cache",
        better="lower",
        margin=0.0,
        requires=("torch",),
    )

    raw_keys = True
    any_length = True

    group: int = 8
    near: int = 1024
    sinks: int = 4

    def __post_init__(self) -> None:
        self._positive(group=self.group, near=self.near, sinks=self.sinks)

    @property
    def floor(self) -> int:
        """The sinks, and the newest."""
        return self.sinks + 1

    def score(self, step: Step) -> Tensor:
        """The first, then the newer the better."""
        return pin(step.pos.float(), self.sinks)

    def branches(self, query_at: Tensor, key_at: Tensor, n_old: int) -> Sequence[Branch]:
        """Near pairs as they stand, far ones by groups; the two meet at a distance of `near`."""
        shift = self.near - self.near // self.group
        grouped = Branch(
            query_at // self.group + shift,
            key_at // self.group,
            lambda query, key: query - key >= self.near,
        )
        plain = Branch(query_at, key_at, lambda query, key: query - key < self.near)
        return (plain, grouped)
