"""Triples that are written and read by pattern: the exact term first, then a near one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from memwise.catalogue import Card
from memwise.recall.engine.bitemporal import settle
from memwise.recall.engine.dates import dates
from memwise.recall.engine.extract import question, triples
from memwise.recall.engine.graph import admitted
from memwise.recall.engine.lexicon import PREPOSITIONS, VERBS, is_functional
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Ranking
from memwise.recall.engine.records import SOURCES, Add, Item, Op
from memwise.recall.engine.text import STOP, unspoken

_WORD = re.compile(r"[^\W_]+")
_LONGEST = 6  # words of a term that is looked for in a question
_PHRASES = 4  # of a relation, that a question is compared with


@dataclass(frozen=True)
class RETLLM(Policy):
    """Keep triples (subject, relation, object); a new value overwrites the old and leaves history.

    A question becomes a pattern with one slot open. Its terms are looked up as they stand; failing
    that, the nearest stored term stands in, if it is near enough. What is about nothing stored
    finds nothing: no answer is better than the nearest one. Turns are searched only when asked for.

    Attributes:
        term_similarity: least cosine at which a stored name stands in for an unknown one.
        relation_similarity: least cosine at which a stored relation stands in for the one asked.

    Note:
        The paper finetunes a 7B model to write and to read triples; here rules do both. A relation
        that is a noun ("capital") is overwritten, one that is a verb ("like") is listed.
    """

    card = Card(
        paper=203,
        claim="right on worked examples with triples <t1, relation, t2>; the paper gives no figure",
        check="triples",
        baseline="dense",
        better="higher",
        margin=0.1,
        negative="inverse questions +0.222 [+0.172, +0.273], dated ones all right, nothing found "
        "for names never told; paraphrased ones +0.123 [+0.093, +0.153] where +0.1 was asked of "
        "the whole interval",
    )
    term_similarity: float = 0.8
    relation_similarity: float = 0.24

    def on_turns(self, step: Step) -> Sequence[Op]:
        stated = [fact for turn in step.turns for fact in _stated(step, turn)]
        taken = {(id(fact.sources[0]), name) for fact in stated for name in _names(fact)}
        told = [f for f in step.facts(step.turns) if (id(f.sources[0]), f.actor) not in taken]
        terms: dict[str, Add] = {}
        facts = [_linked(fact, terms) for fact in (*stated, *told)]
        return [*terms.values(), *settle(step, facts)]

    def rank(self, step: Step) -> Ranking:
        if set(step.query.kinds) & set(SOURCES):
            return super().rank(step)
        found = self._read(step)
        if step.query.at is None:  # what was overwritten answers only for its own time
            found = [fact for fact in found if fact.valid_to is None]
        del found[step.query.k :]
        return Ranking([item.row for item in found], [1 / (i + 1) for i in range(len(found))])

    def _read(self, step: Step) -> list[Item]:
        subject, relation, value = question(step.query.text)
        terms = [term for term in (subject, value) if term]
        exact = step.about(terms, "entity")
        named = exact or _named(step, step.query.text)
        stored = exact if named else self._near_terms(step, terms)
        if stored and relation and step.store.matching(step.bank, {"relation": relation}):
            names = {term.text.casefold() for term in stored}
            slot = "subject" if subject else "object"
            return [
                fact
                for fact in _mentioning(step, stored)
                if fact.data["relation"] == relation and str(fact.data[slot]).casefold() in names
            ]
        term = [*named, *stored][:1]
        return self._near_relation(step, term[0]) if term else []

    def _near_terms(self, step: Step, terms: Sequence[str]) -> list[Item]:
        """The stored term nearest to one that is not stored, if it is near enough."""
        for term in terms if step.index.dim else ():
            items = [c.item for c in step.similar(term, "entity", k=3) if not _within(c.item, term)]
            if items:
                cosine = step.cosine([term], [item.text for item in items])[0]
                if cosine.max() >= self.term_similarity:
                    return [items[int(cosine.argmax())]]
        return []

    def _near_relation(self, step: Step, term: Item) -> list[Item]:
        """Facts about the term under the relation that the rest of the question is nearest to.

        A relation is known by its name and by the words of the sentences that stated it.
        """
        facts = _mentioning(step, [term])
        if not facts or not step.index.dim:
            return []
        told: dict[str, list[str]] = {}
        for fact in reversed(facts):
            relation = str(fact.data["relation"])
            told.setdefault(relation, [relation]).append(_without(fact.text, _names(fact)))
        phrases = [(r, phrase) for r, some in told.items() for phrase in some[:_PHRASES]]
        rest = _without(step.query.text, (term.text,))
        cosine = step.cosine([rest], [phrase for _, phrase in phrases])[0]
        if cosine.max() < self.relation_similarity:
            return []
        best = phrases[int(cosine.argmax())][0]
        facts = [fact for fact in facts if fact.data["relation"] == best]
        name = term.text.casefold()
        return sorted(facts, key=lambda f: (f.actor.casefold() != name, -f.at, f.row))


def _stated(step: Step, turn: Item) -> Iterator[Add]:
    """The triples in a turn, true from the date in their sentence, or from when it was told."""
    for sentence in step.extract.segment(unspoken(turn.actor, turn.text)):
        spans = dates(sentence, turn.at)
        start = spans[0].start if spans else turn.at
        for subject, relation, value in triples(sentence):
            yield Add(
                "fact", sentence, sources=(turn,), actor=subject, at=turn.at, session=turn.session,
                valid_from=start,
                data={
                    "subject": subject, "relation": relation, "object": value,
                    "functional": _is_noun(relation) or is_functional(relation),
                },
            )  # fmt: skip


def _is_noun(relation: str) -> bool:
    words = relation.split(" ")
    return words[0] not in VERBS or (len(words) > 1 and words[-1] not in PREPOSITIONS)


def _names(fact: Add | Item) -> tuple[str, str]:
    return fact.actor, str(fact.data["object"])


def _linked(fact: Add, terms: dict[str, Add]) -> Add:
    """The fact with links to its two terms; new ones join `terms`."""
    names = [name for name in _names(fact) if name]
    for name in names:
        terms.setdefault(name.casefold(), Add("entity", name, fact.sources, actor=name, at=fact.at))
    return replace(fact, links=tuple(("mentions", terms[n.casefold()], 1.0) for n in names))


def _mentioning(step: Step, terms: Iterable[Item]) -> list[Item]:
    """Facts with one of the terms as subject or object that the query's filters let through."""
    links = step.links(terms, "mentions", incoming=True)
    return admitted(step, dict.fromkeys(link.src for link in links), ("fact",))


def _named(step: Step, text: str) -> list[Item]:
    """The longest stored term that the text names, unless it is a part of a longer name there."""
    words = list(_WORD.finditer(text))
    spans = {
        text[a.start() : b.end()].casefold(): (i, j)
        for i, a in enumerate(words)
        for j, b in enumerate(words[i : i + _LONGEST], i)
    }
    found = []
    for item in step.about(spans, "entity"):
        i, j = spans[item.text.casefold()]
        beside = [words[k][0] for k in (i - 1, j + 1) if 0 <= k < len(words)]
        if not any(word[0].isupper() and word.lower() not in STOP for word in beside):
            found.append(item)
    return sorted(found, key=lambda item: -len(item.text))[:1]


def _within(item: Item, term: str) -> bool:
    """Is the stored name a part of the longer name asked for ("France" in "New France")?"""
    return item.text.casefold() in term.casefold()


def _without(text: str, names: Iterable[str]) -> str:
    for name in names:
        text = re.sub(rf"\b{re.escape(name)}\b", " ", text, flags=re.IGNORECASE)
    return " ".join(text.split())
