"""Intake: what a caller hands to `add`, checked and cut into sources before anything is stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from memwise.errors import InvalidKnob
from memwise.recall.engine.dates import instant
from memwise.recall.engine.pack import CLOSE, OPEN
from memwise.recall.engine.records import Add, Instant

Message: TypeAlias = Mapping[str, Any]
Content: TypeAlias = str | Message | Sequence["str | Message"]

ROLES = ("user", "assistant", "system", "developer", "tool", "function")
CHUNK_CHARACTERS = 2000
"""A longer text is stored as chunks of at most this length, cut between paragraphs or sentences."""
_FIELDS = {"role", "content", "name", "at", "actor", "session", "meta"}
# A block as `Memory.context` writes it: recalled text must not come back as if it had been said.
_RECALLED = re.compile(re.escape(OPEN) + r"\n.*?\n" + re.escape(CLOSE) + r"\n?", re.DOTALL)
_BREAKS = (re.compile(r"\n\s*\n"), re.compile(r"(?<=[.!?])\s"), re.compile(r"\s"))


def drafts(
    content: Content,
    *,
    at: Instant | None,
    now: Instant,
    actor: str,
    session: str,
    meta: Mapping[str, Any],
) -> list[Add]:
    """Sources to be stored, in order; values of a message override those of the call.

    Messages without a time are stamped once with the clock, a microsecond apart to keep order.

    Raises:
        InvalidKnob: nothing to store, or something wrong in it, with its place in the list.
    """
    one = isinstance(content, str | Mapping)
    parts: Sequence[Any] = [content] if one else list(content) if _listed(content) else [content]
    if not parts:
        raise InvalidKnob("add() got an empty list; give at least one text or message")
    out: list[Add] = []
    for i, part in enumerate(parts):
        where = "" if one else f" (item {i} of the list)"
        message: Message = {"content": part} if isinstance(part, str) else part
        if not isinstance(message, Mapping):
            raise InvalidKnob(
                f"add() takes a text or a message {{'role', 'content'}}, not "
                f"{type(part).__name__}{where}"
            )
        text = _text(message, where)
        when = now + i if message.get("at") is None and at is None else at
        if message.get("at") is not None:
            when = instant(message["at"])
        speaker = message.get("actor") or message.get("name") or actor or message.get("role") or ""
        out += _cut(
            text,
            Add(
                "turn", text, actor=_short(speaker, "actor", where), at=when,
                session=_short(message.get("session") or session, "session", where),
                data=_meta(message.get("meta", meta), where), extractor="",
            ),
        )  # fmt: skip
    return out


def _listed(content: object) -> bool:
    return isinstance(content, Sequence) and not isinstance(content, bytes | bytearray)


def _text(message: Message, where: str) -> str:
    if not message.keys() <= _FIELDS:
        unknown = sorted(set(message) - _FIELDS)
        raise InvalidKnob(
            f"unknown field {unknown[0]!r} in a message{where}; known: "
            f"{', '.join(sorted(_FIELDS))} (put your own fields into 'meta')"
        )
    role = message.get("role")
    if role is not None and role not in ROLES:
        raise InvalidKnob(f"role={role!r}{where}: use one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "\n".join(_block(block, where) for block in content)
    if not isinstance(content, str):
        raise InvalidKnob(f"content must be text, not {type(content).__name__}{where}")
    if OPEN in content:
        content = _RECALLED.sub("", content)
    if not content.strip():
        raise InvalidKnob(
            f"the text is empty{where}; there is nothing to remember (what a memory "
            "recalled is not learnt again)"
        )
    if not is_text(content):
        raise InvalidKnob(
            f"the text holds NUL characters or lone surrogates{where}: it looks like binary data; "
            "decode it first"
        )
    return content


def is_text(text: str) -> bool:
    """Can the text be stored as UTF-8, and is it no binary data?"""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return "\0" not in text


def _block(block: object, where: str) -> str:
    """One block of a structured message: its text, or what kind of thing stands there."""
    if isinstance(block, str):
        return block
    if not isinstance(block, Mapping):
        raise InvalidKnob(f"content blocks must be texts or mappings{where}")
    return str(block["text"]) if "text" in block else f"[{block.get('type', 'attachment')}]"


def _short(value: object, name: str, where: str) -> str:
    if not isinstance(value, str) or len(value) > 256 or not is_text(value):
        raise InvalidKnob(f"{name}={value!r}{where}: use a text of at most 256 characters")
    return value


def _meta(value: object, where: str) -> Mapping[str, Any]:
    if value == {}:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and _plain(k) for k in value):
        raise InvalidKnob(f"meta{where} must be a mapping with text keys")
    if bad := next((k for k, v in value.items() if not _plain(v)), None):
        raise InvalidKnob(f"meta[{bad!r}]{where} is not JSON: use texts, numbers, lists, mappings")
    return value


def _plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _plain(k) and _plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, float):
        return value - value == 0.0  # JSON has neither NaN nor infinity
    if isinstance(value, str):
        return is_text(value)
    return value is None or isinstance(value, int | bool)


def _cut(text: str, whole: Add) -> Iterator[Add]:
    if len(text) <= CHUNK_CHARACTERS:
        yield whole
        return
    pieces = list(_pieces(text))
    for i, piece in enumerate(pieces):
        data = {**whole.data, "part": i + 1, "parts": len(pieces)}
        yield Add(
            "chunk", piece, actor=whole.actor, at=whole.at, session=whole.session, data=data,
            extractor="",
        )  # fmt: skip


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces, each cut at the last paragraph, sentence or word that fits."""
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        stop = start + CHUNK_CHARACTERS
        window = text[start:stop]
        for pattern in _BREAKS:
            ends = [m.end() for m in pattern.finditer(window)]
            if ends and ends[-1] > CHUNK_CHARACTERS // 4:
                stop = start + ends[-1]
                break
        if piece := text[start:stop].strip():
            yield piece
        start = stop
    if piece := text[start:].strip():
        yield piece


__all__ = ["CHUNK_CHARACTERS", "Content", "Message", "drafts", "is_text"]
