"""What operations and hooks may rely on, beyond the contracts that every policy keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from memwise.errors import InvalidKnob
from memwise.recall.engine.plain import Plain
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.records import Add, Expire, Item, Op
from memwise.recall.engine.text import phrased
from memwise.recall.memory import Memory


@dataclass(frozen=True)
class Diary(Policy):
    """Notes down, for each hook, which turns it was told of and which it could read."""

    told: list[list[str]] = field(default_factory=list)
    ended: list[list[str]] = field(default_factory=list)
    seen: list[list[str]] = field(default_factory=list)

    def on_turns(self, step: Step) -> Sequence[Op]:
        self.told.append([turn.text for turn in step.turns])
        self.seen.append([turn.text for turn in step.recent(10)])
        return ()

    def on_session_end(self, step: Step) -> Sequence[Op]:
        self.ended.append([turn.text for turn in step.turns])
        return [Add("summary", " / ".join(self.ended[-1]), sources=step.turns)]


def opened(policy: Policy) -> Memory:
    return Memory(":memory:", policy=policy, embedder="none", clock=lambda: "2026-01-01")


def fact(memory: Memory, text: str) -> Item:
    return next(item for item in memory.view().scan("fact") if item.text == text)


def test_a_session_that_was_reflected_on_does_not_end_again() -> None:
    diary = Diary()
    memory = opened(diary)
    memory.add("one", session="a")
    memory.reflect()
    memory.reflect()
    memory.add("two", session="b")
    assert diary.ended == [["one"]]


def test_a_session_that_went_on_ends_with_what_came_since() -> None:
    diary = Diary()
    memory = opened(diary)
    memory.add("one", session="a")
    memory.reflect()
    memory.add("two", session="a")
    memory.add("three", session="b")
    assert diary.ended == [["one"], ["two"]]


def test_an_undone_end_of_a_session_comes_again() -> None:
    diary = Diary()
    memory = opened(diary)
    memory.add("one", session="a")
    memory.undo(memory.reflect().operation)
    memory.reflect()
    assert diary.ended == [["one"], ["one"]]


def test_a_rebuild_reads_no_turn_that_was_still_to_come() -> None:
    diary = Diary()
    memory = opened(diary)
    for session in "abc":
        memory.add(f"said in {session}", session=session)
    live = [*diary.seen]
    memory.rebuild()
    assert diary.seen == live + live


def test_an_item_that_is_said_again_survives_its_own_expiry() -> None:
    memory = opened(Plain())
    memory.add("I live in Lisbon.", actor="Ana")
    old = fact(memory, "Ana lives in Lisbon.")
    same = Add.like(old)
    memory.act(lambda step: [Add(**_fields(same), sources=step.told()), Expire(old)])
    assert [item.text for item in memory.view().scan("fact")] == ["Ana lives in Lisbon."]


def test_an_item_that_is_said_again_goes_if_that_very_addition_is_let_go() -> None:
    memory = opened(Plain())
    memory.add("I live in Lisbon.", actor="Ana")
    same = Add.like(fact(memory, "Ana lives in Lisbon."))

    def plan(step: Step) -> list[Op]:
        again = Add(**_fields(same), sources=step.told())
        return [again, Expire(again)]

    memory.act(plan)
    assert memory.view().scan("fact") == []


def _fields(add: Add) -> dict[str, object]:
    return {name: getattr(add, name) for name in Add.__slots__ if name != "sources"}


def test_a_turn_that_is_there_already_keeps_its_id_and_derives_nothing_again() -> None:
    diary = Diary()
    memory = opened(diary)
    first = memory.add("I live in Lisbon.", actor="Ana", at="2026-02-01")
    memory.add("Something else.", actor="Ana", at="2026-02-02")
    again = memory.add("I live in Lisbon.", actor="Ana", at="2026-02-01")
    assert (again.ids, again.added) == (first.ids, 0)
    assert memory.stats() == {"turn": 2}
    assert memory.add("A third.", actor="Ana", at="2026-02-03").added == 1


def test_two_memories_of_one_file_see_each_others_turns_as_context(tmp_path) -> None:
    diary, other = Diary(), Diary()
    path = tmp_path / "notes.db"
    with (
        Memory(path, policy=diary, embedder="none") as one,
        Memory(path, policy=other, embedder="none") as two,
    ):
        one.add("first", session="s")
        two.add("second", session="s")
        one.add("third", session="s")
        turn = one.view().told()[-1]
        before = one.view().store.before(one.view().bank, turn.row, "s", 4)
        assert [item.text for item in before] == ["first", "second"]
        later = one.view().store.before(one.view().bank, turn.row + 1, "s", 4)
        assert [item.text for item in later] == ["first", "second", "third"]


def test_the_turns_before_are_right_after_an_update_an_undo_and_a_delete() -> None:
    memory = opened(Plain())
    ids = [memory.add(f"turn {i}", session="s").ids[0] for i in range(6)]
    store = memory.view().store

    def last() -> list[str]:
        bank = memory.view().bank
        return [item.text for item in store.before(bank, bank.last, "s", 4)]

    assert last() == ["turn 2", "turn 3", "turn 4", "turn 5"]
    memory.delete(ids[4])
    assert last() == ["turn 1", "turn 2", "turn 3", "turn 5"]
    memory.add("turn 6", session="s")
    assert last() == ["turn 2", "turn 3", "turn 5", "turn 6"]
    memory.undo()
    assert last() == ["turn 1", "turn 2", "turn 3", "turn 5"]


def test_a_failed_call_leaves_no_trace_in_what_is_kept_at_hand() -> None:
    memory = opened(Plain())
    memory.add("one", session="s")
    with pytest.raises(InvalidKnob, match="must rest on a source"):
        memory.act(lambda step: [Add("turn", "half", session="s"), Add("fact", "of nothing")])
    bank = memory.view().bank
    found = memory.view().store.before(bank, bank.last, "s", 4)
    assert [item.text for item in found] == ["one"]


@pytest.mark.parametrize(
    ("kind", "actor", "text", "expected"),
    [
        ("turn", "Ana", "Ana and I went out.", "Ana: Ana and I went out."),
        ("fact", "Ana", "Ana lives in Lisbon.", "Ana lives in Lisbon."),
        ("fact", "Ana", "Anabel is a cat.", "Ana: Anabel is a cat."),
        ("summary", "Ana", "likes tea", "Ana: likes tea"),
    ],
)
def test_a_derived_text_that_names_its_actor_is_not_given_the_name_twice(
    kind: str, actor: str, text: str, expected: str
) -> None:
    assert phrased(kind, actor, text) == expected
