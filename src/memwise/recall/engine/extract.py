"""Turn what was said into facts: one rule-based extractor, one that reads a frozen extraction."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from memwise.recall.engine.clause import Clause
from memwise.recall.engine.lexicon import COUNT_WORDS, STOPWORDS, VERBS, is_functional, relation_key
from memwise.recall.engine.rules import clauses, is_contraction, stem
from memwise.recall.engine.sentences import has_speaker, segment
from memwise.recall.engine.triples import Pattern, Triple, question, triples

__all__ = [
    "Extractor",
    "Fact",
    "Given",
    "Pattern",
    "Rules",
    "Triple",
    "TurnLike",
    "question",
    "relation_key",
    "triples",
]


class TurnLike(Protocol):
    """What an extractor reads of a turn.

    Attributes:
        text: what was said.
        actor: who said it; "" if unknown.
        at: when it was said, in microseconds since the epoch (UTC).
        session: the session's name; "" if there is none.
    """

    @property
    def text(self) -> str:
        """What was said."""

    @property
    def actor(self) -> str:
        """Who said it."""

    @property
    def at(self) -> int:
        """When."""

    @property
    def session(self) -> str:
        """In which session."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One statement taken from one turn.

    Attributes:
        subject: who or what it is about.
        relation: normalised verb phrase or noun ("live in", "capital").
        object: the value; "" for a bare statement.
        text: one sentence that can be read alone, dates absolute.
        source: index of the turn in the sequence that was given.
        valid_from: start of validity, microseconds since the epoch; None = unknown.
        valid_to: end of validity (exclusive); None = still valid or unknown.
        functional: whether subject and relation admit one value at a time.
    """

    subject: str
    relation: str
    object: str
    text: str
    source: int
    valid_from: int | None = None
    valid_to: int | None = None
    functional: bool = False


class Extractor(Protocol):
    """The plug point: everything that memory derives from text without storing it."""

    @property
    def name(self) -> str:
        """What made an extraction; stored beside it."""

    def facts(self, turns: Sequence[TurnLike], context: Sequence[TurnLike] = ()) -> list[Fact]:
        """Return the facts of some turns; the context only helps to understand them."""

    def keywords(self, text: str, k: int = 8) -> list[str]:
        """Return up to k words or names that carry a text, best first."""

    def gist(self, text: str, ratio: float = 0.3) -> str:
        """Return a text shortened to about a ratio of its words."""

    def relation(self, a: str, b: str) -> str:
        """Return what sentence b does to the earlier sentence a."""

    def segment(self, text: str) -> list[str]:
        """Return the sentences of a text."""

    def entities(self, text: str) -> list[str]:
        """Return the names in a text."""


_NAME = re.compile(
    r"(?:(?:Mr|Mrs|Ms|Dr|Prof|St)\. )?[A-Z][\w&+-]*(?:'[A-Z]\w+)?"
    r"(?:(?: (?:of the|of|the|de|da|van|von|del))? [A-Z][\w&+-]*(?:'[A-Z]\w+)?){0,5}"
)
_QUOTED = re.compile(r"[\"“]([^\"“”\n]{2,60})[\"”]")
_WORD = re.compile(r"[^\W_][\w'&+-]*")
# a cheap test for the three noun forms that `triples` turns into relations of their owner
_OF = re.compile(
    r"[ '](?:(?<= )of (?:the )?[A-Z]|(?<= )as its |(?<=')s (?:[a-z]+ ){1,3}(?:is|are|was|were) )"
)
_LOOSE = frozenset(("is", "is a", "have", "use", "located in"))
_NUMBER = re.compile(r"\d[\d.,:]*")
_CLAUSE_BREAK = re.compile(
    r"[,;:—–]\s|\s(?=(?:but|because|although|while|which|so|and (?:I|we|he|she|it|they)) )"
)
_LISTENED = 4  # turns in which the listener has spoken
_MARKUP = re.compile(r"[ \t]{2,}")

_ENDED = re.compile(
    r"\b(?:no longer|not any ?more|any ?more|stopped|quit|gave up|given up|ended|finished|completed"
    r"|cancell?ed|broke up|split up|divorced|sold|lost|passed away|died|left|used to|retired from"
    r"|got rid of|gave away|recovered from|is over|was over|dropped out|called off)\b",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\b(?:not|never|no longer|\w+n't)\b", re.IGNORECASE)
_ENDS_WHAT = (  # an ending phrase -> relations of earlier memories that it closes
    (
        ("broke up", "split up", "divorced", "called off"),
        ("married to", "engaged to", "date", "like"),
    ),
    (
        ("sold", "lost", "gave away", "got rid of", "passed away", "died"),
        ("have", "buy", "adopt", "get"),
    ),
)


class Rules:
    """Deterministic extraction from English, without a model; the default.

    Kept are statements about the speaker, about people and things that a turn names, and plain
    declarative sentences; dropped are questions, moods and phrases of politeness. Text is data:
    nothing in it changes what is done.
    """

    name = "rules"

    def facts(self, turns: Sequence[TurnLike], context: Sequence[TurnLike] = ()) -> list[Fact]:
        """Return the facts of some turns, in their order.

        Args:
            turns: the turns to read; `Fact.source` is an index into them.
            context: earlier turns, which only help to know who "you" is.
        """
        heard = [turn.actor for turn in (*context[-_LISTENED:], *turns)]
        first = len(heard) - len(turns)
        found: list[Fact] = []
        for i, turn in enumerate(turns):
            text = turn.text
            said = clauses(text, turn.actor, _listener(heard, first + i), turn.at)
            facts = [_fact(clause, i) for clause in said]
            owned = " of " in text or " as its " in text or "'s " in text
            if owned and _OF.search(text) is not None:
                facts = _with_triples(facts, text, i, turn.at)
            found += facts
        return found

    def segment(self, text: str) -> list[str]:
        """Return the sentences of a text; "Mr. Smith" and "3.5" stay whole."""
        return segment(text)

    def entities(self, text: str) -> list[str]:
        """Return the names and quoted titles of a text, each once, in order of appearance."""
        found = {m.start(): m[1].strip() for m in _QUOTED.finditer(text)}
        for match in _NAME.finditer(text):
            name = _without_opening(match.group(), _opens_sentence(text, match.start()))
            if name:
                found.setdefault(match.start(), name)
        return list(dict.fromkeys(name for _, name in sorted(found.items()) if name))

    def keywords(self, text: str, k: int = 8) -> list[str]:
        """Return up to k words or names that carry a text, best first.

        A name counts more than a word, a long word more than a short one, a repeated one more
        than a single one; ties go to the earlier.
        """
        names = self.entities(text)
        inside = {w for name in names for w in name.lower().split()}
        score = {name: 3.0 + 0.2 * min(text.count(name), 5) for name in names}
        for word in _WORD.findall(text):
            low = word.lower()
            if len(low) > 2 and low not in STOPWORDS and low not in inside:
                score[low] = score.get(low, min(len(low), 12) / 8) + 0.5
        return sorted(score, key=lambda w: -score[w])[: max(k, 0)]

    def gist(self, text: str, ratio: float = 0.3) -> str:
        """Return the clauses that hold most names, numbers and rare words, in their order.

        Args:
            text: any text.
            ratio: share of the words to keep, in [0, 1]; above 0 at least one clause is kept.
        """
        pieces = [p for s in segment(text) for p in _pieces(s)]
        budget = ratio * sum(len(p.split()) for p in pieces)
        counts: dict[str, int] = {}
        for word in _WORD.findall(text.lower()):
            counts[word] = counts.get(word, 0) + 1
        ranked = sorted(range(len(pieces)), key=lambda i: (-_salience(pieces[i], counts), i))
        kept: list[int] = []
        used = 0
        for i in ranked:
            n = len(pieces[i].split())
            if used + n <= budget or (not kept and ratio > 0):
                kept.append(i)
                used += n
        return " ".join(pieces[i] for i in sorted(kept))

    def relation(self, a: str, b: str) -> str:
        """Return what sentence b does to the earlier sentence a.

        Returns:
            "entails" (a already says b), "updates" (b replaces a's value), "ends" (b says that a
            no longer holds), "compatible" (about the same, both stand) or "unrelated".
        """
        if _plain(a) == _plain(b):
            return "entails"
        label = _structural(_statements(a), _statements(b), b)
        return label or _lexical(a, b)


class Given:
    """A frozen extraction, read from a mapping; everything else as `Rules`.

    Attributes:
        name: "given".
    """

    name = "given"

    def __init__(self, extraction: Mapping[str, Sequence[Fact | str]]) -> None:
        """Keep a mapping from a turn's `ref` (or its text) to its facts or fact sentences."""
        self._extraction = extraction
        self._rules = Rules()
        self.segment = self._rules.segment
        self.entities = self._rules.entities
        self.keywords = self._rules.keywords
        self.gist = self._rules.gist
        self.relation = self._rules.relation

    def facts(self, turns: Sequence[TurnLike], context: Sequence[TurnLike] = ()) -> list[Fact]:
        """Return the given facts of each turn; a turn that the mapping lacks has none."""
        found: list[Fact] = []
        for i, turn in enumerate(turns):
            given = self._extraction.get(str(getattr(turn, "ref", "")))
            items = self._extraction.get(turn.text, ()) if given is None else given
            found += [
                replace(item, source=i) if isinstance(item, Fact) else _from_sentence(item, i, turn)
                for item in items
            ]
        return found


