"""Lines of memories beside isolated ones: chats, and values that change.

- LoCoMo, multi-hop and temporal questions, frozen observations as memories: all evidence in a pack
  of 500 tokens
- time zones told in shuffled order: "was it X before Y?" can be answered only from a pack that
  holds the old and the new value
- controls: memory that deletes what was updated; lines followed, but in no order of time
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memwise import catalogue
from memwise.bench.data import Conversation, Question, locomo
from memwise.bench.engine import Row, paired_interval
from memwise.bench.evidence import Pack, Part, Table, evaluate_packs, paired_row
from memwise.bench.frozen import Frozen, told
from memwise.bench.memo import Memo
from memwise.bench.streams import ZoneFact, timezones
from memwise.recall.engine.dates import iso
from memwise.recall.engine.extract import Fact, Given
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Ranking
from memwise.recall.engine.records import Context
from memwise.recall.memory import Memory
from memwise.recall.policies.last_write_wins import LastWriteWins
from memwise.recall.policies.theanine import Theanine

METRIC = "pack all@500"
CATEGORIES = ("multi-hop", "temporal")
N_FACTS, N_PROBES, PROBE_TOKENS = 600, 200, 160


@dataclass(frozen=True)
class Isolated(Theanine):
    """The same memories; no line is followed."""

    def rank(self, step: Step) -> Ranking:
        """The recipe alone."""
        return step.rank(self.recipe)


@dataclass(frozen=True)
class Backwards(Theanine):
    """Lines are followed, but packed against the direction of their links."""

    def pack(self, step: Step) -> Context:
        """Newest first."""
        packed = super().pack(step)
        return replace(packed, parts=packed.parts[::-1])


def run(method: Policy, data: Path | None, seed: int) -> list[Row]:
    """Primary: evidence of LoCoMo and the probe; the method beside its card's baseline."""
    baseline = catalogue.load(f"recall/{method.card.baseline}")()
    return [_locomo(method, baseline, data, seed), _probe(method, baseline, seed)]


def _controls(method: Policy) -> tuple[Policy, Policy]:
    """The method without its lines, and with lines packed backwards."""
    base = method if isinstance(method, Theanine) else Theanine()
    knobs = {field.name: getattr(base, field.name) for field in fields(base)}
    return Isolated(**knobs), Backwards(**knobs)


def _locomo(method: Policy, baseline: Policy, data: Path | None, seed: int) -> Row:
    conversations = [
        replace(c, questions=[q for q in c.questions if q.category in CATEGORIES])
        for c in locomo(data)
    ]
    memo, frozen = Memo("minilm"), Frozen(conversations)

    def packed(policy: Policy) -> Table:
        def build(one: Conversation) -> Pack:
            memory = told(policy, one, memo, frozen)
            return lambda question, tokens: _parts(memory, question, tokens)

        return evaluate_packs(build, conversations)

    other, unlined = packed(baseline), packed(_controls(method)[0])
    began = time.perf_counter()
    mine = packed(method)
    seconds = time.perf_counter() - began
    row = paired_row(METRIC, mine, other, seed, controls={"no line followed": unlined})
    by_category = {
        f"{who}, {kind}": float(table[METRIC][table["category"] == kind].mean())
        for who, table in (("method", mine), ("baseline", other))
        for kind in CATEGORIES
    }
    return replace(
        row, controls={**row.controls, **by_category}, seconds=seconds,
        data="locomo dev, multi-hop and temporal, frozen observations",
    )  # fmt: skip


def _parts(memory: Memory, question: Question, tokens: int) -> list[Part]:
    return [
        Part(part.text, part.kind, tuple(source.meta["ref"] for source in part.sources))
        for part in memory.context(question.text, tokens).parts
    ]


def _probe(method: Policy, baseline: Policy, seed: int) -> Row:
    """Share of questions whose pack holds the value before and the one after, old before new."""
    facts, _ = timezones(N_FACTS, seed)
    asked = _changes(facts, seed)
    policies: dict[str, Policy] = {
        "method": method, "baseline": baseline, "delete on update": LastWriteWins(),
        "against the links": _controls(method)[1],
    }  # fmt: skip
    both: dict[str, NDArray[np.float64]] = {}
    ordered: dict[str, NDArray[np.float64]] = {}
    sizes: dict[str, int] = {}
    for name, policy in policies.items():
        memory = _told_zones(policy, facts)
        places = np.array([_places(memory, old, new) for old, new in asked])  # (n, 2)
        both[name] = np.array((places >= 0).all(axis=1), np.float64)
        ordered[name] = both[name] * (places[:, 0] < places[:, 1])
        sizes[name] = memory.report().total()
    mine, other = both["method"], both["baseline"]
    deleted = float(both["delete on update"].mean())
    backwards = float(ordered["against the links"].mean())
    behaves = {
        "lines hold both in at least 95 %": bool(mine.mean() >= 0.95),
        "old stands before new": bool((ordered["method"] == mine).all()),
        "delete on update holds both in at most 50 %": deleted <= 0.5,
        "against the links the order is wrong": backwards <= 0.05,
    }
    return Row(
        f"old and new in {PROBE_TOKENS} tokens", float(mine.mean()), float(other.mean()),
        paired_interval(mine, other, seed), len(asked),
        {
            "delete on update": deleted,
            "old before new": float(ordered["method"].mean()),
            "old before new, against the links": backwards,
        },
        behaves if isinstance(method, Theanine) else {},
        bytes=sizes["method"], baseline_bytes=sizes["baseline"],
        data=f"{len(facts)} offsets of time zones, told in shuffled order",
    )  # fmt: skip


def _changes(facts: Sequence[ZoneFact], seed: int) -> list[tuple[ZoneFact, ZoneFact]]:
    """Pairs of a value and the one that followed it, drawn from all."""
    zones: dict[str, list[ZoneFact]] = {}
    for fact in sorted(facts, key=lambda f: f.valid_from):
        zones.setdefault(fact.zone, []).append(fact)
    pairs = [pair for of_zone in zones.values() for pair in pairwise(of_zone)]
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:N_PROBES]
    return [pairs[i] for i in drawn]


def _told_zones(policy: Policy, facts: Sequence[ZoneFact]) -> Memory:
    extraction = {
        f.text: [Fact(f.zone, "utc offset", f.offset, f.text, 0, f.valid_from, None, True)]
        for f in facts
    }
    memory = Memory(
        ":memory:",
        policy=policy,
        embedder="none",
        llm=Given(extraction),
        clock=lambda: "2026-01-01",
    )
    memory.add([{"role": "user", "content": f.text, "at": iso(f.stored)} for f in facts])
    return memory


def _places(memory: Memory, old: ZoneFact, new: ZoneFact) -> tuple[int, int]:
    """Where the pack holds the old and the new value; -1 where it does not."""
    since = iso(new.valid_from)
    question = (
        f"Was the UTC offset of {new.zone} {old.offset} before it was {new.offset} since {since}?"
    )
    shown = [part.text for part in memory.context(question, PROBE_TOKENS).parts]
    return tuple(  # type: ignore[return-value]
        next((i for i, text in enumerate(shown) if fact.text in text), -1) for fact in (old, new)
    )
