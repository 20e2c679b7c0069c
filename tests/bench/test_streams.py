import datetime as dt
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from memwise.bench.data import Conversation, Question, Turn
from memwise.bench.streams import Ask, ZoneFact, ZoneQuery, timezones, zipf_stream
from memwise.errors import InvalidKnob


@pytest.fixture(scope="module")
def stream() -> tuple[list[ZoneFact], list[ZoneQuery]]:
    return timezones(2000, seed=3)


def test_facts_agree_with_zoneinfo_wherever_they_hold(
    stream: tuple[list[ZoneFact], list[ZoneQuery]],
) -> None:
    facts, _ = stream
    assert len(facts) == len({(fact.zone, fact.valid_from) for fact in facts}) == 2000
    for fact in facts[:300]:
        last = fact.valid_to - 1 if fact.valid_to else fact.valid_from
        for at in (fact.valid_from, last):
            when = dt.datetime.fromtimestamp(at // 1_000_000, ZoneInfo(fact.zone))
            assert when.isoformat().endswith(fact.offset)


def test_the_intervals_of_a_zone_follow_each_other_without_gap(
    stream: tuple[list[ZoneFact], list[ZoneQuery]],
) -> None:
    facts, _ = stream
    for zone in {fact.zone for fact in facts}:
        spans = sorted((f.valid_from, f.valid_to, f.offset) for f in facts if f.zone == zone)
        for before, after in pairwise(spans):
            assert before[1] == after[0]
            assert before[2] != after[2]


def test_facts_come_out_of_order_and_some_come_late(
    stream: tuple[list[ZoneFact], list[ZoneQuery]],
) -> None:
    facts, _ = stream
    stored = [fact.stored for fact in facts]
    assert stored == sorted(set(stored))
    steps_back = sum(a.valid_from > b.valid_from for a, b in pairwise(facts))
    assert steps_back > 800
    waits = [b - a for a, b in pairwise(stored)]
    assert waits.index(max(waits)) == 1799


def test_queries_are_answered_by_a_second_reading_of_the_facts(
    stream: tuple[list[ZoneFact], list[ZoneQuery]],
) -> None:
    facts, queries = stream
    assert {query.kind for query in queries} == {"value", "belief", "change"}
    for query in queries:
        told = [f for f in facts if f.zone == query.zone and f.stored <= (query.known or 1 << 62)]
        held = max(
            (f for f in told if f.valid_from <= query.at), key=lambda f: f.valid_from, default=None
        )
        if query.kind == "change":
            assert held is not None
            assert query.answer in held.text
        else:
            assert query.answer == (held.offset if held else "")


def test_what_was_believed_is_not_always_what_was_true(
    stream: tuple[list[ZoneFact], list[ZoneQuery]],
) -> None:
    facts, queries = stream
    truth = {
        (query.zone, query.at): next(
            f.offset
            for f in facts
            if f.zone == query.zone
            and f.valid_from <= query.at < (f.valid_to if f.valid_to else 1 << 62)
        )
        for query in queries
        if query.kind == "belief"
    }
    wrong = [q for q in queries if q.kind == "belief" and q.answer != truth[q.zone, q.at]]
    assert len(wrong) > 10


def test_a_seed_gives_the_stream_again(stream: tuple[list[ZoneFact], list[ZoneQuery]]) -> None:
    assert timezones(50, seed=1, n_queries=9) == timezones(50, seed=1, n_queries=9)
    assert timezones(50, seed=1, n_queries=9) != timezones(50, seed=2, n_queries=9)


def test_more_facts_than_there_are_is_a_clear_error() -> None:
    with pytest.raises(InvalidKnob, match="1000000"):
        timezones(1_000_000, seed=0)


def talk() -> Conversation:
    turns = [Turn(f"t{i}", f"Ana: line {i}", i, "Ana", f"s{i // 5}") for i in range(50)]
    questions = [Question(f"q{i}", frozenset({f"t{i}"}), "x") for i in range(50)]
    extra = Question("trap", frozenset({"t0"}), "x", unanswerable=True)
    return Conversation("talk", turns, [*questions, extra, Question("none", frozenset(), "x")])


def test_only_what_was_told_is_asked() -> None:
    told: set[str] = set()
    seen: set[str] = set()
    n_asks = 0
    for event in zipf_stream(talk(), seed=0):
        if isinstance(event, Ask):
            assert event.question.gold <= told
            assert event.again is (event.question.text in seen)
            seen.add(event.question.text)
            n_asks += 1
        else:
            told.add(event.ref)
    assert n_asks == 25 * 10
    assert not seen & {"trap", "none"}


def test_few_questions_are_asked_most() -> None:
    asks = [event for event in zipf_stream(talk(), seed=0) if isinstance(event, Ask)]
    counts: dict[str, int] = {}
    for ask in asks:
        counts[ask.question.text] = counts.get(ask.question.text, 0) + 1
    top = sorted(counts.values(), reverse=True)[:5]
    assert sum(top) > 0.4 * len(asks)
    assert list(zipf_stream(talk(), seed=0)) == list(zipf_stream(talk(), seed=0))
