"""Baseline: one token a pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from memwise.catalogue import Card
from memwise.context.engine.draft import Drafter
from memwise.context.engine.relay import RelayHost


@dataclass(frozen=True)
class PlainDecoding:
    """Keep the likeliest token of each pass and guess nothing."""

    card = Card(
        paper=None,
        claim="what ordinary decoding gives: 1 token a pass",
        check="draft_tree",
        baseline="plain_decoding",
        better="higher",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    def __call__(self, model: nn.Module) -> Drafter:
        """Decoding without guesses."""
        weight = RelayHost(model).model.get_input_embeddings().weight
        return Drafter(model, weight[:0])
