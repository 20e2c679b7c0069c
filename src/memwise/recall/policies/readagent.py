"""Read in pages, remember the gist of each, and look up the pages that a question needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.recall.engine.pack import Draft, pack, render
from memwise.recall.engine.pages import Page, bind, ranked_pages
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.records import Context, Op


@dataclass(frozen=True)
class ReadAgent(Policy):
    """Keep the text, cut into pages at changes of topic, and a gist of each page.

    A context is the gists in order, with the pages that answer the question swapped in verbatim.
    Where not all of that fits, the pages ranked last go first. Search ranks turns; what follows the
    last page is open, has no gist and is looked up as a page.

    Attributes:
        least_words: words after which a page may end.
        most_words: words by which it must end.
        gist_ratio: share of a page's words that its gist keeps.
        lookup_pages: most pages to be looked up; 0 = answer from the gists.
        gists_ratio: share of a context's tokens that is kept for gists.

    Note:
        The paper asks a model for the break, the gist and the pages. Here a page ends where words
        and meaning change most, its gist is a selection of its clauses, and pages are ranked by
        their best turn and the words of their gist.
    """

    card = Card(
        paper=26,
        claim="QuALITY 86.6-87 % with up to six pages looked up, against 85.8 % from the full text "
        "and about 78 % from gists alone; effective context 3.5-20 times longer",
        check="gist_lookup",
        baseline="top_pages",
        better="higher",
        margin=0.0,
        negative="evidence words in 1,000 tokens 0.742 (LoCoMo) and 0.553 (HotpotQA), above gists "
        "alone (0.284, 0.390) and whole pages (0.725, 0.506), but below pages of which the last is "
        "cut to fit (0.785, 0.577): gists by rule are worth less than the tokens they take",
    )
    least_words: int = 280
    most_words: int = 600
    gist_ratio: float = 0.3
    lookup_pages: int = 6
    gists_ratio: float = 0.1

    def on_turns(self, step: Step) -> Sequence[Op]:
        return bind(step, self.least_words, self.most_words, self.gist_ratio)

    def pack(self, step: Step) -> Context:
        pages = ranked_pages(step)
        forms = self._gists(step, pages, {}, self.gists_ratio * step.tokens)
        forms = self._looked_up(step, pages, forms)
        forms = self._gists(step, pages, forms, step.tokens)
        drafts = [draft for page in pages for draft in forms.get(page.turns[0].row, [])]
        return pack(drafts, step.tokens, step.count)

    def _gists(
        self, step: Step, pages: Sequence[Page], forms: dict[int, list[Draft]], tokens: float
    ) -> dict[int, list[Draft]]:
        """Gists of the pages that have no place yet, best first, as far as the tokens reach."""
        for page in pages:
            key = page.turns[0].row
            if page.gist and key not in forms:
                more = forms | {key: [Draft(page.gist, page.score, form="gist")]}
                if _size(step, more) <= tokens:
                    forms = more
        return forms

    def _looked_up(
        self, step: Step, pages: Sequence[Page], forms: dict[int, list[Draft]]
    ) -> dict[int, list[Draft]]:
        """The best pages verbatim, in the place of their gists, as far as they fit."""
        left = self.lookup_pages
        for page in pages:
            more = forms | {page.turns[0].row: [Draft(turn, page.score) for turn in page.turns]}
            if left and _size(step, more) <= step.tokens:
                forms, left = more, left - 1
        return forms


def _size(step: Step, forms: dict[int, list[Draft]]) -> int:
    return step.count(render([draft for page in forms.values() for draft in page]))
