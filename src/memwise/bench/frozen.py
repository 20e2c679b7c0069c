"""Conversations told to a `Memory`, and an extractor that reads what ships with the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from memwise.bench.data import Conversation, Question, Turn
from memwise.bench.evidence import Search, expand
from memwise.recall.engine.dates import iso
from memwise.recall.engine.extract import Given
from memwise.recall.engine.policy import Policy
from memwise.recall.memory import Memory

_NOW = "2026-01-01"  # a run must not depend on the day it is made


class Frozen(Given):
    """Facts and summaries as they ship with some conversations, in place of an LLM's extraction."""

    name = "frozen"

    def __init__(self, conversations: Iterable[Conversation]) -> None:
        facts: dict[str, list[str]] = {}
        self._summaries: dict[str, str] = {}
        for one in conversations:
            texts = {turn.ref: turn.text for turn in one.turns}
            for fact in one.observations:
                for ref in fact.sources:
                    facts.setdefault(texts[ref], []).append(fact.text)
            for session, turns in groupby(one.turns, key=lambda turn: turn.session):
                if session in one.summaries:
                    told = " ".join(turn.text for turn in turns)
                    self._summaries[told] = one.summaries[session]
        super().__init__(facts)
        self._by_rules = self.gist
        self.gist = self._given_gist

    def _given_gist(self, text: str, ratio: float = 0.3) -> str:
        return self._summaries.get(text) or self._by_rules(text, ratio)


def tell(memory: Memory, turns: Sequence[Turn], bank: str = "") -> None:
    """Add turns session by session; sessions of different banks' turns are kept apart by `bank`."""
    for session, group in groupby(turns, key=lambda turn: turn.session):
        memory.add(
            [
                {
                    "role": "user", "content": turn.text, "at": iso(turn.at), "actor": turn.actor,
                    "session": f"{bank}{session}", "meta": {"ref": f"{bank}{turn.ref}"},
                }
                for turn in group
            ]
        )  # fmt: skip
    memory.reflect()


def told(policy: Policy, conversation: Conversation, embedder: Any, llm: Any = None) -> Memory:
    """A memory in RAM that was told a conversation."""
    memory = Memory(":memory:", policy=policy, embedder=embedder, llm=llm, clock=lambda: _NOW)
    tell(memory, conversation.turns)
    return memory


def searching(
    policy: Policy, embedder: Any, llm: Any = None, k: int = 50
) -> Callable[[Conversation], Search]:
    """A `build` for `evidence.evaluate`: refs of the turns that a search's hits rest on."""

    def build(conversation: Conversation) -> Search:
        memory = told(policy, conversation, embedder, llm)
        return lambda question: found_refs(memory, question, k)

    return build


def found_refs(memory: Memory, question: Question, k: int = 50) -> list[str]:
    """Refs of the turns that the hits of one search rest on, best first."""
    hits = memory.search(question.text, k)
    return expand([source.meta["ref"] for source in hit.sources] for hit in hits)
