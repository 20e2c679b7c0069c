"""Can paging follow a chain of keys that no single search finds, from a window of 600 tokens?

140 UUID pairs lie in the archive; the value of a key may be a key itself, up to five times. The
controller is a fixed routine that sees its context and nothing else, so that what is measured is
the memory. LoCoMo, told turn by turn through a window of 1,000 tokens, shows what each store adds
to what can be reached; these rows are context.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from memwise.bench.data import Conversation, data_folder, locomo
from memwise.bench.engine import Row, paired_interval
from memwise.bench.reading import readable, spoken_texts, told
from memwise.catalogue import find, load
from memwise.errors import BudgetExceeded, InvalidKnob
from memwise.recall.engine.controller import Agent, Answer, Decision, Scripted, ToolCall
from memwise.recall.engine.dates import iso
from memwise.recall.engine.policy import Policy
from memwise.recall.engine.text import n_tokens
from memwise.recall.engine.tools import tools
from memwise.recall.memory import Memory

WINDOW = 600
PAIRS = 140
DEPTHS = range(6)
TASKS = 8  # of each depth
PAGE = 1  # passages of a page: whether a key stands in one as key or as value is seen by paging
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_TASK = re.compile(rf"task: key ({_UUID}) page (\d+)")
_MINUTE = 60_000_000


@dataclass(frozen=True)
class Chain:
    """140 pairs, the key asked for and the value at the end of its chain."""

    pairs: tuple[tuple[str, str], ...]
    key: str
    answer: str
    depth: int

    @property
    def question(self) -> str:
        """What the user asks."""
        return f"What is the value of {self.key}? If a value is a key itself, look on."


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Depths 1 to 5 decide; depth 0 and LoCoMo are context."""
    baseline = load(find(method.name).baseline)()
    chains = [*_chains(data, seed)]
    windowed = replace(method, window_tokens=WINDOW)
    sizes: list[int] = []
    mine = np.array([_paged(windowed, c, sizes) == c.answer for c in chains], np.float64)
    once = np.array([_single(baseline, c) == c.answer for c in chains], np.float64)
    depth = np.array([c.depth for c in chains])
    behaves = {
        "every depth is solved every time": bool(mine.all()),
        f"every context fits {WINDOW} tokens": max(sizes) <= WINDOW,
        "a single shot solves depth 0": bool(once[depth == 0].all()),
        "left in the middle of a chain, another agent ends it from the file": _resumes(
            windowed, chains[-1]
        ),
        "a block edit over the limit is rejected and changes nothing": _rejects(method),
    }
    rows = []
    for name, at in (("depth 1-5", depth > 0), ("depth 0", depth == 0)):
        rows.append(
            Row(
                f"solved, {name}", float(mine[at].mean()), float(once[at].mean()),
                paired_interval(mine[at], once[at], seed), int(at.sum()),
                {f"single shot, depth {d}": float(once[depth == d].mean()) for d in DEPTHS},
                behaves if at[-1] else {}, primary=bool(at[-1]),
                data=f"kv_retrieval, {PAIRS} pairs, window of {WINDOW} tokens",
            )
        )  # fmt: skip
    return [*rows, _reachable(method, data, seed)]


def _chains(data: Path | None, seed: int) -> Iterator[Chain]:
    """Real UUIDs; the values of a chain's keys are replaced by the next key."""
    path = data_folder(data) / "kv_retrieval" / "kv75_dev.jsonl.gz"
    if not path.exists():
        raise InvalidKnob(f"{path} is missing; check --data")
    with gzip.open(path, "rt") as lines:
        records = [json.loads(line)["ordered_kv_records"] for line in lines]
    rng = np.random.default_rng(seed)
    for depth in DEPTHS:
        for task in range(TASKS):
            n = 2 * (depth * TASKS + task)
            pairs = [tuple(p) for p in (records[n] + records[n + 1])[:PAIRS]]
            at = rng.choice(PAIRS, depth + 1, replace=False).tolist()
            for i, j in pairwise(at):
                pairs[i] = (pairs[i][0], pairs[j][0])
            yield Chain(tuple(pairs), pairs[at[0]][0], pairs[at[-1]][1], depth)


# ---------------------------------------------------------------- the two ways to answer


def routine(context: str) -> Decision:
    """Look a key up page by page, go on with its value, answer with what is no key."""
    task = _TASK.search(context)
    if task is None:
        asked = re.findall(rf"value of ({_UUID})", context)[-1]
        return ToolCall("core_memory_append", {"label": "task", "text": f"key {asked} page 0"})
    key, page = task[1], int(task[2])
    call = {"query": key, "page": page}
    results = re.findall(rf"tool: archival_memory_search\({re.escape(json.dumps(call))}\): (.*)",
                         context)  # fmt: skip
    if not results:
        return ToolCall("archival_memory_search", call)
    value = re.search(rf"{key}: ({_UUID})", results[-1])
    if value is None and key not in results[-1]:
        return Answer(key)
    following = f"key {value[1]} page 0" if value else f"key {key} page {page + 1}"
    edit = {"label": "task", "old": f"key {key} page {page}", "new": following}
    return ToolCall("core_memory_replace", edit)


