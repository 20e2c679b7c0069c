"""Stages between ranking and packing: several rankings into one, links, second queries, sources.

Each takes the step or rankings and returns a `Ranking`, so that a policy's `rank` is a chain of
them. Scores of one ranking are compared with those of another as shares of its best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from memwise.recall.engine.policy import Step
from memwise.recall.engine.rank import Query, Ranking, Recipe
from memwise.recall.engine.records import Item, Link


def ordered(scores: Mapping[int, float], k: int, part: str) -> Ranking:
    """The k best rows of a mapping; ties go to the older row."""
    best = sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))[:k]
    why = [{part: round(score, 4)} for _, score in best]
    return Ranking([row for row, _ in best], [score for _, score in best], why)


def pooled(rankings: Iterable[Ranking], k: int) -> Ranking:
    """Sum of each ranking's scores as shares of its best; a score below 0 counts as 0."""
    total: dict[int, float] = {}
    for one in rankings:
        _pour(total, one)
    return ordered(total, k, "pooled")


def iterate(step: Step, recipe: Recipe, rounds: int, depth: int) -> Ranking:
    """Ask, read the best unit not read so far, ask again with it, and pool what all rounds found.

    Args:
        step: its query is the first one.
        recipe: what is ranked, and how, in each round.
        rounds: number of queries.
        depth: units that a round contributes.
    """
    return iterate_with(step, recipe, rounds, depth, lambda asked, read: f"{asked} {read.text}")


def iterate_with(
    step: Step, recipe: Recipe, rounds: int, depth: int, refine: Callable[[str, Item], str]
) -> Ranking:
    """As `iterate`, with a refined query of one's own: (query so far, unit just read) -> query."""
    asked, read = step.query.text, set[int]()
    total: dict[int, float] = {}
    for i in range(rounds):
        _pour(total, step.rank(recipe, replace(step.query, text=asked, k=depth)))
        unread = [row for row in ordered(total, len(read) + 1, "").rows if row not in read]
        if i + 1 == rounds or not unread:
            break
        read.add(unread[0])
        asked = refine(asked, step.get(unread[:1])[unread[0]])
    return ordered(total, step.query.k, "pooled")


def rerank(
    step: Step, found: Ranking, keep: int, score: Callable[[str, Sequence[Item]], Sequence[float]]
) -> Ranking:
    """Order candidates anew by a scorer that sees the question and the items; keep the best."""
    items = step.get(found.rows)
    listed = [items[row] for row in found.rows if row in items]
    scores = score(step.query.text, listed)
    return ordered(
        {item.row: float(s) for item, s in zip(listed, scores, strict=True)}, keep, "rerank"
    )


def spread(found: Ranking, links: Iterable[Link], anchors: int, share: float, k: int) -> Ranking:
    """Pass a share of the best rows' scores along links, in both directions, one hop far.

    Only rows of `found` gain: a link to what was let go, or filtered out, leads nowhere.

    Args:
        found: deeper than `k`, so that linked rows are in it.
        links: links that touch the anchors.
        anchors: how many of the best rows pass on.
        share: what a linked row gains of an anchor's score, if that is above 0.
        k: rows returned.
    """
    score = dict(zip(found.rows, found.scores, strict=True))
    source = {row: max(0.0, score[row]) for row in found.rows[:anchors]}
    edges = {(a, b) for link in links for a, b in ((link.src, link.dst), (link.dst, link.src))}
    gained = dict(score)
    for anchor, row in sorted(edges):
        if anchor in source and row in gained:
            gained[row] += share * source[anchor]
    return ordered(gained, k, "spread")


def touching(step: Step, rows: Iterable[int], *rels: str) -> list[Link]:
    """Links that leave or reach these rows."""
    listed = list(rows)
    return step.store.links(listed, rels) + step.store.links(listed, rels, incoming=True)


def to_sources(step: Step, found: Ranking, k: int) -> Ranking:
    """Each unit replaced by the sources it rests on; a unit that rests on none is left out."""
    items = step.get(found.rows)
    origins = step.sources(items.values())
    score: dict[int, float] = {}
    for row, value in zip(found.rows, found.scores, strict=True):
        for source in origins.get(row, ()):
            score.setdefault(source, value)
    rows = list(score)[:k]
    return Ranking(rows, [score[row] for row in rows])


def deeper(query: Query, k: int) -> Query:
    """The same query for at least k results."""
    return replace(query, k=max(k, query.k))


def _pour(total: dict[int, float], found: Ranking) -> None:
    best = found.scores[0] if found.scores else 0.0
    for row, score in zip(found.rows, found.scores, strict=True):
        if score > 0:
            total[row] = total.get(row, 0.0) + score / best
