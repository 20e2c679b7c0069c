"""How the command shows what a verb returned: JSON lines, text in a pipe, tables in a terminal.

Recalled text is data: control characters are dropped, so that a memory cannot steer the terminal,
and nothing in it is read as markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from memwise.budget import readable

Record: TypeAlias = Mapping[str, Any]
Draw: TypeAlias = Callable[[int, int], None]
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
_ONE_LINE = {**_CONTROLS, 9: " ", 10: " "}
_IDS = 8  # ids that a receipt names before it only counts


def as_json(result: Any) -> None:
    """Print a result as JSON lines: a list has one line an element."""
    for record in result if isinstance(result, list) else [result]:
        print(json.dumps(record, ensure_ascii=False))


def show(verb: str, result: Any) -> None:
    """Print what a verb returned for people."""
    _SHOWN[verb](result)


def clean(text: str) -> str:
    """A text without control characters, newlines and tabs excepted."""
    return text.translate(_CONTROLS)


def note(text: str) -> None:
    """One line beside the result, on stderr."""
    print(clean(text), file=sys.stderr)


@contextmanager
def working(doing: str) -> Iterator[None]:
    """Show that something of unknown length goes on, where stderr is a terminal."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(doing):
            yield
    else:
        yield


@contextmanager
def counting(doing: str) -> Iterator[Draw]:
    """Show a bar where stderr is a terminal; yields what is told of the steps done and of all."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(doing, total=None)

        def draw(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield draw


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print rows under a head; columns named in `right` are numbers. The last column may wrap."""
    console = Console()
    if not rows:
        console.print(Text("nothing", style="dim"))
        return
    if not console.is_terminal:
        _plain(head, rows, right)
        return
    drawn = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in head:
        last = name == head[-1]
        drawn.add_column(
            name, justify="right" if name in right else "left", no_wrap=not last,
            overflow="fold",
        )  # fmt: skip
    for row in rows:
        drawn.add_row(*(Text(clean(cell)) for cell in row))
    console.print(drawn)


def _plain(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    lines = [list(head), *([cell.translate(_ONE_LINE) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            f"{cell:>{width}}" if name in right else f"{cell:<{width}}"
            for cell, width, name in zip(line, widths, head, strict=True)
        )
        print("  ".join(cells).rstrip())


def _hits(hits: Sequence[Record]) -> None:
    rows = [
        (f"{h['score']:.3f}", h["id"], _day(h["at"]), h["actor"], _told(h, explain=True))
        for h in hits
    ]
    table(("score", "id", "at", "who", "text"), rows, right=("score",))


def _dated(hits: Sequence[Record]) -> None:
    rows = [(_day(h["at"]), h["id"], h["actor"], _told(h)) for h in hits]
    table(("at", "id", "who", "text"), rows)


def _told(hit: Record, *, explain: bool = False) -> str:
    text = str(hit["text"])
    origins = [s["id"] for s in hit["sources"] if s["id"] != hit["id"]]
    if origins:
        text += f"  [{hit['kind']} from {', '.join(origins[:_IDS])}]"
    if explain and hit["why"] and Console().is_terminal:
        parts = sorted(hit["why"].items(), key=lambda part: -abs(part[1]))
        text += "\n  " + "  ".join(f"{name} {value:+.2f}" for name, value in parts if value)
    return text


def _one(hit: Record) -> None:
    fields = [
        ("id", hit["id"]), ("kind", hit["kind"]), ("at", hit["at"]), ("who", hit["actor"]),
        ("session", hit["session"]),
        ("meta", json.dumps(hit["meta"], ensure_ascii=False) if hit["meta"] else ""),
        ("sources", ", ".join(s["id"] for s in hit["sources"] if s["id"] != hit["id"])),
        ("text", hit["text"]),
    ]  # fmt: skip
    table(("field", "value"), [(name, value) for name, value in fields if value])


def _packed(result: Record) -> None:
    console = Console()
    text = clean(result["text"])
    if not text:
        note("nothing was found")
    elif console.is_terminal:
        title = f"{len(result['parts'])} memories in {result['tokens']} tokens"
        console.print(Panel(Text(text), title=title, title_align="left", border_style="dim"))
    else:
        print(text)


def _receipt(receipt: Record) -> None:
    parts = []
    if ids := receipt["ids"]:
        more = f" and {len(ids) - _IDS} more" if len(ids) > _IDS else ""
        parts.append(f"stored {', '.join(ids[:_IDS])}{more}")
    if derived := receipt["added"] - len(ids):
        parts.append(f"{derived} derived" if derived > 0 else f"{-derived} known already")
    if receipt["expired"]:
        parts.append(f"let go {len(receipt['expired'])}")
    if receipt["forgotten"]:
        parts.append(f"forgot {len(receipt['forgotten'])}")
    if receipt["purged"]:
        parts.append(f"{receipt['purged']} gone for good")
    print("; ".join(parts) or "nothing to do")
    for told in receipt["notes"]:
        note(f"note: {told}")
    if receipt["forgotten"]:
        table(("id", "why"), [(gone["id"], gone["why"]) for gone in receipt["forgotten"]])


def _ledger(result: Record) -> None:
    total = max(1, result["bytes"])
    rows = [
        (line["tier"], line["kind"], readable(n := line["bytes"]), "█" * round(40 * n / total))
        for line in result["lines"]
    ]
    rows.append(("all", "", readable(result["bytes"]), ""))
    table(("tier", "kind", "bytes", "share"), rows, right=("bytes",))


def _counts(result: Record) -> None:
    rows = [
        (name, readable(value) if name == "bytes" else str(value))
        for name, value in result.items()
        if name != "items"
    ]
    kinds = [(f"  {kind}", str(n)) for kind, n in sorted(result["items"].items())]
    table(("what", "value"), rows[:4] + kinds + rows[4:])


def _day(at: str) -> str:
    return at.removesuffix("T00:00:00Z")[:16].replace("T", " ")


_SHOWN: Mapping[str, Callable[[Any], None]] = {
    "add": _receipt,
    "update": _receipt,
    "forget": _receipt,
    "reflect": _receipt,
    "rebuild": _receipt,
    "import": _receipt,
    "search": _hits,
    "facts": _dated,
    "timeline": _dated,
    "get": _one,
    "context": _packed,
    "report": _ledger,
    "stats": _counts,
    "history": lambda events: table(
        ("at", "event", "what"), [(_day(e["at"]), e["event"], e["what"]) for e in events]
    ),
    "banks": lambda banks: table(
        ("items", "policy", "bank"), [(str(b["n_items"]), b["policy"], b["bank"]) for b in banks],
        right=("items",),
    ),
    "undo": lambda result: print(f"took back: {result['undone']}"),
    "delete": lambda result: print(f"gone: {', '.join(result['deleted'])}"),
    "export": lambda result: print(result["content"], end=""),
}  # fmt: skip
