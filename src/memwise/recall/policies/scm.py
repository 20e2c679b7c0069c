"""A controller decides whether memory is needed, and in which form each memory is shown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memwise.catalogue import Card
from memwise.recall.engine.pack import Candidate, Draft, pack, render
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Ranking, Recipe
from memwise.recall.engine.records import Add, Context, Item, Op
from memwise.recall.engine.text import terms, topic_terms

_ASKS = re.compile(
    r"\?|^\W*(?:who|whom|whose|what|when|where|which|why|how|tell me|list|name|summari[sz]e)\b",
    re.IGNORECASE,
)
_REFERS = re.compile(
    r"\b(?:(?:do you|you) remember|remind me|(?:i|you) (?:said|told|mentioned)|"
    r"we (?:talked|spoke|discussed)|last time)\b",
    re.IGNORECASE,
)
_PLEASANTRY = re.compile(
    r"\b(?:how (?:are|have|'?ve) (?:you|things)|"
    r"how(?:'?s| is| has) (?:it|everything|life|your day)|"
    r"what(?:'?s| is) (?:up|new|going on|happening)|what have you been up to|anything new|"
    r"(?:how|what) about you|and you|right|huh)\b[^?]*\?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class SCM(Policy):
    """Keep every turn with a summary of one sentence; show history only where it is needed.

    Memories are activated by likeness and recency. If they exceed the budget, the most similar one
    stays as it came; each other one is dropped, summed up or kept, by what its summary still says
    about the question. They stand in the order of time.

    Attributes:
        activated: most memories that a question activates.
        recency_weight: weight of recency beside the likeness; both are at most 1.
        recency_turns: turns after which recency has fallen to 1 / e.
        least_likeness: share of the best score below which a memory may be dropped.
        flash_turns: newest turns that are shown where history is not needed.

    Note:
        The paper asks a model whether history is needed and whether a summary suffices. Here a
        question or a reference to the past needs history unless it is a mere pleasantry, and a
        summary suffices if it holds all words that its turn shares with the question.
    """

    card = Card(
        paper=36,
        claim="with text-davinci-003 answers long dialogues as well as ChatGPT or better; without "
        "the controller most of the accuracy over 2 and more turns is lost",
        check="controlled_pack",
        baseline="truncated",
        better="lower",
        margin=0.0,
        negative="gold nll 2.46 against 2.42 nats of cutting off: a sentence taken from a turn "
        "holds no more evidence a token than the turn; the gate works (0.70 skipped, none missed)",
    )
    activated: int = 6
    recency_weight: float = 0.1
    recency_turns: float = 20.0
    least_likeness: float = 0.4
    flash_turns: int = 1

    def on_turns(self, step: Step) -> Sequence[Op]:
        summed = ((turn, self._sentence(step, turn)) for turn in step.turns)
        return [
            Add(
                "summary", text, sources=(turn,), actor=turn.actor, at=turn.at,
                session=turn.session, extractor=step.extract.name, vector=False,
            )
            for turn, text in summed
            if text and len(text) < len(turn.text)
        ]  # fmt: skip

    def _sentence(self, step: Step, turn: Item) -> str:
        n = len(step.extract.segment(turn.text))
        return step.extract.gist(turn.text, 1 / n) if n > 1 else ""

    def rank(self, step: Step) -> Ranking:
        recipe = Recipe.meaning() if step.index.dim else Recipe.words()
        ranking = step.rank(recipe, replace(step.query, k=max(100, step.query.k)))
        rows = step.index.sources.rows
        best = max([*ranking.scores, 1e-9])
        scored = [
            (score / best + self.recency_weight * self._recency(len(rows) - rows.searchsorted(row)),
             row)
            for row, score in zip(ranking.rows, ranking.scores, strict=True)
        ]  # fmt: skip
        scored.sort(key=lambda one: (-one[0], one[1]))
        kept = scored[: step.query.k]
        return Ranking([row for _, row in kept], [score for score, _ in kept])

    def _recency(self, age: float) -> float:
        return math.exp(-age / self.recency_turns)

    def needs_history(self, text: str) -> bool:
        """Controller question 1: does an answer to this need memory?"""
        asks = _ASKS.search(_PLEASANTRY.sub("", text))
        return asks is not None or _REFERS.search(text) is not None

    def pack(self, step: Step) -> Context:
        if not self.needs_history(step.query.text):
            flash = [Draft(turn, 1.0) for turn in step.recent(self.flash_turns)]
            return pack(flash, step.tokens, step.count)
        active = step.found[: self.activated]
        drafts = [Draft(c.item, c.score) for c in active]
        if self._excess(step, drafts):
            drafts = self._shortened(step, active)
        return pack(drafts, step.tokens, step.count)

    def _shortened(self, step: Step, active: Sequence[Candidate]) -> list[Draft]:
        """Forms in which the memories fit: the least similar are shortened and dropped first."""
        short = self._summaries(step, active)
        summed = [
            Draft(short[c.item.row], c.score, form="summary") if c.item.row in short else None
            for c in active
        ]
        forms: list[Draft | None] = [Draft(c.item, c.score) for c in active]
        for i in range(len(active) - 1, 0, -1):
            for form in (self._form(step, active[i], active[0], summed[i]), summed[i], None):
                if self._excess(step, _shown(forms)):
                    forms[i] = form
        if self._excess(step, _shown(forms)):
            forms[0] = summed[0] or forms[0]
        for i, form in enumerate(forms):
            more = [*forms[:i], summed[i], *forms[i + 1 :]]
            if form is None and not self._excess(step, _shown(more)):
                forms = more
        return _shown(forms)

    def _form(
        self, step: Step, memory: Candidate, best: Candidate, summed: Draft | None
    ) -> Draft | None:
        """Controller question 2: does the summary suffice? None = not even that is needed."""
        if memory.score < self.least_likeness * best.score:
            return None
        shared = topic_terms(step.query.text).intersection(terms(memory.item.text))
        if summed is not None and shared.issubset(terms(summed.item.text)):
            return summed
        return Draft(memory.item, memory.score)

    def _summaries(self, step: Step, active: Sequence[Candidate]) -> dict[int, Item]:
        """Each turn's summary, by the turn's row."""
        links = step.links([c.item for c in active], "derived_from", incoming=True)
        found = step.get(link.src for link in links)
        mine = {row: item for row, item in found.items() if item.policy == step.policy}
        return {link.dst: mine[link.src] for link in links if link.src in mine}

    def _excess(self, step: Step, drafts: Sequence[Draft]) -> bool:
        return step.count(render(drafts)) > step.tokens


def _shown(forms: Sequence[Draft | None]) -> list[Draft]:
    return [draft for draft in forms if draft]
