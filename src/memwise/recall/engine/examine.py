"""What a memory file is checked for: each check reads and returns findings."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memwise.errors import InvalidKnob
from memwise.recall.engine.file import APPLICATION_ID
from memwise.recall.engine.records import BANK_BITS, KINDS, SOURCES, Add, Instant
from memwise.recall.engine.tables import digest
from memwise.recall.engine.text import term_bytes

SEQUENCE = (1 << BANK_BITS) - 1
COLUMNS = {"items": 17, "links": 6, "codes": 3, "attic": 4, "banks": 5, "log": 7, "meta": 2}
NEXT = "codes_next"  # vectors of the next embedder, until they take over


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        what: what it is.
        n: how many.
        advice: what to do.
        level: "damage" contradicts the truth, "note" is worth knowing.
    """

    what: str
    n: int
    advice: str
    level: Literal["damage", "note"] = "damage"


def open_read_only(file: Path) -> sqlite3.Connection:
    """A connection that cannot write."""
    db = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=30)
    db.isolation_level = None
    return db


def one(db: sqlite3.Connection, sql: str, values: Sequence[Any] = ()) -> int:
    """The number that a query asks for."""
    return int(db.execute(sql, values).fetchone()[0])


def broken(reason: str) -> Finding:
    """SQLite itself cannot read the whole file."""
    return Finding(f"the file is damaged: {reason}", 1, "repair it: what can be read is saved")


def integrity(db: sqlite3.Connection, file: Path) -> list[Finding]:
    """Is it a memory file, and can SQLite read all of it?

    Raises:
        InvalidKnob: it belongs to another program.
    """
    if one(db, "PRAGMA application_id") != APPLICATION_ID:
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
        if not {"items", "banks", "links"} <= names:
            raise InvalidKnob(f"{file} is not a memory of memwise; nothing can be done with it")
        return [broken("it does not say that it is a memory")]
    wrong = [line for (line,) in db.execute("PRAGMA integrity_check(20)") if line != "ok"]
    return [broken(wrong[0])] if wrong else []


def _found(n: int, what: str, advice: str, *, note: bool = False) -> list[Finding]:
    return [Finding(what, n, advice, "note" if note else "damage")] if n else []


def _items_and_codes(db: sqlite3.Connection) -> list[Finding]:
    bare = one(db, "SELECT count(*) FROM items WHERE row NOT IN (SELECT row FROM codes)")
    stray = one(db, "SELECT count(*) FROM codes WHERE row NOT IN (SELECT row FROM items)")
    return [
        *_found(bare, "items that search cannot find (no code)", "repair makes the codes again"),
        *_found(stray, "codes of items that are gone", "repair drops them"),
    ]


def _terms_and_hashes(db: sqlite3.Connection) -> list[Finding]:
    wrong_terms = wrong_hash = senseless = 0
    for row, kind, text, actor, session, at, begin, end, policy, data, held, stored in db.execute(
        "SELECT i.row, kind, text, actor, session, at, valid_from, valid_to, policy, data, hash, "
        "c.terms FROM items i LEFT JOIN codes c USING(row)"
    ):
        if not makes_sense(row, kind, text, at, data):
            senseless += 1
            continue
        wrong_terms += stored is not None and stored != term_bytes(actor, text)
        code = digest_of_row(row, kind, text, actor, session, at, begin, end, policy, data)
        wrong_hash += held != code
    return [
        *_found(senseless, "items that make no sense", "repair drops them"),
        *_found(wrong_terms, "items whose words are indexed wrongly", "repair indexes them again"),
        *_found(wrong_hash, "items with a wrong hash", "repair computes it again"),
    ]


def makes_sense(row: Any, kind: Any, text: Any, at: Any, data: Any) -> bool:
    """Can these columns be those of an item?"""
    if kind not in KINDS or not isinstance(text, str) or not text:
        return False
    if type(row) is not int or type(at) is not int or not row >> BANK_BITS or not row & SEQUENCE:
        return False
    try:
        return data is None or isinstance(json.loads(data), dict)
    except (TypeError, ValueError):
        return False


def digest_of_row(
    row: int, kind: str, text: str, actor: str, session: str, at: Instant, begin: Instant | None,
    end: Instant | None, policy: str, data: str | None,
) -> int:  # fmt: skip
    """The hash by which an item is recognized, from its columns."""
    add = Add(
        kind, text, actor=actor, session=session, at=at, valid_from=begin, valid_to=end,
        data=json.loads(data) if data else {},
    )  # fmt: skip
    return digest(row >> BANK_BITS, add, policy, at)


