"""Nothing acknowledged is lost: killed writers, many writers, full disks, damaged files."""

import hashlib
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from memwise import Memory
from memwise.errors import (
    EmbedderMismatch,
    InvalidKnob,
    StoreCorrupt,
    StoreError,
)
from memwise.recall.doctor import examine, reembed, repair
from memwise.recall.engine.store import SQLite
from memwise.recall.interchange import export_bank


class Hashed:
    """Words hashed into a few dimensions."""

    def __init__(self, dim: int = 16):
        self.dim, self.fingerprint, self.calls = dim, f"hashed/{dim}", 0

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        self.calls += 1
        out = np.zeros((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            for word in text.lower().split():
                out[i, hashlib.md5(word.encode()).digest()[0] % self.dim] += 1
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)


def _python(code: str, *args: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _sound(path: Path) -> None:
    """No half turn, no link into nowhere, nothing that SQLite complains about."""
    report = examine(path)
    assert report.ok, str(report)
    assert report.counts["items"] == report.counts["codes"]


# ---------------------------------------------------------------- killed

WRITER = """
    import sys
    from memwise import Memory
    path, run = sys.argv[1:]
    with Memory(path, embedder="none") as memory:
        print("open", flush=True)
        for i in range(100000):
            text = f"I live in City{run}x{i}. It rains."
            receipt = memory.add([text, f"And {i} more of {run}."], actor=f"p{run}")
            if i % 7 == 3:
                memory.update(receipt.ids[1], f"Updated {i} of {run}.")
            if i % 11 == 5:
                memory.undo()
                continue
            print(f"{receipt.ids[0]} {text}", flush=True)
"""


def _kill_and_check(path: Path, runs: int) -> None:
    rng = random.Random(0)
    acknowledged: dict[str, str] = {}
    for run in range(runs):
        writer = _python(WRITER, path, run)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n", writer.communicate()[1]
        for _ in range(rng.randrange(3, 60)):
            id, _, text = writer.stdout.readline().strip().partition(" ")
            acknowledged[id] = text
        os.kill(writer.pid, signal.SIGKILL)
        for line in writer.communicate()[0].splitlines():
            id, _, text = line.partition(" ")
            acknowledged[id] = text
        _sound(path)
        with Memory(path, embedder="none") as memory:
            there = {item.id: item.text for item in memory.view().scan("turn")}
            assert acknowledged.items() <= there.items()
            assert memory.search(f"City{run}x0", k=1)[0].text.startswith(f"I live in City{run}x0")
            assert len(memory.facts(f"p{run}", "live in")) == 1


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    _kill_and_check(tmp_path / "m.db", runs=4)


@pytest.mark.slow
def test_what_was_acknowledged_survives_kill_9_twenty_times(tmp_path: Path) -> None:
    _kill_and_check(tmp_path / "m.db", runs=20)


# ---------------------------------------------------------------- many writers

CROWD = """
    import sys
    from memwise import Memory
    path, who, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with Memory(path, embedder="none") as memory:
        for i in range(n):
            at = 1_700_000_000 + i
            (id,) = memory.add(f"I like thing {i} of {who}.", actor=who, at=at, session=who).ids
            print(id)
"""


def _crowd(path: Path, writers: int, n: int) -> None:
    stop, wrong = threading.Event(), list[BaseException]()

    def search() -> None:
        try:
            with Memory(path, embedder="none") as memory:
                while not stop.wait(0.01):
                    hits = memory.search("thing", k=5)
                    assert all(hit.text.startswith("I like thing") for hit in hits)
                    memory.facts("w0")
        except BaseException as error:
            wrong.append(error)

    processes = [_python(CROWD, path, f"w{w}", n) for w in range(writers)]
    reader = threading.Thread(target=search)
    reader.start()
    results = [process.communicate() for process in processes]
    stop.set()
    reader.join()
    assert not wrong
    assert [err for _, err in results] == [""] * writers
    ids = [id for out, _ in results for id in out.split()]
    assert len(set(ids)) == len(ids) == writers * n
    _sound(path)
    with Memory(path, embedder="none") as memory:
        texts = [item.text for item in memory.view().scan("turn")]
        assert sorted(texts) == sorted(
            f"I like thing {i} of w{w}." for i in range(n) for w in range(writers)
        )
        assert len(memory.search("thing", k=10**4)) == writers * n


def test_many_processes_write_one_file_while_others_search(tmp_path: Path) -> None:
    _crowd(tmp_path / "m.db", writers=4, n=100)


@pytest.mark.slow
def test_eight_processes_write_500_items_each(tmp_path: Path) -> None:
    _crowd(tmp_path / "m.db", writers=8, n=500)


# ---------------------------------------------------------------- full disks

LIMITED = """
    import resource, sys
    from memwise import Memory
    from memwise.errors import StoreError
    path = sys.argv[1]
    with Memory(path, embedder="none") as memory:
        done, told = [], ""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
        try:
            for i in range(10000):
                done += memory.add(f"Number {i}. " + "words " * 50, at=i).ids
        except StoreError as error:
            told = str(error)
        assert "nothing of this call was kept. Free disk space" in told, told
        assert len(memory.search("number", k=10000)) == len(done)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        done += memory.add("Room again.", at=10**6).ids
        assert memory.search("room again", k=1)[0].id == done[-1]
        print(len(done))
"""


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    process = _python(LIMITED, path, 2_000_000)
    out, err = process.communicate()
    assert err == ""
    _sound(path)
    with Memory(path, embedder="none") as memory:
        assert memory.stats()["turn"] == int(out) > 50


def test_a_file_that_may_not_grow_is_a_clear_error(tmp_path: Path) -> None:
    with Memory(tmp_path / "m.db", embedder="none") as memory:
        memory.add("First.")
        db = memory.view().store.db
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count={pages + 20}")
        stored = 1
        with pytest.raises(StoreError, match=r"could not be written .*forget\(budget=\.\.\.\)"):  # noqa: PT012
            for i in range(10_000):
                memory.add([f"Number {i}. " + "words " * 100, "And more."])
                stored += 2
        assert memory.stats()["turn"] == stored
        memory.forget(before="2100-01-01")
        db.execute(f"PRAGMA max_page_count={2**30}")
        memory.undo()
        memory.add("There is room.")
        assert memory.stats()["turn"] == stored + 1
    _sound(tmp_path / "m.db")


def test_the_limit_of_this_process_is_untouched() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert soft == hard


# ---------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound file with 400 turns and as many facts."""
    path = tmp_path_factory.mktemp("good") / "m.db"
    with Memory(path, embedder=Hashed()) as memory:
        for i in range(20):
            turns = [f"I live in City{i}x{j} with dog number {j}." for j in range(20)]
            memory.add(turns, actor=f"p{i}", session=f"s{i}", at=1_700_000_000 + i)
    _sound(path)
    return path.read_bytes()


def _use(path: Path) -> None:
    with Memory(path, embedder=Hashed()) as memory:
        memory.search("dog city3x4")
        memory.facts("p3")
        memory.timeline("p3")
        memory.context("dog", 100)
        memory.add("Something new.")


def _spoil(good: bytes, how: str, rng: random.Random) -> bytes:
    out = bytearray(good)
    match how:
        case "flips":
            for _ in range(6):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case "cut":
            del out[rng.randrange(len(out) // 4, len(out)) :]
        case "hole":
            at = rng.randrange(1, len(out) // 4096) * 4096
            out[at : at + 4096] = bytes(4096)
    return bytes(out)


@contextmanager
def _only_clear_errors() -> Iterator[None]:
    """Pass if nothing is raised, or an error that sends the caller to the doctor."""
    problem = None
    try:
        yield
    except StoreCorrupt as error:
        problem = str(error)
    assert problem is None or "memwise doctor" in problem


@pytest.mark.parametrize("how", ["flips", "cut", "hole"])
@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_is_a_clear_error_and_the_doctor_saves_the_rest(
    tmp_path: Path, good: bytes, how: str, seed: int
) -> None:
    path = tmp_path / "m.db"
    spoilt = _spoil(good, how, random.Random(seed))
    path.write_bytes(spoilt)
    with _only_clear_errors():
        _use(path)
    path.write_bytes(spoilt)
    before = examine(path)
    assert path.read_bytes() == spoilt
    report = repair(path)
    if before.ok:
        return  # the flips met unused bytes, or the text itself
    if report.kept:
        assert Path(report.kept).read_bytes() == spoilt
    after = examine(path)
    assert after.ok, f"{before}\n{after}"
    if how != "cut":
        assert after.counts["items"] > 500
    _use(path)


def test_a_spoilt_header_costs_nothing(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.db"
    path.write_bytes(b"x" * 100 + good[100:])
    with pytest.raises(StoreCorrupt, match="memwise doctor"):
        Memory(path, embedder=Hashed())
    out = tmp_path / "saved.db"
    report = repair(path, out)
    assert (report.path, report.kept) == (str(out), "")
    assert examine(out).counts["items"] == 800
    assert path.read_bytes() == b"x" * 100 + good[100:]
    with pytest.raises(InvalidKnob, match="exists"):
        repair(path, out)


def test_a_repair_saves_ids_clocks_links_vectors_and_the_attic(tmp_path: Path) -> None:
    path, embedder = tmp_path / "m.db", Hashed()
    with Memory(path, bank="ana", embedder=embedder, policy="memorybank") as memory:
        memory.add("I live in Lisbon.", at="2020-01-01", session="a")
        memory.add("I have a dog.", session="b")
        memory.update("t3", "I have a cat.")
        memory.reflect()
        memory.forget(before="2021-01-01")
        lines = list(export_bank(memory))
        vectors = memory.view().store.db.execute("SELECT * FROM codes").fetchall()
        attic = memory.view().store.db.execute("SELECT * FROM attic").fetchall()
    report = repair(path, tmp_path / "new.db")
    assert any("saved" in what for what in report.done)
    with Memory(tmp_path / "new.db", bank="ana", embedder=embedder) as memory:
        assert list(export_bank(memory)) == lines
        assert memory.view().store.db.execute("SELECT * FROM codes").fetchall() == vectors
        assert memory.view().store.db.execute("SELECT * FROM attic").fetchall() == attic


@pytest.mark.parametrize("content", [b"Hello, I am a text file.\n" * 100, b"\0" * 5000, b"Hello"])
def test_what_is_no_database_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.db"
    path.write_bytes(content)
    with pytest.raises(StoreCorrupt, match="not a memwise memory"):
        Memory(path, embedder="none")
    assert not examine(path).ok
    with pytest.raises(StoreCorrupt, match="backup"):
        repair(path)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["m.db"]


@pytest.mark.parametrize("version", [0, 1, 7])
def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path, version: int) -> None:
    path = tmp_path / "m.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE items(a)")
        db.execute(f"PRAGMA user_version={version}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StoreCorrupt, match="another program; choose another path"):
        Memory(path, embedder="none")
    for call in (examine, repair):
        with pytest.raises(InvalidKnob, match="not a memory of memwise"):
            call(path)
    assert path.read_bytes() == before


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    Memory(path, embedder="none").close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(StoreError, match=r"newer memwise .* upgrade"):
        Memory(path, embedder="none")


@pytest.mark.parametrize("content", ["missing", "folder"])
def test_the_doctor_needs_a_file(tmp_path: Path, content: str) -> None:
    path = tmp_path if content == "folder" else tmp_path / "no.db"
    for call in (examine, repair, reembed):
        with pytest.raises(InvalidKnob, match="is not a file"):
            call(path)


# ---------------------------------------------------------------- the doctor


def test_a_sound_file_is_found_sound_and_stays_as_it_is(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.db"
    path.write_bytes(good)
    report = examine(path)
    assert report.ok
    assert report.findings == ()
    assert report.embedder == "hashed/16"
    assert report.counts["items"] == 800
    assert "sound" in str(report)
    assert path.read_bytes() == good
    repair(path)
    assert examine(path) == report


DAMAGES = {
    "DELETE FROM codes WHERE row % 7 = 0": "items that search cannot find",
    "INSERT INTO codes VALUES (99, x'', NULL)": "codes of items that are gone",
    "UPDATE codes SET terms = x'01020304' WHERE row % 5 = 0": "words are indexed wrongly",
    "UPDATE items SET hash = hash + 1 WHERE row % 5 = 0": "wrong hash",
    "INSERT INTO links VALUES (99, 'next', 98, 1.0, 0, NULL)": "leave from nowhere",
    "INSERT INTO links SELECT row, 'next', 1 << 37, 1.0, 0, NULL FROM items": "never were",
    "UPDATE banks SET next = 5": "give a number twice",
    "UPDATE banks SET version = 5": "whose version is not that of their log",
    "DELETE FROM banks": "a bank that is not listed",
    "UPDATE items SET kind = 'nonsense' WHERE row % 9 = 0": "make no sense",
    "UPDATE items SET data = '{' WHERE row % 9 = 1": "make no sense",
    "INSERT INTO attic VALUES ((1 << 36) + 5000, 0, '', x'00')": "cannot be unpacked",
    "UPDATE codes SET vector = x'0102' WHERE row % 3 = 0 AND vector NOT NULL": "another length",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named_and_repaired(tmp_path: Path, good: bytes, damage: str) -> None:
    path = tmp_path / "m.db"
    path.write_bytes(good)
    db = sqlite3.connect(path)
    with db:
        db.execute(damage)
    db.close()
    before = examine(path)
    assert not before.ok
    assert DAMAGES[damage] in str(before)
    assert all(f.n > 0 and f.advice for f in before.findings)
    repair(path)
    after = examine(path)
    assert after.ok, str(after)
    with Memory(path, embedder=Hashed()) as memory:
        memory.add("It goes on.")
    assert examine(path).ok


def test_progress_of_examine_and_repair_ends_at_the_total(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.db"
    path.write_bytes(good)
    for call in (examine, repair):
        seen: list[tuple[int, int]] = []
        call(path, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert seen
        assert seen[-1][0] == seen[-1][1]


# ---------------------------------------------------------------- another embedder


def test_reembedding_changes_the_vectors_and_nothing_else(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.db"
    path.write_bytes(good)
    with Memory(path, embedder=Hashed()) as memory:
        lines = list(export_bank(memory))
    seen: list[tuple[int, int]] = []
    report = reembed(path, Hashed(32), lambda done, total: seen.append((done, total)))
    assert report.embedder == "hashed/32"
    assert seen[-1] == (800, 800)
    with pytest.raises(EmbedderMismatch):
        Memory(path, embedder=Hashed())
    _sound(path)
    with Memory(path, embedder=Hashed(32)) as memory:
        assert list(export_bank(memory))[1:] == lines[1:]
        fresh = Memory(tmp_path / "fresh.db", embedder=Hashed(32))
        with fresh:
            for turn in memory.view().scan("turn"):
                fresh.add(turn.text, actor=turn.actor, session=turn.session, at=turn.at / 1e6)
            ask = "dog city3x4"
            assert [h.text for h in memory.search(ask)] == [h.text for h in fresh.search(ask)]


def test_a_reembedding_that_was_cut_off_goes_on(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.db"
    path.write_bytes(good)

    class Stopped(Exception):
        pass

    class Failing(Hashed):
        def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
            if self.calls:
                raise Stopped
            return super().encode(texts, role)

    with pytest.raises(Stopped):
        reembed(path, Failing(32))
    with Memory(path, embedder=Hashed()) as memory:  # until it is done all is as before
        assert memory.search("dog city3x4")
        memory.add("Written in between.", actor="me")
        memory.delete("t1")
    assert any("unfinished re-embedding" in f.what for f in examine(path).findings)
    second = Hashed(32)
    reembed(path, second)
    assert second.calls < 4
    _sound(path)
    with Memory(path, embedder=Hashed(32)) as memory:
        assert memory.search("written in between", k=1)[0].actor == "me"


def test_a_living_memory_notices_that_the_file_was_reembedded(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.db"
    path.write_bytes(good)
    with Memory(path, embedder=Hashed()) as memory:
        memory.search("dog")
        reembed(path, Hashed(32))
        calls = (lambda: memory.search("dog"), lambda: memory.add("New."), lambda: memory.undo())
        for call in calls:
            with pytest.raises(EmbedderMismatch, match="re-embedded meanwhile; open it again"):
                call()
    _sound(path)


def test_from_no_vectors_to_vectors_and_back(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    with Memory(path, embedder="none") as memory:
        memory.add("I live in Lisbon.", actor="ana")
        lines = list(export_bank(memory))
    reembed(path, Hashed())
    with Memory(path, embedder=Hashed()) as memory:
        assert memory.search("lisbon")[0].id == "t1"
    reembed(path, "none")
    with Memory(path) as memory:
        assert list(export_bank(memory)) == lines


def test_opening_many_times_at_once_makes_one_file(tmp_path: Path) -> None:
    code = """
        import sys
        from memwise import Memory
        with Memory(sys.argv[1], bank=sys.argv[2], embedder="none") as memory:
            print(memory.add("Hello.").ids)
    """
    path = tmp_path / "m.db"
    processes = [_python(code, path, f"bank{n % 3}") for n in range(6)]
    assert [p.communicate()[1] for p in processes] == [""] * 6
    _sound(path)
    store = SQLite(path)
    try:
        assert store.db.execute("PRAGMA auto_vacuum").fetchone() == (2,)
        assert {bank.name for bank in store.banks()} == {"bank0", "bank1", "bank2"}
    finally:
        store.close()


def test_a_corrupt_record_never_raises_anything_but_memwise_errors(
    tmp_path: Path, good: bytes
) -> None:
    path = tmp_path / "m.db"
    for seed in range(10):
        path.write_bytes(_spoil(good, "flips", random.Random(100 + seed)))
        with _only_clear_errors():
            _use(path)
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
