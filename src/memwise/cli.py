"""The command `memwise`: thin verbs over the library, for people and (`--json`) for programs."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from memwise import __version__, catalogue, cli_memory, cli_print
from memwise.catalogue import Entry, Method, Paper
from memwise.errors import InvalidKnob, MemwiseError, UnknownMethod

app = typer.Typer(
    name="memwise",
    help="More memory for AI models from fewer bytes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

cli_memory.register(app)

_INTERRUPTED = 130

Name = Annotated[str, typer.Argument(help="A method: its name, or room/name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder with the data sets; otherwise MEMWISE_DATA.", metavar="DIR"),
]


_UsageError: type[Any] = typer.BadParameter.__mro__[1]
"""What typer raises for a command line that it cannot read; it has no public name there."""


def main() -> None:
    """Run the command, and end with one line on stderr where it cannot be done.

    Exit codes: 0 done; 1 no effect shown, damage found, or the reader has gone; 2 an error that
    memwise raises on purpose, a wrong command line, or a file that cannot be used; 130 interrupted.
    With `--json` that line is a JSON object with `error` and `message`, as in REST.
    """
    _speak_utf8()
    try:
        try:
            code = app(prog_name="memwise", standalone_mode=False)
        finally:
            sys.stdout.flush()
    except MemwiseError as problem:
        code = _fail(type(problem).__name__, str(problem))
    except _UsageError as problem:
        code = _fail("UsageError", _usage(problem))
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`). Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as problem:
        code = _fail(type(problem).__name__, _file_trouble(problem))
    if code == _INTERRUPTED:
        _fail("Interrupted", "interrupted")
    raise SystemExit(code or 0)


def _speak_utf8() -> None:
    """What goes into a pipe or a file is UTF-8; a terminal shows what it can."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if stream.isatty():
                stream.reconfigure(errors="replace")
            else:
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _fail(kind: str, message: str) -> int:
    if not message:
        return 2  # the help was printed instead
    if "--json" in sys.argv:
        line = json.dumps({"error": kind, "message": message}, ensure_ascii=False)
    else:
        line = f"memwise: {cli_print.clean(' '.join(message.split()))}"
    print(line, file=sys.stderr)
    return 2


def _usage(problem: Any) -> str:
    """What is wrong with a command line, and where it is said what is right."""
    said = " ".join(problem.format_message().split()).rstrip(".")
    if not said:
        return ""
    verbs = [c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands]
    verb = next((word for word in sys.argv[1:2] if word in verbs), "")
    return f"{said[0].lower()}{said[1:]} (see `{' '.join(['memwise', verb]).strip()} --help`)"


def _file_trouble(problem: OSError) -> str:
    told = (problem.strerror or str(problem)).lower()
    return f"{told}: {problem.filename!r}" if problem.filename is not None else told


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"memwise {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """More memory for AI models from fewer bytes."""


@app.command()
def demo(
    db: Annotated[
        Path | None, typer.Option(help="Keep the memory in this new file.", metavar="FILE")
    ] = None,
    embedder: Annotated[str, typer.Option(help="auto, minilm, ngrams or none.")] = "auto",
) -> None:
    """Remember real conversations under a byte budget, and show what is found again."""
    from rich.console import Console

    from memwise.demo import run

    run(Console(), db, embedder)


@app.command()
def methods(
    glob: Annotated[str, typer.Argument(help="Names to list, with * and ?.")] = "*",
    room: Annotated[str, typer.Option(help="List one room only.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the papers, the methods built from them, and how far the evidence of each goes."""
    listing = catalogue.methods()
    rooms = sorted({row.room for row in listing})
    if room not in ("", *rooms):
        raise InvalidKnob(f"no room {room!r}; the rooms are {', '.join(rooms)}")

    chosen = [row for row in listing if room in ("", row.room) and _named(row, glob)]
    if not chosen:
        raise UnknownMethod(f"no paper or method is named {glob!r}; try '*{glob.strip('*')}*'")

    if as_json:
        _print_json(
            {
                "paper": row.paper,
                "name": row.name,
                "room": row.room,
                "state": row.state,
                "methods": list(row.methods),
            }
            for row in chosen
        )
        return
    table = [
        (str(row.paper), row.name, row.room, row.state, " ".join(row.methods)) for row in chosen
    ]
    _print_table([("id", "paper", "room", "state", "methods"), *table])
    counts = Counter(row.state for row in chosen)
    parts = (f"{counts[state]} {state}" for state in catalogue.STATES if counts[state])
    print(f"\n{len(chosen)} papers: {', '.join(parts)}")


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show one method: its paper, claim, knobs, check and recorded evidence."""
    planned = [
        row
        for row in catalogue.methods()
        if not row.cards and catalogue.snake(row.name) == catalogue.snake(name)
    ]
    if planned:
        _show_paper(planned[0], as_json)
        return

    entry = catalogue.find(name)
    if as_json:
        _print_json([_as_dict(entry)])
        return
    print(f"{entry.key}: {entry.summary}")
    if entry.about is not None:
        print(_reference(entry.about))
    print(f"\nclaim     {entry.claim}")
    print(f"state     {catalogue.state(entry)}")
    if entry.negative:
        print(f"negative  {entry.negative}")
    print(f"check     {entry.check}, beside {entry.baseline}")
    print(f"effect    {entry.better} by more than {entry.margin:g}")
    if entry.requires:
        print(f"requires  {', '.join(entry.requires)}")

    if entry.knobs:
        print()
        head = ("knob", "type", "default", "meaning")
        _print_table([head, *((k.name, k.type, k.default, k.doc) for k in entry.knobs)])
    _show_rows(entry)


@app.command()
def check(
    name: Name,
    data: Data = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the rows as the method's evidence.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a method's check beside its baseline and controls; exit 0 only where the effect shows."""
    from memwise.bench import engine

    if not as_json:
        cli_print.note(f"checking {name} ...")
    report = engine.check(name, data=data, seed=seed, record=record)
    if as_json:
        _print_json(report.json())
    else:
        print(report.text())
    raise typer.Exit(0 if report.effect else 1)


