"""`memwise demo`: the main job on real input, in a file of its own, with every byte accounted for.

Ten days of chat of ten people (MemoryBank, MIT) go into one file, a bank each, under a byte
budget. Then their real questions are asked; the evidence for each was marked by hand, so it is
known whether what was recalled holds the answer. The local language model answers some of them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from memwise import demo_models
from memwise.bench.data import Conversation, Question, memorybank
from memwise.budget import Budget
from memwise.demo_models import CACHE_BUDGET
from memwise.errors import MissingExtra
from memwise.models import LocalModel, local_model, notice
from memwise.recall.engine.dates import iso
from memwise.recall.engine.records import Context
from memwise.recall.memory import Memory

BUDGET = "4MiB"
SMALL_BUDGET = "768KiB"
TOKENS = 250
ANSWER_TOKENS = 150
ANSWERED = 2
_EXAMPLES = """\
Answer with a few words from the notes.

Notes:
maria: I sold my car and bought a red bicycle.
assistant: You could read "Emma" by Jane Austen, it is a classic.
maria: My brother Tom is a dentist in Oslo.
Question: Which book did you recommend to me?
Answer: "Emma" by Jane Austen.

Notes:
sam: We flew to Madrid for the weekend.
assistant: Madrid has a fine museum called the Prado.
sam: My favourite food is pizza.
Question: Where did I fly?
Answer: Madrid.

