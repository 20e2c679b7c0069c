import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwise import Memory
from memwise.bench.checks import bitemporal
from memwise.bench.streams import timezones
from memwise.recall.engine import bitemporal as table
from memwise.recall.engine.extract import Fact, Given
from memwise.recall.engine.graph import communities, rrf
from memwise.recall.engine.policy import Step
from memwise.recall.engine.records import Add, Op
from memwise.recall.policies.zep import Zep

LIVED = {
    "Ana lives in Oslo.": ("Oslo", 10, None),
    "Ana lives in Lisbon.": ("Lisbon", 20, None),
    "Ana lived in Oslo again.": ("Oslo", 30, None),
}
DAY = 86_400_000_000


def told(order: Sequence[str], facts: dict[str, tuple[str, int | None, int | None]]) -> Memory:
    extraction = {
        text: [
            Fact(
                "Ana",
                "live in",
                city,
                text,
                0,
                *(None if t is None else t * DAY for t in when),
                True,
            )
        ]
        for text, (city, *when) in facts.items()
    }
    days = (f"1970-06-{d:02d}" for d in range(1, 31))
    memory = Memory(
        ":memory:", policy="zep", embedder="none", llm=Given(extraction), clock=lambda: next(days)
    )
    for text in order:
        memory.add(text)
    return memory


def held(memory: Memory) -> set[tuple[str, int | None, int | None]]:
    return {(fact.text, fact.valid_from, fact.valid_to) for fact in memory.view().scan("fact")}


def test_every_order_of_telling_ends_in_the_same_intervals() -> None:
    ends = [held(told(order, LIVED)) for order in itertools.permutations(LIVED)]
    first, second, third = LIVED
    assert ends[0] == {
        (first, 10 * DAY, 20 * DAY), (second, 20 * DAY, 30 * DAY), (third, 30 * DAY, None)
    }  # fmt: skip
    assert all(end == ends[0] for end in ends)


def test_what_was_believed_before_a_correction_can_still_be_seen() -> None:
    memory = told(list(LIVED)[:2], LIVED)
    where = lambda **when: [hit.meta["object"] for hit in memory.facts("Ana", **when)]  # noqa: E731
    assert where(at=iso(25)) == ["Lisbon"]
    assert where(at=iso(25), known_at="1970-06-01") == ["Oslo"]
    assert where(at=iso(25), known_at="1970-05-31") == []


def test_an_ending_without_a_beginning_closes_what_it_ends() -> None:
    facts = {"Ana lives in Oslo.": ("Oslo", 10, None), "Ana left Oslo.": ("Oslo", None, 15)}
    for order in itertools.permutations(facts):
        memory = told(order, facts)
        assert [h.meta["object"] for h in memory.facts("Ana", at=iso(12))] == ["Oslo"]
        assert memory.facts("Ana", at=iso(16)) == []


def test_the_same_fact_told_twice_is_one_fact_with_two_sources() -> None:
    facts = LIVED | {"Ana: I live in Oslo!": ("Oslo", 10, None)}
    memory = told(["Ana lives in Oslo.", "Ana: I live in Oslo!"], facts)
    (hit,) = memory.facts("Ana")
    assert len(hit.sources) == 2


def test_facts_stand_in_a_context_with_their_dates() -> None:
    memory = told(list(LIVED), LIVED)
    text = memory.context("Where does Ana live, in Lisbon?", tokens=200).text
    assert "Ana lives in Lisbon. (1970-01-21..1970-01-31)" in text


claims = st.lists(
    st.tuples(st.sampled_from("xyz"), st.one_of(st.none(), st.integers(0, 9)),
              st.one_of(st.none(), st.integers(1, 12))),
    min_size=1, max_size=6, unique=True,
)  # fmt: skip