def _listener(actors: Sequence[str], i: int) -> str:
    """Return who turn `i` speaks to: who else spoke last; "" if nobody did lately.

    Only earlier turns count, so that a turn reads the same whether it comes alone or in a list.
    """
    before = (actors[j] for j in range(i - 1, max(i - 1 - _LISTENED, -1), -1))
    return next((actor for actor in before if actor and actor != actors[i]), "")


def _fact(clause: Clause, source: int) -> Fact:
    return Fact(
        clause.subject,
        clause.relation,
        clause.object,
        clause.text,
        source,
        clause.valid_from,
        clause.valid_to,
        clause.functional,
    )


def _with_triples(facts: list[Fact], text: str, source: int, at: int) -> list[Fact]:
    """Add what sentences of the form "the R of X is Y", "X's R is Y", "X has Y as its R" state."""
    known = {(fact.subject, fact.relation) for fact in facts}
    for sentence in segment(text):
        if not _OF.search(sentence) or has_speaker(sentence) or not sentence[0].isupper():
            continue
        for s, r, o in triples(sentence):
            if not s[0].isupper() or r in _LOOSE or (s, r) in known or len(o) > 60:
                continue
            said = sentence.rstrip(".! ") + "."
            facts = [f for f in facts if f.text != said or f.relation != "be"]
            one = is_functional(r) or f"{r} of {s} is ".lower() in said.lower() or "'s " in said
            facts.append(Fact(s, r, o, said, source, at, None, one))
    return facts


