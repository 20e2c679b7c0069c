"""What search reads: term postings, vectors and one array a field, in RAM, derived from the store.

A bank has two shelves, one for its sources and one for the items its policy derived; each is built
from the `codes` table when it is first needed and follows the log afterwards, so that it sees what
other processes write. Nothing here is truth: drop it and it is built again.

BM25 statistics are those of the bank alone. SQLite's FTS5 would mix the statistics of all banks of
the file and took 16 times as long at 100,000 notes; term numbers of 4 bytes a word are kept beside
the vector instead.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from memwise.codec import np as codec
from memwise.errors import StoreCorrupt
from memwise.recall.engine.records import FOREVER, SOURCES, Instant
from memwise.recall.engine.store import SQLite
from memwise.recall.engine.tables import Bank
from memwise.recall.engine.text import terms

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

Attached = TypeVar("Attached", bound="Counted")

SIGN = codec.codec("sign")
_TAIL = 64  # documents gathered before they become a segment of the postings
_RESCORED = 256  # candidates whose vectors are read again when only sign bits are in RAM


class Counted(Protocol):
    """What may hang on an index: its RAM counts."""

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""


class Column:
    """A growing array: appending costs amortized constant time and an eighth of slack."""

    def __init__(self, dtype: Any, width: int | None = None):
        self._data = np.zeros(16 if width is None else (16, width), dtype)
        self._n = 0

    def extend(self, values: NDArray[Any]) -> None:
        """Append values along the growing axis."""
        n = self._n + len(values)
        if n > len(self._data):
            grown = np.zeros((n + n // 8 + 16, *self._data.shape[1:]), self._data.dtype)
            grown[: self._n] = self._data[: self._n]
            self._data = grown
        self._data[self._n : n] = values
        self._n = n

    def keep(self, mask: Mask) -> None:
        """Drop the entries where `mask` (n,) is False."""
        self._data = self.view[mask]
        self._n = len(self._data)

    @property
    def view(self) -> NDArray[Any]:
        """The values, without the slack behind them."""
        return self._data[: self._n]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, slack included."""
        return self._data.nbytes


