"""Do stored thoughts find the same evidence, however a question is put, in fewer tokens?

LoCoMo's observations are the thoughts (a frozen extraction), its questions and fixed paraphrases of
them are asked. Raw recall is the cosine of turns. Thoughts are compared at the number of hits at
which they hold as much evidence as ten raw turns. Further rows: the hash against a flat search, and
what merging costs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress, groupby, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from memwise.bench.data import TUNED, Conversation, Question, locomo
from memwise.bench.engine import Row, paired_interval
from memwise.bench.evidence import expand
from memwise.catalogue import find, load
from memwise.recall.engine.dates import iso
from memwise.recall.engine.embed import Embedder, embedder
from memwise.recall.engine.extract import Given
from memwise.recall.engine.lsh import CrossPolytope
from memwise.recall.engine.policy import Policy
from memwise.recall.engine.text import n_tokens, terms, unspoken
from memwise.recall.memory import Memory

TALKS = ("conv-26", "conv-30", "conv-43", "conv-44", "conv-47")
SEEN = (*TUNED, "conv-43")  # the knobs of think_in_memory were set on these
RAW_HITS = 10
_MOST = 30  # thoughts that are looked at

_OPENINGS = (
    ("When did", "On what date did"), ("When was", "On what date was"),
    ("When is", "At what time is"),
    ("When will", "On what date will"), ("Where did", "In which place did"),
    ("Where does", "In which place does"), ("Where has", "Which places has"),
    ("Where", "In what place"), ("What kind of", "Which sort of"),
    ("What type of", "Which sort of"),
    ("What kinds of", "Which sorts of"), ("What did", "Which thing did"),
    ("What does", "Which thing does"), ("What do", "Which things do"),
    ("What is", "Tell me what is"),
    ("What are", "Tell me what are"), ("What was", "Tell me what was"), ("What", "Which"),
    ("How many", "What number of"), ("How long", "For what length of time"),
    ("How often", "With what frequency"), ("How did", "In what way did"),
    ("How does", "In what way does"), ("How", "In what way"), ("Why did", "For what reason did"),
    ("Why", "For what reason"), ("Who", "Which person"), ("Would", "Is it likely that"),
    ("Which", "What"), ("Is", "Is it true that"), ("Does", "Is it so that"),
)  # fmt: skip
_SYNONYMS = {
    "kids": "children", "children": "kids", "buy": "purchase", "start": "begin",
    "favorite": "preferred", "job": "occupation", "recently": "lately", "movie": "film",
    "movies": "films", "trip": "journey", "plan": "intend", "visit": "go to", "made": "created",
    "big": "large", "help": "assist", "hobbies": "pastimes", "gift": "present", "received": "got",
    "get": "obtain", "feel": "felt", "activities": "pursuits", "meet": "encounter",
    "town": "city", "decide": "choose", "attend": "take part in", "home": "house",
    "talk": "speak", "friends": "pals", "pictures": "photos",
}  # fmt: skip


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Agreement decides; tokens, the hash and merging are context, but must behave."""
    talks = [talk for talk in locomo(data) if talk.name in TALKS]
    encode = _Once(embedder("auto"))
    policies = {
        "raw": load(find(method.name).baseline)(),
        "mine": method,
        "flat": replace(method, probes=method.buckets),
        "apart": method,
    }
    told = {
        name: [_told(policy, talk, encode, tidy=name != "apart") for talk in talks]
        for name, policy in policies.items()
    }
    pairs = [_pairs(talk) for talk in talks]
    groups = [talk.name for talk, some in zip(talks, pairs, strict=True) for _ in some]
    raw = _ask(told["raw"], pairs, RAW_HITS)
    started = time.perf_counter()
    mine = _ask(told["mine"], pairs, _MOST)
    seconds = time.perf_counter() - started
    flat = _ask(told["flat"], pairs, _MOST)
    tuned = np.isin(groups, SEEN)
    agreement, tokens = _consistency(raw, mine, flat, groups, seed, ~tuned, "untouched")
    context, _ = _consistency(raw, mine, flat, groups, seed, tuned, "tuned on")
    asked = [question.text for some in pairs for question, _ in some]
    return [
        replace(agreement, seconds=seconds),
        tokens,
        replace(context, primary=False, behaves={}),
        _hashing(method, talks, encode, asked, seed),
        _merging(told["mine"], told["apart"], talks),
    ]


# ---------------------------------------------------------------- paraphrases


def paraphrase(question: str) -> str:
    """The question put differently by fixed rules; the same text where none applies."""
    for old, new in _OPENINGS:
        if question.startswith(f"{old} "):
            question = new + question.removeprefix(old)
            break
    return re.sub(r"[a-z]+", lambda m: _SYNONYMS.get(m[0], m[0]), question)


def _pairs(talk: Conversation) -> list[tuple[Question, str]]:
    asked = [q for q in talk.questions if q.gold and not q.unanswerable]
    return [(q, other) for q in asked if (other := paraphrase(q.text)) != q.text]