@given(claims, st.randoms(use_true_random=False))
@settings(derandomize=True, deadline=None)
def test_spans_never_overlap_and_do_not_depend_on_the_order(
    said: list[tuple[str, int | None, int | None]], random: object
) -> None:
    adds = [
        Add("fact", value, valid_from=start, valid_to=end, at=0,
            data={"subject": "s", "relation": "r", "object": value, "functional": True})
        for value, start, end in said
        if (start is not None or end is not None) and (start is None or end is None or start < end)
    ]  # fmt: skip
    spans = dict(zip(map(id, adds), table.spans(adds), strict=True))
    shuffled = sorted(adds, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert dict(zip(map(id, shuffled), table.spans(shuffled), strict=True)) == spans
    for t in range(-1, 14):
        holding = [
            s for s in spans.values()
            if (s[0] is None or s[0] <= t) and (s[1] is None or t < s[1])
        ]  # fmt: skip
        assert len(holding) <= 1


def test_label_propagation_finds_two_cliques_joined_by_one_edge() -> None:
    cliques = [
        *itertools.combinations(range(4), 2),
        *itertools.combinations(range(4, 8), 2),
        (3, 4),
    ]
    label = communities(cliques)
    assert len({label[n] for n in range(4)}) == 1
    assert len({label[n] for n in range(4, 8)}) == 1
    assert label[0] != label[7]


def test_rrf_prefers_what_two_orders_agree_on() -> None:
    assert rrf([[1, 2, 3], [4, 2, 5]], c=1.0, k=2).rows[0] == 2


# ---------------------------------------------------------------- the check can fail


@dataclass(frozen=True)
class NeverCloses(Zep):
    def on_turns(self, step: Step) -> Sequence[Op]:
        return step.facts(step.turns)


@dataclass(frozen=True)
class ClosesAtTelling(Zep):
    """As last-write-wins with a history: the newest telling closes the older ones."""

    def on_turns(self, step: Step) -> Sequence[Op]:
        return [
            replace(op, valid_from=step.now) if isinstance(op, Add) and op.kind == "fact" else op
            for op in super().on_turns(step)
        ]


@dataclass(frozen=True)
class TrustsTheLatest(Zep):
    """Forgets to close a late arrival at the start of what is known to come after it."""

    def on_turns(self, step: Step) -> Sequence[Op]:
        return [
            replace(op, valid_to=None) if isinstance(op, Add) and op.kind == "fact" else op
            for op in super().on_turns(step)
        ]


def judged(policy: Zep, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], dict[str, bool]]:
    monkeypatch.delenv("MEMWISE_DATA", raising=False)
    monkeypatch.setattr(bitemporal, "N_FACTS", 120)
    monkeypatch.setattr(bitemporal, "N_QUERIES", 90)
    monkeypatch.setattr(type(policy), "name", "zep")
    rows = bitemporal.run(policy, None, 0)
    return [row.value for row in rows], {k: v for row in rows for k, v in row.behaves.items()}


def test_the_check_is_exact_for_zep(monkeypatch: pytest.MonkeyPatch) -> None:
    values, behaves = judged(Zep(), monkeypatch)
    assert values == [1.0, 1.0, 1.0]
    assert all(held for what, held in behaves.items() if "60 %" not in what)


@pytest.mark.parametrize(
    ("broken", "caught"),
    [
        (NeverCloses, "intervals of one relation never overlap, now or in any belief"),
        (TrustsTheLatest, "intervals of one relation never overlap, now or in any belief"),
        (ClosesAtTelling, "value at t: every answer is exact"),
    ],
)
def test_the_check_catches(
    broken: Callable[[], Zep], caught: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not judged(broken(), monkeypatch)[1][caught]


def test_the_stream_answers_come_from_the_tz_database_and_not_from_the_memory() -> None:
    facts, queries = timezones(100, seed=3, n_queries=30)
    latest = {f.zone: f.offset for f in facts}
    naive = np.mean([latest[q.zone] == q.answer for q in queries])
    assert naive < 0.7


def iso(day: int) -> str:
    return f"1970-01-{day + 1:02d}"
