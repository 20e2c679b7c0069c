"""Thoughts in buckets: what a query is compared with, what becomes one, and what goes."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from memwise.errors import InvalidKnob
from memwise.recall.engine.lsh import Buckets, CrossPolytope
from memwise.recall.memory import Memory
from memwise.recall.policies.think_in_memory import ThinkInMemory

TALK = (
    "I like tea.", "I like figs.", "I live in Porto.", "I play the cello.", "Rosa studies law.",
    "Rosa likes chess.", "I adopted a parrot.", "Kiwi is a green parrot.",
)  # fmt: skip


class Bags:
    """Sums of one random vector a word."""

    dim = 32
    fingerprint = "bags of words"

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        rows = [sum((self._word(w) for w in text.lower().split()), np.zeros(32)) for text in texts]
        out = np.array(rows, np.float32).reshape(len(texts), 32)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)

    def _word(self, word: str) -> NDArray[np.float64]:
        return np.random.default_rng([*word.strip(".?").encode()]).standard_normal(32)


class Same(Bags):
    """One vector for all, so that everything lies in one bucket."""

    def _word(self, word: str) -> NDArray[np.float64]:
        return np.arange(1.0, 33.0)


def told(policy: ThinkInMemory, *texts: str, end: bool = True, encode: type[Bags] = Bags) -> Memory:
    memory = Memory(":memory:", policy=policy, embedder=encode(), clock=lambda: "2026-01-01")
    for n, text in enumerate(texts):
        memory.add(text, actor="Ana", session="s1", at=f"2026-01-01T10:{n:02d}")
    if end:
        memory.reflect()
    return memory


def thoughts(memory: Memory) -> list[str]:
    return [item.text for item in memory.view().scan("thought")]


def test_near_vectors_share_a_bucket_more_often() -> None:
    rng = np.random.default_rng(0)
    hashing = CrossPolytope(24, 16)
    axes = hashing.axes()
    a, noise = (rng.standard_normal((3000, 24)).astype(np.float32) for _ in range(2))
    mine = hashing.closeness(a, axes).argmax(axis=1)
    shared = [
        float((hashing.closeness(a + far * noise, axes).argmax(axis=1) == mine).mean())
        for far in (0.0, 0.2, 0.5, 1.0, 3.0)
    ]
    assert shared[0] == 1
    assert shared == sorted(shared, reverse=True)
    assert shared[-1] < 0.3


def test_every_row_lies_in_one_bucket_and_vectors_are_read_once() -> None:
    read: list[int] = []

    def vectors(rows: Sequence[int]) -> NDArray[np.float32]:
        read.extend(rows)
        return np.random.default_rng(7).standard_normal((len(rows), 8)).astype(np.float32)

    table = Buckets(CrossPolytope(8, 4))
    table.follow(np.arange(10), vectors)
    table.follow(np.arange(15), vectors)
    assert sorted(row for bucket in range(4) for row in table.rows(bucket)) == [*range(15)]
    assert read == [*range(15)]
    assert sum(map(len, table.probed(np.ones(8, np.float32)))) == 15


def test_a_query_is_compared_with_its_bucket_alone() -> None:
    memory = told(ThinkInMemory(probes=1, buckets=8), *TALK, end=False)
    n = len(thoughts(memory))
    hit = memory.search("Ana likes tea.", k=1)[0]
    assert hit.text == "Ana likes tea."
    assert hit.why["compared"] < n
    flat = told(ThinkInMemory(probes=8, buckets=8), *TALK, end=False)
    assert flat.search("Ana likes tea", k=1)[0].why["compared"] == n


def test_as_many_come_back_as_there_are_even_from_small_buckets() -> None:
    memory = told(ThinkInMemory(probes=1), *TALK, end=False)
    assert len(memory.search("tea", k=50)) == len(thoughts(memory))


def test_thoughts_of_one_bucket_and_head_become_one_sentence() -> None:
    memory = told(ThinkInMemory(), "I like tea.", "I like figs.", "Rosa likes chess.", encode=Same)
    assert "Ana likes tea and figs." in thoughts(memory)
    assert "Rosa likes chess." in thoughts(memory)
    (merged,) = (h for h in memory.search("Ana likes figs", k=3) if "figs" in h.text)
    assert [source.text for source in merged.sources] == ["I like tea.", "I like figs."]


def test_a_merged_thought_stays_short() -> None:
    memory = told(ThinkInMemory(merged_tokens=1), "I like tea.", "I like figs.", encode=Same)
    assert thoughts(memory) == ["Ana likes tea.", "Ana likes figs."]


def test_a_contradicted_thought_is_let_go() -> None:
    memory = told(ThinkInMemory(), "I live in Porto.", "I live in Lisbon.", encode=Same)
    assert thoughts(memory) == ["Ana lives in Lisbon."]


def test_deleting_a_turn_deletes_what_rests_on_it_alone() -> None:
    memory = told(ThinkInMemory(), *TALK[:4], end=False)
    (turn,) = memory.search("I like tea", kinds=("turn",), k=1)
    memory.delete(turn.id)
    assert "Ana likes tea." not in thoughts(memory)
    assert "Ana likes figs." in thoughts(memory)
    assert all("tea" not in hit.text for hit in memory.search("tea", k=10))


def test_without_vectors_words_find_the_thoughts() -> None:
    memory = Memory(":memory:", policy=ThinkInMemory(), embedder="none", clock=lambda: "2026-01-01")
    memory.add([*TALK], actor="Ana", session="s1")
    memory.reflect()
    assert memory.search("cello", k=1)[0].text == "Ana plays the cello."


def test_without_thoughts_turns_are_found() -> None:
    memory = told(ThinkInMemory(), "Hello!")
    assert [hit.kind for hit in memory.search("Hello", k=1)] == ["turn"]


def test_impossible_numbers_of_buckets_are_refused() -> None:
    with pytest.raises(InvalidKnob, match="buckets=5"):
        ThinkInMemory(buckets=5)
    with pytest.raises(InvalidKnob, match="probes=17"):
        ThinkInMemory(probes=17)
