"""The second half of the clause parse: object, relation, dates, and the sentence that is kept.

`Wording` knows where the tokens of a sentence stand and which of them are dates; it says where
an object ends, names the relation, writes the clause out with persons and dates resolved, and
sets when it holds. `rules` derives the parser from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from memwise.recall.engine.dates import DAY, DateSpan, instant, iso, spoken
from memwise.recall.engine.lexicon import (
    ADVERBS,
    AUXILIARIES,
    COPULA_RELATIONS,
    COUNT_WORDS,
    CUTS,
    DURATION_WORDS,
    EMPTY,
    INTERJECTIONS,
    KEEPS_DATE,
    LINKING,
    LONE,
    MOODS,
    NEGATED,
    NOMINATIVE,
    OPINION,
    PADDING,
    PARTICLES,
    PERSON_WORDS,
    PREPOSITIONS,
    QUIT_OBJECTS,
    SKILLS,
    SOFT_CUTS,
    STATES,
    STOPWORDS,
    TALK,
    TRAILING,
    VERBS,
    is_functional,
    relation_key,
)

_AGE = re.compile(r"(\d{1,3})(?: years? old| yrs? old|$)")


@dataclass(slots=True)
class Clause:
    """One parsed clause: what is said of whom, in which tense, at which dates."""

    subject: str
    relation: str
    object: str
    text: str
    negated: bool = False
    ended: bool = False
    tense: str = "present"
    valid_from: int | None = None
    valid_to: int | None = None
    dated: bool = False

    @property
    def functional(self) -> bool:
        """Whether the subject has one such value at a time."""
        return not self.negated and is_functional(self.relation)


@dataclass(slots=True)
class Group:
    """A verb group: the words to print, and what they mean."""

    words: list[str] = field(default_factory=list)
    aux: list[str] = field(default_factory=list)
    negated: bool = False
    ended: bool = False
    tense: str = "present"
    lemma: str = ""
    prefix: str = ""


class Wording:
    """The state of one text: its dates, the tokens of the sentence at hand, what was found."""

    def __init__(self, speaker: str, listener: str, at: int, spans: Sequence[DateSpan]) -> None:
        self.speaker, self.listener, self.at, self.spans = speaker, listener, at, spans
        self.found: list[Clause] = []
        self.person = ""  # antecedent of he, she
        self.people = ""  # antecedent of they
        self.tokens: list[str] = []
        self.lows: list[str] = []
        self.carried: int | None = None  # a date announced by the sentence before
        self.marks: dict[int, int] = {}  # token index -> which date stands there

    def _object_end(self, k: int, past: bool) -> int:
        """Return the index of the boundary that ends an object starting at token k."""
        lows, n = self.lows, len(self.lows)
        limit = min(n, k + 22)
        i = k
        while i < limit:
            low = lows[i]
            first = low[0]
            if i == k and low in ("and", "or"):
                return i
            if not (first.isalnum() or first in "$€£#" or i in self.marks):
                if low == "," and self._is_list(i, k):
                    i += 1
                    continue
                if low not in "\"'&/%":
                    return i
            elif low in CUTS or (i > k and low in NOMINATIVE and not self._is_object(i)):
                return i
            elif low in SOFT_CUTS and i + 1 < n and i > k:
                after = lows[i + 1]
                if after in NOMINATIVE and not (after == "this" and low != "and"):
                    return i
                if low == "and" and past and self._starts_predicate(i + 1):
                    return i
            elif (
                low in INTERJECTIONS
                and i > k
                and low in ("lol", "haha", "yeah", "thanks", "wow", "btw")
            ):
                return i
            i += 1
        return i

    def _is_object(self, i: int) -> bool:
        """Return whether a pronoun that could open a clause is an object here ("on it")."""
        low = self.lows[i]
        return low in ("there", "this", "you") or (low == "it" and self.lows[i - 1] in PREPOSITIONS)

    def _starts_predicate(self, i: int) -> bool:
        known = VERBS.get(self.lows[i])
        if known is not None and known[1] == "past" and known[0] != self.lows[i]:
            return True
        return (
            self.lows[i] in ADVERBS and i + 1 < len(self.lows) and self._starts_predicate(i + 1)
            if i + 1 < len(self.lows) and self.lows[i] in LINKING
            else False
        )

    def _is_list(self, comma: int, k: int) -> bool:
        """Return whether a comma separates the items of "painting, reading, and hiking"."""
        lows = self.lows
        if comma == k or comma + 1 >= len(lows):
            return False
        if lows[comma + 1] in ("and", "or"):
            if any(low in AUXILIARIES for low in lows[comma + 2 : comma + 7]):
                return False
            return (
                comma + 2 < len(lows)
                and lows[comma + 2] not in NOMINATIVE
                and lows[comma + 2] not in PREPOSITIONS
                and lows[comma + 2] not in NEGATED
                and not self._starts_predicate(comma + 2)
            )
        for i in range(comma + 1, min(comma + 5, len(lows))):
            low = lows[i]
            if low in (",", "and", "or", "&"):
                return i > comma + 1 and (i + 1 >= len(lows) or lows[i + 1] not in NOMINATIVE)
            if low in NOMINATIVE or low in AUXILIARIES or low in CUTS or not low[0].isalnum():
                return False
            if low in VERBS and VERBS[low][1] in ("past", "third"):
                return False
        return False

    def _relation(self, k: int, stop: int, group: Group) -> tuple[str, int]:
        """Return the relation's key and how many tokens of the object belong to it."""
        words = [group.lemma]
        i = k
        if group.lemma == "be":
            key, skip = self._copula(k, stop, group.tense)
            return ("not " if group.negated else group.prefix) + key, skip
        if i < stop and self.lows[i] in PARTICLES:
            words.append(self.lows[i])
            i += 1
        if group.prefix == "be ":  # "born on 3 May in Porto"
            while i < stop - 1 and (
                i in self.marks or (self.lows[i] in PREPOSITIONS and i + 1 in self.marks)
            ):
                i += 1
        if i < stop and self.lows[i] in PREPOSITIONS and i + 1 not in self.marks:
            words.append(self.lows[i])
            i += 1
        if group.prefix == "be ":
            key = relation_key("be " + " ".join(words))
        else:
            key = group.prefix + relation_key(" ".join(words))
        if group.negated:
            key = relation_key(f"not {key}")
        return key, i - k

    def _copula(self, k: int, stop: int, tense: str) -> tuple[str, int]:
        lows = self.lows
        for i in range(k, min(stop, k + 4)):
            if lows[i] in PREPOSITIONS and i + 1 < stop:
                phrase = " ".join(["be", *lows[k : i + 1]])
                key = relation_key(phrase)
                if lows[i] == "to" and tense != "perfect" and i == k:
                    break  # "the plan is to rest"
                if i == k or key in COPULA_RELATIONS:
                    return key, i + 1 - k
                break
        return "be", 0

    def _tells(self, group: Group, words: list[str], dated: bool) -> bool:
        """Return whether a clause says enough to be kept."""
        content = sum(1 for w in words if w not in STOPWORDS and w[0].isalnum() and w not in EMPTY)
        if group.lemma in TALK and group.prefix != "learn to ":
            known = group.lemma == "know" and group.tense == "perfect" and content > 0
            if group.lemma == "look" and words[:1] and words[0] in ("at", "for", "into", "after"):
                return content > 0
            return known or (dated and content > 0 and group.lemma not in OPINION)
        if group.lemma == "be" and words and words[0] in MOODS and not dated:
            return False
        modal = "can" in group.aux or "would" in group.aux
        if modal and group.prefix != "plan to " and (group.negated or group.lemma not in SKILLS):
            return False
        if content == 0:
            return (
                (dated and group.lemma not in ("be", "have", "do"))
                or group.lemma in LONE
                or bool(group.lemma == "break" and words[:1] == ["up"])
            )
        return True

    def _object(self, k: int, stop: int) -> str:
        words: list[str] = []
        for i in range(k, stop):
            if i in self.marks:
                while words and words[-1].lower() in (
                    "on",
                    "in",
                    "at",
                    "since",
                    "during",
                    "by",
                    "until",
                    "the",
                    "from",
                    "over",
                ):
                    words.pop()
                continue
            words.append(self._own(i))
        while words and (
            words[0].lower() in ("a", "an", "the", "some", ",") or words[0].lower() in PADDING
        ):
            words.pop(0)
        while (
            words
            and (words[-1].lower() in TRAILING or not words[-1][-1].isalnum())
            and words[-1] not in '"'
        ):
            words.pop()
        return join(words)

    def _own(self, i: int) -> str:
        """Return a token with first and second person written out."""
        low = self.lows[i]
        if low in PERSON_WORDS:
            return PERSON_WORDS[low]
        if low in ("me", "mine"):
            return self.speaker
        if self.listener and low in ("you", "your", "yours", "yourself"):
            return self.listener if low in ("you", "yourself") else possessive(self.listener)
        return self.tokens[i]

    def _text(self, subject: str, group: Group, k: int, stop: int, lead: list[int]) -> str:
        words = [subject, *group.words]
        for i in range(k, stop):
            mark = self.marks.get(i)
            if mark is None:
                if self.lows[i] not in PADDING:
                    words.append(self._own(i))
                continue
            phrase = self._spoken(mark)
            before = words[-1].lower()
            if before == "the" and len(words) > 2:
                words.pop()
                before = words[-1].lower()
            if before in ("in", "on", "at", "during", "over", "for"):
                words.pop()
            elif before in KEEPS_DATE:
                phrase = phrase.split(" ", 1)[1]
            words.append(phrase)
        while len(words) > 2 and (words[-1].lower() in TRAILING or words[-1] in ",&/"):
            words.pop()
        words += [self._spoken(mark) for mark in lead[:1]]
        since = self._since(k, stop)
        if since is not None and group.tense in ("perfect", "present"):
            words.append(f"(since {iso(since)[:4]})")
        return join(words) + "."

    def _spoken(self, mark: int) -> str:
        span = self.spans[mark]
        return spoken(span.start, span.end, self.at)

    def _since(self, k: int, stop: int) -> int | None:
        """Return the instant at which a duration that lasts until now began ("for 4 years")."""
        lows = self.lows
        for i in range(k, stop - 2):
            if lows[i] != "for":
                continue
            j = (
                i + 2
                if lows[i + 1] in ("about", "over", "almost", "nearly", "around", "the")
                else i + 1
            )
            while (
                j + 1 < len(lows)
                and lows[j] in ("a", "of", "past", "last")
                and lows[j + 1] not in DURATION_WORDS
            ):
                j += 1
            if j + 1 >= len(lows):
                return None
            days = DURATION_WORDS.get(lows[j + 1])
            n = (
                int(lows[j])
                if lows[j].isdecimal() and len(lows[j]) < 4
                else COUNT_WORDS.get(lows[j])
            )
            if days is None or n is None:
                continue
            if days == 365:
                now = iso(self.at)
                return (
                    instant(f"{max(1, int(now[:4]) - n):04d}-01-01") if int(now[:4]) > n else None
                )
            return (self.at // DAY - n * days) * DAY
        return None

    def _time(self, clause: Clause, k: int, stop: int, ids: list[int]) -> None:
        """Set when a clause holds: its date, else from when it was said if it is a state."""
        state = (
            clause.functional
            or clause.tense == "present"
            or (clause.tense == "perfect" and clause.relation.split(" ")[0] in STATES)
        )
        if not ids:
            since = self._since(k, stop)
            if clause.ended:
                clause.valid_to = self.at
            elif since is not None and clause.tense in ("perfect", "present"):
                clause.valid_from = since
            elif state and clause.tense != "future":
                clause.valid_from = self.at
            return
        span, clause.dated = self.spans[ids[0]], True
        where = next((i for i, mark in self.marks.items() if mark == ids[0]), 0)
        before = self.lows[where - 1] if where else ""
        if clause.ended:
            clause.valid_to = span.start
        elif before in ("until", "till"):
            clause.valid_to = span.end
        elif before == "since" or (
            clause.functional if clause.tense == "past" else state and clause.tense != "future"
        ):
            clause.valid_from = span.start
        else:
            clause.valid_from, clause.valid_to = span.start, span.end

    def _special(self, clause: Clause, words: list[str]) -> None:
        """Rename relations that idioms hide: names, ages, favourites, jobs lost."""
        low, obj = clause.relation, clause.object
        own = f"{possessive(self.speaker)} "
        if low == "be" and clause.subject.startswith(own):
            noun = clause.subject[len(own) :].lower()
            key = relation_key(noun)
            if noun.startswith(("favorite ", "favourite ")):
                clause.subject, clause.relation = self.speaker, "favourite " + noun.split(" ", 1)[1]
            elif key in (
                "name",
                "age",
                "job",
                "hometown",
                "birthday",
                "nickname",
                "email",
                "address",
                "work at",
            ):
                clause.subject, clause.relation = self.speaker, key
        elif low == "be":
            match = _AGE.match(obj)
            if match is not None:
                clause.relation, clause.object = "age", match[1]
        elif low == "turn" and obj.isdecimal():
            clause.relation = "age"
        elif (
            low in ("lose", "quit", "leave") and QUIT_OBJECTS.intersection(words[:3]) and _job(obj)
        ):
            clause.ended = True
            clause.relation, clause.object = _occupation(obj)
            clause.valid_to = clause.valid_from or self.at
            clause.valid_from = None
        elif low in ("get", "start", "land", "accept", "find") and "job" in words[:4] and _job(obj):
            clause.relation, clause.object = _occupation(obj)
            clause.valid_from, clause.valid_to = clause.valid_from or self.at, None


def tense_of(aux: Sequence[str]) -> str:
    """Return past, present, perfect or future for the auxiliaries of a verb group."""
    if "will" in aux or "would" in aux:
        return "future"
    if aux[0] in ("was", "were", "did", "had"):
        return "past"
    if aux[0] in ("have", "has", "'s") and len(aux) > 1:
        return "perfect"
    return "present"


def possessive(name: str) -> str:
    """Return a name with its apostrophe ("Ana's", "the kids'")."""
    return name + ("'" if name.endswith("s") else "'s")


def _job(obj: str) -> str:
    for link in (" as ", " at ", " with "):
        if link in obj:
            return obj.split(link, 1)[1].removeprefix("a ").removeprefix("an ").removeprefix("the ")
    return ""


def _occupation(obj: str) -> tuple[str, str]:
    return ("work as" if " as " in f" {obj} " else "work at"), _job(obj)


def join(words: Sequence[str]) -> str:
    """Join tokens with the spaces that English puts between them."""
    out, quoted = "", False
    for word in words:
        if word == '"':
            out += word if quoted else (" " + word if out else word)
            quoted = not quoted
        elif (
            not out
            or word in (",", "%", ")")
            or out[-1] in ("/", "(")
            or word == "/"
            or (quoted and out[-1] == '"')
        ):
            out += word
        else:
            out += " " + word
    if quoted:  # the closing mark lies outside the clause
        out = "".join(out.rsplit('"', 1))
    return out
