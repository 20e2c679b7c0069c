"""Streams with exact answers: facts that change in time, and questions that repeat.

- `timezones`: UTC offsets of real zones, told in shuffled order; `zoneinfo` knows every answer
- `zipf_stream`: a conversation told session by session, asked about as memories are, unevenly
"""

from __future__ import annotations

import datetime as dt
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np

from memwise.bench.data import Conversation, Question, Turn
from memwise.errors import InvalidKnob, MissingExtra

Kind: TypeAlias = Literal["value", "belief", "change"]

_CITIES = {
    "Europe": (
        "Lisbon London Paris Berlin Rome Madrid Athens Helsinki Warsaw Vienna Prague "
        "Budapest Sofia Bucharest Moscow Istanbul Stockholm Dublin Brussels Zurich"
    ),
    "America": (
        "New_York Chicago Denver Los_Angeles Anchorage Halifax Toronto Havana Santiago "
        "Sao_Paulo Asuncion Mexico_City"
    ),
    "Asia": "Jerusalem Beirut Amman Damascus Tehran Baku Yerevan",
    "Africa": "Cairo Tunis",
    "Australia": "Sydney Adelaide Hobart",
    "Pacific": "Auckland Easter",
    "Atlantic": "Azores Bermuda",
}
_ZONES = [f"{area}/{city}" for area, names in _CITIES.items() for city in names.split()]
_SECOND = 1_000_000  # instants are microseconds
_DAY_S = 86_400
_BEGIN_S = int(dt.datetime(1970, 1, 1, tzinfo=dt.UTC).timestamp())
_END_S = int(dt.datetime(2024, 1, 1, tzinfo=dt.UTC).timestamp())


@dataclass(frozen=True, slots=True)
class ZoneFact:
    """The UTC offset of a zone from one instant to another.

    Attributes:
        zone: the subject, e.g. "Europe/Lisbon".
        offset: the value, e.g. "+01:00".
        text: one sentence; it says when the value began and not when it ended, as people do.
        valid_from: instant.
        valid_to: instant, exclusive; None = still so at the end of the stream's window.
        stored: instant at which the store is told.
    """

    zone: str
    offset: str
    text: str
    valid_from: int
    valid_to: int | None
    stored: int


@dataclass(frozen=True, slots=True)
class ZoneQuery:
    """A question on the offsets, with the exact answer.

    Attributes:
        kind: `value` = offset at `at`; `belief` = the same as far as it was known at `known`;
            `change` = since when the offset has been what it was at `at`.
        zone: the subject.
        text: the question in words.
        at: instant asked about.
        known: store time of the asking; None = after everything was told.
        answer: offset, or instant in ISO 8601 for `change`; empty = nothing was known.
    """

    kind: Kind
    zone: str
    text: str
    at: int
    known: int | None
    answer: str


def timezones(
    n: int, seed: int, n_queries: int = 300, late_ratio: float = 0.1
) -> tuple[list[ZoneFact], list[ZoneQuery]]:
    """A stream with a perfect oracle: n offset facts of real zones, told in shuffled order.

    Args:
        n: facts; about 4,000 are possible.
        seed: of zones, order and queries.
        n_queries: spread evenly over the three kinds.
        late_ratio: share of the facts that comes a day after all others.

    Returns:
        Facts in the order of telling, one a minute, and queries. `value` answers come from
        `zoneinfo` itself; `belief` answers take the latest start at or before the instant among
        the facts told so far, which is what "holds until something newer is known" means.

    Raises:
        InvalidKnob: more facts are asked for than there are.
        MissingExtra: the system has no tz database.
    """
    rng = np.random.default_rng(seed)
    spans: list[tuple[str, int, int | None]] = []
    for zone in rng.permutation(_ZONES).tolist():
        if len(spans) < n:
            starts = _offset_starts(_zone(zone))
            spans += [(zone, a, b) for a, b in pairwise([*starts, None]) if a is not None]
    if len(spans) < n:
        raise InvalidKnob(f"{n} facts are asked for; the zones have {len(spans)}")
    # Cutting in the middle of a zone leaves its beginning, so the last kept span keeps its end.
    spans = [spans[i] for i in rng.permutation(n)]
    n_late = round(n * late_ratio)
    told = int(dt.datetime(2026, 1, 1, tzinfo=dt.UTC).timestamp()) * _SECOND
    facts = []
    for i, (zone, start_s, end_s) in enumerate(spans):
        wait_s = 60 * i + (_DAY_S if i >= n - n_late else 0)
        facts.append(_zone_fact(zone, start_s, end_s, told + wait_s * _SECOND))
    return facts, _zone_queries(facts, n_queries, rng)


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except ZoneInfoNotFoundError as absent:
        raise MissingExtra(
            f"this system has no time zone {name!r}; run: pip install tzdata"
        ) from absent


def _offset_s(zone: ZoneInfo, at_s: int) -> int:
    offset = dt.datetime.fromtimestamp(at_s, zone).utcoffset()
    return int(offset.total_seconds()) if offset is not None else 0