def _paged(policy: Any, chain: Chain, sizes: list[int]) -> str | None:
    with _archive(policy, chain, ":memory:") as memory:
        agent = _agent(memory, policy, lambda context: sizes.append(n_tokens(context)))
        return agent.ask(chain.question)


def _agent(memory: Memory, policy: Any, seen: Callable[[str], None]) -> Agent:
    return Agent(
        memory, Scripted(routine), tools(memory, policy, PAGE),
        lambda: policy.main_context(memory.view()), seen=seen,
    )  # fmt: skip


def _single(policy: Policy, chain: Chain) -> str:
    """Follow the chain through what one search brought into the window."""
    with _archive(policy, chain, ":memory:") as memory:
        text = memory.context(chain.question, tokens=WINDOW).text
    found = dict(re.findall(rf"^({_UUID}): ({_UUID})$", text, re.MULTILINE))
    key = chain.key
    while key in found:
        key = found[key]
    return key


def _archive(policy: Policy, chain: Chain, path: str | Path) -> Memory:
    now = [0]

    def clock() -> str:
        now[0] += _MINUTE
        return iso(now[0])

    memory = Memory(path, policy=policy, embedder="ngrams", clock=clock)
    memory.add([f"{key}: {value}" for key, value in chain.pairs])
    return memory


# ---------------------------------------------------------------- what must hold


def _resumes(policy: Any, chain: Chain) -> bool:
    """The first agent stops after seven steps without a word; the second knows only the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "agent.db")
        with _archive(policy, chain, path) as memory:
            first = _agent(memory, policy, lambda context: None)
            unfinished = replace(first, most_steps=7).ask(chain.question) is None
        with Memory(path, policy=policy) as again:
            return unfinished and _agent(again, policy, lambda c: None).resume() == chain.answer


def _rejects(policy: Any) -> bool:
    with Memory(":memory:", policy=policy, embedder="none", clock=lambda: 0) as memory:
        memory.add("I like tea.", actor="user")
        memory.act(lambda step: policy.edited(step, "human", "", "likes tea"))
        before = [block.text for block in memory.view().scan("block")]
        try:
            memory.act(lambda step: policy.edited(step, "human", "", "x" * policy.block_chars))
        except BudgetExceeded:
            return before == [block.text for block in memory.view().scan("block")]
    return False


# ---------------------------------------------------------------- LoCoMo through a window


def _reachable(method: Any, data: Path | None, seed: int) -> Row:
    """Share of the evidence's words in the context, one store after the other switched on."""
    arms = {
        "queue": replace(method, recall_ratio=0.0, archive_ratio=0.0),
        "queue and summary": replace(method, recall_ratio=0.0, archive_ratio=0.0),
        "and recall storage": replace(method, archive_ratio=0.0),
        "and archive": method,
    }
    talks = locomo(data)[:4]
    parts = [_one(talk, arms) for talk in talks]
    values = {name: np.concatenate([found[name] for found, _ in parts]) for name in arms}
    groups = np.repeat([t.name for t in talks], [len(found["queue"]) for found, _ in parts])
    means = {name: float(value.mean()) for name, value in values.items()}
    mine, rival = values["and archive"], values["queue"]
    return Row(
        "evidence words reached", means["and archive"], means["queue"],
        paired_interval(mine, rival, seed, groups=groups), len(mine), means,
        {
            "the summary adds to the queue": means["queue and summary"] > means["queue"],
            "recall storage adds most": means["and recall storage"]
            > 2 * means["queue and summary"],
            "evicted messages are found by date": all(dated for _, dated in parts),
        },
        primary=False, data=f"LoCoMo, {len(talks)} conversations, {method.window_tokens} tokens",
        note="the baseline of this row is the queue alone",
    )  # fmt: skip


def _one(talk: Conversation, arms: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    texts = spoken_texts(talk)
    asked = [q for q in talk.questions if q.gold and not q.unanswerable]
    found = {}
    with told(talk, arms["and archive"], "none", at_once=False) as memory:
        for name, policy in arms.items():
            memory.policy = policy
            packed = [memory.context(q.text, tokens=policy.window_tokens) for q in asked]
            if name == "queue":
                turns = [tuple(p for p in c.parts if p.kind == "turn") for c in packed]
                packed = [replace(c, parts=t) for c, t in zip(packed, turns, strict=True)]
            found[name] = np.array(
                [readable(c, q.gold, texts) for c, q in zip(packed, asked, strict=True)]
            )
        return found, _dated(memory, talk)


def _dated(memory: Memory, talk: Conversation) -> bool:
    """Every turn of the first session, evicted long ago, comes back page by page."""
    first = [turn for turn in talk.turns if turn.session == talk.turns[0].session]
    by_date = next(
        t for t in tools(memory, memory.policy, 50)  # type: ignore[arg-type]
        if t.name == "conversation_search_date"
    )  # fmt: skip
    page = by_date.call(start=iso(first[0].at), end=iso(first[-1].at + 1))
    return all(turn.text in page for turn in first)
