"""Structure x retrieval: two-paragraph questions, and chats whose extraction is frozen.

- primary: HotpotQA, the paragraphs of all questions pooled; both gold paragraphs among the first 3
  and 10, iterative beside single-step BM25
- context: LoCoMo multi-hop questions, evidence in 500 tokens of sources, all 15 cells, and what
  other conversations in the same bank take from them
- no vectors: the effect of asking again is the same for words, and nothing is left to a model
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from memwise.bench.data import Conversation, Question, hotpot, locomo
from memwise.bench.engine import Row, paired_interval
from memwise.bench.evidence import all_at, within_tokens
from memwise.bench.frozen import Frozen, tell
from memwise.recall.engine.policy import Step
from memwise.recall.engine.rank import Query, Ranking
from memwise.recall.engine.retrieve import iterate_with
from memwise.recall.memory import Memory
from memwise.recall.policies.structural_memory import Retrieval, StructuralMemory, Structure

STRUCTURES = get_args(Structure)
RETRIEVALS = get_args(Retrieval)
NOISE = (0, 1, 3)
TOKENS = 500

Values = NDArray[np.float64]


def run(method: StructuralMemory, data: Path | None, seed: int) -> list[Row]:
    """Rows of both data sets; the grid is run on one store a noise level, which holds all units."""
    return [*_hotpot(method, data, seed), *_locomo(method, data, seed)]


def _hotpot(method: StructuralMemory, data: Path | None, seed: int) -> list[Row]:
    pooled = hotpot(data).pooled
    memory = Memory(":memory:", policy=method, embedder="none", clock=lambda: 0)
    tell(memory, pooled.turns)
    chunks = replace(method, structure="chunks", answer="memory")
    step = memory.view()
    refs = _refs(step)

    def found(policy: StructuralMemory | None, cut: int, repeated: bool = False) -> Values:
        values = []
        for question in pooled.questions:
            asked = replace(step, query=Query(question.text, k=20))
            if policy is None or repeated:
                ranking = _constant(asked, chunks) if repeated else _random(asked, refs, seed)
            else:
                ranking = policy.rank(asked)
            ranked = list(dict.fromkeys(refs[row] for row in ranking.rows))
            values.append(all_at(ranked, question.gold, cut))
        return np.array(values)

    single = replace(chunks, retrieval="single")
    rows = []
    for cut in (3, 10):
        began = time.perf_counter()
        value = found(replace(chunks, retrieval="iterative"), cut)
        seconds = time.perf_counter() - began
        base, constant = found(single, cut), found(None, cut, repeated=True)
        other = {
            "rerank": found(replace(chunks, retrieval="rerank"), cut),
            "two rounds": found(replace(chunks, retrieval="iterative", rounds=2), cut),
            "constant query": constant,
            "random": found(None, cut),
        }
        rows.append(
            Row(
                f"both paragraphs@{cut}", float(value.mean()), float(base.mean()),
                paired_interval(value, base, seed), len(value),
                {name: float(v.mean()) for name, v in other.items()},
                {
                    "a constant query finds what one step finds": bool((constant == base).all()),
                    "random finds less than one step": other["random"].mean() < base.mean(),
                },
                seconds=seconds, data=f"hotpotqa dev, {len(pooled.turns)} paragraphs pooled",
            )
        )  # fmt: skip
    return rows


def _constant(step: Step, method: StructuralMemory) -> Ranking:
    """Iterative retrieval whose refined query is the query."""
    return iterate_with(step, method.units, method.rounds, method.depth, lambda asked, _: asked)


def _random(step: Step, refs: Mapping[int, str], seed: int) -> Ranking:
    rows = np.random.default_rng((seed, len(step.query.text))).permutation(list(refs))[:20].tolist()
    return Ranking(rows, [1.0] * len(rows))


def _refs(step: Step) -> dict[int, str]:
    return {item.row: item.data["ref"] for item in step.scan("turn", "chunk")}


def _locomo(method: StructuralMemory, data: Path | None, seed: int) -> list[Row]:
    conversations = locomo(data)
    frozen = Frozen(conversations)
    everything = replace(method, structure="mixed", answer="document")
    found: dict[tuple[str, str, int], list[float]] = {}
    from_sources = True
    for i, one in enumerate(conversations):
        for noise in NOISE:
            others = [conversations[(i + n) % len(conversations)] for n in range(1, noise + 1)]
            memory = Memory(
                ":memory:", policy=everything, embedder="none", llm=frozen, clock=lambda: 0
            )
            for told in (one, *others):
                tell(memory, told.turns, f"{told.name}/")
            share, clean = _cells(memory.view(), everything, one)
            from_sources &= clean
            for (structure, retrieval), values in share.items():
                found.setdefault((structure, retrieval, noise), []).extend(values)
    groups = [one.name for one in conversations for _ in _multi_hop(one)]
    return _grid(found, groups, from_sources, seed)


def _multi_hop(one: Conversation) -> list[Question]:
    return [q for q in one.questions if q.gold and q.category == "multi-hop"]


def _cells(
    step: Step, everything: StructuralMemory, one: Conversation
) -> tuple[dict[tuple[str, str], list[float]], bool]:
    """Evidence in the packed sources of each cell; and whether only sources came back."""
    refs = _refs(step)
    texts = {f"{one.name}/{turn.ref}": turn.text for turn in one.turns}
    items = {item.row: item for item in step.scan("turn", "chunk")}
    out: dict[tuple[str, str], list[float]] = {}
    clean = True
    for structure in STRUCTURES:
        for retrieval in RETRIEVALS:
            policy = replace(everything, structure=structure, retrieval=retrieval)
            values = []
            for question in _multi_hop(one):
                ranking = policy.rank(replace(step, query=Query(question.text, k=50)))
                clean &= all(row in items for row in ranking.rows)
                parts = [(items[row].text, (refs[row],)) for row in ranking.rows]
                gold = {f"{one.name}/{ref}" for ref in question.gold}
                values.append(within_tokens(parts, gold & texts.keys(), TOKENS))
            out[structure, retrieval] = values
    return out, clean


def _grid(
    found: Mapping[tuple[str, str, int], Sequence[float]],
    groups: Sequence[str],
    from_sources: bool,
    seed: int,
) -> list[Row]:
    def value(structure: str, retrieval: str, noise: int = 0) -> Values:
        return np.array(found[structure, retrieval, noise])

    def row(metric: str, mine: Values, base: Values, controls: Mapping[str, float]) -> Row:
        return Row(
            metric, float(mine.mean()), float(base.mean()),
            paired_interval(mine, base, seed, groups=groups), len(mine), controls,
            primary=False, data="locomo dev, multi-hop, frozen extraction",
        )  # fmt: skip

    def noisy(structure: str, retrieval: str) -> dict[str, float]:
        return {f"noise x{n}": float(value(structure, retrieval, n).mean()) for n in NOISE[1:]}

    base = value("chunks", "single")
    rows = [
        row(f"@{TOKENS} tok, {s}, {r}", value(s, r), base, noisy(s, r))
        for s in STRUCTURES
        for r in RETRIEVALS
    ]
    drops = {s: _drop(value, s) for s in STRUCTURES}
    smallest = min(drops, key=lambda s: float(drops[s].mean()))
    last = row(
        "drop of @500 tok under noise x3, mixed beside chunks", drops["mixed"], drops["chunks"],
        {s: float(d.mean()) for s, d in drops.items()},
    )  # fmt: skip
    note = f"the smallest drop is that of {smallest} (the paper: mixed)"
    behaves = {"document mode gives nothing but sources": from_sources}
    return [*rows, replace(last, note=note, behaves=behaves)]


def _drop(value: Callable[..., Values], structure: str) -> Values:
    """What three times as many foreign items cost, the mean over the ways of retrieval."""
    lost = [value(structure, r) - value(structure, r, NOISE[-1]) for r in RETRIEVALS]
    drop: Values = np.mean(lost, axis=0)
    return drop
