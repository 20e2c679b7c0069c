"""Facts with two clocks: what a new assertion does to what is known already.

An assertion says "from `valid_from` on it is so" (perhaps with an end of its own) or, with an end
alone, "it was so until then". Where each holds follows from all assertions of the same relation
together, never from the order in which they came:

    it holds until its own end, the start of the next value, or a statement that it ended,
    whichever comes first

A functional relation ("lives in") has one value at a time; of any other relation each value is a
series of its own. Nothing is lost: a fact whose interval changes is expired and added again, so
earlier beliefs stay visible to queries with `known_at`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from memwise.recall.engine.policy import Step
from memwise.recall.engine.records import FOREVER, Add, Connect, Instant, Item, Op, Replace

Span: TypeAlias = "tuple[Instant | None, Instant | None]"
_Key: TypeAlias = tuple[str, ...]


def settle(step: Step, facts: Sequence[Add]) -> list[Op]:
    """Operations that store new facts and move the ends of those that they contradict.

    A fact that says what another one says of the same time only adds its source to it.

    Args:
        step: the bank as it is.
        facts: facts with `subject`, `relation`, `object` and `functional` in their data, and the
            subject as their actor; a value without any date counts from when it was told.
    """
    held: dict[_Key, list[Item]] = {}
    for item in step.about({fact.actor for fact in facts}, "fact"):
        held.setdefault(_series(item), []).append(item)
    new: dict[_Key, list[Add]] = {}
    for fact in facts:
        undated = fact.data["functional"] and fact.valid_from is None and fact.valid_to is None
        claim = replace(fact, valid_from=fact.at) if undated else fact
        new.setdefault(_series(claim), []).append(claim)
    return [op for key, adds in new.items() for op in _settled(step, held.get(key, ()), adds)]


def spans(claims: Sequence[Add]) -> list[Span]:
    """Where each assertion of one series holds, half-open; the intervals do not overlap."""
    begun = sorted(
        (i for i, c in enumerate(claims) if not _is_end(c)), key=lambda i: _rank(claims[i])
    )
    ends = sorted((i for i, c in enumerate(claims) if _is_end(c)), key=lambda i: _until(claims[i]))
    out: dict[int, Span] = {}
    for i, after in zip(begun, [*begun[1:], None], strict=False):
        claim, start = claims[i], _start(claims[i])
        stops = [_until(claim)] if after is None else [_until(claim), _start(claims[after])]
        stops += [
            stop for j in ends if _same(claims[j], claim) and (stop := _until(claims[j])) > start
        ]
        out[i] = claim.valid_from, _open(max(min(stops), start))
    for i in ends:
        stop = _until(claims[i])
        before = [min(_closed(end), stop) for a, end in out.values() if a is None or a < stop]
        out[i] = max(before, default=None), stop
    return [out[i] for i in range(len(claims))]


def _settled(step: Step, items: Sequence[Item], adds: Sequence[Add]) -> list[Op]:
    known: dict[_Key, tuple[Item | None, Add]] = {}
    for item in items:
        claim = Add.like(item)
        known[_said(claim)] = item, claim
    ops: list[Op] = []
    for add in adds:
        if _said(add) not in known:
            known[_said(add)] = None, add
            continue
        held, claim = known[_said(add)]
        if held is None:
            known[_said(add)] = None, replace(claim, sources=(*claim.sources, *add.sources))
        else:
            ops += [Connect(held, "derived_from", source) for source in add.sources]
    pairs = list(known.values())
    for (held, claim), span in zip(pairs, spans([claim for _, claim in pairs]), strict=True):
        if held is None:
            ops.append(_within(claim, span))
        elif (held.valid_from, held.valid_to) != span:
            links = tuple((li.rel, li.dst, li.weight) for li in step.links([held], "mentions"))
            ops.append(Replace(held, replace(_within(claim, span), links=links), "contradicted"))
    return ops


def _within(claim: Add, span: Span) -> Add:
    """The claim with the interval in which it holds; what it said itself stays in its data."""
    data = dict(claim.data)
    if _is_end(claim):
        data["ends"] = True
    elif "until" not in data and span[1] != claim.valid_to:
        data["until"] = claim.valid_to
    return replace(claim, valid_from=span[0], valid_to=span[1], data=data)


def _series(fact: Add | Item) -> _Key:
    subject, relation, value = (
        str(fact.data[k]).casefold() for k in ("subject", "relation", "object")
    )
    return (subject, relation) if fact.data["functional"] else (subject, relation, value)


def _said(claim: Add) -> _Key:
    start = "" if _is_end(claim) else str(claim.valid_from)
    return str(claim.data["object"]).casefold(), start, str(_until(claim))


def _rank(claim: Add) -> tuple[Instant, Instant, str]:
    """By start; of two values with one start the one that was told later holds."""
    return _start(claim), claim.at or 0, str(claim.data["object"]).casefold()


def _is_end(claim: Add) -> bool:
    open_ = claim.valid_from is None and claim.valid_to is not None
    return "ends" in claim.data or (open_ and "until" not in claim.data)


def _same(a: Add, b: Add) -> bool:
    return str(a.data["object"]).casefold() == str(b.data["object"]).casefold()


def _start(claim: Add) -> Instant:
    return -FOREVER if claim.valid_from is None else claim.valid_from


def _until(claim: Add) -> Instant:
    return _closed(claim.data.get("until", claim.valid_to))


def _closed(end: Instant | None) -> Instant:
    return FOREVER if end is None else end


def _open(end: Instant) -> Instant | None:
    return None if end == FOREVER else end
