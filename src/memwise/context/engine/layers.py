"""The two kinds of layers of a bounded cache, as transformers' `Cache` wants them.

Shapes: B batch, H key-value heads, Hq query heads, n slots, q new tokens, w queries, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers.cache_utils import CacheLayerMixin

from memwise.context.engine import attention
from memwise.context.engine.plan import FULL
from memwise.context.engine.policy import CachePolicy
from memwise.context.engine.rotary import turn_back
from memwise.context.engine.store import EMPTY, Coded, Slots
from memwise.errors import MemwiseError

if TYPE_CHECKING:
    from memwise.context.engine.cache import BudgetedCache, Forward

Tensor: TypeAlias = torch.Tensor


class BoundedLayer(CacheLayerMixin):
    """What both kinds share: slots, and lengths that keep positions right after tokens are gone.

    Args:
        cache: that this is a layer of.
        index: of the layer in the model.
    """

    name = "full attention"

    def __init__(self, cache: BudgetedCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index
        self.slots: Slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Preallocate, for tensors (B, H, q, D) of this kind."""
        shape = (*key_states.shape[:2], key_states.shape[-1])
        self.slots = self.make(
            key_states.new_empty(shape),
            value_states.new_empty((*shape[:2], value_states.shape[-1])),
        )
        self.is_initialized = True

    def make(self, keys: Tensor, values: Tensor) -> Slots:
        """The slots, for keys and values of this kind (B, H, D)."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name."""
        return self.slots.tensors() if self.is_initialized else {}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Numbers, and tensors without what is not in use."""
        slots = self.slots
        settled = slots.keys.settled if isinstance(slots.keys, Coded) else 0
        return {"n": slots.n, "settled": settled, "has_empty": slots.has_empty}, slots.used()

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Be what `state` was taken of."""
        self.lazy_initialization(tensors["keys"], tensors["values"])
        self.slots.n, self.slots.has_empty = numbers["n"], numbers["has_empty"]
        for vectors in (self.slots.keys, self.slots.values):
            if isinstance(vectors, Coded):
                vectors.settled = numbers["settled"]
        for name, tensor in self.slots.used().items():
            tensor.copy_(tensors[name])

    def get_seq_length(self) -> int:
        """Tokens ever seen: positions go on from there, whatever is still held."""
        return self.cache.n_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask would have, and the position of the first."""
        held = self.slots.n if self.is_initialized else 0
        return held + query_length, self.cache.n_seen - held

    def get_max_length(self) -> int:
        """No length is too long."""
        return -1

    def reset(self) -> None:
        """Forget all, and give the memory back."""
        if self.is_initialized:
            del self.slots
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let rows of the batch follow one another."""
        for tensor in self.tensors().values():
            _take_rows(tensor, beam_idx.to(tensor.device))

    def _forward(self) -> Forward:
        if self.cache.forward is None:
            raise MemwiseError(
                "this cache works inside `with bounded(...)` only, on the model it was made for"
            )
        return self.cache.forward


class SlotLayer(BoundedLayer):
    """A full-attention layer: its slots are the policy's to choose."""

    is_sliding = False

    def __init__(self, cache: BudgetedCache, index: int) -> None:
        super().__init__(cache, index)
        self.scale = 1.0
        self._queries: Tensor
        self._queries_at: Tensor
        self._next = 0

    @property
    def n_slots(self) -> int:
        """Slots that stay when some have to go."""
        return self.cache.plan.n_slots[self.index]

    @property
    def policy(self) -> CachePolicy:
        """Whose slots these are."""
        return self.cache.policy

    def make(self, keys: Tensor, values: Tensor) -> Slots:
        """With room for a chunk and a probe."""
        room = self.cache.plan.room
        return Slots(
            keys, values, self.n_slots + room, self.policy.columns, self.policy.raw_keys,
            self.cache.shape.codec, room,
        )  # fmt: skip

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Preallocate slots, and a ring for the newest queries."""
        super().lazy_initialization(key_states, value_states)
        n_rows, _, _, width = key_states.shape
        n_kept = max(self.policy.window, self.cache.plan.probe)
        shape = (n_rows, self.cache.shape.n_query_heads, n_kept, width)
        self._queries = key_states.new_zeros(shape)
        self._queries_at = torch.full(
            (n_rows, n_kept), EMPTY, dtype=torch.int32, device=key_states.device
        )

    def tensors(self) -> dict[str, Tensor]:
        """Slots, and the queries that are kept."""
        if not self.is_initialized:
            return {}
        return super().tensors() | {"queries": self._queries, "queries_at": self._queries_at}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """With the queries that are kept."""
        numbers, tensors = super().state()
        tensors |= {"queries": self._queries, "queries_at": self._queries_at}
        return numbers | {"next": self._next, "scale": self.scale}, tensors

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Be what `state` was taken of."""
        super().restore(numbers, tensors)
        self._queries, self._queries_at = tensors["queries"], tensors["queries_at"]
        self._next, self.scale = numbers["next"], numbers["scale"]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens behind the slots."""
        forward = self._forward()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = key_states.detach()
        if self.policy.raw_keys:
            keys = turn_back(keys, *forward.angles(FULL, keys))
        self.slots.append(keys, value_states.detach(), forward.slots_at)
        self.slots.has_empty |= forward.has_padding
        return key_states, value_states  # our attention looks at the slots themselves

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values (B, H, n, D)."""
        n = self.slots.n
        keys, values = self.slots.keys.read(0, n), self.slots.values.read(0, n)
        if self.policy.raw_keys:
            at = self.slots.place[:, :, :n]
            keys = attention.placed(keys, at, self.cache.rotary, FULL)
        return keys, values

    def attend(self, query: Tensor, scale: float, forward: Forward) -> Tensor:
        """Attention of new queries (B, Hq, q, D) on all slots."""
        self.scale = scale
        self._note(query, forward)
        if self.policy.needs_inputs and not forward.is_probe:
            forward.queries[self.index] = query.detach()
        n_new = query.shape[2]
        n_old = self.slots.n - n_new
        branches = self.policy.branches(
            forward.positions, self.slots.place[:, :, : self.slots.n], n_old
        )
        if branches is None:
            mask = self._mask(n_old, n_new, forward)
            if self.cache.shape.codec:
                return attention.attend_blocks(query, self.slots.blocks(), mask, scale)
            return attention.attend(query, *self.held(), mask, scale)
        bare = turn_back(query, *forward.angles(FULL, query))
        seen = self._seen(n_old, n_new, forward)
        return attention.attend_branches(
            bare, forward.positions, self.slots, seen, branches, self.cache.rotary, FULL, scale
        )

    def queries(self) -> tuple[Tensor, Tensor]:
        """The newest queries (B, Hq, w, D), turned, and their positions (B, w), in no order."""
        return self._queries, self._queries_at

    def forget_queries(self) -> None:
        """After a probe, whose queries must not count as the text's."""
        self._queries_at.fill_(EMPTY)
        self._next = 0

    def _note(self, query: Tensor, forward: Forward) -> None:
        n_kept = self._queries.shape[2]
        if not n_kept or (self.cache.plan.probe and not forward.is_probe):
            return
        newest = query[:, :, -n_kept:].detach()
        at = (self._next + torch.arange(newest.shape[2], device=query.device)) % n_kept
        self._queries[:, :, at] = newest
        self._queries_at[:, at] = forward.slots_at[:, -n_kept:].int()
        self._next = int(self._next + newest.shape[2]) % n_kept

    def _seen(self, n_old: int, n_new: int, forward: Forward) -> Tensor:
        seen = forward.causal(n_old)
        if not self.slots.has_empty:
            return seen
        filled = (self.slots.pos[:, :, : self.slots.n] != EMPTY)[:, :, None]
        return (seen & filled) | _self(n_old, n_new, seen.device)

    def _mask(self, n_old: int, n_new: int, forward: Forward) -> Tensor | None:
        mass = self.slots.columns.get("mass")
        if n_new == 1 and not self.slots.has_empty and mass is None:
            return None
        seen = self._seen(n_old, n_new, forward)
        if mass is None:
            return seen
        # A slot into which m tokens were folded is seen as often.
        bias = mass[:, :, None, : self.slots.n].log().to(self._queries.dtype)
        return bias.masked_fill(~seen, torch.finfo(bias.dtype).min)


