"""The ranking against a plain loop in float64, and the filters inside it."""

import math
from collections import Counter

import numpy as np
import pytest

from memwise import Memory
from memwise.recall.engine import rank as engine
from memwise.recall.engine.text import terms, topic_terms

TALK = [
    ("ana", "s1", "2026-05-01", "Did you ever try the new bakery in Alfama?"),
    ("rui", "s1", "2026-05-01", "Yes, I bought custard tarts there."),
    ("ana", "s1", "2026-05-01", "I prefer bread, honestly."),
    ("ana", "s2", "2026-06-10", "My bicycle was stolen near the bakery."),
    ("rui", "s2", "2026-06-10", "Oh no! When did that happen?"),
    ("ana", "s2", "2026-06-10", "Yesterday evening, while I was buying bread."),
    ("rui", "s3", "2026-07-04", "The museum opens a new room on 12 July."),
    ("ana", "", "2026-07-05", "A note without a session about tarts."),
]
QUESTIONS = [
    "What did Rui buy at the bakery?",
    "When was the bicycle stolen?",
    "What happened in June 2026?",
    "bread",
    "Which room opens?",
]


class Vectors:
    """Unit vectors that follow from the text alone."""

    dim, fingerprint = 8, "test/8"

    def encode(self, texts, role="passage"):
        out = np.array([[math.sin((i + 1) * sum(t.encode())) for i in range(8)] for t in texts])
        return (out / np.linalg.norm(out, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def memory():
    with Memory(":memory:", embedder=Vectors()) as memory:
        for actor, session, at, text in TALK:
            memory.add(text, actor=actor, session=session, at=at)
        yield memory


def naive(memory: Memory, question: str, recipe: engine.Recipe) -> dict[int, float]:
    """Every feature by its definition, one item and one word at a time."""
    n = len(TALK)
    step = memory.view()
    shelf = step.index.sources
    texts = [text for *_, text in TALK]
    counts = [Counter(terms(text)) for text in texts]
    lengths = [sum(c.values()) for c in counts]
    names = {t for actor in ("ana", "rui") for t in terms(actor)}
    asked = [t for t in dict.fromkeys(terms(question)) if t not in names]
    topic = [t for t in asked if t in topic_terms(question)] or asked

    def idf(t):
        df = sum(t in c for c in counts)
        return math.log(1 + (n - df + 0.5) / (df + 0.5)) if df else 0.0

    def bm25(of, length, mean, words):
        norm = engine.K1 * (1 - engine.B + engine.B * length / mean)
        return sum(idf(t) * (engine.K1 + 1) * of(t) / (of(t) + norm) for t in words if of(t))

    mean = sum(lengths) / n
    own = [bm25(c.__getitem__, w, mean, asked) for c, w in zip(counts, lengths, strict=True)]
    own = [value / (max(own) + 1e-9) for value in own]
    cosine = (shelf.vectors.scores(step.encode([question])[0])).astype(np.float64)
    unit = (cosine - cosine.min()) / (cosine.max() - cosine.min())
    z = [a + b for a, b in zip(own, unit, strict=True)]

    def near(i, by):
        j = i
        for _ in range(abs(by)):
            j += 1 if by > 0 else -1
            if not (0 <= j < n and TALK[j][1] and TALK[j][1] == TALK[i][1]):
                return None
        return j

    shares = dict(zip((-1, -2, 1, 2), (float(s) for s in engine.SHARES), strict=True))
    around = [[(w, near(i, by)) for by, w in shares.items()] for i in range(n)]

    def wide(values, i):
        return values[i] + sum(w * values[j] for w, j in around[i] if j is not None)

    mean_width = sum(wide(lengths, i) for i in range(n)) / n
    window = [
        bm25(lambda t, i=i: wide([c[t] for c in counts], i), wide(lengths, i), mean_width, topic)
        for i in range(n)
    ]
    window = [value / (max(window) + 1e-9) for value in window]
    found = set(engine._NAME.findall(question.lower()))
    who = [a for a in ("ana", "rui") if a in found]
    out = {}
    for i, (actor, session, _, text) in enumerate(TALK):
        same = [z[j] for j in range(n) if j == i or (session and TALK[j][1] == session)]
        before = near(i, -1)
        score = recipe.own * own[i] + recipe.window * window[i]
        score += recipe.dense * (cosine[i] - cosine.mean()) / cosine.std()
        score += recipe.session * max(same) / 2 + recipe.spoken * (who == [actor])
        score += recipe.asks * ("?" in text)
        if before is not None and "?" in TALK[before][3]:
            score += recipe.reply * z[before]
        if "June 2026" in question:
            score += recipe.dated * (TALK[i][2][:7] == "2026-06")
        out[int(shelf.rows[i])] = score
    return out


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_ranking_is_that_of_a_plain_loop(memory, question):
    recipe = engine.Recipe()
    step = memory.view()
    ranking = step.rank(recipe, engine.Query(question, k=len(TALK)))
    wanted = naive(memory, question, recipe)
    got = dict(zip(ranking.rows, ranking.scores, strict=True))
    assert got.keys() == wanted.keys()
    assert max(abs(got[row] - wanted[row]) for row in got) < 2e-3
    assert ranking.scores == sorted(ranking.scores, reverse=True)


def test_the_parts_of_a_score_add_up_to_it(memory):
    for hit in memory.search("What did Rui buy at the bakery?"):
        assert sum(hit.why.values()) == pytest.approx(hit.score, abs=1e-3)


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({"actor": "rui"}, {1, 4, 6}),
        ({"session": "s2"}, {3, 4, 5}),
        ({"since": "2026-07-01"}, {6, 7}),
        ({"until": "2026-05-02"}, {0, 1, 2}),
        ({"actor": "rui", "session": "s2"}, {4}),
        ({"actor": "nobody"}, set()),
    ],
)
def test_filters_apply_inside_the_search(memory, filters, wanted):
    hits = memory.search("bread", k=len(wanted) or 1, kinds=["turn"], **filters)
    assert {hit.text for hit in hits} == {TALK[i][3] for i in wanted}


def test_an_unknown_word_finds_nothing_without_vectors():
    with Memory(":memory:", embedder="none") as memory:
        memory.add("I like tea.")
        assert memory.search("quasar") == []
        assert len(memory.search("tea")) == 1


def test_a_question_is_answered_by_its_neighbour(memory):
    first = memory.search("Who tried the new bakery in Alfama?", k=2)
    assert {hit.text for hit in first} == {TALK[0][3], TALK[1][3]}


@pytest.mark.parametrize(
    ("told", "asked"),
    [
        ("日本語のテキストを書いた", "日本語"),
        ("우리는 서울에서 만났다", "서울"),
        ("ฉันชอบกาแฟมาก", "กาแฟ"),
        ("我昨天去了图书馆", "图书馆在哪里"),
    ],
)
def test_scripts_without_spaces_are_found_by_parts_of_their_words(told, asked):
    with Memory(":memory:", embedder="none") as memory:
        memory.add(["Nothing of that kind.", told])
        assert [hit.text for hit in memory.search(asked, k=1)] == [told]
