"""Do attributes, links and evolution bring more evidence than the cosine of what was said?

- LoCoMo, multi-hop and temporal questions, all evidence among the turns that fit 500 tokens
- the steps one by one: content, + attributes, + links, + evolution; shuffled links; evolution
  without a new embedding
- attributes come from the extraction that ships with the data, as an LLM's would
- 500 single additions show that content stays and that only retrieved neighbours are edited
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from memwise.bench.data import Conversation, Question, locomo
from memwise.bench.engine import Row
from memwise.bench.evidence import Search, Table, evaluate, expand, paired_row
from memwise.bench.frozen import Frozen, searching, told
from memwise.bench.memo import Memo
from memwise.recall.engine.dates import iso
from memwise.recall.engine.policy import Step
from memwise.recall.engine.rank import Query, Ranking, Recipe
from memwise.recall.engine.records import Add, Link, Op
from memwise.recall.engine.retrieve import deeper, spread, touching
from memwise.recall.memory import Memory
from memwise.recall.policies.a_mem import AMem, Draught
from memwise.recall.policies.dense import Dense

METRIC = "all@500 tok"
CATEGORIES = ("multi-hop", "temporal")
SINGLE_ADDITIONS = 500


@dataclass(frozen=True)
class Fixed(AMem):
    """Attributes and links; nothing evolves."""

    def evolve(self, old: Draught, new: Draught) -> None:
        """Change nothing."""


@dataclass(frozen=True)
class Shuffled(Fixed):
    """As many links, between notes drawn at random."""

    def rank(self, step: Step) -> Ranking:
        """Follow the links of one note from another."""
        found = step.rank(Recipe.meaning(("note",)), deeper(step.query, 400))
        rows = sorted(found.rows)
        rng = np.random.default_rng(0)
        moved = dict(zip(rows, rng.permutation(rows).tolist(), strict=True))
        back = {new: old for old, new in moved.items()}
        best = [back[row] for row in found.rows[: self.anchors]]
        links = [
            Link(moved[a.src], moved[a.dst], a.rel, a.weight, a.created)
            for a in touching(step, best, "similar")
            if a.src in moved and a.dst in moved
        ]
        return spread(found, links, self.anchors, self.share, step.query.k)


def not_embedded_anew(frozen: Frozen) -> type[AMem]:
    """Evolution changes tags and context, but the vector stays that of the note as it was made."""

    @dataclass(frozen=True)
    class NotEmbeddedAnew(AMem):
        def _add(self, note: Draught, extractor: str) -> Add:
            given = {fact.text for fact in frozen.facts([note.turn])}
            own = [sentence for sentence in note.context if sentence in given]
            born = Draught(note.turn, note.keywords, [], own)
            return replace(super()._add(note, extractor), text=born.text)

    return NotEmbeddedAnew


def run(method: AMem, data: Path | None, seed: int) -> list[Row]:
    """Primary: the whole method beside cosine, both categories; context: what each step adds."""
    conversations = [_only(one) for one in locomo(data)]
    frozen, memo = Frozen(conversations), Memo("minilm")
    knobs = {field.name: getattr(method, field.name) for field in fields(method)}
    content = evaluate(searching(Dense(), memo), conversations)
    fixed = Fixed(**knobs)
    without, linked, shuffled = _on_one_store(
        [replace(fixed, share=0.0), fixed, Shuffled(**knobs)], conversations, memo, frozen
    )
    stale = evaluate(searching(not_embedded_anew(frozen)(**knobs), memo, frozen), conversations)
    began = time.perf_counter()
    full = evaluate(searching(method, memo, frozen), conversations)
    seconds = time.perf_counter() - began
    steps = {
        "attributes": without, "attributes, links": linked, "shuffled links": shuffled,
        "not embedded anew": stale,
    }  # fmt: skip
    rows = []
    for category in CATEGORIES:
        where = content["category"] == category
        row = paired_row(METRIC, full, content, seed, where, steps)
        rows.append(replace(row, metric=f"{METRIC}, {category}", seconds=seconds))
    long = next(one for one in conversations if len(one.turns) >= SINGLE_ADDITIONS)
    kept = _bookkeeping(method, long, memo, frozen)
    rows[0] = replace(rows[0], behaves=_behaves(rows[0]) | kept)
    where = content["category"] == CATEGORIES[0]
    parts = {
        "links": (linked, without),
        "shuffled links": (shuffled, without),
        "evolution": (full, linked),
    }
    for name, (more, less) in parts.items():
        row = paired_row(METRIC, more, less, seed, where)
        rows.append(
            replace(row, metric=f"what {name} add, {METRIC}, {CATEGORIES[0]}", primary=False)
        )
    rows[-1] = replace(rows[-1], note=_ops_per_note(method, conversations, memo, frozen))
    return [replace(row, data="locomo dev, frozen extraction") for row in rows]


def _only(one: Conversation) -> Conversation:
    return replace(one, questions=[q for q in one.questions if q.category in CATEGORIES])


def _on_one_store(
    policies: Sequence[AMem], conversations: Sequence[Conversation], memo: Memo, frozen: Frozen
) -> list[Table]:
    """Tables of policies that write alike and rank differently."""
    stores = {one.name: told(policies[0], one, memo, frozen) for one in conversations}

    def table(policy: AMem) -> Table:
        def build(one: Conversation) -> Search:
            step = stores[one.name].view()
            return lambda question: _refs(step, policy, question)

        return evaluate(build, conversations)

    return [table(policy) for policy in policies]


def _refs(step: Step, policy: AMem, question: Question) -> list[str]:
    asked = replace(step, query=Query(question.text, k=50))
    found = policy.rank(asked)
    origins = step.sources(step.get(found.rows).values())
    turns = step.get(row for rows in origins.values() for row in rows)
    return expand([turns[r].data["ref"] for r in origins[row]] for row in found.rows)


def _behaves(row: Row) -> dict[str, bool]:
    got = row.controls
    return {
        "attributes find more than content": got["attributes"] > row.baseline,
        "links find more than attributes": got["attributes, links"] > got["attributes"],
        "shuffled links gain nothing": got["shuffled links"] <= got["attributes"],
        "evolution without a new embedding gains less": got["not embedded anew"] < row.value,
    }


def _bookkeeping(method: AMem, one: Conversation, memo: Memo, frozen: Frozen) -> dict[str, bool]:
    """Add turns one at a time and look at what each addition edited."""
    memory = Memory(
        ":memory:", policy=method, embedder=memo, llm=frozen, clock=lambda: "2026-01-01"
    )
    turns = one.turns[:SINGLE_ADDITIONS]
    only_neighbours = True
    for turn in turns:
        before = memory.view()
        receipt = memory.add(
            turn.text,
            at=iso(turn.at),
            actor=turn.actor,
            session=turn.session,
            meta={"ref": turn.ref},
        )
        after = memory.view()
        new = [i for i in after.scan("note") if i.text.startswith(turn.text)][-1]
        near = {c.item.id for c in before.similar(new.text, "note", k=method.neighbours)}
        only_neighbours &= set(receipt.expired) <= near
    step = memory.view()
    texts = {turn.ref: turn.text for turn in turns}
    kept = {i.data["ref"]: i.text for i in step.scan("turn")}
    notes = step.scan("note")
    turn_of = step.get(row for rows in step.sources(notes).values() for row in rows)
    origin = step.sources(notes)
    return {
        f"content is the same byte for byte after {len(turns)} additions": kept == texts
        and all(n.text.startswith(turn_of[origin[n.row][0]].text) for n in notes),
        "only retrieved neighbours were edited": only_neighbours,
    }


def _ops_per_note(
    method: AMem, conversations: Sequence[Conversation], memo: Memo, frozen: Frozen
) -> str:
    counted: list[Op] = []

    class Counting(AMem):
        def on_turns(self, step: Step) -> Sequence[Op]:
            ops = super().on_turns(step)
            counted.extend(ops)
            return ops

    one = conversations[0]
    told(Counting(**{f.name: getattr(method, f.name) for f in fields(method)}), one, memo, frozen)
    kinds = {
        kind: sum(type(op).__name__ == kind for op in counted)
        for kind in ("Add", "Replace", "Connect")
    }
    each = ", ".join(f"{n / len(one.turns):.2f} {kind}" for kind, n in kinds.items())
    return f"operations a note: {each}"
