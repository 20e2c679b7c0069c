"""MemGPT's function calls: what an agent may do with its own memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from memwise.recall.engine.controller import TOOL, Tool
from memwise.recall.engine.dates import instant, iso
from memwise.recall.engine.policy import Step
from memwise.recall.engine.records import Add, Hit, Op
from memwise.recall.engine.text import spoken

PAGE = 5
"""Results of a page."""
_DEEPEST = 200  # hits that paging can reach


class Editable(Protocol):
    """A policy with core blocks."""

    def edited(self, step: Step, label: str, old: str, new: str) -> list[Op]:
        """Operations that edit a block; raises instead of cutting."""


class Remembers(Protocol):
    """What the tools need of `memwise.Memory`."""

    def search(
        self, query: str, k: int = ..., *, kinds: Sequence[str] = ..., actor: str | None = ...
    ) -> list[Hit]:
        """The best items."""

    def act(self, plan: Callable[[Step], Sequence[Op]], verb: str = ...) -> object:
        """Carry out a plan."""

    def view(self) -> Step:
        """The bank as it is."""


def tools(memory: Remembers, policy: Editable, page_size: int = PAGE) -> list[Tool]:
    """The six function calls, bound to a memory.

    Args:
        memory: what they work on.
        policy: its policy, which knows how blocks are edited.
        page_size: results of a page.
    """

    def append(label: str, text: str) -> str:
        memory.act(lambda step: policy.edited(step, label, "", text), "block")
        return "done"

    def replace(label: str, old: str, new: str) -> str:
        memory.act(lambda step: policy.edited(step, label, old, new), "block")
        return "done"

    def search(query: str, page: int = 0) -> str:
        hits = memory.search(query, k=_DEEPEST)
        return _paged([_line(h) for h in hits if h.actor and h.actor != TOOL], page, page_size)

    def by_date(start: str, end: str, page: int = 0) -> str:
        first, last = instant(start), instant(end)
        told = [t for t in memory.view().told() if t.actor and t.actor != TOOL]
        found = [spoken(t.actor, t.text) for t in told if first <= t.at < last]
        return _paged(found, page, page_size)

    def archive(text: str) -> str:
        memory.act(lambda step: [Add("note", text, sources=step.recent(1))], "archive")
        return "done"

    def look_up(query: str, page: int = 0) -> str:
        passages = memory.search(query, k=_DEEPEST, actor="")
        kept = memory.search(query, k=_DEEPEST, kinds=("note", "fact"))
        return _paged([hit.text for hit in _merged(kept, passages)], page, page_size)

    paged = {"page": "number of the page, from 0"}
    query = {"query": "what to look for", **paged}
    label = {"label": "name of the block"}
    return [
        Tool("core_memory_append", "Add a line to a block of core memory.",
             {**label, "text": "the line"}, append),
        Tool("core_memory_replace", "Replace a part of a block of core memory.",
             {**label, "old": "exact text that stands there", "new": "what to put"}, replace),
        Tool("conversation_search", "Search all earlier messages by words.", query, search),
        Tool("conversation_search_date", "List the messages from one date to another.",
             {"start": "first date", "end": "date after the last", **paged}, by_date),
        Tool("archival_memory_insert", "Put a passage into the archive.",
             {"text": "the passage"}, archive),
        Tool("archival_memory_search", "Search the archive.", query, look_up),
    ]  # fmt: skip


def _line(hit: Hit) -> str:
    return f"{iso(instant(hit.at))[:10]} {spoken(hit.actor, hit.text)}"


def _merged(*lists: Sequence[Hit]) -> list[Hit]:
    """Several searches as one; scores compare within a search only, so as shares of its best."""
    shares = [
        (hit.score / max(hits[0].score, 1e-9), hit) for hits in lists for hit in hits
    ]  # fmt: skip
    return [hit for _, hit in sorted(shares, key=lambda one: -one[0])]


def _paged(lines: Sequence[str], page: int, size: int) -> str:
    shown = lines[page * size : (page + 1) * size]
    more = max(0, len(lines) - (page + 1) * size)
    return " | ".join([*shown, f"{more} more"]) if shown else "nothing"