# ---------------------------------------------------------------- memories


class _Once:
    """An embedder that embeds each text once."""

    def __init__(self, inner: Embedder):
        self.dim, self.fingerprint, self._inner = inner.dim, inner.fingerprint, inner
        self._known: dict[str, NDArray[np.float32]] = {}

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        """Unit vectors (n, dim)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known |= zip(new, self._inner.encode(new, role), strict=True)
        return np.stack([self._known[text] for text in texts])


def _told(policy: Policy, talk: Conversation, encode: Embedder, tidy: bool) -> Memory:
    """A memory with the talk and its observations; untidied, it has one session without a name."""
    given: dict[str, list[str]] = {}
    texts = {turn.ref: unspoken(turn.actor, turn.text) for turn in talk.turns}
    for one in talk.observations:
        for ref in one.sources:
            given.setdefault(texts[ref], []).append(one.text)
    now = talk.turns[-1].at
    memory = Memory(
        ":memory:", policy=policy, embedder=encode, llm=Given(given), clock=lambda: iso(now)
    )
    for session, turns in groupby(talk.turns, key=lambda turn: turn.session):
        said = [
            {"content": texts[turn.ref], "actor": turn.actor, "at": iso(turn.at),
             "meta": {"ref": turn.ref}}
            for turn in turns
        ]  # fmt: skip
        memory.add(said, session=session if tidy else "")
    memory.reflect()
    return memory


@dataclass(frozen=True)
class _Found:
    """What a question brought back, best first: for each hit its turns, and its tokens."""

    refs: Sequence[Sequence[str]]
    tokens: Sequence[int]

    def turns(self, k: int) -> set[str]:
        """Turns on which the first k hits rest."""
        return set(expand(self.refs[:k]))


_Pair: TypeAlias = tuple[Question, str]
_Answers: TypeAlias = list[tuple[frozenset[str], _Found, _Found]]


def _ask(memories: Sequence[Memory], pairs: Sequence[Sequence[_Pair]], k: int) -> _Answers:
    """Evidence, what the question found and what its paraphrase found, pair by pair."""
    return [
        (question.gold, _search(memory, question.text, k), _search(memory, other, k))
        for memory, some in zip(memories, pairs, strict=True)
        for question, other in some
    ]


def _search(memory: Memory, question: str, k: int) -> _Found:
    hits = memory.search(question, k=k)
    refs = [[str(source.meta["ref"]) for source in hit.sources] for hit in hits]
    return _Found(refs, [n_tokens(hit.text) for hit in hits])


# ---------------------------------------------------------------- agreement and tokens


def _consistency(
    raw: _Answers, mine: _Answers, flat: _Answers, groups: Sequence[str], seed: int,
    among: NDArray[np.bool_], which: str,
) -> tuple[Row, Row]:  # fmt: skip
    """Agreement and tokens of the pairs `among` all."""
    raw, mine, flat = ([*compress(answers, among)] for answers in (raw, mine, flat))
    groups = [*compress(groups, among)]
    bar = _evidence(raw, RAW_HITS).mean()
    k = _enough(mine, bar)
    agree, rival = _agreement(mine, k), _agreement(raw, RAW_HITS)
    spent, rival_spent = _tokens(mine, k), _tokens(raw, RAW_HITS)
    share = _evidence(mine, k).mean()
    where = f"LoCoMo, {len(set(groups))} conversations that were {which}"
    return (
        Row(
            f"agreement of the evidence, {which}", float(agree.mean()), float(rival.mean()),
            paired_interval(agree, rival, seed, groups=groups), len(agree),
            {"evidence found": float(share), "evidence found, turns": float(bar), "hits": k,
             "all buckets": float(_agreement(flat, _enough(flat, bar)).mean())},
            {"as much evidence as ten turns hold": bool(share >= bar),
             "at most half the tokens": bool(2 * spent.mean() <= rival_spent.mean()),
             "at least 100 pairs": len(agree) >= 100},
            data=where, note="Jaccard of the turns that question and paraphrase come back to",
        ),
        Row(
            "tokens a query", float(spent.mean()), float(rival_spent.mean()),
            paired_interval(spent, rival_spent, seed, groups=groups), len(spent),
            primary=False, data=where, note="lower is better; at equal evidence",
        ),
    )  # fmt: skip


def _enough(answers: _Answers, bar: float) -> int:
    """Fewest hits that hold at least this share of the evidence."""
    able = (k for k in range(1, _MOST) if _evidence(answers, k).mean() >= bar)
    return next(able, _MOST)


def _evidence(answers: _Answers, k: int) -> NDArray[np.float64]:
    """Share of the evidence in the first k hits, mean of question and paraphrase."""
    shares = [[len(one.turns(k) & gold) / len(gold) for one in found] for gold, *found in answers]
    both: NDArray[np.float64] = np.array(shares).mean(axis=1)
    return both


def _agreement(answers: _Answers, k: int) -> NDArray[np.float64]:
    both = [(one.turns(k), other.turns(k)) for _, one, other in answers]
    return np.array([len(a & b) / max(1, len(a | b)) for a, b in both])


def _tokens(answers: _Answers, k: int) -> NDArray[np.float64]:
    spent = [[sum(one.tokens[:k]) for one in found] for _, *found in answers]
    both: NDArray[np.float64] = np.array(spent).mean(axis=1)
    return both


# ---------------------------------------------------------------- the hash


def _hashing(
    method: Any, talks: Sequence[Conversation], encode: _Once, questions: Sequence[str], seed: int
) -> Row:
    """Recall of the ten nearest thoughts by opened buckets, and what had to be compared."""
    thoughts = encode.encode([one.text for talk in talks for one in talk.observations])
    asked = encode.encode(questions)
    hashing = CrossPolytope(encode.dim, method.buckets, method.seed)
    axes = hashing.axes()
    bucket = hashing.closeness(thoughts, axes).argmax(axis=1)
    order = np.argsort(-hashing.closeness(asked, axes), axis=1, kind="stable")
    nearest = np.argsort(-(asked @ thoughts.T), axis=1, kind="stable")[:, :10]
    recall, compared = {}, {}
    for n in (1, 2, method.probes, method.buckets // 2, method.buckets):
        opened = (bucket[None, None] == order[:, :n, None]).any(axis=1)  # (questions, thoughts)
        recall[n] = np.take_along_axis(opened, nearest, axis=1).mean(axis=1)
        compared[n] = opened.mean()
    value, even = recall[method.probes], np.full(len(asked), compared[method.probes])
    chance = _collisions(hashing, seed)
    return Row(
        f"recall@10 of a flat search, {method.probes} of {method.buckets} buckets",
        float(value.mean()), float(even.mean()), paired_interval(value, even, seed), len(value),
        {f"{n} opened": float(found.mean()) for n, found in recall.items()}
        | {f"compared, {n} opened": float(share) for n, share in compared.items()}
        | {f"collision at cosine {cosine}": share for cosine, share in chance.items()},
        {"collisions rise with cosine": _rises(chance.values()),
         "recall rises with the buckets opened": _rises(r.mean() for r in recall.values()),
         "all buckets are a flat search": bool(recall[method.buckets].min() == 1)},
        primary=False, data=f"{len(thoughts)} observations of LoCoMo",
        note="the baseline opens as many thoughts at random",
    )  # fmt: skip


def _collisions(hashing: CrossPolytope, seed: int, n: int = 4000) -> dict[float, float]:
    """Share of random pairs of unit vectors of a given cosine that fall into one bucket."""
    rng = np.random.default_rng(seed)
    a, b = (_unit(rng.standard_normal((n, hashing.dim))) for _ in range(2))
    across = _unit(b - (a * b).sum(axis=1, keepdims=True) * a)
    axes = hashing.axes()
    mine = hashing.closeness(a, axes).argmax(axis=1)
    found = {}
    for cosine in (0.0, 0.25, 0.5, 0.75, 0.95):
        other = (cosine * a + (1 - cosine**2) ** 0.5 * across).astype(np.float32)
        found[cosine] = float((hashing.closeness(other, axes).argmax(axis=1) == mine).mean())
    return found


def _unit(x: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def _rises(values: Iterable[float]) -> bool:
    listed = [*values]
    return all(a < b for a, b in pairwise(listed))


# ---------------------------------------------------------------- merging


def _merging(
    memories: Sequence[Memory], apart: Sequence[Memory], talks: Sequence[Conversation]
) -> Row:
    """Thoughts that are left, and the words of the answers that all thoughts held."""
    counts = np.array([[len(m.view().scan("thought")) for m in some] for some in (memories, apart)])
    words = [[_words(memory) for memory in some] for some in (memories, apart)]
    answers = [frozenset(terms(q.answer)) for talk in talks for q in talk.questions]
    of = np.repeat(np.arange(len(talks)), [len(talk.questions) for talk in talks])
    told = [(a & words[1][i], a & words[0][i]) for a, i in zip(answers, of, strict=True)]
    kept = np.array([len(now) / len(then) for then, now in told if then])
    left = counts[0].sum() / counts[1].sum()
    return Row(
        "answer words that merging leaves", float(kept.mean()), 1.0,
        paired_interval(kept, np.ones(len(kept)), 0), len(kept),
        {"thoughts left": float(left), "thoughts before": float(counts[1].sum())},
        {"merging leaves fewer thoughts": bool(left < 1),
         "and at least 98 % of the answers' words": bool(kept.mean() >= 0.98)},
        primary=False, data=f"LoCoMo, {len(talks)} conversations",
        note="the baseline is the same memory with nothing merged and nothing let go",
    )  # fmt: skip


def _words(memory: Memory) -> frozenset[int]:
    return frozenset(t for item in memory.view().scan("thought") for t in terms(item.text))
