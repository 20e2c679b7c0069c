"""Undo and delete: what was done can be taken back, what is deleted leaves no bytes."""

import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from memwise import Memory
from memwise.errors import InvalidKnob, StoreError, StoreLocked, UnknownItem
from memwise.recall.engine.records import Add
from memwise.recall.interchange import export_bank

SECRET = "xylophone-mendacious-7391"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    ticks = itertools.count(1_700_000_000)
    with Memory(tmp_path / "m.db", embedder="none", clock=lambda: next(ticks)) as opened:
        yield opened


def _texts(memory: Memory) -> list[str]:
    return [item.text for item in memory.view().scan()]


def _bytes_on_disk(memory: Memory) -> bytes:
    files = [Path(memory.path + suffix) for suffix in ("", "-wal", "-shm")]
    return b"".join(file.read_bytes() for file in files if file.exists())


def test_undo_takes_back_the_last_call_and_then_the_one_before(memory: Memory) -> None:
    memory.add("I live in Lisbon.", actor="ana")
    memory.add("I have a dog.", actor="ana")
    assert memory.undo() == "add"
    assert "I have a dog." not in _texts(memory)
    assert memory.undo() == "add"
    assert _texts(memory) == []
    with pytest.raises(StoreError, match="nothing to undo"):
        memory.undo()


def test_undo_of_a_given_operation_leaves_independent_later_ones(memory: Memory) -> None:
    first = memory.add("I live in Lisbon.", actor="ana")
    memory.add("The train was late.", actor="bo")
    memory.undo(first.operation)
    assert _texts(memory) == ["The train was late."]
    with pytest.raises(StoreError, match="no operation"):
        memory.undo(first.operation)


def test_undo_takes_back_derived_items_and_brings_back_what_was_let_go(memory: Memory) -> None:
    before = list(export_bank(memory))[1:]
    memory.add("I live in Lisbon.", actor="ana")
    assert memory.facts("ana")
    told = list(export_bank(memory))[1:]
    memory.update("t1", "I live in Porto.")
    assert [f.meta["object"] for f in memory.facts("ana")] == ["Porto"]
    memory.undo()
    assert list(export_bank(memory))[1:] == told
    memory.undo()
    assert list(export_bank(memory))[1:] == before


def test_a_call_over_several_sessions_is_one_operation(memory: Memory) -> None:
    memory.add("Kept.")
    calls = [{"role": "user", "content": f"Hello {s}.", "session": s} for s in "abcab"]
    receipt = memory.add(calls)
    assert len(receipt.ids) == 5
    memory.undo(receipt.operation)
    assert _texts(memory) == ["Kept."]


