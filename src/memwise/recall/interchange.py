"""In and out of a bank: memwise's own export, and the files of other programs.

The own format is JSON lines, canonical: keys sorted, one item a line in the order of ids, times in
microseconds since 1970 in UTC, what is empty or usual left out. It holds all clocks and links, also
of items that were let go, but no vectors, log or attic. The same calls under the same clock give
the same bytes, and so does an export of what was imported into a new bank.

    {"bank":"ana","embedder":"none/0","format":"memwise","n_items":2,"next":3,"policy":"","version":1}
    {"actor":"ana","at":1767225600000000,"created":1767225600000000,"id":"t1",...}
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from memwise.errors import InvalidKnob, UnknownMethod
from memwise.recall.engine.dates import iso
from memwise.recall.engine.intake import drafts, is_text
from memwise.recall.engine.records import (
    KINDS,
    RELS,
    SOURCES,
    Add,
    Instant,
    Item,
    Link,
    Op,
    Receipt,
    item_id,
)
from memwise.recall.engine.store import SQLite
from memwise.recall.engine.tables import Bank
from memwise.recall.foreign import FORMATS, Entries, Entry, reader, sniff
from memwise.recall.memory import Memory, named_policy

Progress: TypeAlias = Callable[[int, int], object]
VERSION = 1
_BATCH = 500  # entries or items between two reports of progress
_INT64 = 2**63
_T = TypeVar("_T")
_DEFAULTS: Mapping[str, Any] = {
    "actor": "", "session": "", "valid_from": None, "valid_to": None, "expired": None,
    "strength": 1.0, "uses": 0, "policy": "", "extractor": "",
}  # fmt: skip


# ---------------------------------------------------------------- the own format, out


def export_bank(memory: Memory) -> Iterator[str]:
    """The lines of a bank's export, without line ends, as the bank is when the first is taken."""
    step = memory.view()
    with step.store.guard(), _snapshot(step.store) as db:
        yield from _lines(db, step.bank, str(step.store.meta("embedder")))


@contextmanager
def _snapshot(store: SQLite) -> Iterator[sqlite3.Connection]:
    """A connection of its own whose reads all see one state, while the memory may be written."""
    if store.path == ":memory:":
        copy = sqlite3.connect(":memory:")
        store.db.backup(copy)
    else:
        copy = sqlite3.connect(store.path, isolation_level=None)
        copy.execute("BEGIN")
    try:
        yield copy
    finally:
        copy.close()


def _lines(db: sqlite3.Connection, bank: Bank, embedder: str) -> Iterator[str]:
    span = (bank.first, bank.last)
    policy, following = db.execute(
        "SELECT policy, next FROM banks WHERE no = ?", (bank.no,)
    ).fetchone()
    count = db.execute("SELECT count(*) FROM items WHERE row BETWEEN ? AND ?", span).fetchone()[0]
    yield _canonical(
        {
            "bank": bank.name, "embedder": embedder, "format": "memwise", "n_items": count,
            "next": following, "policy": policy, "version": VERSION,
        }
    )  # fmt: skip
    embedded = db.execute(
        "SELECT 1 FROM codes WHERE row BETWEEN ? AND ? AND vector NOT NULL LIMIT 1", span
    ).fetchone()
    links = _Peekable(
        db.execute(
            "SELECT src, rel, dst, weight, created, expired FROM links WHERE src BETWEEN ? AND ? "
            "ORDER BY src, rel, dst",
            span,
        )
    )
    items = db.execute(
        "SELECT i.row, kind, text, actor, session, at, created, valid_from, valid_to, expired, "
        "strength, uses, last_use, policy, extractor, data, c.vector IS NULL "
        "FROM items i LEFT JOIN codes c USING(row) WHERE i.row BETWEEN ? AND ? ORDER BY i.row",
        span,
    )
    for *columns, bare in items:
        leaving = [
            [rel, dst - bank.first, weight, created, expired]
            for _, rel, dst, weight, created, expired in links.upto(columns[0])
        ]
        yield _canonical(_as_json(columns, leaving, bare=bool(embedded and bare)))


