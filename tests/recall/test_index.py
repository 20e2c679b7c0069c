"""The RAM indexes against what they stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwise.recall.engine.index import Postings, Vectors


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.lists(st.integers(1, 30), max_size=12), min_size=1, max_size=90),
        min_size=1, max_size=5,
    )
)  # fmt: skip
def test_postings_hold_every_word_of_every_document(batches):
    postings = Postings()
    documents = []
    for batch in batches:
        postings.extend(np.array(d, np.uint32) for d in batch)
        documents += batch
    assert postings.lengths.view.tolist() == [len(d) for d in documents]
    for term in range(32):
        docs, counts = postings.find(term)
        found = dict(zip(docs.tolist(), counts.tolist(), strict=True))
        assert found == {i: d.count(term) for i, d in enumerate(documents) if term in d}


@pytest.fixture
def unit():
    x = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_coded_vectors_score_their_best_candidates_exactly(unit):
    vectors = Vectors(64, 1 << 12, lambda at: unit[at])
    vectors.extend(unit[:1000])
    vectors.extend(unit[1000:])
    exact = unit @ unit[5]
    got = vectors.scores(unit[5])
    best = np.argsort(-exact)[:5]
    assert np.argmax(got) == 5
    assert np.abs(got[best] - exact[best]).max() < 1e-5
    assert vectors.nbytes < unit.nbytes / 10


def test_few_vectors_are_scored_exactly(unit):
    vectors = Vectors(64, 1 << 20, lambda at: unit[at])
    vectors.extend(unit)
    assert np.allclose(vectors.scores(unit[7]), unit @ unit[7], atol=1e-6)
