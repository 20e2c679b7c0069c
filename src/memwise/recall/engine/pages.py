"""Pages: a stream of paragraphs cut where its topic changes, as a reader would pause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memwise.recall.engine.index import Floats
from memwise.recall.engine.policy import Step
from memwise.recall.engine.records import Add, Item, Op
from memwise.recall.engine.text import spoken, terms

AROUND = 4
"""Paragraphs on each side of a gap whose likeness is its cohesion."""


@dataclass(frozen=True, slots=True)
class Page:
    """A run of sources, with its gist; the last page is open and has none yet."""

    turns: tuple[Item, ...]
    gist: Item | None
    score: float = 0.0


def bind(step: Step, least_words: int, most_words: int, gist_ratio: float) -> list[Op]:
    """The pages that the new turns complete, each as a gist that rests on the page's turns."""
    last = step.newest("gist")
    after = max(step.sources([last])[last.row]) if last else 0
    turns = [*step.told(after, step.turns[0].row), *step.turns]
    encode = step.encode if step.index.dim else None
    ops: list[Op] = []
    while end := page_end(lines(turns), least_words, most_words, encode):
        page, turns = turns[:end], turns[end:]
        text = "\n".join(lines(page))
        ops.append(
            Add(
                "gist", step.extract.gist(text, gist_ratio) or page[0].text, sources=page,
                at=page[0].at, valid_from=page[0].at, extractor=step.extract.name, vector=False,
            )
        )  # fmt: skip
    return ops


def ranked_pages(step: Step) -> list[Page]:
    """All pages, those first whose turns and gist answer the query best, else in order.

    A page scores as its best turn among `step.found` does, and half of what its second best does.
    """
    gists = step.scan("gist")
    rows = step.sources(gists)
    last = max((max(rows[gist.row]) for gist in gists), default=0)
    turns = step.get(row for gist in gists for row in rows[gist.row])
    pages = [(tuple(turns[r] for r in rows[g.row] if r in turns), g) for g in gists]
    found = {c.item.row: c.score for c in step.found}
    scored = [
        Page(page, gist, _score(found, page))
        for page, gist in [*pages, (tuple(step.told(last)), None)]
        if page
    ]
    return sorted(scored, key=lambda page: (-page.score, page.turns[0].row))


def _score(found: Mapping[int, float], turns: Sequence[Item]) -> float:
    first, second = sorted([0.0, 0.0, *(found.get(turn.row, 0.0) for turn in turns)])[:-3:-1]
    return first + second / 2


def lines(turns: Sequence[Item]) -> list[str]:
    """The turns as text, each with its speaker in front."""
    return [spoken(turn.actor, turn.text) for turn in turns]


def n_words(text: str) -> int:
    """Words of a text, as a page is measured."""
    return len(text.split())


def page_end(
    texts: Sequence[str],
    least_words: int,
    most_words: int,
    encode: Callable[[Sequence[str]], Floats] | None = None,
) -> int | None:
    """How many of the paragraphs make the first page; None while more must be read to say.

    A page ends where the paragraphs before and after are least alike, in words and in meaning,
    among the gaps that leave it `least_words` to `most_words`. Only what can matter is looked at,
    so that a text read at once is cut as one that comes paragraph by paragraph.

    Args:
        texts: paragraphs in order.
        least_words: a page has at least so many words, if a gap allows it.
        most_words: and at most so many, unless its first paragraph alone has more.
        encode: texts -> unit vectors (n, D); None = words alone.
    """
    sizes = np.cumsum([n_words(text) for text in texts])
    full = int(np.searchsorted(sizes, most_words, side="right"))  # paragraphs that fit a page
    if full + AROUND > len(texts):
        return None
    gaps = [i for i in range(1, full + 1) if sizes[i - 1] >= least_words]
    if len(gaps) < 2:
        return max(1, full)
    near = texts[: full + AROUND]
    cohesion = _likeness(_bags(near))
    if encode is not None:
        cohesion = cohesion + _likeness(encode(near))
    return min(gaps, key=lambda i: (float(cohesion[i]), i))


def _bags(texts: Sequence[str]) -> Floats:
    """Rows (n, V) of damped word counts; a word in all paragraphs tells nothing."""
    bags = [Counter(terms(text)) for text in texts]
    spread = Counter(term for bag in bags for term in bag)
    column = {term: i for i, term in enumerate(spread)}
    out = np.zeros((len(texts), max(1, len(column))), np.float32)
    for row, bag in enumerate(bags):
        for term, count in bag.items():
            out[row, column[term]] = np.sqrt(count) * np.log(len(texts) / spread[term])
    return out


def _likeness(rows: Floats) -> Floats:
    """Cosine (n,) of the sums of the rows before and after the gap in front of each row."""
    sums = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0)])
    at = np.arange(len(rows))
    left = sums[at] - sums[np.maximum(at - AROUND, 0)]
    right = sums[np.minimum(at + AROUND, len(rows))] - sums[at]
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray((left * right).sum(axis=1) / np.maximum(norms, 1e-9), np.float32)
