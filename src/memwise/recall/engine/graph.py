"""Links as a graph: what is near, what belongs together, and how several orders become one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from memwise.recall.engine.policy import Step
from memwise.recall.engine.rank import Ranking
from memwise.recall.engine.records import Item


def reach(
    step: Step, rows: Iterable[int], rels: Sequence[str], hops: int, hub: int = 64
) -> dict[int, int]:
    """Rows that are linked to `rows`, in either direction, with the hops it takes; 0 = itself.

    Args:
        step: the bank as it is.
        rows: where to begin.
        rels: links that may be followed.
        hops: most links in a row.
        hub: a row with more links than this is reached, but not passed: it is near everything.
    """
    near = dict.fromkeys(rows, 0)
    edge = list(near)
    for hop in range(1, hops + 1):
        beside: dict[int, list[int]] = defaultdict(list)
        for link in step.store.links(edge, rels):
            beside[link.src].append(link.dst)
        for link in step.store.links(edge, rels, incoming=True):
            beside[link.dst].append(link.src)
        found = {r for row in edge if len(beside[row]) <= hub or hop == 1 for r in beside[row]}
        edge = sorted(found - near.keys())
        near |= dict.fromkeys(edge, hop)
    return near


def admitted(step: Step, rows: Iterable[int], kinds: Sequence[str]) -> list[Item]:
    """The items of these rows that the filters of the step's query let through."""
    q = step.query
    return [
        item
        for item in step.get(rows).values()
        if item.kind in kinds
        and item.policy in ("", step.policy)
        and item.holds(q.at, q.known_at)
        and (q.actor is None or item.actor == q.actor)
        and (q.session is None or item.session == q.session)
        and (q.since is None or item.at >= q.since)
        and (q.until is None or item.at < q.until)
        and (q.rows is None or item.row in q.rows)
    ]


def communities(edges: Iterable[tuple[int, int]], rounds: int = 10) -> dict[int, int]:
    """Label propagation: each node takes the label that most of its edges lead to.

    Nodes are visited in order and ties go to the label held, then to the highest: a label that
    few hold yet does not leak over a bridge to nodes that come later. Equal graphs give equal
    communities.
    """
    beside: dict[int, Counter[int]] = defaultdict(Counter)
    for a, b in edges:
        if a != b:
            beside[a][b] += 1
            beside[b][a] += 1
    label = {node: node for node in sorted(beside)}
    for _ in range(rounds):
        moved = False
        for node in label:
            votes: Counter[int] = Counter()
            for other, weight in beside[node].items():
                votes[label[other]] += weight
            held = label[node]
            best = max(votes, key=lambda one: (votes[one], one == held, one))
            moved |= best != held
            label[node] = best
        if not moved:
            break
    return label


def rrf(orders: Sequence[Sequence[int]], c: float, k: int) -> Ranking:
    """Reciprocal rank fusion: the sum of 1 / (c + place) over the orders, places from 1."""
    total: dict[int, float] = defaultdict(float)
    for order in orders:
        for place, row in enumerate(order, 1):
            total[row] += 1 / (c + place)
    best = sorted(total, key=lambda row: (-total[row], row))[:k]
    return Ranking(best, [total[row] for row in best])
