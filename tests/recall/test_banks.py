"""One bank never sees another's, whatever is asked."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from memwise import Memory
from memwise.errors import InvalidKnob, StoreError, UnknownItem
from memwise.recall.interchange import export_bank


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.db"


def _bank(path: Path, name: str) -> Memory:
    ticks = itertools.count(1_700_000_000)
    return Memory(path, bank=name, embedder="none", clock=lambda: next(ticks))


@pytest.fixture
def ana(path: Path) -> Iterator[Memory]:
    with _bank(path, "ana") as memory:
        memory.add("I live in Lisbon.", actor="ana", session="s", meta={"ref": 7})
        yield memory


@pytest.fixture
def bo(path: Path, ana: Memory) -> Iterator[Memory]:
    with _bank(path, "bo") as memory:
        yield memory


def test_reading_sees_its_own_bank_alone(ana: Memory, bo: Memory) -> None:
    assert bo.search("Lisbon") == []
    assert bo.search("Lisbon", where={"ref": 7}) == []
    assert bo.context("Where does ana live?").text == ""
    assert bo.facts() == []
    assert bo.facts("ana") == []
    assert bo.timeline("ana") == []
    assert bo.stats() == {}
    bo.add("I live in Oslo.", actor="ana", session="s", meta={"ref": 7})
    assert [f.meta["object"] for f in bo.facts("ana")] == ["Oslo"]
    assert [f.meta["object"] for f in ana.facts("ana")] == ["Lisbon"]
    assert [h.text for h in bo.search("live", where={"ref": 7})] == ["I live in Oslo."]
    assert [t.text for t in bo.timeline("ana")] == ["ana lives in Oslo."]


def test_ids_of_another_bank_name_nothing_here(ana: Memory, bo: Memory) -> None:
    for call in (bo.get, bo.history, bo.delete, lambda id: bo.update(id, "mine")):
        with pytest.raises(UnknownItem, match="has no item 't1'"):
            call("t1")
    assert ana.get("t1").text == "I live in Lisbon."


def test_the_same_text_is_a_memory_of_each_bank(ana: Memory, bo: Memory) -> None:
    receipt = bo.add("I live in Lisbon.", actor="ana", session="s", meta={"ref": 7})
    assert receipt.added == 2
    bo.delete("t1")
    assert ana.search("Lisbon")
    assert ana.facts("ana")


def test_undo_and_forget_touch_their_own_bank_alone(ana: Memory, bo: Memory) -> None:
    with pytest.raises(StoreError, match="'bo' has nothing to undo"):
        bo.undo()
    bo.add("I live in Oslo.", actor="bo")
    operation = ana.add("I have a cat.", actor="ana").operation
    with pytest.raises(StoreError, match="no operation"):
        bo.undo(operation)
    bo.forget(before="2100-01-01")
    assert bo.stats() == {}
    assert ana.stats() == {"turn": 2, "fact": 2}
    bo.undo()
    assert bo.facts("bo")


def test_an_export_holds_its_own_bank_alone(ana: Memory, bo: Memory) -> None:
    bo.add("Nothing about that.")
    assert "Lisbon" not in "\n".join(export_bank(bo))


def test_scores_depend_on_the_own_bank_alone(path: Path, ana: Memory, bo: Memory) -> None:
    talk = ["The dog barks.", "The cat sleeps.", "A dog and a cat.", "Rain again."]
    bo.add(talk)
    before = [(h.text, h.score) for h in bo.search("dog cat rain")]
    ana.add([f"The dog number {i} barks at a cat." for i in range(200)])
    with _bank(path, "bo") as again:
        for memory in (bo, again):
            assert [(h.text, h.score) for h in memory.search("dog cat rain")] == before


@pytest.mark.parametrize("name", ["", "x" * 257, 7, None, "a\0b", "\ud800"])
def test_names_that_cannot_be_stored_are_refused(path: Path, name: object) -> None:
    with pytest.raises(InvalidKnob, match="name of 1 to 256 characters"):
        Memory(path, bank=name, embedder="none")  # type: ignore[arg-type]
    assert not path.exists()


@pytest.mark.parametrize("name", ["' OR 1=1 --", "naïve / bank", "a" * 256, "default; DROP"])
def test_any_other_name_is_only_a_name(path: Path, name: str) -> None:
    with _bank(path, name) as memory, _bank(path, "other") as other:
        memory.add("Mine.")
        assert memory.bank == name
        assert other.stats() == {}
