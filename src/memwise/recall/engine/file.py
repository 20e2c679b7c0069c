"""The file: one SQLite database, its schema, its transactions, and its errors in memwise's words.

Several processes on one file are the normal case: WAL, one writer at a time, a busy timeout. What
is acknowledged survives `kill -9`; with `durability="power"` also a power cut. Local disks only.

    meta    key -> value             banks   name, policy, version
    items   the records              codes   term numbers and vector of an item
    links   (src, rel, dst)          log     what each operation changed, for undo and for readers
    attic   forgotten items, compressed, without vectors
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from memwise.errors import InvalidKnob, MemwiseError, StoreCorrupt, StoreError, StoreLocked

SCHEMA_VERSION = 1
APPLICATION_ID = 0x6D656D77  # "memw"
BUSY_S = 30.0
_SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE banks(no INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, policy TEXT NOT NULL,
    next INTEGER NOT NULL, version INTEGER NOT NULL);
CREATE TABLE items(row INTEGER PRIMARY KEY, kind TEXT NOT NULL, text TEXT NOT NULL,
    actor TEXT NOT NULL, session TEXT NOT NULL, at INTEGER NOT NULL, created INTEGER NOT NULL,
    valid_from INTEGER, valid_to INTEGER, expired INTEGER, strength REAL NOT NULL,
    uses INTEGER NOT NULL, last_use INTEGER, policy TEXT NOT NULL, extractor TEXT NOT NULL,
    data TEXT, hash INTEGER NOT NULL);
CREATE INDEX items_said ON items(at, hash) WHERE policy = '';
CREATE INDEX items_derived ON items(hash) WHERE policy != '';
CREATE TABLE codes(row INTEGER PRIMARY KEY, terms BLOB NOT NULL, vector BLOB);
CREATE TABLE links(src INTEGER NOT NULL, rel TEXT NOT NULL, dst INTEGER NOT NULL,
    weight REAL NOT NULL, created INTEGER NOT NULL, expired INTEGER,
    PRIMARY KEY(src, rel, dst)) WITHOUT ROWID;
CREATE INDEX links_dst ON links(dst, rel);
CREATE TABLE log(bank INTEGER NOT NULL, version INTEGER NOT NULL, at INTEGER NOT NULL,
    verb TEXT NOT NULL, changes TEXT NOT NULL, call INTEGER NOT NULL,
    undone INTEGER NOT NULL DEFAULT 0, PRIMARY KEY(bank, version)) WITHOUT ROWID;
CREATE TABLE attic(row INTEGER PRIMARY KEY, at INTEGER NOT NULL, why TEXT NOT NULL,
    body BLOB NOT NULL);
"""


