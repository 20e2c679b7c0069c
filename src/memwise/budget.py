"""Bytes, the one currency of all rooms: how many there are, and where they lie."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal
from operator import index
from typing import SupportsIndex, TypeAlias

from memwise.errors import BudgetExceeded, InvalidKnob

BudgetLike: TypeAlias = "Budget | int | str"

_BINARY = {"TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    **{unit.lower(): size for unit, size in _BINARY.items()},
}
_SIZE = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class Budget(int):
    """A number of bytes that something may occupy at any moment, peaks included.

    It is an `int`, so it compares, adds and serialises as the number of bytes. MiB (2**20) and MB
    (10**6) are different words; a lone "M" is refused because it could be either.

    Raises:
        InvalidKnob: on anything that is not a whole, non-negative number of bytes.
    """

    def __new__(cls, size: BudgetLike | float) -> Budget:
        """Read a size: a string with a unit, or a whole number of bytes."""
        return super().__new__(cls, _parse(size) if isinstance(size, str) else _whole(size))

    @property
    def bytes(self) -> int:
        """The plain number of bytes."""
        return int(self)

    def __str__(self) -> str:
        return readable(self)

    def __repr__(self) -> str:
        for unit, size in _BINARY.items():
            if self and self % size == 0:
                return f"Budget('{self // size}{unit}')"
        return f"Budget({int(self)})"

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec else str(self)


def readable(n_bytes: int) -> str:
    """Write a number of bytes for people: `67108864` -> `64 MiB`, `1536` -> `1.5 KiB`."""
    for unit, size in _BINARY.items():
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{int(n_bytes)} B"


def _parse(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise InvalidKnob(
            f"budget {text!r} is not a size; write a number of bytes or a number with one of "
            "B, KiB, MiB, GiB, TiB (powers of 1024), KB, MB, GB, TB (powers of 1000), e.g. '64MiB'"
        )
    # Decimal, because 0.1 * 1000 must be a whole number of bytes.
    return int(Decimal(match[1].replace("_", "")) * _UNITS[match[2].lower()])


def _whole(size: object) -> int:
    if isinstance(size, float) and size.is_integer():
        size = int(size)
    if isinstance(size, bool) or not isinstance(size, SupportsIndex):
        raise InvalidKnob(
            f"budget {size!r} is not a whole number of bytes; write e.g. '64MiB' or 1 << 26"
        )
    if index(size) < 0:
        raise InvalidKnob(f"budget {size!r} is negative; the smallest budget is 0 bytes")
    return index(size)


class Ledger:
    """Which bytes lie where: (tier, kind) -> bytes, now and at the highest moment so far.

    Tiers are "device", "host" and "disk"; kinds are free words such as "text" or "codes". Numbers
    come from storages that were measured. Ask before allocating: a change that does not fit raises
    and leaves the ledger as it was.

    Args:
        budget: bytes that all tiers together may hold, or a mapping tier -> bytes that holds each
            tier to its own limit; None only counts.
        outside: kinds that are listed but not charged (the weights beside a cache, for example).
        knob: the argument that the message of BudgetExceeded tells people to turn.
    """

    def __init__(
        self,
        budget: BudgetLike | Mapping[str, BudgetLike] | None = None,
        *,
        outside: Collection[str] = (),
        knob: str = "budget",
    ) -> None:
        self._limits: dict[str | None, Budget] = {}
        if isinstance(budget, Mapping):
            self._limits = {tier: Budget(limit) for tier, limit in budget.items()}
        elif budget is not None:
            self._limits = {None: Budget(budget)}

        self._outside = frozenset(outside)
        self._knob = knob
        self._now: dict[tuple[str, str], int] = {}
        self._peaks: dict[tuple[str, str], int] = {}
        self._peak_of: dict[str | None, int] = {}

    def add(self, tier: str, kind: str, n_bytes: int) -> None:
        """Count `n_bytes` more.

        Raises:
            BudgetExceeded: when they do not fit; nothing has changed then.
        """
        self.set(tier, kind, self[tier, kind] + n_bytes)

    def release(self, tier: str, kind: str, n_bytes: int | None = None) -> None:
        """Give `n_bytes` back, or all of that line.

        Raises:
            InvalidKnob: when more is given back than is held.
        """
        held = self[tier, kind]
        self.set(tier, kind, 0 if n_bytes is None else held - n_bytes)

    def set(self, tier: str, kind: str, n_bytes: int) -> None:
        """State that this line now holds `n_bytes`, as measured.

        Raises:
            BudgetExceeded: when they do not fit; nothing has changed then.
            InvalidKnob: when the line would become negative.
        """
        if n_bytes < 0:
            raise InvalidKnob(
                f"ledger line {tier}/{kind} would hold {n_bytes} bytes; "
                "release at most what was added"
            )
        change = n_bytes - self[tier, kind]
        if change > 0 and kind not in self._outside:
            self._check(tier, kind, change)

        self._now[tier, kind] = n_bytes
        self._peaks[tier, kind] = max(n_bytes, self._peaks.get((tier, kind), 0))
        for scope in (tier, None):
            self._peak_of[scope] = max(self.total(scope), self._peak_of.get(scope, 0))

    def total(self, tier: str | None = None) -> int:
        """Bytes charged now, in one tier or in all; kinds that are `outside` are not in it."""
        return sum(
            n_bytes
            for (where, kind), n_bytes in self._now.items()
            if kind not in self._outside and tier in (None, where)
        )

    def peak(self, tier: str | None = None) -> int:
        """The highest `total` that ever held at one moment, in bytes."""
        return self._peak_of.get(tier, 0)

    def left(self, tier: str) -> int | None:
        """Bytes that may still be added in this tier; None without a budget."""
        rooms = [
            limit - self.total(scope)
            for scope, limit in self._limits.items()
            if scope in (None, tier)
        ]
        return min(rooms, default=None)

    def __getitem__(self, line: tuple[str, str]) -> int:
        return self._now.get(line, 0)

    def __iter__(self) -> Iterator[tuple[str, str, int, int]]:
        """Lines in order, each `(tier, kind, bytes now, bytes at this line's peak)`."""
        for line in sorted(self._now):
            yield *line, self._now[line], self._peaks[line]

    def __str__(self) -> str:
        table = [("tier", "kind", "now", "peak")]
        for tier, kind, now, peak in self:
            note = " (not charged)" if kind in self._outside else ""
            table.append((tier, kind + note, readable(now), readable(peak)))
        table.append(("all", "", readable(self.total()), readable(self.peak())))

        for scope, limit in self._limits.items():
            table.append((scope or "all", "budget", readable(limit), ""))

        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        rows = (
            f"{tier:<{widths[0]}}  {kind:<{widths[1]}}  {now:>{widths[2]}}  {peak:>{widths[3]}}"
            for tier, kind, now, peak in table
        )
        return "\n".join(row.rstrip() for row in rows)

    def _check(self, tier: str, kind: str, change: int) -> None:
        for scope in (tier, None):
            limit = self._limits.get(scope)
            if limit is None or self.total(scope) + change <= limit:
                continue
            where = f"the budget of tier {scope!r}" if scope else "the budget"
            raise BudgetExceeded(
                f"{readable(change)} more for {tier}/{kind} do not fit: {where} is "
                f"{readable(limit)} and {readable(self.total(scope))} are in use; "
                f"raise {self._knob}= to at least {self.total(scope) + change} bytes, "
                "or store less"
            )
