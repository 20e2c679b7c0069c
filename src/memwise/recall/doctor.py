"""The doctor: compares a memory file's indexes with its truth, repairs, saves, embeds anew.

Truth is what was said and derived (`items`, `links`); the rest follows from it and can be made
again. `examine` only reads. `repair` makes indexes again in place, in one transaction; of a file
that SQLite calls damaged it saves what can be read into a new file and keeps the damaged one.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from memwise.codec import np as codec
from memwise.errors import InvalidKnob, MemwiseError, StoreCorrupt
from memwise.recall.engine.embed import Embedder, embedder
from memwise.recall.engine.examine import (
    CHECKS,
    COLUMNS,
    NEXT,
    SEQUENCE,
    Finding,
    broken,
    digest_of_row,
    integrity,
    makes_sense,
    one,
    open_read_only,
    unpacked,
)
from memwise.recall.engine.records import BANK_BITS, SOURCES
from memwise.recall.engine.salvage import Salvage, open_damaged
from memwise.recall.engine.store import SQLite
from memwise.recall.engine.tables import Code
from memwise.recall.engine.text import phrased, term_bytes
from memwise.recall.memory import VECTOR_CODEC

Progress: TypeAlias = Callable[[int, int], object]
_BATCH = 512  # items embedded in one transaction
_PAGE = 4096  # items looked at in one go


@dataclass(frozen=True)
class Report:
    """What the doctor saw in a file, and with `repair` what was done.

    Attributes:
        path: the file that is good to use now.
        findings: what was found, the worst first; after a repair, in the file before it.
        counts: number of rows by table.
        embedder: fingerprint of the embedder whose vectors are in the file.
        done: what a repair did, in words.
        kept: where a damaged file was kept; empty if there was none.
    """

    path: str
    findings: tuple[Finding, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    embedder: str = ""
    done: tuple[str, ...] = ()
    kept: str = ""

    @property
    def ok(self) -> bool:
        """Was nothing found that contradicts the truth?"""
        return not any(f.level == "damage" for f in self.findings)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {name}" for name, n in self.counts.items() if n)
        lines = [f"{self.path}: {'sound' if self.ok else 'damaged'} ({counts or 'empty'})"]
        lines += [f"  {f.level}: {f.what} ({f.n}); {f.advice}" for f in self.findings]
        lines += [f"  done: {what}" for what in self.done]
        return "\n".join(lines)


# ---------------------------------------------------------------- looking


def examine(path: str | Path, progress: Progress | None = None) -> Report:
    """Compare a memory file with itself; nothing is changed.

    Args:
        path: the file.
        progress: called with (done, total) steps.

    Raises:
        InvalidKnob: there is no file, or it belongs to another program.
    """
    file = _existing(path)
    report = progress or (lambda done, total: None)
    with closing(open_read_only(file)) as db:
        try:
            findings = integrity(db, file)
            counts = {t: one(db, f"SELECT count(*) FROM {t}") for t in COLUMNS}
            key = "SELECT value FROM meta WHERE key = 'embedder'"
            fingerprint = str((db.execute(key).fetchone() or ("",))[0])
            for i, check in enumerate(CHECKS):
                report(i, len(CHECKS))
                findings += check(db)
            report(len(CHECKS), len(CHECKS))
        except (sqlite3.DatabaseError, StoreCorrupt) as error:
            return Report(str(file), (broken(str(error)),))
    findings.sort(key=lambda f: f.level)
    return Report(str(file), tuple(findings), counts, fingerprint)


def _existing(path: str | Path) -> Path:
    file = Path(path)
    if not file.is_file():
        raise InvalidKnob(f"{file} is not a file; give the path of a memory file")
    return file


# ---------------------------------------------------------------- repairing


def repair(
    path: str | Path, out: str | Path | None = None, progress: Progress | None = None
) -> Report:
    """Make the indexes of a memory file agree with its truth.

    A damaged file is read around its holes into a new file. Without `out` the new file takes the
    place of the damaged one, which is kept beside it under the name `<path>.damaged`; nothing is
    overwritten.

    Args:
        path: the file; no other process should use it.
        out: where a new file is to be written instead; it must not exist.
        progress: called with (done, total) items.

    Returns:
        The report of `examine` from before, with what was done.

    Raises:
        InvalidKnob: there is no such file, or `out` exists.
        StoreCorrupt: not even a part of it can be read.
    """
    file = _existing(path)
    if out is not None and Path(out).exists():
        raise InvalidKnob(f"{out} exists; give a path that is free")
    before = examine(file)
    report = progress or (lambda done, total: None)
    structural = any(f.what.startswith("the file is damaged") for f in before.findings)
    if structural or out is not None:
        return _save(file, None if out is None else Path(out), before, report)
    with closing(SQLite(file)) as store:
        done = _mend(store, report)
    return Report(str(file), before.findings, before.counts, before.embedder, tuple(done))


def _mend(store: SQLite, progress: Progress) -> list[str]:
    """Derive again what can be derived; returns what was done."""
    db = store.db
    with store.guard():
        with store.write():
            before = db.total_changes
            done = [*_drop_the_senseless(db), *_list_banks(db), *_index_again(db, progress)]
            if db.total_changes > before:
                _start_anew(db)
        made = _embedder_of(store)
        n = _embed_missing(store, made, progress) if made and made.dim else 0
    return [*done, f"embedded {n} items"] if n else done


_SENSELESS: Mapping[str, str] = {
    "codes without an item": "DELETE FROM codes WHERE row NOT IN (SELECT row FROM items)",
    "links from nowhere": "DELETE FROM links WHERE src NOT IN (SELECT row FROM items)",
    "links to items that never were": (
        "DELETE FROM links WHERE dst NOT IN (SELECT row FROM items) AND "
        f"(dst & {SEQUENCE}) >= coalesce((SELECT next FROM banks WHERE no = dst >> {BANK_BITS}), 0)"
    ),
    "forgotten items that are there": "DELETE FROM attic WHERE row IN (SELECT row FROM items)",
    "vectors of another length than the rest": (
        "UPDATE codes SET vector = NULL WHERE vector NOT NULL AND length(vector) != (SELECT "
        "length(vector) FROM codes WHERE vector NOT NULL GROUP BY 1 ORDER BY count(*) DESC LIMIT 1)"
    ),
}


def _drop_the_senseless(db: sqlite3.Connection) -> list[str]:
    bad = [
        row
        for row, *rest in db.execute("SELECT row, kind, text, at, data FROM items")
        if not makes_sense(row, *rest)
    ]
    db.executemany("DELETE FROM items WHERE row = ?", [(row,) for row in bad])
    done = [f"dropped {len(bad)} items that make no sense"] if bad else []
    spoilt = [r for r, body in db.execute("SELECT row, body FROM attic") if unpacked(body) is None]
    db.executemany("DELETE FROM attic WHERE row = ?", [(row,) for row in spoilt])
    done += [f"dropped {len(spoilt)} forgotten items that cannot be unpacked"] if spoilt else []
    for what, sql in _SENSELESS.items():
        n = db.execute(sql).rowcount
        done += [f"dropped {n} {what}"] if n else []
    return done


def _list_banks(db: sqlite3.Connection) -> list[str]:
    """Every bank is listed, gives no number twice, and has the version of its log."""
    tops = dict(
        db.execute(
            f"SELECT row >> {BANK_BITS}, max(row) & {SEQUENCE} FROM "
            "(SELECT row FROM items UNION ALL SELECT row FROM attic) GROUP BY 1"
        ).fetchall()
    )
    listed = {no for (no,) in db.execute("SELECT no FROM banks")}
    for no in tops.keys() - listed:
        name = f"bank {no}"
        db.execute("INSERT INTO banks VALUES (?, ?, '', ?, 0)", (no, name, tops[no] + 1))
    for no, top in tops.items():
        db.execute("UPDATE banks SET next = ? WHERE no = ? AND next <= ?", (top + 1, no, top))
    ahead = db.execute(
        "UPDATE banks SET version = 0 WHERE version != "
        "coalesce((SELECT max(version) FROM log WHERE bank = banks.no), version)"
    ).rowcount
    done = [f"listed bank {no} again" for no in sorted(tops.keys() - listed)]
    return [*done, f"set the version of {ahead} banks"] if ahead else done


def _start_anew(db: sqlite3.Connection) -> None:
    """Versions beyond what the log tells, so that readers build their indexes anew."""
    db.execute(
        "UPDATE banks SET version = 2 + max(version, "
        "coalesce((SELECT max(version) FROM log WHERE bank = banks.no), 0))"
    )
    db.execute(
        "INSERT INTO log(bank, version, at, verb, changes, call) "
        "SELECT no, version, 0, 'undo', '[[\"u\", []]]', 0 FROM banks"
    )


def _index_again(db: sqlite3.Connection, progress: Progress) -> list[str]:
    total = one(db, "SELECT count(*) FROM items")
    n = seen = row = 0
    while records := db.execute(
        "SELECT i.row, kind, text, actor, session, at, valid_from, valid_to, policy, data, hash, "
        "c.terms "
        "FROM items i LEFT JOIN codes c USING(row) WHERE i.row > ? ORDER BY i.row LIMIT ?",
        (row, _PAGE),
    ).fetchall():
        for row, kind, text, actor, session, at, begin, end, policy, data, held, stored in records:
            code = digest_of_row(row, kind, text, actor, session, at, begin, end, policy, data)
            words = term_bytes(actor, text)
            if code != held:
                db.execute("UPDATE items SET hash = ? WHERE row = ?", (code, row))
            if stored != words:
                db.execute(
                    "INSERT INTO codes VALUES (?, ?, NULL) "
                    "ON CONFLICT DO UPDATE SET terms = excluded.terms",
                    (row, words),
                )
            n += code != held or stored != words
        seen += len(records)
        progress(seen, total)
    return [f"indexed {n} items again"] if n else []


def _embedder_of(store: SQLite) -> Embedder | None:
    """The file's own embedder, if it can be made here."""
    try:
        made = embedder(store.meta("embedder spec") or "none")
    except MemwiseError:
        return None
    return made if made.fingerprint == store.meta("embedder") else None


