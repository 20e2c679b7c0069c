"""Evidence among the first ten turns: LoCoMo, each conversation a bank, a method beside another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from memwise import catalogue
from memwise.bench.data import locomo
from memwise.bench.engine import Row
from memwise.bench.evidence import evaluate, paired_row
from memwise.bench.frozen import searching
from memwise.bench.memo import Memo
from memwise.recall.engine.policy import Policy


def run(method: Policy, data: Path | None, seed: int) -> list[Row]:
    """R@10 over all questions with evidence."""
    conversations = locomo(data)
    memo = Memo("minilm" if "embed" in method.card.requires else "none")
    other = catalogue.load(f"recall/{method.card.baseline}")()
    needs = Memo("minilm") if "embed" in other.card.requires and not memo.dim else memo
    mine = evaluate(searching(method, memo), conversations)
    theirs = evaluate(searching(other, needs), conversations)
    return [
        replace(paired_row(metric, mine, theirs, seed), data="locomo dev", primary=metric == "R@10")
        for metric in ("R@10", "@500 tok")
    ]
