"""Takes the steps of a scheduler with a model: greedy texts, a cache for each request.

A request has a cache of its own, so that its text cannot depend on who else is in the batch, and
leaving frees just its bytes. A step is one pass for each request.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from memwise.context.engine.scheduler import Batch
from memwise.errors import InvalidKnob


class ModelWorker:
    """Writes greedily with a decoder.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        prompts: tokens of each request.
        stops: tokens that end a text; they belong to it.

    Attributes:
        texts: what each request has written so far.
        peak_bytes: most bytes of keys and values behind a step, measured from their storages.

    Note:
        Tokens are appended by copying a layer's keys or values, so that within a pass one layer of
        one request is there twice.
    """

    def __init__(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], stops: Collection[int] = ()
    ) -> None:
        if not all(prompts):
            raise InvalidKnob("a prompt is empty; give each request 1 token or more")
        self.model, self.prompts, self.stops = model, prompts, frozenset(stops)
        self.texts: list[list[int]] = [[] for _ in prompts]
        self.peak_bytes = 0
        self._caches: dict[int, DynamicCache] = {}

    def step(self, batch: Batch) -> tuple[float, Collection[int]]:
        """One pass for each request; one that joins reads its prompt and what it has written."""
        began = time.perf_counter()
        for i in batch.joining:
            self._caches[i] = DynamicCache()
            self._write(i, [*self.prompts[i], *self.texts[i]])
        for i in batch.running:
            self._write(i, self.texts[i][-1:])
        seconds = time.perf_counter() - began
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        taken = (*batch.joining, *batch.running)
        return seconds, {i for i in taken if self.texts[i][-1] in self.stops}

    def drop(self, request: int) -> None:
        """Free a request's cache; its text stays."""
        del self._caches[request]

    @property
    def held_bytes(self) -> int:
        """Keys and values of all requests that run, measured from their storages."""
        return sum(_bytes(cache) for cache in self._caches.values())

    @torch.no_grad()
    def _write(self, i: int, tokens: Sequence[int]) -> None:
        device = next(self.model.parameters()).device
        output: Any = self.model(
            torch.tensor([list(tokens)], device=device), past_key_values=self._caches[i],
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.texts[i].append(int(output.logits[0, -1].argmax()))


def _bytes(cache: DynamicCache) -> int:
    layers: list[Any] = cache.layers
    held = [part for layer in layers for part in (layer.keys, layer.values)]
    return sum(part.untyped_storage().nbytes() for part in held if part is not None)
