"""Baseline for reading: the best pages as they are, and nothing of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.recall.engine.pack import Draft, pack
from memwise.recall.engine.pages import bind, ranked_pages
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.records import Context, Op

_MOST = 200  # turns that are tried


@dataclass(frozen=True)
class TopPages(Policy):
    """Keep the text, cut into pages; a context holds the best of them, the last one cut to fit.

    Attributes:
        least_words: words after which a page may end.
        most_words: words by which it must end.
    """

    card = Card(
        paper=None,
        claim="retrieval of pages, the part of ReadAgent that has no gists",
        check="gist_lookup",
        baseline="readagent",
        better="lower",
        margin=0.0,
        kind="baseline",
    )
    least_words: int = 280
    most_words: int = 600

    def on_turns(self, step: Step) -> Sequence[Op]:
        return bind(step, self.least_words, self.most_words, gist_ratio=0.3)

    def pack(self, step: Step) -> Context:
        drafts = [Draft(turn, page.score) for page in ranked_pages(step) for turn in page.turns]
        return pack(drafts[:_MOST], step.tokens, step.count)
