"""A byte budget over file, WAL, shared memory and RAM indexes holds at every sampled instant."""

import hashlib
import itertools
import os
import random
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from memwise import Budget, Memory
from memwise.errors import BudgetExceeded, StoreError, StoreLocked
from memwise.recall.engine.records import Add

WORDS = [hashlib.md5(str(i).encode()).hexdigest()[:7] for i in range(3000)]


class Hashed:
    """Words hashed into 64 dimensions."""

    dim = 64
    fingerprint = "hashed/64"

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        out = np.zeros((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            for word in text.lower().split():
                out[i, hashlib.md5(word.encode()).digest()[0] % self.dim] += 1
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)


class Gauge:
    """The highest number of bytes that was seen, from a second thread and on demand."""

    def __init__(self, memory: Memory):
        self.memory, self.highest, self.samples = memory, 0, 0
        self._stop = threading.Event()

    def sample(self) -> None:
        disk = 0
        for suffix in ("", "-wal", "-shm"):
            try:
                disk += os.stat(self.memory.path + suffix).st_size
            except FileNotFoundError:
                continue
        self.highest = max(self.highest, disk + self.memory._index.nbytes)
        self.samples += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self.sample()


def _turns(rng: random.Random, n: int, long: bool = False) -> list[dict[str, object]]:
    many = (20, 400) if long else (4, 40)
    return [
        {
            "role": "user",
            "content": f"I live in {rng.choice(WORDS).title()}. "
            + " ".join(rng.choices(WORDS, k=rng.randint(*many))),
            "name": f"p{rng.randrange(9)}",
            "meta": {"n": rng.randrange(10**6)},
        }
        for _ in range(n)
    ]


def _open(path: Path, budget: str | None, policy: str, **more: object) -> Memory:
    ticks = itertools.count(1_700_000_000, 600)
    return Memory(
        path, policy=policy, budget=budget, embedder=Hashed(), clock=lambda: next(ticks), **more
    )


def _stream(memory: Memory, budget: str, n_calls: int, seed: int = 0) -> dict[str, str]:
    """Add, search, update and delete under the gauge; returns what was forgotten and why."""
    rng, gauge = random.Random(seed), Gauge(memory)
    forgotten: dict[str, str] = {}
    with gauge.watching():
        for call in range(n_calls):
            turns = _turns(rng, rng.choice([1, 1, 5, 30]), long=call % 7 == 0)
            receipt = memory.add(turns, session=f"s{call // 5}")
            forgotten |= receipt.forgotten
            gauge.sample()
            if call % 3 == 0:
                memory.search(" ".join(rng.choices(WORDS, k=4)))
                gauge.sample()
            if call % 11 == 0:
                memory.update(receipt.ids[-1], "Corrected " + " ".join(rng.choices(WORDS, k=20)))
                gauge.sample()
            if call % 17 == 0:
                memory.delete(memory.view().scan("turn")[0].id)
                gauge.sample()
    assert gauge.highest <= Budget(budget), f"{gauge.highest} after {gauge.samples} samples"
    assert gauge.samples > n_calls
    return forgotten


@pytest.mark.parametrize("policy", ["plain", "fifo", "memorybank"])
def test_a_stream_never_exceeds_its_budget(tmp_path: Path, policy: str) -> None:
    with _open(tmp_path / "m.db", "768KiB", policy) as memory:
        forgotten = _stream(memory, "768KiB", 40)
        assert forgotten
        assert memory.stats()["turn"] > 40
        alive = {item.id for item in memory.view().scan()}
        assert not alive & forgotten.keys()
        words = "not recalled for" if policy == "memorybank" else "oldest first"
        assert all(words in why or why == "let go earlier" for why in forgotten.values())


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["plain", "fifo", "memorybank"])
@pytest.mark.parametrize("budget", ["512KiB", "1MiB", "6MiB"])
def test_long_streams_never_exceed_their_budget(tmp_path: Path, policy: str, budget: str) -> None:
    with _open(tmp_path / "m.db", budget, policy) as memory:
        n_calls = 300 * max(1, Budget(budget) >> 20)
        assert _stream(memory, budget, n_calls, seed=1)


