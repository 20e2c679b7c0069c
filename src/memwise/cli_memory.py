"""The memory verbs of the command, made from the list in `recall/api.py`.

A required argument may be `-`: each line of stdin is then one call, as plain text or as a JSON
object with the verb's parameters, so that what one verb prints with `--json` another one reads.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_args

import typer

from memwise import cli_print
from memwise.budget import Budget
from memwise.catalogue import need
from memwise.errors import InvalidKnob, MemwiseError, UnknownItem
from memwise.recall.api import VERBS, Param, Verb, bank_names, receipt_json

if TYPE_CHECKING:
    from memwise.recall.chat import Chat
    from memwise.recall.engine.records import Add
    from memwise.recall.memory import Memory

Item: TypeAlias = "str | dict[str, Any]"
STDIN = "-"
_MAKE = ("add", "import")  # verbs that may make a file or a bank
_SLOW = ("forget", "reflect", "rebuild", "report")
_PART = 1000  # items stored between two steps of the progress bar
_FILES = {".json", ".jsonl", ".ndjson", ".txt", ".md", ".csv", ".log"}


def register(app: typer.Typer) -> None:
    """Add the verbs of a memory to a command."""
    for verb in VERBS.values():
        app.command(verb.name, help=verb.about, rich_help_panel="Memory")(_command(verb))
    for command in (doctor, chat, serve, mcp):
        app.command(rich_help_panel="Memory")(command)


# ---------------------------------------------------------------- where the memory is

Db = Annotated[str, typer.Option(envvar="MEMWISE_DB", metavar="FILE", help="The memory file.")]
BankName = Annotated[str, typer.Option(envvar="MEMWISE_BANK", help="Bank within the file.")]
PolicyName = Annotated[
    str | None, typer.Option(help="How memories are kept; see `memwise methods --room recall`.")
]
EmbedderName = Annotated[
    str, typer.Option(help="auto, minilm, ngrams, none, a folder or a URL; chosen once a file.")
]
Url = Annotated[
    str | None, typer.Option(metavar="URL", help="OpenAI-compatible URL#model; default is none.")
]
Bytes = Annotated[str | None, typer.Option(help="Most bytes of file and indexes, as in 64MiB.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]


@dataclass(frozen=True)
class Place:
    """The options that all verbs share: which memory, and how it is opened."""

    db: Db = "notes.db"
    bank: BankName = "default"
    policy: PolicyName = None
    embedder: EmbedderName = "auto"
    llm: Url = None
    budget: Bytes = None
    as_json: AsJson = False

    def open(self, *, make: bool = False) -> Memory:
        """The memory; without `make` the file and the bank have to be there.

        Raises:
            InvalidKnob: they are not.
        """
        from memwise.recall.memory import Memory

        if not make:
            known = bank_names(self.db)
            if self.bank not in known:
                listed = ", ".join(map(repr, known[:10])) or "nothing yet"
                raise InvalidKnob(
                    f"{self.db} has no bank {self.bank!r}; it holds {listed} (adding makes a bank)"
                )
        return Memory(
            self.db, self.bank, self.policy, embedder=self.embedder, llm=self.llm,
            budget=self.budget,
        )  # fmt: skip

    def print(self, verb: str, result: Any) -> None:
        """Print a result in the form that was asked for."""
        if self.as_json:
            cli_print.as_json(result)
        else:
            cli_print.show(verb, result)


# ---------------------------------------------------------------- the generated verbs


def _command(verb: Verb) -> Callable[..., None]:
    own = {param.name: param for param in verb.params}
    shared = [field for field in fields(Place) if field.name not in own]

    def run(**given: Any) -> None:
        place = Place(**{field.name: given[field.name] for field in shared})
        values = {name: _decoded(param, given[name]) for name, param in own.items()}
        _RUN.get(verb.name, _run)(verb, place, values)

    first = next((param for param in verb.params if param.required), None)
    parameters = [_parameter(param, leads=param is first) for param in verb.params]
    types = inspect.get_annotations(Place, eval_str=True)
    parameters += [_keyword(field.name, types[field.name], field.default) for field in shared]
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__name__ = verb.name
    return run


def _parameter(param: Param, *, leads: bool) -> inspect.Parameter:
    bare = [kind for kind in get_args(param.type) if kind is not type(None)] or [param.type]
    kind: Any = bare[0]
    if param.required:
        plain = _METAVARS.get(param.name, f"{param.name}|-".upper())
        shown = "FILE|-" if param.from_file else plain
        about = typer.Argument(help=param.doc, metavar=shown, show_default=False)
        # Only the first has to be there: with `-` the others come from the lines of stdin.
        return (
            _keyword(param.name, Annotated[str, about])
            if leads
            else _keyword(param.name, Annotated[str | None, about], None)
        )
    text = getattr(kind, "__origin__", kind) is dict
    about_option = typer.Option(
        f"--{param.name.replace('_', '-')}", help=param.doc, metavar="JSON" if text else None
    )
    wanted = str if text else kind
    if param.default is None:
        wanted = wanted | None
    return _keyword(param.name, Annotated[wanted, about_option], param.default)


_METAVARS = {"content": "TEXT|FILE|-"}


def _keyword(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
    )


def _decoded(param: Param, value: Any) -> Any:
    """What was typed, as the verb takes it: mappings are typed as JSON, no option means None."""
    mapping = any(getattr(kind, "__origin__", kind) is dict for kind in get_args(param.type))
    if param.required or not mapping or value is None:
        return value or None if isinstance(value, list) else value
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise InvalidKnob(f"--{param.name} {value!r} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise InvalidKnob(f"--{param.name} {value!r} must be a JSON object, as in '{{\"ref\": 7}}'")
    return found


def _run(verb: Verb, place: Place, values: dict[str, Any]) -> None:
    required = [param.name for param in verb.params if param.required]
    if required and values[required[0]] == STDIN:
        _run_lines(verb, place, values, required)
        return
    _demand(verb, values, required)
    with place.open() as memory:
        if verb.name in _SLOW:
            with cli_print.working(f"{verb.name} ..."):
                result = verb.call(memory, **values)
        else:
            result = verb.call(memory, **values)
        place.print(verb.name, result)


def _run_lines(verb: Verb, place: Place, values: dict[str, Any], required: list[str]) -> None:
    with place.open() as memory:
        for number, line in enumerate(sys.stdin.buffer, 1):
            if not line.strip():
                continue
            where = f"stdin, line {number}"
            try:
                given = _values(verb, _text(line, where), required[0])
                call = {**values, required[0]: None, **given}
                _demand(verb, call, required)
                result = verb.call(memory, **call)
            except (InvalidKnob, UnknownItem) as error:
                raise type(error)(f"{where}: {error}") from error
            if place.as_json:
                cli_print.as_json({required[0]: call[required[0]], "result": result})
            else:
                cli_print.show(verb.name, result)


def _values(verb: Verb, line: str, first: str) -> dict[str, Any]:
    """The values in a line of stdin: an object's fields that the verb knows, or a plain text."""
    with suppress(json.JSONDecodeError):
        found = json.loads(line)
        if isinstance(found, dict):
            return {p.name: _typed(p, found[p.name]) for p in verb.params if p.name in found}
    return {first: line.strip()}


