"""Evidence metrics of recall: did the turns that hold the answer come back, and in how many tokens?

- rankings: each hit is expanded to its sources in order, and the first k *distinct* turns count
- packs: a turn counts only where it can be read, in its own words or in a fact drawn from at most
  two turns, so that citing everything earns nothing
- a token is four characters; no model, no judge
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from memwise.bench.data import TUNED, Conversation, Question
from memwise.bench.engine import Row, paired_interval
from memwise.errors import InvalidKnob

CUTS = (1, 5, 10, 20, 50)
TOKENS = (250, 500, 1000)
MAX_FACT_SOURCES = 2

Search: TypeAlias = Callable[[Question], Sequence[str]]
Table: TypeAlias = NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a packed context.

    Attributes:
        text: as the model reads it.
        kind: kind of the item ("turn", "fact", "summary", ...).
        sources: refs of the turns it rests on.
    """

    text: str
    kind: str
    sources: tuple[str, ...]


Pack: TypeAlias = Callable[[Question, int], Sequence[Part]]


def expand(hits: Iterable[Sequence[str]]) -> list[str]:
    """Distinct refs of all hits' sources, in order."""
    return list(dict.fromkeys(ref for sources in hits for ref in sources))


def recall_at(ranked_refs: Sequence[str], gold: Collection[str], k: int) -> float:
    """Share of the gold turns among the first k distinct turns."""
    return _share(islice(dict.fromkeys(ranked_refs), k), gold)


def all_at(ranked_refs: Sequence[str], gold: Collection[str], k: int) -> float:
    """1 if all gold turns are among the first k distinct turns, else 0."""
    return float(recall_at(ranked_refs, gold, k) == 1.0)


def within_tokens(
    parts: Iterable[tuple[str, Collection[str]]], gold: Collection[str], tokens: int
) -> float:
    """Share of the gold turns in the longest prefix of (text, refs) that fits `tokens`."""
    fitting = _fitting(((text, (text, refs)) for text, refs in parts), tokens)
    return _share((ref for _, refs in fitting for ref in refs), gold)


def pack_recall(
    context_parts: Iterable[Part],
    gold: Collection[str],
    texts: Mapping[str, str],
    tokens: int | None = None,
) -> float:
    """Share of the gold turns that can be read in a packed context.

    Args:
        context_parts: the pack, in order.
        gold: refs of the evidence.
        texts: ref -> text of the turn as it was told, to see whether its own words are there.
        tokens: parts after this many do not count; None trusts the packer.
    """
    parts = list(context_parts)
    if tokens is not None:
        parts = _fitting(((part.text, part) for part in parts), tokens)
    return _share((ref for part in parts for ref in _readable(part, texts)), gold)


def _readable(part: Part, texts: Mapping[str, str]) -> Iterable[str]:
    if part.kind == "fact" and len(set(part.sources)) <= MAX_FACT_SOURCES:
        return part.sources
    shown = " ".join(part.text.split())
    return [ref for ref in part.sources if " ".join(texts[ref].split()) in shown]


def _fitting(items: Iterable[tuple[str, Any]], tokens: int) -> list[Any]:
    """Values of the longest prefix of (text, value) that fits."""
    kept, n_chars = [], 0
    for text, value in items:
        n_chars += len(text)
        if n_chars > 4 * tokens:
            break
        kept.append(value)
    return kept


def _share(refs: Iterable[str], gold: Collection[str]) -> float:
    if not gold:
        raise InvalidKnob("recall of no evidence is not defined; leave such questions out")
    return len(set(refs) & set(gold)) / len(set(gold))


def evaluate(
    build: Callable[[Conversation], Search],
    conversations: Iterable[Conversation],
    audited: bool = False,
) -> Table:
    """Rank every question that has evidence; one record a question.

    Args:
        build: tells a memory the conversation and returns its search: question -> refs of turns,
            best first, each hit expanded to its sources (50 turns deep to fill all columns).
        conversations: each is a bank of its own.
        audited: take the evidence after the public audit where it objects.

    Returns:
        Structured array with `conversation`, `question` (number in its conversation), `category`,
        `audited_wrong`, `tuned`, and in float64 `R@k` for k in 1, 5, 10, 20, 50, `all@10`, and
        `@N tok`, `all@N tok` for N in 250, 500, 1000: evidence in the longest prefix of the
        turns' own texts that fits N tokens.
    """
    metrics = [*(f"R@{k}" for k in CUTS), "all@10"]
    metrics += [f"{kind}@{n} tok" for n in TOKENS for kind in ("", "all")]

    def judge(search: Search, texts: Mapping[str, str], question: Question) -> list[float]:
        refs = list(dict.fromkeys(search(question)))
        unknown = set(refs) - texts.keys()
        if unknown:
            raise InvalidKnob(f"a search returned refs that were never told: {sorted(unknown)[:3]}")
        parts = [(texts[ref], (ref,)) for ref in refs]
        golds = _golds(question, audited)
        row = [max(recall_at(refs, gold, k) for gold in golds) for k in CUTS]
        row.append(max(all_at(refs, gold, 10) for gold in golds))
        for n in TOKENS:
            share = max(within_tokens(parts, gold, n) for gold in golds)
            row += [share, float(share == 1.0)]
        return row

    return _evaluate(build, conversations, audited, metrics, judge)


