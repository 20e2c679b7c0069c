"""At one token budget: are gists with looked-up pages better than either of them alone?

A LoCoMo conversation, and the pooled HotpotQA paragraphs, are read as one long text of 12,000 to
110,000 tokens; a context has 1,000. Measured is the share of the evidence's words that can be read
in it, so that a gist counts for what it really keeps. Nothing here asks a model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memwise.bench.data import Conversation, Question, hotpot, locomo
from memwise.bench.engine import Row, paired_interval
from memwise.bench.reading import Once, readable, spoken_texts, told, whole
from memwise.catalogue import find, load
from memwise.recall.engine.embed import embedder
from memwise.recall.engine.pack import Draft, pack, render
from memwise.recall.engine.pages import n_words, ranked_pages
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.records import Context
from memwise.recall.policies.top_pages import TopPages

TOKENS = 1000
_TALKS = 4
_EVERY = 2  # of these talks' questions


@dataclass(frozen=True)
class _Beginning(Policy):
    """Control: the text from its beginning, as far as it goes."""

    def pack(self, step: Step) -> Context:
        return pack([Draft(t, 1.0) for t in step.told()[:100]], step.tokens, step.count)


@dataclass(frozen=True)
class _WholePages(TopPages):
    """Control: as many of the best pages as fit whole, the rest of the budget left empty."""

    def pack(self, step: Step) -> Context:
        drafts: list[Draft] = []
        for page in ranked_pages(step):
            more = [*drafts, *(Draft(turn, page.score) for turn in page.turns)]
            if step.count(render(more)) <= step.tokens:
                drafts = more
        return pack(drafts, step.tokens, step.count)


@dataclass(frozen=True)
class _Read:
    """What every question's context held: words and whole turns of the evidence, and its size."""

    words: NDArray[np.float64]
    turns: NDArray[np.float64]
    tokens: NDArray[np.int64]


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """LoCoMo and HotpotQA decide together; whole turns and boundary splits are context."""
    baseline = load(find(method.name).baseline)()
    arms: dict[str, Policy] = {
        "method": method,
        "baseline": baseline,
        "gists only": replace(method, lookup_pages=0, gists_ratio=1.0),
        "beginning": _Beginning(),
        "whole pages": _WholePages(),
    }
    encoder = Once(embedder("minilm"))
    rows = []
    for name, talks in (("LoCoMo", locomo(data)[:_TALKS]), ("HotpotQA", [_untitled(data)])):
        started = time.perf_counter()
        found = {arm: _read(talks, policy, encoder) for arm, policy in arms.items()}
        seconds = time.perf_counter() - started
        several = np.array([len(q.gold) > 1 for talk in talks for q in _asked(talk)])
        groups = np.repeat([t.name for t in talks], [len(_asked(t)) for t in talks])
        shared: dict[str, Any] = {"data": f"{name}, {TOKENS} tokens", "seconds": seconds}
        rows += _rows(name, found, several, groups if len(talks) > 1 else None, seed, shared)
        rows.append(_splits(name, method, talks, encoder, seed))
    return rows


def _untitled(data: Path | None) -> Conversation:
    """The pooled paragraphs, sentence by sentence, without the titles that mark their borders."""
    pooled = hotpot(data, "sentence").pooled
    bare = [replace(t, text=t.text.removeprefix(f"{t.session}: ")) for t in pooled.turns]
    return replace(pooled, turns=[turn for turn in bare if turn.text.strip()])


def _asked(talk: Conversation) -> list[Question]:
    known = {turn.ref for turn in talk.turns}
    asked = [q for q in talk.questions if q.gold and q.gold <= known and not q.unanswerable]
    return asked[:: _EVERY if len(asked) > 100 else 1]


def _read(talks: Sequence[Conversation], policy: Policy, encoder: Once) -> _Read:
    words, turns, tokens = [], [], []
    for talk in talks:
        texts = spoken_texts(talk)
        with told(talk, policy, encoder) as memory:  # a policy sees only what it derived itself
            for question in _asked(talk):
                context = memory.context(question.text, tokens=TOKENS)
                words.append(readable(context, question.gold, texts))
                turns.append(whole(context, question.gold, texts))
                tokens.append(context.tokens)
    return _Read(np.array(words), np.array(turns), np.array(tokens))


def _rows(
    name: str, found: Mapping[str, _Read], several: NDArray[np.bool_],
    groups: NDArray[np.str_] | None, seed: int, shared: Mapping[str, Any],
) -> list[Row]:  # fmt: skip
    mine, pages, gists = (found[arm] for arm in ("method", "baseline", "gists only"))
    others = {arm: read for arm, read in found.items() if arm not in ("method", "baseline")}
    gain = mine.words - pages.words
    behaves = {
        f"{name}: better than gists alone": paired_interval(
            mine.words, gists.words, seed, groups=groups
        )[0] > 0,
        f"{name}: no context exceeds its tokens": max(r.tokens.max() for r in found.values())
        <= TOKENS,
    }  # fmt: skip
    controls = {arm: float(read.words.mean()) for arm, read in others.items()}
    if not several.all():
        one, many = float(gain[~several].mean()), float(gain[several].mean())
        controls |= {"gain, one piece of evidence": one, "gain, several pieces": many}
        behaves[f"{name}: gains most where evidence lies in several places"] = many > one
    return [
        Row(
            f"evidence words, {name}", float(mine.words.mean()), float(pages.words.mean()),
            paired_interval(mine.words, pages.words, seed, groups=groups), len(gain),
            controls, behaves, **shared,
        ),
        Row(
            f"whole turns, {name}", float(mine.turns.mean()), float(pages.turns.mean()),
            paired_interval(mine.turns, pages.turns, seed, groups=groups), len(gain),
            {arm: float(read.turns.mean()) for arm, read in others.items()}, primary=False,
            note=f"tokens used: {mine.tokens.mean():.0f}, baseline {pages.tokens.mean():.0f}",
            **shared,
        ),
    ]  # fmt: skip


def _splits(name: str, method: Any, talks: Sequence[Conversation], encoder: Once, seed: int) -> Row:
    """How many page breaks fall inside a session or paragraph, beside cuts of one fixed size."""
    inside, fixed = list[float](), list[float]()
    for talk in talks:
        with told(talk, method, encoder) as memory:
            step = memory.view()
            pages, turns = step.sources(step.scan("gist")), step.told()
        unit = [turn.session for turn in turns]
        number = {turn.row: i for i, turn in enumerate(turns)}
        ends = [number[max(rows)] + 1 for rows in pages.values()]
        sizes = np.cumsum([n_words(turn.text) for turn in turns])
        step_words = sizes[ends[-1] - 1] / len(ends)
        cuts = [int(np.searchsorted(sizes, (i + 1) * step_words)) + 1 for i in range(len(ends) - 1)]
        inside += [float(unit[i] == unit[i - 1]) for i in ends if i < len(unit)]
        fixed += [float(unit[i] == unit[i - 1]) for i in cuts if i < len(unit)]
    n = min(len(inside), len(fixed))
    mine, theirs = np.array(inside[:n]), np.array(fixed[:n])
    return Row(
        f"breaks that split a unit, {name}", float(mine.mean()), float(theirs.mean()),
        paired_interval(mine, theirs, seed), n, {},
        {f"{name}: cuts of a fixed size split more": float(mine.mean()) < float(theirs.mean())},
        primary=False, data=name, note="the baseline of this row is cuts of the pages' mean size",
    )  # fmt: skip
