"""What a policy is, and the one argument that each of its hooks gets.

A policy is a frozen dataclass of knobs. Its hooks are pure: they look at a `Step` and return
operations, an order or a text; the engine carries these out in one transaction. So a policy holds
no state, never writes, and its runs can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memwise.catalogue import Card
from memwise.recall.engine.extract import Extractor
from memwise.recall.engine.index import Floats, Index
from memwise.recall.engine.llm import originated
from memwise.recall.engine.pack import Candidate, Draft, pack
from memwise.recall.engine.rank import Encode, Query, Ranking, Recipe, rank
from memwise.recall.engine.records import FOREVER, SOURCES, Add, Context, Instant, Item, Link, Op
from memwise.recall.engine.store import SQLite
from memwise.recall.engine.tables import TAIL, Bank

_NO_QUERY = Query("")
_CONTEXT = TAIL  # turns that an extractor sees before those it reads: those at hand


@dataclass(frozen=True)
class Step:
    """What a policy may see and use when one of its hooks is called.

    Attributes:
        now: the time of the call, from the memory's clock.
        turns: the sources the hook is about: new ones (`on_turns`) or those of the session that
            ended (`on_session_end`) since it ended last, in order; they have their ids, but are
            not stored yet in `on_turns`.
        query: what is searched for (`rank`, `pack`, `on_recall`).
        tokens: the most tokens a packed context may have (`pack`).
        found: what was found, best first (`pack`, `on_recall`).
        horizon: sources from this row on are not read: a rebuild derives as if they were to come.
        extract: the extractor.
        count: counts the tokens of a text.
    """

    now: Instant
    store: SQLite
    bank: Bank
    policy: str
    extract: Extractor
    encode: Encode
    count: Callable[[str], int]
    open_index: Callable[[Bank], Index]
    turns: Sequence[Item] = ()
    query: Query = _NO_QUERY
    tokens: int = 0
    found: Sequence[Candidate] = ()
    horizon: int = FOREVER

    @property
    def index(self) -> Index:
        """The bank's index; it is read only when a hook first asks for it."""
        return self.open_index(self.bank)

    def scan(
        self,
        *kinds: str,
        session: str | None = None,
        at: Instant | None = None,
        known_at: Instant | None = None,
    ) -> list[Item]:
        """Live items of these kinds (all if none): sources and this policy's own, oldest first.

        `at` and `known_at` ask for what was true then, as it was known then.
        """
        found = self.store.scan(
            self.bank, kinds=kinds, policies=("", self.policy), session=session, at=at,
            known_at=known_at,
        )  # fmt: skip
        if self.horizon == FOREVER:
            return found
        return [item for item in found if item.row < self.horizon or not item.is_source]

    def about(self, actors: Iterable[str], *kinds: str) -> list[Item]:
        """Live derived items whose actor is one of these, whatever the case, oldest first."""
        shelf = self.index.derived
        wanted = {actor.casefold() for actor in actors}
        numbers = [n for name, n in shelf.names["actors"].items() if name.casefold() in wanted]
        if not numbers:
            return []
        rows = shelf.rows[np.isin(shelf.actors, numbers) & (shelf.expired == FOREVER)]
        found = self.get(rows.tolist())
        return [found[row] for row in sorted(found) if not kinds or found[row].kind in kinds]

    def recent(self, n: int) -> list[Item]:
        """The n newest sources, oldest first."""
        shelf = self.index.sources
        if not len(shelf):
            return []
        live = shelf.rows[(shelf.rows < self.horizon) & (shelf.expired == FOREVER)]
        found = self.get(live[-n:].tolist())
        return [found[row] for row in sorted(found)]

    def told(self, after: int = 0, before: int = FOREVER) -> list[Item]:
        """Live sources with rows between these two, oldest first; reads no others."""
        shelf = self.index.sources
        if not len(shelf):
            return []
        before = min(before, self.horizon)
        inside = (shelf.rows > after) & (shelf.rows < before) & (shelf.expired == FOREVER)
        found = self.get(shelf.rows[inside].tolist())
        return [found[row] for row in sorted(found)]

    def newest(self, kind: str) -> Item | None:
        """The newest live derived item of a kind; None if there is none."""
        shelf = self.index.derived
        if not len(shelf) or (number := shelf.number("kinds", kind)) < 0:
            return None
        rows = shelf.rows[(shelf.kinds == number) & (shelf.expired == FOREVER)]
        return self.get([int(rows[-1])]).get(int(rows[-1])) if len(rows) else None

    def get(self, rows: Iterable[int]) -> dict[int, Item]:
        """Items by row number; rows that are gone are left out."""
        return self.store.items(rows)

    def links(self, items: Iterable[Item], *rels: str, incoming: bool = False) -> list[Link]:
        """Links that leave (or reach) the items."""
        return self.store.links([i.row for i in items], rels, incoming=incoming)

    def sources(self, items: Iterable[Item]) -> dict[int, tuple[int, ...]]:
        """For each item's row the rows of the sources it rests on; a source rests on itself."""
        listed = list(items)
        derived = self.index.origins(i.row for i in listed if i.kind not in SOURCES)
        return {i.row: derived.get(i.row, (i.row,)) for i in listed}

    def facts(self, turns: Sequence[Item]) -> list[Add]:
        """Facts of turns of one session as items to be added, with their extractor.

        The few turns before them are their context.
        """
        if not turns:
            return []
        before = self.store.before(self.bank, turns[0].row, turns[0].session, _CONTEXT)
        return [
            Add(
                "fact", fact.text, sources=(turns[fact.source],), actor=fact.subject,
                at=turns[fact.source].at, session=turns[fact.source].session,
                valid_from=fact.valid_from, valid_to=fact.valid_to, extractor=origin,
                data={
                    "subject": fact.subject, "relation": fact.relation, "object": fact.object,
                    "functional": fact.functional,
                },
                vector=False,
            )
            for fact, origin in originated(self.extract, turns, before)
        ]  # fmt: skip

    def rank(self, recipe: Recipe, query: Query | None = None) -> Ranking:
        """The engine's ranking by a recipe, of this step's query or another one."""
        return rank(self.index, recipe, query or self.query, self.encode)

    def candidates(self, ranking: Ranking) -> list[Candidate]:
        """The ranked items themselves, best first."""
        items = self.get(ranking.rows)
        return [
            Candidate(items[row], score)
            for row, score in zip(ranking.rows, ranking.scores, strict=True)
            if row in items
        ]

    def similar(self, text: str, *kinds: str, k: int = 5) -> list[Candidate]:
        """The k live items of these kinds nearest in meaning, by cosine (words, if no vectors)."""
        recipe = Recipe.meaning(kinds) if self.index.dim else Recipe.words(kinds)
        return self.candidates(self.rank(recipe, Query(text, k=k)))

    def cosine(self, a: Sequence[str], b: Sequence[str]) -> Floats:
        """Cosine of each text of `a` with each of `b` (len(a), len(b))."""
        return np.asarray(self.encode(a) @ self.encode(b).T, np.float32)