def _typed(param: Param, value: Any) -> Any:
    named = get_args(param.type) or [param.type]
    kinds = tuple(getattr(kind, "__origin__", kind) for kind in named)
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise InvalidKnob(f"{param.name}={value!r} must be {wanted}")
    return value


def _demand(verb: Verb, values: Mapping[str, Any], required: list[str]) -> None:
    if missing := [name for name in required if values[name] is None]:
        raise InvalidKnob(f"memwise {verb.name} needs {missing[0].upper()}")


# ---------------------------------------------------------------- verbs that read or write files


def _add(verb: Verb, place: Place, values: dict[str, Any]) -> None:
    """Store all of a file or nothing of it, in parts so that progress shows."""
    from memwise.recall.engine.records import Receipt

    now = time.time_ns() // 1000
    adds = _drafted(values, now)
    receipt = Receipt()
    with place.open(make=True) as memory, cli_print.counting("adding") as draw:
        try:
            for start in range(0, len(adds), _PART):
                draw(start, len(adds))
                with memory.whole(receipt.operation):
                    part = adds[start : start + _PART]
                    receipt += memory.ingest(part, now, receipt.operation)
        except KeyboardInterrupt:
            if receipt.operation is not None:
                memory.undo(receipt.operation)
            raise
    place.print(verb.name, receipt_json(receipt))


