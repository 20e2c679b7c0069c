import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memwise import Memory
from memwise.recall.engine.text import words
from memwise.recall.policies.a_mem import AMem

TOLD = [
    "Mira planted tomatoes in the courtyard garden.",
    "Mira bought a new lamp.",
    "Mira watered the tomatoes in the garden at noon.",
    "Jon repaired the lamp in the kitchen.",
    "The garden tomatoes ripened and Mira cooked a sauce.",
]


class Bags:
    """Words hashed into a vector: similar where words are shared."""

    dim = 64
    fingerprint = "bags/64"

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        out = np.zeros((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            for word in words(text):
                out[i, zlib.crc32(word.encode()) % self.dim] += 1
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)


def memory(policy: AMem | None = None) -> Memory:
    return Memory(":memory:", policy=policy or AMem(), embedder=Bags(), clock=lambda: "2026-01-01")


def links(made: Memory) -> set[tuple[str, str]]:
    """Pairs of contents whose live notes are linked."""
    step = made.view()
    notes = step.scan("note")
    source = {row: origins[0] for row, origins in step.sources(notes).items()}
    turns = step.get(source.values())
    pairs = [(link.src, link.dst) for link in step.links(notes, "similar")]
    return {
        (turns[source[a]].text, turns[source[b]].text)
        for a, b in pairs
        if a in source and b in source
    }


def test_notes_that_share_words_are_linked_and_others_are_not() -> None:
    made = memory()
    for text in TOLD:
        made.add(text, actor="Mira")
    found = links(made)
    assert (TOLD[2], TOLD[0]) in found
    assert not any({TOLD[1], TOLD[2]} == set(pair) for pair in found)


def test_a_linked_note_learns_tags_and_keeps_its_content_and_time() -> None:
    made = memory()
    first = made.add(TOLD[0], actor="Mira", at="2025-05-01")
    before = made.view().scan("note")[0]
    receipt = made.add(TOLD[2], actor="Mira", at="2025-06-01")
    assert receipt.expired == (before.id,)
    after = next(n for n in made.view().scan("note") if TOLD[0] in n.text)
    assert "tomatoes" in after.data["tags"]
    assert after.at == before.at
    assert made.get(first.ids[0]).text == TOLD[0]


def test_an_evolved_note_keeps_its_links() -> None:
    made = memory()
    for text in (TOLD[0], TOLD[2], TOLD[4]):
        made.add(text, actor="Mira")
    assert (TOLD[2], TOLD[0]) in links(made)


def test_turns_that_come_together_are_linked_as_those_that_come_one_by_one() -> None:
    together, single = memory(), memory()
    together.add([{"role": "user", "actor": "Mira", "content": text} for text in TOLD])
    for text in TOLD:
        single.add(text, actor="Mira")
    assert links(together) == links(single)


def test_only_retrieved_neighbours_are_edited() -> None:
    made = memory(AMem(neighbours=1))
    for text in TOLD[:4]:
        made.add(text, actor="Mira")
    receipt = made.add(TOLD[4], actor="Mira")
    assert len(receipt.expired) <= 1


def test_a_pack_holds_turns_in_their_own_words() -> None:
    made = memory()
    for text in TOLD:
        made.add(text, actor="Mira")
    packed = made.context("What about the tomatoes in the garden?", tokens=60)
    assert {part.kind for part in packed.parts} == {"turn"}
    assert "keywords:" not in packed.text
    assert packed.tokens <= 60


def test_without_vectors_nothing_is_linked_and_notes_are_still_found() -> None:
    made = Memory(":memory:", policy=AMem(), embedder="none", clock=lambda: "2026-01-01")
    for text in TOLD:
        made.add(text, actor="Mira")
    assert links(made) == set()
    assert made.search("tomatoes", k=2)
