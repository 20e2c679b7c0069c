"""Does a controller spend 256 tokens better than cutting off, and does it know when to stay silent?

The local model reads the packed context and scores the gold answer (harness `answer_rank`). The
gate is judged on what it must tell apart: chat turns that no question ever cites, and questions
that need evidence.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from memwise.bench.answer_rank import CONTEXT_TOKENS, Case, answers, cases, nll_row
from memwise.bench.data import Conversation, locomo, longmemeval
from memwise.bench.engine import Row
from memwise.bench.reading import Once, told
from memwise.catalogue import find, load
from memwise.models import local_model
from memwise.recall.engine.embed import embedder
from memwise.recall.engine.records import Context
from memwise.recall.engine.text import unspoken
from memwise.recall.memory import Memory

N_QUESTIONS = 40
_BUDGETS = (64, 128, 256, 1000)


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """The likelihood of the gold answers decides; the gate is a row of context that must hold."""
    baseline = load(find(method.name).baseline)()
    encoder = Once(embedder("minilm"))
    pooled = longmemeval(data)
    asked = cases([pooled], N_QUESTIONS, seed, n_candidates=1)
    model = local_model()
    arms = {"method": method, "baseline": baseline, "recent only": load("most_recent")()}
    found = {}
    with told(pooled, method, encoder) as memory:
        for name, policy in arms.items():
            memory.policy = policy
            found[name] = answers(model, asked, lambda case: _context(memory, case).text)
        found["no context"] = answers(model, asked, lambda case: "")
        memory.policy = method
        behaves = _behaviour(memory, asked)
    controls = {n: float(found[n].nll.mean()) for n in ("recent only", "no context")}
    row = replace(
        nll_row(found["method"], found["baseline"], seed),
        controls=controls,
        behaves=behaves | {
            "more likely than with the newest turns": float(found["method"].nll.mean())
            < controls["recent only"],
        },
        data=f"LongMemEval evidence pooled, {CONTEXT_TOKENS} tokens",
    )  # fmt: skip
    return [row, _gate(method, locomo(data))]


def _context(memory: Memory, case: Case) -> Context:
    return memory.context(case.question.text, tokens=CONTEXT_TOKENS)


def _behaviour(memory: Memory, asked: list[Case]) -> dict[str, bool]:
    """Budget, order and forms of the packs of all questions at four budgets."""
    packs = {
        tokens: [memory.context(case.question.text, tokens=tokens) for case in asked]
        for tokens in _BUDGETS
    }
    summed = [
        sum(context.forms.count("summary") for context in packs[tokens]) for tokens in (128, 1000)
    ]
    return {
        "no pack exceeds its budget": all(
            context.tokens <= tokens for tokens, some in packs.items() for context in some
        ),
        "every pack stands in the order of time": all(
            a.at <= b.at for some in packs.values() for c in some for a, b in pairwise(c.parts)
        ),
        "a small budget sums up more than a large one": summed[0] > summed[1],
    }


def _gate(method: Any, talks: list[Conversation]) -> Row:
    """Share of chit-chat on which memory stays silent; the baseline always searches."""
    chat = []
    for talk in talks:
        cited = {ref for question in talk.questions for ref in question.gold}
        chat += [unspoken(t.actor, t.text) for t in talk.turns if t.ref not in cited]
    questions = [q.text for t in talks for q in t.questions if q.gold and not q.unanswerable]
    silent = np.array([not method.needs_history(text) for text in chat], np.float64)
    missed = float(np.mean([not method.needs_history(text) for text in questions]))
    unmarked = [text.replace("?", ".") for text in questions]
    blind = float(np.mean([not method.needs_history(text) for text in unmarked]))
    return Row(
        "chit-chat without recall", float(silent.mean()), 0.0,
        (float(silent.mean()), float(silent.mean())), len(silent),
        {"questions missed": missed, "questions missed, without question marks": blind},
        {"skips 60 % of chit-chat": float(silent.mean()) >= 0.6, "misses 10 %": missed <= 0.1},
        primary=False, data=f"LoCoMo, {len(talks)} conversations",
    )  # fmt: skip