def _drafted(values: Mapping[str, Any], now: int) -> list[Add]:
    """All that is to be added, checked to the last line before the first is stored."""
    from memwise.recall.engine.dates import instant
    from memwise.recall.engine.intake import drafts

    when = None if values["at"] is None else instant(values["at"])
    rest = {"actor": values["actor"], "session": values["session"], "meta": values["meta"] or {}}
    adds: list[Add] = []
    for i, (where, item) in enumerate(_contents(values["content"])):
        try:
            adds += drafts(item, at=when, now=now + i, **rest)
        except InvalidKnob as error:
            raise InvalidKnob(f"{where}: {error}" if where else str(error)) from error
    return adds


def _contents(given: str) -> Iterator[tuple[str, Item]]:
    """(place, text or message) of what TEXT|FILE|- stands for."""
    name = "stdin" if given == STDIN else given
    if given != STDIN and not _is_file(given):
        yield "", given
        return
    raw = sys.stdin.buffer.read() if given == STDIN else Path(given).read_bytes()
    text = _text(raw, name)
    if not text.strip():
        raise InvalidKnob(f"{name} is empty; there is nothing to remember")
    first = text.lstrip().partition("\n")[0]
    if first.startswith("{") and _parsed(first) is not None:
        yield from _lines(text, name)
    elif text.lstrip().startswith(("{", "[")) and (whole := _parsed(text)) is not None:
        listed = whole if isinstance(whole, list) else [whole]
        yield from ((f"{name}, item {i}", item) for i, item in enumerate(listed, 1))
    elif name.endswith((".json", ".jsonl", ".ndjson")):
        yield from _lines(text, name)  # which names the line that is wrong
    else:
        yield name, text


def _lines(text: str, name: str) -> Iterator[tuple[str, Item]]:
    # Not splitlines(): JSON strings may hold other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{name}, line {number}"
            yield where, _loads(line, where)


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidKnob(f"{where} is not JSON ({error})") from error


def _parsed(text: str) -> Any:
    with suppress(json.JSONDecodeError, RecursionError):
        return json.loads(text)
    return None


def _is_file(given: str) -> bool:
    path = Path(given)
    with suppress(OSError):  # a long text is no file name
        if path.is_file():
            return True
        if path.suffix.lower() in _FILES and not any(map(str.isspace, given)):
            raise InvalidKnob(f"there is no file {given!r}; to store a text, write a sentence")
    return False


