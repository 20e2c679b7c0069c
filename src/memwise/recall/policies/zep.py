"""A knowledge graph whose facts know when they were true and when they were learnt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from memwise.catalogue import Card
from memwise.recall.engine.bitemporal import settle
from memwise.recall.engine.dates import iso
from memwise.recall.engine.graph import admitted, communities, reach, rrf
from memwise.recall.engine.pack import Draft, pack
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Ranking, Recipe
from memwise.recall.engine.records import SOURCES, Add, Context, Expire, Item, Op

_RANKED = ("fact", *SOURCES)


@dataclass(frozen=True)
class Zep(Policy):
    """Keep turns, the facts in them with four clocks, and the entities that the facts mention.

    A fact that contradicts another one of the same subject and relation closes the older of the two
    where the newer begins, whichever of them comes in first. Repeated facts become one only if
    their intervals are the same. Search fuses BM25, cosine and a walk over the links; facts are
    packed with their dates.

    Attributes:
        pool: length of the orders that are fused.
        seeds: best items of the lexical and the dense order from which the walk starts.
        hops: links that the walk follows in a row.
        rrf_constant: how slowly the weight of a place falls; small trusts the first places more.
        community_members: fewest entities that get a summary at a session's end; 0 = none.
        community_facts: newest facts that a community's summary is made of.

    Note:
        Entities are resolved by name alone, without case. Contradiction needs the same subject and
        a relation that the extractor calls functional; the paper lets a model judge similar facts.
        Communities are derived anew at each session's end and searched only when asked for.
    """

    card = Card(
        paper=34,
        claim="DMR 94.8 % against 93.4 % of MemGPT; LongMemEval +18.5 % over the full context with "
        "1.6k instead of 115k tokens",
        check="bitemporal",
        baseline="last_write_wins",
        better="higher",
        margin=0.4,
    )
    pool: int = 64
    seeds: int = 4
    hops: int = 2
    rrf_constant: float = 1.0
    community_members: int = 3
    community_facts: int = 6

    def on_turns(self, step: Step) -> Sequence[Op]:
        entities: dict[str, Add] = {}
        facts = [_mentioning(fact, entities) for fact in step.facts(step.turns)]
        return [*entities.values(), *settle(step, facts)]

    def on_session_end(self, step: Step) -> Sequence[Op]:
        if not self.community_members:
            return []
        facts = step.scan("fact")
        mentioned: dict[int, list[int]] = defaultdict(list)
        for link in step.links(facts, "mentions"):
            mentioned[link.src].append(link.dst)
        label = communities(pair for rows in mentioned.values() for pair in combinations(rows, 2))
        told: dict[int, list[Item]] = defaultdict(list)
        for fact in facts:
            for community in {label[row] for row in mentioned[fact.row] if row in label}:
                told[community].append(fact)
        sizes = [*label.values()]
        new = [
            self._summary(step, told[community])
            for community in sorted(told)
            if sizes.count(community) >= self.community_members
        ]
        old = step.scan("summary")
        texts = {item.text for item in old}
        return [
            *(Expire(item, "refreshed") for item in old if item.text not in {a.text for a in new}),
            *(add for add in new if add.text not in texts),
        ]

    def _summary(self, step: Step, facts: Sequence[Item]) -> Add:
        newest = sorted(facts, key=lambda f: (f.at, f.row))[-self.community_facts :]
        text = " ".join(fact.text for fact in newest)
        return Add("summary", text, sources=newest, at=newest[-1].at)

    def rank(self, step: Step) -> Ranking:
        kinds = step.query.kinds or _RANKED
        query = replace(step.query, kinds=kinds, k=max(self.pool, step.query.k))
        arms = [step.rank(Recipe.words(kinds), query).rows]
        if step.index.dim:
            arms.append(step.rank(Recipe.meaning(kinds), query).rows)
        seeds = dict.fromkeys(row for arm in arms for row in arm[: self.seeds])
        near = reach(step, seeds, ("mentions", "derived_from"), self.hops)
        place = {row: i for arm in reversed(arms) for i, row in enumerate(arm)}
        walked = [item.row for item in admitted(step, near, kinds)]
        walked.sort(key=lambda row: (near[row], place.get(row, self.pool), row))
        return rrf([*arms, walked[: self.pool]], self.rrf_constant, step.query.k)

    def pack(self, step: Step) -> Context:
        drafts = [Draft(c.item, c.score, dated(c.item)) for c in step.found]
        return pack(drafts, step.tokens, step.count)


def dated(item: Item) -> str | None:
    """A fact with the dates between which it is true; None where there is nothing to add."""
    if item.kind != "fact" or (item.valid_from is None and item.valid_to is None):
        return None
    start, end = ("" if t is None else iso(t)[:10] for t in (item.valid_from, item.valid_to))
    return f"{item.text} ({start}..{end})"


def _mentioning(fact: Add, entities: dict[str, Add]) -> Add:
    """The fact with links to the entities it mentions; new ones join `entities`."""
    value = str(fact.data["object"])
    names = [fact.actor, value] if value[:1].isupper() else [fact.actor]
    for name in names:
        entities.setdefault(name.casefold(), Add("entity", name, fact.sources, at=fact.at))
    links = tuple(("mentions", entities[name.casefold()], 1.0) for name in names)
    return replace(fact, links=links, vector=True)
