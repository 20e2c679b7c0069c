"""Saving a damaged memory file: what SQLite can still read, copied around the holes."""

from __future__ import annotations

import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from memwise.errors import StoreCorrupt
from memwise.recall.engine.examine import (
    COLUMNS,
    SEQUENCE,
    makes_sense,
    open_read_only,
    unpacked,
)
from memwise.recall.engine.file import APPLICATION_ID, SCHEMA_VERSION
from memwise.recall.engine.records import BANK_BITS, RELS
from memwise.recall.engine.store import SQLite

Progress: TypeAlias = Callable[[int, int], object]
_PAGE_BYTES = 4096  # SQLite's own choice, which memwise leaves as it is
_SMALLEST_ROW = 16  # bytes that a row takes at least: bounds how many a file can hold


@contextmanager
def open_damaged(file: Path, target: Path) -> Iterator[sqlite3.Connection]:
    """A reading connection to a damaged file, or to a copy with a new header if its is spoilt.

    Raises:
        StoreCorrupt: the list of tables cannot be read.
    """
    copy = Path(f"{target}.copy")
    try:
        for attempt in (file, copy):
            if attempt is copy:
                _copy_with_header(file, copy)
            with closing(open_read_only(attempt)) as db:
                # With it, a table that lies behind the end of a cut file costs itself alone.
                db.execute("PRAGMA writable_schema=ON")
                try:
                    names = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
                    if "items" not in names:
                        raise sqlite3.DatabaseError("it holds no items")
                except sqlite3.DatabaseError as error:
                    reason = error
                    continue
                yield db
                return
        raise StoreCorrupt(
            f"not even the list of tables in {file} can be read ({reason}); restore it from a "
            "backup"
        )
    finally:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{copy}{suffix}").unlink(missing_ok=True)


def _copy_with_header(file: Path, copy: Path) -> None:
    """A copy of the file whose first 100 bytes are as memwise writes them."""
    shutil.copyfile(file, copy)
    if Path(f"{file}-wal").exists():
        shutil.copyfile(f"{file}-wal", f"{copy}-wal")
    pages = copy.stat().st_size // _PAGE_BYTES
    header = b"SQLite format 3\0" + struct.pack(
        ">HBBBBBB12I20sII", _PAGE_BYTES, 2, 2, 0, 64, 32, 32, 1, pages, 0, 0, 1, 4, 0, 1, 1,
        SCHEMA_VERSION, 1, APPLICATION_ID, b"", 1, 3040000,
    )  # fmt: skip
    with copy.open("r+b") as content:
        content.write(header)


class Salvage:
    """Copies what can be read of a damaged file; the log is not among it.

    Args:
        db: the damaged file, open for reading.
        file: its path.
        target: the new file.
    """

    def __init__(self, db: sqlite3.Connection, file: Path, target: Path):
        self.db, self.target = db, target
        self._most_rows = max(1024, file.stat().st_size // _SMALLEST_ROW)

    def run(self, progress: Progress) -> list[str]:
        """Copy; returns what was saved, in words."""
        banks = {row[0]: row for row in self._table("banks", "no", 1, 1 << 16)}
        meta = {k: v for k, v in self._small("meta") if isinstance(k, str)}
        numbers = sorted(banks) or [1, 2, 3, 4]
        done = []
        with closing(SQLite(self.target)) as store, store.guard():
            store.db.execute("PRAGMA synchronous=OFF")  # the damaged file is still there
            with store.write():
                for key in ("embedder", "embedder spec"):
                    if isinstance(meta.get(key), str):
                        store.set_meta(key, meta[key])
                for no, name, policy, *_ in banks.values():
                    store.db.execute(
                        "INSERT OR IGNORE INTO banks VALUES (?, ?, ?, 1, 0)", (no, name, policy)
                    )
                for i, no in enumerate(numbers):
                    top = banks[no][3] if no in banks else self._most_rows
                    done += self._bank(
                        store.db, no, min(top, SEQUENCE), keep_vectors="embedder" in meta
                    )
                    progress(i + 1, len(numbers))
        return done

    def _bank(self, new: sqlite3.Connection, no: int, top: int, *, keep_vectors: bool) -> list[str]:
        first = no << BANK_BITS
        span = (first + 1, first + top)
        items = [r for r in self._table("items", "row", *span) if _whole(r)]
        new.executemany(f"INSERT OR IGNORE INTO items VALUES ({_marks('items')})", items)
        rows = {r[0] for r in items}
        attic = [
            r for r in self._table("attic", "row", *span)
            if r[0] not in rows and unpacked(r[3]) is not None
        ]  # fmt: skip
        new.executemany(f"INSERT OR IGNORE INTO attic VALUES ({_marks('attic')})", attic)
        codes = (
            (row, words, vector if keep_vectors else None)
            for row, words, vector in self._table("codes", "row", *span)
            if row in rows and isinstance(words, bytes)
        )
        new.executemany(f"INSERT OR IGNORE INTO codes VALUES ({_marks('codes')})", codes)
        links = [r for r in self._table("links", "src", *span) if r[0] in rows and _is_link(r)]
        new.executemany(f"INSERT OR IGNORE INTO links VALUES ({_marks('links')})", links)
        if not items and not attic:
            return []
        return [f"saved {len(items)} items, {len(links)} links, {len(attic)} forgotten, bank {no}"]

    def _small(self, table: str) -> list[tuple[Any, ...]]:
        try:
            return self.db.execute(f"SELECT * FROM {table}").fetchall()
        except sqlite3.DatabaseError:
            return []

    def _table(self, table: str, key: str, first: int, last: int) -> Iterator[tuple[Any, ...]]:
        """Rows of a table by key, as far as they can be read: around a hole by bisection."""
        spans = [(first, last)]
        seen: set[tuple[Any, ...]] = set()  # of the key at which reading stopped
        sql = f"SELECT * FROM {table} WHERE {key} BETWEEN ? AND ? ORDER BY {key}"
        while spans:
            low, high = spans.pop()
            reached = low
            try:
                for row in self.db.execute(sql, (low, high)):
                    if row[0] != reached:
                        seen.clear()
                    reached = row[0]
                    if row not in seen:
                        seen.add(row)
                        yield row
            except (sqlite3.DatabaseError, UnicodeDecodeError):
                low = max(low, reached)
                if low < high:
                    middle = (low + high) // 2
                    spans += [(middle + 1, high), (low, middle)]


def _marks(table: str) -> str:
    return ",".join("?" * COLUMNS[table])


def _whole(row: Sequence[Any]) -> bool:
    numbers = [row[i] for i in (0, 5, 6, 11)]
    texts = [row[i] for i in (1, 2, 3, 4, 13, 14)]
    return (
        all(type(n) is int for n in numbers)
        and all(isinstance(t, str) for t in texts)
        and all(row[i] is None or type(row[i]) is int for i in (7, 8, 9, 12))
        and makes_sense(row[0], row[1], row[2], row[5], row[15])
    )


def _is_link(row: Sequence[Any]) -> bool:
    src, rel, dst, weight, created, expired = row
    return (
        all(type(n) is int for n in (src, dst, created))
        and rel in RELS
        and isinstance(weight, int | float)
        and (expired is None or type(expired) is int)
    )
