"""The same calls under the same clock give the same memory, however it is opened and read."""

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memwise import Memory
from memwise.errors import MemwiseError
from memwise.recall.interchange import export_bank, import_file

CITIES = ["Lisbon", "Porto", "Faro", "Braga"]
NAMES = ["ana", "bo", "cleo"]
QUERIES = ["Where does ana live?", "dog cat", "Porto", "who likes tea in Braga?"]

texts = st.one_of(
    st.sampled_from(CITIES).map("I live in {}.".format),
    st.sampled_from(["dog", "cat", "tea", "rain"]).map("I like the {} very much.".format),
    st.text(min_size=1, max_size=40),
    st.just("A long story. " * 200),
)
dates = st.none() | st.sampled_from(["2020-01-01", "2021-06-01", "2022-03-05"])
number = st.integers(0, 30)
operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), texts, st.sampled_from(NAMES), st.sampled_from(["", "a", "b"]), dates
        ),
        st.tuples(st.just("list"), st.lists(texts, min_size=1, max_size=4)),
        st.tuples(st.just("update"), number, texts),
        st.tuples(st.just("delete"), number),
        st.tuples(st.just("undo")),
        st.tuples(st.just("forget"), st.sampled_from(["2020-06-01", "2022-01-01"])),
        st.tuples(st.just("search"), st.sampled_from(QUERIES)),
        st.tuples(st.just("reflect")),
    ),
    max_size=14,
)
Operation = tuple[Any, ...]
thorough = settings(
    derandomize=True, deadline=None, max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


def _clock() -> Callable[[], int]:
    ticks = itertools.count(1_700_000_000)
    return lambda: next(ticks)


def _open(path: Path, policy: str, clock: Callable[[], int] | None = None) -> Memory:
    return Memory(path, embedder="none", policy=policy, clock=clock or _clock())


def _id(memory: Memory, n: int) -> str:
    items = memory.view().store.scan(memory.view().bank, expired=True)
    return items[n % len(items)].id if items else "t1"


def _do(memory: Memory, operation: Operation) -> object:
    """What a call returns, or the name of its error."""
    verb, *args = operation
    try:
        match verb:
            case "add":
                text, actor, session, at = args
                return memory.add(text, actor=actor, session=session, at=at)
            case "list":
                return memory.add(*args)
            case "update":
                return memory.update(_id(memory, args[0]), args[1])
            case "delete":
                return memory.delete(_id(memory, args[0]))
            case "undo":
                return memory.undo()
            case "forget":
                return memory.forget(before=args[0])
            case "search":
                return memory.search(args[0])
            case _:
                return memory.reflect()
    except MemwiseError as error:
        return type(error).__name__


def _answers(memory: Memory) -> list[object]:
    clockless = [memory.search(q, k=5) for q in QUERIES]
    return [clockless, memory.facts(), memory.timeline("ana"), memory.stats()]


def _run(path: Path, policy: str, calls: Sequence[Operation]) -> tuple[list[object], list[str]]:
    with _open(path, policy) as memory:
        return [_do(memory, call) for call in calls], list(export_bank(memory))


@pytest.mark.parametrize("policy", ["plain", "memorybank"])
@given(calls=operations)
@thorough
def test_the_same_calls_give_the_same_bytes_and_answers(
    policy: str, calls: list[Operation]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = _run(Path(folder) / "a.db", policy, calls)
        assert _run(Path(folder) / "b.db", policy, calls) == first


@given(calls=operations)
@thorough
def test_a_file_opened_again_answers_as_the_living_object(calls: list[Operation]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.db"
        with _open(path, "plain") as living:
            for call in calls:
                _do(living, call)
            with _open(path, "plain") as again:
                assert _answers(again) == _answers(living)


@given(calls=operations)
@thorough
def test_a_second_object_sees_what_the_first_wrote(calls: list[Operation]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, clock = Path(folder) / "m.db", _clock()
        with _open(path, "plain", clock) as one, _open(path, "plain", clock) as two:
            for i, call in enumerate(calls):
                _do(two if i % 2 else one, call)
                assert _answers(one) == _answers(two)


@given(calls=operations)
@thorough
def test_an_import_into_a_new_bank_gives_the_same_export(calls: list[Operation]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = _run(Path(folder) / "a.db", "plain", calls)[1]
        file = Path(folder) / "a.jsonl"
        file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        with _open(Path(folder) / "b.db", "plain") as copy:
            import_file(copy, file)
            assert list(export_bank(copy)) == lines


@given(calls=operations)
@thorough
def test_undoing_everything_leaves_nothing(calls: list[Operation]) -> None:
    kept = [c for c in calls if c[0] not in ("delete", "undo")]
    with tempfile.TemporaryDirectory() as folder, _open(Path(folder) / "m.db", "plain") as memory:
        for call in kept:
            _do(memory, call)
        while _do(memory, ("undo",)) != "StoreError":
            pass
        assert len(list(export_bank(memory))) == 1
        assert memory.view().store.table_bytes()["attic"] == 0


def test_a_budget_that_forgets_replays_too(tmp_path: Path) -> None:
    def run(name: str) -> tuple[list[object], list[str]]:
        with Memory(
            tmp_path / name, embedder="none", policy="memorybank", budget="512KiB", clock=_clock()
        ) as memory:
            out: list[object] = []
            for i in range(22):
                words = " ".join(f"w{(i * 7 + j * 13) % 501}" for j in range(60))
                out.append(memory.add([f"{words} {k}" for k in range(20)], session=f"s{i // 4}"))
                out.append(memory.search(f"w{i * 3} w{i}"))
            return out, list(export_bank(memory))

    first = run("a.db")
    assert any(getattr(receipt, "forgotten", ()) for receipt in first[0])
    assert run("b.db") == first