def _embed_missing(store: SQLite, made: Embedder, progress: Progress) -> int:
    """Vectors for the sources that have none."""
    rows = store.db.execute(
        f"SELECT row, kind, actor, text FROM items JOIN codes USING(row) WHERE kind IN {SOURCES} "
        "AND vector IS NULL ORDER BY row"
    ).fetchall()
    for i in range(0, len(rows), _BATCH):
        part = rows[i : i + _BATCH]
        blobs = _encoded(made, [tuple(said) for _, *said in part])
        with store.write():
            store.db.executemany(
                "UPDATE codes SET vector = ? WHERE row = ?",
                [(blob, row) for blob, (row, *_) in zip(blobs, part, strict=True)],
            )
        progress(i + len(part), len(rows))
    return len(rows)


def _encoded(made: Embedder, said: Sequence[tuple[str, ...]]) -> list[bytes | None]:
    """Stored vectors of texts, each given as (kind, actor, text)."""
    if not made.dim or not said:
        return [None] * len(said)
    vectors = made.encode([phrased(*one) for one in said], "passage")
    coder = codec.codec(VECTOR_CODEC)
    return list(coder.to_bytes(coder.encode(vectors)))


# ---------------------------------------------------------------- saving


def _save(file: Path, out: Path | None, before: Report, progress: Progress) -> Report:
    """Read a damaged file around its holes into a new one."""
    target = file.with_name(f"{file.name}.saved") if out is None else out
    if target.exists():
        raise InvalidKnob(f"{target} exists, from an earlier repair; move it away")
    try:
        with open_damaged(file, target) as db:
            done = Salvage(db, file, target).run(progress)
        with closing(SQLite(target)) as store:
            done += _mend(store, lambda done, total: None)
            counts = {t: one(store.db, f"SELECT count(*) FROM {t}") for t in COLUMNS}
    except BaseException:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{target}{suffix}").unlink(missing_ok=True)
        raise
    if not counts["items"] + counts["attic"]:
        target.unlink()
        raise StoreCorrupt(f"nothing in {file} could be read; restore it from a backup")
    kept = ""
    if out is None:
        kept = _swap(file, target)
        target = file
        done.append(f"the damaged file is kept as {kept}")
    return Report(str(target), before.findings, counts, before.embedder, tuple(done), kept)


