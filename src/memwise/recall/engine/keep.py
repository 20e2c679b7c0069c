"""Keeping the byte budget: file, WAL, shared memory and RAM indexes together, at every moment.

A transaction first grows the WAL, a checkpoint then grows the file, and only after that the WAL is
cut: so a reserve is held back for the WAL, transactions are kept small enough for it, and room is
made *before* anything is written. Room is counted in free pages, since a deleted row gives back
bytes only when its page is empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memwise.budget import Budget, BudgetLike, Ledger
from memwise.errors import BudgetExceeded, StoreLocked
from memwise.recall.engine.records import (
    NOTHING,
    Add,
    Evict,
    Instant,
    Item,
    Merge,
    Op,
    Receipt,
    Replace,
)
from memwise.recall.engine.store import SQLite
from memwise.recall.engine.tables import Code

if TYPE_CHECKING:
    from memwise.recall.memory import Memory

SMALLEST = 512 << 10
ATTIC_RATIO = 0.2
_LOG_RATIO = 0.05  # of the budget, for the operations that stay undoable
_RESERVE_RATIO = 0.25  # of the budget, held back for the WAL, at most 4 MiB
_SLACK_RATIO = 0.02  # of the budget, freed at once, so that not every call has to forget
_ROW_BYTES = 300  # of an item's columns and its entries in the trees of the file
_LINK_BYTES = 150  # of a link in its two trees
_RAM_BYTES = 150  # of an item's entries in the indexes, without terms and vector
_EVICT_PAGES = 8  # pages that forgetting one item may touch
_FIXED_PAGES = 16  # pages that any transaction may touch: roots, bank, log, free list
_MAX_VICTIMS = 64  # items evicted in one transaction
_WITH_NEW = (Add, Replace, Merge)


@dataclass(frozen=True)
class _Load:
    """What a transaction will take: bytes in the file, in the RAM indexes and in the WAL.

    `reserve` is what is held back for the WAL while it runs.
    """

    file: int = 0
    ram: int = 0
    wal: int = 0
    reserve: int = 0


def checked(budget: BudgetLike | None) -> Budget | None:
    """A budget that a memory file can live in.

    Raises:
        BudgetExceeded: it is too small.
    """
    limit = None if budget is None else Budget(budget)
    if limit is not None and limit < SMALLEST:
        raise BudgetExceeded(
            f"budget {limit} is too small for a memory file; give at least {Budget(SMALLEST)}"
        )
    return limit


class Keeper:
    """Watches one memory's bytes.

    Args:
        store: the file.
        budget: most bytes; None = unbounded.
    """

    def __init__(self, store: SQLite, budget: Budget | None):
        self._store, self.budget = store, budget
        self._page = int(store.db.execute("PRAGMA page_size").fetchone()[0])
        self._reserve = min(4 << 20, int((budget or 16 << 20) * _RESERVE_RATIO))
        if budget is not None:
            pages = max(8, self._reserve // 4 // self._page)
            store.db.execute(f"PRAGMA wal_autocheckpoint={pages}")
            store.db.execute("PRAGMA journal_size_limit=0")

    def portions(self, adds: Sequence[Add]) -> Iterator[list[Add]]:
        """The turns in transactions small enough for the WAL reserve; all in one if unbounded."""
        if self.budget is None:
            yield [*adds]
            return
        size, part = 0, list[Add]()
        tree = min(self._page, self._file() // 256)
        for add in adds:
            own = 2 * (_content_bytes(add) + _ROW_BYTES + tree)  # it and what is derived from it
            if part and size + own > self._reserve // 2:
                yield part
                size, part = 0, []
            size += own
            part.append(add)
        if part:
            yield part

    def make_room(
        self,
        memory: Memory,
        ops: Sequence[Op],
        codes: Mapping[int, Code],
        now: Instant,
        call: int | None,
    ) -> Receipt:
        """Forget enough, before they are written, for the operations to fit.

        Returns:
            What was forgotten; its `operation` is `call`, or the first eviction's if that is None.

        Raises:
            BudgetExceeded: they do not fit even after everything else was forgotten.
            StoreLocked: a reader keeps the WAL from being folded in.
        """
        if self.budget is None or not ops:
            return NOTHING if call is None else Receipt(operation=call)
        load = self._load(ops, codes)
        self._fold(load)
        return self._shrink(memory, self.budget, load, now, call)

    def parts(
        self, memory: Memory, adds: Sequence[Add], codes: Mapping[int, Code], freed: int
    ) -> Iterator[list[Add]]:
        """What an undo brings back, in transactions that fit; empty if one may take all.

        An undo does not forget other things to make room: it fits as it is or is refused.

        Args:
            memory: whose budget.
            adds: what comes back.
            codes: as `SQLite.apply` takes them.
            freed: bytes of what goes for it.

        Raises:
            BudgetExceeded: it does not fit.
        """
        if self.budget is None:
            return
        self._fold(_Load(wal=self._reserve))
        bytes_back = sum(
            _content_bytes(add) + len(codes[id(add)].terms) + len(codes[id(add)].vector or b"")
            for add in adds
        )
        free = freed + self._pragma("freelist_count") * self._page
        growth = max(0, bytes_back + _ROW_BYTES // 2 * len(adds) - free)
        index = memory.index_bytes()
        index += index // 8 + index * len(adds) // max(1, memory.view().index.n_items)
        shm = max(32 << 10, self._store.file_bytes()["shm"])
        used = self._file() + growth + shm + index + self._reserve // 2
        if used > self.budget:
            raise BudgetExceeded(
                f"undo would bring back {len(adds)} items and take {Budget(used)} for a moment, "
                f"over the budget of {self.budget}; open the memory with a larger budget="
            )
        for part in self.portions(adds):
            self._fold(_Load(wal=self._reserve // 2))
            yield part

    def forget(self, memory: Memory, budget: Budget, now: Instant) -> Receipt:
        """Shrink the file until it fits `budget`, least valuable items first."""
        checked(budget)
        receipt = self._shrink(memory, budget, _Load(), now, None)
        self._give_back(lambda: True)
        return receipt

    def forget_before(self, memory: Memory, when: Instant, now: Instant) -> Receipt:
        """Forget everything whose event time lies before an instant."""
        receipt = Receipt()
        view = memory.view()
        why = "older than asked for"
        items = [(i, why) for i in view.store.scan(view.bank, expired=True) if i.at < when]
        while items:
            part, items = items[: self._victims], items[self._victims :]
            receipt += self._evict(memory, part, now, receipt.operation)
            if self.budget is not None:
                receipt += self._trim(self.budget)
        self._give_back(lambda: True)
        return receipt

    def used(self, memory: Memory) -> int:
        """Bytes that count now: file, WAL, shared memory and the RAM indexes of this process."""
        return sum(self._store.file_bytes().values()) + memory.index_bytes()

    def ledger(self, memory: Memory) -> Ledger:
        """Where every byte lies."""
        ledger = Ledger()
        tables = self._store.table_bytes()
        disk = self._store.file_bytes()
        for kind, size in tables.items():
            ledger.set("disk", kind, size)
        ledger.set("disk", "pages and b-trees", max(0, disk["file"] - sum(tables.values())))
        ledger.set("disk", "write-ahead log", disk["wal"] + disk["shm"])
        ledger.set("host", "indexes", memory.index_bytes())
        return ledger

    # ------------------------------------------------------------ measuring

    @property
    def _victims(self) -> int:
        return max(1, min(_MAX_VICTIMS, self._reserve // (2 * _EVICT_PAGES * self._page)))

    def _load(self, ops: Sequence[Op], codes: Mapping[int, Code]) -> _Load:
        adds = [op if isinstance(op, Add) else op.new for op in ops if isinstance(op, _WITH_NEW)]
        n_links = len(ops) + sum(len(a.sources) + len(a.links) for a in adds)
        content = terms = vectors = 0
        for add in adds:
            code = codes.get(id(add))
            content += _content_bytes(add)
            terms += len(code.terms) if code else 0
            vectors += len(code.vector or b"") if code else 0
        file = content + terms + vectors + _ROW_BYTES * len(adds) + _LINK_BYTES * n_links
        file += file // 5  # pages are never quite full
        # An entry of the term index takes up to five times its number, a vector up to four times.
        ram = _RAM_BYTES * len(adds) + 5 * terms + 5 * vectors
        # The hash of a new item lies anywhere in its tree, and so may the far end of a link; each
        # of these trees is a small part of the file.
        tree = 2 + self._pragma("page_count") // 8
        pages = _FIXED_PAGES + min(len(adds), tree) + min(n_links, tree)
        wal = file + pages * self._page
        return _Load(file, ram, wal, max(wal, self._reserve))

    def _excess(self, memory: Memory, budget: int, load: _Load, *, packed: bool = False) -> int:
        """Bytes above the budget if `load` were written now and checkpointed.

        With `packed`, as if all free pages that it does not need had been given back.
        """
        free = self._pragma("freelist_count") * self._page
        growth = load.file - free if packed else max(0, load.file - free)
        shm = max(32 << 10, self._store.file_bytes()["shm"])
        index = memory.index_bytes()
        slack = index // 8  # a column has an eighth of slack after it grew
        return self._file() + growth + shm + index + slack + load.ram + load.reserve - budget

    def _file(self) -> int:
        return self._pragma("page_count") * self._page

    def _pragma(self, name: str) -> int:
        return int(self._store.db.execute(f"PRAGMA {name}").fetchone()[0])

    def _fold(self, load: _Load) -> None:
        """Empty the WAL if the next transaction might take it over its reserve."""
        held = self._store.file_bytes()["wal"]
        if held and held + load.wal > max(self._reserve, load.wal) and not self._store.checkpoint():
            raise StoreLocked(
                f"{self._store.path}-wal cannot be folded into the file, since a reader of another "
                "process holds an old state; the budget would be exceeded. Let it end and try again"
            )

    # ------------------------------------------------------------ forgetting

    def _shrink(
        self, memory: Memory, budget: Budget, load: _Load, now: Instant, call: int | None
    ) -> Receipt:
        receipt = Receipt(operation=call)
        if self._excess(memory, budget, load) <= 0:
            return receipt
        slack = int(budget * _SLACK_RATIO)
        victims: list[tuple[Item, str]] | None = None
        if self._excess(memory, budget, load, packed=True) > 0:
            self._refuse_the_hopeless(memory, budget, load)
            while self._excess(memory, budget, load, packed=True) + slack > 0:
                victims = self._ranked(memory, now) if victims is None else victims
                if not victims:
                    break
                part, victims = victims[: self._victims], victims[self._victims :]
                receipt += self._evict(memory, part, now, receipt.operation)
                receipt += self._trim(budget)
        self._give_back(lambda: self._excess(memory, budget, load) > 0)
        if (excess := self._excess(memory, budget, load)) > 0:
            receipt += self._trim(budget, attic_ratio=0.0)
            self._give_back(lambda: self._excess(memory, budget, load) > 0)
            excess = self._excess(memory, budget, load)
        if excess > 0:
            raise self._too_much(memory, budget, load, excess)
        return receipt

    def _refuse_the_hopeless(self, memory: Memory, budget: Budget, load: _Load) -> None:
        """Raise before anything is forgotten for something that cannot fit anyway."""
        bank = memory.view().bank
        held = self._store.table_bytes(bank)
        sql = "SELECT count(*) FROM items WHERE row BETWEEN ? AND ?"
        n_items = self._store.db.execute(sql, (bank.first, bank.last)).fetchone()[0]
        reclaimable = 2 * sum(held.values()) + memory.index_bytes() + _ROW_BYTES * n_items
        excess = self._excess(memory, budget, load, packed=True)
        if excess > reclaimable:
            raise self._too_much(memory, budget, load, excess)

    def _too_much(self, memory: Memory, budget: Budget, load: _Load, excess: int) -> BudgetExceeded:
        return BudgetExceeded(
            f"{Budget(load.file)} more do not fit the budget of {budget}, whatever bank "
            f"{memory.bank!r} forgets; {Budget(excess)} are missing. Raise the budget, store less "
            "at once, or forget in the file's other banks"
        )

    def _ranked(self, memory: Memory, now: Instant) -> list[tuple[Item, str]]:
        """All items of the bank with the reason to forget them, the least valuable first."""
        view, policy = memory.view(), memory.policy
        old, foreign, mine = list[Item](), list[Item](), list[Item]()
        for item in view.store.scan(view.bank, expired=True):
            if item.expired is not None:
                old.append(item)
            else:
                (mine if item.policy in ("", view.policy) else foreign).append(item)
        worth = policy.retention(mine, now)
        order = sorted(range(len(mine)), key=lambda i: (worth[i], mine[i].row))
        return [
            *((item, "let go earlier") for item in old),
            *((item, f"derived by {item.policy}, which is not in use") for item in foreign),
            *((mine[i], policy.why_forgotten(mine[i], now)) for i in order),
        ]

    def _evict(
        self, memory: Memory, items: Sequence[tuple[Item, str]], now: Instant, call: int | None
    ) -> Receipt:
        ops = [Evict([item], why) for item, why in items]
        self._fold(_Load(wal=self._reserve // 2))
        return self._store.apply(
            memory.view().bank, ops, at=now, verb="forget", codes={}, call=call
        )

    def _trim(self, budget: Budget, attic_ratio: float = ATTIC_RATIO) -> Receipt:
        """Drop the oldest attic entries and log rows beyond their shares of the budget."""
        purged = self._drop_oldest("attic", "row", "length(body) + 100", int(budget * attic_ratio))
        size = "length(changes) + 100"
        self._drop_oldest("log", "bank, version", size, int(budget * _LOG_RATIO))
        return Receipt(purged=purged)

    def _drop_oldest(self, table: str, key: str, size: str, share: int) -> int:
        db = self._store.db
        where = " AND ".join(f"{column} = ?" for column in key.split(", "))
        held = int(db.execute(f"SELECT coalesce(sum({size}), 0) FROM {table}").fetchone()[0])
        dropped = 0
        while held > share:
            self._fold(_Load(wal=self._reserve // 2))
            with self._store.write():
                old = db.execute(
                    f"SELECT {size}, {key} FROM {table} ORDER BY at, {key} LIMIT ?",
                    (self._victims,),
                ).fetchall()
                db.executemany(f"DELETE FROM {table} WHERE {where}", [key for _, *key in old])
            held = held - sum(n for n, *_ in old) if old else 0
            dropped += len(old)
        return dropped

    def _give_back(self, wanted: Callable[[], bool]) -> None:
        """Hand free pages back to the file system while wanted, a few at a time for the WAL."""
        step = max(1, self._reserve // (16 * self._page))
        if not (self._pragma("freelist_count") and wanted()):
            return
        while self._pragma("freelist_count") and wanted():
            self._fold(_Load(wal=self._reserve // 2))
            self._store.db.execute(f"PRAGMA incremental_vacuum({step})").fetchall()
        self._store.checkpoint()  # only now the file becomes shorter


def _content_bytes(add: Add) -> int:
    """Bytes of an item's text and fields."""
    fields = len(json.dumps(add.data, ensure_ascii=False).encode()) if add.data else 0
    return len(add.text.encode()) + len(add.actor.encode()) + len(add.session.encode()) + fields


__all__ = ["ATTIC_RATIO", "SMALLEST", "Keeper", "checked"]
