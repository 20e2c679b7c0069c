"""What a bounded cache holds: bytes by kind, tokens by layer, and what became of one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memwise.budget import readable
from memwise.context.engine.store import EMPTY

if TYPE_CHECKING:
    from memwise.context.engine.cache import BudgetedCache


@dataclass(frozen=True)
class Report:
    """What is held, counted and measured.

    Attributes:
        budget: in bytes.
        held_bytes: measured from storages, by kind.
        full_bytes: keys and values that a cache without a budget would hold.
        n_seen: tokens that were given.
        n_slots: that stay when some have to go, by layer.
        kept: positions that are held, by layer: of the first row, those in any head.
    """

    budget: int
    held_bytes: dict[str, int]
    full_bytes: int
    n_seen: int
    n_slots: dict[int, int]
    kept: dict[int, list[int]]

    def explain(self, token: int) -> str:
        """Where a token of the text is still held, from its position."""
        if not 0 <= token < self.n_seen:
            return f"token {token} was never seen: there were {self.n_seen}"
        where = [layer for layer, kept in self.kept.items() if token in set(kept)]
        if not where:
            return f"token {token} was dropped in all of the layers {list(self.kept)}"
        gone = [layer for layer in self.kept if layer not in where]
        rest = f", dropped in {gone}" if gone else ""
        return f"token {token} is held in the layers {where}{rest}"

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**vars(self)}

    def __str__(self) -> str:
        lines = [f"{name:<32}{readable(size):>12}" for name, size in self.held_bytes.items()]
        lines.append(f"{'all':<32}{readable(sum(self.held_bytes.values())):>12}")
        lines.append(f"{'budget':<32}{readable(self.budget):>12}")
        lines.append(f"{'without a budget':<32}{readable(self.full_bytes):>12}")
        lines.append(f"tokens seen: {self.n_seen}")
        for layer, kept in self.kept.items():
            lines.append(
                f"layer {layer:>3}: {len(kept)} of {self.n_seen} tokens held, "
                f"{self.n_slots[layer]} stay when some have to go"
            )
        return "\n".join(lines)


def report(cache: BudgetedCache) -> Report:
    """What a cache holds now."""
    shape = cache.shape
    kept = {}
    for layer in cache.slot_layers:
        if layer.is_initialized:
            at = layer.slots.pos[0, :, : layer.slots.n].unique().tolist()
            kept[layer.index] = [p for p in at if p != EMPTY]
    n_sliding = len(shape.layer_types) - len(shape.full_layers)
    tokens = len(shape.full_layers) * cache.n_seen
    tokens += n_sliding * min(cache.n_seen, max(0, shape.window - 1))
    return Report(
        budget=int(cache.budget),
        held_bytes={kind: now for _, kind, now, _ in cache.ledger if now},
        full_bytes=cache.batch * tokens * shape.pair_bytes,
        n_seen=cache.n_seen,
        n_slots=dict(cache.plan.n_slots),
        kept=kept,
    )
