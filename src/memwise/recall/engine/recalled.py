"""Recalled memory inside other text: cut out before a text is learnt from, or laid bare."""

from __future__ import annotations

import re

_TAG = re.compile(r"<\s*(/?)\s*memory(?:\s[^<>]*)?(/?)>", re.IGNORECASE)


def strip_recalled(text: str) -> str:
    """Cut recalled memory (`<memory>...</memory>`) out of a text, so that it is not learnt again.

    Spans may nest. A span that never ends reaches to the end of the text; a closing tag too many
    extends the span before it (or the start of the text), since recalled text that holds such a tag
    must not escape from its span.
    """
    # Again, because what is left of two halves can read as a tag.
    while (cut := _cut_spans(text)) != text:
        text = cut
    return text


def untagged(text: str) -> str:
    """Drop the tags of recalled memory and keep what lies between them."""
    while (plain := _TAG.sub("", text)) != text:
        text = plain
    return text.strip()


def _cut_spans(text: str) -> str:
    kept: list[str] = []
    depth = begin = 0
    for tag in _TAG.finditer(text):
        closing, alone = tag.groups()
        if closing:
            depth = max(depth - 1, 0)
        else:
            if depth == 0:
                kept.append(text[begin : tag.start()])
            depth += not alone
        begin = tag.end()
    if depth == 0:
        kept.append(text[begin:])
    return "".join(kept).strip() if begin else text