def _as_json(columns: Sequence[Any], links: list[list[Any]], *, bare: bool) -> dict[str, Any]:
    names = (
        "row", "kind", "text", "actor", "session", "at", "created", "valid_from", "valid_to",
        "expired", "strength", "uses", "last_use", "policy", "extractor", "data",
    )  # fmt: skip
    out = dict(zip(names, columns, strict=True))
    out["id"] = item_id(out["kind"], out.pop("row"))
    for name, usual in {**_DEFAULTS, "last_use": None, "data": None}.items():
        if out[name] == usual:
            del out[name]
    if "data" in out:
        out["data"] = json.loads(out["data"])
    if links:
        out["links"] = links
    if bare:
        out["vector"] = False
    return out


class _Peekable:
    """Rows sorted by their first column, handed out up to a given value of it."""

    def __init__(self, rows: Iterator[tuple[Any, ...]]):
        self._rows = rows
        self._held = next(rows, None)

    def upto(self, last: int) -> Iterator[tuple[Any, ...]]:
        while self._held is not None and self._held[0] <= last:
            row, self._held = self._held, next(self._rows, None)
            if row[0] == last:
                yield row


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


# ---------------------------------------------------------------- in


def import_file(
    memory: Memory,
    path: str | Path,
    format: str = "auto",
    progress: Progress | None = None,
) -> Receipt:
    """Store what a file or folder holds, as one call that `undo` takes back.

    Everything is read and checked before anything is written, line by line where the format has
    lines. What carries no time gets that of the file, so that a second import adds nothing.

    Args:
        memory: where it goes.
        path: an export of memwise (ids and clocks come back exactly in a new bank, with new ids
            in others), `memory.jsonl` of the MCP memory server, a mem0 export, a chat export, or a
            folder of Markdown files.
        format: "auto", or one of "memwise", "mcp", "mem0", "chat", "markdown".
        progress: called with (done, total) entries.

    Raises:
        InvalidKnob: the file is none of these, or something in it is wrong; nothing was stored.
    """
    file = Path(path)
    if format not in ("auto", *FORMATS):
        raise InvalidKnob(f"format={format!r}: use auto, {', '.join(FORMATS)}")
    if not file.exists():
        raise InvalidKnob(f"{file} does not exist")
    form = sniff(file) if format == "auto" else format
    report = progress or (lambda done, total: None)
    if form == "memwise":
        return _Restore(memory, file).run(report)
    return _take(memory, reader(file, form), file, report)


def _take(memory: Memory, entries: Entries, file: Path, progress: Progress) -> Receipt:
    stamp = file.stat().st_mtime_ns // 1000
    drafted = [0, 0]  # entries, and those without text
    for entry, _ in _drafted(entries, stamp):
        drafted[not entry.text.strip()] += 1
    if not drafted[0]:
        raise InvalidKnob(f"{file} holds nothing to remember")
    now = memory.view().now
    receipt = Receipt()
    done = 0
    for part in _batches(_drafted(entries, stamp), _BATCH):
        filled = [(entry, adds) for entry, adds in part if adds]
        adds = [add for _, some in filled for add in some]
        with memory.whole(receipt.operation):
            stored = memory.ingest(adds, now, receipt.operation) if adds else Receipt()
        receipt += stored
        rows = dict(zip(map(id, adds), stored.ids, strict=True))
        if facts := list(_facts(memory, filled, rows)):
            with memory.whole(receipt.operation):
                receipt += memory.carry_out(facts, "import", now, call=receipt.operation)
        done += len(part)
        progress(done, sum(drafted))
    left_out = f"{drafted[1]} entries without text were left out"
    return receipt + Receipt(notes=(left_out,) if drafted[1] else ())


