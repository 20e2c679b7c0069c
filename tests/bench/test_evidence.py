from collections.abc import Sequence

import numpy as np
import pytest

from memwise.bench import evidence
from memwise.bench.data import Conversation, Question, Turn
from memwise.bench.evidence import Part, all_at, expand, pack_recall, recall_at, within_tokens
from memwise.errors import InvalidKnob

TEXTS = {"t1": "Ana: I moved to Lisbon.", "t2": "Bo: Nice!", "t3": "Ana: In May."}


def conversation(name: str = "c", **about: object) -> Conversation:
    turns = [
        Turn(ref, text, i, text.split(":")[0], "s1") for i, (ref, text) in enumerate(TEXTS.items())
    ]
    question = Question(
        **{"text": "Where?", "gold": frozenset({"t1", "t3"}), "category": "place", **about}
    )
    return Conversation(name, turns, [question, Question("Why?", frozenset(), "none")])


def test_recall_counts_distinct_turns_in_order() -> None:
    ranked = ["t1", "t1", "t2", "t3"]
    assert recall_at(ranked, {"t1", "t3"}, 1) == 0.5
    assert recall_at(ranked, {"t1", "t3"}, 2) == 0.5
    assert recall_at(ranked, {"t1", "t3"}, 3) == 1.0
    assert all_at(ranked, {"t1", "t3"}, 2) == 0.0
    assert all_at(ranked, {"t1", "t3"}, 3) == 1.0


def test_one_hit_that_cites_everything_uses_up_the_places() -> None:
    ranked = expand([[f"x{i}" for i in range(10)], ["t1"]])
    assert recall_at(ranked, {"t1"}, 10) == 0.0


def test_hits_expand_to_their_sources_without_repeating() -> None:
    assert expand([["a", "b"], ["b"], ["c", "a"]]) == ["a", "b", "c"]


def test_recall_of_no_evidence_is_refused() -> None:
    with pytest.raises(InvalidKnob):
        recall_at(["t1"], set(), 1)


def test_tokens_cut_at_the_first_part_that_does_not_fit() -> None:
    parts = [("x" * 40, ["a"]), ("x" * 41, ["b"]), ("x", ["c"])]
    assert within_tokens(parts, {"a", "b", "c"}, 10) == pytest.approx(1 / 3)
    assert within_tokens(parts, {"a"}, 9) == 0.0
    assert within_tokens(parts, {"a", "b"}, 21) == 1.0


def test_a_packed_turn_counts_through_its_own_words() -> None:
    whole = Part("[2 May] Ana: I  moved to\nLisbon.", "turn", ("t1",))
    cut = Part("Ana: I moved to", "turn", ("t1",))
    assert pack_recall([whole], {"t1"}, TEXTS) == 1.0
    assert pack_recall([cut], {"t1"}, TEXTS) == 0.0


def test_a_packed_chunk_counts_for_each_turn_it_shows() -> None:
    chunk = Part(f"{TEXTS['t1']}\n{TEXTS['t2']}", "chunk", ("t1", "t2", "t3"))
    assert pack_recall([chunk], {"t1", "t3"}, TEXTS) == 0.5


def test_a_packed_fact_counts_with_two_sources_and_not_with_three() -> None:
    assert pack_recall([Part("Ana lives in Lisbon.", "fact", ("t1", "t3"))], {"t1"}, TEXTS) == 1.0
    assert pack_recall([Part("All is well.", "fact", ("t1", "t2", "t3"))], {"t1"}, TEXTS) == 0.0


def test_a_summary_that_cites_a_turn_does_not_show_it() -> None:
    assert pack_recall([Part("Ana talked.", "summary", ("t1",))], {"t1"}, TEXTS) == 0.0


def test_what_a_pack_holds_beyond_its_tokens_does_not_count() -> None:
    parts = [Part("x" * 40, "turn", ()), Part("Lisbon", "fact", ("t1",))]
    assert pack_recall(parts, {"t1"}, TEXTS, tokens=11) == 0.0
    assert pack_recall(parts, {"t1"}, TEXTS, tokens=12) == 1.0


def test_a_table_has_one_record_a_question_with_evidence() -> None:
    def build(one: Conversation) -> evidence.Search:
        return lambda question: ["t2", "t1", "t3"]

    table = evidence.evaluate(build, [conversation("conv-26"), conversation("other")])
    assert table["conversation"].tolist() == ["conv-26", "other"]
    assert table["tuned"].tolist() == [True, False]
    assert table["R@1"].tolist() == [0.0, 0.0]
    assert table["R@5"].tolist() == [1.0, 1.0]
    assert table["all@250 tok"].tolist() == [1.0, 1.0]
    means = evidence.means(table)
    assert set(means) == {"all", "place", "tuned", "untouched"}
    assert means["place"]["R@10"] == 1.0


def test_the_audited_evidence_is_a_switch() -> None:
    audited = conversation(audited_wrong=True, audited_gold=frozenset({"t2"}))

    def build(one: Conversation) -> evidence.Search:
        return lambda question: ["t2"]

    assert evidence.evaluate(build, [audited])["R@1"].tolist() == [0.0]
    assert evidence.evaluate(build, [audited], audited=True)["R@1"].tolist() == [1.0]
    emptied = conversation(audited_wrong=True, audited_gold=frozenset())
    assert len(evidence.evaluate(build, [emptied], audited=True)) == 0


def test_any_of_several_sets_of_evidence_is_enough() -> None:
    either = conversation(alternatives=(frozenset({"t2"}),))
    table = evidence.evaluate(lambda one: lambda question: ["t2"], [either])
    assert table["R@1"].tolist() == [1.0]


def test_a_search_that_invents_refs_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="never told"):
        evidence.evaluate(lambda one: lambda question: ["t9"], [conversation()])


def test_packs_are_judged_at_each_token_budget() -> None:
    def pack(question: Question, tokens: int) -> Sequence[Part]:
        parts = [Part(TEXTS["t1"], "turn", ("t1",)), Part("x" * 1000, "turn", ())]
        return [*parts, Part(TEXTS["t3"], "turn", ("t3",))][: 1 if tokens == 250 else 3]

    (record,) = evidence.evaluate_packs(lambda one: pack, [conversation()])
    assert record["pack@250"] == 0.5
    assert record["pack all@250"] == 0.0
    assert record["pack all@500"] == 1.0
    assert record["tokens@250"] == len(TEXTS["t1"]) / 4


def test_a_paired_row_comes_from_the_same_questions() -> None:
    cases = [conversation(f"c{i}") for i in range(6)]
    good = evidence.evaluate(lambda one: lambda question: ["t1", "t3"], cases)
    poor = evidence.evaluate(lambda one: lambda question: ["t1"], cases)
    row = evidence.paired_row("R@10", good, poor, seed=0, controls={"poor": poor})
    assert (row.value, row.baseline, row.n) == (1.0, 0.5, 6)
    assert row.interval == (0.5, 0.5)
    assert row.controls == {"poor": 0.5}
    half = evidence.paired_row("R@10", good, poor, 0, where=np.arange(6) < 3)
    assert half.n == 3
    with pytest.raises(InvalidKnob, match="not the questions"):
        evidence.paired_row("R@10", good, poor[:3], seed=0)
    with pytest.raises(InvalidKnob, match="not the questions"):
        evidence.paired_row("R@10", good, poor[::-1], seed=0)
