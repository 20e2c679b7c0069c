"""A small Llama over bytes whose feed-forward neurons are mostly silent, to be read from a disk.

Its gates are ReLUs, and training charges what passes them, so that few neurons fire for a token. It
is trained once, in some minutes, and kept in the cache folder until this file changes.

Shapes: B windows of T bytes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from memwise.bench.training import N_BYTES, corpus
from memwise.models import cached

CONTEXT = 128  # bytes of a window
_N_STEPS, _SIZE, _LR, _WARMUP = 800, 8, 3e-3, 50
_PRICE = 0.5  # of the mean that passes the gates, in nat


def model(data: Path | None) -> Any:
    """The trained model, from the cache where it is there."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    folder = cached(f"relu-llama-{code}", lambda folder: _train(data, folder))
    return LlamaForCausalLM.from_pretrained(folder).eval()


def _train(data: Path | None, folder: Path) -> None:
    text = corpus(data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=N_BYTES, hidden_size=128, intermediate_size=1024, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2 * CONTEXT,
            hidden_act="relu", bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
        )  # fmt: skip
        lm: Any = LlamaForCausalLM(config)
    passed: list[torch.Tensor] = []
    for layer in lm.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda _, __, out: passed.append(out.mean()))
    optimizer = torch.optim.AdamW(lm.parameters(), _LR, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(_N_STEPS):
        rate = min((step + 1) / _WARMUP, (_N_STEPS - step) / (0.3 * _N_STEPS), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _LR * rate
        ids = text.batch(step, _SIZE, CONTEXT - 1, 0)
        logits = lm(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        torch.autograd.backward(loss + _PRICE * torch.stack(passed).mean())
        passed.clear()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    lm.save_pretrained(folder)
