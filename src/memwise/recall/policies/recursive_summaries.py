"""One evolving summary of bounded length, rewritten after every session from itself alone."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.recall.engine.extract import Fact
from memwise.recall.engine.pack import Draft, pack
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.records import Add, Context, Instant, Op, Replace
from memwise.recall.engine.text import terms

_BREAK = "; "


@dataclass(frozen=True)
class _Unit:
    """A statement of the summary: "Ana moved to Lisbon." is kept as `Ana: moved to Lisbon`.

    A statement that does not begin with its subject has a line of its own. `key` is subject and
    relation where these have one value at a time, which began at `since`.
    """

    subject: str
    said: str
    words: frozenset[int]
    key: tuple[str, str] | None = None
    since: Instant = 0
    actor: str = ""
    at: Instant = 0
    session: str = ""

    @property
    def text(self) -> str:
        return f"{self.subject} {self.said}.".lstrip()


@dataclass(frozen=True)
class RecursiveSummaries(Policy):
    """Keep one text M of bounded length; after session i, M_i is made of M_(i-1) and the session.

    Statements of the old text and facts of the session compete for the room. Of two that say the
    same one stays; a newer value takes the place of an older one; then those are chosen, by gain
    for each token, that cover most of the weight of all words. A word weighs more in a name or a
    number, and the more statements it recurs in; once covered it counts no more. What is not chosen
    is gone from M (the turns stay, and are searched beside it).

    Attributes:
        summary_tokens: most tokens of the text.
        name_weight: weight of a word in a name or number; other words weigh 1.

    Note:
        The paper lets a language model rewrite the text. Here it is a selection, so that nothing
        stands in it that nobody said.
    """

    card = Card(
        paper=130,
        claim="F1 and consistency above truncated history, retrieval and other memories with "
        "GPT-3.5 on MSC over 5 sessions",
        check="rolling_summary",
        baseline="most_recent",
        better="higher",
        margin=0.0,
    )
    summary_tokens: int = 512
    name_weight: float = 2.0

    def __post_init__(self) -> None:
        if self.summary_tokens < 16:
            raise InvalidKnob(f"summary_tokens={self.summary_tokens}: a text needs at least 16")

    def on_session_end(self, step: Step) -> Sequence[Op]:
        held = step.scan("summary")
        last = step.turns[-1]
        if held and (held[-1].session, held[-1].at) == (last.session, last.at):
            return []
        units = _merged(step, _parsed(step, held[-1].text if held else ""), _told(step))
        text = _written(self._chosen(step, units, self.summary_tokens))
        if not text:
            return []
        new = Add("summary", text, sources=step.turns, at=last.at, session=last.session)
        return [Replace(held[-1], new, "rewritten")] if held else [new]

    def pack(self, step: Step) -> Context:
        found = [Draft(c.item, c.score) for c in step.found]
        room = min(self.summary_tokens, step.tokens // 2)
        held = [
            Draft(item, 1.0, text, "summary")
            for item in step.scan("summary")
            if (text := _written(self._chosen(step, _parsed(step, item.text), room)))
        ]
        return pack([*held, *found], step.tokens, step.count)

    def _chosen(self, step: Step, units: Sequence[_Unit], tokens: int) -> list[_Unit]:
        """Units that cover most weight in so many tokens, chosen greedily, in their order."""
        weight = self._weights(step, units)
        costs = [1 + step.count(unit.said) for unit in units]
        covered: set[int] = set()
        chosen: list[int] = []
        heap = [(-math.inf, i) for i in range(len(units))]
        while heap:
            bound, i = heapq.heappop(heap)
            gain = sum(weight[word] for word in sorted(units[i].words - covered)) / costs[i]
            if gain < -bound and gain > 0:  # gains only fall: an old one is an upper bound
                heapq.heappush(heap, (-gain, i))
            elif gain > 0:
                trial = sorted([*chosen, i])
                if step.count(_written([units[j] for j in trial])) <= tokens:
                    chosen = trial
                    covered |= units[i].words
        return [units[i] for i in chosen]

    def _weights(self, step: Step, units: Sequence[_Unit]) -> dict[int, float]:
        """Salience times recurrence of each word."""
        recurring = Counter(word for unit in units for word in unit.words)
        named: set[int] = set()
        for unit in units:
            numbers = [word for word in unit.said.split() if word[:1].isdigit()]
            named.update(t for name in [*step.extract.entities(unit.text), *numbers]
                         for t in terms(name))  # fmt: skip
        return {
            word: (self.name_weight if word in named else 1.0) * (1 + math.log(n))
            for word, n in recurring.items()
        }


def _parsed(step: Step, text: str) -> list[_Unit]:
    """The statements of a summary, read back from its text and from nothing else."""
    lines = (line.partition(": ") for line in text.splitlines())
    pairs = [
        (subject if said else "", part)
        for subject, _, said in lines
        for part in (said or subject).split(_BREAK)
    ]
    units = [_unit(subject, said) for subject, said in pairs]
    first = {fact.source: fact for fact in reversed(step.extract.facts(units))}
    return [_keyed(unit, first.get(i)) for i, unit in enumerate(units)]


def _told(step: Step) -> list[_Unit]:
    """The facts of the session's turns as statements."""
    units = []
    for fact in step.extract.facts(step.turns):
        said = " ".join(fact.text.replace(";", ",").replace(": ", " ").split()).rstrip(".")
        subject = fact.subject if said.startswith(f"{fact.subject} ") else ""
        units.append(_keyed(_unit(subject, said[len(subject) :].strip()), fact))
    return units


def _unit(subject: str, said: str) -> _Unit:
    return _Unit(subject, said, frozenset(terms(f"{subject} {said}")))


def _keyed(unit: _Unit, fact: Fact | None) -> _Unit:
    if fact is None or not fact.functional:
        return unit
    return replace(unit, key=(fact.subject.lower(), fact.relation), since=fact.valid_from or 0)


def _merged(step: Step, old: Sequence[_Unit], new: Sequence[_Unit]) -> list[_Unit]:
    """Without repeats and without values that a newer one superseded."""
    kept = list(old)
    for unit in new:
        fates = [_fate(step, one, unit) for one in kept]
        kept = [one for one, fate in zip(kept, fates, strict=True) if fate != "updates"]
        if "entails" not in fates:
            kept.append(unit)
    return kept


def _fate(step: Step, old: _Unit, new: _Unit) -> str:
    """What the new statement does to the old one: "updates", "entails" (nothing new) or ""."""
    if new.words <= old.words:
        return "entails"
    if old.key is not None and new.key is not None:
        if old.key != new.key:
            return ""
        return "updates" if new.since >= old.since else "entails"
    if 2 * len(old.words & new.words) < min(len(old.words), len(new.words)):
        return ""
    found = step.extract.relation(old.text, new.text)
    return {"updates": "updates", "ends": "updates", "entails": "entails"}.get(found, "")


def _written(units: Iterable[_Unit]) -> str:
    """The text: a line for each subject, in order of appearance, and for each bare statement."""
    lines: dict[str, list[str]] = {}
    for unit in units:
        lines.setdefault(unit.subject or unit.said, []).append(unit.said)
    return "\n".join(
        name if said == [name] else f"{name}: {_BREAK.join(said)}" for name, said in lines.items()
    )
