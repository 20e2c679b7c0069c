"""Which matrices stay in memory, and what a pass through the others will cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from memwise.budget import Budget, readable
from memwise.errors import BudgetExceeded

_GOLDEN = 0.6180339887498949  # multiples of it, without their whole part, lie evenly


class Matrix(Protocol):
    """What a plan knows of a matrix: all attributes in bytes, but the name and the codec."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def codec(self) -> str: ...  # noqa: D102

    @property
    def n_bytes(self) -> int: ...  # noqa: D102

    @property
    def decoded_bytes(self) -> int: ...  # noqa: D102

    @property
    def plain_bytes(self) -> int: ...  # noqa: D102

    @property
    def work_bytes(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Rates:
    """Speeds of this machine.

    Attributes:
        read_bytes_s: bytes of the file that come from the disk in a second.
        decode_bytes_s: bytes of matrices that are decoded in a second; infinite without a codec.
    """

    read_bytes_s: float
    decode_bytes_s: float = float("inf")

    @classmethod
    def of(cls, n_read: int, read_s: float, n_decoded: int, decode_s: float) -> Rates:
        """From bytes and seconds."""
        reading = n_read / read_s if read_s else float("inf")
        return cls(reading, n_decoded / decode_s if decode_s else float("inf"))


@dataclass(frozen=True)
class Plan:
    """What a budget buys.

    Attributes:
        resident: names of the matrices that stay.
        streamed: names of the others, in the order of a pass.
        resident_bytes: of the former, in memory.
        n_ring: places of the ring; 0 where all is resident.
        slot_bytes: of a place.
        scratch_bytes: for what is read and not yet decoded.
        work_bytes: of the decoder.
        read_bytes: that a pass reads.
        decoded_bytes: that a pass decodes.
        plain_bytes: that a pass would read without a codec.
    """

    resident: tuple[str, ...]
    streamed: tuple[str, ...]
    resident_bytes: int
    n_ring: int
    slot_bytes: int
    scratch_bytes: int
    work_bytes: int
    read_bytes: int
    decoded_bytes: int
    plain_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all that is held."""
        decoding = self.scratch_bytes + self.work_bytes
        return self.resident_bytes + self.n_ring * self.slot_bytes + decoding

    def seconds(self, rates: Rates) -> float:
        """Of reading and decoding what one pass needs, one after the other."""
        return self.read_bytes / rates.read_bytes_s + self.decoded_bytes / rates.decode_bytes_s

    def plain_seconds(self, rates: Rates) -> float:
        """The same without a codec."""
        return self.plain_bytes / rates.read_bytes_s

    def pays(self, rates: Rates) -> bool:
        """Whether the codec makes a pass faster than its plain numbers would be."""
        return self.seconds(rates) < self.plain_seconds(rates)

    def break_even(self, rates: Rates) -> float:
        """Bytes a second of a disk below which the codec pays; infinite without decoding."""
        decode_s = self.decoded_bytes / rates.decode_bytes_s
        return (self.plain_bytes - self.read_bytes) / decode_s if decode_s else float("inf")

    def verdict(self, rates: Rates) -> str:
        """In words, whether the codec pays on this machine."""
        if not self.decoded_bytes:
            return f"no codec: a pass reads {readable(self.read_bytes)}"
        numbers = (
            f"a pass reads {readable(self.read_bytes)} instead of {readable(self.plain_bytes)}; at "
            f"{rates.read_bytes_s / 1e6:.0f} MB/s of the disk and "
            f"{rates.decode_bytes_s / 1e9:.2f} GB/s of decoding it takes "
            f"{self.seconds(rates):.3f} s, plain {self.plain_seconds(rates):.3f} s; it pays on "
            f"disks below {self.break_even(rates) / 1e6:.0f} MB/s"
        )
        if self.pays(rates):
            return f"the codec pays: {numbers}"
        return f"the codec does not pay here, store the matrices plain: {numbers}"

    def __str__(self) -> str:
        return (
            f"{len(self.resident)} matrices resident ({readable(self.resident_bytes)}), "
            f"{len(self.streamed)} through {self.n_ring} places of {readable(self.slot_bytes)}; a "
            f"pass reads {readable(self.read_bytes)}"
        )


def planned(
    matrices: Sequence[Matrix], budget: Budget, pinned: Collection[str] = (), n_ring: int = 2
) -> Plan:
    """Choose what stays: all that fits beside the ring, spread evenly over a pass.

    A resident matrix between two streamed ones gives the thread time to read ahead.

    Args:
        matrices: in the order of a pass.
        budget: for all that is held.
        pinned: names that stay in any case.
        n_ring: places of the ring, if there is room for so many; one place at least.

    Raises:
        BudgetExceeded: what is pinned and one other matrix do not fit.
    """
    decoding = sum(_decoding(matrices))
    sizes = {m.name: _held(m) for m in matrices}
    if sum(sizes.values()) + decoding <= budget:
        return _plan(matrices, frozenset(sizes), 0, 0)
    slot = max((sizes[m.name] for m in matrices if m.name not in pinned), default=0)
    fixed = sum(sizes[name] for name in pinned) + decoding
    if fixed + slot > budget:
        raise BudgetExceeded(
            f"{readable(fixed)} have to be held and the largest matrix takes {readable(slot)}; the "
            f"budget is {readable(budget)}: raise budget= to at least {fixed + slot} bytes"
        )
    while n_ring > 1 and fixed + n_ring * slot > budget:
        n_ring -= 1
    left = budget - fixed - n_ring * slot
    stays = set(pinned)
    order = sorted(range(len(matrices)), key=lambda i: i * _GOLDEN % 1)
    for name in (matrices[i].name for i in order):
        if name not in stays and sizes[name] <= left:
            stays.add(name)
            left -= sizes[name]
    return _plan(matrices, stays, n_ring, slot)


def _decoding(matrices: Sequence[Matrix]) -> tuple[int, int]:
    """Bytes of the scratch and of the decoder's work."""
    coded = [m for m in matrices if m.codec]
    scratch = max((m.n_bytes for m in coded), default=0)
    return scratch, max((m.work_bytes for m in coded), default=0)


def _held(matrix: Matrix) -> int:
    # Plain ones are read to their place with the padding behind them.
    return max(matrix.decoded_bytes, 0 if matrix.codec else matrix.n_bytes)


def _plan(matrices: Sequence[Matrix], stays: Collection[str], n_ring: int, slot: int) -> Plan:
    scratch, work = _decoding(matrices)
    streamed = [m for m in matrices if m.name not in stays]
    return Plan(
        resident=tuple(m.name for m in matrices if m.name in stays),
        streamed=tuple(m.name for m in streamed),
        resident_bytes=sum(_held(m) for m in matrices if m.name in stays),
        n_ring=n_ring if streamed else 0,
        slot_bytes=slot if streamed else 0,
        scratch_bytes=scratch,
        work_bytes=work,
        read_bytes=sum(m.n_bytes for m in streamed),
        decoded_bytes=sum(m.decoded_bytes for m in streamed if m.codec),
        plain_bytes=sum(m.plain_bytes for m in streamed),
    )
