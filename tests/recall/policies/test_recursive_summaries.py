"""One text of bounded length: what enters, what makes room, and what it may depend on."""

import pytest

from memwise.errors import InvalidKnob
from memwise.recall.engine.text import n_tokens
from memwise.recall.memory import Memory
from memwise.recall.policies.recursive_summaries import RecursiveSummaries

SESSIONS = (
    ("I live in Porto.", "I adopted a parrot called Kiwi.", "I work at a bakery."),
    ("I play the cello on Sundays.", "My sister Rosa studies law in Ghent."),
    ("I moved to Lisbon.", "I live in Lisbon now.", "I climbed Mount Etna in 2019."),
)


def told(policy: RecursiveSummaries, sessions: int = 3) -> Memory:
    clock = iter(f"2026-{month:02d}-01" for month in range(1, 13) for _ in range(50))
    memory = Memory(":memory:", policy=policy, embedder="none", clock=lambda: next(clock))
    for n, texts in enumerate(SESSIONS[:sessions]):
        memory.add([{"content": text, "actor": "Ana"} for text in texts], session=f"s{n}")
    memory.reflect()
    return memory


def summary(memory: Memory) -> str:
    items = memory.view().scan("summary")
    assert len(items) == 1
    return items[0].text


def test_there_is_one_text_and_it_supersedes_the_one_before() -> None:
    memory = told(RecursiveSummaries())
    (item,) = memory.view().scan("summary")
    assert any(event["event"] == "supersedes" for event in memory.history(item.id))
    assert len(memory.get(item.id).sources) == 8


def test_what_an_earlier_session_told_is_still_there() -> None:
    assert "Kiwi" in summary(told(RecursiveSummaries()))


def test_a_newer_value_takes_the_place_of_the_older_one() -> None:
    assert "Porto" in summary(told(RecursiveSummaries(), sessions=1))
    text = summary(told(RecursiveSummaries()))
    assert "live in Lisbon" in text.replace("lives", "live")
    assert "Porto" not in text


@pytest.mark.parametrize("tokens", [16, 24, 40])
def test_the_text_is_never_longer_than_allowed(tokens: int) -> None:
    text = summary(told(RecursiveSummaries(summary_tokens=tokens)))
    assert 0 < n_tokens(text) <= tokens


def test_ending_a_session_twice_changes_nothing() -> None:
    memory = told(RecursiveSummaries())
    before = memory.view().scan("summary")
    memory.reflect()
    assert memory.view().scan("summary") == before


def test_a_context_begins_with_the_text_and_keeps_its_tokens() -> None:
    memory = told(RecursiveSummaries())
    packed = memory.context("Where does Ana live?", tokens=80)
    assert "summary" in packed.forms
    assert packed.tokens <= 80


def test_a_length_that_holds_nothing_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="summary_tokens=3"):
        RecursiveSummaries(summary_tokens=3)