def _text(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidKnob(
            f"{name} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def _import(verb: Verb, place: Place, values: dict[str, Any]) -> None:
    from memwise.recall.interchange import import_file

    if values["content"] == STDIN:
        text = _text(sys.stdin.buffer.read(), "stdin")
        with place.open(make=True) as memory, cli_print.working("importing ..."):
            receipt = verb.call(memory, content=text, format=values["format"])
    else:
        path = Path(values["content"])
        if not path.exists():
            raise InvalidKnob(f"there is no file or folder {str(path)!r}")
        with place.open(make=True) as memory, cli_print.counting("importing") as draw:
            receipt = receipt_json(import_file(memory, path, values["format"], draw))
    place.print(verb.name, receipt)


def _export(verb: Verb, place: Place, values: dict[str, Any]) -> None:
    from memwise.recall.interchange import export_bank

    with place.open() as memory:
        for line in export_bank(memory):
            sys.stdout.write(f"{line.rstrip()}\n")


def _banks(verb: Verb, place: Place, values: dict[str, Any]) -> None:
    names = bank_names(place.db)
    if not names:
        place.print(verb.name, [])
        return
    bank = place.bank if place.bank in names else names[0]
    with Place(place.db, bank, embedder=place.embedder).open() as memory:
        place.print(verb.name, verb.call(memory))


_RUN: Mapping[str, Callable[[Verb, Place, dict[str, Any]], None]] = {
    "add": _add,
    "import": _import,
    "export": _export,
    "banks": _banks,
}


# ---------------------------------------------------------------- commands of their own


def doctor(
    file: Annotated[Path, typer.Argument(help="A memory file.", metavar="FILE")],
    repair: Annotated[bool, typer.Option("--repair", help="Save what can be saved.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the repaired file goes.", metavar="FILE")
    ] = None,
    reembed: Annotated[
        bool, typer.Option("--reembed", help="Make all vectors anew with --embedder.")
    ] = False,
    embedder: EmbedderName = "auto",
    as_json: AsJson = False,
) -> None:
    """Prove that a file's indexes agree with its contents, or repair it; exit 1 on damage."""
    from memwise.recall import doctor as medicine

    if reembed:
        with cli_print.counting("embedding") as draw:
            found = medicine.reembed(file, embedder, draw)
    elif repair:
        with cli_print.counting("repairing") as draw:
            found = medicine.repair(file, out, draw)
    else:
        with cli_print.counting("examining") as draw:
            found = medicine.examine(file, draw)
    if as_json:
        cli_print.as_json({**asdict(found), "ok": found.ok})
    else:
        print(cli_print.clean(str(found)))
    raise typer.Exit(0 if found.ok or found.done else 1)


def chat(
    db: Db = "notes.db",
    bank: BankName = "default",
    policy: PolicyName = None,
    embedder: EmbedderName = "auto",
    llm: Url = None,
    budget: Bytes = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of recalled memory a turn.")] = 300,
    actor: Annotated[str, typer.Option(help="Your name.")] = "user",
    session: Annotated[str, typer.Option(help="Name of this conversation.")] = "chat",
    as_json: AsJson = False,
) -> None:
    """Talk with a model that remembers: one behind --llm, or the local Gemma-3-270M."""
    from memwise.models import local_model, notice
    from memwise.recall.chat import Chat
    from memwise.recall.engine.client import ChatClient, parse_llm

    place = Place(db, bank, policy, embedder, llm, budget, as_json)
    if llm is None:
        cli_print.note(notice)
    model = local_model() if llm is None else ChatClient(*parse_llm(llm))
    with place.open(make=True) as memory:
        talk = Chat(memory, model, tokens=tokens, actor=actor, session=session)
        for said in _said():
            _answer(talk, said, as_json)


def _said() -> Iterator[str]:
    """What the user types, or the lines of stdin, until it ends."""
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer, 1):
            if text := _text(line, f"stdin, line {number}").strip():
                yield text
        return
    cli_print.note("end with Ctrl-D")
    with suppress(EOFError):
        while True:
            if text := input("you: ").strip():
                yield text


def _answer(talk: Chat, said: str, as_json: bool) -> None:
    try:
        pieces = talk.reply(said)
        if as_json:
            cli_print.as_json({"said": said, "answer": "".join(pieces)})
            return
        for piece in pieces:
            print(cli_print.clean(piece), end="", flush=True)
        print()
    except MemwiseError as problem:
        if not sys.stdin.isatty():
            raise
        # What was said is stored; a model that failed once may answer the next time.
        cli_print.note(f"memwise: {problem}")


Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)]
Token = Annotated[
    str | None,
    typer.Option(envvar="MEMWISE_TOKEN", help="Bearer token that every request must carry."),
]


def serve(
    db: Db = "notes.db",
    policy: PolicyName = None,
    embedder: EmbedderName = "auto",
    llm: Url = None,
    budget: Bytes = None,
    host: Host = "127.0.0.1",
    port: Port = 8765,
    token: Token = None,
    body: Annotated[str, typer.Option(help="Most bytes of one request, as in 16MiB.")] = "16MiB",
) -> None:
    """Serve all banks of a file: REST at /v1, its description at /openapi.json, a page at /."""
    need("serve", what="memwise serve")
    from memwise.serve import Options, Pool, rest

    pool = Pool(db, Options(policy, embedder, llm, budget))
    rest.run(pool, host, port, token, Budget(body))


def mcp(
    db: Db = "notes.db",
    bank: BankName = "default",
    policy: PolicyName = None,
    embedder: EmbedderName = "auto",
    llm: Url = None,
    budget: Bytes = None,
    profile: Annotated[str, typer.Option(help="default, all or memory-server.")] = "default",
    http: Annotated[bool, typer.Option("--http", help="Streamable HTTP instead of stdio.")] = False,
    host: Host = "127.0.0.1",
    port: Port = 8766,
    token: Token = None,
) -> None:
    """Serve one bank to agents as MCP tools, over stdio or streamable HTTP at /mcp."""
    need("serve", what="memwise mcp")
    from memwise.serve import mcp as server

    with Place(db, bank, policy, embedder, llm, budget).open(make=True) as memory:
        if http:
            server.run_http(memory, profile, host, port, token)
        else:
            server.run_stdio(memory, profile)
