"""How many slots a budget holds, with all that lies beside them counted.

Charged are keys, values, positions and columns of all slots, the window of every sliding layer, the
queries that are kept, room for a chunk and a probe, the keys and values of a chunk before they are
written, the scratch of choosing slots in one layer, what a codec decodes at once, and what a policy
was trained to know. Not charged, as they are there with any cache: the model's weights, hidden
states, logits of the attention that is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from memwise.budget import Budget, readable
from memwise.codec.spec import parse
from memwise.context.engine.attention import _ROWS
from memwise.context.engine.policy import CachePolicy
from memwise.context.engine.store import BLOCK, SEEN
from memwise.errors import BudgetExceeded, InvalidKnob

FULL, SLIDING = "full_attention", "sliding_attention"
_CHOOSING = 48  # bytes a slot and head: score, its order, the chosen ones, what is added up


@dataclass(frozen=True)
class Shape:
    """What a model's cache is made of.

    Attributes:
        layer_types: of each layer, `FULL` or `SLIDING`.
        n_heads: key-value heads.
        n_query_heads: query heads.
        width: of a head.
        window: tokens that a sliding layer sees, the newest included.
        itemsize: bytes of a number.
        codec: that keys and values are held in; None = as they are.
    """

    layer_types: tuple[str, ...]
    n_heads: int
    n_query_heads: int
    width: int
    window: int
    itemsize: int
    codec: str | None = None

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have slots."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL)

    @property
    def pair_bytes(self) -> int:
        """Bytes of a token's keys and values in one layer."""
        return self.n_heads * 2 * self.width * self.itemsize

    @property
    def held_bytes(self) -> int:
        """The same as it is held for long."""
        if self.codec is None:
            return self.pair_bytes
        return self.n_heads * 2 * parse(self.codec).nbytes((1, self.width))

    def slots_bytes(self, n_slots: int, room: int, n_notes: int) -> int:
        """Bytes of so many slots of one layer, `room` of them beside those that stay."""
        newest = room * self.pair_bytes if self.codec else 0
        return (n_slots + room) * (self.held_bytes + 4 * self.n_heads * n_notes) + newest


class Allocator(Protocol):
    """How slots are shared out among the full-attention layers."""

    def shares(self, layers: Sequence[int]) -> Sequence[float]:
        """Relative shares of these layers, each above 0."""


@dataclass(frozen=True)
class Uniform:
    """The same number of slots for every layer."""

    def shares(self, layers: Sequence[int]) -> Sequence[float]:
        """One each."""
        return [1.0] * len(layers)


@dataclass(frozen=True)
class ByLayer:
    """Slots in proportion to given weights.

    Attributes:
        weights: of the full-attention layers, in their order.
    """

    weights: tuple[float, ...]

    def shares(self, layers: Sequence[int]) -> Sequence[float]:
        """The weights.

        Raises:
            InvalidKnob: there are more or fewer layers, or a weight is not above 0.
        """
        if len(self.weights) != len(layers) or min(self.weights) <= 0:
            raise InvalidKnob(
                f"weights={self.weights!r}: give {len(layers)} numbers above 0, one for each of "
                f"the full-attention layers {list(layers)}"
            )
        return self.weights


@dataclass(frozen=True)
class Plan:
    """Slots of each full-attention layer, for a batch.

    Attributes:
        n_slots: that stay when some have to go, by layer index.
        room: slots beside them, for the tokens of a chunk and of a probe.
        probe: of the room, those that only a probe uses.
        chunk: most tokens that are written at once.
        needed: bytes that all of it takes at most.
    """

    n_slots: dict[int, int]
    room: int
    probe: int
    chunk: int
    needed: int


