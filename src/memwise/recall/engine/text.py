"""Words, term numbers and token counts: the one text pipeline that writing and searching share."""

from __future__ import annotations

import re
import struct
import zlib
from functools import lru_cache

from memwise.recall.engine.records import SOURCES
from memwise.recall.engine.stem import stem

STOP = frozenset(
    "a an the of to in on at for and or is are was were be been do does did what when where who "
    "how which why with by from that this it its as has have had he she they his her their i you "
    "we my your".split()
)
CUES = frozenset(
    "kind type many much some any would could should might can will about during after before into "
    "there them him us our me also not no s t".split()
)
"""Words that shape a question but are not what it is about."""
_WORD = re.compile(r"[a-z0-9]+|[^\W_a-z0-9]+")
# Thai, kana, Han and Hangul, which are written without spaces or with endings grown on
_UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+")


@lru_cache(maxsize=1 << 16)
def term(word: str) -> int:
    """A lower-case word's term number, 32 bit; 0 for stop words."""
    return 0 if word in STOP else zlib.crc32(stem(word).encode()) or 1


def words(text: str) -> list[str]:
    """Lower-case words of a text, in order; of scripts without spaces each pair of letters."""
    found = _WORD.findall(text.lower())
    if text.isascii() or _UNSPACED.search(text) is None:
        return found
    return [part for word in found for part in _pairs(word)]


def _pairs(word: str) -> list[str]:
    if len(word) < 3 or _UNSPACED.fullmatch(word) is None:
        return [word]
    return [word[i : i + 2] for i in range(len(word) - 1)]


def terms(text: str) -> list[int]:
    """Term numbers of a text in order, stop words left out, repeats kept."""
    return [t for t in map(term, words(text)) if t]


def topic_terms(text: str) -> set[int]:
    """Distinct term numbers of what a question is about."""
    return {t for w in words(text) if w not in CUES and (t := term(w))}


def term_bytes(actor: str, text: str) -> bytes:
    """What the word index holds of an item: its term numbers as little-endian uint32."""
    found = terms(unspoken(actor, text))
    return struct.pack(f"<{len(found)}I", *found)


def n_tokens(text: str) -> int:
    """Tokens of a text when no tokenizer is given: a quarter of its characters, rounded up."""
    return -(-len(text) // 4)


def spoken(actor: str, text: str) -> str:
    """The text with its speaker in front, unless it stands there already."""
    return text if not actor or text.startswith(f"{actor}:") else f"{actor}: {text}"


def phrased(kind: str, actor: str, text: str) -> str:
    """An item as it is read and embedded; a derived text that opens with its actor says enough."""
    if kind not in SOURCES and actor and re.match(rf"{re.escape(actor)}\b", text, re.IGNORECASE):
        return text
    return spoken(actor, text)


def unspoken(actor: str, text: str) -> str:
    """The text without its speaker in front."""
    return text.removeprefix(f"{actor}:").lstrip() if actor else text
