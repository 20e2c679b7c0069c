"""Facts from chat turns and short sentences, by a shallow parse: subject, verb group, object.

One pass over the tokens of each sentence, left to right. A clause opens at "I", "we", "my ...", a
name or a pronoun whose antecedent is known; its verb group gives tense, negation and relation; its
object runs to the next clause boundary. No search backtracks, so time is linear in the text.
Date expressions are replaced by single characters before the parse and written back as absolute
dates after it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from memwise.recall.engine.clause import Clause, Group, Wording, join, possessive, tense_of
from memwise.recall.engine.dates import DateSpan, dates
from memwise.recall.engine.lexicon import (
    ADVERBS,
    ALWAYS_FINITE,
    AUXILIARIES,
    BE,
    DETERMINERS,
    ENDING,
    HEADS,
    HYPOTHETICAL,
    INTENT,
    KIN,
    LINKING,
    LISTENER,
    MOODS,
    NEGATED,
    NO_TOPIC,
    NOMINATIVE,
    NOT_VERBS,
    OPENERS,
    OTHERS,
    PADDING,
    PHASE,
    PREPOSITIONS,
    SINGULAR,
    SKIPPED_MODALS,
    SPEAKER,
    STOPWORDS,
    TALK,
    VERBS,
    relation_key,
    singular,
    third_person,
    verb,
)
from memwise.recall.engine.sentences import SPEAKER_WORD, bounds

_MARK = 0xE000  # first private-use character: stands for the k-th date of a text
_MARKS = 6400  # all of that area; a text with more dates keeps the later ones as they are
_WANNA = re.compile(r"\bwanna\b")
_IS_MARK = re.compile("[\ue000-\uf8ff]")
_TOKEN = re.compile(r"[\w$€£#]+(?:['&+./:@-]+\w+)*[%+]*(?:(?<=s)'(?=\s))?|[^\w\s]")
_JOINS = frozenset((",", "and", "-", "–", "—"))
_ANNOUNCES = re.compile(r"(?:you know|guess|hey,? guess|you won't believe) what", re.IGNORECASE)


def is_contraction(low: str) -> bool:
    """Return whether a lower-case word is a pronoun or an auxiliary with an apostrophe."""
    return low in NOMINATIVE or low in NEGATED


def is_finite(low: str) -> bool:
    """Return whether a lower-case word is a listed verb in the past or third person."""
    return low in VERBS and VERBS[low][1] in ("past", "third")


def stem(low: str) -> str:
    """Return the lemma of a listed verb form, else the singular of a noun."""
    known = VERBS.get(low)
    return known[0] if known is not None else singular(low)


def clauses(text: str, speaker: str, listener: str, at: int) -> list[Clause]:
    """Return the clauses of a text that state something about somebody.

    Args:
        text: one turn or sentence.
        speaker: who "I" is; "" keeps third-person sentences only.
        listener: who "you" is; "" if unknown.
        at: when it was said.
    """
    text = text.replace("’", "'")
    if "wanna" in text:
        text = _WANNA.sub("want to", text)
    spans = dates(text, at)[:_MARKS]
    if spans:
        text = _masked(text, spans)
    parse = _Parse(speaker or "The user", listener, at, spans)
    own = [match.start() for match in SPEAKER_WORD.finditer(text)]
    own.append(len(text))
    k = 0
    for begin, stop in bounds(text):
        while own[k] < begin:
            k += 1
        if stop - begin > 7:
            parse.sentence(text[begin:stop], own[k] - begin if own[k] < stop else -1)
    return parse.found


def _masked(text: str, spans: Sequence[DateSpan]) -> str:
    pieces, last = [], 0
    for k, span in enumerate(spans):
        pieces += [_IS_MARK.sub(" ", text[last : span.begin]), chr(_MARK + k)]
        last = span.stop
    return "".join([*pieces, _IS_MARK.sub(" ", text[last:])])


class _Parse(Wording):
    """Reads the clauses of one text, sentence by sentence."""

    def sentence(self, sentence: str, own: int) -> None:
        """Read one sentence and keep its clauses.

        Args:
            sentence: the sentence, dates replaced by marks.
            own: index of the first "I", "we", "my" or "our" in it; -1 if there is none.
        """
        sentence = sentence.strip()
        if own < 0:
            opening = sentence.split(None, 1)[:1]
            if not opening or opening[0].lower().rstrip(",") in NO_TOPIC:
                if self.spans and " happened" in sentence:
                    self._carry(sentence)
                return
        if own != 0 and sentence.endswith("?"):
            if _ANNOUNCES.match(sentence) is not None:
                self._carry(sentence)
            return
        self.tokens = tokens = _TOKEN.findall(sentence)
        while tokens and tokens[-1] in ".!?…)*":
            tokens.pop()
        self.lows = lows = [token.lower() for token in tokens]
        if self.spans:
            self.marks = {
                i: mark for i, token in enumerate(tokens)
                if 0 <= (mark := ord(token[0]) - _MARK) < len(self.spans)
            }  # fmt: skip
        before = len(self.found)
        i = free = 0
        while i < len(lows):
            if lows[i] in HEADS or i == 0 or lows[i - 1] in _JOINS:
                after = self._clause(i, free)
                if after > i:
                    free = i = after
                    continue
            i += 1
        if self.spans and len(self.found) == before and "happened" in lows:
            self._carry(sentence)
        elif self.found[before:]:
            self.carried = None

    def _carry(self, sentence: str) -> None:
        """Keep the date of "Guess what I did on Sunday?" for the sentence that answers it."""
        mark = _IS_MARK.search(sentence)
        if mark is not None and ord(mark.group()) - _MARK < len(self.spans):
            self.carried = ord(mark.group()) - _MARK

    # ---- where a clause opens

    def _clause(self, i: int, free: int) -> int:
        """Try to read a clause at token i; return the index after it, or i."""
        low = self.lows[i]
        if low in SPEAKER:
            if not self._opens(i):
                return self._relative(i)
            if low[0] == "w" and self.lows[i + 1 : i + 2] in (["all"], ["can"]):
                return i  # "we all need love" is about everybody
            return self._predicate(i + 1, free, self.speaker, SPEAKER[low], True)
        if low in ("my", "our"):
            return self._possessed(i, free)
        if low == "someone":
            return self._predicate(i + 1, free, "Someone", "", False)
        if low in OTHERS:
            who = self.people if low.startswith("they") else self.person
            if not who or not self._opens(i):
                return i
            return self._predicate(i + 1, free, who, OTHERS[low], False)
        if low in LISTENER:
            return self._told(i, free)
        if i == 0 or self.lows[i - 1] in _JOINS:
            if self.lows[i - 1] in "-–—" and i > 0 and low == "had":
                return self._predicate(i, free, self.speaker, "", True)
            if i == 0:
                if (
                    low == "been"
                    and len(self.lows) > 1
                    and self.lows[1] in ("to", "only", "trying", "working")
                ):
                    return self._predicate(0, free, self.speaker, "have", True)
                if self._drops_subject():
                    return self._predicate(0, free, self.speaker, "", True)
                if self._is_progress():
                    return self._predicate(0, free, self.speaker, "am", True)
                if low in DETERMINERS:
                    return self._possessed(i, free)
            return self._named(i, free)
        return i

    def _is_progress(self) -> bool:
        """Return whether a sentence is a bare "Working on a new song" or "Gonna start over"."""
        lows = self.lows
        if lows[0] == "gonna" and len(lows) > 2:
            return True
        known = VERBS.get(lows[0])
        if (
            known is None
            or known[1] != "ing"
            or known[0] in TALK
            or known[0] in ("send", "love", "look", "keep")
        ):
            return False
        if len(lows) < 3 or lows[1] in ("forward", "to", "you", "like", "with"):
            return False
        return not any(
            low in AUXILIARIES or low in NEGATED or VERBS.get(low, ("", ""))[1] == "third"
            for low in lows[1:12]
        )

    def _opens(self, i: int) -> bool:
        """Return whether a pronoun opens a clause (else it belongs to "the book I read")."""
        k = i - 1
        while k >= 0 and (self.lows[k] in ADVERBS or k in self.marks):
            k -= 1
        if k < 0 or not self.lows[k][0].isalnum():
            return True
        if self.lows[k] in ("that", "as"):  # "the book that I read", but "think that I"
            return k > 0 and self.lows[k - 1] in VERBS
        return self.lows[k] in OPENERS and self.lows[k] not in HYPOTHETICAL

    def _relative(self, i: int) -> int:
        """Read "these mugs I bought yesterday": the noun before "I" is the object."""
        if i + 2 >= len(self.lows) or i + 2 not in self.marks or self.lows[i] != "i":
            return i
        first = next(
            (k for k in range(i - 1, max(-1, i - 7), -1) if self.lows[k] in DETERMINERS), -1
        )
        known = VERBS.get(self.lows[i + 1])
        if first < 0 or known is None or known[1] != "past" or known[0] in TALK:
            return i
        noun = join([self.lows[first], *(self._own(k) for k in range(first + 1, i))])
        text = f"{self.speaker} {self.lows[i + 1]} {noun} {self._spoken(self.marks[i + 2])}."
        span = self.spans[self.marks[i + 2]]
        self.found.append(
            Clause(self.speaker, relation_key(known[0]), noun.split(" ", 1)[-1], text, tense="past",
                   valid_from=span.start, valid_to=span.end, dated=True)
        )  # fmt: skip
        return i + 3

    def _drops_subject(self) -> bool:
        """Return whether a sentence starts with its verb ("Lost my job yesterday")."""
        k = 0
        while k < len(self.lows) - 1 and self.lows[k] in (
            "just",
            "also",
            "finally",
            "still",
            "recently",
            "even",
        ):
            k += 1
        known = VERBS.get(self.lows[k])
        if self.lows[k] == "had" and self.lows[k + 1 : k + 2] in (["a"], ["an"]):
            return True
        if (
            known is None
            or len(self.lows) < k + 2
            or self.lows[k] in AUXILIARIES
            or known[0] in TALK
        ):
            return False
        if self.lows[k + 1] in ("by", "for") or self.lows[k] == "based":
            return False
        if any(low in AUXILIARIES for low in self.lows[k + 1 : k + 5]):
            return False  # "Mixed berries are sweet"
        return (known[1] == "past" and known[0] != self.lows[k]) or (known[1] == "ing" and k > 0)

    def _possessed(self, i: int, free: int) -> int:
        """Read "my sister Ana lives ...", or only remember whom it names."""
        lows, k = self.lows, i + 1
        if (
            lows[i] in ("that", "this")
            and VERBS.get(lows[k] if k < len(lows) else "", ("", ""))[1] == "third"
        ):
            return i  # "that makes me smile" has no topic
        while k < min(len(lows), i + 7):
            low = lows[k]
            if low in KIN or (low in AUXILIARIES and low != "might") or low in NEGATED:
                if low not in KIN:
                    break
                self._remember(i, k)
            elif (
                low in PREPOSITIONS
                or not low[0].isalnum()
                or low in NOMINATIVE
                or (k > i + 1 and is_finite(low))
            ):
                break
            k += 1
        if k >= len(lows) or k == i + 1 or not self._opens(i):
            return i
        low = lows[k]
        if (
            low in AUXILIARIES
            or low in NEGATED
            or (low in VERBS and VERBS[low][1] in ("past", "third"))
        ):
            owner = possessive(self.speaker) if lows[i] in ("my", "our") else self.tokens[i]
            subject = f"{owner} {' '.join(self.tokens[i + 1 : k])}"
            return self._predicate(k, free, subject, "", False)
        return i

    def _remember(self, i: int, k: int) -> None:
        noun = f"{possessive(self.speaker)} {' '.join(self.tokens[i + 1 : k + 1])}"
        if (self.lows[k].endswith("s") and self.lows[k] != "boss") or self.lows[k] in (
            "family",
            "team",
            "children",
        ):
            self.people = noun
        else:
            self.person = noun

    def _told(self, i: int, free: int) -> int:
        """Read what is said of the listener, if it is a plain state ("you live in Rome")."""
        if not self.listener or not self._opens(i) or i + 1 >= len(self.lows):
            return i
        k, before = i + 1, len(self.found)
        after = self._predicate(k, free, self.listener, LISTENER[self.lows[i]], True)
        kept = [c for c in self.found[before:] if c.functional and c.tense != "future"]
        self.found[before:] = kept
        return after

    def _named(self, i: int, free: int) -> int:
        """Read a clause whose subject is a name ("Ana Silva moved to Lisbon")."""
        tokens, lows, k = self.tokens, self.lows, i
        while (
            k < len(tokens)
            and k < i + 5
            and tokens[k][0].isupper()
            and lows[k] not in STOPWORDS
            and lows[k] not in NOMINATIVE
        ):
            k += 1
        if k == i or k >= len(tokens):
            return i
        named, low = k, lows[k]
        while low in ADVERBS or (low == "no" and lows[k + 1 : k + 2] == ["longer"]):
            k += 2 if low == "no" else 1
            if k >= len(tokens):
                return i
            low = lows[k]
        finite = low in AUXILIARIES or low in NEGATED or low in ALWAYS_FINITE
        if not finite and not (low in VERBS and VERBS[low][1] in ("past", "third")):
            return i
        verb_at, k = k, named
        if ("'" in lows[k - 1] and not lows[k - 1].endswith("'s")) or lows[
            verb_at + 1 : verb_at + 2
        ] == ["of"]:
            return i  # "There've", "Small signs of hope"
        name = " ".join(tokens[i:k])
        if name.lower().endswith(("ing", "!")) or (lows[i] in VERBS and k == i + 1):
            return i
        if verb_at == 1 and low in BE and k + 1 < len(tokens) and not self._is_solid(k + 1):
            return i  # "Glass is beautiful" is no news of a person
        self.person = name
        return self._predicate(k, free, name, "", False)

    def _is_solid(self, k: int) -> bool:
        """Return whether a complement names, places or counts something."""
        token, low = self.tokens[k], self.lows[k]
        return (
            low in DETERMINERS
            or low in PREPOSITIONS
            or low in VERBS
            or not token[0].islower()
            or low in ADVERBS
            or low in ("not", "allergic")
        )

    # ---- verb group

    def _predicate(self, k: int, free: int, subject: str, aux: str, speaker: bool) -> int:
        """Read a verb group and its object at token k; return the index after the clause."""
        group = Group()
        if aux:
            group.aux.append(aux)
        k = self._auxiliaries(k, group, speaker)
        if k >= len(self.lows) and not group.aux:
            return k
        start = k
        k = self._main_verb(k, group, speaker)
        if k < 0:
            return start
        k = self._catenative(k, group)
        return self._finish(k, free, subject, group, speaker)

    def _auxiliaries(self, k: int, group: Group, speaker: bool) -> int:
        lows, n = self.lows, len(self.lows)
        if group.aux and group.aux[0] != "'d":
            word = group.aux[0]
            group.words.append(SINGULAR.get(word, word) if speaker else word.replace("'s", "is"))
        while k < n:
            low = lows[k]
            if low in NEGATED:
                group.negated = True
                group.aux.append(NEGATED[low])
                group.words.append(SINGULAR.get(low, low) if speaker else low)
            elif low in AUXILIARIES and low != "being":
                group.aux.append(low)
                group.words.append(
                    SINGULAR.get(low, low) if speaker and len(group.aux) == 1 else low
                )
            elif low in ("not", "never"):
                group.negated = True
                group.words.append(low)
            elif low == "no" and k + 1 < n and lows[k + 1] == "longer":
                group.ended = True
                group.words.append("no longer")
                k += 1
            elif low in ADVERBS or (low.endswith("ly") and low not in VERBS):
                if low not in PADDING:
                    group.words.append(low)
            elif low == "gonna":
                group.aux.append("will")
                group.words.append("going to")
            elif k not in self.marks:
                break
            k += 1
        return k

    def _main_verb(self, k: int, group: Group, speaker: bool) -> int:
        """Settle lemma, tense and printed verb; return the index after it, or -1 to give up."""
        aux = group.aux
        low = self.lows[k] if k < len(self.lows) else ""
        lemma, form = verb(low) if low else ("", "")
        last = aux[-1] if aux else ""
        if last == "'d":
            last = aux[-1] = "had" if form in ("past", "participle") and lemma != low else "would"
            group.words.append(last)
        if last in SKIPPED_MODALS:
            return -1
        if not aux:
            if not low or not low[0].isalpha() or low in NOT_VERBS:
                return -1
            group.lemma = lemma
            group.tense = "past" if form in ("past", "participle") and lemma != low else "present"
            conjugate = (speaker and form == "base") or (speaker and lemma == low)
            group.words.append(third_person(low) if conjugate and group.tense == "present" else low)
            if lemma == low and form == "past":
                group.words[-1] = low  # "read", "put": either tense
            return k + 1
        return self._after_auxiliary(k, group, low, lemma, form, last)

    def _after_auxiliary(
        self, k: int, group: Group, low: str, lemma: str, form: str, last: str
    ) -> int:
        is_be = last in BE
        group.tense = tense_of(group.aux)
        if is_be and form == "ing" and low not in ("something", "nothing", "everything", "amazing"):
            group.lemma = lemma
            group.words.append(low)
            return k + 1
        if is_be and form in ("past", "participle") and low in VERBS and low not in MOODS:
            group.lemma = lemma
            group.prefix = "be "
            group.words.append(low)
            return k + 1
        if is_be:
            group.lemma = "be"
            return k
        if last in ("have", "has", "had", "'s") and form in ("past", "participle") and low in VERBS:
            group.lemma, group.tense = lemma, "perfect"
            group.words.append(low)
            return k + 1
        if last in ("have", "has", "had"):
            if low == "to":
                return -1
            group.lemma = "have"
            group.tense = "past" if last == "had" else group.tense
            return k
        if last in ("do", "did", "does") and (low not in VERBS or form not in ("base", "past")):
            group.lemma = "do"
            return k
        if not low or not low[0].isalpha():
            return -1
        group.lemma = lemma
        group.words.append(low)
        return k + 1

    def _catenative(self, k: int, group: Group) -> int:
        """Step into "started learning", "plan to visit", "used to live", "stopped smoking"."""
        lows, n, lemma = self.lows, len(self.lows), group.lemma
        if k >= n:
            return k
        thought = lemma in ("think", "dream") and lows[k] in ("about", "of")
        inner = k + 1 if lows[k] == "to" or thought else k
        if inner >= n or lows[inner] not in VERBS:
            return k
        base, form = VERBS[lows[inner]]
        infinitive = inner > k and not thought and (form == "base" or base == lows[inner])
        gerund = inner == k and form == "ing"
        going = lemma == "go" and group.aux[-1:] != [] and group.aux[-1] in BE
        wanting = lemma in INTENT or (lemma in ("like", "love") and "would" in group.aux)
        if (infinitive and (going or wanting)) or (thought and form == "ing"):
            kind = "plan to "
        elif lemma == "wait" and infinitive and group.negated:
            kind, group.negated = "plan to ", False
        elif (lemma == "use" and infinitive) or (lemma in ENDING and gerund):
            kind, group.ended = "", True
        elif lemma in PHASE and (gerund or infinitive):
            kind = ""
        elif lemma in ("try", "learn", "consider") and (infinitive or gerund):
            kind = f"{lemma} to "
        elif lemma == "go" and gerund:
            kind = ""
        elif lemma == "get" and inner == k and form in ("past", "participle"):
            kind = "be "
        else:
            return k
        if kind == "plan to ":
            group.tense = "future"
        group.words += self.tokens[k : inner + 1]
        group.lemma, group.prefix = base, kind
        return inner + 1

    # ---- object, dates, text

    def _finish(self, k: int, free: int, subject: str, group: Group, speaker: bool) -> int:
        stop = self._object_end(k, group.tense in ("past", "perfect"))
        words = self.lows[k:stop]
        marks = self.marks
        ids = [marks[i] for i in range(k, stop) if i in marks] if marks else []
        lead = [marks[i] for i in range(free, k) if i in marks] if marks and not ids else []
        if self.carried is not None and group.tense == "past" and not ids and not lead:
            lead = [self.carried]
        if self._tells(group, words, bool(ids or lead)):
            relation, skip = self._relation(k, stop, group)
            obj = self._object(k + skip, stop)
            text = self._text(subject, group, k, stop, lead)
            clause = Clause(subject, relation, obj, text, group.negated, group.ended, group.tense)
            self._time(clause, k, stop, ids or lead)
            self._special(clause, words)
            self.found.append(clause)
        after = stop
        if stop + 1 < len(self.lows) and self.lows[stop] in ("and", ","):
            after = self._coordinated(stop, free, subject, group, speaker)
        return max(after, k)

    def _coordinated(self, stop: int, free: int, subject: str, group: Group, speaker: bool) -> int:
        """Read a further predicate of the same subject ("... and met a vet")."""
        k = stop + 1
        if k < len(self.lows) and self.lows[k] in ("and", *LINKING):
            k += 1
        if k < len(self.lows) and self.lows[k] in LINKING:
            k += 1
        if k >= len(self.lows):
            return stop
        known = VERBS.get(self.lows[k])
        past = group.tense in ("past", "perfect") and not group.negated
        if known is None or known[1] != "past" or not past or self.lows[k] in AUXILIARIES:
            return stop
        return self._predicate(k, stop, subject, "", speaker)