class WindowLayer(BoundedLayer):
    """A sliding layer: the newest tokens, as many as the model looks back.

    The buffer has room for a chunk, so tokens move once in a chunk and not once a token.
    """

    is_sliding = True
    name = "sliding"

    def make(self, keys: Tensor, values: Tensor) -> Slots:
        """The window before the next token, and room for a chunk or a probe."""
        room = max(self.cache.plan.chunk, self.cache.plan.probe)
        capacity = self.cache.shape.window - 1 + room
        return Slots(keys, values, capacity, {}, codec=self.cache.shape.codec, room=room)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens behind the newest; what no token can see any more makes room."""
        forward = self._forward()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n_new = key_states.shape[2]
        if self.slots.n + n_new > self.slots.capacity:
            self.slots.keep_last(min(self.slots.n, self.cache.shape.window - 1))
        self.slots.append(key_states.detach(), value_states.detach(), forward.slots_at)
        self.slots.has_empty |= forward.has_padding
        return key_states, value_states

    def attend(self, query: Tensor, scale: float, forward: Forward) -> Tensor:
        """Attention of new queries (B, Hq, q, D) on what lies in their windows."""
        n_new = query.shape[2]
        seen = self._visible(n_new)
        mask = self._mask(seen, n_new, forward)
        if self.cache.shape.codec:
            return attention.attend_blocks(query, self.slots.blocks(seen.start), mask, scale)
        keys, values = (
            vectors.read(seen.start, seen.stop) for vectors in (self.slots.keys, self.slots.values)
        )
        return attention.attend(query, keys, values, mask, scale)

    def _visible(self, n_new: int) -> slice:
        return slice(max(0, self.slots.n - self.cache.shape.window + 1 - n_new), self.slots.n)

    def _mask(self, seen: slice, n_new: int, forward: Forward) -> Tensor | None:
        if n_new == 1 and not self.slots.has_empty:
            return None  # all that is visible lies in the window of a single token
        n_old = seen.stop - seen.start - n_new
        mask = forward.within(n_old, self.cache.shape.window)
        if self.slots.has_empty:
            filled = (self.slots.pos[:, :, seen] != EMPTY)[:, :, None]
            mask = (mask & filled) | _self(n_old, n_new, mask.device)
        return mask


def _self(n_old: int, n_new: int, device: torch.device) -> Tensor:
    """Each new token and itself (q, n): padding sees itself, as no row may see nothing (NaN)."""
    own = torch.eye(n_new, n_old + n_new, dtype=torch.bool, device=device)
    return own.roll(n_old, 1)


def _take_rows(tensor: Tensor, rows: Tensor) -> None:
    """Rows (B,) of the batch follow one another, a part of the third axis at a time."""
    if tensor.ndim < 3:
        tensor.copy_(tensor.index_select(0, rows))
        return
    for first in range(0, tensor.shape[2], attention._SLOTS):
        part = tensor[:, :, first : first + attention._SLOTS]
        part.copy_(part.index_select(0, rows))
