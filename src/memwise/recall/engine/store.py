"""The store: one SQLite file that holds text, vectors, links and the log in the same transactions.

Several processes on one file are the normal case: WAL, one writer at a time, a busy timeout, and a
version number per bank that lets a writer notice that its snapshot is old. What is acknowledged
survives `kill -9`; with `durability="power"` also a power cut. Local disks only.

    meta    key -> value             banks   name, policy, version
    items   the records              codes   term numbers and vector of an item
    links   (src, rel, dst)          log     what each operation changed, for undo and for readers
    attic   forgotten items, compressed, without vectors
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from memwise.errors import EmbedderMismatch, InvalidKnob, StoreCorrupt, StoreError, StoreLocked
from memwise.recall.engine.records import (
    BANK_BITS,
    KINDS,
    RELS,
    SOURCES,
    Add,
    Connect,
    Evict,
    Expire,
    Instant,
    Item,
    Link,
    Merge,
    Op,
    Receipt,
    Ref,
    Replace,
    Touch,
    item_id,
)

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
CREATE INDEX items_hash ON items(hash);
CREATE TABLE codes(row INTEGER PRIMARY KEY, terms BLOB NOT NULL, vector BLOB);
CREATE TABLE links(src INTEGER NOT NULL, rel TEXT NOT NULL, dst INTEGER NOT NULL,
    weight REAL NOT NULL, created INTEGER NOT NULL, expired INTEGER,
    PRIMARY KEY(src, rel, dst)) WITHOUT ROWID;
CREATE INDEX links_dst ON links(dst, rel);
CREATE TABLE log(no INTEGER PRIMARY KEY, bank INTEGER NOT NULL,
    version INTEGER NOT NULL, at INTEGER NOT NULL, verb TEXT NOT NULL, changes TEXT NOT NULL,
    call INTEGER NOT NULL, undone INTEGER NOT NULL DEFAULT 0);
CREATE INDEX log_bank ON log(bank, version);
CREATE TABLE attic(row INTEGER PRIMARY KEY, at INTEGER NOT NULL, why TEXT NOT NULL,
    body BLOB NOT NULL);
"""
_COLUMNS = (
    "row, kind, text, actor, session, at, created, valid_from, valid_to, expired, strength, uses, "
    "last_use, policy, extractor, data"
)
_N_COLUMNS = 17
_CHUNK = 500  # bound variables a statement; SQLite's own limit is far higher


_dumps = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


class Conflict(StoreError):
    """The bank changed since the snapshot on which the operations were planned."""


@dataclass(frozen=True, slots=True)
class Bank:
    """A bank as the store knows it: number, name, policy, version and next sequence number."""

    no: int
    name: str
    policy: str
    version: int
    next: int

    @property
    def first(self) -> int:
        """Lowest row number of the bank."""
        return self.no << BANK_BITS

    @property
    def last(self) -> int:
        """Highest row number of the bank."""
        return ((self.no + 1) << BANK_BITS) - 1


@dataclass(frozen=True, slots=True)
class Code:
    """What the indexes need of one item: term numbers (little-endian uint32) and vector bytes."""

    terms: bytes
    vector: bytes | None


