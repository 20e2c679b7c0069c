"""Does a packed context make the right answer likely? A small language model ranks it; no judge.

The local model scores the gold answer of a question, and those of nine other questions of the same
category, after the same context; the context is run once and its cache serves all ten. The gold
answer's negative log-likelihood says how much of it the context holds, its place among the ten how
well it tells it from what is merely fitting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memwise.bench.data import Conversation, Question
from memwise.bench.engine import Row, paired_interval
from memwise.errors import InvalidKnob
from memwise.models import LocalModel

CONTEXT_TOKENS = 256
"""Most tokens of a context, by the count of the memory that packed it."""
N_QUESTIONS = 30
N_CANDIDATES = 10


@dataclass(frozen=True)
class Case:
    """A question, the conversation that answers it, and the answers to choose from, gold first."""

    conversation: str
    question: Question
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """How the gold answers fared.

    Attributes:
        nll: (n,) nats per token of each gold answer.
        reciprocal_rank: (n,) 1 / its place among the candidates; 1 if it was the only one.
        groups: (n,) conversation of each question.
    """

    nll: NDArray[np.float64]
    reciprocal_rank: NDArray[np.float64]
    groups: NDArray[np.str_]

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank."""
        return float(self.reciprocal_rank.mean())


def cases(
    conversations: Iterable[Conversation],
    n: int = N_QUESTIONS,
    seed: int = 0,
    n_candidates: int = N_CANDIDATES,
) -> list[Case]:
    """Draw n questions that have evidence and an answer, each with other answers of its category.

    Raises:
        InvalidKnob: a category has too few different answers, or there are fewer questions.
    """
    asked = [
        (one.name, question)
        for one in conversations
        for question in one.questions
        if question.gold and question.answer and not question.unanswerable
    ]
    if len(asked) < n:
        raise InvalidKnob(f"{n} questions are asked for; {len(asked)} have evidence and an answer")
    rng = np.random.default_rng(seed)
    pools: dict[str, list[str]] = {}
    for _, question in asked:
        pools.setdefault(question.category, []).append(question.answer)
    drawn = [asked[i] for i in rng.permutation(len(asked))[:n]]
    return [
        Case(name, question, _candidates(question, pools[question.category], n_candidates, rng))
        for name, question in drawn
    ]


def _candidates(
    question: Question, pool: Sequence[str], n: int, rng: np.random.Generator
) -> tuple[str, ...]:
    others = sorted({answer for answer in pool if answer.lower() != question.answer.lower()})
    if len(others) < n - 1:
        raise InvalidKnob(f"category {question.category!r} has only {len(others)} other answers")
    chosen = rng.permutation(len(others))[: n - 1]
    return (question.answer, *(others[i] for i in chosen))


def prompt(context: str, question: str) -> str:
    """What the model reads before the answer."""
    return f"{context}\n\nQuestion: {question}\nAnswer:".lstrip()


def answers(model: LocalModel, asked: Sequence[Case], context: Callable[[Case], str]) -> Answers:
    """Score every case after the context that a memory packs for it."""
    nll, places = [], []
    for case in asked:
        text = prompt(context(case), case.question.text)
        found = model.nll_many(text, [f" {answer}" for answer in case.candidates])
        nll.append(found[0])
        places.append(1 / sum(other <= found[0] for other in found))
    groups = np.array([case.conversation for case in asked])
    return Answers(np.array(nll), np.array(places), groups)


def nll_row(method: Answers, baseline: Answers, seed: int) -> Row:
    """Nats per token of the gold answers, method beside baseline; lower is better."""
    interval = paired_interval(method.nll, baseline.nll, seed, groups=_grouped(method))
    n = len(method.nll)
    return Row("gold nll", float(method.nll.mean()), float(baseline.nll.mean()), interval, n)


def mrr_row(method: Answers, baseline: Answers, seed: int) -> Row:
    """Mean reciprocal rank of the gold answers, method beside baseline; higher is better."""
    mine, rival = method.reciprocal_rank, baseline.reciprocal_rank
    interval = paired_interval(mine, rival, seed, groups=_grouped(method))
    return Row("answer MRR", method.mrr, baseline.mrr, interval, len(mine))


def _grouped(found: Answers) -> NDArray[np.str_] | None:
    """Conversations as groups of the resampling; a single one is no group."""
    return found.groups if len(np.unique(found.groups)) > 1 else None
