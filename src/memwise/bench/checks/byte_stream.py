"""What is still found when a quarter of the bytes is kept, and some questions come again and again?

LoCoMo is told session by session; after each, 25 questions are drawn by a Zipf law from those whose
evidence was told. BM25 finds five turns, the policy sees them, and forgets by its own order when
the turns' bytes exceed the budget. The statistics come from a bare stream of turns (the policy's
hooks, no file), the last row from a file under a real byte budget.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memwise.bench.data import Conversation, Question, Turn, locomo, memorybank
from memwise.bench.engine import Row, paired_interval
from memwise.bench.evidence import recall_at
from memwise.bench.floors import Lexicon, floor
from memwise.bench.streams import Ask, zipf_stream
from memwise.budget import Budget
from memwise.catalogue import find, load
from memwise.recall.engine.dates import iso
from memwise.recall.engine.pack import Candidate
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.records import Item, Touch
from memwise.recall.engine.text import unspoken
from memwise.recall.memory import Memory

KEPT_RATIO = 0.25
N_ASKS = 25
N_SEEDS = 5
K = 5
BUDGET = Budget("1280KiB")  # of the file: leaves about a quarter of the turns' text
_CONTROLS = ("fifo", "random_eviction", "lru", "lfu", "reversed_retention")
_SECOND = 1_000_000


@dataclass(frozen=True)
class Asked:
    """Recall of every question of one run, in order.

    Attributes:
        recall: (n,) share of the evidence among the first five.
        again: (n,) whether the question was asked before.
        group: (n,) conversation.
    """

    recall: NDArray[np.float64]
    again: NDArray[np.bool_]
    group: NDArray[np.str_]

    @classmethod
    def of(cls, answers: Sequence[tuple[float, bool, str]]) -> Asked:
        """From (recall, asked before, conversation) of each question."""
        recall, again, group = zip(*answers, strict=True)
        return cls(np.array(recall), np.array(again), np.array(group))

    def mean(self, again: bool) -> float:
        """Mean recall of the questions asked again, or of those asked first."""
        return float(self.recall[self.again == again].mean())


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Re-asked questions decide; first-asked ones, the file and MemoryBank's own are context."""
    card = find(method.name)
    others = {name: load(name)() for name in _CONTROLS if name != method.name}
    talks = [_Talk(conversation) for conversation in locomo(data)]
    started = time.perf_counter()
    mine = _streamed(method, talks, seed)
    seconds = time.perf_counter() - started
    found = {name: _streamed(policy, talks, seed) for name, policy in others.items()}
    rival = found.get(card.baseline, mine)
    where = f"LoCoMo, {len(talks)} conversations x {N_SEEDS} seeds, {KEPT_RATIO:.0%} of the bytes"
    rows = [
        _row(name, again, mine, rival, found, seed, seconds=seconds, data=where)
        for name, again in ((f"R@{K} re-asked", True), (f"R@{K} first-asked", False))
    ]
    if method.name == "memorybank":
        rows[0] = replace(rows[0], behaves=_behaviour(mine, found))
    baseline = load(card.baseline)()
    return [*rows, _filed(method, baseline, talks, seed), _probes(method, baseline, seed)]


def _row(
    metric: str, again: bool, mine: Asked, rival: Asked, found: dict[str, Asked], seed: int,
    **more: Any,
) -> Row:  # fmt: skip
    at = mine.again == again
    interval = paired_interval(mine.recall[at], rival.recall[at], seed, groups=mine.group[at])
    return Row(
        metric, mine.mean(again), rival.mean(again), interval, int(at.sum()),
        {name: asked.mean(again) for name, asked in found.items()}, primary=again, **more,
    )  # fmt: skip


def _behaviour(mine: Asked, found: dict[str, Asked]) -> dict[str, bool]:
    """The curve lies between recency and frequency, and its exponent matters."""
    lru, lfu, turned = found["lru"], found["lfu"], found["reversed_retention"]
    return {
        "re-asked: more than LRU finds": mine.mean(True) > lru.mean(True),
        "first-asked: more than LFU finds": mine.mean(False) > lfu.mean(False),
        "re-asked: the reversed exponent loses": turned.mean(True) < mine.mean(True),
        "re-asked: the reversed exponent loses to chance": turned.mean(True)
        < found["random_eviction"].mean(True),
    }


# ---------------------------------------------------------------- without a file


