"""The attention function that a model uses while it is bounded, and masks by order of arrival.

The model's own masks know positions and physical columns, and are wrong once slots are gone. Here
every slot knows whether it holds a token, and new tokens come in order: that is all a mask needs.

Shapes: B batch, Hq query heads, H key-value heads, G = Hq / H, q new tokens, n slots, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from memwise.context.engine.rotary import Rotary, turn
from memwise.context.engine.store import EMPTY, Slots
from memwise.errors import UnsupportedModel

if TYPE_CHECKING:
    from memwise.context.engine.cache import Forward

Tensor: TypeAlias = torch.Tensor

NAME = "memwise"
_ROWS = 16  # query rows of which probabilities exist at once
_SLOTS = 256  # slots whose angles exist at once


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, memwise: Forward | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend to the slots of a bounded cache; without one, as transformers' `sdpa` does.

    Args:
        module: the attention module that calls.
        query: (B, Hq, q, D), turned to its positions.
        key: (B, H, n, D), what `BudgetedCache.update` gave.
        value: the same of the values.
        attention_mask: of the model; meant for other caches.
        dropout: of the probabilities, for other caches.
        scaling: of the logits; None = D^-1/2.
        memwise: the forward pass of a bounded cache.
        softcap: of the logits; refused.
        s_aux: learned sinks; refused.
        **kwargs: of the model, for other caches.
    """
    if softcap is not None or s_aux is not None:
        raise UnsupportedModel("logits that are capped, or sinks that are learned, are not known")
    if memwise is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    layer = memwise.cache.layers[module.layer_idx]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, scale, memwise).transpose(1, 2).contiguous(), None


# Both are needed: a model whose attention has no mask function gets no mask for other caches.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Softmax attention (B, Hq, q, D) that never copies keys for the heads that share them.

    Args:
        query: (B, Hq, q, D).
        keys: (B, H, n, D).
        values: (B, H, n, Dv).
        mask: broadcasts to (B, H, q, n); bool, True is seen, or what is added to the logits.
        scale: of the logits.
    """
    n_rows, n_query_heads, n_new, width = query.shape
    n_heads = keys.shape[1]
    groups = n_query_heads // n_heads
    # The query heads of a key head are further rows of it.
    folded = query.reshape(n_rows, n_heads, groups * n_new, width)
    if mask is not None and n_new > 1:
        mask = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(folded, keys, values, mask, scale=scale)
    return out.view(n_rows, n_query_heads, n_new, values.shape[-1])


def attend_blocks(
    query: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], mask: Tensor | None, scale: float
) -> Tensor:
    """The same over slots that come some at a time: sums are scaled as the greatest logit grows.

    Args:
        query: (B, Hq, q, D).
        blocks: keys (B, H, n, D) and values of some slots, one block after another.
        mask: bool, broadcasts to (B, H, q, n); True is seen. Each row sees something.
        scale: of the logits.
    """
    n_rows, n_query_heads, n_new, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    floor = torch.finfo(wide).min
    best, total, mixed = (query.new_full((), start, dtype=wide) for start in (floor, 0.0, 0.0))
    n = 0  # slots before these
    for keys, values in blocks:
        logits = products(query, keys).to(wide).mul_(scale)  # (B, H, G, q, n)
        if mask is not None:
            seen = mask[..., n : n + keys.shape[2]].unsqueeze(-3)
            logits.masked_fill_(~seen, -torch.inf)
        most = logits.amax(-1, keepdim=True).maximum(best)
        logits = logits.sub_(most).exp_()
        fade = (best - most).exp()
        part = logits.flatten(2, 3).to(values.dtype) @ values
        mixed = mixed * fade.flatten(2, 3) + part if n else part
        total = total * fade + logits.sum(-1, keepdim=True)
        best, n = most, n + keys.shape[2]
    out = (mixed / total.flatten(2, 3)).to(query.dtype)
    return out.view(n_rows, n_query_heads, n_new, -1)


def causal(n_old: int, n_new: int, device: torch.device) -> Tensor:
    """Who sees whom, (1, 1, q, n): all that is old, and of the new what came before and self."""
    new = torch.ones(n_new, n_old + n_new, dtype=torch.bool, device=device).tril_(n_old)
    return new[None, None]


def within(n_old: int, n_new: int, window: int, device: torch.device) -> Tensor:
    """The same where only the last `window` tokens, self included, are seen."""
    new = torch.ones(n_new, n_old + n_new, dtype=torch.bool, device=device)
    return new.tril_(n_old).triu_(n_old - window + 1)[None, None]


Where: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Which pairs, from positions (B, 1, r, 1) of queries and (B, H, 1, n) of slots; (B, H, r, n)."""


