from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from memwise import Memory
from memwise.bench.checks import triples
from memwise.recall.engine.policy import Step
from memwise.recall.engine.records import Add, Op
from memwise.recall.policies.ret_llm import RETLLM


def told(*sentences: tuple[str, str], policy: RETLLM | None = None) -> Memory:
    memory = Memory(
        ":memory:", policy=policy or RETLLM(), embedder="none", clock=lambda: "2027-06-01"
    )
    for day, text in sentences:
        memory.add(text, at=day)
    return memory


MOVED = (
    ("2026-01-01", "The capital of Kenya is Nairobi."),
    ("2027-01-01", "Mombasa is the capital of Kenya."),
)


def answers(memory: Memory, question: str, **when: str) -> list[str]:
    return [str(hit.meta["object"]) for hit in memory.search(question, **when)]


def test_a_new_value_overwrites_the_old_one_and_leaves_history() -> None:
    memory = told(*MOVED)
    asked = "What is the capital of Kenya?"
    assert answers(memory, asked) == ["Mombasa"]
    assert answers(memory, asked, at="2026-06-01") == ["Nairobi"]
    assert answers(memory, asked, at="2025-06-01") == []


def test_an_update_that_comes_late_does_not_overwrite() -> None:
    assert answers(told(*MOVED[::-1]), "What is the capital of Kenya?") == ["Mombasa"]


def test_both_directions_are_read_from_one_triple() -> None:
    memory = told(MOVED[0])
    (hit,) = memory.search("Nairobi is the capital of which country?")
    assert hit.meta["subject"] == "Kenya"
    assert hit.sources[0].text == MOVED[0][1]


@pytest.mark.parametrize(
    "asked",
    ["What is the capital of Wakanda?", "What is the capital of New Kenya?", "Who are you?"],
)
def test_what_was_never_told_finds_nothing(asked: str) -> None:
    assert told(*MOVED).search(asked) == []


def test_a_verb_lists_its_values() -> None:
    memory = told(("2026-01-01", "Ana plays chess."), ("2026-01-02", "Ana plays tennis."))
    assert {hit.meta["object"] for hit in memory.facts("Ana", "play")} == {"chess", "tennis"}


# ---------------------------------------------------------------- the check can fail


@dataclass(frozen=True)
class NearestGarbage(RETLLM):
    term_similarity: float = -1.0
    relation_similarity: float = -1.0


@dataclass(frozen=True)
class NoHistory(RETLLM):
    def on_turns(self, step: Step) -> Sequence[Op]:
        return [
            replace(op, valid_from=None, valid_to=None)
            if isinstance(op, Add) and op.kind == "fact"
            else op
            for op in super().on_turns(step)
        ]


def behaviour(policy: RETLLM, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    few = triples._countries()[:12]
    monkeypatch.setattr(triples, "_countries", lambda: few)
    monkeypatch.setattr(triples, "EMBEDDER", "ngrams")
    rng = np.random.default_rng(0)
    first = triples._triples(rng)
    later = triples._changes(first, rng)
    memory = triples._memory(policy, [*first, *later])
    read = triples._read(memory, [*first, *later])
    asked = triples._questions(first, later, read, rng)
    right = {kind: triples._right(memory, some) for kind, some in asked.items()}
    return triples._behaviour(memory, first, later, read, right)


def test_the_check_is_content_with_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(behaviour(RETLLM(), monkeypatch).values())


def test_the_check_catches_garbage_for_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not behaviour(NearestGarbage(), monkeypatch)["a name that was never told finds nothing"]


def test_the_check_catches_a_lost_history(monkeypatch: pytest.MonkeyPatch) -> None:
    caught = behaviour(NoHistory(), monkeypatch)
    assert not caught["every answer as of a date is right"]
    assert not caught["what was overwritten is there still, for its own time"]


def test_the_check_does_not_give_answers_away() -> None:
    rng = np.random.default_rng(0)
    first = triples._triples(rng)
    later = triples._changes(first, rng)
    asked = triples._questions(first, later, {*first, *later}, rng)
    assert len(asked["as-of"]) == 2 * len(later)
    for some in asked.values():
        assert not any(triples._holds(one.text, one.answer) for one in some)
