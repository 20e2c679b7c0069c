"""A cache behind a prefix that all rows share: the prefix is stored once, whatever the batch.

Each layer attends to the parts of the prefix with the queries of the whole batch, to what each row
has of its own with that row's queries, and mixes both by their weights. Nothing is approximated.
Who sees whom is told from positions, so that padding, prefixes of any length and sliding layers are
no cases of their own, and the tokens of a pass may also be a tree.

For `generate()` the prefix is invisible: it is given what comes behind it, and counts only that.

Shapes: B batch, Hq query heads, H key-value heads, q new tokens, n tokens held, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from memwise.budget import BudgetLike, Ledger
from memwise.context.engine import partial
from memwise.context.engine.host import _ANY, Host, _without_padding
from memwise.context.engine.partial import ROWS
from memwise.context.engine.plan import SLIDING
from memwise.context.engine.saved import model_fingerprint
from memwise.context.engine.store import EMPTY, Dense
from memwise.errors import InvalidKnob, MemwiseError

Tensor: TypeAlias = torch.Tensor
Pair: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values (1, H, n, D) of a layer, turned to their positions."""

_GROWTH = 8  # what is full grows by an eighth: a token moves eight times at most
_PREFIX, _OWN = "shared prefix", "keys and values of rows"


@dataclass(eq=False)
class Prefix:
    """Tokens that many texts begin with, and what the layers keep of them.

    A full-attention layer has the keys and values of this prefix's own tokens, those of the tokens
    before lie in its parents. A sliding layer has all that can be seen from here on: the last
    tokens before the end, as many as its window without the next token.

    Attributes:
        key: hash of the model, the parent and the own tokens.
        model: fingerprint of the model that made it.
        parent: the prefix that this one continues.
        tokens: all of them, the parents' included.
        pairs: of each layer.
        n_users: caches that stand behind it now; while there are any it is not evicted.
    """

    key: str
    model: str
    parent: Prefix | None
    tokens: tuple[int, ...]
    pairs: tuple[Pair, ...]
    n_users: int = 0

    @property
    def n_tokens(self) -> int:
        """Of all tokens, the parents' included."""
        return len(self.tokens)

    @property
    def chain(self) -> list[Prefix]:
        """The parents from the first on, and this one."""
        return [*(self.parent.chain if self.parent else ()), self]

    @property
    def held_bytes(self) -> int:
        """Of the storages of this prefix alone, without its parents'."""
        tensors = (tensor for pair in self.pairs for tensor in pair)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@contextmanager
def relayed(
    model: nn.Module, prefix: Prefix | None, budget: BudgetLike | None = None, *, n_rows: int = ROWS
) -> Iterator[RelayCache]:
    """Run a Hugging Face model on texts that all begin with a prefix, which is held once.

    Args:
        model: as for `bounded`: decoder-only, with rotary positions.
        prefix: from `PrefixStore(model).prefill(tokens)`; None for no prefix.
        budget: bytes for what comes behind the prefix; None only counts.
        n_rows: query rows of a head of which logits exist at once.

    Yields:
        The cache, for `model.generate(ids, past_key_values=cache)` or `model(...)`, with tokens
        behind the prefix and padding on the left. Positions given to the model count from there.

    Raises:
        UnsupportedModel: a model of another kind.
        InvalidKnob: the prefix is another model's.
    """
    host = RelayHost(model)
    if prefix is not None and prefix.model != (own := model_fingerprint(host)):
        raise InvalidKnob(
            f"the prefix of {prefix.n_tokens} tokens was made by another model ({prefix.model} "
            f"there, {own} here): prefill it with this one"
        )
    cache = RelayCache(host, prefix, budget, n_rows=n_rows)
    with host.installed(), cache.pinned():
        yield cache