@dataclass(frozen=True)
class Branch:
    """Some pairs of a query and a slot whose distance is not what their places say.

    Attributes:
        query_at: (B, q), positions to which queries are turned.
        key_at: (B, H, n), positions to which keys are turned.
        where: the pairs. A later branch wins, and what is in none is not seen.
    """

    query_at: Tensor
    key_at: Tensor
    where: Where


def attend_branches(
    query: Tensor, query_at: Tensor, slots: Slots, seen: Tensor, branches: Sequence[Branch],
    rotary: Rotary, layer_type: str, scale: float,
) -> Tensor:  # fmt: skip
    """Softmax over logits whose distances differ by pair (B, Hq, q, D), a few query rows at once.

    Args:
        query: (B, Hq, q, D), bare of positions.
        query_at: (B, q), their positions.
        slots: with keys that are bare.
        seen: broadcasts to (B, H, q, n).
        branches: which distances.
        rotary: of the model.
        layer_type: of the layer.
        scale: of the logits.
    """
    keys, values = slots.keys.read(0, slots.n), slots.values.read(0, slots.n)
    at = slots.place[:, :, None, : slots.n]
    turned = [(placed(keys, b.key_at, rotary, layer_type), b) for b in branches]
    out = torch.empty(*query.shape[:3], values.shape[-1], dtype=query.dtype, device=query.device)
    for first in range(0, query.shape[2], _ROWS):
        rows = slice(first, first + _ROWS)
        logits = keys.new_full((), -torch.inf)
        for there, branch in turned:
            cos, sin = rotary.table(branch.query_at[:, rows], layer_type, query)
            own = turn(query[:, :, rows], cos[:, None], sin[:, None])
            pairs = products(own, there).mul_(scale)  # (B, H, G, r, n)
            where = branch.where(query_at[:, None, rows, None].int(), at)
            logits = torch.where(where.unsqueeze(-3), pairs, logits)
        mask = seen[..., rows, :] if seen.shape[-2] > 1 else seen
        logits = logits.masked_fill(~mask.unsqueeze(-3), -torch.inf)
        mixed = logits.softmax(-1).flatten(2, 3) @ values
        out[:, :, rows] = mixed.view(*query.shape[:2], -1, values.shape[-1])
    return out


def probabilities(
    query: Tensor, query_pos: Tensor, keys: Tensor, pos: Tensor, scale: float
) -> Iterator[Tensor]:
    """Attention of queries on slots, (B, H, G, r, n) at a time, none on slots that came later.

    Args:
        query: (B, Hq, q, D).
        query_pos: (B, q); `EMPTY` rows give zeros.
        keys: (B, H, n, D).
        pos: (B, H, n).
        scale: of the logits.
    """
    for first in range(0, query.shape[2], _ROWS):
        rows = slice(first, first + _ROWS)
        at = query_pos[:, None, rows, None]
        seen = ((pos[:, :, None] <= at) & (pos[:, :, None] != EMPTY))[:, :, None]
        logits = products(query[:, :, rows], keys).mul_(scale)
        logits.masked_fill_(~seen, torch.finfo(logits.dtype).min)
        yield logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32)).mul_(seen)


def products(query: Tensor, keys: Tensor) -> Tensor:
    """Queries (B, Hq, q, D) on keys (B, H, n, D): (B, H, G, q, n), without a copy of the keys."""
    n_rows, n_heads, n_slots, width = keys.shape
    rows = query.reshape(n_rows, n_heads, -1, width) @ keys.mT
    return rows.view(n_rows, n_heads, -1, query.shape[2], n_slots)


def placed(keys: Tensor, at: Tensor, rotary: Rotary, layer_type: str) -> Tensor:
    """Bare keys (B, H, n, D) turned to positions (B, H, n)."""
    out = torch.empty_like(keys)
    for first in range(0, keys.shape[2], _SLOTS):
        some = slice(first, first + _SLOTS)
        part, there = keys[:, :, some], at[:, :, some]
        cos, sin = rotary.table(there.flatten(0, 1), layer_type, keys)
        out[:, :, some] = turn(part, cos.view(part.shape), sin.view(part.shape))
    return out