def _offset_starts(zone: ZoneInfo) -> list[int]:
    """Seconds at which a new offset began, the window's begin first.

    Days are compared and then searched to the second: no offset ever lasted less than a day.
    """
    starts = [_BEGIN_S]
    days = range(_BEGIN_S, _END_S + 1, _DAY_S)
    offsets = [_offset_s(zone, day_s) for day_s in days]
    for day_s, (before, after) in zip(days, pairwise(offsets), strict=False):
        if before != after:
            reached = partial(_reached, zone, after)
            starts.append(day_s + bisect_right(range(day_s, day_s + _DAY_S), 0, key=reached))
    return starts


def _reached(zone: ZoneInfo, offset_s: int, at_s: int) -> int:
    return int(_offset_s(zone, at_s) == offset_s)


def _zone_fact(zone: str, start_s: int, end_s: int | None, stored: int) -> ZoneFact:
    offset = _offset_text(_offset_s(_zone(zone), start_s))
    text = f"Since {_iso(start_s)} the UTC offset of {zone} is {offset}."
    valid_to = None if end_s is None else end_s * _SECOND
    return ZoneFact(zone, offset, text, start_s * _SECOND, valid_to, stored)


def _offset_text(offset_s: int) -> str:
    minutes, seconds = divmod(abs(offset_s), 60)
    tail = f":{seconds:02d}" if seconds else ""
    return f"{'-' if offset_s < 0 else '+'}{minutes // 60:02d}:{minutes % 60:02d}{tail}"


def _iso(at_s: int) -> str:
    return dt.datetime.fromtimestamp(at_s, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _zone_queries(
    facts: Sequence[ZoneFact], n_queries: int, rng: np.random.Generator
) -> list[ZoneQuery]:
    kinds: tuple[Kind, ...] = ("value", "belief", "change")
    changed = [fact for fact in facts if fact.valid_from > _BEGIN_S * _SECOND]
    queries = []
    for i in range(n_queries):
        kind = kinds[i % 3]
        among = changed if kind == "change" else facts
        fact = among[int(rng.integers(len(among)))]
        start_s = fact.valid_from // _SECOND
        end_s = _END_S if fact.valid_to is None else fact.valid_to // _SECOND
        at_s = int(rng.integers(start_s, end_s))
        queries.append(_zone_query(kind, fact, at_s, facts, rng))
    return queries


def _zone_query(
    kind: Kind,
    fact: ZoneFact,
    at_s: int,
    facts: Sequence[ZoneFact],
    rng: np.random.Generator,
) -> ZoneQuery:
    zone, at, day = fact.zone, at_s * _SECOND, _iso(at_s)
    if kind == "value":
        text = f"What was the UTC offset of {zone} at {day}?"
        return ZoneQuery(kind, zone, text, at, None, _offset_text(_offset_s(_zone(zone), at_s)))
    if kind == "change":
        text = f"Since when had the UTC offset of {zone} been what it was at {day}?"
        return ZoneQuery(kind, zone, text, at, None, _iso(fact.valid_from // _SECOND))
    known = facts[int(rng.integers(len(facts)))].stored
    told = (f for f in facts if f.zone == zone and f.stored <= known and f.valid_from <= at)
    newest = max(told, key=lambda f: f.valid_from, default=None)
    asked = f"As far as was known at {_iso(known // _SECOND)}, "
    text = f"{asked}what was the UTC offset of {zone} at {day}?"
    return ZoneQuery(kind, zone, text, at, known, newest.offset if newest else "")


# ---------------------------------------------------------------- questions under a byte budget


@dataclass(frozen=True, slots=True)
class Ask:
    """A question put in the middle of a stream.

    Attributes:
        question: the question.
        again: whether it was asked before.
        session: session after which it is asked.
    """

    question: Question
    again: bool
    session: str


def zipf_stream(
    conversation: Conversation, seed: int, n_asks: int = 25, exponent: float = 1.1
) -> Iterator[Turn | Ask]:
    """Tell a conversation and ask after each session, a few questions far more often than most.

    Each question gets a rank once, and is drawn in proportion to rank ** -exponent among those
    whose evidence has been told. What a budget should keep then depends on what is used.

    Args:
        conversation: questions without evidence and unanswerable ones are left out.
        seed: of ranks and draws.
        n_asks: questions a session.
        exponent: of the Zipf law.
    """
    rng = np.random.default_rng(seed)
    questions = [q for q in conversation.questions if q.gold and not q.unanswerable]
    weight = (1.0 + rng.permutation(len(questions))) ** -exponent
    told: set[str] = set()
    asked: set[int] = set()
    sessions: dict[str, list[Turn]] = {}
    for turn in conversation.turns:
        sessions.setdefault(turn.session, []).append(turn)
    for session, turns in sessions.items():
        yield from turns
        told |= {turn.ref for turn in turns}
        can = np.array([q.gold <= told for q in questions], bool)
        if not can.any():
            continue
        chances = np.where(can, weight, 0.0)
        for i in rng.choice(len(questions), n_asks, p=chances / chances.sum()).tolist():
            yield Ask(questions[i], i in asked, session)
            asked.add(i)