@dataclass
class Pass:
    """One pass of a few tokens through the model.

    Attributes:
        cache: that it writes to.
        positions: (B, q), as the model turns keys and queries.
        slots_at: the same, `EMPTY` where there is padding.
        sees: (q, q), which of the new tokens sees which; None = those before it, and itself.
    """

    cache: RelayCache
    positions: Tensor
    slots_at: Tensor
    sees: Tensor | None = None
    _kept: dict[Any, Any] = field(default_factory=dict)

    def own(self, n_held: int, window: int | None) -> tuple[int, Tensor | None]:
        """How many of the newest tokens held can be seen, and by whom (B, 1, q, n)."""
        return self._once(("own", n_held, window), lambda: self._own(n_held, window))

    def tail(self, n_held: int, window: int | None) -> tuple[int, Tensor | None]:
        """The same of the last tokens of the prefix."""
        return self._once(("tail", n_held, window), lambda: self._tail(n_held, window))

    def _own(self, n_held: int, window: int | None) -> tuple[int, Tensor | None]:
        n_new = self.positions.shape[1]
        n = n_held if window is None else min(n_held, window - 1 + n_new)
        if n_new == 1 and not self.cache.has_padding:
            return n, None
        at = self.cache.at[:, None, None, -n:]
        device = at.device
        new = self.sees
        if new is None:
            new = torch.ones(n_new, n_new, dtype=torch.bool, device=device).tril()
        old = new.new_ones(n_new, n - n_new)
        seen = torch.cat([old, new], 1) & (at != EMPTY)
        if window is not None:
            seen = seen & (self.positions[:, None, :, None] - at < window)
        # Padding sees itself: a row that sees nothing would have no average.
        itself = torch.eye(n_new, n, dtype=torch.bool, device=device).roll(n - n_new, 1)
        return n, seen | itself

    def _tail(self, n_held: int, window: int | None) -> tuple[int, Tensor | None]:
        if window is None:
            return n_held, None
        end = self.cache.n_prefix
        first = max(end - n_held, int(self.positions.min()) - window + 1)
        n = max(0, end - first)
        if int(self.positions.max()) - first < window:
            return n, None
        at = torch.arange(end - n, end, device=self.positions.device)
        return n, (self.positions[..., None] - at < window)[:, None]

    def _once(self, name: Any, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


class RelayLayer(CacheLayerMixin):
    """One layer: parts of the prefix that all rows share, and what each row has of its own.

    Args:
        cache: that this is a layer of.
        parts: of the prefix.
        window: tokens that a sliding layer sees, the newest included; None = all.
    """

    def __init__(self, cache: RelayCache, parts: list[Pair], window: int | None) -> None:
        super().__init__()
        self.cache, self.parts, self.window = cache, parts, window
        self.is_sliding = window is not None
        self.n, self.capacity = 0, 0
        self._keys: Dense
        self._values: Dense

    @property
    def held(self) -> Pair:
        """Keys and values (B, H, n, D) of the rows' own tokens; the newest where it slides."""
        return self._keys.read(0, self.n), self._values.read(0, self.n)

    def tensors(self) -> list[Tensor]:
        """All that the rows hold."""
        return [self._keys.held, self._values.held] if self.is_initialized else []

    def capacity_for(self, n_new: int) -> int:
        """Tokens there have to be places for, so that so many more fit."""
        if self.n + n_new <= self.capacity:
            return self.capacity
        needed, room = self._staying() + n_new, self.cache.room
        if self.window is not None:
            room = min(room, self.window - 1 + n_new)
        return max(self.capacity, room if needed <= room else needed + needed // _GROWTH)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: places are made when it is known how many."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens (B, H, q, D) behind the newest."""
        self.cache.running()
        n_new = key_states.shape[2]
        if self.n + n_new > self.capacity:
            self._make_places(key_states, value_states)
        self._keys.append(self.n, key_states.detach())
        self._values.append(self.n, value_states.detach())
        self.n += n_new
        return key_states, value_states  # our attention looks at what is held itself

    def attend(self, query: Tensor, scale: float, forward: Pass) -> Tensor:
        """Attention of new queries (B, Hq, q, D) on the prefix and on their own rows."""
        n, mask = forward.own(self.n, self.window)
        own_keys, own_values = (
            vectors.read(self.n - n, self.n) for vectors in (self._keys, self._values)
        )
        n_rows = self.cache.n_rows
        found = [partial.attend(query, own_keys, own_values, mask, scale, n_rows)]
        for keys, values in self.parts:
            n, mask = forward.tail(keys.shape[2], self.window)
            if n:
                near = keys[:, :, -n:], values[:, :, -n:]
                found.append(partial.attend(query, *near, mask, scale, n_rows))
        out = partial.merge(found).to(query.dtype)
        return out.reshape(*query.shape[:-1], -1)

    def keep(self, chosen: Tensor, n_new: int) -> None:
        """Of the newest tokens keep chosen ones (m,), in that order."""
        start = self.n - n_new
        for vectors in (self._keys, self._values):
            vectors.append(start, vectors.read(start, self.n)[:, :, chosen])
        self.n = start + len(chosen)

    def get_seq_length(self) -> int:
        """Tokens of a row ever seen, without the prefix."""
        return self.cache.n_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask would have, and the position of the first."""
        return self.n + query_length, self.cache.n_seen - self.n

    def get_max_length(self) -> int:
        """No length is too long."""
        return -1

    def reset(self) -> None:
        """Forget the rows' own tokens, and give the memory back."""
        if self.is_initialized:
            del self._keys, self._values
        self.n, self.capacity, self.is_initialized = 0, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let rows of the batch follow one another."""
        for tensor in self.tensors():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def _staying(self) -> int:
        return self.n if self.window is None else min(self.n, self.window - 1)

    def _make_places(self, keys: Tensor, values: Tensor) -> None:
        capacity = self.capacity_for(keys.shape[2])
        stay = self._staying()
        if capacity > self.capacity:
            made = [Dense(vectors[:, :, 0], capacity) for vectors in (keys, values)]
            if stay:
                for vectors, old in zip(made, (self._keys, self._values), strict=True):
                    vectors.append(0, old.read(self.n - stay, self.n))
            self._keys, self._values = made
        elif stay:
            for vectors in (self._keys, self._values):
                vectors.keep_last(stay, self.n)
        self.n, self.capacity, self.is_initialized = stay, capacity, True


class RelayCache(Cache):
    """A cache for `generate(past_key_values=...)` behind a shared prefix; see `relayed`.

    Args:
        host: the model that it belongs to.
        prefix: that all rows share.
        budget: bytes of what comes behind it.
        room: tokens of a row for which there are places at once.
        n_rows: query rows of a head of which logits exist at once.

    Attributes:
        ledger: measured bytes, by kind; the prefix is listed and not charged.
        has_padding: some of the tokens held are padding.
    """

    def __init__(
        self, host: RelayHost, prefix: Prefix | None, budget: BudgetLike | None = None,
        room: int = 0, n_rows: int = ROWS,
    ) -> None:  # fmt: skip
        self.host, self.prefix, self.room, self.n_rows = host, prefix, room, n_rows
        self.shape, self._budget = host.shape, budget
        chain = prefix.chain if prefix else []
        layers: list[Any] = []  # of no more general type: a list of transformers' is invariant
        for i, kind in enumerate(self.shape.layer_types):
            slides = kind == SLIDING
            parts = [one.pairs[i] for one in (chain[-1:] if slides else chain)]
            layers.append(RelayLayer(self, parts, self.shape.window if slides else None))
        super().__init__(layers=layers)
        self._forget()

    def _forget(self) -> None:
        self.batch, self.has_padding = 0, False
        self.at = torch.empty(0, 0, dtype=torch.int32)
        self._forward: Pass | None = None
        self.ledger = Ledger(self._budget, outside=(_PREFIX,))
        if self.prefix:
            held = sum(one.held_bytes for one in self.prefix.chain)
            self.ledger.set("device", _PREFIX, held)

    @property
    def n_prefix(self) -> int:
        """Tokens of the prefix."""
        return self.prefix.n_tokens if self.prefix else 0

    @property
    def n_seen(self) -> int:
        """Tokens of a row that were ever given, padding included."""
        return self.at.shape[1]

    @property
    def relay_layers(self) -> list[RelayLayer]:
        """All layers."""
        return [layer for layer in self.layers if isinstance(layer, RelayLayer)]

    def reset(self) -> None:
        """Forget what came behind the prefix, for other texts or another batch."""
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let rows of the batch follow one another."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.at = self.at.index_select(0, beam_idx.to(self.at.device))

    def keep(self, chosen: Tensor, n_new: int) -> None:
        """Of the newest tokens of a row keep chosen ones (m,), as if the others had never come."""
        for layer in self.relay_layers:
            layer.keep(chosen, n_new)
        start = self.n_seen - n_new
        self.at = torch.cat([self.at[:, :start], self.at[:, start:][:, chosen]], 1)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """For the time being no store evicts the prefix."""
        chain = self.prefix.chain if self.prefix else []
        for one in chain:
            one.n_users += 1
        try:
            yield
        finally:
            for one in chain:
                one.n_users -= 1

    # --- one forward pass; called by the host

    def running(self) -> Pass:
        """The pass that is going on.

        Raises:
            MemwiseError: there is none.
        """
        if self._forward is None:
            raise MemwiseError(
                "this cache works inside `with relayed(...)` only, on the model it was made for"
            )
        return self._forward

    @contextmanager
    def during(self, forward: Pass) -> Iterator[None]:
        """Take new tokens in.

        Raises:
            BudgetExceeded: they do not fit; nothing has changed then.
        """
        batch, n_new = forward.positions.shape
        self._reserve(batch, n_new)
        new = forward.slots_at.int()
        self.batch, self.at = batch, torch.cat([self.at, new], 1) if self.batch else new
        self.has_padding = self.has_padding or bool((new == EMPTY).any())
        self._forward = forward
        try:
            yield
        finally:
            self._forward = None
        self.ledger.set("device", _OWN, self.held_bytes())

    def _reserve(self, batch: int, n_new: int) -> None:
        sizes = [layer.capacity_for(n_new) for layer in self.relay_layers]
        grown = [n for n, layer in zip(sizes, self.relay_layers, strict=True) if n > layer.capacity]
        n_bytes = sum(sizes) * batch * self.shape.pair_bytes + 4 * batch * (self.n_seen + n_new)
        if grown and self.batch:
            # While one layer moves, it is there twice.
            moving = max(layer.capacity for layer in self.relay_layers)
            self.ledger.set("device", _OWN, n_bytes + moving * batch * self.shape.pair_bytes)
        self.ledger.set("device", _OWN, n_bytes)

    def held_bytes(self) -> int:
        """Bytes of all storages of the rows, measured."""
        tensors = [tensor for layer in self.relay_layers for tensor in layer.tensors()]
        return sum(tensor.untyped_storage().nbytes() for tensor in [*tensors, self.at])


class RelayHost(Host):
    """What the engine needs of a model whose rows share a prefix.

    Args:
        model: as for `relayed`.
    """

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """The decoder's forward pass, behind the prefix where the cache is one of ours."""
        cache = past_key_values
        given = input_ids if input_ids is not None else inputs_embeds
        if not isinstance(cache, RelayCache) or cache.host is not self or given is None:
            return self._forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=cache, inputs_embeds=inputs_embeds, **kwargs,
            )  # fmt: skip
        positions, slots_at = _placed(cache, given, attention_mask, position_ids)
        self.check_reach(cache.n_prefix + cache.n_seen + positions.shape[1])
        part = Pass(cache, positions, slots_at)
        return self.run(part, input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def run(self, part: Pass, **kwargs: Any) -> Any:
        """Let the model take a pass in."""
        with part.cache.during(part):
            return self._forward(
                attention_mask=part.positions.new_empty(_ANY), position_ids=part.positions,
                past_key_values=part.cache, memwise=part, **kwargs,
            )  # fmt: skip

    def check_reach(self, n_tokens: int) -> None:
        """Refuse texts that are longer than what the model was made for.

        Raises:
            InvalidKnob: so many tokens are.
        """
        most = getattr(self.decoder.config, "max_position_embeddings", None)
        if most and n_tokens > most:
            raise InvalidKnob(
                f"{n_tokens} tokens with the prefix, and {type(self.model).__name__} was made for "
                f"{most}: shorten the prefix or the text"
            )


def _placed(
    cache: RelayCache, given: Tensor, mask: Any, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Positions (B, q) of new tokens behind the prefix, and the same with padding marked."""
    batch, n_new = given.shape[:2]
    if cache.batch not in (0, batch):
        raise InvalidKnob(
            f"this cache holds a batch of {cache.batch} and {batch} rows are given: reset() it"
        )
    plain = torch.arange(n_new, device=given.device).expand(batch, -1)
    marked = _without_padding(plain, mask, cache.n_seen)
    if position_ids is None and mask is None:
        position_ids = plain + (cache.at != EMPTY).sum(1, keepdim=True) if cache.batch else plain
    elif position_ids is None:
        position_ids = mask.bool().cumsum(1)[:, cache.n_seen :] - 1
    positions = cache.n_prefix + position_ids.expand(batch, -1).clamp_min(0)
    slots_at = positions.masked_fill(marked == EMPTY, EMPTY)
    if cache.has_padding or marked is not plain:
        _check_runs(torch.cat([cache.at, slots_at], 1) if cache.batch else slots_at)
    return positions, slots_at


def _check_runs(at: Tensor) -> None:
    """Refuse rows whose tokens are no single run: a sliding layer counts the newest."""
    there = (at != EMPTY).int()
    begins = there[:, 0] + (there.diff(dim=1) == 1).sum(1)
    if int(begins.max()) > 1:
        raise InvalidKnob(
            "attention_mask has padding between the tokens of a row: pad on the left "
            "(tokenizer.padding_side = 'left')"
        )
