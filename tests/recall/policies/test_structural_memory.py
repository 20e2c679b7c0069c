from collections.abc import Sequence
from dataclasses import replace

import pytest

from memwise import Memory
from memwise.errors import InvalidKnob
from memwise.recall.engine.policy import Step
from memwise.recall.engine.rank import Query, Ranking, Recipe
from memwise.recall.engine.records import Add, Item
from memwise.recall.engine.retrieve import iterate_with, ordered, pooled, rerank, spread, to_sources
from memwise.recall.policies.structural_memory import StructuralMemory

TOLD = [
    "Ana works at the harbour museum.",
    "The harbour museum was designed by Teodor Brandt.",
    "Teodor Brandt studied in Graz.",
    "Ana is fond of cold soup.",
    "Someone designed a garden in Lyon.",
]
ALL_WORDS = "Ana harbour museum Teodor Brandt Graz soup garden Lyon"
QUESTION = "Where did the designer of the place where Ana works study?"


def memory(policy: StructuralMemory) -> Memory:
    made = Memory(":memory:", policy=policy, embedder="none", clock=lambda: "2026-01-01")
    made.add([{"role": "user", "content": text, "session": "s"} for text in TOLD])
    made.reflect()
    return made


def texts(step: Step, ranking: Ranking) -> list[str]:
    items = step.get(ranking.rows)
    return [items[row].text for row in ranking.rows]


@pytest.mark.parametrize(
    "wrong",
    [
        {"structure": "tables"},
        {"retrieval": "twice"},
        {"answer": "both"},
        {"rounds": 0},
        {"candidates": 0},
    ],
)
def test_a_cell_that_is_not_in_the_grid_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidKnob, match=next(iter(wrong))):
        StructuralMemory(**wrong)  # type: ignore[arg-type]


def test_asking_again_follows_a_chain_that_one_query_loses() -> None:
    policy = StructuralMemory("chunks", "iterative", rounds=3)
    step = replace(memory(policy).view(), query=Query(QUESTION, k=3))
    last = "Teodor Brandt studied in Graz."
    assert last in texts(step, policy.rank(step))
    assert texts(step, replace(policy, retrieval="single").rank(step)).count(last) <= 1


def test_asking_again_with_the_same_query_finds_what_one_query_finds() -> None:
    policy = StructuralMemory("chunks")
    step = replace(memory(policy).view(), query=Query(QUESTION, k=5))
    again = iterate_with(step, policy.units, 4, 50, lambda asked, read: asked)
    assert again.rows == step.rank(policy.units).rows


def test_each_structure_ranks_its_own_kind() -> None:
    everything = StructuralMemory("mixed", "single")
    step = memory(everything).view()
    kinds = {
        "chunks": {"turn"},
        "facts": {"fact"},
        "triples": {"note"},
        "summaries": {"summary"},
    }
    for structure, wanted in kinds.items():
        policy = replace(everything, structure=structure)
        asked = replace(step, query=Query(ALL_WORDS, k=20))
        found = step.get(policy.rank(asked).rows).values()
        assert {item.kind for item in found} == wanted


@pytest.mark.parametrize("structure", ["chunks", "triples", "facts", "summaries", "mixed"])
def test_document_mode_returns_sources_alone(structure: str) -> None:
    policy = StructuralMemory(structure, "single", "document")  # type: ignore[arg-type]
    hits = memory(policy).search(ALL_WORDS, k=3)
    assert hits
    assert {hit.kind for hit in hits} == {"turn"}


def test_a_unit_that_rests_on_no_source_does_not_enter_document_mode() -> None:
    policy = StructuralMemory("facts", "single", "document")
    made = memory(policy)
    step = made.view()
    facts = step.scan("fact")
    everything = Ranking([fact.row for fact in facts], [1.0] * len(facts))
    before = to_sources(step, everything, 10)
    step.store.db.execute("DELETE FROM links WHERE src = ?", (facts[0].row,))
    after = to_sources(memory_again(made), everything, 10)
    assert len(after.rows) < len(before.rows)


def memory_again(made: Memory) -> Step:
    """The bank with an index that has to read its links anew."""
    step = made.view()
    step.index._origins.clear()
    return step


def test_a_derived_unit_without_a_source_is_refused() -> None:
    made = memory(StructuralMemory())
    step = made.view()
    with pytest.raises(InvalidKnob, match="must rest on a source"):
        step.store.apply(step.bank, [Add("fact", "from nowhere")], at=0, verb="test", codes={})


def test_pooling_adds_shares_of_each_best() -> None:
    both = pooled([Ranking([1, 2], [4.0, 2.0]), Ranking([2, 3], [10.0, 5.0])], 3)
    assert (both.rows, both.scores) == ([2, 1, 3], [1.5, 1.0, 0.5])


def test_ties_go_to_the_older_row() -> None:
    assert ordered({7: 1.0, 3: 1.0, 5: 2.0}, 3, "x").rows == [5, 3, 7]


def test_a_scorer_reorders_candidates_and_keeps_the_best() -> None:
    step = memory(StructuralMemory("chunks")).view()
    found = step.rank(Recipe.words(), Query("harbour museum Ana", k=5))

    def shortest(question: str, items: Sequence[Item]) -> list[float]:
        return [-float(len(item.text)) for item in items]

    best = rerank(step, found, 2, shortest)
    assert texts(step, best) == sorted(texts(step, found), key=len)[:2]


def test_spreading_lifts_linked_rows_and_nothing_else() -> None:
    made = memory(StructuralMemory("facts"))
    step = made.view()
    links = step.links(step.scan("fact")[:1], "derived_from")
    link = links[0]
    found = Ranking([link.src, 99_999, link.dst], [1.0, 0.9, 0.8])
    assert spread(found, links, 1, 0.5, 3).rows == [link.dst, link.src, 99_999]
    assert spread(found, [], 1, 0.5, 3).rows == found.rows
