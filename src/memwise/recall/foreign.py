"""What other programs write: their exports, read as entries that a memory can store.

Every reader yields entries in order and raises `InvalidKnob`, with the place, on what it cannot
read. Formats of one JSON value a line are read line by line; a JSON document is read whole.

    mcp       memory.jsonl of the MCP memory server: entities, observations, relations
    mem0      a list, or {"results": [...]}, of {"memory", "metadata", "created_at", "user_id"}
    chat      conversations.json of ChatGPT or Claude, LoCoMo, ShareGPT, {"messages": [...]}, or
              plain messages {"role", "content"}, as one document or a line each
    markdown  a file or a folder of .md files: an entry a section, front matter as meta
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from memwise.errors import InvalidKnob

FORMATS = ("memwise", "mcp", "mem0", "chat", "markdown")
Json: TypeAlias = Any

_ROLES = {"human": "user", "ai": "assistant", "bot": "assistant", "model": "assistant",
          "gpt": "assistant"}  # fmt: skip
_TEXT = ("content", "text", "value", "message", "clean_text")
_WHO = ("role", "from", "sender", "author", "speaker")
_WHEN = ("at", "timestamp", "created_at", "create_time", "time", "date", "datetime")
_SESSION = ("session", "session_id", "conversation_id", "thread_id", "chat_id")
_MILLISECONDS = 1e11  # seconds since 1970 beyond this would be the year 5138
_SESSION_KEY = re.compile(r"session_(\d+)")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*")
_FENCE = re.compile(r"\s*(```|~~~)")
_FIELD = re.compile(r"([\w-][\w .-]*):(?:\s+(.*))?")


@dataclass(frozen=True)
class Entry:
    """Something to be stored as a source.

    Attributes:
        text: what it says; an empty one is left out.
        place: where it stands, for messages about it.
        kind: kind of source; None = a turn, or chunks if it is long.
        role: role of the speaker, checked when it is stored.
        actor: who said it, or whom it is about.
        at: when, as the file writes it; None = unknown.
        session: the conversation it belongs to.
        meta: fields that come back with every hit.
        fact: subject, relation and object, if it states exactly this.
    """

    text: str
    place: str
    kind: str | None = None
    role: str | None = None
    actor: str = ""
    at: str | float | None = None
    session: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    fact: tuple[str, str, str] | None = None


Entries: TypeAlias = Callable[[], Iterator[Entry]]


def sniff(path: Path) -> str:
    """The format of a file or folder, one of `FORMATS`.

    Raises:
        InvalidKnob: it is none of them.
    """
    if path.is_dir() or path.suffix.lower() in (".md", ".markdown"):
        return "markdown"
    _refuse_binary(path)
    first = next(_lines(path, strict=False), (0, None))[1]
    if isinstance(first, dict) and first.get("format") == "memwise":
        return "memwise"
    sample = _document(path) if first is None or isinstance(first, list) else first
    if isinstance(sample, list):
        sample = sample[0] if sample else None
    if isinstance(sample, dict):
        keys = sample.keys()
        if sample.get("type") in ("entity", "relation") or keys >= {"entities", "relations"}:
            return "mcp"
        if "memory" in keys or "results" in keys:
            return "mem0"
        if _is_chat(sample):
            return "chat"
    shown = sorted(sample)[:5] if isinstance(sample, dict) else type(sample).__name__
    raise InvalidKnob(
        f"{path} holds nothing that memwise can import (its first value is or has {shown}); it "
        f"reads {', '.join(FORMATS)}: give format= if it is one of these"
    )


def reader(path: Path, form: str) -> Entries:
    """A function that yields the entries of a file from the start, each time it is called."""
    if form == "markdown":
        return lambda: _markdown(path)
    if path.is_dir():
        raise InvalidKnob(f"{path} is a folder; a folder can only be read as markdown")
    _refuse_binary(path)
    first = next(_lines(path, strict=False), (0, None))[1]
    by_line = isinstance(first, dict) and _has_more_lines(path)
    document = None if by_line else _document(path)

    def values() -> Iterator[tuple[str, Json]]:
        if by_line:
            yield from ((f"line {n}", value) for n, value in _lines(path))
            return
        for i, value in enumerate(_listed(document)):
            yield f"item {i}", value

    read = {"mcp": _mcp, "mem0": _mem0, "chat": _chat}[form]
    return lambda: (entry for place, value in values() for entry in read(value, place))


# ---------------------------------------------------------------- files


def _refuse_binary(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InvalidKnob(f"{path} cannot be read: {error.strerror}") from error
    if head.startswith(b"SQLite format 3\0"):
        raise InvalidKnob(
            f"{path} is a memory file itself; open it with Memory({str(path)!r}) and import its "
            "export instead"
        )
    if head.startswith(b"PK\3\4"):
        raise InvalidKnob(f"{path} is a ZIP archive; unpack it and give the file in it")
    if b"\0" in head:
        raise InvalidKnob(f"{path} is binary; give a UTF-8 text file")


def _lines(path: Path, *, strict: bool = True) -> Iterator[tuple[int, Json]]:
    """(number, value) of each line that is not blank; not `strict` ends at the first bad one."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    if not strict:
                        return
                    raise InvalidKnob(f"{path}, line {number} is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidKnob(f"{path} is not UTF-8 ({error.reason} at {error.start})") from error


def _has_more_lines(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        filled = (1 for line in file if line.strip())
        return len([*zip(filled, range(2), strict=False)]) > 1


def _document(path: Path) -> Json:
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidKnob(f"{path} is not UTF-8 ({error.reason} at {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidKnob(f"{path} is not JSON: {error}") from error


def _listed(document: Json) -> Sequence[Json]:
    if isinstance(document, dict) and isinstance(document.get("results"), list):
        return list(document["results"])
    if isinstance(document, dict) and isinstance(document.get("entities"), list):
        return [
            {"type": name, **value}
            for name, key in (("entity", "entities"), ("relation", "relations"))
            for value in document.get(key) or ()
            if isinstance(value, dict)
        ]
    return document if isinstance(document, list) else [document]


def _need(value: Json, key: str, place: str) -> str:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, str) or not found.strip():
        raise InvalidKnob(f"{place}: {key!r} must be a text, not {found!r}")
    return found


def _first(value: Mapping[str, Json], keys: Sequence[str]) -> Json:
    return next((value[key] for key in keys if value.get(key) is not None), None)


# ---------------------------------------------------------------- memories


def _mcp(value: Json, place: str) -> Iterator[Entry]:
    if not isinstance(value, dict) or value.get("type") not in ("entity", "relation"):
        raise InvalidKnob(f"{place}: an entity or a relation with its 'type' is wanted")
    if value["type"] == "relation":
        who, what, whom = (_need(value, key, place) for key in ("from", "relationType", "to"))
        meta = {"mcp": "relation", "from": who, "relationType": what, "to": whom}
        text = f"{who} {what.replace('_', ' ')} {whom}"
        yield Entry(text, place, "row", actor=who, meta=meta, fact=(who, what, whom))
        return
    name, kind = _need(value, "name", place), _need(value, "entityType", place)
    meta = {"mcp": "entity", "name": name, "entityType": kind}
    yield Entry(f"{name} ({kind})", place, "row", actor=name, meta=meta)
    observations = value.get("observations", [])
    if not isinstance(observations, list) or not all(isinstance(o, str) for o in observations):
        raise InvalidKnob(f"{place}: 'observations' must be a list of texts")
    for text in observations:
        meta = {"mcp": "observation", "name": name}
        yield Entry(text, place, "row", actor=name, meta=meta)


def _mem0(value: Json, place: str) -> Iterator[Entry]:
    text = _need(value, "memory", place)
    metadata = value.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise InvalidKnob(f"{place}: 'metadata' must be a mapping, not {metadata!r}")
    own = {f"mem0_{key}": value[key] for key in ("id", "agent_id", "categories") if value.get(key)}
    yield Entry(
        text, place, "row", actor=str(value.get("user_id") or value.get("agent_id") or ""),
        at=_when(value), session=str(value.get("run_id") or ""), meta={**metadata, **own},
    )  # fmt: skip


# ---------------------------------------------------------------- conversations


def _is_chat(value: Mapping[str, Json]) -> bool:
    if any(key in value for key in ("mapping", "chat_messages", "messages", "conversations")):
        return True
    if isinstance(value.get("conversation"), dict):
        return True
    return _first(value, _TEXT) is not None and _first(value, _WHO) is not None


def _chat(value: Json, place: str) -> Iterator[Entry]:
    if not isinstance(value, dict) or not _is_chat(value):
        raise InvalidKnob(
            f"{place}: a message {{'role', 'content'}} or a conversation of one of the usual "
            "exports is wanted"
        )
    if isinstance(value.get("mapping"), dict):
        messages = _chatgpt(value, place)
    elif isinstance(value.get("conversation"), dict):
        yield from _locomo(value, place)
        return
    else:
        listed = _first(value, ("chat_messages", "messages", "conversations"))
        if listed is None:
            yield _message(value, place)
            return
        if not isinstance(listed, list):
            raise InvalidKnob(f"{place}: the messages must be a list")
        messages = listed
    title = str(value.get("title") or value.get("name") or "")
    keys = ("uuid", "conversation_id", "id", *_SESSION)
    session = str(_first(value, keys) or title or place)
    began = _when(value)
    for i, message in enumerate(messages):
        entry = _message(message, f"{place}, message {i}", _later(began, i))
        meta = {**entry.meta, "title": title} if title else entry.meta
        yield _with(entry, session=entry.session or session, meta=meta)


def _with(entry: Entry, *, session: str, meta: Mapping[str, Any]) -> Entry:
    return Entry(
        entry.text, entry.place, entry.kind, entry.role, entry.actor, entry.at, session[:256], meta
    )


def _later(began: str | float | None, i: int) -> str | float | None:
    """The time of message i of a conversation of which only the beginning is known."""
    return began + i * 1e-6 if isinstance(began, float) else began


def _chatgpt(value: Mapping[str, Json], place: str) -> list[Json]:
    """Messages of the branch that was shown last, oldest first."""
    nodes = value["mapping"]
    node = value.get("current_node") or next(reversed(nodes), None)
    branch: list[Json] = []
    seen = set()
    while node is not None and node not in seen:
        seen.add(node)
        if not isinstance(nodes.get(node), dict):
            raise InvalidKnob(f"{place}: the conversation refers to message {node!r}, not in it")
        message = nodes[node].get("message")
        hidden = ((message or {}).get("metadata") or {}).get("is_visually_hidden_from_conversation")
        if isinstance(message, dict) and not hidden:
            author = message.get("author") or {}
            content = message.get("content") or {}
            parts = content.get("parts") or [content.get("text") or ""]
            branch.append(
                {
                    "role": author.get("role"), "name": author.get("name"),
                    "content": [_part(part) for part in parts],
                    "create_time": message.get("create_time"),
                }
            )  # fmt: skip
        node = nodes[node].get("parent")
    return branch[::-1]


def _part(part: Json) -> Json:
    if isinstance(part, str):
        return part
    kind = part.get("content_type", "attachment") if isinstance(part, dict) else "attachment"
    return {"type": kind.replace("_asset_pointer", "")}


def _locomo(value: Mapping[str, Json], place: str) -> Iterator[Entry]:
    talk = value["conversation"]
    numbers = sorted(int(m[1]) for m in map(_SESSION_KEY.fullmatch, talk) if m)
    for number in numbers:
        began = talk.get(f"session_{number}_date_time")
        session = f"{value.get('sample_id') or place} session {number}"
        for i, turn in enumerate(talk[f"session_{number}"]):
            entry = _message(turn, f"{place}, session {number}, turn {i}", began)
            caption = turn.get("blip_caption")
            text = f"{entry.text} [image: {caption}]".strip() if caption else entry.text
            yield _with(
                Entry(text, entry.place, actor=entry.actor, at=entry.at, role=entry.role),
                session=session, meta=entry.meta,
            )  # fmt: skip


def _message(value: Json, place: str, began: str | float | None = None) -> Entry:
    if isinstance(value, str):
        return Entry(value, place, at=began)
    if not isinstance(value, dict):
        raise InvalidKnob(f"{place}: a message must be a mapping, not {type(value).__name__}")
    who = _first(value, _WHO)
    who = who.get("role") if isinstance(who, dict) else who
    role = _ROLES.get(str(who).lower(), who) if who is not None else None
    named = value.get("name") or value.get("actor")
    actor = named if isinstance(named, str) else ""
    if role is not None and "role" not in value and role not in ("user", "assistant"):
        role, actor = None, str(role)
    when = _when(value)
    meta = value.get("meta", value.get("metadata"))
    ref = _first(value, ("dia_id", "id", "uuid"))
    return Entry(
        _text(value, place), place, role=role, actor=actor, at=began if when is None else when,
        session=str(_first(value, _SESSION) or ""),
        meta={**(meta if isinstance(meta, dict) else {}), **({"ref": ref} if ref else {})},
    )  # fmt: skip


def _text(value: Mapping[str, Json], place: str) -> str:
    """The text of a message whose content is a text or a list of blocks; "" if it has none."""
    blocks = _first(value, _TEXT)
    if isinstance(blocks, str):
        return blocks
    if blocks is not None and not isinstance(blocks, list):
        raise InvalidKnob(f"{place}: content must be a text or a list of blocks")
    texts = [
        block if isinstance(block, str)
        else str(block.get("text") or "") if isinstance(block, dict) and "text" in block
        else f"[{block.get('type', 'attachment')}]" if isinstance(block, dict)
        else ""
        for block in blocks or ()
    ]  # fmt: skip
    whole = "\n".join(text for text in texts if text.strip())
    return whole or str(value.get("text") or "")


def _when(value: Mapping[str, Json]) -> str | float | None:
    found = _first(value, _WHEN)
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        return None
    if isinstance(found, str):
        return found or None
    return found / 1000 if abs(found) > _MILLISECONDS else float(found)


# ---------------------------------------------------------------- Markdown


def _markdown(path: Path) -> Iterator[Entry]:
    if path.is_dir():
        kinds = (".md", ".markdown")
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in kinds and p.is_file())
        if not files:
            raise InvalidKnob(f"{path} holds no Markdown files (*.md)")
    else:
        files = [path]
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            text = file.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidKnob(f"{file} cannot be read as UTF-8 text: {error}") from error
        meta, body = _front_matter(text)
        dated = (str(meta[key]) for key in ("date", "created", "updated") if meta.get(key))
        at = next(dated, file.stat().st_mtime)
        for n, (headings, section) in zip(count(), _sections(body), strict=False):
            own = {**meta, "file": name, **({"heading": " > ".join(headings)} if headings else {})}
            yield Entry(section, f"{name}, section {n}", "chunk", at=at, session=name, meta=own)


def _front_matter(text: str) -> tuple[dict[str, Any], str]:
    """Fields between two lines `---` at the beginning, and the rest; nested ones are kept raw."""
    lines = text.split("\n")
    if lines[0].strip() != "---":
        return {}, text
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() in ("---", "...")), 0)
    if not end:
        return {}, text
    fields: dict[str, Any] = {}
    key = ""
    for line in lines[1:end]:
        match = _FIELD.fullmatch(line.rstrip())
        if match and not line[0].isspace():
            key = match[1]
            fields[key] = _scalar(match[2] or "")
        elif key and line.lstrip().startswith("- "):
            held = fields[key] if isinstance(fields[key], list) else []
            fields[key] = [*held, _scalar(line.lstrip()[2:])]
    return fields, "\n".join(lines[end + 1 :])


def _scalar(text: str) -> Any:
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [_scalar(part) for part in text[1:-1].split(",") if part.strip()]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text


def _sections(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """(headings from the top down, text with its own heading) of each section that has a body."""
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    fence = ""
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        heading = None if fence else _HEADING.fullmatch(line)
        if heading is None:
            lines.append(line)
            continue
        yield from _section(path, lines)
        level = len(heading[1])
        path = [*(p for p in path if p[0] < level), (level, heading[2])]
        lines = [line]
    yield from _section(path, lines)


def _section(
    path: Sequence[tuple[int, str]], lines: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], str]]:
    if "\n".join(lines[1:] if path else lines).strip():
        yield tuple(title for _, title in path), "\n".join(lines).strip()


__all__ = ["FORMATS", "Entries", "Entry", "reader", "sniff"]
