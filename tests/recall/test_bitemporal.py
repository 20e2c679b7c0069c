"""What was true at a time, as it was known at a time."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from memwise import Memory
from memwise.recall.engine.dates import instant
from memwise.recall.engine.records import Add, Expire

DAYS = [f"2024-01-{d:02d}" for d in range(1, 32)]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    """A memory whose clock is the days of January 2024, a call a day."""
    days = iter(itertools.chain(DAYS, itertools.repeat(DAYS[-1])))
    with Memory(tmp_path / "m.db", embedder="none", clock=lambda: next(days)) as opened:
        yield opened


def _fact(source: int, city: str, start: str | None, stop: str | None) -> Add:
    return Add(
        "fact", f"Ana lives in {city}.", sources=[source], actor="Ana", extractor="test",
        valid_from=None if start is None else instant(start),
        valid_to=None if stop is None else instant(stop),
        data={"subject": "Ana", "relation": "lives in", "object": city, "functional": True},
    )  # fmt: skip


def _cities(memory: Memory, **when: str) -> list[str]:
    return [fact.meta["object"] for fact in memory.facts("Ana", "lives in", **when)]


@pytest.fixture
def moved(memory: Memory) -> Memory:
    """Lisbon from 2020 to 2022, told on 2 January; then Porto, wrongly Faro until the 4th."""
    memory.add("Ana told me where she lived.")
    row = memory.view().bank.first + 1
    on = [instant(day) for day in DAYS]
    memory.carry_out([_fact(row, "Lisbon", "2020-01-01", "2022-01-01")], "x", on[1])
    wrong = _fact(row, "Faro", "2022-01-01", None)
    memory.carry_out([wrong], "x", on[2])
    faro = next(i for i in memory.view().scan("fact") if "Faro" in i.text)
    memory.carry_out([Expire(faro, "wrong"), _fact(row, "Porto", "2022-01-01", None)], "x", on[3])
    return memory


def test_valid_time_and_known_time_are_independent(moved: Memory) -> None:
    assert _cities(moved, at="2021-06-01") == ["Lisbon"]
    assert _cities(moved, at="2023-06-01") == ["Porto"]
    assert _cities(moved, at="2019-06-01") == []
    assert _cities(moved, at="2023-06-01", known_at="2024-01-03") == ["Faro"]
    assert _cities(moved, at="2023-06-01", known_at="2024-01-04") == ["Porto"]
    assert _cities(moved, at="2023-06-01", known_at="2024-01-02") == []
    assert _cities(moved, at="2021-06-01", known_at="2024-01-01") == []


def test_intervals_are_half_open(moved: Memory) -> None:
    assert _cities(moved, at="2022-01-01") == ["Porto"]
    assert _cities(moved, at="2021-12-31T23:59:59.999999Z") == ["Lisbon"]
    assert _cities(moved, at="2020-01-01") == ["Lisbon"]


def test_search_sees_what_was_true_and_known_then(moved: Memory) -> None:
    def found(**when: str) -> set[str]:
        return {h.text for h in moved.search("Ana lives", kinds=["fact"], **when)}

    assert found(at="2023-01-01") == {"Ana lives in Porto."}
    assert found(at="2023-01-01", known_at="2024-01-03T12:00:00Z") == {"Ana lives in Faro."}
    assert found(known_at="2024-01-03T12:00:00Z") == {"Ana lives in Lisbon.", "Ana lives in Faro."}
    assert found() == {"Ana lives in Lisbon.", "Ana lives in Porto."}


def test_late_arrivals_do_not_displace_what_began_later(memory: Memory) -> None:
    memory.add("A source.")
    row = memory.view().bank.first + 1
    told = [("Porto", "2022-01-01"), ("Lisbon", "2020-01-01"), ("Faro", "2021-01-01")]
    for city, start in told:
        memory.carry_out([_fact(row, city, start, None)], "x", memory.view().now)
    assert _cities(memory) == ["Porto"]
    assert _cities(memory, at="2020-06-01") == ["Lisbon"]
    assert _cities(memory, at="2021-06-01") == ["Faro"]


def test_a_fact_that_comes_again_is_kept_for_each_interval(memory: Memory) -> None:
    memory.add("A source.")
    row = memory.view().bank.first + 1
    spans = [("2020-01-01", "2021-01-01"), ("2022-01-01", "2023-01-01")]
    memory.carry_out([_fact(row, "Lisbon", *span) for span in spans], "x", memory.view().now)
    assert _cities(memory, at="2020-06-01") == _cities(memory, at="2022-06-01") == ["Lisbon"]
    assert _cities(memory, at="2021-06-01") == []


def test_turns_are_filtered_by_when_they_were_said_and_learnt(memory: Memory) -> None:
    memory.add("Said long ago, told today.", at="2001-01-01")
    memory.add("Said today.")
    assert len(memory.search("said", until="2002-01-01")) == 1
    assert len(memory.search("said", since="2002-01-01")) == 1
    assert len(memory.search("said", known_at="2024-01-01T12:00:00Z")) == 1
    assert len(memory.search("said")) == 2


def test_what_was_believed_before_an_update_can_still_be_asked(memory: Memory) -> None:
    memory.add("I live in Lisbon.", actor="Ana", at="2023-01-01")
    memory.update("t1", "I live in Porto.")
    events = [event["event"] for event in memory.history("t1")]
    assert sorted(events) == ["let go", "stored", "superseded by"]
    assert [h.text for h in memory.search("live")] == ["I live in Porto."]
    before = memory.search("live", known_at="2024-01-01T12:00:00Z")
    assert [h.text for h in before] == ["I live in Lisbon."]
    objects = [f.meta["object"] for f in memory.facts("Ana", known_at="2024-01-01T12:00:00Z")]
    assert objects == ["Lisbon"]