def evaluate_packs(
    build: Callable[[Conversation], Pack],
    conversations: Iterable[Conversation],
    audited: bool = False,
) -> Table:
    """Pack a context for every question that has evidence; one record a question.

    Args:
        build: tells a memory the conversation and returns its packer: (question, tokens) -> parts.
        conversations: each is a bank of its own.
        audited: take the evidence after the public audit where it objects.

    Returns:
        Structured array as of `evaluate`, with `pack@N`, `pack all@N` and the `tokens@N` that
        were used, for N in 250, 500, 1000.
    """
    metrics = [f"{kind}@{n}" for n in TOKENS for kind in ("pack", "pack all", "tokens")]

    def judge(pack: Pack, texts: Mapping[str, str], question: Question) -> list[float]:
        row = []
        for n in TOKENS:
            parts = pack(question, n)
            golds = _golds(question, audited)
            share = max(pack_recall(parts, gold, texts, n) for gold in golds)
            row += [share, float(share == 1.0), sum(len(part.text) for part in parts) / 4]
        return row

    return _evaluate(build, conversations, audited, metrics, judge)


def _golds(question: Question, audited: bool) -> list[frozenset[str]]:
    """Sets of evidence, each enough alone; empty where there is none."""
    gold = question.gold
    if audited and question.audited_gold is not None:
        gold = question.audited_gold
    return [gold, *question.alternatives] if gold else []


def _evaluate(
    build: Callable[[Conversation], Any],
    conversations: Iterable[Conversation],
    audited: bool,
    metrics: Sequence[str],
    judge: Callable[[Any, Mapping[str, str], Question], list[float]],
) -> Table:
    head = [("conversation", "U64"), ("question", "i8"), ("category", "U32")]
    head += [("audited_wrong", "?"), ("tuned", "?"), *((metric, "f8") for metric in metrics)]
    records = []
    for one in conversations:
        answer = build(one)
        texts = {turn.ref: turn.text for turn in one.turns}
        for i, question in enumerate(one.questions):
            if _golds(question, audited):
                about = (one.name, i, question.category, question.audited_wrong, one.name in TUNED)
                records.append((*about, *judge(answer, texts, question)))
    return np.array(records, dtype=head)


def means(table: Table) -> dict[str, dict[str, float]]:
    """Mean of each metric over `all`, each category, and the `tuned` and `untouched` rows."""
    metrics = [name for name in table.dtype.names or () if table.dtype[name] == np.float64]
    where = {"all": np.ones(len(table), bool)}
    where |= {str(name): table["category"] == name for name in np.unique(table["category"])}
    where |= {"tuned": table["tuned"], "untouched": ~table["tuned"]}
    return {
        group: {metric: float(table[metric][rows].mean()) for metric in metrics}
        for group, rows in where.items()
        if rows.any()
    }


def paired_row(
    metric: str,
    method: Table,
    baseline: Table,
    seed: int,
    where: NDArray[np.bool_] | None = None,
    controls: Mapping[str, Table] | None = None,
) -> Row:
    """A `Row` from two tables of the same questions, conversations being resampled as groups.

    Bytes, seconds and what must behave are added by `dataclasses.replace`.

    Args:
        metric: a column of the tables.
        method: table of the method.
        baseline: table of its baseline.
        seed: of the resampling.
        where: rows that count, e.g. `method["category"] == "multi-hop"`.
        controls: name -> table of the same questions.

    Raises:
        InvalidKnob: the tables hold different questions.
    """
    keep = np.ones(len(method), bool) if where is None else where
    tables = {"baseline": baseline, **(controls or {})}
    for name, table in tables.items():
        same = ["conversation", "question"]
        if len(table) != len(method) or (table[same] != method[same]).any():
            raise InvalidKnob(f"{name}: not the questions of the method; pair the same items")
    values, other = method[metric][keep], baseline[metric][keep]
    return Row(
        metric,
        float(values.mean()),
        float(other.mean()),
        paired_interval(values, other, seed, groups=method["conversation"][keep]),
        len(values),
        {name: float(table[metric][keep].mean()) for name, table in (controls or {}).items()},
    )
