"""The room `recall` side by side: the default memory beside reference rankings of the same turns.

Each conversation is a bank of its own. Rankings count distinct turns among the first ten hits'
sources; a pack counts the evidence that can be read within 500 tokens (`bench/evidence.py`).
Intervals are against the ranking `speaker`, the strongest that needs no memory. Vectors are made
once for all, so the seconds are those of adding, searching and packing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memwise.bench.data import Conversation, hotpot, locomo, longmemeval, memorybank
from memwise.bench.engine import Row
from memwise.bench.evidence import (
    Pack,
    Part,
    Search,
    Table,
    evaluate,
    evaluate_packs,
    means,
    paired_row,
)
from memwise.bench.floors import floor
from memwise.bench.frozen import Frozen, found_refs, tell
from memwise.bench.memo import Memo
from memwise.bench.speed import speed
from memwise.recall.engine.extract import Extractor
from memwise.recall.memory import Memory

FLOORS = ("random", "most_recent", "bm25", "cosine", "rrf60", "rrf1", "z", "speaker", "oracle")
BASELINE = "speaker"
SEED = 0
_NOW = "2026-01-01"  # a run must not depend on the day it is made


@dataclass(frozen=True)
class Found:
    """What one subject reached on one set of conversations.

    Attributes:
        ranked: table of `evaluate`.
        packed: table of `evaluate_packs`.
        bytes: of the file, closed; 0 for what stores nothing.
        seconds: for adding, searching and packing.
    """

    ranked: Table
    packed: Table
    bytes: int
    seconds: float

    def table(self, metric: str) -> Table:
        """The table that has the metric."""
        return self.packed if metric.startswith("pack") else self.ranked


Subject = Callable[[Sequence[Conversation]], Found]


def run(data: Path | None) -> dict[str, list[Row]]:
    """Everything: recall of evidence on all sets, and speed.

    Args:
        data: folder of the data sets; without it only the shipped MemoryBank chats are asked.
    """
    sets: dict[str, Sequence[Conversation]] = {"MemoryBank": memorybank()}
    if data is not None:
        sets = {
            "LoCoMo dev": locomo(data),
            "LongMemEval": [longmemeval(data)],
            "HotpotQA": [hotpot(data).pooled],
        } | sets
    main = next(iter(sets))
    memo = Memo("minilm")
    rows: dict[str, list[Row]] = {}
    for name, conversations in sets.items():
        _warm(memo, conversations)
        subjects = _subjects(memo, conversations)
        baseline = subjects[BASELINE](conversations)
        for subject, measure in subjects.items():
            found = baseline if subject == BASELINE else measure(conversations)
            new = _whole(found, baseline) if name == main else _beside(name, found, baseline)
            rows.setdefault(subject, []).extend(replace(row, data=name) for row in new)
    for name, measured in speed(data).items():
        rows[name] = [replace(row, data="Speed, as a ratio of times") for row in measured]
    return rows


def _warm(memo: Memo, conversations: Sequence[Conversation]) -> None:
    memo.encode([turn.text for one in conversations for turn in one.turns])
    memo.encode([question.text for one in conversations for question in one.questions])


def _subjects(memo: Memo, conversations: Sequence[Conversation]) -> dict[str, Subject]:
    subjects = {name: _ranking(name, memo) for name in FLOORS}
    subjects |= {
        "plain, no vectors": _memory(Memo("none")),
        "plain, n-grams": _memory(Memo("ngrams")),
        "plain": _memory(memo),
    }
    if any(one.observations for one in conversations):
        subjects["plain, given facts"] = _memory(memo, Frozen(conversations))
    return subjects


def _ranking(recipe: str, memo: Memo) -> Subject:
    """A reference ranking; its pack is as much of the ranking as fits."""

    def measure(conversations: Sequence[Conversation]) -> Found:
        start = time.perf_counter()
        build = floor(recipe, memo.encode, SEED)

        def packer(one: Conversation) -> Pack:
            search, texts = build(one), {turn.ref: turn.text for turn in one.turns}
            return lambda question, tokens: [
                Part(texts[ref], "turn", (ref,)) for ref in search(question)
            ]

        ranked, packed = evaluate(build, conversations), evaluate_packs(packer, conversations)
        return Found(ranked, packed, 0, time.perf_counter() - start)

    return measure


def _memory(memo: Memo, extractor: Extractor | None = None) -> Subject:
    """The default policy in one file, told everything before it is asked."""

    def measure(conversations: Sequence[Conversation]) -> Found:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "memory.db"
            start = time.perf_counter()
            for one in conversations:
                with _opened(path, one, memo, extractor) as memory:
                    tell(memory, one.turns)
            size = path.stat().st_size
            memories = {one.name: _opened(path, one, memo, extractor) for one in conversations}
            ranked = evaluate(lambda one: _search(memories[one.name]), conversations)
            packed = evaluate_packs(lambda one: _pack(memories[one.name]), conversations)
            for memory in memories.values():
                memory.close()
            return Found(ranked, packed, size, time.perf_counter() - start)

    return measure


def _opened(path: Path, one: Conversation, memo: Memo, extractor: Extractor | None) -> Memory:
    return Memory(
        path, bank=one.name, policy="plain", embedder=memo, llm=extractor, clock=lambda: _NOW
    )


def _search(memory: Memory) -> Search:
    return lambda question: found_refs(memory, question)


def _pack(memory: Memory) -> Pack:
    return lambda question, tokens: [
        Part(part.text, part.kind, tuple(source.meta["ref"] for source in part.sources))
        for part in memory.context(question.text, tokens).parts
    ]


def _whole(found: Found, baseline: Found) -> list[Row]:
    """All rows of the main set: tuned, untouched and audited questions apart."""
    table = found.ranked
    groups = {
        "": np.ones(len(table), bool),
        " tuned": table["tuned"],
        " untouched": ~table["tuned"],
        " audited": ~table["audited_wrong"],
    }
    rows = [
        _row(metric, found, baseline, label, where)
        for metric in ("R@10", "pack@500")
        for label, where in groups.items()
        if not label or 0 < where.sum() < len(where)
    ]
    multi_hop = table["category"] == "multi-hop"
    if multi_hop.any():
        rows.append(_row("all@10", found, baseline, " multi-hop", multi_hop))
    return rows


def _beside(name: str, found: Found, baseline: Found) -> list[Row]:
    everything = np.ones(len(found.ranked), bool)
    rows = [_row(metric, found, baseline, "", everything) for metric in ("R@10", "pack@500")]
    return [replace(row, metric=f"{name} {row.metric}", primary=False) for row in rows]


def _row(metric: str, found: Found, baseline: Found, label: str, where: NDArray[np.bool_]) -> Row:
    table = found.table(metric)
    row = paired_row(metric, table, baseline.table(metric), SEED, where)
    return replace(
        row, metric=metric + label, primary=metric + label == "R@10", bytes=found.bytes,
        seconds=found.seconds, note=_by_category(means(table[where]), metric),
    )  # fmt: skip


def _by_category(table: Mapping[str, Mapping[str, float]], metric: str) -> str:
    apart = {"all", "tuned", "untouched"}
    return ", ".join(f"{k} {v[metric]:.3f}" for k, v in table.items() if k not in apart)