class _Talk:
    """A conversation with the BM25 of each of its questions over all its turns."""

    def __init__(self, conversation: Conversation):
        self.conversation = conversation
        self.number = {turn.ref: i for i, turn in enumerate(conversation.turns)}
        self.sizes = [len(turn.text.encode()) for turn in conversation.turns]
        lexicon = Lexicon([turn.text for turn in conversation.turns])
        self._scores = {q: lexicon.scores(q.text) for q in conversation.questions}

    def best(self, question: Question, held: Sequence[int]) -> list[int]:
        """Numbers of the five best turns that are still there."""
        at = np.array(held)
        return [int(i) for i in at[np.argsort(-self._scores[question][at], kind="stable")[:K]]]


def _streamed(policy: Policy, talks: Sequence[_Talk], seed: int) -> Asked:
    with Memory(":memory:", policy=policy, embedder="none", clock=lambda: 0) as memory:
        view = memory.view()
    return Asked.of(
        [
            answer
            for talk, n in itertools.product(talks, range(N_SEEDS))
            for answer in _stream(policy, talk, view, N_SEEDS * seed + n)
        ]
    )


def _stream(
    policy: Policy, talk: _Talk, view: Step, seed: int
) -> Iterator[tuple[float, bool, str]]:
    """Tell and ask one conversation; the items live in a dictionary instead of a file."""
    held: dict[int, Item] = {}
    limit, used, now = KEPT_RATIO * sum(talk.sizes), 0, 0
    turns = talk.conversation.turns
    for event in zipf_stream(talk.conversation, seed, N_ASKS):
        if isinstance(event, Turn):
            i, now = talk.number[event.ref], event.at
            held[i] = Item(
                i, "turn", event.text, event.actor, event.session, now, now, last_use=now
            )
            used += talk.sizes[i]
            if used > limit:
                used -= _forget(policy, talk, held, now, used - limit)
            continue
        now += _SECOND
        best = talk.best(event.question, [*held])
        found = [Candidate(held[i], 1 / (1 + place)) for place, i in enumerate(best)]
        for op in policy.on_recall(replace(view, now=now, found=found)):
            held |= _touched(op, now) if isinstance(op, Touch) else {}
        refs = [turns[i].ref for i in best]
        yield recall_at(refs, event.question.gold, K), event.again, talk.conversation.name


def _forget(policy: Policy, talk: _Talk, held: dict[int, Item], now: int, excess: float) -> int:
    """Drop the items of lowest retention until `excess` bytes are free; return the bytes."""
    items = [*held.values()]
    worth = policy.retention(items, now)
    freed = 0
    for n in sorted(range(len(items)), key=lambda n: (worth[n], items[n].row)):
        if freed >= excess:
            break
        freed += talk.sizes[items[n].row]
        del held[items[n].row]
    return freed


def _touched(op: Touch, now: int) -> dict[int, Item]:
    items = [ref for ref in op.items if isinstance(ref, Item)]
    return {
        item.row: replace(item, strength=item.strength + op.gain, uses=item.uses + 1, last_use=now)
        for item in items
    }


# ---------------------------------------------------------------- a file under a budget


def _filed(method: Policy, baseline: Policy, talks: Sequence[_Talk], seed: int) -> Row:
    """All conversations in one bank, by date of their sessions, in a file that may not grow."""
    started = time.perf_counter()
    mine, peak, kept = _in_a_file(method, talks, seed)
    seconds = time.perf_counter() - started
    rival, rival_peak, _ = _in_a_file(baseline, talks, seed)
    at = mine.again
    return Row(
        f"R@{K} re-asked, one file of {BUDGET}", mine.mean(True), rival.mean(True),
        paired_interval(mine.recall[at], rival.recall[at], seed, groups=mine.group[at]),
        int(at.sum()),
        {"share of the turns' bytes that was left": kept, "first-asked": mine.mean(False),
         "first-asked, baseline": rival.mean(False)},
        {"the file never exceeded its budget": max(peak, rival_peak) <= BUDGET},
        primary=False, bytes=peak, baseline_bytes=rival_peak, seconds=seconds,
        data=f"LoCoMo, {len(talks)} conversations in one bank",
    )  # fmt: skip


