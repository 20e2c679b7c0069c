"""A vision transformer that remembers: a few activations of each layer for each segment of a video.

The segments of a video go through the layers one after another. In each layer the tokens of a
segment attend to what is held of the earlier segments and to themselves; then a policy reduces what
came into the layer to a few memories, through which no gradient flows.

Shapes: B videos, N tokens of a segment, K memories made of them, M memories held, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from memwise.budget import Budget, BudgetLike, Ledger
from memwise.catalogue import Card
from memwise.context.engine.building import need_layers, weights_from
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor

METHODS = ("random", "coreset", "kmeans")
_N_PASSES = 5  # of Lloyd's algorithm


@torch.no_grad()
def consolidate(x: Tensor, n_kept: int, method: str, draws: torch.Generator) -> Tensor:
    """Reduce each set of vectors (B, N, D) to n_kept of its own or of their means, (B, K, D).

    - "random": a random subset, each with equal chance.
    - "coreset": the vector nearest to the mean, then each time the one farthest from all chosen.
    - "kmeans": means of the groups that form around the coreset, after a few passes.

    What is chosen stays in its order. Sets of no more than n_kept vectors come back as they are.

    Args:
        x: vectors of B sets.
        n_kept: K, at least 0.
        method: one of `METHODS`.
        draws: for "random".

    Raises:
        InvalidKnob: there is no such method, or n_kept is negative.
    """
    if method not in METHODS:
        raise InvalidKnob(f"method={method!r}: give one of {', '.join(METHODS)}")
    if n_kept < 0:
        raise InvalidKnob(f"n_kept={n_kept}: give 0 or more")
    x = x.detach()
    if n_kept == 0 or n_kept >= x.shape[1]:
        return x[:, :n_kept]
    if method == "random":
        lots = torch.rand(x.shape[:2], generator=draws, device=draws.device).to(x.device)
        return _rows(x, lots.topk(n_kept).indices)
    chosen = _rows(x, _coreset(x, n_kept))
    return chosen if method == "coreset" else _means(x, chosen)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Vectors at places (B, K), in the order of the set."""
    return x.take_along_dim(places.sort().values[..., None], 1)


def _coreset(x: Tensor, n_kept: int) -> Tensor:
    """Places (B, K) of the farthest-point traversal; 2-approximates the k-center problem."""
    nearest = (x - x.mean(1, keepdim=True)).square().sum(-1)  # (B, N)
    places = nearest.argmin(1, keepdim=True)
    away = torch.full_like(nearest, torch.inf)
    for _ in range(n_kept - 1):
        last = x.take_along_dim(places[:, -1:, None], 1)
        away = torch.minimum(away, (x - last).square().sum(-1))
        # Of equal vectors each is taken once.
        places = torch.cat([places, away.scatter(1, places, -1).argmax(1, keepdim=True)], 1)
    return places


def _means(x: Tensor, centers: Tensor) -> Tensor:
    """Lloyd's algorithm from centers (B, K, D); a center that nobody is near to stays."""
    for _ in range(_N_PASSES):
        belongs = F.one_hot(torch.cdist(x, centers).argmin(-1), centers.shape[1]).to(x.dtype)
        n_near = belongs.sum(1)[..., None]  # (B, K, 1)
        means = belongs.mT @ x / n_near.clamp(min=1)
        centers = torch.where(n_near > 0, means, centers)
    return centers


# --- what is held


@dataclass(frozen=True, eq=False)
class SegmentMemory:
    """What is held of the segments that were seen; with each segment a new one is made.

    Attributes:
        segments: memories of each segment in each layer (B, K, D). The next memory holds the same
            tensors and those of its own segment, so that nothing is held twice.
    """

    segments: tuple[tuple[Tensor, ...], ...] = ()

    def layer(self, i: int) -> list[Tensor]:
        """Memories of a layer, segment by segment (B, K, D)."""
        return [held[i] for held in self.segments]

    @property
    def n_tokens(self) -> int:
        """M, memories of a layer."""
        return sum(held[0].shape[1] for held in self.segments)

    @property
    def n_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.untyped_storage().nbytes() for held in self.segments for layer in held)