def _drafted(entries: Entries, stamp: Instant) -> Iterator[tuple[Entry, list[Add]]]:
    """Each entry with the sources it becomes: none if it has no text."""
    for i, entry in enumerate(entries()):
        if not entry.text.strip():
            yield entry, []
            continue
        message = {"content": entry.text, "role": entry.role, "at": entry.at}
        try:
            adds = drafts(
                message, at=stamp + i, now=stamp, actor=entry.actor, session=entry.session,
                meta=entry.meta,
            )  # fmt: skip
        except InvalidKnob as error:
            raise InvalidKnob(f"{entry.place}: {error}") from error
        yield entry, [replace(a, kind=entry.kind) for a in adds] if entry.kind else adds


def _facts(
    memory: Memory, filled: Sequence[tuple[Entry, list[Add]]], ids: Mapping[int, str]
) -> Iterator[Op]:
    first = memory.view().bank.first
    for entry, adds in filled:
        if entry.fact:
            subject, relation, object_ = entry.fact
            data = {"subject": subject, "relation": relation, "object": object_}
            source = first + int(ids[id(adds[0])][1:])
            yield Add(
                "fact", entry.text, sources=(source,), actor=subject[:256], at=adds[0].at,
                extractor="import", data={**data, "functional": False}, vector=False,
            )  # fmt: skip


def _batches(values: Iterable[_T], n: int) -> Iterator[list[_T]]:
    iterator = iter(values)
    while part := list(islice(iterator, n)):
        yield part


# ---------------------------------------------------------------- the own format, in


@dataclass(frozen=True)
class _Line:
    """One item of an export: its row is its sequence number there, as are the ends of its links."""

    item: Item
    links: tuple[Link, ...]
    bare: bool


