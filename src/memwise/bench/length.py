"""A small Llama over bytes that was trained with 256 of them, to be asked for more.

It reads books. It is trained once, in some minutes, and kept in the cache folder until this file
changes.

Shapes: B windows of T bytes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from memwise.bench.training import N_BYTES, corpus
from memwise.context.engine.host import bounded, bytes_for
from memwise.context.engine.policy import CachePolicy
from memwise.models import cached

TRAINED = 256  # bytes of a window
_N_STEPS, _SIZE, _LR, _WARMUP = 1000, 16, 3e-3, 50
_CHUNK = 64


def model(data: Path | None) -> Any:
    """The trained model, from the cache where it is there."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    folder = cached(f"byte-llama-{code}", lambda folder: _train(data, folder))
    return LlamaForCausalLM.from_pretrained(folder)


@torch.no_grad()
def nll(lm: Any, ids: Tensor, policy: CachePolicy | None, n_slots: int) -> Tensor:
    """Nat of each byte after the first (B, T - 1), through a cache or without one.

    Args:
        lm: the model.
        ids: (B, T).
        policy: whose slots; None = the plain model.
        n_slots: slots that stay.
    """
    found = []
    for row in torch.split(ids, 8):
        if policy is None:
            logits = lm(row, use_cache=False).logits
        else:
            budget = bytes_for(lm, policy, n_slots, chunk=_CHUNK, batch=len(row))
            with bounded(lm, policy, budget, chunk=_CHUNK) as cache:
                logits = lm(row, past_key_values=cache).logits
        found.append(F.cross_entropy(logits[:, :-1].mT, row[:, 1:], reduction="none"))
    return torch.cat(found)


def _train(data: Path | None, folder: Path) -> None:
    text = corpus(data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=N_BYTES, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=TRAINED,
            bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
        )  # fmt: skip
        lm: Any = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(lm.parameters(), _LR, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(_N_STEPS):
        rate = min((step + 1) / _WARMUP, (_N_STEPS - step) / (0.3 * _N_STEPS), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _LR * rate
        ids = text.batch(step, _SIZE, TRAINED - 1, 0)
        loss = F.cross_entropy(lm(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    lm.save_pretrained(folder)
