"""What a policy sees of one layer: its slots, and what has just come. Costly things are lazy.

Shapes: B batch, H key-value heads, G queries' heads of each, n slots in use, q tokens of the last
forward pass, w queries that are kept, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F

from memwise.context.engine.attention import _ROWS, probabilities, products
from memwise.context.engine.plan import FULL
from memwise.context.engine.rotary import turn_back
from memwise.context.engine.store import BLOCK, EMPTY

if TYPE_CHECKING:
    from memwise.context.engine.cache import Forward, SlotLayer

Tensor: TypeAlias = torch.Tensor


class Step:
    """One layer at one moment.

    Attributes:
        layer: which layer of the model, from 0.
        depth: where it lies, from 0 at the first to 1 at the last layer.
        n_slots: how many slots will stay if some have to go.
        turn: number of the turn of a dialogue, from 0; `new_turn` where it has just begun.
    """

    def __init__(self, layer: SlotLayer, forward: Forward, n_probe: int = 0) -> None:
        self._layer, self._forward, self._n_probe = layer, forward, n_probe
        self.layer, self.n_slots = layer.index, layer.n_slots
        self.depth = layer.index / max(1, len(forward.cache.layers) - 1)
        self.turn, self.new_turn = forward.cache.turn, forward.new_turn

    @property
    def n(self) -> int:
        """Slots in use; a probe's own do not count."""
        return self._layer.slots.n - self._n_probe

    @property
    def n_new(self) -> int:
        """Tokens of the last forward pass, the last of the slots."""
        return min(self._forward.ids.shape[1], self.n)

    def __getitem__(self, column: str) -> Tensor:
        """A column (B, H, n), which may be written to."""
        return self._layer.slots.columns[column][:, :, : self.n]

    @property
    def pos(self) -> Tensor:
        """Positions of the slots' tokens in the text (B, H, n), int32; -1 holds no token."""
        return self._layer.slots.pos[:, :, : self.n]

    @property
    def place(self) -> Tensor:
        """Positions to which keys are turned (B, H, n), int32."""
        return self._layer.slots.place[:, :, : self.n]

    @property
    def keys(self) -> Tensor:
        """As they are held (B, H, n, D): bare where the policy says so, else turned."""
        return self._layer.slots.keys.read(0, self.n)

    @property
    def values(self) -> Tensor:
        """(B, H, n, Dv)."""
        return self._layer.slots.values.read(0, self.n)

    @property
    def ids(self) -> Tensor:
        """Tokens of the last forward pass (B, q)."""
        return self._forward.ids

    @property
    def hidden(self) -> Tensor:
        """What the decoder made of them (B, q, width of the model)."""
        return self._forward.hidden

    @property
    def surprisal(self) -> Tensor:
        """How little the model expected them (B, q), in nats, float32."""
        return self._forward.surprisal

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """What the policy was trained to know, of all layers, by name."""
        return self._forward.cache.weights

    def inputs(self) -> Iterator[Tensor]:
        """Queries, keys and values of the last pass's tokens, bare of positions, side by side.

        (B, r, (Hq + 2 H) D), some tokens at a time; for `observe` of policies that need inputs.
        """
        layer, n_new = self._layer, self.n_new
        query, first_new = self._forward.queries[self.layer], layer.slots.n - n_new
        cos, sin = self._forward.angles(FULL, query)
        for first in range(0, n_new, BLOCK):
            rows = slice(first, min(n_new, first + BLOCK))
            at = (first_new + rows.start, first_new + rows.stop)
            angles = cos[:, :, rows], sin[:, :, rows]
            keys = layer.slots.keys.read(*at)
            bare = keys if layer.policy.raw_keys else turn_back(keys, *angles)
            parts = turn_back(query[:, :, rows], *angles), bare, layer.slots.values.read(*at)
            yield torch.cat([part.transpose(1, 2).flatten(2) for part in parts], -1)

    def logits(self, rows: slice) -> Tensor:
        """What some of the last pass's queries make of all slots (B, H, G, r, n), before a softmax.

        For `observe` of policies that need inputs.

        Args:
            rows: of the last pass's tokens.
        """
        query = self._forward.queries[self.layer][:, :, rows]
        return products(query, self._layer.held()[0]).mul_(self._layer.scale)[..., : self.n]

    @cached_property
    def received(self) -> Tensor:
        """Attention that slots get of the kept queries or the probe, summed over them (B, H, n)."""
        total = torch.zeros_like(self.pos, dtype=torch.float32)
        for probs in self.attention():
            total += probs.mean(2).sum(2)
        return total

    @cached_property
    def received_now(self) -> Tensor:
        """The same of the last forward pass's queries alone (B, H, n)."""
        total = torch.zeros_like(self.pos, dtype=torch.float32)
        for probs in self.attention(only_new=True):
            total += probs.mean(2).sum(2)
        return total

    @cached_property
    def strongest(self) -> Tensor:
        """Most attention that slots get of any kept query or the probe's, in any head (B, H, n)."""
        most = torch.zeros_like(self.pos, dtype=torch.float32)
        for probs in self.attention():
            torch.maximum(most, probs.amax((2, 3)).float(), out=most)
        return most

    def nearest(self, some: slice, among: slice) -> tuple[Tensor, Tensor]:
        """The slot whose key is most like that of each slot of `some`, e of them.

        Args:
            some: slots that are compared.
            among: slots that are found.

        Returns:
            Cosines of keys (B, H, e), below -1 where there is no token, and slots (B, H, e).
        """
        keys, pos = self.keys[:, :, among], self.pos
        lengths = keys.norm(dim=-1)[:, :, None].clamp_min(1e-12)
        none = (pos[:, :, among] == EMPTY)[:, :, None]
        likes, slots = [], []
        for part in self.keys[:, :, some].split(_ROWS, 2):
            cosines = (F.normalize(part, dim=-1) @ keys.mT).div_(lengths).clamp_(max=1.0)
            best = cosines.masked_fill_(none, -2.0).max(-1)
            likes.append(best.values.float())
            slots.append(best.indices + among.start)
        like = torch.cat(likes, 2).masked_fill(pos[:, :, some] == EMPTY, -2.0)
        return like, torch.cat(slots, 2)

    def retrieved(self, k: int) -> Tensor:
        """How many new queries, over all heads, have a slot among their k best (B, H, n)."""
        total = torch.zeros_like(self.pos, dtype=torch.float32)
        for probs in self.attention(only_new=True):
            best = probs.topk(min(k, self.n), dim=-1)
            # A query that sees fewer than k slots gives the others nothing.
            hits = (best.values > 0).to(total.dtype)
            total.scatter_add_(2, best.indices.flatten(2), hits.flatten(2))
        return total

    def attention(self, only_new: bool = False) -> Iterator[Tensor]:
        """Probabilities (B, H, G, r, n) of the kept queries or the probe, some rows at a time.

        Args:
            only_new: leave out queries of earlier forward passes.
        """
        layer = self._layer
        query, at = layer.queries()
        if only_new:
            at = at.masked_fill(at < self._forward.positions[:, :1], EMPTY)
        keys, _ = layer.held()
        pos = layer.slots.pos[:, :, : layer.slots.n]
        for probs in probabilities(query, at, keys, pos, layer.scale):
            yield probs[..., : self.n]

    def after_probe(self) -> Step:
        """The same layer once a probe is forgotten."""
        return Step(self._layer, self._forward)

    def at_random(self, seed: int) -> Tensor:
        """Numbers in [0, 1) (B, H, n) that follow from layer, head, position and seed alone."""
        heads = torch.arange(self.pos.shape[1], device=self.pos.device)[None, :, None]
        x = self.pos.long() + (heads << 32) + (self.layer << 44) + (seed << 52)
        for shift in (33, 29, 32):
            x = (x ^ (x >> shift)) * 0x2545F4914F6CDD1D
        return (x >> 40 & 0xFFFFFF).float() / (1 << 24)