@dataclass(frozen=True, eq=False)
class Seen:
    """What came into one layer, for a policy to reduce.

    Attributes:
        tokens: (B, N, D), without gradient.
        layer: 0 is the lowest.
        draws: random numbers.
    """

    tokens: Tensor
    layer: int
    draws: torch.Generator


@dataclass(frozen=True)
class SegmentPolicy:
    """What is remembered of a segment. A policy holds knobs, and its call builds the encoder."""

    card: ClassVar[Card]

    def keep(self, seen: Seen) -> Tensor:
        """Memories (B, K, D) of what came into a layer."""
        raise NotImplementedError

    def __call__(
        self, width: int = 192, n_layers: int = 6, n_heads: int = 3,
        budget: BudgetLike | None = None, seed: int = 0,
    ) -> SegmentEncoder:  # fmt: skip
        """An encoder with this memory; all policies have the same weights under the same names.

        Args:
            width: D.
            n_layers: blocks.
            n_heads: of each attention.
            budget: bytes that the memories of all segments in all layers may take; None for no end.
            seed: of the weights.

        Raises:
            InvalidKnob: the width is no multiple of the heads, or there are no layers.
        """
        need_layers(width, n_layers, n_heads)
        with weights_from(seed):
            return SegmentEncoder(
                self, width, n_layers, n_heads, None if budget is None else Budget(budget)
            )


# --- the encoder


class MemoryBlock(nn.Module):
    """A pre-norm transformer block whose keys and values are memories, then a segment's tokens."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, memories: Sequence[Tensor]) -> Tensor:
        """The segment's tokens (B, N, D) after attention to memories (B, K, D) and themselves."""
        read = self.norm1(torch.cat([*memories, x], 1))  # (B, M + N, D)
        queries = self.query(read[:, -x.shape[1] :])
        keys, values = self.key_value(read).chunk(2, -1)
        q, k, v = (self._heads(part) for part in (queries, keys, values))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D / H)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class SegmentEncoder(nn.Module):
    """Transformer blocks that read a video segment by segment, with a memory in each block.

    Patches, positions and what is made of the output are the caller's.
    """

    def __init__(
        self, policy: SegmentPolicy, width: int, n_layers: int, n_heads: int,
        budget: Budget | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.policy, self.budget = policy, budget
        self.blocks = nn.ModuleList(MemoryBlock(width, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, tokens: Tensor, memory: SegmentMemory | None = None,
        draws: torch.Generator | None = None,
    ) -> tuple[Tensor, SegmentMemory]:  # fmt: skip
        """The tokens (B, N, D) of a segment after all layers, and the memory with it.

        Args:
            tokens: of the segment.
            memory: of the segments before; None begins a video.
            draws: random numbers for a policy that needs them; by default they follow from the
                number of segments, so that a resumed video goes on as an uninterrupted one.

        Raises:
            BudgetExceeded: the memory with this segment would be larger.
            InvalidKnob: the memory is of other videos, or of another encoder.
        """
        held = memory or SegmentMemory()
        self._check(tokens, held)
        draws = draws or torch.Generator().manual_seed(len(held.segments))
        ledger = Ledger(self.budget)
        ledger.set("device", "memories", held.n_bytes)
        x, kept = tokens, []
        for i, block in enumerate(self.blocks):
            # A copy, which neither holds the tokens that it was taken of nor changes with them.
            new = self.policy.keep(Seen(x.detach(), i, draws)).clone()
            ledger.add("device", "memories", new.untyped_storage().nbytes())
            kept.append(new)
            x = block(x, held.layer(i))
        return self.norm(x), SegmentMemory((*held.segments, tuple(kept)))

    def _check(self, tokens: Tensor, held: SegmentMemory) -> None:
        here = [(len(tokens), tokens.shape[-1])] * len(self.blocks)
        for layers in held.segments[-1:]:
            there = [(len(layer), layer.shape[-1]) for layer in layers]
            if there != here:
                raise InvalidKnob(
                    f"a memory of (videos, width) {there} in its layers; the segment and this "
                    f"encoder have {here}: give the memory that the segment before returned"
                )
