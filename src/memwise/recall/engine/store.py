"""The store: operations on a memory file, each one logged transaction that can be taken back.

A version number per bank lets a writer notice that its snapshot is old.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from memwise.errors import InvalidKnob, StoreError, StoreLocked
from memwise.recall.engine.records import (
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
from memwise.recall.engine.tables import (
    N_COLUMNS,
    TAIL,
    Bank,
    Code,
    Said,
    Tables,
    as_item,
    digest,
    digest_of,
    from_json,
    unpacked,
)

WITH_NEW = (Add, Replace, Merge)
"""Operations that bring a new item."""
_dumps = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


class Conflict(StoreError):
    """The bank changed since the snapshot on which the operations were planned."""


@dataclass(frozen=True, slots=True)
class _Recognized:
    """What a plan found out about its additions; `apply` need not ask again, if nothing changed."""

    bank: Bank
    at: Instant
    codes: Mapping[Add, int]
    held: Mapping[int, int] | None  # None: not looked up


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
    digests: dict[Add, int] = field(default_factory=dict)
    hashes: dict[int, int] = field(default_factory=dict)  # digest -> row of a live item
    again: set[int] = field(default_factory=set)  # rows of live items that were said again
    undo: list[list[Any]] = field(default_factory=list)
    sources: list[tuple[Any, ...]] = field(default_factory=list)  # new ones
    ids: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    forgotten: list[tuple[str, str]] = field(default_factory=list)

    def row(self, ref: Ref) -> int:
        if isinstance(ref, Item):
            return ref.row
        return self.rows[id(ref)] if isinstance(ref, Add) else ref


class SQLite(Tables):
    """A memory file that is read and written.

    Args:
        path: the file.
        durability: see `File`.
    """

    def __init__(self, path: str | Path, durability: Literal["process", "power"] = "process"):
        self._recognized: _Recognized | None = None
        self._doubtful = False  # did a plan take a source for new that was not?
        super().__init__(path, durability)

    def recognize(
        self, bank: Bank, adds: Sequence[Add], at: Instant
    ) -> tuple[Mapping[Add, int], Mapping[int, int]]:
        """Digests of sources that are to be added, and rows of those that are there already.

        A single source is first taken for new without a look; if it is not, `apply` says so by a
        `Conflict`, and the next call looks.
        """
        codes = {add: digest(bank.no, add, "", at) for add in adds}
        looked = self._doubtful or len(adds) > 1
        held = self.known(_said(codes, at)) if looked else {}
        self._recognized = _Recognized(bank, at, codes, held if looked else None)
        return codes, held

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
            if expect == bank.version and self.stands(bank):
                now = bank
            else:
                now = self.refresh(bank)
                if expect is not None:
                    raise Conflict(f"bank {bank.name!r} changed meanwhile")
            change = _Change(now, at, policy, codes, now.next)
            self._recall(change, ops)
            for op in ops:
                self._gather(change, op)
            self._flush(change)
            number = self._log(change, verb, call) if change.undo else call
            if now.no in self._tails and not change.forgotten:
                self._extend_tail(now, change.sources)
        return Receipt(
            tuple(change.ids),
            change.next - now.next,
            tuple(change.expired),
            tuple(change.forgotten),
            operation=number,
        )

    def _recall(self, change: _Change, ops: Sequence[Op]) -> None:
        """Digests of what is to be added, and which of them the bank holds."""
        before, self._recognized = self._recognized, None
        if before is None or (before.bank, before.at) != (change.bank, change.at):
            before = _Recognized(change.bank, change.at, {}, {})
        adds = [op if isinstance(op, Add) else op.new for op in ops if isinstance(op, WITH_NEW)]
        for add in adds:
            code = before.codes.get(add)
            if code is None:
                code = digest(change.bank.no, add, change.policy, change.at)
            change.digests[add] = code
        done = () if before.held is None else before.codes
        new = {add: change.digests[add] for add in adds if add not in done}
        derived = [code for add, code in new.items() if add.kind not in SOURCES]
        change.hashes = self.known(_said(new, change.at), derived)
        self._doubtful = before.held is None and any(
            code in change.hashes for code in before.codes.values()
        )
        if self._doubtful:
            raise Conflict(f"bank {change.bank.name!r} holds what was taken for new")
        change.hashes |= before.held or {}

    def _extend_tail(self, was: Bank, fresh: Sequence[Sequence[Any]]) -> None:
        version, items = self._tails[was.no]
        if version == was.version:
            newest = [*items, *map(as_item, fresh[-TAIL:])][-TAIL:]
            self._tails[was.no] = self._seen[was.no].version, newest

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
        code = change.digests[add]
        row = change.hashes.get(code)
        if row is None:
            row = change.bank.first + change.next
            change.next += 1
            data = _dumps(add.data) if add.data else None
            record = (
                row, add.kind, add.text, add.actor, add.session,
                change.at if add.at is None else add.at, change.at, add.valid_from,
                add.valid_to, None, add.strength, 0, None, "" if source else change.policy,
                "" if source else add.extractor, data, code,
            )  # fmt: skip
            change.items.append(record)
            if source:
                change.sources.append(record)
            known = change.codes.get(id(add))
            if known is not None:
                change.codes_rows.append((row, known.terms, known.vector))
        elif not source:
            change.again.add(row)
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
        for ref in refs:
            row = change.row(ref)
            if row in change.again and not isinstance(ref, Add):
                continue  # it was just said again: an equal successor is no other item
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
            marks = ",".join("?" * N_COLUMNS)
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
        version = bank.version + 1
        self.db.execute(
            "INSERT INTO log(bank, version, at, verb, changes, call) VALUES (?, ?, ?, ?, ?, ?)",
            (bank.no, version, change.at, verb, json.dumps(change.undo), call or 0),
        )
        self._seen[bank.no] = Bank(bank.no, bank.name, bank.policy, version, change.next)
        return call or version

    def reserve(self, bank: Bank, n: int) -> int:
        """Set aside n numbers of a bank, so that no other writer uses them; returns the first."""
        with self.guard(), self.write():
            now = self.refresh(bank)
            self.db.execute("UPDATE banks SET next = next + ? WHERE no = ?", (n, bank.no))
        return now.next

    def twins(self, bank: Bank, items: Sequence[Item]) -> dict[int, int]:
        """For items of an export, row -> row of the same thing in this bank, where it is there."""
        codes = {item.row: digest_of(item, bank.no) for item in items}
        said = [(item.at, codes[item.row]) for item in items if item.is_source]
        derived = [codes[item.row] for item in items if not item.is_source]
        held: dict[tuple[int, Instant | None], int] = {}
        for code, row, expired in self.same(said, derived):
            held[code, expired] = min(row, held.get((code, expired), row))
        return {
            item.row: held[codes[item.row], item.expired]
            for item in items
            if (codes[item.row], item.expired) in held
        }

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
            marks = ",".join("?" * N_COLUMNS)
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
            self.db.executemany(
                "UPDATE log SET undone = 1 WHERE bank = ? AND version = ?",
                [(now.no, number) for number in numbers],
            )
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

    def _undoable(
        self, bank: Bank, operation: int | None
    ) -> tuple[str, list[int], list[list[Any]]]:
        """Verb, versions and changes (in order) of an operation that may be taken back now.

        An operation may lie in several transactions, with those of other writers between them.
        """
        rows = self.db.execute(
            "SELECT version, coalesce(nullif(call, 0), version), verb, changes FROM log "
            "WHERE bank = ? AND undone = 0 AND verb != 'undo' ORDER BY version DESC",
            (bank.no,),
        )
        later: set[int] = set()
        mine: list[tuple[int, str, list[list[Any]]]] = []
        for version, call, verb, text in rows:
            operation = call if operation is None else operation
            if version < operation:
                break
            if call == operation:
                mine.append((version, verb, from_json(text)))
            else:
                later |= _touched(from_json(text))
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
        return verb, [version for version, _, _ in mine], changes

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
        item, links = unpacked(found[0])
        self.db.execute(f"INSERT INTO items VALUES ({','.join('?' * N_COLUMNS)})", item)
        self.db.executemany("INSERT OR REPLACE INTO links VALUES (?,?,?,?,?,?)", links)
        code = codes[row]
        self.db.execute("INSERT INTO codes VALUES (?, ?, ?)", (row, code.terms, code.vector))
        self.db.execute("DELETE FROM attic WHERE row = ?", (row,))

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


def _said(codes: Mapping[Add, int], now: Instant) -> list[Said]:
    """Where the sources among some additions stand in their index."""
    return [
        (now if add.at is None else add.at, code)
        for add, code in codes.items()
        if add.kind in SOURCES
    ]


def _record(item: Item, bank: int) -> tuple[Any, ...]:
    """An item as a row of `items`."""
    data = json.dumps(item.data, sort_keys=True, ensure_ascii=False) if item.data else None
    last_use = None if item.last_use == item.created else item.last_use
    return (
        item.row, item.kind, item.text, item.actor, item.session, item.at, item.created,
        item.valid_from, item.valid_to, item.expired, item.strength, item.uses, last_use,
        item.policy, item.extractor, data, digest_of(item, bank),
    )  # fmt: skip


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
