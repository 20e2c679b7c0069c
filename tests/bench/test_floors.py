import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from memwise.bench import data as sets
from memwise.bench import evidence, floors
from memwise.bench.data import Conversation, Question, Turn
from memwise.errors import InvalidKnob

LINES = [
    ("s1", "Ana", "Ana: I moved to Lisbon last May."),
    ("s1", "Bo", "Bo: Lisbon is sunny, is it?"),
    ("s1", "Ana", "Ana: Very. I started painting boats."),
    ("s2", "Bo", "Bo: My dog ate the boat I painted."),
    ("s2", "Ana", "Ana: Poor dog."),
]
TURNS = [Turn(f"t{i}", text, i, who, session) for i, (session, who, text) in enumerate(LINES)]
ASK = Question("What did Ana paint?", frozenset({"t2"}), "what")
TALK = Conversation("talk", TURNS, [ASK])


def letters(texts: Sequence[str]) -> NDArray[np.float32]:
    """An encoder without a model: how often each letter stands in a text, on the unit sphere."""
    counts = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts])
    return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


def signals(question: Question = ASK) -> floors.Signals:
    bank = floors._bank(TALK, letters)
    return floors.Signals(question, bank, letters([question.text])[0], seed=0)


def test_bm25_equals_the_formula_written_as_a_loop() -> None:
    docs = [Counter(floors.terms(turn.text)) for turn in TURNS]
    average = sum(doc.total() for doc in docs) / len(docs)
    expected = []
    for doc in docs:
        score = 0.0
        for term in set(floors.terms(ASK.text)):
            df = sum(term in other for other in docs)
            idf = math.log(1 + (len(docs) - df + 0.5) / (df + 0.5))
            norm = 1.2 * (1 - 0.75 + 0.75 * doc.total() / average)
            score += idf * doc[term] * 2.2 / (doc[term] + norm)
        expected.append(score)
    np.testing.assert_allclose(signals().lexical, expected, rtol=1e-12)


def test_words_nobody_said_score_nothing() -> None:
    assert not signals(Question("Zanzibar?", frozenset(), "what")).lexical.any()


def test_neighbours_lend_their_score_within_a_session_only() -> None:
    s = signals()
    smooth = floors.RECIPES["smooth"](s)
    assert smooth[2] == pytest.approx(s.z[2] + 0.35 * s.z[1])
    assert smooth[3] == pytest.approx(s.z[3] + 0.35 * s.z[4])
    bonus = floors.RECIPES["speaker"](s) - smooth
    np.testing.assert_allclose(bonus, [0.2, 0, 0.2, 0, 0.2])


def test_rank_fusion_adds_reciprocal_ranks() -> None:
    s = signals()
    ranks = [np.argsort(np.argsort(-scores, kind="stable")) for scores in (s.lexical, s.dense)]
    expected = sum(1 / (1 + rank) for rank in ranks)
    np.testing.assert_allclose(floors.RECIPES["rrf1"](s), expected)


@pytest.mark.parametrize("recipe", floors.RECIPES)
def test_every_recipe_ranks_all_turns_and_repeats_itself(recipe: str) -> None:
    first, second = (floors.floor(recipe, letters)(TALK)(ASK) for _ in range(2))
    assert first == second
    assert sorted(first) == [turn.ref for turn in TURNS]


def test_the_controls_are_what_their_names_say() -> None:
    assert floors.floor("oracle")(TALK)(ASK)[0] == "t2"
    assert floors.floor("most_recent")(TALK)(ASK)[0] == "t4"
    drawn = {tuple(floors.floor("random", seed=seed)(TALK)(ASK)) for seed in range(20)}
    assert len(drawn) > 10


def test_a_recipe_of_meaning_needs_an_encoder() -> None:
    with pytest.raises(InvalidKnob, match="encode="):
        floors.floor("z")(TALK)(ASK)
    with pytest.raises(InvalidKnob, match="no recipe"):
        floors.floor("magic")


@pytest.mark.data
def test_bm25_reaches_what_the_peers_measured(data: Path) -> None:
    table = evidence.evaluate(floors.floor("bm25"), sets.locomo(data))
    means = evidence.means(table)["all"]
    assert len(table) == 1345
    assert means["R@10"] == pytest.approx(0.613, abs=0.001)
    assert means["@500 tok"] == pytest.approx(0.637, abs=0.001)