class File:
    """An open memory file. One object a thread of work; a lock above it serializes threads.

    Args:
        path: the file; created with its folder's permissions when absent.
        durability: "process" survives a killed process, "power" also a power cut (slower).

    Raises:
        StoreCorrupt: the file is not a memwise memory or is damaged.
        StoreLocked: another process held the write lock for longer than 30 seconds.
    """

    def __init__(self, path: str | Path, durability: Literal["process", "power"] = "process"):
        self.path = str(path)
        self._guard = _Guard(self.path)
        with self.guard():
            self.db = sqlite3.connect(
                self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
        try:
            with self.guard():
                self._prepare(durability)
        except BaseException:
            self.db.close()
            raise

    def _prepare(self, durability: str) -> None:
        if durability not in ("process", "power"):
            raise InvalidKnob(f"durability={durability!r}: use 'process' or 'power'")
        db = self.db
        if self._is_new():
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # only possible before the first table
        self._to_wal()
        db.execute(f"PRAGMA synchronous={'FULL' if durability == 'power' else 'NORMAL'}")
        # Folding the WAL in waits for the disk: most of the time of single adds, if done often.
        db.execute("PRAGMA wal_autocheckpoint=4000")
        db.execute("PRAGMA journal_size_limit=1048576")
        db.execute("PRAGMA temp_store=MEMORY")
        db.execute("PRAGMA secure_delete=ON")  # what is deleted must not stay in free space
        with self.write():
            if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in _SCHEMA.split(";")[:-1]:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _is_new(self) -> bool:
        """Is the file empty? Other programs' files are refused before anything in them changes."""
        db = self.db
        if db.execute("PRAGMA page_count").fetchone()[0] == 0:
            return True
        version = db.execute("PRAGMA user_version").fetchone()[0]
        ours = db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
        if not ours and (version or db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]):
            raise StoreCorrupt(
                f"{self.path} is an SQLite file of another program; choose another path"
            )
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} was written by a newer memwise (schema {version}, this one reads "
                f"{SCHEMA_VERSION}); upgrade memwise"
            )
        return False

    def _to_wal(self) -> None:
        # Switching to WAL needs the file alone for a moment and ignores the busy timeout.
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                self.db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        """Close the file; the last process to close it folds the WAL back in."""
        self.db.close()

    def guard(self) -> _Guard:
        """Turns SQLite's errors into memwise's, each with what to do."""
        return self._guard

    def write(self) -> _Transaction:
        """A write transaction: all or nothing; inside another one it is part of that one."""
        return _Transaction(self, "BEGIN IMMEDIATE")

    def read(self) -> _Transaction:
        """A read transaction: every statement in it sees the same state."""
        return _Transaction(self, "BEGIN")

    def rolled_back(self) -> None:
        """Called after a write transaction was taken back; drop what was noted during it."""

    def meta(self, key: str) -> Any:
        """A value of the file's meta table, or None."""
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def set_meta(self, key: str, value: str | int | None) -> None:
        """Set (or with None remove) a value of the file's meta table."""
        if value is None:
            self.db.execute("DELETE FROM meta WHERE key = ?", (key,))
        else:
            self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def settle_meta(self, key: str, value: str) -> str:
        """The value under `key`, setting it first if the file has none yet."""
        with self.write():
            self.db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))
            return str(self.meta(key))

    def checkpoint(self) -> bool:
        """Fold the WAL into the file and cut it to nothing.

        Returns:
            False if a reader was in the way for as long as the busy timeout.
        """
        return not self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]

    def file_bytes(self) -> dict[str, int]:
        """Bytes on disk: the file, its WAL and its shared-memory index."""
        out = {}
        for name, suffix in (("file", ""), ("wal", "-wal"), ("shm", "-shm")):
            try:
                out[name] = os.stat(self.path + suffix).st_size
            except FileNotFoundError:
                out[name] = 0
        return out


class _Guard:
    """A context in which errors of SQLite become memwise's (a class: entered for every call)."""

    __slots__ = ("_path",)

    def __init__(self, path: str):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, sqlite3.DatabaseError):
            told = _told(self._path, error)
            if told is not None:
                raise told from error


class _Transaction:
    """All of it or nothing; inside another one it is a part of that one."""

    __slots__ = ("_begin", "_file", "_inner")

    def __init__(self, file: File, begin: str):
        self._file, self._begin = file, begin
        self._inner = file.db.in_transaction

    def __enter__(self) -> None:
        if not self._inner:
            self._file.db.execute(self._begin)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._inner:
            return
        db, done = self._file.db, False
        try:
            if error is None:
                db.execute("COMMIT")
                done = True
        finally:
            if not done:
                self._file.rolled_back()
                if db.in_transaction:
                    db.execute("ROLLBACK")


def _told(path: str, error: sqlite3.DatabaseError) -> MemwiseError | None:
    """What an error of SQLite means to a user; None for mistakes in this program."""
    reason = str(error)
    if isinstance(error, sqlite3.ProgrammingError):
        return StoreError(f"{path} was closed; open it again") if "closed" in reason else None
    if not isinstance(error, sqlite3.OperationalError):
        return StoreCorrupt(
            f"{path} is damaged or not a memwise memory ({reason}); run `memwise doctor {path}`"
        )
    if "locked" in reason or "busy" in reason:
        return StoreLocked(
            f"{path} was locked by another process for over {BUSY_S:.0f} s; try again"
        )
    if "full" in reason or "I/O" in reason or "too big" in reason:
        return StoreError(
            f"{path} could not be written ({reason}); nothing of this call was kept. "
            "Free disk space, or forget(budget=...) and try again"
        )
    if "unable to open" in reason:
        return StoreError(f"{path} cannot be opened; check that its folder exists and is writable")
    if "readonly" in reason:
        return StoreError(f"{path} is read-only; change its permissions")
    return StoreCorrupt(f"{path}: {reason}; run `memwise doctor {path}`")
