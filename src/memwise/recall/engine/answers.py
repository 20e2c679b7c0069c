"""Reading what a language model answered: JSON in whatever form it comes, checked value by value.

Whoever calls these hands over the work to something else when they raise `ValueError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from memwise.errors import InvalidKnob
from memwise.recall.engine.dates import dates, instant
from memwise.recall.engine.extract import Fact, TurnLike

RELATIONS = ("entails", "updates", "ends", "compatible", "unrelated")


def loose_json(text: str) -> Any:
    """Read the JSON value in a model's answer, whatever stands around it.

    Thoughts (`<think>`), code fences and sentences before and after are skipped; of several values
    the longest counts.

    Raises:
        ValueError: there is no JSON, or it was cut off.
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL).rstrip().rstrip("`")
    decoder = json.JSONDecoder()
    best, best_length, at = None, 0, 0
    while opening := re.compile(r"[{\[]").search(text, at):
        begin = opening.start()
        try:
            value, at = decoder.raw_decode(text, begin)
        except json.JSONDecodeError as error:
            # A value that the end of the text cuts must not pass as its first complete part.
            if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
                raise ValueError("the JSON is cut off") from error
            at = begin + 1
        else:
            if at - begin > best_length:
                best, best_length = value, at - begin
    if best_length == 0:
        raise ValueError(f"no JSON in {text[:80]!r}")
    return best


_FIELDS = {
    "turn": ("turn", "source", "turnid", "turnindex", "index", "sourceturn", "id"),
    "subject": ("subject", "entity", "who", "person", "head"),
    "relation": ("relation", "predicate", "property", "relationship", "verb", "attribute"),
    "object": ("object", "value", "target", "tail"),
    "text": ("text", "fact", "sentence", "statement", "content", "memory"),
    "valid_from": ("validfrom", "from", "start", "startdate", "date", "since"),
    "valid_to": ("validto", "to", "end", "enddate", "until"),
    "functional": ("functional", "exclusive", "singlevalued"),
}
_LISTS = ("facts", "items", "results", "memories", "data", "triples", "answer")


def facts_from(found: Any, turns: Sequence[TurnLike]) -> list[Fact]:
    """Read facts from decoded JSON; those that name no given turn, and repeats, are dropped.

    Raises:
        ValueError: it is no list of facts, or one of them lacks a part or contradicts itself.
    """
    facts: dict[tuple[int, str, str, str], Fact] = {}
    for item in _fact_items(found):
        fact = _fact(item, turns)
        if fact is not None:
            facts.setdefault((fact.source, fact.subject, fact.relation, fact.object), fact)
    return list(facts.values())


def _fact_items(found: Any) -> list[Any]:
    if isinstance(found, list):
        return found
    if isinstance(found, dict):
        for name in _LISTS:
            if isinstance(found.get(name), list):
                return list(found[name])
        if found:
            return [found]
    raise ValueError(f"no list of facts in {json.dumps(found)[:80]}")


def _fact(item: Any, turns: Sequence[TurnLike]) -> Fact | None:
    if not isinstance(item, dict):
        raise ValueError(f"a fact is an object, not {json.dumps(item)[:80]}")
    plain = {re.sub(r"[^a-z]", "", str(key).lower()): value for key, value in item.items()}
    got = {
        name: next((plain[alias] for alias in aliases if alias in plain), None)
        for name, aliases in _FIELDS.items()
    }
    source = _index(got["turn"])
    if source is None or not 0 <= source < len(turns):
        return None
    subject, relation, value = (_word(got[name]) for name in ("subject", "relation", "object"))
    text = _word(got["text"]) or f"{subject} {relation} {value}."
    if not (subject and relation and value):
        raise ValueError(f"a fact lacks subject, relation or object: {json.dumps(item)[:120]}")
    start, end = (_date(got[name], turns[source].at) for name in ("valid_from", "valid_to"))
    if start is not None and end is not None and end <= start:
        raise ValueError(f"a fact ends before it starts: {json.dumps(item)[:120]}")
    return Fact(subject, relation, value, text, source, start, end, got["functional"] is True)


def _index(value: Any) -> int | None:
    """Turn numbers come as 3, "3", "turn 3" or [3]."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    digits = re.fullmatch(r"(?:turn)?[ _]*(\d{1,9})", str(value).strip(), re.IGNORECASE)
    return int(digits[1]) if digits else None


def _word(value: Any) -> str:
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return ""


def _date(value: Any, anchor: int) -> int | None:
    """ISO as asked; phrases ("last week") against the turn's time; anything else is unknown."""
    word = _word(value)
    if not word or (word.isdecimal() and len(word) != 4):
        return None
    if re.fullmatch(r"\d{4}(-\d\d)?", word):
        word = f"{word}-01-01"[:10]
    try:
        return instant(word)
    except InvalidKnob:
        spans = dates(word, anchor)
        return spans[0].start if spans else None


def string(found: Any, name: str) -> str:
    """The text of that name in a decoded object."""
    text = _word(found.get(name)) if isinstance(found, dict) else ""
    if not text:
        raise ValueError(f"no {name} in {json.dumps(found)[:80]}")
    return text


def strings(found: Any, name: str) -> list[str]:
    """The texts of a decoded list, bare or of that name, each once."""
    listed = found.get(name) if isinstance(found, dict) else found
    if not isinstance(listed, list):
        raise ValueError(f"no list of {name} in {json.dumps(found)[:80]}")
    return list(dict.fromkeys(word for value in listed if (word := _word(value))))


def shorter(gist: str, text: str) -> str:
    """The gist, if it is one."""
    if len(gist) > len(text):
        raise ValueError(f"the gist is longer than the text: {gist[:80]!r}")
    return gist


def known_relation(found: Any) -> str:
    """The relation in a decoded object, one of `RELATIONS`."""
    word = string(found, "relation").lower().strip(". ")
    if word not in RELATIONS:
        raise ValueError(f"relation {word!r} is none of {', '.join(RELATIONS)}")
    return word