Notes:
"""


@dataclass(frozen=True)
class Asked:
    """One probing question and what the memory made of it."""

    user: str
    question: Question
    context: Context
    found: bool
    seconds: float


def run(console: Console, db: Path | None = None, embedder: str = "auto") -> None:
    """Run all parts.

    Args:
        console: where to print.
        db: keep the memory in this new file; None = a temporary one.
        embedder: as in `Memory`.
    """
    console.print("[bold]memwise demo[/] - an agent memory in one file, no server, no LLM needed\n")
    people = memorybank()
    with tempfile.TemporaryDirectory(prefix="memwise-demo-") as scratch, ExitStack() as stack:
        path = db or Path(scratch) / "demo.db"
        console.print(f"[bold]1. Remember[/]: {path.name}, budget {Budget(BUDGET)} for all bytes")
        banks = {
            one.name: stack.enter_context(
                Memory(path, bank=one.name, budget=BUDGET, embedder=embedder, clock=_end_of(one))
            )
            for one in people
        }
        _tell(console, banks, people)
        console.print(f"\n[bold]2. Recall[/]: their own questions, {TOKENS} tokens of context each")
        asked = list(_ask(banks, people))
        _show(console, asked)
        console.print("\n[bold]3. Answer[/]: the local model reads what was recalled")
        console.print(f"   {notice}", style="dim")
        model = _model(console)
        if model is not None:
            _answer(console, model, banks, asked)
        console.print(f"\n[bold]4. Forget[/]: the same dialogues inside {Budget(SMALL_BUDGET)}")
        _forget(console, Path(scratch) / "small.db", people, embedder)
        console.print("\n[bold]5. Where every byte lies[/]")
        console.print(str(next(iter(banks.values())).report()), highlight=False)
    console.print(f"\n[bold]6. Read[/]: a book through the model, {CACHE_BUDGET} for its KV cache")
    if model is not None:
        demo_models.read(console, model)
    console.print("\n[bold]7. Train[/]: a small model learns the book, plainly and in fewer bytes")
    demo_models.train(console)


def _end_of(one: Conversation) -> Callable[[], str]:
    """A clock that stands at the end of the dialogue, so that every run is the same run."""
    return lambda: iso(one.turns[-1].at)


def _messages(one: Conversation) -> list[dict[str, object]]:
    return [
        {
            "role": "assistant" if turn.actor == "assistant" else "user",
            "content": turn.text.removeprefix(f"{turn.actor}: "), "actor": turn.actor,
            "at": iso(turn.at), "session": turn.session, "meta": {"ref": turn.ref},
        }
        for turn in one.turns
    ]  # fmt: skip


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("   {task.description}"), BarColumn(30), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console,
    )  # fmt: skip


def _tell(console: Console, banks: dict[str, Memory], people: Sequence[Conversation]) -> None:
    start = time.perf_counter()
    n = sum(len(one.turns) for one in people)
    with _bar(console) as progress:
        task = progress.add_task("turns", total=n)
        for one in people:
            messages = _messages(one)
            for first in range(0, len(messages), 20):
                banks[one.name].add(messages[first : first + 20])
                progress.advance(task, len(messages[first : first + 20]))
    seconds = time.perf_counter() - start
    facts = sum(memory.stats().get("fact", 0) for memory in banks.values())
    console.print(f"   {n} turns of {len(people)} people and {facts} facts in {seconds:.1f} s")


def _ask(banks: dict[str, Memory], people: Sequence[Conversation]) -> Iterator[Asked]:
    for one in people:
        for question in one.questions:
            start = time.perf_counter()
            context = banks[one.name].context(question.text, tokens=TOKENS)
            seconds = time.perf_counter() - start
            refs = {source.meta.get("ref") for part in context.parts for source in part.sources}
            golds = [question.gold, *question.alternatives]
            found = any(gold and gold <= refs for gold in golds)
            yield Asked(one.name, question, context, found, seconds)


def _show(console: Console, asked: Sequence[Asked]) -> None:
    table = Table(box=None, padding=(0, 1), show_edge=False)
    for title in ("who", "question", "best match (date, score)", "evidence"):
        table.add_column(title, overflow="fold")
    for one in asked:
        best = max(one.context.parts, key=lambda part: part.score, default=None)
        match = f"{best.at[:10]} {best.score:.1f} {best.text[:60]}" if best else "nothing"
        mark = "[green]yes[/]" if one.found else "[red]no[/]"
        if one.question.unanswerable:
            mark = "[dim]none exists[/]"
        table.add_row(one.user, escape(one.question.text[:60]), escape(match), mark)
    console.print(table)
    able = [one for one in asked if not one.question.unanswerable]
    share = sum(one.found for one in able)
    slowest = max(one.seconds for one in asked)
    console.print(
        f"   evidence in the context for [bold]{share} of {len(able)}[/] answerable questions; "
        f"never over {max(one.context.tokens for one in asked)} tokens; "
        f"slowest search {slowest * 1000:.0f} ms"
    )
    first = asked[0]
    console.print(
        Panel(escape(first.context.text), title=escape(first.question.text), title_align="left")
    )
    for part in sorted(first.context.parts, key=lambda part: -part.score)[:3]:
        why = ", ".join(f"{name} {value:.2f}" for name, value in part.why.items())
        refs = ", ".join(str(source.meta.get("ref")) for source in part.sources)
        console.print(
            f"   {part.id}  score {part.score:.2f}  sources {refs}  {why}", highlight=False
        )


def _model(console: Console) -> LocalModel | None:
    try:
        return local_model()
    except MissingExtra as missing:
        console.print(f"   parts 3 and 6 are left out: {missing}")
        return None


def _answer(
    console: Console, model: LocalModel, banks: dict[str, Memory], asked: Sequence[Asked]
) -> None:
    """The first questions of each person, answered by a small base model that is shown how."""
    for one in _first_of_each(asked, ANSWERED):
        context = banks[one.user].context(one.question.text, tokens=ANSWER_TOKENS)
        notes = "\n".join(context.text.splitlines()[1:-1])
        prompt = f"{_EXAMPLES}{notes}\nQuestion: {one.question.text}\nAnswer:"
        console.print(f"   [cyan]{escape(one.user)}[/]: {escape(one.question.text)}")
        answer = model.generate(prompt, max_tokens=32).strip()
        console.print(f"      model:    {escape(answer)}", highlight=False)
        console.print(f"      dialogue: {escape(one.question.answer)}", style="dim")


def _forget(console: Console, path: Path, people: Sequence[Conversation], embedder: str) -> None:
    forgotten: list[tuple[str, str]] = []
    messages = sorted((m for one in people for m in _messages(one)), key=lambda m: str(m["at"]))
    now = [str(messages[0]["at"])]
    with Memory(
        path, bank="all", policy="memorybank", budget=SMALL_BUDGET, embedder=embedder,
        clock=lambda: now[0],
    ) as memory, _bar(console) as progress:  # fmt: skip
        task = progress.add_task("turns", total=len(messages))
        for first in range(0, len(messages), 20):
            part = messages[first : first + 20]
            now[0] = str(part[-1]["at"])  # the clock follows the dialogues, so days go by
            forgotten += memory.add(part).forgotten
            progress.advance(task, len(part))
        counts = ", ".join(f"{n} of kind {kind}" for kind, n in memory.stats().items())
        size = Budget(sum(row[2] for row in memory.report()))
    console.print(
        f"   kept {counts} in {size}; forgot {len(forgotten)}, the least retained first, such as"
    )
    for id, why in forgotten[-3:]:
        console.print(f"      {id}: {why}", highlight=False)


def _first_of_each(asked: Sequence[Asked], n: int) -> Iterator[Asked]:
    for _, group in groupby(asked, key=lambda one: one.user):
        yield from islice(group, n)
