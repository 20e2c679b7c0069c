"""Attention on a part of what is seen, and how parts become the whole.

Softmax attention on a set of slots is an average whose weight is known: the sum of the exponentials
of its logits. So a set may be attended in parts, each in its own way, and the parts are mixed by
their weights afterwards; the result is exact. Slots that all rows of a batch share are attended by
all rows at once: one product of two matrices for each head, where a copy of the slots for each row
would make it many products with a thin one.

Shapes: B batch, Hq query heads, H key-value heads, G = Hq / H, q new tokens, n slots, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor
Partial: TypeAlias = tuple[Tensor, Tensor]
"""Attention on some slots (B, Hq, q, D), and the logarithm of its weight (B, Hq, q)."""

ROWS = 256  # query rows of a head of which logits exist at once


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float,
    n_rows: int = ROWS,
) -> Partial:  # fmt: skip
    """Attention on some slots; a row that sees none of them has weight 0.

    Args:
        query: (B, Hq, q, D).
        keys: (B, H, n, D), or (1, H, n, D) where all rows share them, which copies nothing.
        values: the same of the values.
        mask: bool, broadcasts to (B, 1, q, n); True is seen. None = all are.
        scale: of the logits.
        n_rows: query rows of a head of which logits exist at once.

    Returns:
        Numbers of the query's type, or float32 where that is narrower.
    """
    batch, n_query_heads, n_new, width = query.shape
    n_own, n_heads, n_slots, _ = keys.shape
    n_folded = batch // n_own  # rows of the batch that become rows of a head
    rows = query.view(n_own, n_folded, n_heads, -1, n_new, width).transpose(1, 2)
    shape = rows.shape[:-1]  # (1 or B, H, B or 1, G, q)
    rows = rows.reshape(n_own, n_heads, -1, width)
    if mask is not None:
        mask = mask.expand(batch, 1, n_new, n_slots).view(n_own, 1, n_folded, 1, n_new, n_slots)
        mask = mask.expand(-1, -1, -1, shape[3], -1, -1).reshape(n_own, 1, -1, n_slots)
    parts = []
    for first in range(0, rows.shape[2], n_rows):
        some = slice(first, first + n_rows)
        seen = None if mask is None else mask[:, :, some]
        parts.append(_attend(rows[:, :, some], keys, values, seen, scale))
    out, weight = (
        parts[0] if len(parts) == 1 else (torch.cat(p, 2) for p in zip(*parts, strict=True))
    )
    out = out.view(*shape, -1).transpose(1, 2)
    weight = weight.view(shape).transpose(1, 2)
    return (
        out.reshape(batch, n_query_heads, n_new, -1),
        weight.reshape(batch, n_query_heads, n_new),
    )


def merge(parts: Iterable[Partial]) -> Tensor:
    """Attention (B, Hq, q, D) on all slots, from that on parts of them; each row sees some."""
    return reduce(_merge, parts)[0]


def _attend(
    rows: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float
) -> Partial:
    """Rows (B, H, r, D) on slots (B, H, n, D)."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    logits = ((rows * scale) @ keys.mT).to(wide)
    if seen is not None:
        # The least number and not -inf, which would make NaN of a row that sees nothing.
        logits.masked_fill_(~seen, torch.finfo(wide).min)
    shares = logits.softmax(-1)
    # The greatest share is e^(greatest logit - weight): no second pass of exponentials.
    weight = logits.amax(-1) - shares.amax(-1).log_()
    return (shares.to(values.dtype) @ values).to(wide), weight


def _merge(one: Partial, other: Partial) -> Partial:
    (out, weight), (out_other, weight_other) = one, other
    # alpha = e^lse / (e^lse + e^lse_other); out = alpha out + (1 - alpha) out_other
    alpha = torch.sigmoid(weight - weight_other)[..., None]
    return torch.lerp(out_other, out, alpha), torch.logaddexp(weight, weight_other)