@app.command()
def bench(
    room: Annotated[str, typer.Argument(help="A room, such as recall.")],
    data: Data = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the rows and the plot.", metavar="DIR"),
    ] = None,
    items: Annotated[
        int | None, typer.Option(help="Texts of each set.", show_default="what the room wants")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a room side by side: quality, bytes and seconds of every method."""
    from memwise.bench import engine

    if not as_json:
        cli_print.note(f"running {room} side by side ...")
    comparison = engine.bench(room, data=data, out=out, n_items=items)
    if as_json:
        _print_json(comparison.json())
    else:
        print(comparison.text())


@app.command("run")
def run_(
    model: Annotated[
        str, typer.Argument(help="gemma (Gemma Terms of Use), or a Hugging Face folder.")
    ],
    file: Annotated[Path, typer.Argument(help="Text to read, or - for standard input.")] = Path(
        "-"
    ),
    budget: Annotated[
        str, typer.Option(help="Bytes of the KV cache at any moment.", metavar="SIZE")
    ] = "64MiB",
    question: Annotated[
        str, typer.Option(help="What comes after the text; it decides what is kept.")
    ] = "",
    tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 64,
    policy: Annotated[
        str | None,
        typer.Option(help="Cache policy.", show_default="by whether there is a question"),
    ] = None,
    chunk: Annotated[int, typer.Option(help="Tokens that are read at once.")] = 128,
    codec: Annotated[
        str | None, typer.Option(help="Of keys and values, e.g. int8/row.", show_default="none")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a long text inside a byte budget, and let the model write on."""
    catalogue.need("torch", what="memwise run")
    from memwise import cli_run

    cli_run.run(model, file, budget, question, policy, tokens, chunk, codec, as_json)


@app.command()
def tune(
    model: Annotated[
        str, typer.Argument(help="gemma (Gemma Terms of Use), or a Hugging Face folder.")
    ],
    data: Annotated[Path, typer.Argument(help="Text, or JSON lines (.jsonl).")],
    budget: Annotated[
        str | None, typer.Option(help="Bytes that no moment may exceed, e.g. 4GiB.", metavar="SIZE")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the results; a run cut off there goes on.")
    ] = Path("tuned"),
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 100,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    batch: Annotated[int, typer.Option(help="Windows of a forward pass.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Forward passes of a step.")] = 1,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate.", show_default="by what is trained")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="full, lora, qlora, peqa, ...", show_default="best that fits")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adamw4bit, ...", show_default="best that fits")
    ] = None,
    field: Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a language model on a file of text, inside a byte budget."""
    catalogue.need("torch", what="memwise tune")
    from memwise import cli_tune
    from memwise.train.tune import Settings

    settings = Settings(steps, context, batch, accumulate, lr, seed, adapter, optimizer, field)
    cli_tune.run(model, data, budget, out, settings, save_every, as_json)


def _named(row: Method, glob: str) -> bool:
    names = (row.name, *row.methods, *(key.partition("/")[2] for key in row.methods))
    return any(fnmatchcase(name.lower(), glob.lower()) for name in names)


def _show_paper(row: Method, as_json: bool) -> None:
    if as_json:
        _print_json([{**asdict(row.about), "state": row.state}])
    else:
        print(f"{row.name}: {row.state}, room {row.room}\n{_reference(row.about)}")


def _reference(paper: Paper) -> str:
    return " ".join(part for part in (paper.title, f"({paper.year})", paper.link) if part)


def _show_rows(entry: Entry) -> None:
    recorded = catalogue.rows(entry)
    if not recorded:
        print(f"\nno evidence recorded; run: memwise check {entry.key} --record")
        return
    print()
    table = [("metric", "value", entry.baseline, "95 % interval of the difference", "data")]
    for row in recorded:
        low, high = row["interval"]
        interval = f"[{low:+.4g}, {high:+.4g}]"
        table.append(
            (row["metric"], f"{row['value']:.4g}", f"{row['baseline']:.4g}", interval, row["data"])
        )
    _print_table(table)


def _as_dict(entry: Entry) -> dict[str, Any]:
    return {
        **asdict(entry),
        "path": f"{entry.room}/policies/{entry.path.name}",
        "state": catalogue.state(entry),
        "rows": catalogue.rows(entry),
    }


def _print_json(records: Iterable[object]) -> None:
    for record in records:
        print(json.dumps(record, ensure_ascii=False))


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