def _vectors(db: sqlite3.Connection) -> list[Finding]:
    sizes = db.execute(
        "SELECT length(vector), count(*) FROM codes WHERE vector NOT NULL GROUP BY 1 ORDER BY 2"
    ).fetchall()
    odd = sum(n for _, n in sizes[:-1])
    unembedded = 0
    if sizes:
        unembedded = one(
            db,
            f"SELECT count(*) FROM items JOIN codes USING(row) WHERE kind IN {SOURCES} "
            "AND vector IS NULL",
        )
    half = one(db, "SELECT count(*) FROM sqlite_schema WHERE name = ?", (NEXT,))
    return [
        *_found(odd, "vectors of another length than the rest", "repair drops and makes them"),
        *_found(unembedded, "sources without a vector", "repair embeds them", note=True),
        *_found(half, "an unfinished re-embedding", "run it again: it goes on there", note=True),
    ]


def _links(db: sqlite3.Connection) -> list[Finding]:
    lost = one(db, "SELECT count(*) FROM links WHERE src NOT IN (SELECT row FROM items)")
    far = "dst NOT IN (SELECT row FROM items) AND dst NOT IN (SELECT row FROM attic)"
    following = f"coalesce((SELECT next FROM banks WHERE no = dst >> {BANK_BITS}), 0)"
    ahead = one(db, f"SELECT count(*) FROM links WHERE {far} AND (dst & {SEQUENCE}) >= {following}")
    gone = one(db, f"SELECT count(*) FROM links WHERE {far}") - ahead
    return [
        *_found(lost, "links that leave from nowhere", "repair drops them"),
        *_found(ahead, "links to items that never were", "repair drops them"),
        *_found(gone, "links to items that were forgotten for good", "nothing to do", note=True),
    ]


def _foundations(db: sqlite3.Connection) -> list[Finding]:
    n = one(
        db,
        f"SELECT count(*) FROM items i WHERE kind NOT IN {SOURCES} AND expired IS NULL "
        "AND NOT EXISTS (SELECT 1 FROM links l JOIN items s ON s.row = l.dst "
        "WHERE l.src = i.row AND l.rel = 'derived_from')",
    )
    advice = "their sources were forgotten; delete them if they are not wanted"
    return _found(n, "derived items none of whose sources is there", advice, note=True)


def _numbers(db: sqlite3.Connection) -> list[Finding]:
    behind = one(
        db,
        "SELECT count(*) FROM banks b WHERE next <= coalesce((SELECT max(row) FROM "
        f"(SELECT row FROM items UNION ALL SELECT row FROM attic) WHERE row >> {BANK_BITS} = b.no)"
        f" & {SEQUENCE}, 0)",
    )
    unsynced = one(
        db,
        "SELECT count(*) FROM banks b WHERE EXISTS (SELECT 1 FROM log WHERE bank = b.no) "
        "AND version != (SELECT max(version) FROM log WHERE bank = b.no)",
    )
    orphans = one(
        db, f"SELECT count(*) FROM items WHERE row >> {BANK_BITS} NOT IN (SELECT no FROM banks)"
    )
    return [
        *_found(behind, "banks that would give a number twice", "repair moves them on"),
        *_found(unsynced, "banks whose version is not that of their log", "repair sets it"),
        *_found(orphans, "items of a bank that is not listed", "repair lists the bank again"),
    ]


def _attic(db: sqlite3.Connection) -> list[Finding]:
    bad = sum(unpacked(body) is None for (body,) in db.execute("SELECT body FROM attic"))
    twice = one(db, "SELECT count(*) FROM attic WHERE row IN (SELECT row FROM items)")
    return [
        *_found(bad, "forgotten items that cannot be unpacked", "repair drops them"),
        *_found(twice, "items both forgotten and there", "repair drops the forgotten ones"),
    ]


def unpacked(body: Any) -> list[Any] | None:
    """Columns and links of a forgotten item; None if they cannot be read."""
    try:
        item, links = json.loads(zlib.decompress(body))
    except (TypeError, ValueError, zlib.error):
        return None
    return [item, links] if len(item) == COLUMNS["items"] else None


CHECKS = (
    _items_and_codes, _terms_and_hashes, _vectors, _links, _foundations, _numbers, _attic,
)  # fmt: skip
