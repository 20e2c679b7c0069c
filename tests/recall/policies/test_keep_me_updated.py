from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from memwise import Memory
from memwise.bench.checks import memory_state
from memwise.recall.engine.extract import Given
from memwise.recall.engine.policy import Step
from memwise.recall.engine.records import Add, Expire, Op, Replace
from memwise.recall.policies import keep_me_updated
from memwise.recall.policies.keep_me_updated import KeepMeUpdated


def after(*sessions: Sequence[str]) -> list[str]:
    given = Given({text: [text] for lines in sessions for text in lines})
    memory = Memory(
        ":memory:", policy=KeepMeUpdated(), embedder="none", llm=given, clock=lambda: "2026-01-01"
    )
    for n, lines in enumerate(sessions):
        memory.add(list(lines), actor="user", session=str(n))
    memory.reflect()
    return [item.text for item in memory.view().scan("note")]


@pytest.mark.parametrize(
    ("held", "said", "left"),
    [
        ("I work at Acme.", "I am employed at Acme.", ["I work at Acme."]),
        ("I live in Rome.", "I moved to Oslo.", ["I moved to Oslo."]),
        ("I play chess every week.", "I play golf every week.",
         ["I play chess every week.", "I play golf every week."]),
        ("I play chess every week.", "I stopped playing chess.", []),
    ],
    ids=["pass", "replace", "append", "delete"],
)  # fmt: skip
def test_the_four_operations(held: str, said: str, left: list[str]) -> None:
    assert after([held], [said]) == left


def test_a_session_that_ends_twice_is_read_once() -> None:
    lines = ["I have a dog named Rex."], ["My dog Rex passed away."]
    given = Given({text: [text] for (text,) in lines})
    memory = Memory(
        ":memory:", policy=KeepMeUpdated(), embedder="none", llm=given, clock=lambda: "2026-01-01"
    )
    for n, (text,) in enumerate(lines):
        memory.add(text, actor="user", session=str(n))
        memory.reflect()
        memory.reflect()
    memory.add("I speak Welsh.", actor="user", session="2")
    assert memory.view().scan("note") == []


def test_one_speaker_does_not_change_what_another_said() -> None:
    given = Given(
        {text: [text] for text in ("I play chess every week.", "I stopped playing chess.")}
    )
    memory = Memory(
        ":memory:", policy=KeepMeUpdated(), embedder="none", llm=given, clock=lambda: "2026-01-01"
    )
    memory.add("I play chess every week.", actor="ana", session="1")
    memory.add("I stopped playing chess.", actor="tom", session="2")
    memory.reflect()
    assert {item.actor for item in memory.view().scan("note")} == {"ana", "tom"}


def test_the_shipped_weights_are_those_that_the_training_pairs_give() -> None:
    fitted = memory_state.fit(memory_state.training_pairs())
    np.testing.assert_allclose(fitted, keep_me_updated._WEIGHTS, atol=0.11)


def test_held_out_relations_share_no_form_of_words_with_the_trained_ones() -> None:
    seen, held = (
        {
            form
            for one in table.values()
            for form in (one.state, one.again, one.change, one.end)
            if form
        }
        for table in (memory_state.SEEN, memory_state.HELD_OUT)
    )
    assert not seen & held


# ---------------------------------------------------------------- the check can fail


@dataclass(frozen=True)
class KeepsTheEnding(KeepMeUpdated):
    """Writes "my dog passed away" down instead of letting both go."""

    def on_session_end(self, step: Step) -> Sequence[Op]:
        ops = super().on_session_end(step)
        added = {id(op) for op in ops if isinstance(op, Add)}
        return [op for op in ops if not (isinstance(op, Expire) and id(op.item) in added)]


@dataclass(frozen=True)
class OnlyAppends(KeepMeUpdated):
    def on_session_end(self, step: Step) -> Sequence[Op]:
        ops = super().on_session_end(step)
        return [
            op.new if isinstance(op, Replace) else op for op in ops if not isinstance(op, Expire)
        ]


def row(policy: KeepMeUpdated, monkeypatch: pytest.MonkeyPatch) -> memory_state.Row:
    monkeypatch.setattr(memory_state, "N_PERSONAS", 6)
    monkeypatch.setattr(memory_state, "EMBEDDER", "ngrams")
    monkeypatch.setattr(type(policy), "name", "keep_me_updated")
    return memory_state.run(policy, None, 0)[0]


def test_the_check_is_content_with_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(KeepMeUpdated(), monkeypatch)
    assert found.value > 0.9
    assert all(found.behaves.values())


def test_the_check_catches_endings_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(KeepsTheEnding(), monkeypatch)
    assert not found.behaves["an ending removes what it ends and itself, nothing else"]


def test_the_check_catches_a_memory_that_only_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(OnlyAppends(), monkeypatch)
    assert found.value < 0.8
    assert not found.behaves["state F1 is at least 0.9"]
