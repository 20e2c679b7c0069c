"""How fast a memory is: each time beside that of bare FTS5, or of the embedder, in the same run.

Blocks of both are measured in turn and medians compared, so that a busy machine slows both. FTS5 is
what a program without memwise would use: one table, porter stems, WAL, `synchronous=NORMAL`, a
transaction a call, stop words left out of the query. Time inside the embedder is subtracted, except
where it is what is compared with.
"""

from __future__ import annotations

import re
import sqlite3
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memwise.bench.data import books, locomo, memorybank
from memwise.bench.engine import Row
from memwise.recall.engine.embed import Embedder, embedder
from memwise.recall.engine.text import STOP
from memwise.recall.memory import Memory

SIZES = (5_000, 100_000)
"""Notes in the memory when it is searched."""
_BEGAN = 1_767_225_600  # 2026-01-01, seconds since the epoch; notes follow each second
_SESSION = 100  # notes of one session
_DIM = 384

Seconds = NDArray[np.float64]


class Bare:
    """SQLite FTS5 alone.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(
            "CREATE VIRTUAL TABLE notes USING fts5(text, at UNINDEXED, actor UNINDEXED, "
            "session UNINDEXED, tokenize='porter unicode61')"
        )

    def add(self, messages: Sequence[dict[str, Any]]) -> None:
        """Add messages in one transaction."""
        rows = [(m["content"], m["at"], m["actor"], m["session"]) for m in messages]
        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO notes VALUES (?, ?, ?, ?)", rows)
        self._db.execute("COMMIT")

    def search(self, query: str, k: int) -> list[tuple[int, str]]:
        """The k best notes that hold any word of the query that is no stop word."""
        words = re.findall(r"\w+", query.lower())
        asked = [word for word in words if word not in STOP] or words
        match = " OR ".join(f'"{word}"' for word in asked)
        sql = "SELECT rowid, text FROM notes WHERE notes MATCH ? ORDER BY rank LIMIT ?"
        return self._db.execute(sql, (match, k)).fetchall()

    def close(self) -> None:
        """Close the file."""
        self._db.close()


class Clocked:
    """An embedder that sums up the seconds spent in it.

    Args:
        inner: the embedder; None makes unit vectors of hashes, for searches in which meaning does
            not matter.
    """

    def __init__(self, inner: Embedder | None = None) -> None:
        self._inner, self.seconds = inner, 0.0
        self.dim = inner.dim if inner else _DIM
        self.fingerprint = inner.fingerprint if inner else f"hashes/{_DIM}"

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        """Unit vectors (n, dim)."""
        start = time.perf_counter()
        made = self._inner.encode(texts, role) if self._inner else _hashed(texts)
        self.seconds += time.perf_counter() - start
        return made


def _hashed(texts: Sequence[str]) -> NDArray[np.float32]:
    made = np.stack(
        [
            np.random.default_rng(zlib.crc32(text.encode())).standard_normal(_DIM, np.float32)
            for text in texts
        ]
    )
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), np.float32)


def speed(data: Path | None = None, sizes: Sequence[int] = SIZES) -> dict[str, list[Row]]:
    """Adding and searching, each as a ratio of times with the goal it has to keep.

    Args:
        data: folder of the data sets, for more chats and books than those that ship.
        sizes: notes in the memory when it is searched.
    """
    notes = _notes(max([*sizes, 3_000]), data)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = {
            "add with MiniLM, beside the embedder alone": [_embedding(notes[:512], place)],
            "add lists of 100, beside bare FTS5": _lists(notes[:3_000], place),
            "add one by one, beside bare FTS5": [_singles(notes[:1_500], place)],
        }
        for size in sizes:
            rows |= _searches(notes[:size], place / f"{size}")
    return rows


def _notes(n: int, data: Path | None) -> list[dict[str, Any]]:
    """Chat turns, then lines of books, then pairs of lines, as messages of short sessions."""
    talks = memorybank() if data is None else locomo(data)
    chats = [turn.text for one in talks for turn in one.turns]
    lines = [line.strip() for _, text in books(data) for line in text.splitlines()]
    texts = list(dict.fromkeys([*chats, *(line for line in lines if len(line) > 20)]))
    n_lines = len(texts)
    pairs = ((i % n_lines, (7 * i + i // n_lines + 1) % n_lines) for i in range(n - n_lines))
    texts += [f"{texts[a]} {texts[b]}" for a, b in pairs]
    return [
        {
            "role": "user", "content": text, "at": _BEGAN + i, "actor": "note",
            "session": f"s{i // _SESSION}",
        }
        for i, text in enumerate(texts[:n])
    ]  # fmt: skip


def _embedding(notes: Sequence[dict[str, Any]], place: Path) -> Row:
    clocked = Clocked(embedder("minilm"))
    with Memory(place / "embedded.db", embedder=clocked) as memory:
        memory.add(notes[:64])
        total, inside = [], []
        for part in _blocks(notes[64:], 64):
            before = clocked.seconds
            total.append(_timed(memory.add, part))
            inside.append(clocked.seconds - before)
    return _compared(total, inside, 1.3, "lists of 64 turns")


def _lists(notes: Sequence[dict[str, Any]], place: Path) -> list[Row]:
    mine, theirs = _adding(_blocks(notes, 100), place, "lists")
    rate, bare = (100 / float(np.median(seconds)) for seconds in (mine, theirs))
    spread = 100 / np.quantile(mine, (0.975, 0.025)) - bare
    return [
        Row(
            "turns/s", rate, bare, (float(spread[0]), float(spread[1])), len(mine),
            behaves={"at least 5,000 turns a second": rate >= 5_000}, primary=False,
            note="without embeddings; the interval is that of the blocks",
        ),
        _compared(mine, theirs, None, "lists of 100, without embeddings"),
    ]  # fmt: skip


def _singles(notes: Sequence[dict[str, Any]], place: Path) -> Row:
    groups = _blocks(notes, 50)
    mine, theirs = _adding([[[note] for note in group] for group in groups], place, "singles")
    return _compared(mine, theirs, 4.0, "one turn a call and transaction, without embeddings")


def _adding(blocks: Sequence[Any], place: Path, name: str) -> tuple[Seconds, Seconds]:
    """Seconds of each block: a list is one call, a list of lists several."""
    bare = Bare(place / f"{name}-fts5.db")
    with Memory(place / f"{name}.db", embedder="none") as memory:

        def run(add: Callable[[Any], object], block: Any) -> None:
            for call in block if isinstance(block[0], list) else [block]:
                add(call)

        pairs = [(_timed(run, memory.add, block), _timed(run, bare.add, block)) for block in blocks]
    bare.close()
    mine, theirs = np.array(pairs[1:]).T  # the first pays for what is loaded once
    return mine, theirs


def _searches(notes: Sequence[dict[str, Any]], place: Path) -> dict[str, list[Row]]:
    """Searches without the query's embedding, by whole notes and by questions of a user."""
    place.mkdir()
    bare, clocked = Bare(place / "fts5.db"), Clocked()
    asked = {
        "whole notes": [notes[j * 7919 % len(notes)]["content"] for j in range(100)],
        "questions": [q.text for one in memorybank() for q in one.questions][:100],
    }
    rows = {}
    with Memory(place / "notes.db", embedder=clocked) as memory:
        for part in _blocks(notes, 1_000):
            memory.add(part)
            bare.add(part)
        memory.search("read the index")
        for name, queries in asked.items():
            pairs = []
            for query in queries:
                before = clocked.seconds
                mine = _timed(memory.search, query, 10)
                mine -= clocked.seconds - before
                pairs.append((mine, _timed(bare.search, query, 10)))
            key = f"search {len(notes):,} by {name}, beside FTS5 without stop words"
            own, other = np.array(pairs).T
            rows[key] = [_compared(own, other, 1.5, "p50 of the searches")]
    bare.close()
    return rows


def _blocks(notes: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(notes[i : i + size]) for i in range(0, len(notes), size)]


def _timed(call: Callable[..., object], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def _compared(
    mine: Sequence[float] | Seconds, theirs: Sequence[float] | Seconds, most: float | None, of: str
) -> Row:
    """Median time over median time, with the interval of resampled pairs, less 1."""
    pairs = np.array([mine, theirs])  # (2, n)
    n = pairs.shape[1]
    drawn = np.random.default_rng(0).integers(n, size=(1000, n))
    medians = np.median(pairs[:, drawn], axis=2)  # (2, 1000)
    low, high = np.quantile(medians[0] / medians[1] - 1, (0.025, 0.975))
    own, other = np.median(pairs, axis=1)
    ratio = float(own / other)
    return Row(
        "time ratio", ratio, 1.0, (float(low), float(high)), n,
        behaves={} if most is None else {f"at most {most}": ratio <= most}, primary=False,
        seconds=float(pairs[0].sum()),
        note=f"{of}: median {own * 1e3:.2f} ms beside {other * 1e3:.2f} ms",
    )  # fmt: skip