def plan(
    shape: Shape, policy: CachePolicy, budget: int, chunk: int, n_probe: int, batch: int,
    allocator: Allocator,
) -> Plan:  # fmt: skip
    """Share a budget in bytes out among the layers.

    Raises:
        BudgetExceeded: not even the least number of slots fits.
    """
    layers, brought = shape.full_layers, _brought(shape, policy)
    weights = allocator.shares(layers)
    shares = [len(layers) * weight / sum(weights) for weight in weights]

    def slots(mean: float) -> dict[int, int]:
        return {
            layer: max(policy.floor, int(share * mean + 1e-9))
            for layer, share in zip(layers, shares, strict=True)
        }

    def needed(mean: float) -> int:
        return batch * _bytes(shape, policy, slots(mean), chunk, n_probe) + brought

    least = needed(0)
    if least > budget:
        raise BudgetExceeded(
            f"{type(policy).__name__} with chunks of {chunk} tokens and a batch of {batch} needs "
            f"at least {least} bytes ({readable(least)}) for {policy.floor} slots in each of "
            f"{len(layers)} full-attention layers, "
            f"{readable(batch * _beside(shape, policy, chunk, n_probe) + brought)} of them beside "
            f"the slots; the budget is {readable(budget)}: raise budget=, or lower chunk="
        )
    low, high = 0, 1 + budget  # whole slots of the mean layer
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= budget else (low, middle)
    return Plan(slots(low), chunk + n_probe, n_probe, chunk, needed(low))


def budget_for(
    shape: Shape, policy: CachePolicy, n_slots: int, chunk: int, n_probe: int, batch: int
) -> Budget:
    """The least budget that keeps so many slots in every full-attention layer."""
    slots = dict.fromkeys(shape.full_layers, n_slots)
    each = _bytes(shape, policy, slots, chunk, n_probe)
    return Budget(batch * each + _brought(shape, policy))


def _brought(shape: Shape, policy: CachePolicy) -> int:
    return sum(tensor.nbytes for tensor in policy.weights(shape).values())


def _bytes(
    shape: Shape, policy: CachePolicy, slots: dict[int, int], chunk: int, n_probe: int
) -> int:
    n_notes = len(policy.columns) + policy.raw_keys + 1
    room = chunk + n_probe
    held = sum(shape.slots_bytes(n, room, n_notes) for n in slots.values())
    work = _CHOOSING * shape.n_heads
    if policy.window or n_probe:
        # Logits, their softmax, and where they count.
        work += (2 * max(4, shape.itemsize) + 2) * shape.n_query_heads * _ROWS
    if policy.raw_keys or shape.codec:
        work += shape.pair_bytes // 2  # keys, turned or decoded
    if type(policy).merge is not CachePolicy.merge:
        work += (_ROWS + 1) * shape.n_heads * shape.itemsize  # how alike slots are, rows at a time
    if type(policy).branches is not CachePolicy.branches:
        # Keys turned a second time, and which pairs of the rows at hand.
        work += shape.pair_bytes // 2 + _ROWS * (16 * shape.n_heads + 4 * shape.n_query_heads * 4)
    widest = max(slots.values(), default=0) + room
    return held + widest * work + _beside(shape, policy, chunk, n_probe)


def _beside(shape: Shape, policy: CachePolicy, chunk: int, n_probe: int) -> int:
    n_full = len(shape.full_layers)
    n_sliding = len(shape.layer_types) - n_full
    most = max(chunk, n_probe)
    windows = n_sliding * shape.slots_bytes(shape.window - 1, most, 1) if n_sliding else 0
    n_queries = max(policy.window, n_probe)
    a_query = shape.n_query_heads * shape.width * shape.itemsize + 4
    incoming = (most + 2 * BLOCK) * shape.pair_bytes
    decoded = 4 * SEEN * shape.pair_bytes if shape.codec else 0
    # Queries of a pass, by layer, and some tokens' inputs as they are turned back.
    inputs = (n_full * chunk + 8 * BLOCK) * (a_query + shape.pair_bytes)
    decoded += inputs if policy.needs_inputs else 0
    return windows + n_full * n_queries * a_query + incoming + decoded