class Words(Column):
    """A growing (W, n) array: sign bits in the layout that `codec` scans."""

    def __init__(self, width: int):
        self._data = np.zeros((width, 16), np.uint64)
        self._n = 0

    def extend(self, values: NDArray[Any]) -> None:
        """Append words (W, m)."""
        n = self._n + values.shape[1]
        if n > self._data.shape[1]:
            grown = np.zeros((len(self._data), n + n // 8 + 16), np.uint64)
            grown[:, : self._n] = self._data[:, : self._n]
            self._data = grown
        self._data[:, self._n : n] = values
        self._n = n

    def keep(self, mask: Mask) -> None:
        """Drop the items where `mask` (n,) is False."""
        self._data = np.ascontiguousarray(self.view[:, mask])
        self._n = self._data.shape[1]

    @property
    def view(self) -> NDArray[Any]:
        """The words (W, n), without the slack behind them."""
        return self._data[:, : self._n]


@dataclass(frozen=True, slots=True)
class _Segment:
    """Postings of some documents: for each term its documents and how often it stands in them."""

    terms: NDArray[np.uint32]  # (U,) sorted, distinct
    starts: NDArray[np.int64]  # (U + 1,)
    docs: NDArray[np.int32]  # (P,)
    counts: NDArray[np.uint8]  # (P,) saturating

    @classmethod
    def build(cls, terms: NDArray[np.uint32], docs: NDArray[np.int32]) -> _Segment:
        """From one (term, document) pair for each word."""
        pairs, counts = np.unique(
            terms.astype(np.uint64) << np.uint64(32) | docs.astype(np.uint64), return_counts=True
        )
        of = (pairs >> np.uint64(32)).astype(np.uint32)
        distinct, starts = _runs(of)
        return cls(
            distinct,
            np.append(starts, len(pairs)),
            (pairs & np.uint64(0xFFFFFFFF)).astype(np.int32),
            np.minimum(counts, 255).astype(np.uint8),
        )

    @classmethod
    def merge(cls, parts: Sequence[_Segment]) -> _Segment:
        """One segment of several; documents do not overlap."""
        terms = np.concatenate([np.repeat(s.terms, np.diff(s.starts)) for s in parts])
        docs = np.concatenate([s.docs for s in parts])
        # A stable sort merges runs that are sorted already in linear time.
        keys = terms.astype(np.uint64) << np.uint64(32) | docs.astype(np.uint64)
        order = keys.argsort(kind="stable")
        distinct, starts = _runs(terms[order])
        counts = np.concatenate([s.counts for s in parts])[order]
        return cls(distinct, np.append(starts, len(order)), docs[order], counts)

    def only(self, mask: Mask, number: NDArray[np.int32]) -> _Segment:
        """Without the documents where `mask` is False; the others get new numbers."""
        kept = mask[self.docs]
        terms = np.repeat(self.terms, np.diff(self.starts))[kept]
        distinct, starts = _runs(terms)
        return _Segment(
            distinct, np.append(starts, len(terms)), number[self.docs[kept]], self.counts[kept]
        )

    def find(self, term: int) -> slice:
        i = int(self.terms.searchsorted(np.uint32(term)))  # another type would copy the array
        if i == len(self.terms) or self.terms[i] != term:
            return slice(0, 0)
        return slice(int(self.starts[i]), int(self.starts[i + 1]))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, slack included."""
        return self.terms.nbytes + self.starts.nbytes + self.docs.nbytes + self.counts.nbytes


def _runs(values: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Distinct values of a sorted array, and where each begins."""
    begins = np.ones(len(values), np.bool_)
    begins[1:] = values[1:] != values[:-1]
    starts = np.flatnonzero(begins)
    return values[starts], starts


class Postings:
    """An inverted index in a few sorted segments, merged as they grow (log-structured)."""

    def __init__(self) -> None:
        self.lengths = Column(np.int32)
        self._n_words = 0
        self._segments: list[_Segment] = []
        self._tail: list[tuple[int, NDArray[np.uint32]]] = []
        self._tail_segment: _Segment | None = None

    def extend(self, documents: Iterable[NDArray[np.uint32]]) -> None:
        """Append documents, each as its term numbers in order."""
        first = len(self.lengths.view)
        new = list(documents)
        self.lengths.extend(np.array([len(d) for d in new], np.int32))
        self._n_words += sum(map(len, new))
        self._tail += [(first + i, d) for i, d in enumerate(new)]
        self._tail_segment = self._of(self._tail) if self._tail else None
        if len(self._tail) >= _TAIL and self._tail_segment is not None:
            self._segments.append(self._tail_segment)
            self._tail, self._tail_segment = [], None
            while len(self._segments) > 1 and len(self._segments[-2].docs) < 2 * len(
                self._segments[-1].docs
            ):
                self._segments[-2:] = [_Segment.merge(self._segments[-2:])]

    def keep(self, mask: Mask) -> None:
        """Drop the documents where `mask` (n,) is False; the others move up."""
        number = (np.cumsum(mask) - 1).astype(np.int32)
        self.lengths.keep(mask)
        self._n_words = int(self.lengths.view.sum())
        self._segments = [s for s in (s.only(mask, number) for s in self._segments) if len(s.docs)]
        self._tail = [(int(number[i]), d) for i, d in self._tail if mask[i]]
        self._tail_segment = self._of(self._tail) if self._tail else None

    @property
    def mean_length(self) -> float:
        """Mean number of words of a document; above 0."""
        return max(1e-9, self._n_words / max(1, len(self.lengths.view)))

    @staticmethod
    def _of(documents: Sequence[tuple[int, NDArray[np.uint32]]]) -> _Segment:
        terms = np.concatenate([d for _, d in documents])
        docs = np.repeat(
            np.array([i for i, _ in documents], np.int32), [len(d) for _, d in documents]
        )
        return _Segment.build(terms, docs)

    def _parts(self) -> list[_Segment]:
        return self._segments + ([self._tail_segment] if self._tail_segment is not None else [])

    def find(self, term: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Documents that hold a term, and how often."""
        hits = [(s, s.find(term)) for s in self._parts()]
        found = [(s.docs[at], s.counts[at]) for s, at in hits if at.stop]
        if len(found) == 1:
            return found[0]
        if not found:
            return np.empty(0, np.int32), np.empty(0, np.uint8)
        return np.concatenate([d for d, _ in found]), np.concatenate([c for _, c in found])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, slack included."""
        tail = sum(d.nbytes for _, d in self._tail)
        return self.lengths.nbytes + sum(s.nbytes for s in self._parts()) + tail


class Vectors:
    """Unit vectors of a shelf: exact float32 while few, sign bits with rescoring when many.

    Attributes:
        blank: there was no vector yet: facts of rules have none, and take no room.

    Args:
        dim: width of a vector.
        exact_bytes: RAM up to which exact vectors are kept.
        fetch: local numbers -> their stored vectors (n, dim), zero where there is none.
    """

    def __init__(self, dim: int, exact_bytes: int, fetch: Callable[[Ints], Floats]):
        self.dim, self._exact_bytes, self._fetch = dim, exact_bytes, fetch
        self._exact: Column | None = Column(np.float32, dim)
        self._signs = Words(-(-dim // 64))
        self._present = Column(np.bool_)
        self.blank = True

    def extend(self, vectors: Floats) -> None:
        """Append vectors (n, dim); a zero row stands for "none"."""
        present = np.any(vectors, axis=1, keepdims=False).reshape(-1)
        if self.blank and present.any() and len(self._present.view):
            blank = np.zeros((len(self._present.view), self.dim), np.float32)
            vectors = np.vstack([blank, vectors])
        self._present.extend(present)
        self.blank = self.blank and not present.any()
        if self.blank:
            return
        if self._exact is None:
            self._signs.extend(_signs(vectors))
            return
        self._exact.extend(vectors)
        if self._exact.view.nbytes > self._exact_bytes:
            self._signs.extend(_signs(self._exact.view))
            self._exact = None

    def keep(self, mask: Mask) -> bool:
        """Drop the vectors where `mask` (n,) is False; False if exact ones would fit again."""
        self._present.keep(mask)
        if self.blank:
            return True
        if self._exact is None:
            self._signs.keep(mask)
            return int(mask.sum()) * self.dim * 4 > self._exact_bytes
        self._exact.keep(mask)
        return True

    def scores(self, query: Floats, allowed: Mask | None = None) -> Floats:
        """Cosine of every vector with the query (n,); when coded, exact for the best alone."""
        if self.blank:
            return np.zeros(len(self._present.view), np.float32)
        if self._exact is not None:
            return np.asarray(self._exact.view @ query, np.float32)
        distance = codec.hamming(self._signs.view, SIGN.encode(query).arrays["codes"][0])
        cosines = np.cos(np.pi * np.arange(self.dim + 1) / self.dim).astype(np.float32)
        estimate = cosines[distance]
        estimate[~self._present.view] = 0.0
        ranked = estimate if allowed is None else np.where(allowed, estimate, np.float32(-2))
        n = min(_RESCORED, len(ranked))
        best = np.argpartition(ranked, len(ranked) - n)[-n:]
        estimate[best] = self._fetch(best) @ query
        return estimate

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, slack included."""
        exact = self._exact.nbytes if self._exact is not None else 0
        return exact + self._signs.nbytes + self._present.nbytes


def _signs(vectors: Floats) -> NDArray[np.uint64]:
    return codec.word_major(SIGN.encode(vectors).arrays["codes"])


class Shelf:
    """The sources, or the derived items, of one bank: arrays of equal length, by local number.

    Attributes:
        rows: (n,) row numbers in the store, ascending.
        at, valid_from, valid_to, created, expired: (n,) instants; open ends are +-FOREVER.
        kinds, actors, sessions: (n,) numbers into the names of the same name.
        asks: (n,) True where the text holds a question mark.

    Args:
        vectors: where the vectors of the shelf go.
        threaded: items of one session follow each other, as turns do.
    """

    def __init__(self, vectors: Vectors, *, threaded: bool):
        self.postings, self.vectors, self._threaded = Postings(), vectors, threaded
        self._columns = {
            "rows": Column(np.int64), "at": Column(np.int64), "valid_from": Column(np.int64),
            "valid_to": Column(np.int64), "created": Column(np.int64),
            "expired": Column(np.int64), "kinds": Column(np.int32), "actors": Column(np.int32),
            "sessions": Column(np.int32), "asks": Column(np.bool_),
        }  # fmt: skip
        self.names: dict[str, dict[str, int]] = {"kinds": {}, "actors": {}, "sessions": {}}
        self._actor_terms: set[int] = set()
        self._n_named = 0  # actors whose terms are in it
        self._around: NDArray[np.int32] | None = None
        self._widths: tuple[Floats, float] | None = None
        self._n_expired = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_columns"][name].view
        except KeyError:
            raise AttributeError(name) from None

    def extend(self, records: Sequence[Sequence[Any]], vectors: Floats) -> None:
        """Append records as `SQLite.codes` gives them, in row order."""
        columns = list(zip(*records, strict=True))
        row, kind, session, actor, at, start, end, created, expired = columns[:9]
        terms = columns[10]
        for name, values in (("kinds", kind), ("actors", actor), ("sessions", session)):
            numbers = self.names[name]
            self._columns[name].extend(
                np.array([numbers.setdefault(v, len(numbers)) for v in values], np.int32)
            )
        for name, values, missing in (
            ("rows", row, 0), ("at", at, 0), ("valid_from", start, -FOREVER),
            ("valid_to", end, FOREVER), ("created", created, 0), ("expired", expired, FOREVER),
        ):  # fmt: skip
            self._columns[name].extend(
                np.array([missing if v is None else v for v in values], np.int64)
            )
        self._columns["asks"].extend(np.array(columns[12], np.bool_))
        self.postings.extend(np.frombuffer(t or b"", "<u4") for t in terms)
        self.vectors.extend(vectors)
        self._n_expired += sum(e is not None for e in expired)
        self._around = self._widths = None

    def expire(self, row: int, at: Instant) -> None:
        """Note that an item was let go."""
        i = self.local(row)
        if i is not None:
            self._n_expired += 1
            self.expired[i] = at

    def drop(self, rows: Sequence[int]) -> bool:
        """Take items off the shelf, as if they had never been on it; False = build it anew."""
        gone = self.locals(rows)
        if not len(gone):
            return True
        mask = np.ones(len(self), np.bool_)
        mask[gone] = False
        for column in self._columns.values():
            column.keep(mask)
        self.postings.keep(mask)
        for name, numbers in self.names.items():
            used, column_of = np.unique(self._columns[name].view, return_inverse=True)
            by_number = {number: value for value, number in numbers.items()}
            self.names[name] = {by_number[int(u)]: i for i, u in enumerate(used)}
            self._columns[name].view[:] = column_of
        self._n_expired = int((self.expired != FOREVER).sum())
        self._around = self._widths = None
        self._actor_terms, self._n_named = set(), 0
        return self.vectors.keep(mask)

    def local(self, row: int) -> int | None:
        """Local number of a row, or None if it is not on this shelf."""
        rows = self.rows
        i = int(rows.searchsorted(row))
        return i if i < len(rows) and rows[i] == row else None

    def locals(self, rows: Iterable[int]) -> Ints:
        """Local numbers of rows; those that are not here are left out."""
        wanted = np.fromiter(rows, np.int64)
        if not len(self.rows):
            return np.empty(0, np.int64)
        at = np.minimum(np.searchsorted(self.rows, wanted), len(self.rows) - 1)
        found: Ints = at[self.rows[at] == wanted]
        return found

    def number(self, name: str, value: str) -> int:
        """The number of a kind, actor or session; -1 if nothing here has it."""
        return self.names[name].get(value, -1)

    def actor_terms(self) -> set[int]:
        """Term numbers of the names of all actors."""
        actors = self.names["actors"]
        for actor in islice(actors, self._n_named, None):
            self._actor_terms.update(terms(actor))
        self._n_named = len(actors)
        return self._actor_terms

    def around(self) -> NDArray[np.int32]:
        """(4, n + 1): the items one and two before, one and two after in the session; n = none."""
        if self._around is None:
            n = len(self)
            before = np.full(n + 1, n, np.int32)
            after = before.copy()
            if self._threaded and n:
                order = np.lexsort((self.rows, self.at, self.sessions))
                thread = self.sessions[order]
                joined = (thread[1:] == thread[:-1]) & (thread[1:] != self.number("sessions", ""))
                before[order[1:][joined]] = order[:-1][joined]
                after[order[:-1][joined]] = order[1:][joined]
            self._around = np.stack([before, before[before], after, after[after]])
        return self._around

    def widths(self, shares: Floats) -> tuple[Floats, float]:
        """(n,) words of each item and, by `shares` (4,), of those around it; and their mean."""
        if self._widths is None:
            lengths = np.append(self.postings.lengths.view, 0).astype(np.float32)
            widths = lengths[:-1].copy()
            for share, near in zip(shares, self.around(), strict=True):
                widths += share * lengths[near[:-1]]
            self._widths = widths, max(1e-9, float(widths.mean()))
        return self._widths

    def holding(self, at: Instant | None, known_at: Instant | None) -> Mask | None:
        """Which items hold at these times; None = all of them."""
        if at is None and known_at is None:
            return self.expired == FOREVER if self._n_expired else None
        if known_at is None:
            mask: Mask = self.expired == FOREVER
        else:
            mask = (self.created <= known_at) & (known_at < self.expired)
        if at is not None:
            mask &= (self.valid_from <= at) & (at < self.valid_to)
        return mask

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, slack included."""
        around = 0 if self._around is None else self._around.nbytes
        around += 0 if self._widths is None else self._widths[0].nbytes
        columns = sum(c.nbytes for c in self._columns.values())
        return columns + self.postings.nbytes + self.vectors.nbytes + around


class Index:
    """Both shelves of one bank as one policy sees them.

    Args:
        store: where the codes are read.
        bank: which bank.
        policy: whose derived items are shown.
        dim: width of the vectors; 0 = no embedder.
        decode: stored vector bytes (several rows) -> (n, dim) float32.
        exact_bytes: RAM a shelf may use for exact vectors before it keeps sign bits alone.
    """

    def __init__(
        self,
        store: SQLite,
        bank: Bank,
        policy: str,
        dim: int,
        decode: Callable[[Sequence[bytes | None]], Floats],
        exact_bytes: int = 12 << 20,
    ):
        self._store, self._policy, self.dim = store, policy, dim
        self._decode, self._exact_bytes = decode, exact_bytes
        self._attached: dict[Hashable, Any] = {}
        self._clear(bank)

    def _clear(self, bank: Bank) -> None:
        self._version, self._loaded = -1, bank.first
        self.sources = self._shelf(threaded=True)
        self.derived = self._shelf(threaded=False)
        self._origins: dict[int, tuple[int, ...]] = {}

    def _shelf(self, *, threaded: bool) -> Shelf:
        vectors = Vectors(self.dim, self._exact_bytes, lambda at: self._fetch(shelf, at))
        shelf = Shelf(vectors, threaded=threaded)
        return shelf

    def _fetch(self, shelf: Shelf, at: Ints) -> Floats:
        rows = shelf.rows[at].tolist()
        blobs = self._store.vectors(rows)
        return self._decode([blobs.get(row) for row in rows])

    def vectors(self, rows: Sequence[int]) -> Floats:
        """The stored vectors of rows (n, dim), of either shelf; zero where there is none."""
        blobs = self._store.vectors(rows)
        return self._decode([blobs.get(row) for row in rows])

    def attached(self, key: Hashable, build: Callable[[], Attached]) -> Attached:
        """A further structure over the rows, built once; it follows the index by itself.

        Row numbers never come to mean another item, so nothing in it turns wrong, only stale.
        """
        if key not in self._attached:
            self._attached[key] = build()
        found: Attached = self._attached[key]
        return found

    def refresh(self, bank: Bank) -> None:
        """Follow the log to the bank's version; build anew where rows vanished or came back."""
        if bank.version == self._version:
            return
        changes = self._store.changes(bank, self._version) if self._version >= 0 else None
        if changes is None or any(c[0] == "u" for c in changes) or not self._drop(changes):
            self._clear(bank)
        self._load(bank)
        for change in changes or ():
            if change[0] == "x":
                self.sources.expire(change[1], change[2])
                self.derived.expire(change[1], change[2])
            elif change[0] == "l":
                self._origins.pop(change[1], None)
        self._version = bank.version

    def _drop(self, changes: Sequence[Sequence[Any]]) -> bool:
        """Follow what was forgotten or deleted."""
        gone = [row for change in changes if change[0] in "ed" for row in change[1]]
        if not gone:
            return True
        self._origins.clear()
        return self.sources.drop(gone) and self.derived.drop(gone)

    def _load(self, bank: Bank) -> None:
        records = self._store.codes(self._loaded, bank.last)
        while part := list(records.fetchmany(4096)):
            self._loaded = part[-1][0] + 1
            for shelf, mine in (
                (self.sources, [r for r in part if r[1] in SOURCES]),
                (self.derived, [r for r in part if r[1] not in SOURCES and r[9] == self._policy]),
            ):
                if mine:
                    try:
                        shelf.extend(mine, self._decode([r[11] for r in mine]))
                    except (TypeError, ValueError) as error:
                        raise StoreCorrupt(
                            f"{self._store.path}: the codes of some records make no sense "
                            f"({error}); run `memwise doctor {self._store.path}`"
                        ) from error

    def origins(self, rows: Iterable[int]) -> dict[int, tuple[int, ...]]:
        """For each derived row the rows of the sources it rests on, directly or through others."""
        wanted = list(rows)
        missing = [r for r in wanted if r not in self._origins]
        direct: dict[int, list[int]] = {}
        front = missing
        while front:
            direct |= {r: [] for r in front}
            for link in self._store.links(front, ["derived_from"]):
                direct.setdefault(link.src, []).append(link.dst)
            front = [
                *{dst for r in front for dst in direct[r] if self.sources.local(dst) is None}
                - direct.keys()
            ]
        for row in missing:
            self._origins[row] = self._reached(row, direct)
        return {row: self._origins[row] for row in wanted}

    def _reached(self, row: int, direct: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
        """Sources that are reached from a row, nearest path first."""
        found: dict[int, None] = {}
        seen, stack = {row}, [row]
        while stack:
            for dst in direct[stack.pop()]:
                if self.sources.local(dst) is not None:
                    found[dst] = None
                elif dst not in seen:
                    seen.add(dst)
                    stack.append(dst)
        return tuple(found)

    @property
    def n_items(self) -> int:
        """Items on both shelves."""
        return len(self.sources) + len(self.derived)

    @property
    def nbytes(self) -> int:
        """RAM that the index holds, from its arrays."""
        origins = 64 * len(self._origins)
        attached = sum(one.nbytes for one in self._attached.values())
        return int(self.sources.nbytes + self.derived.nbytes + origins + attached)