class _Restore:
    """Brings an export into a bank: exactly into a new one, with new numbers into others."""

    def __init__(self, memory: Memory, file: Path):
        self.memory, self.file = memory, file
        view = memory.view()
        self.store, self.bank, self.now = view.store, view.bank, view.now
        self.header = self._header()

    def run(self, progress: Progress) -> Receipt:
        seqs, known = self._examine()
        exact = self.bank.next == 1
        base = 1
        if exact:
            self.store.reserve(self.bank, self.header["next"] - 1)
        elif len(seqs):
            base = self.store.reserve(self.bank, len(seqs))
        ranks = {} if exact else known

        def row(seq: int) -> int | None:
            if exact:
                return self.bank.first + seq
            at = int(np.searchsorted(seqs, seq))
            there = at < len(seqs) and seqs[at] == seq
            return ranks.get(seq, self.bank.first + base + at if there else None)

        receipt = Receipt()
        done = 0
        for part in _batches(self._items(), _BATCH):
            new = [line for line in part if line.item.row not in ranks]
            if new:
                with self.memory.whole(receipt.operation):
                    receipt += self._write(new, row, receipt.operation)
            done += len(part)
            progress(done, len(seqs))
        return receipt + Receipt(notes=self._adopt_policy())

    def _write(
        self, lines: Sequence[_Line], row: Callable[[int], int | None], call: int | None
    ) -> Receipt:
        items, links, vectors = [], [], set()
        for line in lines:
            src = row(line.item.row)
            assert src is not None
            items.append(replace(line.item, row=src))
            if not line.bare:
                vectors.add(src)
            for link in line.links:
                dst = row(link.dst)
                if dst is not None:
                    links.append(replace(link, src=src, dst=dst))
        return self.memory.restore(items, links, vectors, self.now, call)

    def _adopt_policy(self) -> tuple[str, ...]:
        """Record the export's policy if the bank has none; say what the caller should know."""
        name = self.header["policy"]
        if self.bank.policy or not name:
            return ()
        try:
            named_policy(name)
        except (UnknownMethod, InvalidKnob):
            return (f"policy {name!r} of the export is not known here; its items stay unused",)
        self.store.bank(self.bank.name, name)
        if self.memory.policy.name == name:
            return ()
        return (f"the bank's policy is {name} from the next time it is opened",)

    # ------------------------------------------------------------ reading

    def _examine(self) -> tuple[Any, dict[int, int]]:
        """Check all lines; the numbers in the export, and which of its items are here already."""
        seqs: list[int] = []
        known: dict[int, int] = {}
        for part in _batches(self._items(), _BATCH):
            seqs += (line.item.row for line in part)
            if self.bank.next > 1:
                known |= self.store.twins(self.bank, [line.item for line in part])
        found = np.array(seqs, np.int64)
        if (found[1:] <= found[:-1]).any() or (len(found) and found[-1] >= self.header["next"]):
            raise InvalidKnob(f"{self.file}: the ids are not in order; the export was changed")
        if len(found) != self.header["n_items"]:
            raise InvalidKnob(
                f"{self.file} holds {len(found)} of {self.header['n_items']} items; it was cut off"
            )
        return found, known

    def _values(self) -> Iterator[tuple[int, Any]]:
        try:
            with self.file.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise self._wrong(number, f"it is not JSON ({error})") from error
        except UnicodeDecodeError as error:
            raise InvalidKnob(f"{self.file} is not UTF-8; it is damaged") from error

    def _header(self) -> dict[str, Any]:
        header = next(self._values(), (1, None))[1]
        types = {"version": int, "next": int, "n_items": int, "bank": str, "policy": str}
        if (
            not isinstance(header, dict)
            or header.get("format") != "memwise"
            or not all(type(header.get(key)) is wanted for key, wanted in types.items())
        ):
            raise self._wrong(1, "it is not the first line of an export of memwise")
        if header["version"] > VERSION:
            raise InvalidKnob(f"{self.file} was written by a newer memwise; upgrade memwise")
        if not 1 <= header["next"] < 2**36:
            raise self._wrong(1, f"next={header['next']} is out of range")
        return dict(header)

    def _items(self) -> Iterator[_Line]:
        for number, value in islice(self._values(), 1, None):
            try:
                yield _parsed(value)
            except (KeyError, TypeError, ValueError) as error:
                raise self._wrong(number, f"it is not an item ({error})") from error

    def _wrong(self, number: int, why: str) -> InvalidKnob:
        return InvalidKnob(f"{self.file}, line {number}: {why}; nothing was stored")


def _parsed(value: Any) -> _Line:
    """An item line; raises KeyError, TypeError or ValueError where it is wrong."""
    kind, id, text = value["kind"], value["id"], value["text"]
    seq = int(id[1:]) if re.fullmatch(r"[a-z]\d{1,11}", id) else -1
    if kind not in KINDS or item_id(kind, seq) != id or not 0 < seq < 2**36:
        raise ValueError(f"id {id!r} of a {kind!r}")
    words = {name: value.get(name, "") for name in ("actor", "session", "policy", "extractor")}
    if not all(isinstance(w, str) and is_text(w) for w in (text, *words.values())) or not text:
        raise ValueError(f"a text of {id} is wrong")
    item = Item(
        seq, kind, text, words["actor"], words["session"], _clock(value["at"]),
        _clock(value["created"]), _maybe(value, "valid_from"), _maybe(value, "valid_to"),
        _maybe(value, "expired"), float(value.get("strength", 1.0)), _clock(value.get("uses", 0)),
        _clock(value.get("last_use", value["created"])), words["policy"], words["extractor"],
        _mapping(value.get("data", {})),
    )  # fmt: skip
    if (kind in SOURCES) != (not item.policy):
        raise ValueError(f"a {kind} of policy {item.policy!r}")
    links = []
    for rel, dst, weight, created, expired in value.get("links", ()):
        if rel not in RELS:
            raise ValueError(f"link {rel!r}")
        end = None if expired is None else _clock(expired)
        links.append(Link(seq, _clock(dst), rel, float(weight), _clock(created), end))
    return _Line(item, tuple(links), bare=value.get("vector") is False)


