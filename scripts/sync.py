"""Write everything that follows from the cards, the papers, the evidence and the commands.

    python scripts/sync.py            write what is stale
    python scripts/sync.py --check    write nothing; list what is stale and exit 1

Written: the exports of each room's `__init__.py`, `docs/methods.md`, `docs/results.md`,
`docs/cli.md`, and the tables between markers in README.md (where it has the markers).
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from memwise import catalogue
from memwise.budget import readable
from memwise.catalogue import STATES, Entry, Method
from memwise.cli import app

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "memwise"

# What each room answers, in the order in which people meet them.
ROOMS = {
    "recall": "Memory outside the model: what an agent is told.",
    "context": "Memory of the running model: KV cache, prefixes, prompts.",
    "layers": "Memory inside the model: modules that remember.",
    "train": "Memory of training: optimizers, activations, adapters, ranks.",
    "weights": "Compact weights: the same model in fewer bytes.",
    "learn": "Memory across tasks: continual learning and editing.",
    "detail": "Level of detail: inputs larger than memory.",
    "plan": "What fits, and how fast.",
    "bench": "Benchmarks: what a memory is worth.",
    "docs": "Surveys and studies that the pages draw on.",
}

# Public names of a room beside its policies: room -> module -> names.
SURFACE: dict[str, dict[str, tuple[str, ...]]] = {
    "recall": {
        "memwise.recall.memory": ("Memory",),
        "memwise.recall.engine.records": ("Context", "Hit", "Receipt"),
    },
    "context": {
        "memwise.context.engine.anchors": ("AnchorCache", "follow", "hold"),
        "memwise.context.engine.consolidate": ("consolidate",),
        "memwise.context.engine.editor": ("edited",),
        "memwise.context.engine.features": ("FeatureMemory",),
        "memwise.context.engine.host": ("bounded", "bytes_for"),
        "memwise.context.engine.plan": ("ByLayer", "Uniform"),
        "memwise.context.engine.prefix": ("PrefixStore",),
        "memwise.context.engine.pruning": ("prune",),
        "memwise.context.engine.relay": ("relayed",),
        "memwise.context.engine.retaining": ("load_heads", "save_heads", "train_heads"),
        "memwise.context.engine.streaming": ("streamed",),
        "memwise.context.policies.dam4sam": ("Masks",),
    },
    "train": {
        "memwise.train.engine.activations": ("compress_activations",),
        "memwise.train.engine.peft": ("from_peft", "load_peft", "save_peft"),
        "memwise.train.engine.reversible": ("ReversibleSequence",),
        "memwise.train.tune": ("Settings", "tune"),
    },
}
NEEDS = {
    "context": ("torch",),
    "train": ("torch",),
}  # extras without which nothing of a room can be loaded

GENERATED = "<!-- Written by `make sync`; edits here are lost. -->"


def main() -> int:
    stale = [
        (path, text)
        for path, text in pages()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        for path, _ in stale:
            print(f"{path.relative_to(ROOT)} is stale; run: make sync")
        return 1 if stale else 0

    for path, text in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


def pages() -> Iterator[tuple[Path, str]]:
    """Yield every generated file with the text it should have."""
    entries = catalogue.cards(PACKAGE)
    listing = catalogue.methods(PACKAGE)

    for room in sorted({*SURFACE, *(entry.room for entry in entries)}):
        path = PACKAGE / room / "__init__.py"
        old = path.read_text("utf-8") if path.exists() else f'"""{ROOMS[room]}"""\n'
        yield path, room_init(room, [entry for entry in entries if entry.room == room], old)

    yield ROOT / "docs" / "methods.md", methods_page(listing, entries)
    yield ROOT / "docs" / "results.md", results_page(entries)
    yield ROOT / "docs" / "cli.md", cli_page()

    readme = ROOT / "README.md"
    if readme.exists():
        tables = {"methods": rooms_table(listing), "results": results_table(entries)}
        yield readme, between_markers(readme.read_text("utf-8"), tables)


# --- rooms


def room_init(room: str, entries: Sequence[Entry], old: str) -> str:
    """Write the exports of a room below whatever docstring it has."""
    where: dict[str, tuple[str, ...]] = {
        name: (module, *NEEDS.get(room, ()))
        for module, names in SURFACE.get(room, {}).items()
        for name in names
    }
    where |= {entry.class_name: (entry.module, *entry.requires) for entry in entries}
    head = old.partition("\n# exports:begin")[0].rstrip("\n")
    ast.parse(head)

    modules: dict[str, list[str]] = {}
    for name, (module, *_) in where.items():
        modules.setdefault(module, []).append(name)
    imports = [
        line
        for module, names in sorted(modules.items())
        for line in _import(module, ", ".join(sorted(names)))
    ]
    names = sorted(where, key=_export_order)
    exports = [
        "# exports:begin (written by `make sync`)",
        "from typing import TYPE_CHECKING, Any",
        "",
        "from memwise.catalogue import export",
        "",
        "if TYPE_CHECKING:",
        *imports,
        "",
        "__all__ = [",
        *(f'    "{name}",' for name in names),
        "]",
        "",
        "# Lazy, so that naming one method loads that method's dependencies and no others.",
        "_WHERE: dict[str, tuple[str, ...]] = {",
        *(line for name in names for line in _entry(name, where[name])),
        "}",
        "",
        "",
        "def __getattr__(name: str) -> Any:",
        "    return export(__name__, _WHERE, name)",
        "",
        "",
        "def __dir__() -> list[str]:",
        "    return sorted({*globals(), *__all__})",
        "",
        "",
        "# exports:end",
    ]
    return f"{head}\n\n" + "\n".join(exports) + "\n"


def _export_order(name: str) -> tuple[bool, list[Any]]:
    # ruff's order for `__all__`: constants before classes, numbers by value.
    parts = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    return not name.isupper(), parts


# ruff would wrap a line of more than 100 characters, and the page would never be fresh.
_LONGEST = 100


def _import(module: str, names: str) -> list[str]:
    line = f"    from {module} import {names}"
    if len(line) <= _LONGEST:
        return [line]
    return [f"    from {module} import (", f"        {names},", "    )"]


def _entry(name: str, words: Sequence[str]) -> list[str]:
    line = f'    "{name}": {_tuple(words)},'
    if len(line) <= _LONGEST:
        return [line]
    return [f'    "{name}": (', *(f'        "{word}",' for word in words), "    ),"]


def _tuple(words: Iterable[str]) -> str:
    quoted = [f'"{word}"' for word in words]
    return f"({', '.join(quoted)}{',' if len(quoted) == 1 else ''})"


# --- pages


def methods_page(listing: Sequence[Method], entries: Sequence[Entry]) -> str:
    """Write all papers by room, then the baselines and controls."""
    counts = Counter(row.state for row in listing)
    total = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    lines = [
        "# Methods",
        "",
        GENERATED,
        "",
        f"{len(listing)} papers: {total}.",
        "",
        "*effect shown*: in our run, the interval of the difference from the baseline lies beyond "
        "the margin that was set beforehand, and the controls behave. *negative result*: it does "
        "not, and the method says why. *stale*: measured, then the code changed. *built*: not "
        "measured yet. *page only*: a survey or a study. *planned*: not built yet.",
    ]
    for room, answers in ROOMS.items():
        mine = [row for row in listing if row.room == room]
        table = [("id", "paper", "state", "methods", "claim"), *map(_method_cells, mine)]
        lines += ["", f"## {room}", "", answers, "", *_markdown(table)]

    plain = [entry for entry in entries if entry.paper is None]
    if plain:
        table = [("name", "kind", "what it does")]
        table += [(f"`{entry.key}`", entry.kind, entry.summary) for entry in plain]
        lines += ["", "## Baselines and controls", "", *_markdown(table)]
    return "\n".join(lines) + "\n"


def _method_cells(row: Method) -> tuple[str, ...]:
    paper = row.about
    title = f"[{paper.title}]({paper.link})" if paper.link else paper.title
    methods = ", ".join(f"`{key}`" for key in row.methods)
    claims = list(dict.fromkeys(entry.claim for entry in row.cards))
    year = f" ({paper.year})" if paper.year else ""
    return (
        str(row.paper),
        f"**{row.name}**: {title}{year}",
        row.state,
        methods,
        "; ".join(claims),
    )


def results_page(entries: Sequence[Entry]) -> str:
    """Write every recorded row beside its baseline."""
    lines = [
        "# Results",
        "",
        GENERATED,
        "",
        "Every number was measured by `memwise check NAME --record`: the method and its baseline "
        "on the same items in one run. The interval is the 95 % paired bootstrap interval of the "
        "difference (method minus baseline). Rows marked *context* are not judged.",
    ]
    measured = [(entry, catalogue.rows(entry)) for entry in entries]
    measured = [(entry, recorded) for entry, recorded in measured if recorded]
    if not measured:
        return "\n".join([*lines, "", "Nothing is recorded yet."]) + "\n"

    head = ("metric", "value", "baseline", "interval", "n", "controls", "bytes", "data")
    for entry, recorded in measured:
        goal = f"above {entry.margin:g}" if entry.better == "higher" else f"below {-entry.margin:g}"
        # A row may name its own baseline; the card's stands where it does not.
        against = recorded[0].get("baseline_name", entry.baseline)
        lines += [
            "",
            f"## {entry.key}: {catalogue.state(entry)}",
            "",
            f"{entry.claim}",
            "",
            f"Beside `{against}`; wanted: {goal}. {_provenance(recorded[0])}",
        ]
        lines += ["", f"Why not: {entry.negative}"] if entry.negative else []
        lines += ["", *_markdown([head, *map(_result_cells, recorded)])]
        lines += [""] + [
            f"- {'holds' if held else '**fails**'}: {statement}"
            for row in recorded
            for statement, held in row["behaves"].items()
        ]
        lines += [f"- {row['metric']}: {row['note']}" for row in recorded if row["note"]]
        while lines[-1] == "":
            lines.pop()
    return "\n".join(lines) + "\n"


def _provenance(row: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"Seed {row['seed']}; {versions}; {row['machine']}."


def _result_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    controls = ", ".join(f"{name} {_number(value)}" for name, value in row["controls"].items())
    return (
        row["metric"] + ("" if row["primary"] else " *(context)*"),
        _number(row["value"]),
        _number(row["baseline"]),
        "[{:+.3g}, {:+.3g}]".format(*row["interval"]),
        str(row["n"]),
        controls,
        _sizes(row),
        row["data"],
    )


def _sizes(row: Mapping[str, Any]) -> str:
    sizes = [readable(size) for size in (row["bytes"], row["baseline_bytes"]) if size]
    return " / ".join(sizes)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"


def cli_page() -> str:
    """Write what `memwise --help` says, one section a command."""
    command: Any = get_command(app)
    context = typer.Context(command, info_name="memwise")
    lines = ["# Commands", "", GENERATED, "", command.help, ""]
    lines += ["Errors end with one line on stderr and exit code 2, Ctrl-C with 130."]

    for name in command.list_commands(context):
        verb = command.get_command(context, name)
        lines += ["", f"## memwise {name}", "", verb.help or "", ""]
        table = [("argument or option", "default", "meaning"), *_parameters(verb)]
        lines += _markdown(table) if len(table) > 1 else []
    return "\n".join(lines).rstrip() + "\n"


def _parameters(verb: Any) -> Iterator[tuple[str, str, str]]:
    for parameter in verb.params:
        words = parameter.opts if parameter.param_type_name == "option" else [parameter.name]
        name = ", ".join(
            f"`{word.upper() if parameter.param_type_name == 'argument' else word}`"
            for word in words
        )
        default = "" if parameter.default in (None, "") else f"`{parameter.default}`"
        yield name, default.replace("`False`", ""), getattr(parameter, "help", "") or ""


# --- README


def rooms_table(listing: Sequence[Method]) -> str:
    """Write one line a room: what it answers, and how many papers are how far."""
    table: list[tuple[str, ...]] = [("room", "what it answers", "papers", *STATES)]
    for room, answers in ROOMS.items():
        counts = Counter(row.state for row in listing if row.room == room)
        cells = [str(counts[state] or "") for state in STATES]
        table.append((room, answers, str(counts.total()), *cells))
    return "\n".join(_markdown(table))


def results_table(entries: Sequence[Entry]) -> str:
    """Write one line a measured method: its first judged number beside the baseline."""
    table: list[tuple[str, ...]] = [
        ("method", "metric", "value", "baseline", "interval", "bytes", "state", "claim")
    ]
    for entry in entries:
        primary = [row for row in catalogue.rows(entry) if row["primary"]]
        if primary:
            cells = _result_cells(primary[0])
            against = primary[0].get("baseline_name", entry.baseline)
            table.append(
                (
                    f"`{entry.name}`",
                    *cells[:2],
                    f"{cells[2]} (`{against}`)",
                    cells[3],
                    cells[6],
                    catalogue.state(entry),
                    entry.claim,
                )
            )
    return "\n".join(_markdown(table))


def between_markers(text: str, tables: Mapping[str, str]) -> str:
    """Put each table between its markers; a page without the markers stays as it is."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin in text and end in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    return [line(rows[0]), "|" + " --- |" * len(rows[0]), *map(line, rows[1:])]


if __name__ == "__main__":
    raise SystemExit(main())
