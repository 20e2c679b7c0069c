"""Does a memory know what was true when, and what it believed when, whatever the order of telling?

UTC offsets of real zones are told in shuffled order, a tenth of them a day late; `zoneinfo` knows
every answer. Where LoCoMo is at hand, its temporal questions show what dated facts do for a packed
context; these rows are context.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memwise.bench import evidence
from memwise.bench.data import Conversation, Question, locomo
from memwise.bench.engine import Row, paired_interval
from memwise.bench.evidence import Pack, Part
from memwise.bench.streams import ZoneFact, ZoneQuery, timezones
from memwise.catalogue import find, load
from memwise.recall.engine.dates import instant, iso
from memwise.recall.engine.extract import Fact, Given
from memwise.recall.engine.policy import Policy
from memwise.recall.engine.records import FOREVER, Hit, Item
from memwise.recall.memory import Memory

RELATION = "utc offset"
N_FACTS = 2000
N_QUERIES = 900
_MOMENTS = 12  # store times at which beliefs are looked over
_PROBES = 100  # facts that are asked for before they were told
_RAW = "the baseline of this row is raw turns by the engine's own recipe"
_SINCE = re.compile(r"Since (\S+) ")
_FULL_DATE = re.compile(r"(\d{1,2}) (January|February|March|April|May|June|July|August|September|"
                        r"October|November|December),? (\d{4})")  # fmt: skip


@dataclass
class _Clock:
    """A clock that the check sets."""

    now: int = 0

    def __call__(self) -> str:
        return iso(self.now)


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """One row for each kind of question, then the temporal questions of LoCoMo."""
    facts, queries = timezones(N_FACTS, seed, N_QUERIES)
    started = time.perf_counter()
    told = _told(method, facts)
    right = _right(told, queries)
    seconds = time.perf_counter() - started
    rival = _told(load(find(method.name).baseline)(), facts)
    wrong = _right(rival, queries)
    top = _told(load("append_only")(), facts)
    first = np.array([_first(top, query) == query.answer for query in queries], np.float64)
    behaves = _behaviour(method, told, facts, queries)
    bytes_ = told.report().total(), rival.report().total()
    rows = []
    for kind, what in (
        ("value", "value at t"),
        ("belief", "belief at s"),
        ("change", "since when"),
    ):
        mine = np.array([query.kind == kind for query in queries])
        rows.append(
            Row(
                what, float(right[mine].mean()), float(wrong[mine].mean()),
                paired_interval(right[mine], wrong[mine], seed), int(mine.sum()),
                {"append-only top-1": float(first[mine].mean())},
                {
                    f"{what}: every answer is exact": bool(right[mine].all()),
                    f"{what}: the baseline is right at most 60 % of the time": bool(
                        wrong[mine].mean() <= 0.6
                    ),
                },
                bytes=bytes_[0], baseline_bytes=bytes_[1], seconds=seconds,
                data=f"tz database, {N_FACTS} facts, shuffled, 10 % late",
            )
        )  # fmt: skip
    rows[0] = replace(rows[0], behaves={**rows[0].behaves, **behaves})
    with_data = data is not None or os.environ.get("MEMWISE_DATA")
    return [*rows, *(_locomo_rows(method, data, seed) if with_data else ())]


# ---------------------------------------------------------------- the stream


def _told(policy: Policy, facts: Iterable[ZoneFact]) -> Memory:
    """A memory of this policy that was told the facts in this order, each at its own time."""
    order = list(facts)
    given = {
        fact.text: [
            Fact(fact.zone, RELATION, fact.offset, fact.text, 0, fact.valid_from, None, True)
        ]
        for fact in order
    }
    clock = _Clock()
    memory = Memory(":memory:", policy=policy, embedder="none", llm=Given(given), clock=clock)
    for fact in order:
        clock.now = fact.stored
        memory.add(fact.text, meta={"zone": fact.zone})
    return memory


def _right(memory: Memory, queries: Sequence[ZoneQuery]) -> NDArray[np.float64]:
    return np.array([_answer(memory, query) == query.answer for query in queries], np.float64)


def _answer(memory: Memory, query: ZoneQuery) -> str:
    known = None if query.known is None else iso(query.known)
    hits = memory.facts(query.zone, RELATION, at=iso(query.at), known_at=known)
    if len(hits) > 1:
        return "more than one answer"
    return _read(hits, query)


def _first(memory: Memory, query: ZoneQuery) -> str:
    """The answer of the fact that is most like the question."""
    known = None if query.known is None else iso(query.known)
    return _read(memory.search(query.text, k=1, kinds=("fact",), known_at=known), query)


def _read(hits: Sequence[Hit], query: ZoneQuery) -> str:
    if not hits:
        return ""
    if query.kind != "change":
        return str(hits[0].meta["object"])
    said = _SINCE.match(hits[0].text)  # what a reader of a memory without intervals can still see
    return hits[0].valid_from or (said[1] if said else "")


def _behaviour(
    method: Policy, told: Memory, facts: Sequence[ZoneFact], queries: Sequence[ZoneQuery]
) -> dict[str, bool]:
    times = [fact.stored for fact in facts]
    other = _told(
        method, [replace(f, stored=t) for f, t in zip(reversed(facts), times, strict=True)]
    )
    final = [query for query in queries if query.known is None]
    moments = [None, *times[:: max(1, len(times) // _MOMENTS)]]
    early = facts[:: max(1, len(facts) // _PROBES)]
    live = told.view().scan("fact")
    return {
        "the order of telling does not change an answer": all(
            _answer(told, query) == _answer(other, query) for query in final
        ),
        "a fact is not seen before it was told": not any(_seen_early(told, f) for f in early),
        "intervals of one relation never overlap, now or in any belief": not any(
            _overlap(told.view().scan("fact", known_at=moment)) for moment in moments
        ),
        "every fact told is there once, recurring ones too": len(live) == len(facts),
        "every interval is the true one": _intervals(live) == _true_intervals(facts),
    }


def _seen_early(memory: Memory, fact: ZoneFact) -> bool:
    """Is it found as of the moment before it was stored, while it is found afterwards?"""
    when = iso(fact.valid_from)
    before = memory.facts(fact.zone, at=when, known_at=iso(fact.stored - 1))
    after = memory.facts(fact.zone, at=when, known_at=iso(fact.stored))
    return fact.text in {hit.text for hit in before} or fact.text not in {hit.text for hit in after}


def _overlap(facts: Sequence[Item]) -> bool:
    zones: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for fact in facts:
        start = -FOREVER if fact.valid_from is None else fact.valid_from
        zones[fact.actor].append((start, FOREVER if fact.valid_to is None else fact.valid_to))
    return any(a[1] > b[0] for spans in zones.values() for a, b in pairwise(sorted(spans)))


def _intervals(facts: Iterable[Item]) -> set[tuple[str, int | None, int | None]]:
    return {(fact.text, fact.valid_from, fact.valid_to) for fact in facts}


def _true_intervals(facts: Iterable[ZoneFact]) -> set[tuple[str, int | None, int | None]]:
    """What the facts told say together: each value holds until the next one of its zone."""
    zones: dict[str, list[ZoneFact]] = defaultdict(list)
    for fact in facts:
        zones[fact.zone].append(fact)
    return {
        (fact.text, fact.valid_from, after.valid_from if after else None)
        for series in zones.values()
        for fact, after in pairwise([*sorted(series, key=lambda f: f.valid_from), None])
        if fact
    }


# ---------------------------------------------------------------- temporal questions of LoCoMo


def _locomo_rows(method: Policy, data: Path | None, seed: int) -> list[Row]:
    """Dated facts and turns against raw turns at equal tokens; for the reader, not judged."""
    asked = [
        replace(one, questions=[q for q in one.questions if q.category == "temporal"])
        for one in locomo(data)
    ]
    mine, raw = ({one.name: _listener(p, one) for one in asked} for p in (method, None))
    table = evidence.evaluate_packs(lambda one: _packer(mine[one.name]), asked)
    beside = evidence.evaluate_packs(lambda one: _packer(raw[one.name]), asked)
    rows = [
        replace(
            evidence.paired_row(f"pack@{n}", table, beside, seed),
            metric=f"LoCoMo temporal: evidence@{n} tokens", primary=False, data="LoCoMo",
            note=_RAW,
        )
        for n in (250, 500)
    ]  # fmt: skip
    return [*rows, _days_row(asked, mine, raw, seed)]


def _days_row(
    asked: Sequence[Conversation],
    method: Mapping[str, Memory],
    raw: Mapping[str, Memory],
    seed: int,
    tokens: int = 500,
) -> Row:
    """Does the day that a question asks for stand in the context?"""
    pairs = [
        (one.name, question.text, days)
        for one in asked
        for question in one.questions
        if (days := _written(question.answer))
    ]
    mine, beside = (
        np.array(
            [
                any(day in side[name].context(text, tokens).text for day in days)
                for name, text, days in pairs
            ],
            np.float64,
        )
        for side in (method, raw)
    )
    return Row(
        f"LoCoMo temporal: asked day readable@{tokens} tokens", float(mine.mean()),
        float(beside.mean()),
        paired_interval(mine, beside, seed, groups=[name for name, *_ in pairs]), len(pairs),
        primary=False, data="LoCoMo", note=_RAW,
    )  # fmt: skip


def _written(answer: str) -> tuple[str, ...]:
    """The ways to write the one day that an answer names; empty if it names none."""
    found = _FULL_DATE.search(answer)
    if found is None:
        return ()
    day, month, year = found.groups()
    number = int(day)
    plain = f"{number} {month} {year}"
    return (
        iso(instant(plain))[:10], plain, f"{number} {month}, {year}", f"{month} {number}, {year}"
    )  # fmt: skip


def _listener(policy: Policy | None, one: Conversation) -> Memory:
    """A memory that was told the conversation, session by session."""
    memory = Memory(":memory:", policy=policy)
    for _, turns in groupby(one.turns, key=lambda turn: turn.session):
        memory.add(
            [
                {
                    "content": turn.text, "at": iso(turn.at), "actor": turn.actor,
                    "session": turn.session, "meta": {"ref": turn.ref},
                }
                for turn in turns
            ]
        )  # fmt: skip
    return memory


def _packer(memory: Memory) -> Pack:
    def pack(question: Question, tokens: int) -> list[Part]:
        return [
            Part(hit.text, hit.kind, tuple(str(source.meta["ref"]) for source in hit.sources))
            for hit in memory.context(question.text, tokens).parts
        ]

    return pack
