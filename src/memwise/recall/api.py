"""What can be done with a memory, declared once: the command, REST and MCP are made from `VERBS`.

A verb is a function of a `Memory` and simply typed values that returns JSON. Its name is the
function's, its description and those of its parameters stand in the docstring.
"""
# ruff: noqa: D417 (the memory, always first, is no parameter of the verb)

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar, get_type_hints

from memwise.errors import InvalidKnob

if TYPE_CHECKING:
    from memwise.recall.engine.records import Hit, Receipt
    from memwise.recall.memory import Memory

Json: TypeAlias = "dict[str, Any] | list[Any]"
Content: TypeAlias = "str | dict[str, Any] | list[str | dict[str, Any]]"
REQUIRED: Any = inspect.Parameter.empty
_FROM_FILE = "given to the command as the name of a file"
FromFile: TypeAlias = Annotated[str, _FROM_FILE]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Hints:
    """What a caller may assume of a verb before calling it.

    Attributes:
        read_only: changes nothing that was told or derived (recall may note that it was used).
        destructive: takes something away.
        idempotent: a second call with the same arguments changes nothing more.
        operator: for whoever runs the memory; not offered to an agent that uses it.
    """

    read_only: bool = False
    destructive: bool = False
    idempotent: bool = False
    operator: bool = False


@dataclass(frozen=True)
class Param:
    """A parameter of a verb; `default` is `REQUIRED` where it must be given."""

    name: str
    type: Any
    default: Any
    doc: str
    from_file: bool

    @property
    def required(self) -> bool:
        """Must be given."""
        return self.default is REQUIRED


@dataclass(frozen=True)
class Verb:
    """A function of this module, with all that an interface needs to know about it."""

    name: str
    call: Callable[..., Json]
    params: tuple[Param, ...]
    summary: str
    about: str
    hints: Hints


def hints(
    *,
    read_only: bool = False,
    destructive: bool = False,
    idempotent: bool = False,
    operator: bool = False,
) -> Callable[[F], F]:
    """Attach hints to a verb."""

    def attach(function: F) -> F:
        function.__dict__["hints"] = Hints(read_only, destructive, idempotent, operator)
        return function

    return attach


# ---------------------------------------------------------------- writing


@hints()
def add(
    memory: Memory,
    content: Content,
    at: str | None = None,
    actor: str = "",
    session: str = "",
    meta: dict[str, Any] | None = None,
) -> Json:
    """Remember what was said.

    Args:
        content: A text, a message {"role", "content"}, or a list of these; a message may carry
            "at", "actor", "session" and "meta" of its own.
        at: When it was said: ISO 8601, or as chats write dates. Default is now.
        actor: Who said it.
        session: The conversation it belongs to.
        meta: Your own fields; they come back with every hit.
    """
    return receipt_json(memory.add(content, at=at, actor=actor, session=session, meta=meta))


@hints()
def update(memory: Memory, id: str, text: str) -> Json:
    """Replace the text of an item; the old one stays in its history.

    Args:
        id: The item, for example "t12".
        text: What it shall say.
    """
    return receipt_json(memory.update(id, text))


@hints(destructive=True, idempotent=True)
def delete(memory: Memory, id: str) -> Json:
    """Remove an item, and what rests on it alone, for good; this cannot be undone.

    Args:
        id: The item, for example "t12".
    """
    return {"deleted": list(memory.delete(id))}


@hints(destructive=True, idempotent=True)
def forget(memory: Memory, budget: str | None = None, before: str | None = None) -> Json:
    """Forget the least valuable items until the file fits a budget, or all before a date.

    Each forgotten item is listed with the reason, and `undo` brings it back while there is room.

    Args:
        budget: Bytes that the file may keep, for example "16MiB".
        before: Forget what happened before this date instead.
    """
    return receipt_json(memory.forget(budget=budget, before=before))


@hints(destructive=True)
def undo(memory: Memory, operation: int | None = None) -> Json:
    """Take back the last change of this bank, or the one of a given number.

    Args:
        operation: Number of the change, as its receipt names it.
    """
    return {"undone": memory.undo(operation)}


@hints(idempotent=True)
def reflect(memory: Memory) -> Json:
    """End the open session now, so that the policy derives what it derives from whole sessions."""
    return receipt_json(memory.reflect())


@hints(destructive=True, idempotent=True)
def rebuild(memory: Memory) -> Json:
    """Drop what the policy derived and derive it again from everything that was said."""
    return receipt_json(memory.rebuild())


@hints(operator=True)
def import_(memory: Memory, content: FromFile, format: str = "auto") -> Json:
    """Take in an export of memwise, of another memory, or of a chat.

    Args:
        content: The export itself.
        format: One of auto, memwise, mcp, mem0, markdown, chat.
    """
    from memwise.recall.interchange import import_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "import.jsonl"
        path.write_text(content, "utf-8")
        return receipt_json(import_file(memory, path, format))


