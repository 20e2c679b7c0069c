"""What does a text of bounded length still say about what was told many sessions ago?

LoCoMo is told session by session. At its end the words of the gold answers are looked for in the
memory's text of B tokens, for questions whose newest evidence is more than five sessions old. A
stream of UTC offsets shows whether superseded values stay, and a second run from saved texts
whether anything but the last text and the session is used.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memwise.bench.data import Conversation, Turn, locomo
from memwise.bench.engine import Row, paired_interval
from memwise.bench.streams import ZoneFact, timezones
from memwise.catalogue import find, load
from memwise.recall.engine.dates import iso
from memwise.recall.engine.extract import Fact, Given, Rules
from memwise.recall.engine.policy import Policy
from memwise.recall.engine.records import Add
from memwise.recall.engine.text import n_tokens, spoken, terms, unspoken
from memwise.recall.memory import Memory
from memwise.recall.policies.recursive_summaries import RecursiveSummaries

TOKENS = (256, 512, 1024)
OLD = 5  # sessions
N_FACTS = 2400
_AT_ONCE = 60  # offsets told in one session
_ALL = 10_000


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """One row for each length, then the stale values (context)."""
    talks = locomo(data)
    baseline = load(find(method.name).baseline)()
    rows = [_held(method, baseline, talks, n, seed) for n in TOKENS]
    return [*rows, _stale(method, baseline, seed)]


def _held(
    method: Policy, baseline: Policy, talks: Sequence[Conversation], tokens: int, seed: int
) -> Row:
    started = time.perf_counter()
    histories = [_history(method, talk, tokens) for talk in talks]
    seconds = time.perf_counter() - started
    texts = {
        "method": [history[-1] for history in histories],
        "baseline": [_history(baseline, talk, tokens)[-1] for talk in talks],
        "newest facts": [_newest(_facts(talk), tokens) for talk in talks],
        "session gists, the newest": [_newest(_gists(talk, 0.2), tokens) for talk in talks],
        "session gists, equal shares": [_shares(_gists(talk, 1.0), tokens) for talk in talks],
        "frozen LLM summaries, equal shares": [
            _shares([talk.summaries[s] for s in _sessions(talk)], tokens) for talk in talks
        ],
        "everything": [" ".join(turn.text for turn in talk.turns) for talk in talks],
    }
    found = {
        name: [_recall(text, _answers(talk)) for text, talk in zip(held, talks, strict=True)]
        for name, held in texts.items()
    }
    # The answers of the next conversation say how much is found without having been told.
    other = [_answers(talk) for talk in [*talks[1:], talks[0]]]
    for name in ("method", "baseline"):
        found[f"answers of another talk, {name}"] = [
            _recall(text, answers) for text, answers in zip(texts[name], other, strict=True)
        ]
    value, rival = np.concatenate(found["method"]), np.concatenate(found["baseline"])
    groups = np.repeat([talk.name for talk in talks], [len(v) for v in found["method"]])
    mean = {name: float(np.concatenate(values).mean()) for name, values in found.items()}
    chance = [mean.pop(f"answers of another talk, {name}") for name in ("method", "baseline")]
    return Row(
        f"answer words in {tokens} tokens", mean.pop("method"), mean.pop("baseline"),
        paired_interval(value, rival, seed, groups=groups), len(value),
        {**mean, "answers of another talk": chance[0]},
        {
            f"{tokens}: never longer": all(n_tokens(m) <= tokens for h in histories for m in h),
            f"{tokens}: more is gained in the own talk than in another": bool(
                value.mean() - chance[0] > rival.mean() - chance[1]
            ),
            f"{tokens}: a text follows from the one before and the session": all(
                _follows(method, talk, history, tokens)
                for talk, history in zip(talks, histories, strict=True)
            ),
        },
        seconds=seconds, bytes=4 * tokens, baseline_bytes=4 * tokens,
        data=f"LoCoMo, evidence more than {OLD} sessions old",
    )  # fmt: skip


# ---------------------------------------------------------------- texts


def _history(
    policy: Policy, talk: Conversation, tokens: int, given: Given | None = None
) -> list[str]:
    """The text after each session: the summary, or in the end what is found first in B tokens."""
    now = 0
    texts = []
    with Memory(
        ":memory:", policy=_bounded(policy, tokens), embedder="none", llm=given,
        clock=lambda: iso(now),
    ) as memory:  # fmt: skip
        for turns in _by_session(talk):
            now = turns[-1].at
            _tell(memory, turns)
            memory.reflect()
            summary = memory.view().scan("summary")
            texts.append(summary[-1].text if summary else "")
        if not texts[-1]:
            hits = memory.search("what was said?", k=_ALL)
            texts.append(_newest([spoken(h.actor, h.text) for h in reversed(hits)], tokens))
    return texts


def _bounded(policy: Policy, tokens: int) -> Policy:
    if not isinstance(policy, RecursiveSummaries):
        return policy
    return replace(policy, summary_tokens=tokens)


def _tell(memory: Memory, turns: Sequence[Turn]) -> None:
    said = [
        {"content": unspoken(turn.actor, turn.text), "actor": turn.actor, "at": iso(turn.at)}
        for turn in turns
    ]
    memory.add(said, session=turns[0].session)


def _by_session(talk: Conversation) -> Iterator[list[Turn]]:
    for _, turns in groupby(talk.turns, key=lambda turn: turn.session):
        yield [*turns]


def _sessions(talk: Conversation) -> list[str]:
    return list(dict.fromkeys(turn.session for turn in talk.turns))


def _newest(texts: Sequence[str], tokens: int) -> str:
    """The longest end of the texts that fits."""
    kept: list[str] = []
    for text in reversed(texts):
        if n_tokens(" ".join([text, *kept])) > tokens:
            break
        kept.insert(0, text)
    return " ".join(kept)


def _shares(texts: Sequence[str], tokens: int) -> str:
    """The beginning of every text, all equally long; needs to know how many will come."""
    return " ".join(text[: 4 * tokens // len(texts) - 1] for text in texts)


def _facts(talk: Conversation) -> list[str]:
    turns = [replace(turn, text=unspoken(turn.actor, turn.text)) for turn in talk.turns]
    return [fact.text for fact in Rules().facts(turns)]


def _gists(talk: Conversation, ratio: float) -> list[str]:
    said = (" ".join(turn.text for turn in turns) for turns in _by_session(talk))
    return [Rules().gist(text, ratio) for text in said]


# ---------------------------------------------------------------- judging


def _answers(talk: Conversation) -> list[frozenset[int]]:
    """Words of the gold answers whose evidence is old by the end."""
    place = {session: i for i, session in enumerate(_sessions(talk))}
    told = {turn.ref: place[turn.session] for turn in talk.turns}
    return [
        words
        for question in talk.questions
        if question.gold and not question.unanswerable
        if max(told[ref] for ref in question.gold) < len(place) - OLD
        if (words := frozenset(terms(question.answer)))
    ]


def _recall(text: str, answers: Iterable[frozenset[int]]) -> NDArray[np.float64]:
    """Share of each answer's words that stand in the text."""
    words = frozenset(terms(text))
    return np.array([len(answer & words) / len(answer) for answer in answers])