def _clock(value: Any) -> int:
    if type(value) is not int or not -_INT64 <= value < _INT64:
        raise ValueError(f"{value!r} is not a 64-bit number")
    return value


def _maybe(value: Mapping[str, Any], name: str) -> int | None:
    return None if value.get(name) is None else _clock(value[name])


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not is_text(json.dumps(value, ensure_ascii=False)):
        raise TypeError("data is not a mapping")
    return value


# ---------------------------------------------------------------- out, for other programs


def export_mcp(memory: Memory) -> Iterator[str]:
    """The bank as `memory.jsonl` of the MCP memory server: entities, observations, relations.

    Who speaks, or whom something is about, becomes an entity; sources become its observations and
    facts relations. What was imported from such a file comes out as it went in.
    """
    entities: dict[str, dict[str, Any]] = {}
    relations: dict[tuple[str, str, str], None] = {}

    def entity(name: str) -> dict[str, Any]:
        blank = {"type": "entity", "name": name, "entityType": "unknown", "observations": []}
        return entities.setdefault(name, blank)

    view = memory.view()
    theirs = set()  # rows that were imported from such a file
    for item in view.scan(*SOURCES):
        data = item.data
        if data.get("mcp"):
            theirs.add(item.row)
        if data.get("mcp") == "entity":
            entity(str(data["name"]))["entityType"] = str(data["entityType"])
        elif data.get("mcp") == "relation":
            relations[str(data["from"]), str(data["relationType"]), str(data["to"])] = None
        else:
            said = entity(item.actor or memory.bank)["observations"]
            if item.text not in said:
                said.append(item.text)
    facts = view.scan("fact")
    own = {link.src for link in view.links(facts, "derived_from") if link.dst not in theirs}
    for fact in facts:
        triple = tuple(str(fact.data.get(key, "")) for key in ("subject", "relation", "object"))
        if fact.row in own and all(triple):
            relations[triple[0], triple[1], triple[2]] = None
    for who, _, whom in relations:
        entity(who)
        entity(whom)
    for record in entities.values():
        yield json.dumps(record, ensure_ascii=False)
    for who, what, whom in relations:
        record = {"type": "relation", "from": who, "to": whom, "relationType": what}
        yield json.dumps(record, ensure_ascii=False)


def export_markdown(memory: Memory, folder: str | Path) -> int:
    """Write the bank as Markdown: a file a session, a section a source; facts in `facts.md`.

    Args:
        memory: what is written.
        folder: made if absent; must be empty, since nothing is overwritten.

    Returns:
        Number of files.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidKnob(f"{target} is not an empty folder; choose another one")
    view = memory.view()
    sessions: dict[str, list[Item]] = {}
    for item in view.scan(*SOURCES):
        sessions.setdefault(item.session, []).append(item)
    files = {"facts": [f"- {fact.text}" for fact in view.scan("fact")]} if view.scan("fact") else {}
    for session, items in sessions.items():
        stem = re.sub(r"[^\w-]+", "-", session).strip("-")[:80] or "memory"
        name = next(n for n in _numbered(stem) if n not in files)
        head = ["---", f"bank: {memory.bank}", f"session: {session}", f"date: {iso(items[0].at)}"]
        files[name] = [*head, "---", *(_markdown_section(item) for item in items)]
    target.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (target / f"{name}.md").write_text("\n".join(lines) + "\n", "utf-8")
    return len(files)


def _markdown_section(item: Item) -> str:
    # A line of the text that looks like a heading must not become one.
    text = re.sub(r"^(?=#{1,6}\s)", "\\\\", item.text, flags=re.MULTILINE)
    return f"\n## {iso(item.at)} {item.actor}".rstrip() + f"\n\n{text}"


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    for n in range(2, 1 << 30):
        yield f"{stem}-{n}"


__all__ = ["FORMATS", "VERSION", "export_bank", "export_markdown", "export_mcp", "import_file"]