@dataclass
class _Change:
    """Everything one transaction changes, gathered before it is written."""

    bank: Bank
    at: Instant
    policy: str
    codes: Mapping[int, Code]
    next: int
    rows: dict[int, int] = field(default_factory=dict)  # id(Add) -> row
    items: list[tuple[Any, ...]] = field(default_factory=list)
    codes_rows: list[tuple[int, bytes, bytes | None]] = field(default_factory=list)
    links: list[tuple[Any, ...]] = field(default_factory=list)
    digests: dict[int, int] = field(default_factory=dict)  # id(Add) -> digest
    hashes: dict[int, int] = field(default_factory=dict)  # digest -> row of a live item
    undo: list[list[Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    forgotten: list[tuple[str, str]] = field(default_factory=list)

    def row(self, ref: Ref) -> int:
        if isinstance(ref, Item):
            return ref.row
        return self.rows[id(ref)] if isinstance(ref, Add) else ref


def digest(bank: int, add: Add, policy: str, now: Instant) -> int:
    """63-bit hash by which repeats are recognized: what was said, by whom, when it holds."""
    if add.kind in SOURCES:
        clock = now if add.at is None else add.at
        part = add.data.get("part", "")  # a text may repeat itself
        key = f"{bank}\0{add.kind}\0{add.actor}\0{add.session}\0{clock}\0{part}\0{add.text}"
    else:
        words = " ".join(add.text.lower().split())
        clocks = f"{add.valid_from}\0{add.valid_to}"
        key = f"{bank}\0{add.kind}\0{policy}\0{add.actor}\0{clocks}\0{words}"
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


class SQLite:
    """A memory file. One object a thread of work; a lock above it serializes threads.

    Args:
        path: the file; created with its folder's permissions when absent.
        durability: "process" survives a killed process, "power" also a power cut (slower).

    Raises:
        StoreCorrupt: the file is not a memwise memory or is damaged.
        StoreLocked: another process held the write lock for longer than 30 seconds.
    """

    def __init__(self, path: str | Path, durability: Literal["process", "power"] = "process"):
        self.path = str(path)
        self.fingerprint: str | None = None  # of the embedder whose vectors this object writes
        self._seen: dict[int, Bank] = {}
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

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn SQLite's errors into memwise's, each with what to do."""
        try:
            yield
        except sqlite3.ProgrammingError as error:
            if "closed" not in str(error):
                raise
            raise StoreError(f"{self.path} was closed; open it again") from error
        except sqlite3.OperationalError as error:
            reason = str(error)
            if "locked" in reason or "busy" in reason:
                raise StoreLocked(
                    f"{self.path} was locked by another process for over {BUSY_S:.0f} s; try again"
                ) from error
            if "full" in reason or "I/O" in reason or "too big" in reason:
                raise StoreError(
                    f"{self.path} could not be written ({reason}); nothing of this call was kept. "
                    "Free disk space, or forget(budget=...) and try again"
                ) from error
            if "unable to open" in reason:
                raise StoreError(
                    f"{self.path} cannot be opened; check that its folder exists and is writable"
                ) from error
            if "readonly" in reason:
                raise StoreError(f"{self.path} is read-only; change its permissions") from error
            raise StoreCorrupt(
                f"{self.path}: {reason}; run `memwise doctor {self.path}`"
            ) from error
        except sqlite3.DatabaseError as error:
            raise StoreCorrupt(
                f"{self.path} is damaged or not a memwise memory ({error}); "
                f"run `memwise doctor {self.path}`"
            ) from error

    @contextmanager
    def write(self) -> Iterator[None]:
        """A write transaction: all or nothing; inside another one it is part of that one."""
        if self.db.in_transaction:
            yield
            return
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            self._seen.clear()  # it may hold what is taken back here
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise

    @contextmanager
    def read(self) -> Iterator[None]:
        """A read transaction: every statement in it sees the same state."""
        if self.db.in_transaction:
            yield
            return
        self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.execute("COMMIT")

    # ------------------------------------------------------------ meta and banks

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

    def banks(self) -> list[Bank]:
        """All banks of the file, oldest first."""
        rows = self.db.execute("SELECT no, name, policy, version, next FROM banks ORDER BY no")
        return [Bank(*row) for row in rows]

    def bank(self, name: str, policy: str | None = None) -> Bank:
        """The bank of that name, made if absent; `policy` (if not None) is recorded."""
        found = self._bank("name", name)
        if found is None or (policy is not None and found.policy != policy):
            with self.write():
                self.db.execute(
                    "INSERT OR IGNORE INTO banks(name, policy, version, next) VALUES (?, ?, 0, 1)",
                    (name, policy or ""),
                )
                if policy is not None:
                    self.db.execute("UPDATE banks SET policy = ? WHERE name = ?", (policy, name))
                found = self._bank("name", name)
        assert found is not None
        return found

    def refresh(self, bank: Bank) -> Bank:
        """The bank as it is now."""
        row = self.db.execute(
            "SELECT no, name, policy, version, next, "
            "(SELECT value FROM meta WHERE key = 'embedder') FROM banks WHERE no = ?",
            (bank.no,),
        ).fetchone()
        if row is None:
            raise StoreError(f"bank {bank.name!r} was removed by another process; open it again")
        if self.fingerprint is not None and row[5] != self.fingerprint:
            raise EmbedderMismatch(f"{self.path} was re-embedded meanwhile; open it again")
        found = self._seen[bank.no] = Bank(*row[:5])
        return found

    def seen(self, bank: Bank) -> Bank:
        """The bank as this object saw it last: enough for plans, since `apply` checks them."""
        return self._seen.get(bank.no) or self.refresh(bank)

    def _bank(self, column: str, value: str | int) -> Bank | None:
        row = self.db.execute(
            f"SELECT no, name, policy, version, next FROM banks WHERE {column} = ?", (value,)
        ).fetchone()
        return Bank(*row) if row else None

    # ------------------------------------------------------------ reading

    def items(self, rows: Iterable[int]) -> dict[int, Item]:
        """Items by row; rows that are gone are left out."""
        out: dict[int, Item] = {}
        wanted = list(rows)
        for i in range(0, len(wanted), _CHUNK):
            part = wanted[i : i + _CHUNK]
            marks = ",".join("?" * len(part))
            for row in self.db.execute(
                f"SELECT {_COLUMNS} FROM items WHERE row IN ({marks})", part
            ):
                out[row[0]] = _item(row)
        return out

    def scan(
        self,
        bank: Bank,
        *,
        kinds: Sequence[str] = (),
        policies: Sequence[str] = (),
        session: str | None = None,
        at: Instant | None = None,
        known_at: Instant | None = None,
        expired: bool = False,
    ) -> list[Item]:
        """Items of a bank in row order.

        Args:
            bank: where to look.
            kinds: only these kinds; empty = all.
            policies: only items of these policies (sources have the policy ""); empty = all.
            session: only this session.
            at: only what was true at this event time.
            known_at: as the store knew it then; None = now.
            expired: with True also items that were let go.
        """
        sql = f"SELECT {_COLUMNS} FROM items WHERE row BETWEEN ? AND ?"
        values: list[Any] = [bank.first, bank.last]
        for column, allowed in (("kind", kinds), ("policy", policies)):
            if allowed:
                sql += f" AND {column} IN ({','.join('?' * len(allowed))})"
                values += allowed
        if session is not None:
            sql += " AND session = ?"
            values.append(session)
        if known_at is None and not expired:
            sql += " AND expired IS NULL"
        elif known_at is not None:
            sql += " AND created <= ? AND (expired IS NULL OR expired > ?)"
            values += [known_at, known_at]
        found = [_item(row) for row in self.db.execute(sql + " ORDER BY row", values)]
        return found if at is None else [i for i in found if i.holds(at, known_at or i.created)]

    def links(
        self, rows: Iterable[int], rels: Sequence[str] = (), *, incoming: bool = False
    ) -> list[Link]:
        """Links that leave (or with `incoming` reach) the rows and hold now."""
        near, far = ("dst", "src") if incoming else ("src", "dst")
        out: list[Link] = []
        wanted = list(rows)
        for i in range(0, len(wanted), _CHUNK):
            part: list[Any] = wanted[i : i + _CHUNK]
            sql = (
                "SELECT src, dst, rel, weight, created, expired FROM links "
                f"WHERE {near} IN ({','.join('?' * len(part))}) AND expired IS NULL"
            )
            if rels:
                sql += f" AND rel IN ({','.join('?' * len(rels))})"
            out += [
                Link(*row)
                for row in self.db.execute(f"{sql} ORDER BY {near}, {far}", [*part, *rels])
            ]
        return out

    def codes(self, first: int, last: int) -> sqlite3.Cursor:
        """What the indexes need of the items in a range of rows.

        Yields (row, kind, session, actor, at, valid_from, valid_to, created, expired, policy,
        terms, vector, asks).
        """
        return self.db.execute(
            "SELECT i.row, i.kind, i.session, i.actor, i.at, i.valid_from, i.valid_to, i.created, "
            "i.expired, i.policy, c.terms, c.vector, instr(i.text, '?') > 0 "
            "FROM items i LEFT JOIN codes c USING(row) "
            "WHERE i.row BETWEEN ? AND ? ORDER BY i.row",
            (first, last),
        )

    def vectors(self, rows: Sequence[int]) -> dict[int, bytes]:
        """Stored vectors by row; rows without one are left out."""
        out: dict[int, bytes] = {}
        for i in range(0, len(rows), _CHUNK):
            part = rows[i : i + _CHUNK]
            marks = ",".join("?" * len(part))
            out |= self.db.execute(
                f"SELECT row, vector FROM codes WHERE vector NOT NULL AND row IN ({marks})", part
            ).fetchall()
        return out

    def matching(self, bank: Bank, data: Mapping[str, Any]) -> frozenset[int]:
        """Rows whose `data` has these values under these keys; texts compare without case."""
        sql = "SELECT row FROM items WHERE row BETWEEN ? AND ? AND data NOT NULL"
        values: list[Any] = [bank.first, bank.last]
        for key, value in data.items():
            sql += (
                " AND EXISTS (SELECT 1 FROM json_each(data) WHERE key = ? AND type != 'object' "
                "AND value IS ? COLLATE NOCASE)"
            )
            values += [key, value]
        return frozenset(row for (row,) in self.db.execute(sql, values))

    def last_session(self, bank: Bank) -> str:
        """Session of the newest source; empty if there is none."""
        row = self.db.execute(
            f"SELECT session FROM items WHERE row BETWEEN ? AND ? AND kind IN {SOURCES} "
            "ORDER BY row DESC LIMIT 1",
            (bank.first, bank.last),
        ).fetchone()
        return str(row[0]) if row else ""

    def before(self, bank: Bank, row: int, session: str, n: int) -> list[Item]:
        """The last sources before a row, as far as they are of that session, oldest first."""
        found = self.db.execute(
            f"SELECT {_COLUMNS} FROM items WHERE row BETWEEN ? AND ? AND kind IN {SOURCES} "
            "ORDER BY row DESC LIMIT ?",
            (bank.first, row - 1, n),
        )
        return [item for item in map(_item, found) if item.session == session][::-1]

    def known(self, hashes: Sequence[int]) -> dict[int, int]:
        """Hash -> row of live items with these hashes."""
        out: dict[int, int] = {}
        for i in range(0, len(hashes), _CHUNK):
            part = hashes[i : i + _CHUNK]
            marks = ",".join("?" * len(part))
            out |= self.db.execute(
                f"SELECT hash, row FROM items WHERE hash IN ({marks}) AND expired IS NULL", part
            ).fetchall()
        return out

    def changes(self, bank: Bank, since: int) -> list[list[Any]] | None:
        """Changes of the bank after version `since`; None if the log no longer reaches back."""
        rows = self.db.execute(
            "SELECT changes FROM log WHERE bank = ? AND version > ? AND version <= ? "
            "ORDER BY version",
            (bank.no, since, bank.version),
        ).fetchall()
        if len(rows) != bank.version - since:
            return None
        return [change for (text,) in rows for change in _json(text)]

    # ------------------------------------------------------------ writing

    def apply(
        self,
        bank: Bank,
        ops: Sequence[Op],
        *,
        at: Instant,
        verb: str,
        codes: Mapping[int, Code],
        policy: str = "",
        expect: int | None = None,
        call: int | None = None,
    ) -> Receipt:
        """Carry out operations in one logged transaction.

        Args:
            bank: where.
            ops: in order; an operation may refer to `Add`s that stand before it.
            at: the time of the operation (store time).
            verb: what the log calls it.
            codes: id(add) -> Code for every `Add` that is to be found by search.
            policy: recorded on derived items.
            expect: version of the bank on which the operations were planned; None = any.
            call: number of an earlier operation with which this one is undone; None = alone.

        Raises:
            Conflict: the bank has another version than `expect`.
        """
        with self.guard(), self.write():
            now = self.refresh(bank)
            # Numbers may be set aside (`reserve`) without a new version.
            if expect is not None and (now.version, now.next) != (expect, bank.next):
                raise Conflict(f"bank {bank.name!r} changed meanwhile")
            change = _Change(now, at, policy, codes, now.next)
            for op in ops:
                if isinstance(op, Add | Replace | Merge):
                    add = op if isinstance(op, Add) else op.new
                    change.digests[id(add)] = digest(now.no, add, policy, at)
            change.hashes = self.known([*change.digests.values()])
            for op in ops:
                self._gather(change, op)
            self._flush(change)
            number = self._log(change, verb, call) if change.undo else call
        return Receipt(
            tuple(change.ids),
            change.next - now.next,
            tuple(change.expired),
            tuple(change.forgotten),
            operation=number,
        )

    def _gather(self, change: _Change, op: Op) -> None:
        match op:
            case Add():
                self._add(change, op, ())
            case Connect():
                if op.rel not in RELS:
                    raise InvalidKnob(f"link {op.rel!r}: use one of {', '.join(RELS)}")
                self._connect(change, change.row(op.src), op.rel, change.row(op.dst), op.weight)
            case Expire():
                self._expire(change, [op.item])
            case Replace():
                self._supersede(change, [op.item], op.new)
            case Merge():
                self._supersede(change, op.items, op.new)
            case Touch():
                rows = [(op.gain, change.at, change.row(ref)) for ref in op.items]
                self.db.executemany(
                    "UPDATE items SET strength = strength + ?, uses = uses + 1, last_use = ? "
                    "WHERE row = ?",
                    rows,
                )
            case Evict():
                self._evict(change, [change.row(ref) for ref in op.items], op.why)

    def _add(self, change: _Change, add: Add, more_sources: Sequence[int]) -> int:
        if add.kind not in KINDS:
            raise InvalidKnob(f"kind {add.kind!r}: use one of {', '.join(KINDS)}")
        source = add.kind in SOURCES
        origins = [*dict.fromkeys([*map(change.row, add.sources), *more_sources])]
        if not source and not origins:
            raise InvalidKnob(f"a {add.kind} must rest on a source; give `sources`")
        code = change.digests[id(add)]
        row = change.hashes.get(code)
        if row is None:
            row = change.bank.first + change.next
            change.next += 1
            data = _dumps(add.data) if add.data else None
            change.items.append(
                (
                    row, add.kind, add.text, add.actor, add.session,
                    change.at if add.at is None else add.at, change.at, add.valid_from,
                    add.valid_to, None, add.strength, 0, None, "" if source else change.policy,
                    "" if source else add.extractor, data, code,
                )
            )  # fmt: skip
            known = change.codes.get(id(add))
            if known is not None:
                change.codes_rows.append((row, known.terms, known.vector))
        change.rows[id(add)] = row
        change.hashes[code] = row
        if source:
            change.ids.append(item_id(add.kind, row))
        for origin in origins:
            if origin != row:
                self._connect(change, row, "derived_from", origin, 1.0)
        for rel, ref, weight in add.links:
            self._connect(change, row, rel, change.row(ref), weight)
        return row

    def _connect(self, change: _Change, src: int, rel: str, dst: int, weight: float) -> None:
        if src < change.bank.first + change.bank.next:  # links of a new row go when the row goes
            old = self.db.execute(
                "SELECT * FROM links WHERE src = ? AND rel = ? AND dst = ?", (src, rel, dst)
            ).fetchone()
            if old is not None and old[3] == weight and old[5] is None:
                return
            change.undo.append(["l", src, rel, dst, old])
        change.links.append((src, rel, dst, weight, change.at, None))

    def _supersede(self, change: _Change, olds: Sequence[Ref], new: Add) -> None:
        rows = [change.row(ref) for ref in olds]
        self._flush(change)
        origins = [link.dst for link in self.links(rows, ["derived_from"])]
        self._expire(change, rows)
        row = self._add(change, new, origins)
        for old in rows:
            if old != row:
                self._connect(change, row, "supersedes", old, 1.0)

    def _expire(self, change: _Change, refs: Sequence[Ref]) -> None:
        self._flush(change)
        for row in map(change.row, refs):
            found = self.db.execute(
                "UPDATE items SET expired = ? WHERE row = ? AND expired IS NULL "
                "RETURNING kind, hash",
                (change.at, row),
            ).fetchone()
            if found:
                change.hashes.pop(found[1], None)
                change.undo.append(["x", row, change.at])
                change.expired.append(item_id(found[0], row))

    def _evict(self, change: _Change, rows: Sequence[int], why: str) -> None:
        self._flush(change)
        for row, item in self.items(rows).items():
            full = self.db.execute("SELECT * FROM items WHERE row = ?", (row,)).fetchone()
            links = self.db.execute("SELECT * FROM links WHERE src = ?", (row,)).fetchall()
            body = zlib.compress(json.dumps([full, links], ensure_ascii=False).encode(), 6)
            self.db.execute("INSERT INTO attic VALUES (?, ?, ?, ?)", (row, change.at, why, body))
            self._remove([row], incoming=False)
            change.forgotten.append((item.id, why))
        if change.forgotten:
            change.undo.append(["e", list(rows)])

    def _remove(self, rows: Sequence[int], *, incoming: bool) -> None:
        keys = [(row,) for row in rows]
        self.db.executemany("DELETE FROM items WHERE row = ?", keys)
        self.db.executemany("DELETE FROM codes WHERE row = ?", keys)
        self.db.executemany("DELETE FROM links WHERE src = ?", keys)
        if incoming:
            self.db.executemany("DELETE FROM links WHERE dst = ?", keys)

    def _flush(self, change: _Change) -> None:
        if change.items:
            marks = ",".join("?" * _N_COLUMNS)
            self.db.executemany(f"INSERT INTO items VALUES ({marks})", change.items)
            self.db.executemany("INSERT INTO codes VALUES (?, ?, ?)", change.codes_rows)
            change.undo.append(["+", change.items[0][0], change.items[-1][0]])
        if change.links:
            self.db.executemany("INSERT OR REPLACE INTO links VALUES (?,?,?,?,?,?)", change.links)
        change.items, change.codes_rows, change.links = [], [], []

    def _log(self, change: _Change, verb: str, call: int | None = None) -> int:
        bank = change.bank
        self.db.execute(
            "UPDATE banks SET next = ?, version = version + 1 WHERE no = ?", (change.next, bank.no)
        )
        number = self.db.execute(
            "INSERT INTO log(bank, version, at, verb, changes, call) VALUES (?, ?, ?, ?, ?, ?)",
            (bank.no, bank.version + 1, change.at, verb, json.dumps(change.undo), call or 0),
        ).lastrowid
        self._seen[bank.no] = Bank(bank.no, bank.name, bank.policy, bank.version + 1, change.next)
        return call or int(number or 0)

    def reserve(self, bank: Bank, n: int) -> int:
        """Set aside n numbers of a bank, so that no other writer uses them; returns the first."""
        with self.guard(), self.write():
            now = self.refresh(bank)
            self.db.execute("UPDATE banks SET next = next + ? WHERE no = ?", (n, bank.no))
        return now.next

    def twins(self, bank: Bank, items: Sequence[Item]) -> dict[int, int]:
        """For items of an export, row -> row of the same thing in this bank, where it is there."""
        hashes = [digest_of(item, bank.no) for item in items]
        out = {}
        for i in range(0, len(items), _CHUNK):
            part = hashes[i : i + _CHUNK]
            rows = self.db.execute(
                "SELECT hash, expired, row FROM items "
                f"WHERE hash IN ({','.join('?' * len(part))}) ORDER BY row DESC",
                part,
            )
            held = {(code, expired): row for code, expired, row in rows}
            for item, code in zip(items[i : i + _CHUNK], part, strict=True):
                if (code, item.expired) in held:
                    out[item.row] = held[code, item.expired]
        return out

    def restore(
        self,
        bank: Bank,
        items: Sequence[Item],
        links: Sequence[Link],
        codes: Mapping[int, Code],
        *,
        at: Instant,
        call: int | None = None,
    ) -> int:
        """Write records of an export as they are, rows and clocks included, in one transaction.

        Args:
            bank: where.
            items: at least one, in the order of their rows, which `reserve` set aside.
            links: those that leave the items.
            codes: row -> Code for all of the items.
            at: the time of the call.
            call: number of the operation with which this one is undone.

        Returns:
            The number of the operation.
        """
        with self.guard(), self.write():
            now = self.refresh(bank)
            marks = ",".join("?" * _N_COLUMNS)
            records = [_record(item, now.no) for item in items]
            self.db.executemany(f"INSERT INTO items VALUES ({marks})", records)
            self.db.executemany(
                "INSERT INTO codes VALUES (?, ?, ?)",
                [(i.row, codes[i.row].terms, codes[i.row].vector) for i in items],
            )
            self.db.executemany(
                "INSERT OR REPLACE INTO links VALUES (?,?,?,?,?,?)",
                [(n.src, n.rel, n.dst, n.weight, n.created, n.expired) for n in links],
            )
            # Readers append what lies above the rows they know, and these may lie below.
            undo: list[list[Any]] = [["+", items[0].row, items[-1].row], ["u", []]]
            change = _Change(now, at, "", {}, now.next, undo=undo)
            return self._log(change, "import", call)

    # ------------------------------------------------------------ undo and delete

    def undo(
        self,
        bank: Bank,
        *,
        at: Instant,
        operation: int | None = None,
        codes: Mapping[int, Code] | None = None,
    ) -> str:
        """Take back an operation of the bank: its last one, or the one of that number.

        Args:
            bank: where.
            at: the time of the call.
            operation: which one; None = the last.
            codes: row -> Code for what comes back from the attic (see `returning`).

        Returns:
            The verb that was undone.

        Raises:
            StoreError: there is nothing to undo, a later operation builds on it, or what it
                forgot has left the attic.
            Conflict: something comes back for which there is no code.
        """
        with self.guard(), self.write():
            now = self.refresh(bank)
            verb, numbers, changes = self._undoable(now, operation)
            for change in reversed(changes):
                self._revert(change, codes or {})
            self.db.executemany("UPDATE log SET undone = 1 WHERE no = ?", [(n,) for n in numbers])
            self._log(_Change(now, at, "", {}, now.next, undo=[["u", numbers]]), "undo")
        return verb

    def bring_back(self, bank: Bank, codes: Mapping[int, Code], *, at: Instant) -> None:
        """Take forgotten items out of the attic: a part of an undo that is still to be finished."""
        with self.guard(), self.write():
            now = self.refresh(bank)
            for row in codes:
                self._bring_back(row, codes)
            self._log(_Change(now, at, "", {}, now.next, undo=[["u", []]]), "undo")

    def returning(self, bank: Bank, operation: int | None) -> tuple[list[Item], int]:
        """What an undo would bring back from the attic, and the bytes that it would free."""
        with self.guard(), self.read():
            changes = self._undoable(self.refresh(bank), operation)[2]
            back = self.forgotten(r for c in changes if c[0] == "e" for r in c[1])
            freed = sum(
                self.db.execute("SELECT length(body) FROM attic WHERE row = ?", (r,)).fetchone()[0]
                for r in back
            )
            for span in _spans(changes):
                freed += self.db.execute(
                    "SELECT coalesce(sum(length(CAST(text AS BLOB)) + coalesce(length(data), 0) + "
                    "3 * length(terms) + coalesce(length(vector), 0) + 100), 0) "
                    "FROM items JOIN codes USING(row) WHERE row BETWEEN ? AND ?",
                    span,
                ).fetchone()[0]
            return [*back.values()], freed

    def forgotten(self, rows: Iterable[int]) -> dict[int, Item]:
        """Items that lie in the attic, by row."""
        out = {}
        for row in rows:
            found = self.db.execute("SELECT body FROM attic WHERE row = ?", (row,)).fetchone()
            if found:
                out[row] = _item(_unpacked(found[0])[0])
        return out

    def _undoable(
        self, bank: Bank, operation: int | None
    ) -> tuple[str, list[int], list[list[Any]]]:
        """Verb, log numbers and changes (in order) of an operation that may be taken back now.

        An operation may lie in several transactions, with those of other writers between them.
        """
        rows = self.db.execute(
            "SELECT no, coalesce(nullif(call, 0), no), verb, changes FROM log "
            "WHERE bank = ? AND undone = 0 AND verb != 'undo' ORDER BY no DESC",
            (bank.no,),
        )
        later: set[int] = set()
        mine: list[tuple[int, str, list[list[Any]]]] = []
        for no, call, verb, text in rows:
            operation = call if operation is None else operation
            if no < operation:
                break
            if call == operation:
                mine.append((no, verb, _json(text)))
            else:
                later |= _touched(_json(text))
        if not mine or mine[-1][0] != operation:
            what = "nothing" if operation is None else f"no operation {operation}"
            raise StoreError(f"bank {bank.name!r} has {what} to undo (the log is bounded)")
        verb = mine[0][1]  # what was forgotten to make room for it stands before it
        if final := {"delete", "rebuild"} & {part[1] for part in mine}:
            raise StoreError(f"a {final.pop()} is for good and cannot be undone")
        changes = [c for _, _, part in reversed(mine) for c in part]
        if later & _touched(changes) or self._built_upon(changes):
            raise StoreError(
                f"operation {operation} ({verb}) cannot be undone: later operations build on it; "
                "undo those first"
            )
        return verb, [no for no, _, _ in mine], changes

    def _built_upon(self, changes: Sequence[list[Any]]) -> bool:
        """Does an item from outside these changes rest on or link to one that they added?"""
        spans = _spans(changes)
        return any(
            not any(first <= src <= last for first, last in spans)
            for span in spans
            for (src,) in self.db.execute(
                "SELECT DISTINCT src FROM links WHERE dst BETWEEN ? AND ? AND rel != 'supersedes'",
                span,
            )
        )

    def _revert(self, change: list[Any], codes: Mapping[int, Code]) -> None:
        match change:
            case ["+", first, last]:
                self._remove(range(first, last + 1), incoming=True)
            case ["x", row, _]:
                self.db.execute("UPDATE items SET expired = NULL WHERE row = ?", (row,))
            case ["l", src, rel, dst, old]:
                self.db.execute(
                    "DELETE FROM links WHERE src = ? AND rel = ? AND dst = ?", (src, rel, dst)
                )
                if old is not None:
                    self.db.execute("INSERT INTO links VALUES (?,?,?,?,?,?)", old)
            case ["e", rows]:
                for row in rows:
                    self._bring_back(row, codes)

    def _bring_back(self, row: int, codes: Mapping[int, Code]) -> None:
        found = self.db.execute("SELECT body FROM attic WHERE row = ?", (row,)).fetchone()
        if found is None and self.items([row]):
            return  # an undo that was cut off brought it back
        if found is None:
            raise StoreError(
                "what was forgotten has left the attic for good (its share of the budget was "
                "needed); it cannot be brought back"
            )
        if row not in codes:
            raise Conflict(f"record {row} was forgotten meanwhile")
        item, links = _unpacked(found[0])
        self.db.execute(f"INSERT INTO items VALUES ({','.join('?' * _N_COLUMNS)})", item)
        self.db.executemany("INSERT OR REPLACE INTO links VALUES (?,?,?,?,?,?)", links)
        code = codes[row]
        self.db.execute("INSERT INTO codes VALUES (?, ?, ?)", (row, code.terms, code.vector))
        self.db.execute("DELETE FROM attic WHERE row = ?", (row,))

    def uncoded(self, bank: Bank) -> list[Item]:
        """Items that have no entry for the indexes: a damage that `doctor` repairs."""
        rows = self.db.execute(
            f"SELECT {_COLUMNS} FROM items WHERE row BETWEEN ? AND ? "
            "AND row NOT IN (SELECT row FROM codes)",
            (bank.first, bank.last),
        )
        return [_item(row) for row in rows]

    def recode(self, codes: Iterable[tuple[int, Code]]) -> None:
        """Write the index entries of items again."""
        with self.guard(), self.write():
            self.db.executemany(
                "INSERT OR REPLACE INTO codes VALUES (?, ?, ?)",
                [(row, code.terms, code.vector) for row, code in codes],
            )

    def delete(self, bank: Bank, row: int, *, at: Instant) -> list[str]:
        """Remove an item and what rests on it alone from file, log, attic and WAL, for good.

        Returns:
            Ids that were removed.

        Raises:
            StoreLocked: it is gone, but a reader of another process keeps its text in the WAL.
        """
        with self.guard():
            with self.write():
                now = self.refresh(bank)
                gone = self.dependants(now, row)
                rows = [*gone]
                self._remove(rows, incoming=True)
                self.db.executemany("DELETE FROM attic WHERE row = ?", [(r,) for r in rows])
                self._log(_Change(now, at, "", {}, now.next, undo=[["d", rows]]), "delete")
            if not self.checkpoint():
                raise StoreLocked(
                    f"{item_id(gone[row], row)} is deleted, but a reader of another process keeps "
                    f"its text in {self.path}-wal; the next checkpoint after it ends removes it"
                )
        return [item_id(kind, r) for r, kind in gone.items()]

    def dependants(self, bank: Bank, row: int) -> dict[int, str]:
        """This row and all that rest on it alone, with their kinds: items and forgotten ones.

        A source that is gone for good supports nothing any more.
        """
        packed = {
            r: _unpacked(body)
            for r, body in self.db.execute(
                "SELECT row, body FROM attic WHERE row BETWEEN ? AND ?", (bank.first, bank.last)
            )
        }
        origins: dict[int, list[int]] = {}
        children: dict[int, list[int]] = {}
        for child, (_, links) in packed.items():
            origins[child] = [link[2] for link in links if link[1] == "derived_from"]
            for origin in origins[child]:
                children.setdefault(origin, []).append(child)
        gone = [row]
        for current in gone:
            resting = [link.src for link in self._rests((current,), incoming=True)]
            for child in dict.fromkeys([*resting, *children.get(current, ())]):
                if child not in origins:
                    origins[child] = [link.dst for link in self._rests((child,))]
                others = [r for r in origins[child] if r not in gone]
                if child not in gone and not (self.items(others) or packed.keys() & others):
                    gone.append(child)
        kinds = {r: i.kind for r, i in self.items(gone).items()}
        return {r: kinds[r] if r in kinds else packed[r][0][1] for r in gone}

    def _rests(self, rows: Sequence[int], *, incoming: bool = False) -> list[Link]:
        return self.links(rows, ["derived_from"], incoming=incoming)

    def drop(self, bank: Bank, policies: Sequence[str], *, at: Instant) -> int:
        """Remove the derived items of these policies (for `rebuild`); returns how many."""
        with self.guard(), self.write():
            now = self.refresh(bank)
            marks = ",".join("?" * len(policies))
            rows = [
                row
                for (row,) in self.db.execute(
                    f"SELECT row FROM items WHERE row BETWEEN ? AND ? AND policy IN ({marks}) "
                    f"AND kind NOT IN {SOURCES}",
                    (bank.first, bank.last, *policies),
                )
            ]
            self._remove(rows, incoming=True)
            self._log(_Change(now, at, "", {}, now.next, undo=[["d", rows]]), "rebuild")
        return len(rows)

    # ------------------------------------------------------------ bytes

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

    def table_bytes(self, bank: Bank | None = None) -> dict[str, int]:
        """Bytes of content: text by item kind, vectors, terms, links, log, attic."""
        where, span = "", tuple[int, ...]()
        if bank is not None:
            where, span = " WHERE row BETWEEN ? AND ?", (bank.first, bank.last)
        out = dict(
            self.db.execute(
                "SELECT kind, sum(length(CAST(text AS BLOB)) + length(actor) + length(session) + "
                f"coalesce(length(data), 0) + 40) FROM items{where} GROUP BY kind ORDER BY kind",
                span,
            ).fetchall()
        )
        one = self.db.execute(
            "SELECT coalesce(sum(length(terms)), 0), coalesce(sum(length(vector)), 0) "
            f"FROM codes{where}",
            span,
        ).fetchone()
        out |= {"terms": one[0], "vectors": one[1]}
        for name, sql in (
            ("links", f"SELECT count(*) * 30 FROM links{where.replace('row', 'src')}"),
            ("attic", f"SELECT coalesce(sum(length(body) + length(why)), 0) FROM attic{where}"),
        ):
            out[name] = self.db.execute(sql, span).fetchone()[0]
        sql = "SELECT coalesce(sum(length(changes) + 40), 0) FROM log"
        values = (bank.no,) if bank else ()
        out["log"] = self.db.execute(sql + (" WHERE bank = ?" if bank else ""), values).fetchone()[
            0
        ]
        return {k: int(v) for k, v in out.items()}


def _item(row: Sequence[Any]) -> Item:
    if row[1] not in KINDS or tuple(map(type, row[2:7])) != (str, str, str, int, int):
        raise StoreCorrupt(f"record {row[0]} makes no sense; run `memwise doctor` on the file")
    return Item(
        row=row[0], kind=row[1], text=row[2], actor=row[3], session=row[4], at=row[5],
        created=row[6], valid_from=row[7], valid_to=row[8], expired=row[9], strength=row[10],
        uses=row[11], last_use=row[6] if row[12] is None else row[12], policy=row[13],
        extractor=row[14], data=_json(row[15]) if row[15] else {},
    )  # fmt: skip


def digest_of(item: Item, bank: int) -> int:
    """The digest with which a bank recognizes an item."""
    add = Add(
        item.kind, item.text, actor=item.actor, session=item.session, at=item.at,
        valid_from=item.valid_from, valid_to=item.valid_to, data=item.data,
    )  # fmt: skip
    return digest(bank, add, item.policy, item.at)


def _record(item: Item, bank: int) -> tuple[Any, ...]:
    """An item as a row of `items`."""
    data = json.dumps(item.data, sort_keys=True, ensure_ascii=False) if item.data else None
    last_use = None if item.last_use == item.created else item.last_use
    return (
        item.row, item.kind, item.text, item.actor, item.session, item.at, item.created,
        item.valid_from, item.valid_to, item.expired, item.strength, item.uses, last_use,
        item.policy, item.extractor, data, digest_of(item, bank),
    )  # fmt: skip


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise StoreCorrupt(
            f"a record is not the JSON it was ({error}); run `memwise doctor` on the file"
        ) from error


def _unpacked(body: bytes) -> tuple[list[Any], list[list[Any]]]:
    """Row of `items` and outgoing links of a forgotten item."""
    try:
        row, links = _json(zlib.decompress(body))
    except (TypeError, ValueError, zlib.error) as error:
        raise StoreCorrupt(
            f"a forgotten item cannot be unpacked ({error}); run `memwise doctor` on the file"
        ) from error
    return row, links


def _spans(changes: Sequence[list[Any]]) -> list[tuple[int, int]]:
    """The ranges of rows that the changes of one operation added, joined where they touch."""
    out: list[tuple[int, int]] = []
    for first, last in sorted((c[1], c[2]) for c in changes if c[0] == "+"):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(last, out[-1][1]))
        else:
            out.append((first, last))
    return out


def _touched(changes: Sequence[list[Any]]) -> set[int]:
    """Rows that the changes of one operation added, altered or linked."""
    out: set[int] = set()
    for change in changes:
        match change:
            case ["+", first, last]:
                out |= set(range(first, last + 1))
            case ["l", src, _, dst, _]:
                out |= {src, dst}
            case ["x", row, _]:
                out.add(row)
            case ["e" | "d", rows]:
                out |= set(rows)
    return out
