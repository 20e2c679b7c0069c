"""Ranking: words, meaning and the shape of a conversation, as one weighted sum.

First every item gets a score from its own words (BM25) and its vector; the best few hundred, found
with their neighbours' help, become candidates. For these eight features are computed:

    own      BM25 of the item's words, as a share of the bank's best
    window   BM25 of a soft window: the counts of a word in the two items before and after are added
             with shares *before* they saturate, so that an answer is found by its question's words
    dense    cosine, as a z-score over the bank
    session  the best base score (own + cosine) in the item's session
    spoken   the question names the item's speaker, and nobody else
    asks     the item asks something itself
    reply    the base score of the item before, if that asks something
    dated    the item's time lies in the date that the question names

and, where a recipe says so, `facts`: the best match among the facts that rest on the item.

A vector operation costs n or c: n items, c candidates. The weights were fitted on the first four
LoCoMo dev conversations and LongMemEval; docs/recall.md shows tuned and untouched data apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from memwise.recall.engine.index import Floats, Index, Ints, Mask, Shelf
from memwise.recall.engine.records import SOURCES, Instant
from memwise.recall.engine.text import terms, topic_terms

Encode: TypeAlias = Callable[[Sequence[str]], Floats]
Postings: TypeAlias = tuple[NDArray[np.int32], NDArray[np.uint8]]
"""Items that hold a term, and how often."""

CANDIDATES = 400
FACTS = 64
"""Facts, best first, that lend their score to the turns they rest on."""
K1, B = 0.6, 0.4
SHARES = np.array([0.7, 0.5, 0.4, 0.3], np.float32)
"""How much of the words one and two before, one and two after belongs to an item's window."""
_COUNTS_BYTES = 4 << 20  # counts of terms in all items that are held at once
_NAME = re.compile(r"\w+")
_MONTHS = "january february march april may june july august september october november december"
_DATE = re.compile(
    r"\b(?:(\d{1,2})(?:st|nd|rd|th)?\s+(?:of\s+)?)?("
    + "|".join(m.capitalize() for m in _MONTHS.split())
    + r")\b(?:\s+(\d{1,2})(?:st|nd|rd|th)?(?!\d))?(?:,?\s+((?:19|20)\d\d))?"
)
_YEAR = re.compile(r"\b((?:19|20)\d\d)\b")
_DAY = 86_400_000_000
_ME, _YOU = frozenset(("i", "me", "my", "mine")), frozenset(("you", "your"))


@dataclass(frozen=True)
class Query:
    """What is searched for; filters apply inside the search, so k results come back if k exist.

    Attributes:
        text: the question.
        k: most results.
        kinds: only these kinds; empty = what the policy's recipe ranks.
        actor: only what this actor said, or what is about them.
        session: only this session.
        since: only event times from here on.
        until: only event times before this.
        at: only what was true at this event time.
        known_at: as the store knew it at this time.
        rows: only these rows (a filter on `meta`, already looked up).
    """

    text: str
    k: int = 10
    kinds: tuple[str, ...] = ()
    actor: str | None = None
    session: str | None = None
    since: Instant | None = None
    until: Instant | None = None
    at: Instant | None = None
    known_at: Instant | None = None
    rows: frozenset[int] | None = None


