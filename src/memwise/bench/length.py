"""A small Llama over bytes that was trained with 256 of them, to be asked for more.

It reads books, and boxes: a label, and the sign that lies in the box. Both are bytes that no book
holds. Where a label comes again its sign is the same, so a model that looks back knows it, and far
text is worth something to it. It is trained once, in a minute or two, and kept in the cache folder
until this file changes.

Shapes: B windows of T bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from memwise.bench.training import N_BYTES, Corpus, corpus
from memwise.context.engine.host import bounded, bytes_for
from memwise.context.engine.policy import CachePolicy
from memwise.models import cached

TRAINED = 256  # bytes of a window
N_BOXES, N_SIGNS = 16, 8
CHANCE = math.log(N_SIGNS)  # nat of a sign, for who knows the box alone
_LABEL, _SIGN = 14, 128  # byte of the first box's label, of its first sign
_N_STEPS, _SIZE, _LR, _WARMUP = 600, 16, 6e-3, 50
_SCALE = 0.06  # of the first weights: far smaller ones learn to look back late
_FILLED, _MENTIONS = 8, 20  # boxes of a window that is trained on, and how often any is shown
_WITH = 12  # windows of a step that have boxes
_CHUNK = 64


def model(data: Path | None) -> Any:
    """The trained model, from the cache where it is there."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    folder = cached(f"byte-llama-{code}", lambda folder: _train(data, folder))
    return LlamaForCausalLM.from_pretrained(folder)


def text(data: Path | None) -> Corpus:
    """Books, and Wikipedia to be judged on, in ASCII: other bytes are labels and signs."""
    whole = corpus(data)
    return Corpus(*(ids.masked_fill(ids >= _SIGN, ord("?")) for ids in (whole.train, whole.valid)))


def show(ids: Tensor, box: Tensor, sign: Tensor, at: Sequence[int]) -> Tensor:
    """Windows (B, T) in which a box is shown, label and sign, at each of these places.

    Args:
        ids: (B, T).
        box: (B,), from 0 to `N_BOXES` - 1.
        sign: (B,), from 0 to `N_SIGNS` - 1.
        at: of labels; the sign is the byte after.
    """
    ids = ids.clone()
    for place in at:
        ids[:, place] = _LABEL + box
        ids[:, place + 1] = _SIGN + N_SIGNS * box + sign
    return ids


def fill(ids: Tensor, n_boxes: int, n_mentions: int, draws: torch.Generator) -> Tensor:
    """A window (T,) in which some boxes are shown, at random places, in no order.

    Args:
        ids: (T,).
        n_boxes: boxes that are drawn.
        n_mentions: places; at each, one of these boxes.
        draws: of boxes, signs and places.
    """
    box = torch.randperm(N_BOXES, generator=draws)[:n_boxes]
    sign = torch.randint(N_SIGNS, (n_boxes,), generator=draws)
    which = torch.randint(n_boxes, (n_mentions,), generator=draws)
    at = 2 * torch.randperm(len(ids) // 2, generator=draws)[:n_mentions]
    ids = ids.clone()
    ids[at] = _LABEL + box[which]
    ids[at + 1] = _SIGN + N_SIGNS * box[which] + sign[which]
    return ids


def since_shown(ids: Tensor) -> Tensor:
    """Bytes since each sign of a window (T,) was shown before; 0 for what is new or no sign."""
    found, last = torch.zeros_like(ids), dict[int, int]()
    for place, byte in enumerate(ids.tolist()):
        if byte >= _SIGN:
            found[place] = place - last.get(byte, place)
            last[byte] = place
    return found


@torch.no_grad()
def nll(
    lm: Any, ids: Tensor, policy: CachePolicy | None, n_slots: int, chunk: int = _CHUNK
) -> Tensor:
    """Nat of each byte after the first (B, T - 1), through a cache or without one.

    Args:
        lm: the model.
        ids: (B, T).
        policy: whose slots; None = the plain model.
        n_slots: slots that stay.
        chunk: most bytes that are read at once.
    """
    found = []
    for row in torch.split(ids, 8):
        if policy is None:
            logits = lm(row, use_cache=False).logits
        else:
            budget = bytes_for(lm, policy, n_slots, chunk=chunk, batch=len(row))
            with bounded(lm, policy, budget, chunk=chunk) as cache:
                logits = lm(row, past_key_values=cache).logits
        found.append(F.cross_entropy(logits[:, :-1].mT, row[:, 1:], reduction="none"))
    return torch.cat(found)


def _train(data: Path | None, folder: Path) -> None:
    books = text(data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=N_BYTES, hidden_size=64, intermediate_size=176, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=TRAINED,
            bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
            initializer_range=_SCALE,
        )  # fmt: skip
        lm: Any = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(lm.parameters(), _LR, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(_N_STEPS):
        rate = min((step + 1) / _WARMUP, (_N_STEPS - step) / (0.3 * _N_STEPS), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _LR * rate
        ids = books.batch(step, _SIZE, TRAINED - 1, 0)
        draws = torch.Generator().manual_seed(step)
        for row in range(_WITH):
            ids[row] = fill(ids[row], _FILLED, _MENTIONS, draws)
        loss = F.cross_entropy(lm(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    lm.save_pretrained(folder)