# ---------------------------------------------------------------- reading


@hints(read_only=True, idempotent=True)
def search(
    memory: Memory,
    query: str,
    k: int = 10,
    kinds: list[str] | None = None,
    actor: str | None = None,
    session: str | None = None,
    since: str | None = None,
    until: str | None = None,
    at: str | None = None,
    known_at: str | None = None,
    where: dict[str, Any] | None = None,
) -> Json:
    """Find the items that answer a question best, with dates, sources and scores.

    Args:
        query: A question or some words.
        k: Most hits.
        kinds: Only these kinds, such as turn or fact.
        actor: Only what this person said.
        session: Only this conversation.
        since: Only what happened from this date on.
        until: Only what happened before this date.
        at: Only what was true at this date.
        known_at: As the memory knew it at this date.
        where: Only items whose meta has these values.
    """
    hits = memory.search(
        query, k, kinds=kinds or (), actor=actor, session=session, since=since, until=until,
        at=at, known_at=known_at, where=where,
    )  # fmt: skip
    return [_hit(hit) for hit in hits]


@hints(read_only=True, idempotent=True)
def context(
    memory: Memory,
    query: str,
    tokens: int = 1000,
    actor: str | None = None,
    session: str | None = None,
    since: str | None = None,
    until: str | None = None,
    at: str | None = None,
    known_at: str | None = None,
) -> Json:
    """Pack what answers a question into a block of text for a prompt.

    Args:
        query: A question or some words.
        tokens: Most tokens of the block, tags and dates included.
        actor: Only what this person said.
        session: Only this conversation.
        since: Only what happened from this date on.
        until: Only what happened before this date.
        at: Only what was true at this date.
        known_at: As the memory knew it at this date.
    """
    packed = memory.context(
        query, tokens, actor=actor, session=session, since=since, until=until, at=at,
        known_at=known_at,
    )  # fmt: skip
    return {
        "text": packed.text,
        "tokens": packed.tokens,
        "parts": [
            {**_hit(part), "form": form}
            for part, form in zip(packed.parts, packed.forms, strict=True)
        ],
    }


@hints(read_only=True, idempotent=True)
def facts(
    memory: Memory,
    subject: str | None = None,
    relation: str | None = None,
    object: str | None = None,
    at: str | None = None,
    known_at: str | None = None,
    k: int | None = None,
    skip: int = 0,
) -> Json:
    """List facts, oldest first; with a date what was true, or what was believed, then.

    Args:
        subject: Whom or what they are about.
        relation: Only this relation, such as "lives in".
        object: Only this value.
        at: What was true at this date.
        known_at: What the memory believed at this date.
        k: Most facts; default is all.
        skip: So many are left out first: what earlier pages showed.
    """
    page = _page(k, skip)
    found = memory.facts(subject, relation, object, at=at, known_at=known_at)
    return [_hit(hit) for hit in found[page]]


@hints(read_only=True, idempotent=True)
def timeline(memory: Memory, entity: str, k: int = 50, skip: int = 0) -> Json:
    """List what is known of someone or something in the order of time.

    Args:
        entity: A name.
        k: Most entries.
        skip: So many are left out first: what earlier pages showed.
    """
    page = _page(k, skip)
    if not entity.strip():
        raise InvalidKnob("the entity is empty; give a name")
    return [_hit(hit) for hit in memory.timeline(entity, page.stop)[page]]


@hints(read_only=True, idempotent=True)
def get(memory: Memory, id: str) -> Json:
    """Show one item and the turns it rests on.

    Args:
        id: The item, for example "t12".
    """
    return _hit(memory.get(id))


@hints(read_only=True, idempotent=True)
def history(memory: Memory, id: str, k: int | None = None, skip: int = 0) -> Json:
    """List what happened to an item: when it was learnt, from what, and what superseded it.

    Args:
        id: The item, for example "t12".
        k: Most events; default is all.
        skip: So many are left out first: what earlier pages showed.
    """
    page = _page(k, skip)
    return list(memory.history(id)[page])


@hints(read_only=True, idempotent=True)
def report(memory: Memory) -> Json:
    """Show where every byte lies."""
    ledger = memory.report()
    return {
        "bytes": ledger.total(),
        "lines": [{"tier": tier, "kind": kind, "bytes": now} for tier, kind, now, _ in ledger],
    }


@hints(read_only=True, idempotent=True)
def stats(memory: Memory) -> Json:
    """Show the bank's policy, the file's embedder and how many items of each kind there are."""
    items = memory.stats()
    return {
        "bank": memory.bank,
        "policy": memory.policy.name,
        "embedder": str(memory.view().store.meta("embedder")),
        "n_items": sum(items.values()),
        "items": items,
        "bytes": memory.report().total(),
    }


