"""Control for forgetting: chance decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from memwise.catalogue import Card
from memwise.recall.engine.policy import Policy
from memwise.recall.engine.records import Instant, Item


@dataclass(frozen=True)
class RandomEviction(Policy):
    """Keep every turn; over the byte budget the loser of a seeded lottery goes.

    Each item draws one lot, so that what is left is always an even sample of all that was told.

    Attributes:
        seed: of the lottery.
    """

    card = Card(
        paper=None,
        claim="what is left if chance decides what is forgotten",
        check="byte_stream",
        baseline="fifo",
        better="higher",
        margin=0.0,
        kind="control",
    )
    seed: int = 0

    def retention(self, items: Sequence[Item], now: Instant) -> Sequence[float]:
        return [self._lot(item.row) for item in items]

    def why_forgotten(self, item: Item, now: Instant) -> str:
        return f"drew lot {self._lot(item.row):.3f}"

    def _lot(self, row: int) -> float:
        key = f"{self.seed}/{row}".encode()
        return int.from_bytes(blake2b(key, digest_size=6).digest(), "big") / 2**48
