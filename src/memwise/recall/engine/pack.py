"""Packing: what was found, as one block of text for a prompt, never over its token budget.

The whole serialized block is counted, tags and date headings included. Items go in by rank while
they fit and stand in the order of time, grouped by day, so that a date costs its tokens once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from memwise.recall.engine.dates import iso
from memwise.recall.engine.records import Context, Form, Hit, Item
from memwise.recall.engine.text import phrased

OPEN, CLOSE = "<memory>", "</memory>"
_TAG = re.compile(r"<(?=/?\s*memory\b)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An item that was found, with its score."""

    item: Item
    score: float


@dataclass(frozen=True, slots=True)
class Draft:
    """An item as it is to stand in the context: in full, or as a shorter text."""

    item: Item
    score: float
    text: str | None = None
    form: Form = "raw"

    @property
    def line(self) -> str:
        """The line that stands for it.

        Newlines are folded, since a line is one memory, and a tag in it cannot close the block.
        """
        text = self.item.text if self.text is None else self.text
        return _TAG.sub("\u2039", " ".join(phrased(self.item.kind, self.item.actor, text).split()))


@dataclass(frozen=True, slots=True)
class _Line:
    """A draft with its line and day, made once though a block is counted for each candidate."""

    draft: Draft
    text: str
    day: str

    @classmethod
    def of(cls, draft: Draft) -> _Line:
        return cls(draft, draft.line, iso(draft.item.at)[:10])

    def place(self) -> tuple[int, int]:
        return self.draft.item.at, self.draft.item.row


def pack(
    drafts: Sequence[Draft],
    tokens: int,
    count: Callable[[str], int],
    *,
    by_time: bool = True,
) -> Context:
    """The best drafts that fit.

    Args:
        drafts: best first.
        tokens: the most tokens the block may have.
        count: tokens of a text.
        by_time: order by event time under date headings; else keep the order of `drafts`.
    """
    chosen: list[_Line] = []
    text, used = "", 0
    for draft in drafts:
        lines = [*chosen, _Line.of(draft)]
        if by_time:
            lines.sort(key=_Line.place)
        block = _block(lines, by_time)
        size = count(block)
        if size <= tokens:
            chosen, text, used = lines, block, size
    parts = [line.draft for line in chosen]
    return Context(
        text,
        tuple(as_hit(d.item, d.score, d.text) for d in parts),
        used,
        tuple(d.form for d in parts),
    )


def render(drafts: Sequence[Draft], *, by_time: bool = True) -> str:
    """The drafts as one tagged block; empty for none."""
    lines = [_Line.of(draft) for draft in drafts]
    return _block(sorted(lines, key=_Line.place) if by_time else lines, by_time)


def _block(lines: Sequence[_Line], dated: bool) -> str:
    """Lines in their order as one tagged block, each day's under its date if `dated`."""
    if not lines:
        return ""
    out, day = [OPEN], ""
    for line in lines:
        if dated and line.day != day:
            day = line.day
            out.append(day)
        out.append(line.text)
    return "\n".join([*out, CLOSE])


def as_hit(
    item: Item, score: float = 1.0, text: str | None = None, why: Mapping[str, float] | None = None
) -> Hit:
    """An item as a caller sees it; the memory fills in its sources."""
    return Hit(
        item.id, item.text if text is None else text, item.kind, score, iso(item.at), item.actor,
        item.session, item.data, (), why or {},
        None if item.valid_from is None else iso(item.valid_from),
        None if item.valid_to is None else iso(item.valid_to),
    )  # fmt: skip