def test_parts_of_a_call_are_undone_together_with_others_between_them(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    with Memory(path, embedder="none") as one, Memory(path, embedder="none") as two:
        view = one.view()
        call = one.carry_out([Add("turn", "first part")], "add", view.now).operation
        two.add("from another process")
        one.carry_out([Add("turn", "second part")], "add", view.now, call=call)
        assert one.undo(call) == "add"
        assert _texts(one) == ["from another process"]


def test_undo_refuses_when_later_operations_build_on_it(memory: Memory) -> None:
    first = memory.add("I live in Lisbon.", actor="ana")
    memory.update("t1", "I live in Porto.")
    with pytest.raises(StoreError, match="later operations build on it"):
        memory.undo(first.operation)
    turn = memory.add("Something else.")
    thought = Add("thought", "It matters.", sources=[memory.view().scan("turn")[-1]])
    memory.carry_out([thought], "reflect", memory.view().now)
    with pytest.raises(StoreError, match="later operations build on it"):
        memory.undo(turn.operation)
    memory.undo()
    memory.undo(turn.operation)
    assert "Something else." not in _texts(memory)


def test_undo_refuses_an_operation_of_which_the_log_lost_a_part(memory: Memory) -> None:
    receipt = memory.add([{"content": f"Hello {s}.", "session": s} for s in "abc"])
    memory.view().store.db.execute("DELETE FROM log WHERE version = ?", (receipt.operation,))
    with pytest.raises(StoreError, match="log is bounded"):
        memory.undo(receipt.operation)
    assert len(_texts(memory)) == 3


def test_what_was_forgotten_comes_back_and_is_found_again(memory: Memory) -> None:
    memory.add("I live in Lisbon.", actor="ana", at="2020-01-01")
    memory.add("The train was late.", at="2024-01-01")
    before = list(export_bank(memory)), memory.search("Lisbon")
    receipt = memory.forget(before="2021-01-01")
    assert [why for _, why in receipt.forgotten] == ["older than asked for"] * 2
    assert not memory.search("Lisbon")
    with pytest.raises(UnknownItem, match=r"forgot 't1' .*undo\(\) brings it back"):
        memory.get("t1")
    assert memory.undo() == "forget"
    assert (list(export_bank(memory)), memory.search("Lisbon")) == before


def test_undo_brings_items_and_codes_back_in_one_transaction(memory: Memory) -> None:
    memory.add([f"Note number {i}." for i in range(40)], at="2020-01-01")
    memory.forget(before="2021-01-01")
    with Memory(memory.path, embedder="none") as reader:
        assert not reader.search("note")
        memory.undo()
        assert len(reader.search("note", k=100)) == 40
        assert not reader.view().store.uncoded(reader.view().bank)


def test_delete_removes_what_rests_on_the_item_alone(memory: Memory) -> None:
    memory.add("I live in Lisbon.", actor="ana")
    memory.add("The train was late.")
    turns = memory.view().scan("turn")
    both = Add("summary", "Ana lives in Lisbon and takes the train.", sources=turns)
    memory.carry_out([both], "reflect", memory.view().now)
    assert set(memory.delete("t1")) == {"t1", "f2"}
    assert [i.kind for i in memory.view().scan()] == ["turn", "summary"]
    assert set(memory.delete("t3")) == {"t3", "s4"}
    with pytest.raises(StoreError, match="for good"):
        memory.undo()


def test_deleted_text_is_in_no_byte_of_the_files(memory: Memory) -> None:
    memory.add([f"Filler {i} " * 30 for i in range(50)])
    kept = memory.add(f"The code is {SECRET}.", actor="ana").ids[0]
    memory.add([f"More filler {i} " * 30 for i in range(50)])
    memory.update(kept, f"The code was {SECRET}.")
    newest = memory.search(SECRET)[0].id
    long_ago = memory.add(f"Once {SECRET} " + "and much more " * 400, at="2001-01-01").ids
    memory.forget(before="2002-01-01")
    memory.undo()
    memory.forget(before="2002-01-01")
    for id in (kept, newest, *long_ago):
        assert id in memory.delete(id)
    assert SECRET.encode() not in _bytes_on_disk(memory)
    assert len(memory.search("filler", k=200)) == 100


def test_deletion_reaches_derived_items_in_the_attic(memory: Memory) -> None:
    memory.add(f"I live in {SECRET.title()}.", actor="ana", at="2024-01-01")
    fact = memory.facts("ana")[0]
    note = Add(
        "note", "older note", sources=[memory.view().scan("turn")[0]], at=1, data={"k": SECRET}
    )
    memory.carry_out([note], "reflect", memory.view().now)
    memory.forget(before="2000-01-01")
    assert memory.view().store.forgotten([memory.view().bank.first + 3])
    assert set(memory.delete("t1")) == {"t1", fact.id, "n3"}
    assert not memory.view().store.forgotten([memory.view().bank.first + 3])


def test_deletion_under_a_reader_says_that_the_text_is_still_in_the_wal(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.add("Something private.")
    reader = sqlite3.connect(memory.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM items").fetchone()
    memory.view().store.db.execute("PRAGMA busy_timeout=50")
    with pytest.raises(StoreLocked, match="t1 is deleted, but a reader"):
        memory.delete("t1")
    assert not memory.search("private")
    reader.close()
    memory.add("Another.")
    memory.delete("t2")
    assert b"Something private" not in _bytes_on_disk(memory)


def test_update_keeps_the_event_time_and_all_of_a_long_text(memory: Memory) -> None:
    memory.add("Short.", at="2020-05-01", actor="ana", session="s", meta={"ref": 7})
    long = "A sentence of some length about many things. " * 100
    receipt = memory.update("t1", long)
    hits = [memory.get(id) for id in receipt.ids]
    assert " ".join(hit.text for hit in hits).split() == long.split()
    assert {hit.at for hit in hits} == {"2020-05-01T00:00:00Z"}
    assert all(hit.meta["ref"] == 7 and hit.actor == "ana" for hit in hits)


def test_update_of_a_fact_keeps_when_it_was_true(memory: Memory) -> None:
    memory.add("I live in Lisbon.", actor="ana", at="2020-05-01")
    fact = memory.facts("ana")[0]
    memory.update(fact.id, "ana lives in Lisboa.")
    after = memory.facts("ana")[0]
    assert after.text == "ana lives in Lisboa."
    assert (after.valid_from, after.sources) == (fact.valid_from, fact.sources)
    with pytest.raises(InvalidKnob, match="let go already"):
        memory.update(fact.id, "again")


def test_hits_whose_sources_were_forgotten_still_come_back(memory: Memory) -> None:
    memory.add("I live in Lisbon.", actor="ana", at="2020-05-01")
    turn = memory.view().scan("turn")[0]
    memory.carry_out(
        [Add("note", "Ana likes Lisbon.", sources=[turn], at=turn.at + 10**15)], "x", 0
    )
    memory.forget(before="2021-01-01")
    (hit,) = memory.search("Lisbon", kinds=["note"])
    assert (hit.text, hit.sources) == ("Ana likes Lisbon.", ())
    memory.undo()
    (hit,) = memory.search("Lisbon", kinds=["note"])
    assert [s.id for s in hit.sources] == ["t1"]


def test_origins_go_through_chains_and_circles(memory: Memory) -> None:
    memory.add("One.")
    turn = memory.view().scan("turn")[0]
    note = Add("note", "A note.", sources=[turn])
    thought = Add("thought", "A thought.", sources=[note])
    memory.carry_out([note, thought], "x", 0)
    memory.carry_out([Add("note", "A note.", sources=[memory.view().scan("thought")[0]])], "x", 0)
    hits = memory.search("note thought", kinds=["note", "thought"])
    assert [[s.id for s in hit.sources] for hit in hits] == [["t1"], ["t1"]]