@hints(read_only=True, idempotent=True, operator=True)
def banks(memory: Memory, k: int | None = None, skip: int = 0) -> Json:
    """List the banks of the file.

    Args:
        k: Most banks; default is all.
        skip: So many are left out first: what earlier pages showed.
    """
    page = _page(k, skip)
    store = memory.view().store
    return [
        {
            "bank": bank.name,
            "policy": bank.policy or "plain",
            "n_items": sum(store.counts(bank).values()),
        }
        for bank in store.banks()[page]
    ]


@hints(read_only=True, idempotent=True, operator=True)
def export(memory: Memory) -> Json:
    """Write out the bank as canonical JSON lines, the `content` that `import` takes in again."""
    from memwise.recall.interchange import export_bank

    return {"content": "".join(f"{line.rstrip()}\n" for line in export_bank(memory))}


def _page(k: int | None, skip: int) -> slice:
    if k is not None and k < 1:
        raise InvalidKnob(f"k={k}: ask for at least 1 entry")
    if skip < 0:
        raise InvalidKnob(f"skip={skip}: leave out 0 or more entries")
    return slice(skip, None if k is None else skip + k)


def _of_text(function: Callable[..., Json]) -> Callable[..., Json]:
    """The verb behind a check that what is told is text: binary data could not be stored or found.

    What a client sends as JSON may hold any half of a surrogate pair.
    """

    @wraps(function)
    def call(memory: Memory, *args: Any, **given: Any) -> Json:
        from memwise.recall.engine.intake import is_text

        for name, value in given.items():
            inside = [*value, *value.values()] if isinstance(value, dict) else [value]
            if not all(is_text(text) for text in inside if isinstance(text, str)):
                raise InvalidKnob(
                    f"{name} holds NUL characters or lone surrogates: it looks like binary data"
                )
        return function(memory, *args, **given)

    return call


# ---------------------------------------------------------------- as JSON


def _hit(hit: Hit) -> dict[str, Any]:
    return {
        "id": hit.id,
        "kind": hit.kind,
        "text": hit.text,
        "score": float(hit.score),
        "at": hit.at,
        "actor": hit.actor,
        "session": hit.session,
        "meta": dict(hit.meta),
        "why": {name: float(part) for name, part in hit.why.items()},
        "sources": [
            {
                "id": source.id,
                "text": source.text,
                "at": source.at,
                "actor": source.actor,
                "session": source.session,
                "meta": dict(source.meta),
            }
            for source in hit.sources
        ],
    }


def receipt_json(receipt: Receipt) -> dict[str, Any]:
    """A receipt as JSON."""
    out = asdict(receipt)
    out["forgotten"] = [{"id": id, "why": why} for id, why in receipt.forgotten]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in out.items()}


# ---------------------------------------------------------------- the list


def _verb(function: Callable[..., Json]) -> Verb:
    # Only the memory itself is not described, so its class need not be imported for this.
    types = get_type_hints(function, localns={"Memory": object}, include_extras=True)
    about, _, arguments = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")
    docs = dict(_documented(arguments))
    params = []
    for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
        marks = getattr(types[name], "__metadata__", ())
        bare = types[name].__origin__ if marks else types[name]
        params.append(Param(name, bare, parameter.default, docs[name], _FROM_FILE in marks))
    return Verb(
        function.__name__.rstrip("_"), _of_text(function), tuple(params),
        about.partition("\n")[0], about, function.__dict__["hints"],
    )  # fmt: skip


def _documented(arguments: str) -> Iterator[tuple[str, str]]:
    """(name, description) of each entry of a docstring's `Args`."""
    entries: list[str] = []
    for line in arguments.splitlines():
        if line.startswith("        "):
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    for entry in entries:
        name, _, text = entry.partition(": ")
        yield name, text


_FUNCTIONS: tuple[Callable[..., Json], ...] = (
    add, search, context, facts, timeline, get, update, delete, history, forget, undo, report,
    stats, reflect, rebuild, banks, import_, export,
)  # fmt: skip
VERBS: Mapping[str, Verb] = {verb.name: verb for verb in map(_verb, _FUNCTIONS)}
"""All verbs by name, in the order in which they are listed."""


def bank_names(path: str | Path) -> list[str]:
    """The banks of a file, without making the file or a bank.

    Raises:
        InvalidKnob: there is no such file.
        StoreCorrupt, StoreLocked: it cannot be read.
    """
    from memwise.recall.engine.store import SQLite

    if not Path(path).is_file():
        raise InvalidKnob(f"there is no memory file {str(path)!r}; adding something makes one")
    store = SQLite(path)
    try:
        with store.guard():
            return [bank.name for bank in store.banks()]
    finally:
        store.close()


__all__ = ["REQUIRED", "VERBS", "Content", "Hints", "Param", "Verb", "bank_names", "receipt_json"]
