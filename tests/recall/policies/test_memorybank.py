"""Forgetting along the curve: what recall does to an item, and what that does to its fate."""

from dataclasses import replace

import pytest

from memwise.recall.engine.records import Item
from memwise.recall.memory import Memory
from memwise.recall.policies.lfu import Lfu
from memwise.recall.policies.lru import Lru
from memwise.recall.policies.memorybank import MemoryBank
from memwise.recall.policies.random_eviction import RandomEviction
from memwise.recall.policies.reversed_retention import ReversedRetention

DAY = 86_400_000_000
TURN = Item(1, "turn", "Ana keeps bees.", "ana", "s1", 0, 0)


def worth(policy: MemoryBank | ReversedRetention, item: Item, days: int) -> float:
    return policy.retention([item], days * DAY)[0]


def test_a_stronger_memory_fades_more_slowly() -> None:
    stronger = replace(TURN, strength=3.0)
    for days in (1, 10, 1000):
        assert worth(MemoryBank(), stronger, days) > worth(MemoryBank(), TURN, days)
        assert worth(ReversedRetention(), stronger, days) < worth(ReversedRetention(), TURN, days)


def test_retention_falls_with_the_days_since_the_last_recall() -> None:
    assert worth(MemoryBank(), TURN, 1) > worth(MemoryBank(), TURN, 2)
    assert worth(MemoryBank(), TURN, 4000) > worth(MemoryBank(), TURN, 4001)
    recalled = replace(TURN, last_use=3 * DAY)
    assert worth(MemoryBank(), recalled, 4) > worth(MemoryBank(), TURN, 4)


def test_a_search_strengthens_its_first_hits_alone() -> None:
    with talk(MemoryBank(strengthened=1)) as memory:
        first = memory.search("bees", k=2)[0]
        uses = {item.id: (item.uses, item.strength) for item in memory.view().scan("turn")}
    assert uses.pop(first.id) == (1, 2.0)
    assert set(uses.values()) == {(0, 1.0)}


@pytest.mark.parametrize("policy", [MemoryBank(), Lru(), Lfu()])
def test_a_recall_changes_what_is_forgotten_later(policy: MemoryBank | Lru | Lfu) -> None:
    with talk(policy) as memory:
        before = lowest(memory)
        memory.search("bees", k=1)
        assert lowest(memory) != before


def test_a_session_leaves_one_summary_that_rests_on_its_turns() -> None:
    with talk(MemoryBank()) as memory:
        memory.reflect()
        memory.reflect()
        (summary,) = memory.search("honey", kinds=("summary",))
        assert len(summary.sources) == 3
        assert "summary" in memory.context("bees", tokens=300).forms


def test_the_lottery_is_drawn_once_for_each_item() -> None:
    items = [replace(TURN, row=row) for row in range(40)]
    lots = RandomEviction().retention(items, 0)
    assert lots == RandomEviction().retention(items, DAY)
    assert lots != RandomEviction(seed=1).retention(items, 0)
    assert lots != sorted(lots)


def talk(policy: MemoryBank | Lru | Lfu) -> Memory:
    """Three turns of a day, looked at two days later."""
    now = ["2026-01-01T10:00"]
    memory = Memory(":memory:", policy=policy, embedder="none", clock=lambda: now[0])
    for text in ("I keep bees on the roof.", "Rain is coming.", "My brother sells honey."):
        memory.add(text, actor="Ana", session="s1")
    now[0] = "2026-01-03T10:00"
    return memory


def lowest(memory: Memory) -> int:
    view = memory.view()
    items = view.scan("turn")
    worth = memory.policy.retention(items, view.now)
    return min(zip(worth, (item.row for item in items), strict=True))[1]


def test_the_summary_of_a_session_that_went_on_rests_on_all_of_its_turns() -> None:
    with Memory(":memory:", policy=MemoryBank(summary_ratio=1.0), embedder="none") as memory:
        memory.add("Ana keeps bees on the roof.", actor="Ana", session="a", at="2026-01-01")
        memory.reflect()
        memory.add("Rita bakes rye bread.", actor="Ana", session="a", at="2026-01-02")
        memory.reflect()
        (summary,) = memory.view().scan("summary")
        assert "bees" in summary.text
        assert "bread" in summary.text
        assert len(memory.view().sources([summary])[summary.row]) == 2
