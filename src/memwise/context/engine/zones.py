"""Segments that become slots inside the model itself: by memory tokens, or by averaging.

A text is cut into segments. Each is read, made into slots, and dropped; the next one sees the slots
of all that came before. In training the model also repeats each segment from its slots alone.

With memory tokens all of it is one pass with a mask: a segment has a zone that reads, a zone of
memory tokens, and a zone that repeats.

Shapes: B batch, S segments, n tokens of one, t slots of one, T tokens of all zones, V vocabulary,
H key-value heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from memwise.context.engine.plan import FULL
from memwise.context.engine.rotary import turn, turn_back
from memwise.context.engine.soft import (
    MEMORY,
    REPEAT,
    Compressor,
    SoftCache,
    SoftPolicy,
    cross_entropy,
)

Tensor: TypeAlias = torch.Tensor

READS, REMEMBERS, REPEATS = 0, 1, 2


@dataclass(frozen=True)
class Zones:
    """Every token of a pass over whole segments, each a tensor (T,).

    Attributes:
        kind: `READS`, `REMEMBERS` or `REPEATS`.
        segment: that it belongs to.
        at: its position: a slot stands at the last token of the group that it is for.
    """

    kind: Tensor
    segment: Tensor
    at: Tensor

    @classmethod
    def of(cls, n_segments: int, n_tokens: int, n_slots: int) -> Zones:
        """Zones of segments of so many tokens and slots."""
        token, slot = torch.arange(n_tokens), slots_at(n_tokens, n_slots)
        lengths = torch.tensor([n_tokens, n_slots, n_tokens])
        kind = torch.tensor([READS, REMEMBERS, REPEATS]).repeat_interleave(lengths)
        at = torch.cat([token, slot, token])
        segment = torch.arange(n_segments).repeat_interleave(len(at))
        return cls(kind.repeat(n_segments), segment, at.repeat(n_segments) + segment * n_tokens)

    @property
    def sees(self) -> Tensor:
        """Who (rows) sees whom (columns), (T, T)."""
        order = torch.arange(len(self.kind))
        came = order[:, None] >= order
        same, before = self.segment[:, None] == self.segment, self.segment[:, None] > self.segment
        row, column = self.kind[:, None], self.kind
        slots = column == REMEMBERS
        reading = (row == READS) & ((column == READS) & same & came | slots & before)
        remembering = (row == REMEMBERS) & ((column == READS) & same | slots & (same | before))
        repeating = (row == REPEATS) & same & ((column == REPEATS) & came | slots)
        return reading | remembering | repeating


def slots_at(n_tokens: int, n_slots: int) -> Tensor:
    """Positions (t,) in a segment: the last of each group of tokens."""
    return torch.arange(1, n_slots + 1) * (n_tokens // n_slots) - 1


class SegmentPolicy(SoftPolicy):
    """How long segments are, and how many slots they become.

    Attributes:
        ratio: tokens that a slot stands for.
        memory: slots of a segment.

    Raises:
        InvalidKnob: a knob below 1.
    """

    ratio: int
    memory: int

    def __post_init__(self) -> None:
        self._positive(ratio=self.ratio, memory=self.memory)

    @property
    def n_segment(self) -> int:
        """Tokens that are compressed at once."""
        return self.ratio * self.memory

    @property
    def n_slots(self) -> int:
        """Slots that they become."""
        return self.memory


class SegmentCompressor(Compressor):
    """Reads a segment, makes slots of it, and goes on; see `settle`."""

    def settle(self, cache: SoftCache, ids: Tensor, n_old: int) -> None:
        """Make slots of a segment that has just been read, and drop its tokens.

        Args:
            cache: old slots, and behind them what the segment's tokens left.
            ids: tokens of the segment (B, n).
            n_old: slots that were there before.
        """
        raise NotImplementedError

    def learnt(self, ids: Tensor) -> SoftCache:
        """What a text (B, n) becomes; tokens after the last whole segment are held as they are."""
        cache = SoftCache(len(self.host.shape.layer_types))
        for segment in ids.split(self.policy.n_segment, 1):
            self.read(cache, segment)
        return cache

    def read(self, cache: SoftCache, ids: Tensor) -> Tensor:
        """Logits (B, n, V) of the tokens of a segment, of which slots are made if it is whole."""
        n_old, first = cache.n_held, cache.get_seq_length()
        at = torch.arange(first, first + ids.shape[1], device=ids.device)
        logits = self.run(self.embed(ids), at, cache)
        if ids.shape[1] == self.policy.n_segment:
            self.settle(cache, ids, n_old)
        return logits

    @torch.no_grad()
    def repeat(self, cache: SoftCache) -> Tensor:
        """The whole segments of a text (B, S n) as the model writes them out of their slots."""
        n, t = self.policy.n_segment, self.policy.n_slots
        found = []
        for i in range(cache.get_seq_length() // n):
            at = torch.arange(i * n, (i + 1) * n, device=self.host.device)
            found.append(self.write(cache.part(i * t, (i + 1) * t, i * n), at))
        return torch.cat(found, 1)

    def by_steps(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, S n, V) of reading and of repeating, one segment after another."""
        n, t = self.policy.n_segment, self.policy.n_slots
        cache = SoftCache(len(self.host.shape.layer_types))
        read, repeated = [], []
        for i, segment in enumerate(ids.split(n, 1)):
            read.append(self.read(cache, segment))
            own = cache.part(i * t, (i + 1) * t, i * n)
            at = torch.arange(i * n, (i + 1) * n, device=ids.device)
            repeated.append(self.spell(own, segment, at))
        return torch.cat(read, 1), torch.cat(repeated, 1)

    def both(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The same, in whatever way is fastest."""
        return self.by_steps(ids)

    def forward(self, ids: Tensor) -> Tensor:
        """Nat a token of reading on and of repeating (L = L_LM + L_repeat)."""
        self.check_whole(ids, self.policy.n_segment)
        read, repeated = self.both(ids)
        return cross_entropy(read[:, :-1], ids[:, 1:]) + cross_entropy(repeated, ids)


class ZoneCompressor(SegmentCompressor):
    """Memory tokens see a segment and one another; their keys and values are the slots."""

    def settle(self, cache: SoftCache, ids: Tensor, n_old: int) -> None:
        """Let memory tokens see all of it; what they left stays."""
        n, t = ids.shape[1], self.policy.n_slots
        n_positions = cache.get_seq_length()
        at = n_positions - n + slots_at(n, t).to(ids.device)
        everything = torch.ones(t, n_old + n + t, dtype=torch.bool, device=ids.device)
        self.run(self.marks[MEMORY].expand(len(ids), t, -1), at, cache, everything)
        slots = torch.arange(n_old + t, device=ids.device)
        cache.keep(torch.where(slots < n_old, slots, slots + n), n_positions)

    def both(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """In one pass over all zones."""
        n, t = self.policy.n_segment, self.policy.n_slots
        zones = Zones.of(ids.shape[1] // n, n, t)
        words = self.embed(ids).unflatten(1, (-1, n))  # (B, S, n, d)
        memory, start = (
            self.marks[mark].expand(*words.shape[:2], width, -1)
            for mark, width in ((MEMORY, t), (REPEAT, 1))
        )
        laid = torch.cat([words, memory, start, words[:, :, :-1]], 2).flatten(1, 2)  # (B, T, d)
        logits = self.run(laid, zones.at.to(ids.device), None, zones.sees.to(ids.device))
        return logits[:, zones.kind == READS], logits[:, zones.kind == REPEATS]


class PoolingCompressor(SegmentCompressor):
    """Keys and values of each group are averaged, keys bare of positions; no memory tokens.

    A mean stands at the last position of its group.
    """

    def __init__(self, policy: SoftPolicy, model: nn.Module, seed: int) -> None:
        super().__init__(policy, model, seed)
        self.host.rotary.check(FULL, self.host.shape.width)

    def settle(self, cache: SoftCache, ids: Tensor, n_old: int) -> None:
        """Average them by groups."""
        n, t = ids.shape[1], self.policy.n_slots
        n_positions = cache.get_seq_length()
        at = torch.arange(n_positions - n, n_positions, device=ids.device)[None]
        for layer in cache.layers:
            old, keys = layer.keys[:, :, :n_old], layer.keys[:, :, n_old:]
            before, values = layer.values[:, :, :n_old], layer.values[:, :, n_old:]
            cos, sin = (part[:, None] for part in self.host.rotary.table(at, FULL, keys))
            last = slice(n // t - 1, None, n // t)
            mean = turn_back(keys, cos, sin).unflatten(2, (t, -1)).mean(3)  # (B, H, t, D)
            layer.keys = torch.cat([old, turn(mean, cos[:, :, last], sin[:, :, last])], 2)
            layer.values = torch.cat([before, values.unflatten(2, (t, -1)).mean(3)], 2)
            layer.n_gone = n_positions - layer.n_held
