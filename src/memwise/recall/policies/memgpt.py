"""Main context as a paged window: core blocks, a queue with a summary, and two stores to search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memwise.catalogue import Card
from memwise.errors import BudgetExceeded, InvalidKnob
from memwise.recall.engine.controller import TOOL
from memwise.recall.engine.pack import Draft, pack, render
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Ranking, Recipe
from memwise.recall.engine.records import FOREVER, Add, Context, Expire, Item, Op, Replace
from memwise.recall.engine.text import spoken

WARNING = "system: memory pressure: old messages will be evicted soon; save what matters"


@dataclass(frozen=True)
class MemGPT(Policy):
    """Keep every message; show core blocks, a recursive summary and the newest messages.

    What has an actor is a message of the queue; what has none is a passage of the archive. When the
    window is full the older half of the queue is evicted: it goes into the summary and, as facts,
    into the archive, and stays in recall storage, which is searched by words and date.

    Attributes:
        window_tokens: size of the main context.
        warning_ratio: share of the window above which the context warns of the coming eviction.
        evicted_ratio: share of the queue's tokens that an eviction takes.
        summary_ratio: share of the window that the summary may take.
        recall_ratio: share of a packed context for messages found by search.
        archive_ratio: share of a packed context for facts found in the archive.
        block_chars: most characters of a block.

    Note:
        In the paper the model saves what matters when it is warned; facts drawn by rule from what
        is evicted stand in for that. The function calls of the paper stand in `engine/tools.py`.
    """

    card = Card(
        paper=116,
        claim="nested key-value retrieval solved beyond 3 nestings; DMR 66.9 / 92.5 / 93.4 % "
        "against 38.7 / 32.1 / 35.3 % (GPT-3.5, GPT-4, GPT-4-turbo)",
        check="nested_kv",
        baseline="single_shot",
        better="higher",
        margin=0.7,
    )
    window_tokens: int = 1000
    warning_ratio: float = 0.7
    evicted_ratio: float = 0.5
    summary_ratio: float = 0.15
    recall_ratio: float = 0.5
    archive_ratio: float = 0.2
    block_chars: int = 2000

    def on_turns(self, step: Step) -> Sequence[Op]:
        old = step.newest("summary")
        queue = self._queue(step, old, step.turns)
        sizes = [step.count(Draft(message, 1.0).line) for message in queue]
        if self._size(step, queue) <= self.window_tokens:
            return []
        n, gone = 0, 0
        while n < len(queue) and gone < self.evicted_ratio * sum(sizes):
            gone += sizes[n]
            n += 1
        return self._evicted(step, old, queue[:n])

    def _evicted(self, step: Step, old: Item | None, gone: Sequence[Item]) -> list[Op]:
        """The summary, rewritten from itself and what goes, and facts of that for the archive."""
        said = [message for message in gone if message.actor != TOOL]
        told = [spoken(message.actor, message.text) for message in said]
        text = "\n".join([*([old.text] if old else []), *told]) or gone[-1].text
        ratio = self.summary_ratio * self.window_tokens / step.count(text)
        new = Add(
            "summary", step.extract.gist(text, min(1.0, ratio)), at=gone[-1].at,
            sources=[*([old] if old else []), *gone], extractor=step.extract.name, vector=False,
        )  # fmt: skip
        # An unchanged text is recognized as the old summary, which then rests on more.
        changed = old and old.text.lower().split() != new.text.lower().split()
        return [new, *step.facts(said), *([Expire(old, "rewritten")] if old and changed else [])]

    def _queue(self, step: Step, summary: Item | None, new: Sequence[Item] = ()) -> list[Item]:
        """Messages since the last eviction, oldest first, and the new ones."""
        links = step.links([summary], "derived_from") if summary else []
        rests = step.get(link.dst for link in links).values()
        evicted = max((item.row for item in rests if item.is_source), default=0)
        told = step.told(evicted, new[0].row if new else FOREVER)
        return [message for message in [*told, *new] if message.actor]

    def _head(self, step: Step) -> list[Draft]:
        """What is never evicted: the blocks and the summary."""
        summary = step.newest("summary")
        blocks = [Draft(block, 1.0) for block in step.scan("block")]
        return [*blocks, *([Draft(summary, 1.0, form="summary")] if summary else [])]

    def _size(self, step: Step, queue: Sequence[Item]) -> int:
        shown = [*self._head(step), *(Draft(message, 1.0) for message in queue)]
        return step.count(render(shown, by_time=False))

    def main_context(self, step: Step) -> str:
        """What an agent sees before its next step: blocks, summary, newest messages, a warning.

        Raises:
            BudgetExceeded: the blocks and the summary alone exceed the window.
        """
        head, queue = self._head(step), self._queue(step, step.newest("summary"))
        while queue and self._size(step, queue) > self.window_tokens:
            queue = queue[1:]
        text = render([*head, *(Draft(message, 1.0) for message in queue)], by_time=False)
        size = step.count(text)
        if size > self.window_tokens:
            raise BudgetExceeded(
                f"blocks and summary take {size} of {self.window_tokens} tokens; shorten a block "
                "or raise window_tokens"
            )
        warned = f"{text}\n{WARNING}"
        pressed = size > self.warning_ratio * self.window_tokens
        return warned if pressed and step.count(warned) <= self.window_tokens else text

    def rank(self, step: Step) -> Ranking:
        shelf, k = step.index.sources, step.query.k
        tool = set(shelf.rows[shelf.actors == shelf.number("actors", TOOL)].tolist())
        found = step.rank(self.recipe, replace(step.query, k=k + min(len(tool), k)))
        kept = [i for i, row in enumerate(found.rows) if row not in tool][:k]
        rows, scores = [found.rows[i] for i in kept], [found.scores[i] for i in kept]
        return Ranking(rows, scores, [found.why[i] for i in kept])

    def pack(self, step: Step) -> Context:
        """Head, what both stores hold on the query, and the newest messages in what is left."""
        queue = self._queue(step, step.newest("summary"))
        archive = step.candidates(step.rank(Recipe.words(("fact", "note"))))
        drafts = self._head(step)
        for ratio, found in ((self.recall_ratio, step.found), (self.archive_ratio, archive)):
            room = ratio * step.tokens
            for one in found:
                size = step.count(Draft(one.item, one.score).line) + 1
                if size <= room:
                    drafts.append(Draft(one.item, one.score))
                    room -= size
        held = {draft.item.row for draft in drafts}
        drafts += [Draft(t, 0.0) for t in reversed(queue) if t.row not in held]
        return pack(drafts, step.tokens, step.count)

    def edited(self, step: Step, label: str, old: str, new: str) -> list[Op]:
        """Replace a part of a block, or append to it where `old` is empty; never cut anything.

        Raises:
            InvalidKnob: the part is not there, or the block would be empty.
            BudgetExceeded: the block would exceed its characters; nothing is changed.
        """
        block = next((b for b in step.scan("block") if b.actor == label), None)
        text = block.text if block else ""
        if old and old not in text:
            raise InvalidKnob(f"block {label!r} does not hold {old!r}; read it and try again")
        text = text.replace(old, new, 1) if old else "\n".join(filter(None, [text, new]))
        if not text.strip():
            raise InvalidKnob(f"block {label!r} would be empty; leave a word in it")
        if len(text) > self.block_chars:
            raise BudgetExceeded(
                f"block {label!r} would have {len(text)} of {self.block_chars} characters; replace "
                "a part of it, or insert this into the archive"
            )
        told = [block] if block else step.recent(1)
        add = Add("block", text, sources=told, actor=label, vector=False)
        return [Replace(block, add, "edited")] if block else [add]
