"""The parts of `memwise demo` in which a model itself takes fewer bytes: reading, and training."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from memwise.bench.data import books
from memwise.budget import readable
from memwise.models import LocalModel

CACHE_BUDGET, CODEC = "12MiB", "int8/row"
_LETTERS, _CHUNK = 10_000, 64
_HIDDEN = "\n\nThe code of the small garden door is 48213. Remember it."
_QUESTION = (
    "Question: What is the code of the small garden door?\n"
    "Answer: The code of the small garden door is"
)
_N_TOKENS = 10
_N_STEPS, _SIZE, _LR = 16, 8, 1e-3


def read(console: Console, model: LocalModel) -> None:
    """One question to a long text: inside a budget in two ways, and with a full cache."""
    from memwise.context.run import answer

    text = books()[0][1][:_LETTERS]
    at = text.index("\n\n", _LETTERS // 8)
    text = text[:at] + _HIDDEN + text[at:]
    table = _table("cache", "bytes", "the code is ...")
    with _bar(console) as progress:
        for name, policy in (
            ("what the question needs", "sharp_probe"), ("first and newest", "streaming_llm")
        ):  # fmt: skip
            task = progress.add_task(name, total=None)
            found = answer(
                model, text, CACHE_BUDGET, question=_QUESTION, policy=policy, n_tokens=_N_TOKENS,
                chunk=_CHUNK, codec=CODEC,
                read=lambda done, of, task=task: progress.update(task, completed=done, total=of),  # type: ignore[misc]
            )  # fmt: skip
            held = sum(found.report.held_bytes.values())
            table.add_row(f"{CACHE_BUDGET}, {name}", readable(held), _line(found.text))
        progress.add_task("without a budget", total=None)
        whole = model.generate(f"{text}\n\n{_QUESTION}", _N_TOKENS, stop=("\n\n",))
    table.add_row("without a budget", readable(found.report.full_bytes), _line(whole))
    console.print(f"   {found.n_tokens} tokens, the code stands in their first part")
    console.print(table)


@dataclass(frozen=True)
class _Way:
    """A way to train.

    Attributes:
        name: for the table.
        optimizer: makes it, for parameters.
        around: makes what is entered around a forward and backward pass of a model.
    """

    name: str
    optimizer: Callable[[Any], Any]
    around: Callable[[Any], AbstractContextManager[object]]


def train(console: Console) -> None:
    """A small model that learns a book, plainly and in a fraction of the bytes."""
    import torch

    from memwise.bench.training import ByteLM, Corpus, fit, window_nll
    from memwise.train import CoatStates, Recompute, compress_activations
    from memwise.train.measure import bytes_of, peak

    text = books()[0][1]
    corpus = Corpus.of(text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :])
    plain = _Way("AdamW", partial(torch.optim.AdamW, lr=_LR, fused=True), lambda _: nullcontext())
    small = _Way(
        "8-bit states, blocks recomputed",
        partial(CoatStates(), lr=_LR),
        lambda model: compress_activations(model, Recompute()),
    )
    table = _table("way", "states", "both passes", "bits a byte, held out")
    with _bar(console) as progress:
        for way in (plain, small):
            task = progress.add_task(way.name, total=None)
            model = ByteLM()
            optimizer = way.optimizer(model.parameters())
            around = partial(way.around, model)
            fit(
                model, optimizer, corpus, _N_STEPS, _SIZE, around=around, n_warmup=4,
                n_fade=_N_STEPS // 2,
            )  # fmt: skip
            batch = corpus.batch(_N_STEPS, _SIZE, 256, 0)

            def step(model: Any = model, around: Any = around, batch: Any = batch) -> None:
                with around():
                    model(batch).backward()

            highest = peak(step).peak_bytes
            progress.update(task, total=1, completed=1)
            bits = float(window_nll(model, corpus, 16).mean()) / math.log(2)
            states = readable(bytes_of(optimizer.state))
            table.add_row(way.name, states, readable(highest), f"{bits:.3f}")
    console.print(table)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("   {task.description}"), BarColumn(30), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _line(text: str) -> str:
    return escape(" ".join(text.split()))


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 1), show_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    return table