def _swap(file: Path, target: Path) -> str:
    """Put the new file in the place of the damaged one, which moves beside it."""
    names = (f"{file}.damaged" + (f"-{n}" if n else "") for n in range(1 << 20))
    kept = next(name for name in names if not os.path.exists(name))
    for suffix in ("-wal", "-shm", ""):
        if os.path.exists(f"{file}{suffix}"):
            os.rename(f"{file}{suffix}", f"{kept}{suffix}")
    os.rename(target, file)
    return kept


# ---------------------------------------------------------------- another embedder


def reembed(
    path: str | Path, wanted: str | Embedder = "auto", progress: Progress | None = None
) -> Report:
    """Embed everything with another embedder.

    The new vectors gather beside the old ones in bounded transactions; a run that was cut off goes
    on where it stopped. They take over in the last transaction, together with the fingerprint:
    until then others read and write as before, afterwards they get `EmbedderMismatch`.

    Args:
        path: the file.
        wanted: as `Memory(embedder=...)`.
        progress: called with (done, total) items.
    """
    file = _existing(path)
    made = embedder(wanted)
    report = progress or (lambda done, total: None)
    with closing(SQLite(file)) as store, store.guard():
        if store.meta("embedder") == made.fingerprint:
            return Report(str(file), embedder=made.fingerprint, done=("nothing to do",))
        _begin(store, made)
        total = one(store.db, "SELECT count(*) FROM codes")
        row = one(store.db, f"SELECT coalesce(max(row), 0) FROM {NEXT}")
        while part := _following(store.db, row):
            codes = _next_codes(made, part)
            with store.write():
                _add_next(store.db, codes)
            row = part[-1][0]
            report(one(store.db, f"SELECT count(*) FROM {NEXT}"), total)
        while True:
            codes = _next_codes(made, late := _late(store.db))
            with store.write():
                _add_next(store.db, codes)
                if len(late) < _BATCH and not _late(store.db):
                    _take_over(store, made)
                    break
        report(total, total)
        store.checkpoint()
    return Report(str(file), embedder=made.fingerprint, done=(f"embedded {total} items",))


