"""Reference recipes in memory: what a plain ranking of the turns reaches, and what chance does.

A recipe is a function of one `Signals`. These are bars and controls, not a memory: nothing is
stored, nothing is incremental, and they share no code with the engine they are compared with.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from memwise.bench.data import Conversation, Question
from memwise.bench.evidence import Search
from memwise.errors import InvalidKnob

Encode: TypeAlias = Callable[[Sequence[str]], NDArray[np.float32]]
Scores: TypeAlias = NDArray[np.float64]

NEIGHBOUR_WEIGHT = 0.35
SPEAKER_BONUS = 0.2
_K1, _B = 1.2, 0.75
_EPSILON = 1e-9
_ENDINGS = ("ing", "edly", "ed", "ies", "es", "s", "ly")
_STOP_WORDS = (
    "a an the of to in on at for and or is are was were be been do does did what when where who "
    "how which why with by from that this it its as has have had he she they his her their i you "
    "we my your"
)
_STOP = frozenset(_STOP_WORDS.split())


def terms(text: str) -> list[str]:
    """Lower-case words without stop words, stripped of one common ending."""
    return [_stem(word) for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _STOP]


def _stem(word: str) -> str:
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


class Lexicon:
    """BM25 over fixed texts, as one run of (document, weight) a term.

    Args:
        texts: T documents.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(terms(text)) for text in texts]
        self._term = {term: i for i, term in enumerate(sorted(set().union(*counts)))}
        entries = [
            (self._term[term], row, n)
            for row, count in enumerate(counts)
            for term, n in count.items()
        ]
        term, row, n = np.array(sorted(entries), np.int64).reshape(-1, 3).T  # each (P,) postings
        length = np.array([count.total() for count in counts], np.float64)  # (T,)
        norm = _K1 * (1 - _B + _B * length / max(length.mean(), _EPSILON))
        df = np.bincount(term, minlength=len(self._term))
        idf = np.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        self._row = row
        self._weight = idf[term] * n * (_K1 + 1) / (n + norm[row])
        self._start = np.searchsorted(term, np.arange(len(self._term) + 1))
        self._n_texts = len(texts)

    def scores(self, query: str) -> Scores:
        """BM25 of every document, shape (T,)."""
        score = np.zeros(self._n_texts)
        for term in {self._term[t] for t in terms(query) if t in self._term}:
            run = slice(self._start[term], self._start[term + 1])
            score[self._row[run]] += self._weight[run]  # a document stands once in a run
        return score


@dataclass(frozen=True)
class Bank:
    """The turns of one conversation, ready to be ranked.

    Attributes:
        refs: refs of the T turns, in the order of telling.
        actors: their speakers, lower case.
        joined: (T,) whether a turn follows the one before it in the same session.
        lexicon: their words.
        vectors: their embeddings (T, D); None without an encoder.
    """

    refs: Sequence[str]
    actors: Sequence[str]
    joined: NDArray[np.bool_]
    lexicon: Lexicon
    vectors: NDArray[np.float32] | None


@dataclass
class Signals:
    """What a recipe may look at.

    Attributes:
        question: the question.
        bank: the turns.
        asked: embedding of the question (D,); None without an encoder.
        seed: for the recipes that draw.
    """

    question: Question
    bank: Bank
    asked: NDArray[np.float32] | None
    seed: int

    @cached_property
    def lexical(self) -> Scores:
        """BM25 (T,)."""
        return self.bank.lexicon.scores(self.question.text)

    @cached_property
    def dense(self) -> Scores:
        """Cosine (T,)."""
        if self.bank.vectors is None or self.asked is None:
            raise InvalidKnob("this recipe compares embeddings; give an encoder by encode=")
        cosine: Scores = (self.bank.vectors @ self.asked).astype(np.float64)
        return cosine

    @cached_property
    def z(self) -> Scores:
        """Both, each scaled to at most one, added (T,)."""
        low, high = self.dense.min(), self.dense.max()
        lexical = self.lexical / (self.lexical.max() + _EPSILON)
        both: Scores = lexical + (self.dense - low) / (high - low + _EPSILON)
        return both


def _rrf(s: Signals, c: int) -> Scores:
    fused = np.zeros(len(s.bank.refs))
    for scores in (s.lexical, s.dense):
        fused[np.argsort(-scores, kind="stable")] += 1 / (c + np.arange(len(fused)))
    return fused


def _smooth(s: Signals) -> Scores:
    score = s.z.copy()
    score[1:] += NEIGHBOUR_WEIGHT * s.z[:-1] * s.bank.joined[1:]
    score[:-1] += NEIGHBOUR_WEIGHT * s.z[1:] * s.bank.joined[1:]
    return score


def _speaker(s: Signals) -> Scores:
    named = set(re.findall(r"\w+", s.question.text.lower()))
    return _smooth(s) + SPEAKER_BONUS * np.array([actor in named for actor in s.bank.actors])


def _random(s: Signals) -> Scores:
    rng = np.random.default_rng((s.seed, zlib.crc32(s.question.text.encode())))
    return rng.random(len(s.bank.refs))


RECIPES: Mapping[str, Callable[[Signals], Scores]] = {
    "bm25": lambda s: s.lexical,
    "cosine": lambda s: s.dense,
    "rrf60": partial(_rrf, c=60),
    "rrf1": partial(_rrf, c=1),
    "z": lambda s: s.z,
    "smooth": _smooth,
    "speaker": _speaker,
    "random": _random,
    "most_recent": lambda s: np.arange(len(s.bank.refs), dtype=np.float64),
    "oracle": lambda s: np.array([ref in s.question.gold for ref in s.bank.refs], np.float64),
}


def floor(
    recipe: str, encode: Encode | None = None, seed: int = 0, depth: int = 50
) -> Callable[[Conversation], Search]:
    """A `build` for `evidence.evaluate` that ranks the turns by a reference recipe.

    Args:
        recipe: a key of `RECIPES`.
        encode: texts -> unit vectors (n, D); needed by all recipes that look at meaning.
        seed: of the recipe `random`.
        depth: turns returned.

    Raises:
        InvalidKnob: no such recipe.
    """
    if recipe not in RECIPES:
        raise InvalidKnob(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}")
    score = RECIPES[recipe]

    def build(conversation: Conversation) -> Search:
        bank = _bank(conversation, encode)

        def search(question: Question) -> list[str]:
            asked = None if encode is None else encode([question.text])[0]
            scores = score(Signals(question, bank, asked, seed))
            best = np.argsort(-scores, kind="stable")[:depth]
            return [bank.refs[i] for i in best]

        return search

    return build


def _bank(conversation: Conversation, encode: Encode | None) -> Bank:
    turns = conversation.turns
    texts = [turn.text for turn in turns]
    sessions = np.array([turn.session for turn in turns])
    return Bank(
        refs=[turn.ref for turn in turns],
        actors=[turn.actor.lower() for turn in turns],
        joined=np.append(False, sessions[1:] == sessions[:-1]),
        lexicon=Lexicon(texts),
        vectors=None if encode is None else np.asarray(encode(texts), np.float32),
    )