def _follows(
    policy: Policy, talk: Conversation, history: Sequence[str], tokens: int, every: int = 6
) -> bool:
    """Does a bank that holds nothing but a saved text write the same next text, byte by byte?"""
    sessions = [*_by_session(talk)]
    steps = [*zip(pairwise(history), sessions[1:], strict=True)]
    return all(
        _rewritten(_bounded(policy, tokens), before, turns) == after
        for (before, after), turns in steps[::every]
    )


def _rewritten(policy: Policy, saved: str, turns: Sequence[Turn]) -> str:
    at = turns[0].at
    with Memory(":memory:", policy=policy, embedder="none", clock=lambda: iso(at)) as memory:
        view = memory.view()
        origin = Add("turn", "(saved)")
        ops = [origin, Add("summary", saved, sources=(origin,))]
        view.store.apply(view.bank, ops, at=at, verb="add", codes={}, policy=policy.name)
        _tell(memory, turns)
        memory.reflect()
        return memory.view().scan("summary")[-1].text


# ---------------------------------------------------------------- values that change


def _stale(method: Policy, baseline: Policy, seed: int) -> Row:
    """How many of the values in the text had been superseded by what was told?"""
    facts, _ = timezones(N_FACTS, seed, 3)
    mine, rival = (_superseded(policy, facts) for policy in (method, baseline))
    difference = mine.mean() - rival.mean()
    return Row(
        "stale values in 512 tokens", float(mine.mean()), float(rival.mean()),
        (float(difference), float(difference)), len(mine), {},
        {
            "stale: values are held": len(mine) >= 10,
            "stale: at most 5 %": bool(mine.mean() <= 0.05),
        },
        primary=False, data=f"tz database, {N_FACTS} offsets in shuffled order",
        note="lower is better; the two texts hold different values, so the interval is a point",
    )  # fmt: skip


def _superseded(policy: Policy, facts: Sequence[ZoneFact]) -> NDArray[np.float64]:
    """For each value in the final text 1 if one that began later had been told."""
    turns = [
        Turn(f"{i}", fact.text, fact.stored, "", f"{i // _AT_ONCE}") for i, fact in enumerate(facts)
    ]
    newest: dict[str, int] = {}
    for fact in facts:
        newest[fact.zone] = max(fact.valid_from, newest.get(fact.zone, fact.valid_from))
    text = _offsets(policy, Conversation("zones", turns, ()), facts)
    return np.array(
        [
            float(fact.valid_from < newest[fact.zone])
            for fact in facts
            if fact.text.rstrip(".") in text
        ]
    )


def _offsets(policy: Policy, talk: Conversation, facts: Sequence[ZoneFact]) -> str:
    known = {
        fact.text: Fact(
            fact.zone, "utc offset", fact.offset, fact.text, 0, fact.valid_from, None, True
        )
        for fact in facts
    }
    given = Given({text: [fact] for text, fact in known.items()})
    return _history(policy, talk, 512, given)[-1]