def _begin(store: SQLite, made: Embedder) -> None:
    with store.write():
        if store.meta("next embedder") != made.fingerprint:
            store.db.execute(f"DROP TABLE IF EXISTS {NEXT}")
            store.db.execute(
                f"CREATE TABLE {NEXT}(row INTEGER PRIMARY KEY, terms BLOB NOT NULL, vector BLOB)"
            )
            store.set_meta("next embedder", made.fingerprint)


# Where a file had no vectors at all, nothing says which items want one: all get it.
_WANTS = (
    f"kind IN {SOURCES} OR vector NOT NULL "
    "OR NOT EXISTS (SELECT 1 FROM codes WHERE vector NOT NULL)"
)
_TO_EMBED = (
    f"SELECT i.row, kind, actor, text, c.terms, {_WANTS} FROM items i JOIN codes c USING(row)"
)


def _following(db: sqlite3.Connection, row: int) -> list[tuple[Any, ...]]:
    """(row, kind, actor, text, terms, wants a vector) of the items after a row."""
    sql = f"{_TO_EMBED} WHERE i.row > ? ORDER BY i.row LIMIT ?"
    return db.execute(sql, (row, _BATCH)).fetchall()


def _late(db: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """The same of items that others wrote meanwhile."""
    sql = f"{_TO_EMBED} WHERE i.row NOT IN (SELECT row FROM {NEXT}) ORDER BY i.row LIMIT ?"
    return db.execute(sql, (_BATCH,)).fetchall()


def _next_codes(made: Embedder, part: Sequence[tuple[Any, ...]]) -> list[tuple[int, Code]]:
    blobs = iter(_encoded(made, [tuple(said) for _, *said, _, wants in part if wants]))
    return [(row, Code(words, next(blobs) if wants else None)) for row, *_, words, wants in part]


def _add_next(db: sqlite3.Connection, codes: Sequence[tuple[int, Code]]) -> None:
    db.executemany(
        f"INSERT OR REPLACE INTO {NEXT} VALUES (?, ?, ?)",
        [(row, code.terms, code.vector) for row, code in codes],
    )


def _take_over(store: SQLite, made: Embedder) -> None:
    db = store.db
    db.execute(f"DELETE FROM {NEXT} WHERE row NOT IN (SELECT row FROM items)")
    db.execute("DROP TABLE codes")
    db.execute(f"ALTER TABLE {NEXT} RENAME TO codes")
    store.set_meta("embedder", made.fingerprint)
    store.set_meta("embedder spec", str(getattr(made, "spec", "")))
    store.set_meta("next embedder", None)
    db.execute("UPDATE banks SET version = version + 1")
    db.execute(
        "INSERT INTO log(bank, version, at, verb, changes, call) "
        "SELECT no, version, 0, 'undo', '[[\"u\", []]]', 0 FROM banks"
    )


__all__ = ["Finding", "Report", "examine", "reembed", "repair"]