def _in_a_file(policy: Policy, talks: Sequence[_Talk], seed: int) -> tuple[Asked, int, float]:
    """What was found, the most bytes ever held, and the share of the turns' bytes at the end."""
    now, peak = 0, 0
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stream.db")
        with Memory(
            path, policy=policy, embedder="none", budget=BUDGET, clock=lambda: iso(now)
        ) as memory:
            for talk, turns, asks in _sessions(talks, seed):
                for turn in turns:
                    now = max(now, turn.at)
                    memory.add(
                        unspoken(turn.actor, turn.text), at=iso(turn.at), actor=turn.actor,
                        session=f"{talk.conversation.name}/{turn.session}",
                        meta={"ref": f"{talk.conversation.name}/{turn.ref}"},
                    )  # fmt: skip
                    peak = max(peak, _held_bytes(memory))
                for ask in asks:
                    now += _SECOND
                    refs = [str(hit.meta["ref"]) for hit in memory.search(ask.question.text, k=K)]
                    gold = {f"{talk.conversation.name}/{ref}" for ref in ask.question.gold}
                    answers.append((recall_at(refs, gold, K), ask.again, talk.conversation.name))
                    peak = max(peak, _held_bytes(memory))
            left = sum(len(item.text.encode()) for item in memory.view().scan("turn"))
    total = sum(sum(talk.sizes) for talk in talks)
    return Asked.of(answers), peak, left / total


def _sessions(talks: Sequence[_Talk], seed: int) -> Iterator[tuple[_Talk, list[Turn], list[Ask]]]:
    """The sessions of all conversations by date, each with the questions that follow it."""
    parts = []
    for talk in talks:
        stream = zipf_stream(talk.conversation, seed, N_ASKS)
        for _, group in itertools.groupby(stream, key=lambda event: event.session):
            events = [*group]
            turns = [event for event in events if isinstance(event, Turn)]
            parts.append((talk, turns, [event for event in events if isinstance(event, Ask)]))
    return iter(sorted(parts, key=lambda part: part[1][0].at))


def _held_bytes(memory: Memory) -> int:
    """File, WAL and shared memory as the file system sees them, and the indexes in RAM."""
    files = Path(memory.path).parent.glob(Path(memory.path).name + "*")
    return sum(file.stat().st_size for file in files) + memory.index_bytes()


# ---------------------------------------------------------------- MemoryBank's own questions


def _probes(method: Policy, baseline: Policy, seed: int) -> Row:
    """Ten days of chat a user, and the questions that ship with the fixture: recall at six."""
    mine, rival = (partial(_six, policy) for policy in (method, baseline))
    users = [one for one in memorybank() if one.questions]
    values = [mine(one) for one in users]
    others = [rival(one) for one in users]
    groups = np.repeat([one.name for one in users], [len(v) for v in values])
    value, other = np.concatenate(values), np.concatenate(others)
    interval = paired_interval(value, other, seed, groups=groups)
    floors = {
        name: float(np.concatenate([_floor(name, one, seed) for one in users]).mean())
        for name in ("bm25", "most_recent", "random")
    }
    return Row(
        "R@6 of the probing questions", float(value.mean()), float(other.mean()), interval,
        len(value), floors, primary=False, data=f"MemoryBank, {len(users)} users",
        note="nothing is forgotten here, so policies that rank alike find alike",
    )  # fmt: skip


def _answerable(user: Conversation) -> list[Question]:
    return [q for q in user.questions if q.gold and not q.unanswerable]


def _best_of(refs: Sequence[str], question: Question) -> float:
    return max(recall_at(refs, gold, 6) for gold in (question.gold, *question.alternatives))


def _six(policy: Policy, user: Conversation) -> NDArray[np.float64]:
    now = user.turns[-1].at
    with Memory(":memory:", policy=policy, clock=lambda: iso(now)) as memory:
        for turn in user.turns:
            memory.add(
                unspoken(turn.actor, turn.text), at=iso(turn.at), actor=turn.actor,
                session=turn.session, meta={"ref": turn.ref},
            )  # fmt: skip
        return np.array(
            [
                _best_of([str(hit.meta["ref"]) for hit in memory.search(q.text, k=6)], q)
                for q in _answerable(user)
            ]
        )


def _floor(recipe: str, user: Conversation, seed: int) -> NDArray[np.float64]:
    search = floor(recipe, seed=seed, depth=6)(user)
    return np.array([_best_of(search(q), q) for q in _answerable(user)])
