"""Compressors on the same ground: a small Llama over bytes, trained together with its memory.

Shapes: B windows of T bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from memwise.bench.training import N_BYTES, Corpus, fit

_LENGTH = 1024  # positions, of which training uses the first
_LR, _WARMUP = 3e-3, 50


def byte_llama(seed: int, n_layers: int = 3, width: int = 128) -> Any:
    """A model that has read nothing yet."""
    config = LlamaConfig(
        vocab_size=N_BYTES, hidden_size=width, intermediate_size=11 * width // 4,
        num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=_LENGTH, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    return model


def train(
    model: nn.Module, text: Corpus, n_steps: int, size: int, length: int, seed: int,
    most: float,
) -> None:  # fmt: skip
    """Train whatever requires gradients on so many windows of so many bytes.

    Args:
        model: its call on (B, T) bytes gives the loss.
        text: what is learned.
        n_steps: batches.
        size: windows in a batch.
        length: bytes of a window.
        seed: of the order of the batches.
        most: length to which gradients are cut.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, _LR, betas=(0.9, 0.95), weight_decay=0.1)
    fit(
        model, optimizer, text, n_steps, size, length - 1, seed, n_warmup=_WARMUP,
        n_fade=n_steps // 3, around=lambda: _cut(params, most),
    )  # fmt: skip


@contextmanager
def _cut(params: list[nn.Parameter], most: float) -> Iterator[None]:
    """Cut the gradients that come of what is done inside."""
    yield
    nn.utils.clip_grad_norm_(params, most)
