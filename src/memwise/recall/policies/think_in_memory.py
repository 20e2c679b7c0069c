"""Remember thoughts instead of turns, in hash buckets that are searched and tidied alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.recall.engine.graph import admitted
from memwise.recall.engine.lsh import Buckets
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Ranking, Recipe
from memwise.recall.engine.records import SOURCES, Add, Expire, Item, Merge, Op


@dataclass(frozen=True)
class ThinkInMemory(Policy):
    """Keep what was concluded from the turns as sentences on one head entity, and find these.

    A query is hashed and compared with the thoughts of its bucket alone. At a session's end each
    new thought meets the older ones of its bucket with the same head: a contradicted one is let go,
    and those that say the same kind of thing of the head become one sentence. Turns are kept, and
    found only when asked for by kind or when there are no thoughts.

    Attributes:
        buckets: buckets of the hash, even.
        probes: buckets that a query opens; more are opened while they hold fewer than k thoughts.
        merged_tokens: most tokens of a merged thought.
        seed: of the hash's random axes.

    Note:
        Thoughts are made when a turn is told, not after an answer, so that the memory needs no
        model that answers. Merging asks for the same relation besides the same head, or everything
        about a person would become one text. Sentence vectors lie far apart, so half the buckets
        are opened: a few of them would miss much of what a flat search finds. `probes` and
        `merged_tokens` were set on five LoCoMo conversations, conv-26 to conv-43.
    """

    card = Card(
        paper=164,
        claim="retrieval in 0.53 ms against 0.63 ms, and more correct and coherent answers than "
        "SiliconFriend on three dialogue sets",
        check="thoughts",
        baseline="dense",
        better="higher",
        margin=0.0,
    )
    recipe = Recipe.meaning(("thought",))
    buckets: int = 16
    probes: int = 8
    merged_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.buckets < 2 or self.buckets % 2:
            raise InvalidKnob(f"buckets={self.buckets}: use an even number of at least 2")
        if not 1 <= self.probes <= self.buckets:
            raise InvalidKnob(f"probes={self.probes}: use 1 to {self.buckets}, the buckets")

    def on_turns(self, step: Step) -> Sequence[Op]:
        # No actor: the sentence names its head itself, and would be embedded with it twice.
        return [
            replace(fact, kind="thought", actor="", valid_from=None, valid_to=None, vector=True)
            for fact in step.facts(step.turns)
        ]

    def on_session_end(self, step: Step) -> Sequence[Op]:
        new = {item.row for item in step.scan("thought", session=step.turns[-1].session)}
        ops: list[Op] = []
        for group in self._groups(step):
            if new.isdisjoint(item.row for item in group):
                continue
            held, gone = _settled(step, group, new)
            ops += [Expire(item, "contradicted") for item in gone]
            ops += self._merges(step, held, new)
        return ops

    def _groups(self, step: Step) -> list[list[Item]]:
        """Thoughts of one bucket with one head entity, oldest first."""
        index = step.index
        table = Buckets.of(index, self.buckets, self.seed) if index.dim else None
        groups: dict[tuple[int, str], list[Item]] = defaultdict(list)
        for item in step.scan("thought"):
            head = str(item.data.get("subject")).casefold()
            groups[table[item.row] if table else 0, head].append(item)
        return [*groups.values()]

    def _merges(self, step: Step, held: Sequence[Item], new: set[int]) -> list[Op]:
        alike: dict[str, list[Item]] = defaultdict(list)
        for item in held:
            alike[str(item.data.get("relation"))].append(item)
        ops: list[Op] = []
        for items in alike.values():
            while items and not new.isdisjoint(item.row for item in items):
                text, members = items[0].text, [items[0]]
                for item in items[1:]:
                    longer = _joined(text, item.text)
                    if step.count(longer) <= self.merged_tokens:
                        text, members = longer, [*members, item]
                if len(members) > 1:
                    last = members[-1]
                    ops.append(Merge(members, replace(Add.like(last), text=text), "merged"))
                items = [item for item in items if item not in members]
        return ops

    def rank(self, step: Step) -> Ranking:
        kinds = step.query.kinds or self.recipe.kinds
        if not len(step.index.derived) or any(kind != "thought" for kind in kinds):
            query = replace(step.query, kinds=step.query.kinds or SOURCES)
            return step.rank(Recipe.meaning() if step.index.dim else Recipe.words(), query)
        if not step.index.dim:
            return step.rank(Recipe.words(kinds))
        vector = step.encode([step.query.text])[0]
        found: list[tuple[float, int]] = []
        probed = Buckets.of(step.index, self.buckets, self.seed).probed(vector)
        for n, rows in enumerate(probed):
            if n >= self.probes and len(found) >= step.query.k:
                break
            near = [item.row for item in admitted(step, rows, kinds)]
            cosines = step.index.vectors(near) @ vector if near else []
            found += zip((-float(c) for c in cosines), near, strict=True)
        best = sorted(found)[: step.query.k]
        return Ranking(
            [row for _, row in best], [-c for c, _ in best],
            [{"cosine": round(-c, 4), "compared": float(len(found))} for c, _ in best],
        )  # fmt: skip


def _settled(step: Step, group: Sequence[Item], new: set[int]) -> tuple[list[Item], list[Item]]:
    """The thoughts that still hold beside the new ones, and those that these contradict."""
    held: list[Item] = []
    gone: list[Item] = []
    for item in group:
        if item.row in new:
            over = [old for old in held if _contradicted(step, old, item)]
            gone += over
            held = [old for old in held if old not in over]
        held.append(item)
    return held, gone


def _contradicted(step: Step, old: Item, new: Item) -> bool:
    return step.extract.relation(old.text, new.text) in ("updates", "ends")


def _joined(first: str, second: str) -> str:
    """Two sentences as one; what they begin with alike is said once."""
    a, b = first.rstrip(". ").split(), second.rstrip(". ").split()
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    rest = b[shared:]
    if not rest or " ".join(rest) in first:
        return first
    return f"{' '.join(a)} and {' '.join(rest)}." if shared else f"{first} {second}"
