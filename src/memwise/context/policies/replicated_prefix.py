"""Baseline: every request of a batch has a copy of the shared prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import DynamicCache

from memwise.catalogue import Card
from memwise.context.engine.relay import Prefix

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class ReplicatedPrefix:
    """Keep a copy of the prefix for every request, as a batched cache does."""

    card = Card(
        paper=None,
        claim="what a batched cache gives: B copies of a prefix for B requests",
        check="shared_prefix",
        baseline="replicated_prefix",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    def __call__(self, model: nn.Module, prefix: Prefix, n_requests: int) -> DynamicCache:
        """A cache of transformers that holds the prefix for each request.

        Give the model an attention mask that begins with ones for the prefix.
        """
        config: Any = model.config
        cache = DynamicCache(config=config)
        for i in range(len(prefix.pairs)):
            # Sliding layers have the last tokens in one piece, the others those of each part.
            parts = [one.pairs[i] for one in prefix.chain]
            layer: Any = cache.layers[i]
            slides = layer.is_sliding
            whole = (torch.cat(x, 2) for x in zip(*(parts[-1:] if slides else parts), strict=True))
            keys, values = (x.expand(n_requests, -1, -1, -1).contiguous() for x in whole)
            cache.update(keys, values, i)
            if slides:
                layer.cumulative_length = prefix.n_tokens
        return cache
