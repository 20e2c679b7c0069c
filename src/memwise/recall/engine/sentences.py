"""Where sentences end, and whose sentences they are."""

from __future__ import annotations

import re

# both start with a character class: the engine then skips to the few places where they can match
_BREAK = re.compile(r"[.!?…\n](?:(?<=\n)|[.!?…\"'”’)\]*]*(?=\s))")
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr vs etc e.g i.e u.s u.k no inc ltd co a.m p.m approx fig gen "
    "sgt".split()
)
SPEAKER_WORD = re.compile(
    r"[IiWwMmOo](?<!\w.)(?:(?<=[Ii])|(?<=[Ww])e|(?<=[Mm])y|(?<=[Oo])ur)\b", re.DOTALL
)


def segment(text: str) -> list[str]:
    """Split a text into sentences; keeps "Mr. Smith" and "3.5" whole, breaks at new lines."""
    return [s for s in (text[a:b].strip() for a, b in bounds(text)) if s]


def bounds(text: str) -> list[tuple[int, int]]:
    """Return the character ranges of the sentences of a text, which cover it."""
    out, start = [], 0
    for match in _BREAK.finditer(text):
        stop = match.end()
        if text[stop - 1] in "\"'”’)]" and text[stop : stop + 2].lstrip()[:1].islower():
            continue  # "Really?!" she said
        if text[stop - 1] == "." and _is_abbreviation(text, match.start()):
            continue
        out.append((start, stop))
        start = stop
    out.append((start, len(text)))
    return out


def _is_abbreviation(text: str, dot: int) -> bool:
    word = text[max(0, dot - 8) : dot].rsplit(None, 1)[-1:] or [""]
    last = word[0].lower().lstrip("(\"'")
    return last in _ABBREVIATIONS or (len(last) == 1 and last.isalpha() and last != "i")


def has_speaker(text: str) -> bool:
    """Return whether a text says "I", "we", "my" or "our"."""
    return SPEAKER_WORD.search(text) is not None