@dataclass(frozen=True)
class Policy:
    """How a memory is written, kept and found again; override only what differs.

    The base keeps every turn as it came, derives nothing, ranks by `recipe`, packs whole items and
    forgets the oldest first.
    """

    card: ClassVar[Card]
    recipe: ClassVar[Recipe] = Recipe()

    @property
    def name(self) -> str:
        """The policy's name: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    def on_turns(self, step: Step) -> Sequence[Op]:
        """Operations to carry out together with the addition of `step.turns`."""
        return ()

    def on_session_end(self, step: Step) -> Sequence[Op]:
        """Operations after a session: `step.turns` are all its turns."""
        return ()

    def on_recall(self, step: Step) -> Sequence[Op]:
        """Operations after a search: `step.found` was returned."""
        return ()

    def rank(self, step: Step) -> Ranking:
        """Rows of the items that answer `step.query`, best first."""
        return step.rank(self.recipe)

    def pack(self, step: Step) -> Context:
        """`step.found` as a text of at most `step.tokens` tokens."""
        return pack([Draft(c.item, c.score) for c in step.found], step.tokens, step.count)

    def retention(self, items: Sequence[Item], now: Instant) -> Sequence[float]:
        """How much each item is worth keeping; the lowest is forgotten first."""
        return [float(item.row) for item in items]

    def why_forgotten(self, item: Item, now: Instant) -> str:
        """One phrase that explains why this item went."""
        return "oldest first"


def overrides(policy: Policy, hook: str) -> bool:
    """Does the policy's class define this hook itself?"""
    return getattr(type(policy), hook) is not getattr(Policy, hook)
