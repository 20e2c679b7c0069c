"""Baseline for packing: the most similar turns as they came, cut off where the tokens end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.recall.engine.pack import Candidate, Draft, pack, render
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Ranking, Recipe
from memwise.recall.engine.records import Context


@dataclass(frozen=True)
class Truncated(Policy):
    """Keep every turn; a context holds the top turns by cosine, the last one cut to what fits.

    Attributes:
        activated: most turns in a context.
    """

    card = Card(
        paper=None,
        claim="what a context of 256 tokens is worth if nobody controls it",
        check="controlled_pack",
        baseline="scm",
        better="lower",
        margin=0.0,
        kind="baseline",
    )
    activated: int = 6

    def rank(self, step: Step) -> Ranking:
        return step.rank(Recipe.meaning() if step.index.dim else Recipe.words())

    def pack(self, step: Step) -> Context:
        drafts: list[Draft] = []
        for found in step.found[: self.activated]:
            text = found.item.text
            fitting = bisect_right(
                range(len(text) + 1), step.tokens, key=lambda n: _size(step, drafts, found, n)
            )
            if fitting > 1:
                drafts.append(Draft(found.item, found.score, text[: fitting - 1]))
            if fitting <= len(text):
                break
        return pack(drafts, step.tokens, step.count)


def _size(step: Step, drafts: Sequence[Draft], found: Candidate, n: int) -> int:
    """Tokens of a context with the first n characters of one more turn."""
    more = Draft(found.item, found.score, found.item.text[:n])
    return step.count(render([*drafts, more]))