def _from_sentence(sentence: str, source: int, turn: TurnLike) -> Fact:
    said = clauses(sentence, "", "", turn.at)
    if said:
        return replace(_fact(said[0], source), text=sentence)
    return Fact(turn.actor, "said", sentence, sentence, source, turn.at)


# ---- names, gists --------------------------------------------------------------------------------


def _opens_sentence(text: str, start: int) -> bool:
    before = text[max(0, start - 3) : start].rstrip(" \"'“(")
    return not before or before[-1] in ".!?\n:" or start == 0


def _without_opening(name: str, opens: bool) -> str:
    """Drop function words that only a sentence start or a title made capital."""
    words = name.split(" ")
    while words and (words[0].lower() in STOPWORDS or is_contraction(words[0].lower())):
        words.pop(0)
        opens = False
    while words and words[-1].lower() in STOPWORDS:
        words.pop()
    if opens and len(words) == 1 and words[0].lower() in VERBS:
        return ""
    return " ".join(words)


def _pieces(sentence: str) -> list[str]:
    """Split a long sentence at its clauses; a short one stays whole."""
    if len(sentence) < 60:
        return [sentence]
    out: list[str] = []
    last = 0
    for match in _CLAUSE_BREAK.finditer(sentence):
        if match.start() - last >= 25 and len(sentence) - match.end() >= 15:
            out.append(sentence[last : match.end()].strip())
            last = match.end()
    return [*out, sentence[last:].strip()]