def test_the_budget_holds_while_others_read(tmp_path: Path) -> None:
    path, stop = tmp_path / "m.db", threading.Event()
    with _open(path, "512KiB", "fifo") as memory:

        def read() -> None:
            with Memory(path, embedder=Hashed()) as reader:
                while not stop.is_set():
                    reader.search("I live in")
                    stop.wait(0.002)

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            assert _stream(memory, "512KiB", 45, seed=2)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_a_reader_that_never_ends_is_an_error_not_an_excess(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    with _open(path, "512KiB", "plain") as memory:
        memory.add(_turns(random.Random(0), 20))
        memory.view().store.db.execute("PRAGMA busy_timeout=20")
        gauge = Gauge(memory)
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM items").fetchone()
        added = 0
        with pytest.raises(StoreLocked, match="holds an old state"):  # noqa: PT012
            for _ in range(100):
                memory.add(_turns(random.Random(added), 5))
                added += 1
                gauge.sample()
        gauge.sample()
        reader.close()
        assert gauge.highest <= 512 << 10
        memory.add("It goes on.")


def test_undo_brings_forgotten_items_back_while_the_attic_holds_them(tmp_path: Path) -> None:
    with _open(tmp_path / "m.db", "4MiB", "fifo") as memory:
        memory.add(_turns(random.Random(0), 600))
        before = {item.id: item.text for item in memory.view().scan()}
        receipt = memory.forget(budget="600KiB")
        assert len(receipt.forgotten) > 50
        assert not receipt.purged
        gauge = Gauge(memory)
        gauge.sample()
        assert gauge.highest <= 600 << 10
        assert memory.undo() == "forget"
        assert {item.id: item.text for item in memory.view().scan()} == before
        gauge.sample()
        assert gauge.highest <= 4 << 20


def test_undo_of_an_add_brings_back_what_was_forgotten_for_it(tmp_path: Path) -> None:
    with _open(tmp_path / "m.db", "3MiB", "fifo") as memory:
        rng = random.Random(3)
        memory.add(_turns(rng, 2000))
        while True:
            before = {item.id: item.text for item in memory.view().scan()}
            receipt = memory.add(_turns(rng, 40))
            if receipt.forgotten:
                break
        assert memory.undo(receipt.operation) == "add"
        assert {item.id: item.text for item in memory.view().scan()} == before


def test_the_attic_is_bounded_and_purged_entries_cannot_come_back(tmp_path: Path) -> None:
    with _open(tmp_path / "m.db", "512KiB", "fifo") as memory:
        rng = random.Random(4)
        receipts = [memory.add(_turns(rng, 25)) for _ in range(30)]
        assert sum(receipt.purged for receipt in receipts)
        attic = memory.view().store.table_bytes()["attic"]
        assert 0 < attic <= 0.2 * (512 << 10)
        first = next(r for r in receipts if r.forgotten)
        with pytest.raises(StoreError, match=r"undo|attic"):
            memory.undo(first.operation)


def test_an_undo_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    with _open(path, None, "fifo") as memory:
        memory.add(_turns(random.Random(0), 900), at="2020-01-01")
        memory.forget(before="2021-01-01")
    with _open(path, "1MiB", "fifo") as memory:
        with pytest.raises(BudgetExceeded, match="larger budget"):
            memory.undo()
        gauge = Gauge(memory)
        memory.add("It goes on.")
        gauge.sample()
        assert gauge.highest <= 1 << 20


def test_a_larger_file_shrinks_to_the_budget_and_keeps_what_fits(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    with _open(path, None, "fifo") as memory:
        memory.add(_turns(random.Random(0), 1000))
    with _open(path, "1MiB", "fifo") as memory:
        receipt = memory.add("One more.")
        gauge = Gauge(memory)
        gauge.sample()
        assert gauge.highest <= 1 << 20
        assert receipt.forgotten
        assert memory.stats()["turn"] > 200


def test_a_file_never_shrinks_further_than_asked(tmp_path: Path) -> None:
    with _open(tmp_path / "m.db", None, "fifo") as memory:
        memory.add(_turns(random.Random(0), 1500))
        kept = [memory.stats()["turn"]]
        for budget in ("1MiB", "900KiB", "700KiB"):
            memory.forget(budget=budget)
            kept.append(memory.stats()["turn"])
            used = sum(memory.view().store.file_bytes().values()) + memory.index_bytes()
            assert 0.6 * Budget(budget) < used <= Budget(budget)
    assert kept == sorted(set(kept), reverse=True)


def test_what_can_never_fit_is_refused_and_nothing_is_forgotten_for_it(tmp_path: Path) -> None:
    with _open(tmp_path / "m.db", "1MiB", "fifo") as memory:
        memory.add(_turns(random.Random(0), 100))
        before = [item.text for item in memory.view().scan()]
        with pytest.raises(BudgetExceeded, match="Raise the budget"):
            memory.add("Too much.", meta={"blob": "x" * (3 << 20)})
        assert [item.text for item in memory.view().scan()] == before


def test_a_list_that_fits_in_parts_only_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    with _open(tmp_path / "m.db", "1MiB", "fifo") as memory:
        memory.add("Before.")
        turns = [*_turns(random.Random(0), 50), {"content": "x", "meta": {"b": "x" * (3 << 20)}}]
        with pytest.raises(BudgetExceeded):
            memory.add(turns)
        assert [item.text for item in memory.view().scan()] == ["Before."]


def test_other_banks_are_left_alone_and_named_when_they_fill_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    with _open(path, None, "fifo", bank="big") as big:
        big.add(_turns(random.Random(0), 2000))
        with _open(path, "1MiB", "fifo", bank="small") as small:
            with pytest.raises(BudgetExceeded, match="other banks"):
                small.add("No room.")
            assert small.stats() == {}
        assert big.stats()["turn"] == 2000


@pytest.mark.parametrize("budget", [0, "1KiB", "511KiB"])
def test_a_budget_too_small_is_refused_before_a_file_is_made(
    tmp_path: Path, budget: str | int
) -> None:
    with pytest.raises(BudgetExceeded, match="give at least 512 KiB"):
        Memory(tmp_path / "m.db", embedder="none", budget=budget)
    assert not list(tmp_path.iterdir())
    with Memory(tmp_path / "m.db", embedder="none") as memory:
        memory.add("Something.")
        with pytest.raises(BudgetExceeded, match="512 KiB"):
            memory.forget(budget=budget)
        assert memory.stats() == {"turn": 1}


def test_what_policies_derive_counts_too(tmp_path: Path) -> None:
    with _open(tmp_path / "m.db", "512KiB", "plain") as memory:
        memory.add("A source.")
        source = memory.view().scan("turn")[0]
        gauge = Gauge(memory)
        for i in range(15):
            rng = random.Random(i)
            notes = [
                Add("note", " ".join(rng.choices(WORDS, k=60)), sources=[source]) for _ in range(20)
            ]
            memory.carry_out(notes, "reflect", memory.view().now)
            gauge.sample()
        assert gauge.highest <= 512 << 10
