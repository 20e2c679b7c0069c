"""What a memory holds: items with three clocks, the links between them, and the operations on them.

    event time   `at`, `valid_from`, `valid_to`    when it happened, when it was true (half-open)
    store time   `created`, `expired`              when the memory learnt it, when it let it go
    usage time   `strength`, `uses`, `last_use`    read by forgetting alone

A turn, chunk or row is a *source*: it never changes. Everything else is derived, rests on at least
one source through `derived_from` links, and is edited by expiring it and adding another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Instant: TypeAlias = int
"""Microseconds since the Unix epoch, UTC."""

SOURCES = ("turn", "chunk", "row")
KINDS = (
    *SOURCES, "note", "fact", "entity", "thought", "gist", "summary", "block", "case", "feedback",
    "segment", "timeline",
)  # fmt: skip
RELS = (
    "derived_from", "mentions", "same_as", "similar", "next", "cause", "reason", "supersedes",
    "contradicts", "part_of",
)  # fmt: skip
FOREVER: Instant = 2**62
"""Stands for "no end" in arrays; `None` in items."""

_PREFIX = {
    "turn": "t", "chunk": "c", "row": "r", "note": "n", "fact": "f", "entity": "e", "thought": "h",
    "gist": "g", "summary": "s", "block": "b", "case": "a", "feedback": "k", "segment": "m",
    "timeline": "l",
}  # fmt: skip
BANK_BITS = 36
"""A row number is bank << 36 | sequence: rows of one bank lie together, and ids need no index."""


def item_id(kind: str, row: int) -> str:
    """The public id of a row: a letter for the kind and the sequence number in its bank."""
    return f"{_PREFIX[kind]}{row & ((1 << BANK_BITS) - 1)}"


@dataclass(frozen=True, slots=True)
class Item:
    """One remembered thing.

    Attributes:
        row: number in the store; unique over all banks.
        kind: one of `KINDS`.
        text: what it says.
        actor: who said it, or whom it is about; may be empty.
        session: the conversation it belongs to; may be empty.
        at: event time.
        created: when the store learnt it.
        valid_from: start of the time in which it is true; None = unknown.
        valid_to: end of that time (exclusive); None = still true.
        expired: when the store let it go; None = it holds.
        strength: how firmly it is held (MemoryBank's S).
        uses: how often it was recalled.
        last_use: when it was recalled last, or created.
        policy: the policy that derived it; empty for sources.
        extractor: what produced its text ("rules", a model's name...); empty for sources.
        data: the user's `meta` for sources; the policy's fields otherwise.
    """

    row: int
    kind: str
    text: str
    actor: str
    session: str
    at: Instant
    created: Instant
    valid_from: Instant | None = None
    valid_to: Instant | None = None
    expired: Instant | None = None
    strength: float = 1.0
    uses: int = 0
    last_use: Instant = 0
    policy: str = ""
    extractor: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The public id, for example `t12`."""
        return item_id(self.kind, self.row)

    @property
    def is_source(self) -> bool:
        """True for turns, chunks and rows, which never change."""
        return self.kind in SOURCES

    def holds(self, at: Instant | None = None, known_at: Instant | None = None) -> bool:
        """Was it true at event time `at`, as far as the store knew at `known_at`? None = now."""
        if known_at is None:
            known = self.expired is None
        else:
            known = self.created <= known_at and (self.expired is None or known_at < self.expired)
        if at is None or not known:
            return known
        start = self.at if self.valid_from is None and self.is_source else self.valid_from
        return (start is None or start <= at) and (self.valid_to is None or at < self.valid_to)


@dataclass(frozen=True, slots=True)
class Link:
    """A directed, weighted relation between two rows; it expires as items do."""

    src: int
    dst: int
    rel: str
    weight: float
    created: Instant
    expired: Instant | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Add:
    """Store a new item. Other operations of the same list may refer to this object itself.

    Attributes:
        kind: one of `KINDS`.
        text: what it says; not empty.
        sources: what it rests on (items, ids of rows, or other `Add`s); required unless a source.
        links: further (relation, target, weight) links from the new item.
        at: event time; None = the time of the operation.
        vector: embed the text, so that similarity search finds it.
    """

    kind: str
    text: str
    sources: Sequence[Ref] = ()
    links: Sequence[tuple[str, Ref, float]] = ()
    actor: str = ""
    session: str = ""
    at: Instant | None = None
    valid_from: Instant | None = None
    valid_to: Instant | None = None
    strength: float = 1.0
    extractor: str = "rules"
    data: Mapping[str, Any] = field(default_factory=dict)
    vector: bool = True

    @classmethod
    def like(cls, item: Item) -> Add:
        """What an item says, to be said again with other clocks or words (see `Replace`)."""
        return cls(
            item.kind, item.text, actor=item.actor, session=item.session, at=item.at,
            valid_from=item.valid_from, valid_to=item.valid_to, strength=item.strength,
            extractor=item.extractor, data=item.data,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Connect:
    """Link two items (idempotent: the newest weight counts)."""

    src: Ref
    rel: str
    dst: Ref
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Expire:
    """Let a derived item go; it stays visible to queries about earlier knowledge.

    An item that an `Add` before it in the same list says again stays, unless it is that `Add` which
    is let go.
    """

    item: Ref
    why: str = ""


@dataclass(frozen=True, slots=True)
class Replace:
    """Expire `item` and add `new`, which supersedes it and rests on its sources too."""

    item: Ref
    new: Add
    why: str = ""


@dataclass(frozen=True, slots=True)
class Merge:
    """Expire several items and add one that rests on all their sources."""

    items: Sequence[Ref]
    new: Add
    why: str = ""


@dataclass(frozen=True, slots=True)
class Touch:
    """Note that items were recalled: one more use, last used now, strength raised by `gain`."""

    items: Sequence[Ref]
    gain: float = 1.0


@dataclass(frozen=True, slots=True)
class Evict:
    """Forget items under a byte budget: they move to the compressed attic, sources included."""

    items: Sequence[Ref]
    why: str


Ref: TypeAlias = "Item | Add | int"
Op: TypeAlias = Add | Connect | Expire | Replace | Merge | Touch | Evict


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one call did to the store.

    Attributes:
        ids: ids of the sources that the call added, in order (known ones for repeated turns).
        added: number of items added, derived ones included.
        expired: ids let go.
        forgotten: (id, why) of items evicted to keep the byte budget.
        purged: number of attic entries dropped for good to make room.
        notes: facts about how it went that the caller may want (a fallback used, for example).
        operation: number under which `undo` can take the call back; None if nothing changed.
    """

    ids: tuple[str, ...] = ()
    added: int = 0
    expired: tuple[str, ...] = ()
    forgotten: tuple[tuple[str, str], ...] = ()
    purged: int = 0
    notes: tuple[str, ...] = ()
    operation: int | None = None

    def __add__(self, other: Receipt) -> Receipt:
        if other is NOTHING:
            return self
        if self is NOTHING:
            return other
        return Receipt(
            self.ids + other.ids,
            self.added + other.added,
            self.expired + other.expired,
            self.forgotten + other.forgotten,
            self.purged + other.purged,
            self.notes + tuple(n for n in other.notes if n not in self.notes),
            other.operation if self.operation is None else self.operation,
        )


NOTHING = Receipt()
"""The receipt of a call that changed nothing."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result.

    Attributes:
        id: id of the item.
        text: what it says.
        kind: turn, fact, note, ...
        score: higher is better; comparable within one search only.
        at: event time, ISO 8601 in UTC.
        actor: who said it, or whom it is about.
        session: the conversation it belongs to.
        meta: the user's `meta` (sources) or the policy's fields.
        sources: the immutable turns or chunks it rests on (itself, if it is one).
        why: contribution of each part of the score, by name.
        valid_from: start of the time in which it is true, ISO 8601; None = unknown.
        valid_to: end of that time (exclusive); None = still true.
    """

    id: str
    text: str
    kind: str
    score: float
    at: str
    actor: str
    session: str
    meta: Mapping[str, Any]
    sources: tuple[Hit, ...] = ()
    why: Mapping[str, float] = field(default_factory=dict)
    valid_from: str | None = None
    valid_to: str | None = None

    def resting_on(self, sources: tuple[Hit, ...]) -> Hit:
        """The same hit with its sources (written out: `replace` takes five times as long)."""
        return Hit(
            self.id, self.text, self.kind, self.score, self.at, self.actor, self.session,
            self.meta, sources, self.why, self.valid_from, self.valid_to,
        )  # fmt: skip


Form: TypeAlias = Literal["raw", "summary", "gist"]


@dataclass(frozen=True, slots=True)
class Context:
    """Memories packed for a prompt.

    Attributes:
        text: the serialized block, ready to be pasted; empty when nothing was found.
        parts: the hits in it, in the order of the text.
        tokens: tokens of `text`; never more than was asked for.
        forms: for each part, whether it stands there raw or shortened.
    """

    text: str
    parts: tuple[Hit, ...]
    tokens: int
    forms: tuple[Form, ...] = ()