def _salience(piece: str, counts: Mapping[str, int]) -> float:
    words = piece.split()
    names = sum(1 for w in words[1:] if w[:1].isupper() and w.lower() not in STOPWORDS)
    numbers = len(_NUMBER.findall(piece))
    content = [w for w in _WORD.findall(piece.lower()) if w not in STOPWORDS and len(w) > 2]
    themes = sum(min(counts[w], 4) for w in content) / 4
    return (2 * names + 2 * numbers + len(content) + themes) / (len(words) + 3)


# ---- relation between two memories ---------------------------------------------------------------


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _content(text: str) -> frozenset[str]:
    words = (w.removesuffix("'s") for w in _WORD.findall(text.lower()))
    return frozenset(stem(w) for w in words if w not in STOPWORDS or w.isdecimal() or w == "back")


def _statements(text: str) -> list[Clause]:
    said = clauses(text, "I", "you", 0)
    known = {(c.subject, c.relation) for c in said}
    for s, r, o in triples(text):
        if (s, r) not in known and r not in ("is", "is a"):
            said.append(Clause(s, r, o, text))
    return said


def _structural(before: list[Clause], after: list[Clause], text: str) -> str:
    """Compare parsed statements; "" where the parse decides nothing."""
    label = ""
    for new in after:
        for old in before:
            if old.subject.lower() != new.subject.lower():
                continue
            found = _compare(old, new, text)
            if found in ("ends", "updates", "entails"):
                return found
            label = label or found
    return label


def _compare(old: Clause, new: Clause, text: str) -> str:
    was, now = _content(old.object), _content(new.object)
    low = text.lower()
    for phrases, closed in _ENDS_WHAT:
        if old.relation in closed and any(p in low for p in phrases) and (now <= was or was & now):
            return "ends"
    opposite = new.relation in (f"not {old.relation}", "dislike" if old.relation == "like" else "")
    same = (bool(now) and now <= was) or bool(was & now)
    bare = not now and (opposite or old.relation == new.relation)
    if (opposite or new.ended) and not old.ended and not old.negated and (same or bare):
        return "ends"
    if new.relation == "finish" and was & now and old.tense == "present":
        return "ends"
    if old.relation != new.relation:
        reversed_ = old.relation == f"not {new.relation}" or {old.relation, new.relation} == {
            "like",
            "dislike",
        }
        return "updates" if reversed_ and was & now else ""
    if (old.ended and not new.ended) or old.negated != new.negated:
        return "updates" if was & now else "compatible"
    if was == now or (now and now < was):
        changed = (
            new.dated
            and old.dated
            and (old.valid_from, old.valid_to) != (new.valid_from, new.valid_to)
        )
        if changed:
            return "updates" if new.tense == "future" else "compatible"
        return "entails"
    if new.functional:
        return "updates"
    return _number_changed(was, now) or "compatible"


def _number_changed(was: frozenset[str], now: frozenset[str]) -> str:
    """Return "updates" if two objects differ in their numbers only."""
    old_numbers, new_numbers = _numbers(was), _numbers(now)
    same = was - old_numbers == now - new_numbers
    return "updates" if same and old_numbers and new_numbers and was != now else ""


def _numbers(words: frozenset[str]) -> frozenset[str]:
    return frozenset(w for w in words if w[0].isdigit() or w in COUNT_WORDS)


def _lexical(a: str, b: str) -> str:
    """Compare two sentences by their words, where no parse helps."""
    was, now = _content(a), _content(b)
    if not was or not now:
        return "unrelated"
    shared = len(was & now)
    overlap = shared / min(len(was), len(now))
    closing = _ENDED.search(b) is not None and _ENDED.search(a) is None
    denied = _DENIED.search(b) is not None and _DENIED.search(a) is None
    if overlap >= 0.5 and (closing or denied):
        return "ends"
    if now <= was and not _DENIED.search(a):
        return "entails"
    if overlap >= 0.5 and _number_changed(was, now):
        return "updates"
    return "compatible" if overlap >= 0.34 and shared >= 2 else "unrelated"
