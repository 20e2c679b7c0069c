"""What lies in the tables: banks, items, links, codes, the attic and the log, as they are read."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TypeAlias

from memwise.errors import EmbedderMismatch, StoreCorrupt, StoreError
from memwise.recall.engine.file import File
from memwise.recall.engine.records import BANK_BITS, KINDS, SOURCES, Add, Instant, Item, Link

COLUMNS = (
    "row, kind, text, actor, session, at, created, valid_from, valid_to, expired, strength, uses, "
    "last_use, policy, extractor, data"
)
N_COLUMNS = 17
TAIL = 4  # newest sources of a bank that are kept at hand
CHUNK = 500  # bound variables a statement; SQLite's own limit is far higher


Said: TypeAlias = tuple[Instant, int]
"""Event time and hash of a source."""


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


class Tables(File):
    """A memory file as it is read; `SQLite` adds how it is written.

    Args:
        path: the file.
        durability: see `File`.
    """

    def __init__(self, path: str | Path, durability: Literal["process", "power"] = "process"):
        self.fingerprint: str | None = None  # of the embedder whose vectors this object writes
        self._seen: dict[int, Bank] = {}
        self._tails: dict[int, tuple[int, list[Item]]] = {}  # bank -> version, newest sources
        super().__init__(path, durability)

    def rolled_back(self) -> None:
        """Drop what was noted of a state that is no more."""
        self._seen.clear()
        self._tails.clear()

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

    def stands(self, bank: Bank) -> bool:
        """Is the bank still as it is described here?"""
        # A re-embedding gives it a new version, so the fingerprint need not be compared.
        sql = "SELECT version, next FROM banks WHERE no = ?"
        found: object = self.db.execute(sql, (bank.no,)).fetchone()
        return found == (bank.version, bank.next)

    def seen(self, bank: Bank) -> Bank:
        """The bank as this object saw it last: enough for plans, since `apply` checks them."""
        return self._seen.get(bank.no) or self.refresh(bank)

    def _bank(self, column: str, value: str | int) -> Bank | None:
        row = self.db.execute(
            f"SELECT no, name, policy, version, next FROM banks WHERE {column} = ?", (value,)
        ).fetchone()
        return Bank(*row) if row else None

    def items(self, rows: Iterable[int]) -> dict[int, Item]:
        """Items by row; rows that are gone are left out."""
        out: dict[int, Item] = {}
        wanted = list(rows)
        for i in range(0, len(wanted), CHUNK):
            part = wanted[i : i + CHUNK]
            marks = ",".join("?" * len(part))
            for row in self.db.execute(f"SELECT {COLUMNS} FROM items WHERE row IN ({marks})", part):
                out[row[0]] = as_item(row)
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
        sql = f"SELECT {COLUMNS} FROM items WHERE row BETWEEN ? AND ?"
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
        found = [as_item(row) for row in self.db.execute(sql + " ORDER BY row", values)]
        return found if at is None else [i for i in found if i.holds(at, known_at or i.created)]

    def counts(self, bank: Bank, policies: Sequence[str] = ()) -> dict[str, int]:
        """Number of live items by kind, of these policies (all if none)."""
        among = f"AND policy IN ({','.join('?' * len(policies))}) " if policies else ""
        return dict(
            self.db.execute(
                "SELECT kind, count(*) FROM items WHERE row BETWEEN ? AND ? AND expired IS NULL "
                f"{among}GROUP BY kind ORDER BY min(row)",
                (bank.first, bank.last, *policies),
            ).fetchall()
        )

    def links(
        self, rows: Iterable[int], rels: Sequence[str] = (), *, incoming: bool = False
    ) -> list[Link]:
        """Links that leave (or with `incoming` reach) the rows and hold now."""
        near, far = ("dst", "src") if incoming else ("src", "dst")
        out: list[Link] = []
        wanted = list(rows)
        for i in range(0, len(wanted), CHUNK):
            part: list[Any] = wanted[i : i + CHUNK]
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
        for i in range(0, len(rows), CHUNK):
            part = rows[i : i + CHUNK]
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
        if tail := self._tail(bank):
            return tail[-1].session
        row = self.db.execute(
            f"SELECT session FROM items WHERE row BETWEEN ? AND ? AND kind IN {SOURCES} "
            "ORDER BY row DESC LIMIT 1",
            (bank.first, bank.last),
        ).fetchone()
        return str(row[0]) if row else ""

    def before(self, bank: Bank, row: int, session: str, n: int) -> list[Item]:
        """The last sources before a row, as far as they are of that session, oldest first."""
        tail = self._tail(bank)
        if n <= TAIL and tail and tail[-1].row < row:
            return [item for item in tail[-n:] if item.session == session]
        found = self.db.execute(
            f"SELECT {COLUMNS} FROM items WHERE row BETWEEN ? AND ? AND kind IN {SOURCES} "
            "ORDER BY row DESC LIMIT ?",
            (bank.first, row - 1, n),
        )
        last = [*map(as_item, found)][::-1]
        if n == TAIL and row >= bank.first + bank.next:
            self._tails[bank.no] = bank.version, last
        return [item for item in last if item.session == session]

    def _tail(self, bank: Bank) -> list[Item]:
        """The newest sources, if this object knows them at this version."""
        version, items = self._tails.get(bank.no, (-1, []))
        return items if version == bank.version else []

    def last_end(self, bank: Bank) -> int:
        """Row up to which sources belong to sessions that have ended and been digested; or 0."""
        found = self.db.execute(
            "SELECT changes FROM log WHERE bank = ? AND verb = 'session end' AND undone = 0 "
            "ORDER BY version DESC LIMIT 1",
            (bank.no,),
        ).fetchone()
        return min((c[1] for c in from_json(found[0]) if c[0] == "+"), default=0) if found else 0

    def known(self, said: Sequence[Said], derived: Sequence[int] = ()) -> dict[int, int]:
        """Hash -> row of live items (arguments as of `same`)."""
        found = self.same(said, derived)
        return {code: row for code, row, expired in found if expired is None}

    def same(
        self, said: Sequence[Said], derived: Sequence[int] = ()
    ) -> Iterator[tuple[int, int, Instant | None]]:
        """Hash, row and expiry of the items with these hashes.

        Args:
            said: (event time, hash) of sources. Neighbours in time lie side by side in their index,
                so that a call writes one page of it and not one an item.
            derived: hashes of derived items.
        """
        for i in range(0, len(said), CHUNK):
            part = said[i : i + CHUNK]
            marks = ",".join(["(?,?)"] * len(part))
            values = [value for pair in part for value in pair]
            yield from self.db.execute(  # as a join: IN would read the whole index
                f"WITH asked(t, code) AS (VALUES {marks}) SELECT hash, row, expired "
                "FROM asked CROSS JOIN items ON policy = '' AND at = t AND hash = code",
                values,
            )
        for i in range(0, len(derived), CHUNK):
            codes = derived[i : i + CHUNK]
            marks = ",".join("?" * len(codes))
            yield from self.db.execute(
                f"SELECT hash, row, expired FROM items WHERE policy != '' AND hash IN ({marks})",
                codes,
            )

    def changes(self, bank: Bank, since: int) -> list[list[Any]] | None:
        """Changes of the bank after version `since`; None if the log no longer reaches back."""
        rows = self.db.execute(
            "SELECT changes FROM log WHERE bank = ? AND version > ? AND version <= ? "
            "ORDER BY version",
            (bank.no, since, bank.version),
        ).fetchall()
        if len(rows) != bank.version - since:
            return None
        return [change for (text,) in rows for change in from_json(text)]

    def forgotten(self, rows: Iterable[int]) -> dict[int, Item]:
        """Items that lie in the attic, by row."""
        out = {}
        for row in rows:
            found = self.db.execute("SELECT body FROM attic WHERE row = ?", (row,)).fetchone()
            if found:
                out[row] = as_item(unpacked(found[0])[0])
        return out

    def uncoded(self, bank: Bank) -> list[Item]:
        """Items that have no entry for the indexes: a damage that `doctor` repairs."""
        rows = self.db.execute(
            f"SELECT {COLUMNS} FROM items WHERE row BETWEEN ? AND ? "
            "AND row NOT IN (SELECT row FROM codes)",
            (bank.first, bank.last),
        )
        return [as_item(row) for row in rows]

    def dependants(self, bank: Bank, row: int) -> dict[int, str]:
        """This row and all that rest on it alone, with their kinds: items and forgotten ones.

        A source that is gone for good supports nothing any more.
        """
        packed = {
            r: unpacked(body)
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


def as_item(row: Sequence[Any]) -> Item:
    """An item from its columns."""
    if row[1] not in KINDS or tuple(map(type, row[2:7])) != (str, str, str, int, int):
        raise StoreCorrupt(f"record {row[0]} makes no sense; run `memwise doctor` on the file")
    return Item(
        row=row[0], kind=row[1], text=row[2], actor=row[3], session=row[4], at=row[5],
        created=row[6], valid_from=row[7], valid_to=row[8], expired=row[9], strength=row[10],
        uses=row[11], last_use=row[6] if row[12] is None else row[12], policy=row[13],
        extractor=row[14], data=from_json(row[15]) if row[15] else {},
    )  # fmt: skip


def digest_of(item: Item, bank: int) -> int:
    """The digest with which a bank recognizes an item."""
    add = Add(
        item.kind, item.text, actor=item.actor, session=item.session, at=item.at,
        valid_from=item.valid_from, valid_to=item.valid_to, data=item.data,
    )  # fmt: skip
    return digest(bank, add, item.policy, item.at)


def from_json(text: str | bytes) -> Any:
    """What a column holds as JSON."""
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise StoreCorrupt(
            f"a record is not the JSON it was ({error}); run `memwise doctor` on the file"
        ) from error


def unpacked(body: bytes) -> tuple[list[Any], list[list[Any]]]:
    """Row of `items` and outgoing links of a forgotten item."""
    try:
        row, links = from_json(zlib.decompress(body))
    except (TypeError, ValueError, zlib.error) as error:
        raise StoreCorrupt(
            f"a forgotten item cannot be unpacked ({error}); run `memwise doctor` on the file"
        ) from error
    return row, links
