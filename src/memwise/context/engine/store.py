"""Slots: the preallocated place of a layer's keys, values and what is noted of each.

Nothing here ever grows, and nothing is concatenated: that would hold the old and the new at once.
Tokens are written behind the last one, and what is kept moves to the front block by block, so that
a block is all that is ever held twice.

Shapes: B batch, H key-value heads, C slots there are, n of them in use, m kept, D width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor

BLOCK = 32  # slots that are moved at once
EMPTY = -1  # position of a slot that holds nothing


class Slots:
    """Slots of one layer.

    A slot's position is that of its token in the text; `EMPTY` marks padding. Slots stand in the
    order in which their tokens came.

    Args:
        keys: shape (B, H, D) and type of what is stored, as the model gives it.
        values: the same of the values.
        capacity: C.
        columns: numbers that are noted of a slot, by name, with what a new slot has.
        movable: keys are bare, and `place` says to which positions they are turned.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, capacity: int, columns: Mapping[str, float],
        movable: bool = False,
    ) -> None:  # fmt: skip
        n_rows, n_heads, width = keys.shape
        self.capacity, self.n, self.fresh = capacity, 0, dict(columns)
        self.keys = keys.new_zeros(n_rows, n_heads, capacity, width)
        self.values = values.new_zeros(n_rows, n_heads, capacity, values.shape[-1])
        shape = (n_rows, n_heads, capacity)
        self.pos = torch.full(shape, EMPTY, dtype=torch.int32, device=keys.device)
        self.place = torch.full_like(self.pos, EMPTY) if movable else self.pos
        self.columns = {
            name: torch.full(shape, start, dtype=torch.float32, device=keys.device)
            for name, start in columns.items()
        }
        self.has_empty = False

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name."""
        held = {"keys": self.keys, "values": self.values, "pos": self.pos, **self.columns}
        return held if self.place is self.pos else held | {"place": self.place}

    def append(self, keys: Tensor, values: Tensor, pos: Tensor) -> None:
        """Write tokens behind the last: keys and values (B, H, q, D), positions (B, q)."""
        n_new = keys.shape[2]
        place = slice(self.n, self.n + n_new)
        self.keys[:, :, place] = keys
        self.values[:, :, place] = values
        self.pos[:, :, place] = self.place[:, :, place] = pos[:, None]
        for name, start in self.fresh.items():
            self.columns[name][:, :, place] = start
        self.n += n_new

    def drop_last(self, n_tokens: int) -> None:
        """Forget the newest tokens, as if they had never come."""
        self.n -= n_tokens

    def keep(self, chosen: Tensor) -> None:
        """Keep slots (B, H, m), ascending, in that order; the others are gone."""
        for tensor in self.tensors().values():
            _to_front(tensor, chosen)
        self.n = chosen.shape[-1]
        if self.has_empty:
            self.has_empty = bool((self.pos[:, :, : self.n] == EMPTY).any())

    def keep_last(self, n_tokens: int) -> None:
        """Keep the newest tokens."""
        start = self.n - n_tokens
        if not start:
            return
        for tensor in self.tensors().values():
            for first in range(0, n_tokens, start):
                last = min(n_tokens, first + start)
                # No overlap: a block is as long as it moves.
                tensor[:, :, first:last] = tensor[:, :, start + first : start + last]
        self.n = n_tokens
        if self.has_empty:
            self.has_empty = bool((self.pos[:, :, : self.n] == EMPTY).any())


def _to_front(tensor: Tensor, chosen: Tensor) -> None:
    """Move chosen slots to the front; as they ascend, no later block reads what was overwritten."""
    for first in range(0, chosen.shape[-1], BLOCK):
        at = chosen[:, :, first : first + BLOCK]
        if tensor.ndim == 4:
            at = at[..., None].expand(*at.shape, tensor.shape[-1])
        tensor[:, :, first : first + at.shape[2]] = tensor.gather(2, at)