@dataclass(frozen=True)
class Recipe:
    """What is ranked, and the weight of each feature.

    Attributes:
        kinds: kinds of items that are ranked.
        own: weight of the item's own words.
        window: weight of the words of the item and its neighbours.
        dense: weight of the cosine; 0 = no vectors are read and the query is not embedded.
        session: weight of the best score in the session.
        spoken: bonus for what a person said whom the question names.
        asks: bonus (a malus) for items that ask.
        reply: share of a question's score that its answer gets.
        dated: bonus for items in the time that the question names.
        facts: share of the best fact's score that its sources get; 0 = facts are not read.
    """

    kinds: tuple[str, ...] = SOURCES
    own: float = 1.4
    window: float = 4.3
    dense: float = 0.5
    session: float = 2.7
    spoken: float = 0.8
    asks: float = -0.5
    reply: float = 1.3
    dated: float = 3.7
    facts: float = 0.0

    @classmethod
    def meaning(cls, kinds: tuple[str, ...] = SOURCES) -> Recipe:
        """Cosine alone."""
        return cls(kinds, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)

    @classmethod
    def words(cls, kinds: tuple[str, ...] = SOURCES) -> Recipe:
        """BM25 alone."""
        return cls(kinds, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Ranking:
    """Rows and scores, best first, with the parts of each score by name."""

    rows: list[int]
    scores: list[float]
    why: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class _Scored:
    """Candidates of one shelf with their scores and the parts these are made of."""

    rows: Ints
    total: Floats
    parts: dict[str, Floats]


def rank(index: Index, recipe: Recipe, query: Query, encode: Encode) -> Ranking:
    """Order the items of a bank for a query.

    Args:
        index: the bank's index.
        recipe: what is ranked and how.
        query: what is searched for.
        encode: texts -> unit vectors; called once, and only if the recipe uses vectors.
    """
    kinds = query.kinds or recipe.kinds
    shelves = [
        shelf
        for shelf, wanted in (
            (index.sources, any(k in SOURCES for k in kinds)),
            (index.derived, any(k not in SOURCES for k in kinds)),
        )
        if wanted and len(shelf)
    ]
    dense = recipe.dense and index.dim and shelves
    vector = encode([query.text])[0] if dense else None
    facts = _fact_scores(index, query, vector) if recipe.facts and len(index.derived) else {}
    scored = [_score(shelf, recipe, query, vector, kinds, facts) for shelf in shelves]
    return _best(scored, query.k)


def bm25(shelf: Shelf, asked: Sequence[int]) -> Floats:
    """Okapi BM25 (n + 1,) of every item for distinct term numbers; the last is "no item"."""
    n = len(shelf)
    lengths = shelf.postings.lengths.view
    scale = np.float32(K1 * B / shelf.postings.mean_length)
    found = _postings(shelf, asked)
    if not found:
        return np.zeros(n + 1, np.float32)
    docs = np.concatenate([docs for docs, _ in found])
    c = np.concatenate([counts for _, counts in found]).astype(np.float32)
    weight = np.repeat(_weights(n, found), [len(docs) for docs, _ in found])
    norm = np.float32(K1 * (1 - B)) + scale * lengths[docs]
    return np.bincount(docs, weight * c / (c + norm), n + 1).astype(np.float32)


def _postings(shelf: Shelf, asked: Sequence[int]) -> list[Postings]:
    """Where the terms stand; those that stand nowhere are left out."""
    return [pair for pair in map(shelf.postings.find, asked) if len(pair[0])]


def _weights(n: int, found: Sequence[Postings]) -> Floats:
    """How much each term counts, by the number of items that hold it."""
    return np.array([_idf(n, len(docs)) * (K1 + 1) for docs, _ in found], np.float32)


def _idf(n: int, n_docs: int) -> float:
    return math.log1p((n - n_docs + 0.5) / (n_docs + 0.5))


def _score(
    shelf: Shelf,
    recipe: Recipe,
    query: Query,
    vector: Floats | None,
    kinds: Sequence[str],
    facts: Mapping[int, float],
) -> _Scored:
    n = len(shelf)
    allowed = _allowed(shelf, query, kinds)
    asked, topic = _asked(shelf, query.text)
    own = bm25(shelf, asked)
    own /= own.max() + np.float32(1e-9)
    cosine, unit = _cosines(shelf, vector, allowed)
    around = shelf.around()
    base = own + unit  # (n + 1,)
    rough = base.copy()
    if recipe.window and n > CANDIDATES:
        for share, near in zip(SHARES, around, strict=True):
            rough += share * own[near]
    helped = shelf.locals(facts) if facts else np.empty(0, np.int64)
    rough[helped] += np.float32(1e-6)  # a fact makes its sources candidates even without own words
    at = _candidates(rough[:n], allowed, max(CANDIDATES, 4 * query.k), vector is None)
    who = _named(shelf, query.text)
    before = around[0][at]
    reply = np.append(shelf.asks, False)[before]
    features: dict[str, tuple[float, Callable[[], Floats | Mask]]] = {
        "own": (recipe.own, lambda: own[at]),
        "window": (recipe.window, lambda: _window(shelf, topic, at, around)),
        "dense": (recipe.dense if vector is not None else 0.0, lambda: cosine[at]),
        "session": (recipe.session, lambda: _best_of_session(shelf, base, at)),
        "spoken": (recipe.spoken if who >= 0 else 0.0, lambda: shelf.actors[at] == who),
        "asks": (recipe.asks, lambda: shelf.asks[at]),
        "reply": (recipe.reply, lambda: base[before] * reply),
        "dated": (recipe.dated, lambda: _dated(shelf.at[at], query.text)),
        "facts": (recipe.facts if facts else 0.0, lambda: _lent(shelf.rows[at], facts)),
    }
    total = np.zeros(len(at), np.float32)
    parts = {}
    for name, (weight, feature) in features.items():
        if weight and len(at):
            parts[name] = np.asarray(feature() * np.float32(weight), np.float32)
            total += parts[name]
    return _Scored(shelf.rows[at], total, parts)


def _asked(shelf: Shelf, text: str) -> tuple[list[int], list[int]]:
    """Terms of a question and those of its topic; names of actors help only if nothing else."""
    names = shelf.actor_terms()
    found = [*dict.fromkeys(terms(text))]
    asked = [t for t in found if t not in names] or found
    topic = topic_terms(text)
    return asked, [t for t in asked if t in topic] or asked


def _cosines(shelf: Shelf, vector: Floats | None, allowed: Mask | None) -> tuple[Floats, Floats]:
    """Cosines (n + 1,) as z-scores and scaled to [0, 1] over the shelf; 0 for "no item"."""
    z, unit = np.zeros(len(shelf) + 1, np.float32), np.zeros(len(shelf) + 1, np.float32)
    if vector is not None and not shelf.vectors.blank:
        raw = shelf.vectors.scores(vector, allowed)
        low = float(raw.min())
        unit[:-1] = (raw - low) / (float(raw.max()) - low + 1e-9)
        apart = raw - raw.mean()
        z[:-1] = apart / (math.sqrt(float(apart @ apart) / len(raw)) + 1e-9)
    return z, unit


def _candidates(rough: Floats, allowed: Mask | None, k: int, positive: bool) -> Ints:
    """The k best allowed items, ascending; only those above 0 if `positive`."""
    masked = rough if allowed is None else np.where(allowed, rough, -np.inf)
    if k < len(masked):
        at = np.sort(np.argpartition(masked, len(masked) - k)[-k:])
    else:
        at = np.arange(len(masked))
    return at[masked[at] > (0.0 if positive else -np.inf)]


def _window(shelf: Shelf, topic: Sequence[int], at: Ints, around: NDArray[np.int32]) -> Floats:
    """BM25 (c,) of each candidate's soft window, as a share of the best."""
    n = len(shelf)
    near = around[:, at]  # (4, c)
    widths, mean = shelf.widths(SHARES)
    norm = np.float32(K1) * (np.float32(1 - B) + np.float32(B / mean) * widths[at])
    found = _postings(shelf, topic)
    out = np.zeros(len(at), np.float32)
    step = max(1, _COUNTS_BYTES // (n + 1))
    for part in (found[i : i + step] for i in range(0, len(found), step)):
        counts = np.zeros((len(part), n + 1), np.uint8)
        for own, (docs, times) in zip(counts, part, strict=True):
            own[docs] = times
        tf = counts[:, at] + SHARES @ counts[:, near].astype(np.float32)  # (T, c)
        out += _weights(n, part) @ (tf / (tf + norm))
    return out / (out.max() + np.float32(1e-9)) if len(out) else out


def _best_of_session(shelf: Shelf, base: Floats, at: Ints) -> Floats:
    """Half the best base score among the candidates of each candidate's session (c,)."""
    sessions = shelf.sessions[at]
    alone = sessions == shelf.number("sessions", "")
    best = np.zeros(len(shelf.names["sessions"]), np.float32)
    np.maximum.at(best, sessions, base[at])
    return np.asarray(np.where(alone, base[at], best[sessions]), np.float32) / np.float32(2)


def _fact_scores(index: Index, query: Query, vector: Floats | None) -> dict[int, float]:
    """Best match (BM25 share + scaled cosine, 0 to 2) among each source's facts, by row."""
    shelf = index.derived
    own = bm25(shelf, _asked(shelf, query.text)[0])
    own /= own.max() + np.float32(1e-9)
    match = (own + _cosines(shelf, vector, None)[1])[:-1]
    allowed = _allowed(shelf, Query("", at=query.at, known_at=query.known_at), ("fact",))
    if allowed is not None:
        match = np.where(allowed, match, 0)
    best = _candidates(match, None, FACTS, positive=True)
    rows, out = shelf.rows[best].tolist(), dict[int, float]()
    origins = index.origins(rows)
    for row, value in zip(rows, match[best].tolist(), strict=True):
        for source in origins[row]:
            out[source] = max(value, out.get(source, 0.0))
    return out


def _lent(rows: Ints, facts: Mapping[int, float]) -> Floats:
    out = np.zeros(len(rows), np.float32)
    lending = np.fromiter(facts, np.int64)
    at = rows.searchsorted(lending)  # candidates stand in the order of their rows
    there = rows[np.minimum(at, len(rows) - 1)] == lending
    out[at[there]] = np.fromiter(facts.values(), np.float32)[there]
    return out


def _named(shelf: Shelf, text: str) -> int:
    """Number of the one actor whom the text names; -1 if it names nobody or several.

    Where chats have only roles, "I" is the user and "you" the assistant.
    """
    found = set(_NAME.findall(text.lower()))
    actors = shelf.names["actors"]
    numbers = [
        number for actor, number in actors.items() if found & set(_NAME.findall(actor.lower()))
    ]
    if not numbers and found & _ME:
        numbers = [actors["user"]] if "user" in actors else []
    elif not numbers and found & _YOU:
        numbers = [actors["assistant"]] if "assistant" in actors else []
    return numbers[0] if len(numbers) == 1 else -1


def _dated(at: Ints, text: str) -> Mask:
    """Which instants lie in the month, year or (give or take a day) day that the text names."""
    match = _DATE.search(text)
    if match is None:
        year = _YEAR.search(text)
        return _years(at) == int(year[1]) if year else np.zeros(len(at), np.bool_)
    months = at.astype("M8[us]").astype("M8[M]").astype(np.int64)
    month = _MONTHS.split().index(match[2].lower())
    inside: Mask = months % 12 == month
    if match[4]:
        inside &= _years(at) == int(match[4])
    if day := int(match[1] or match[3] or 0):
        of_month = at // _DAY - months.astype("M8[M]").astype("M8[D]").astype(np.int64) + 1
        inside &= np.abs(of_month - day) <= 1
    return inside


def _years(at: Ints) -> Ints:
    return at.astype("M8[us]").astype("M8[Y]").astype(np.int64) + 1970


def _allowed(shelf: Shelf, query: Query, kinds: Sequence[str]) -> Mask | None:
    """Which items the query's filters admit; None = all."""
    masks: list[Mask] = []
    holding = shelf.holding(query.at, query.known_at)
    if holding is not None:
        masks.append(holding)
    numbers = [shelf.number("kinds", kind) for kind in kinds]
    if len(shelf.names["kinds"]) > sum(n >= 0 for n in numbers):
        masks.append(np.isin(shelf.kinds, numbers))
    for name, value in (("actors", query.actor), ("sessions", query.session)):
        if value is not None:
            masks.append(getattr(shelf, name) == shelf.number(name, value))
    if query.since is not None:
        masks.append(shelf.at >= query.since)
    if query.until is not None:
        masks.append(shelf.at < query.until)
    if query.rows is not None:
        masks.append(np.isin(shelf.rows, [*query.rows]))
    return np.logical_and.reduce(masks) if masks else None


def _best(scored: Sequence[_Scored], k: int) -> Ranking:
    found: list[tuple[float, int, _Scored, int]] = []
    for one in scored:
        order = np.lexsort((one.rows, -one.total))[:k].tolist()
        found += [(-float(one.total[i]), int(one.rows[i]), one, i) for i in order]
    found.sort(key=lambda f: f[:2])
    del found[k:]
    why = [
        {name: round(float(part[i]), 4) for name, part in one.parts.items() if part[i]}
        for _, _, one, i in found
    ]
    return Ranking([row for _, row, _, _ in found], [-score for score, *_ in found], why)
