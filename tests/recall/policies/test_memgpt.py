import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from memwise import Memory
from memwise.errors import BudgetExceeded, InvalidKnob
from memwise.recall.engine.controller import LLM, Agent, Answer, Decision, Scripted, ToolCall
from memwise.recall.engine.text import n_tokens
from memwise.recall.engine.tools import tools
from memwise.recall.policies.memgpt import WARNING, MemGPT

POLICY = MemGPT(window_tokens=120, block_chars=60)


@pytest.fixture
def memory() -> Iterator[Memory]:
    with Memory(":memory:", policy=POLICY, embedder="none", clock=lambda: "2026-01-01") as made:
        yield made


def _told(memory: Memory, n: int = 30) -> None:
    for i in range(n):
        at = 1_700_000_000 + 86_400 * i
        memory.add(f"I visited town number {i} by train.", actor="ana", at=at)


def _call(memory: Memory, name: str, **arguments: Any) -> str:
    return next(t for t in tools(memory, POLICY) if t.name == name).call(**arguments)


def test_the_main_context_fits_the_window_after_every_message(memory: Memory) -> None:
    warned = False
    for i in range(40):
        memory.add(f"I visited town number {i} by train.", actor="ana")
        context = POLICY.main_context(memory.view())
        warned |= WARNING in context
        assert n_tokens(context) <= 120
        assert f"number {i} " in context
    assert warned
    assert len(memory.view().scan("summary")) == 1


def test_nothing_is_lost_between_the_summary_and_the_queue(memory: Memory) -> None:
    for i in range(40):
        memory.add(f"Town {i} is where Bob met Eve number {i} in {1900 + i}.", actor="ana")
        step = memory.view()
        summary = step.newest("summary")
        evicted = {row for s in step.sources([summary] if summary else []).values() for row in s}
        queue = POLICY._queue(step, summary)
        assert [t.row for t in step.told() if t.row not in evicted] == [t.row for t in queue]


def test_evicted_messages_are_found_by_words_and_by_date(memory: Memory) -> None:
    _told(memory)
    assert "town number 3 " not in POLICY.main_context(memory.view())
    assert "number 3 " in _call(memory, "conversation_search", query="number 3")
    found = _call(memory, "conversation_search_date", start="2023-11-17", end="2023-11-18")
    assert "number 3 " in found
    assert "number 4 " not in found


def test_a_block_edit_over_the_limit_is_rejected_whole(memory: Memory) -> None:
    memory.add("Hello.", actor="ana")
    _call(memory, "core_memory_append", label="human", text="likes tea")
    with pytest.raises(BudgetExceeded, match="60 characters"):
        _call(memory, "core_memory_append", label="human", text="x" * 60)
    with pytest.raises(InvalidKnob, match="does not hold"):
        _call(memory, "core_memory_replace", label="human", old="coffee", new="milk")
    _call(memory, "core_memory_replace", label="human", old="tea", new="milk")
    assert "human: likes milk" in POLICY.main_context(memory.view())


def test_the_archive_holds_passages_and_notes_and_is_paged(memory: Memory) -> None:
    memory.add([f"The key {i} opens the red door." for i in range(7)])
    memory.add("Hello.", actor="ana")
    _call(memory, "archival_memory_insert", text="The blue door is open.")
    look_up = partial(_call, memory, "archival_memory_search", query="red door")
    first, second = look_up(page=0), look_up(page=1)
    assert first.endswith("3 more")
    assert not set(first.split(" | ")[:-1]) & set(second.split(" | ")[:-1])
    assert "blue" in _call(memory, "archival_memory_search", query="blue door")
    assert _call(memory, "archival_memory_search", query="red door", page=9) == "nothing"


def test_results_of_tools_are_neither_found_again_nor_learnt_from(memory: Memory) -> None:
    memory.add("archival_memory_search: Bob lives in Rome.", actor="tool")
    _told(memory)
    assert all(hit.actor != "tool" for hit in memory.search("Where does Bob live? Rome", k=50))
    assert not memory.facts("Bob")


def _count_to_three(context: str) -> Decision:
    done = context.count("tool: core_memory_append")
    if done == 3:
        return Answer("three")
    return ToolCall("core_memory_append", {"label": "count", "text": str(done)})


def test_an_agent_that_was_stopped_goes_on_from_the_file(tmp_path: Path) -> None:
    policy = MemGPT()
    for steps, answer in ((2, None), (9, "three")):
        with Memory(tmp_path / "a.db", policy=policy, embedder="none") as memory:
            agent = Agent(
                memory, Scripted(_count_to_three), tools(memory, policy),
                lambda memory=memory: policy.main_context(memory.view()), most_steps=steps,
            )  # fmt: skip
            assert (agent.ask("Count.") if answer is None else agent.resume()) == answer
    with Memory(tmp_path / "a.db", policy=policy) as memory:
        assert [b.text for b in memory.view().scan("block")] == ["0\n1\n2"]


def test_a_wrong_call_is_told_to_the_controller(memory: Memory) -> None:
    calls = iter([ToolCall("fly"), ToolCall("core_memory_append", {"label": "x"}), Answer("ok")])
    agent = Agent(
        memory, Scripted(lambda context: next(calls)), tools(memory, POLICY),
        lambda: POLICY.main_context(memory.view()),
    )  # fmt: skip
    assert agent.ask("Go.") == "ok"
    results = [t.text for t in memory.view().told() if t.actor == "tool"]
    assert "no tool 'fly'" in results[0]
    assert "takes ['label', 'text']" in results[1]


class _Chat:
    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = [*answers], list[Any]()

    def chat(self, messages: Any, schema: Any = None) -> str:
        self.asked.append(messages)
        return self.answers.pop(0)


def test_a_chat_model_calls_tools_by_json(memory: Memory) -> None:
    call = {"tool": "core_memory_append", "arguments": {"label": "human", "text": "likes tea"}}
    client = _Chat(f"I shall save it: {json.dumps(call)}", '{"answer": "Noted."}', "no idea")
    listed = tools(memory, POLICY)
    controller = LLM(client, listed)  # type: ignore[arg-type]
    agent = Agent(memory, controller, listed, lambda: POLICY.main_context(memory.view()))
    assert agent.ask("I like tea.") == "Noted."
    assert "human: likes tea" in client.asked[1][1]["content"]
    with pytest.raises(InvalidKnob, match="no JSON step"):
        controller.step("")
