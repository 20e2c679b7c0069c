import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from memwise import Memory, cli
from memwise.recall import Receipt

SRC = Path(__file__).parents[2] / "src"


@dataclass(frozen=True)
class Done:
    """How a command ended and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "m.db"


# ---------------------------------------------------------------- what is told comes back


def test_a_text_is_found_again(db: Path) -> None:
    run(db, "add", "Ana moved to Lisbon.", "--at", "2026-05-02", "--actor", "ana")
    done = run(db, "search", "did Ana go to Lisbon?")
    assert "2026-05-02" in done.stdout
    assert "Ana moved to Lisbon." in done.stdout
    assert "\x1b" not in done.stdout


def test_what_one_verb_prints_another_one_reads(db: Path) -> None:
    run(db, "add", "-", text='{"content": "Tea, please!"}\n{"content": "Coffee!"}\n')
    hits = run(db, "search", "tea", "--k", "1", "--json")
    shown = rows(run(db, "get", "-", "--json", text=hits.stdout))
    assert shown[0]["result"]["text"] == "Tea, please!"
    gone = rows(run(db, "delete", "-", "--json", text=hits.stdout))
    assert gone == [{"id": "t1", "result": {"deleted": ["t1"]}}]
    assert rows(run(db, "stats", "--json"))[0]["items"] == {"turn": 1}


def test_questions_are_read_from_stdin_as_text_or_json(db: Path) -> None:
    run(db, "add", "I like tea.")
    asked = 'tea?\n\n{"query": "coffee or tea?", "k": 1}\n'
    found = rows(run(db, "search", "-", "--json", text=asked))
    assert [row["query"] for row in found] == ["tea?", "coffee or tea?"]
    assert [len(row["result"]) for row in found] == [1, 1]


def test_messages_are_added_from_a_file_of_json_lines(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    message = {"role": "user", "content": "I like\u2028tea.", "at": "2026-05-02", "meta": {"n": 1}}
    path.write_text(json.dumps(message, ensure_ascii=False) + "\n", "utf-8")
    assert rows(run(db, "add", str(path), "--json"))[0]["ids"] == ["t1"]
    assert rows(run(db, "get", "t1", "--json"))[0]["meta"] == {"n": 1}


def test_messages_are_added_from_one_json_document(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"role": "user", "content": "a"}, "b"], indent=1))
    assert rows(run(db, "add", str(path), "--json"))[0]["ids"] == ["t1", "t2"]


def test_a_text_file_is_one_text(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("Buy milk.\nBuy bread.\n")
    run(db, "add", str(path))
    assert rows(run(db, "stats", "--json"))[0]["items"] == {"turn": 1}


def test_many_items_are_stored_in_one_call_that_can_be_undone(db: Path) -> None:
    lines = "".join(json.dumps({"content": f"item {i}"}) + "\n" for i in range(1001))
    (receipt,) = rows(run(db, "add", "-", "--json", text=lines))
    assert len(receipt["ids"]) == 1001
    assert rows(run(db, "undo", "--json")) == [{"undone": "add"}]
    assert rows(run(db, "stats", "--json"))[0]["items"] == {}


def test_a_context_is_only_its_text(db: Path) -> None:
    run(db, "add", "I like tea.", "--at", "2026-05-02", "--actor", "ana")
    done = run(db, "context", "tea?", "--tokens", "100")
    assert done.stdout == "<memory>\n2026-05-02\nana: I like tea.\n</memory>\n"


def test_the_report_adds_up(db: Path) -> None:
    run(db, "add", "I like tea.")
    report = rows(run(db, "report", "--json"))[0]
    assert report["bytes"] == sum(line["bytes"] for line in report["lines"])


def test_each_table_can_be_printed(db: Path) -> None:
    run(db, "add", "Ana moved to Lisbon.", "--meta", '{"ref": 7}')
    run(db, "update", "t1", "Ana moved to Porto.")
    for verb in ("facts", "stats", "report", "banks", "reflect"):
        assert run(db, verb).stdout
    assert "superseded by" in run(db, "history", "t1").stdout
    assert '{"ref": 7}' in run(db, "get", "t1").stdout
    assert "Ana" in run(db, "timeline", "Ana").stdout
    assert "older than asked for" in run(db, "forget", "--before", "2999-01-01").stdout
    assert run(db, "undo").stdout == "took back: forget\n"
    assert run(db, "rebuild").stdout


def test_the_database_may_be_named_in_the_environment(db: Path) -> None:
    run(db, "add", "I like tea.")
    done = _run("search", "tea", env={"MEMWISE_DB": str(db)})
    assert "I like tea." in done.stdout


def test_banks_do_not_see_each_other(db: Path) -> None:
    run(db, "add", "I like tea.", "--bank", "ana")
    run(db, "add", "I like coffee.", "--bank", "ben")
    assert "coffee" not in run(db, "search", "like", "--bank", "ana").stdout
    assert [row["bank"] for row in rows(run(db, "banks", "--json"))] == ["ana", "ben"]


# ---------------------------------------------------------------- recalled text is data


def test_recalled_text_cannot_steer_the_terminal(db: Path) -> None:
    run(db, "add", "-", text=json.dumps({"content": "\x1b[2Jred [bold]alert[/bold] \x07 tea"}))
    for arguments in (("search", "tea"), ("context", "tea"), ("get", "t1")):
        shown = run(db, *arguments).stdout
        assert "[2Jred [bold]alert[/bold]  tea" in shown
        assert "\x1b" not in shown
        assert "\x07" not in shown


# ---------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (("search", "tea", "--bank", "nobody"), "", "no bank 'nobody'; it holds 'default'"),
        (("search", " "), "", "the query is empty"),
        (("search", "tea", "--k", "0"), "", "ask for at least 1 hit"),
        (("search", "tea", "--at", "someday"), "", "at='someday' is not a time"),
        (("search", "tea", "--where", "ref=7"), "", "--where 'ref=7' is not JSON"),
        (("search", "tea", "--where", "[7]"), "", "must be a JSON object"),
        (("search", "tea", "--policy", "nonesuch"), "", "no method 'nonesuch'"),
        (("search", "tea", "--embedder", "ngrams"), "", "embedder"),
        (("search", "-"), '{"query": "tea", "k": "many"}', "stdin, line 1: k='many' must be int"),
        (("search", "-"), '{"question": "tea"}', "stdin, line 1: memwise search needs QUERY"),
        (("get", "t99"), "", "no item 't99'"),
        (("get", "-"), "t99\n", "stdin, line 1: bank 'default' has no item 't99'"),
        (("get", ""), "", "ids look like 't12'"),
        (("search", "tea", "--where", f'{{"a": {10**30}}}'), "", "numbers of at most 64 bits"),
        (("facts", "--skip", "-1"), "", "skip=-1"),
        (("timeline", ""), "", "the entity is empty"),
        (("update", "t1"), "", "memwise update needs TEXT"),
        (("forget",), "", "either budget= (bytes) or before="),
        (("forget", "--budget", "64M"), "", "64M"),
        (("add", "-"), "", "stdin is empty"),
        (("add", "-"), "\x00\x01", "binary data"),
        (("add", "-"), '{"role": "user", "content": "a"}\n{"role": ', "stdin, line 2 is not JSON"),
        (("add", "-"), '{"role": "user", "content": "a"}\n{"role": "king"}', "role='king'"),
        (("add", "-"), '{"content": "a", "at": "someday"}', "stdin, line 1: at='someday'"),
        (("add", "a", "--budget", "4KiB"), "", "too small"),
        (("add", "missing.jsonl"), "", "there is no file 'missing.jsonl'"),
    ],
)  # fmt: skip
def test_an_error_is_one_clear_line_and_nothing_is_stored(
    db: Path, arguments: tuple[str, ...], text: str, message: str
) -> None:
    run(db, "add", "Hello.")
    done = run(db, *arguments, text=text, expect=2)
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("memwise: ")
    assert len(done.stderr.splitlines()) == 1
    assert rows(run(db, "stats", "--json"))[0]["n_items"] == 1


def test_long_lists_are_read_page_by_page(db: Path) -> None:
    run(db, "add", "-", text="".join(f'{{"content": "P{i} moved to Rome."}}\n' for i in range(5)))
    whole = [row["id"] for row in rows(run(db, "facts", "--json"))]
    pages = [rows(run(db, "facts", "--k", "2", "--skip", str(n), "--json")) for n in (0, 2, 4, 6)]
    assert [row["id"] for page in pages for row in page] == whole
    assert [len(page) for page in pages] == [2, 2, 1, 0]


def test_bytes_that_are_no_text_are_refused(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "picture.bin"
    path.write_bytes(b"\x89PNG\xff\xfe")
    assert "not UTF-8" in run(db, "add", str(path), expect=2).stderr
    assert not db.exists()


def test_reading_makes_no_file(db: Path) -> None:
    assert "no memory file" in run(db, "search", "tea", expect=2).stderr
    assert not db.exists()


def test_a_file_that_is_no_memory_is_refused(db: Path) -> None:
    db.write_text("This is a letter. " * 100)
    assert "doctor" in run(db, "search", "tea", expect=2).stderr


def test_a_line_of_ten_megabytes_is_stored_in_chunks(db: Path) -> None:
    line = json.dumps({"content": "A long story. " * 750_000})
    receipt = rows(run(db, "add", "-", "--json", "--policy", "fifo", text=line))[0]
    assert len(receipt["ids"]) > 5000


def test_a_reader_that_goes_away_is_no_error(db: Path) -> None:
    lines = "".join(json.dumps({"content": f"tea {i} " + "x" * 1000}) + "\n" for i in range(300))
    run(db, "add", "-", text=lines)
    with subprocess.Popen(
        [sys.executable, "-m", "memwise.cli", "search", "tea", "--k", "300", "--json",
         "--db", str(db)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment(),
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for other processes")
def test_ctrl_c_while_adding_keeps_whole_items_only(db: Path) -> None:
    run(db, "add", "first")
    with subprocess.Popen(
        [sys.executable, "-m", "memwise.cli", "add", "-", "--db", str(db)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=_environment(),
        # A shell that runs this in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:  # fmt: skip
        assert running.stdin is not None
        assert running.stderr is not None
        running.stdin.write(b'{"content": "second"}\n')
        running.stdin.flush()
        # It waits for the end of stdin: nothing is stored before all of it was read and checked.
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(timeout=2)
        running.send_signal(signal.SIGINT)
        running.stdin.close()
        assert running.stderr.read() == b"memwise: interrupted\n"
        assert running.wait() == 130
    assert rows(run(db, "stats", "--json"))[0]["items"] == {"turn": 1}


def test_ctrl_c_between_parts_takes_the_first_parts_back(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(db, "add", "Hello.")
    ingest = Memory.ingest

    def interrupted(memory: Memory, adds: Any, now: int, call: int | None = None) -> Receipt:
        if call is not None:
            raise KeyboardInterrupt
        return ingest(memory, adds, now, call)

    monkeypatch.setattr(Memory, "ingest", interrupted)
    lines = "".join(json.dumps({"content": f"item {i}"}) + "\n" for i in range(1001))
    run(db, "add", "-", text=lines, expect=130)
    assert rows(run(db, "stats", "--json"))[0]["items"] == {"turn": 1}


# ---------------------------------------------------------------- chat


def test_chat_answers_lines_of_stdin_and_remembers_them(db: Path) -> None:
    talk = (
        "import memwise.models, memwise.cli\n"
        "from memwise.recall import chat\n"
        "class Echo:\n"
        "    def answer(self, text, recalled, recent):\n"
        "        yield from ('you said: ', text)\n"
        "memwise.models.local_model = Echo\n"
        "memwise.cli.main()\n"
    )
    done: Any = subprocess.run(
        [sys.executable, "-W", "error", "-c", talk, "chat", "--json", "--db", str(db),
         "--embedder", "none"],
        input="I like tea.\n", capture_output=True, text=True, env=_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rows(done) == [{"said": "I like tea.", "answer": "you said: I like tea."}]
    assert "Gemma Terms of Use" in done.stderr
    said = [hit["text"] for hit in rows(run(db, "search", "tea", "--json"))]
    assert "you said: I like tea." in said


# ---------------------------------------------------------------- files of others, and repairs


def test_an_export_is_imported_again_to_the_same_bytes(db: Path, tmp_path: Path) -> None:
    run(db, "add", "Ana moved to Lisbon.", "--at", "2026-05-02", "--meta", '{"ref": 7}')
    exported = run(db, "export").stdout
    path = tmp_path / "export.jsonl"
    path.write_text(exported, "utf-8")
    for name, arguments in (("file.db", (str(path),)), ("stdin.db", ("-",))):
        copy = tmp_path / name
        run(copy, "import", *arguments, "--embedder", "none", text=exported)
        assert run(copy, "export").stdout == exported


def test_what_cannot_be_imported_is_said(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    path.write_text("[1, 2]")
    assert "nothing that memwise can import" in run(db, "import", str(path), expect=2).stderr
    assert "no file or folder" in run(db, "import", str(tmp_path / "no"), expect=2).stderr
    assert "use auto, memwise" in run(db, "import", str(path), "--format", "x", expect=2).stderr


def test_doctor_examines_repairs_and_embeds_anew(db: Path) -> None:
    run(db, "add", "I like tea.")
    assert "sound" in _run("doctor", str(db)).stdout
    found = rows(_run("doctor", str(db), "--json"))[0]
    assert (found["ok"], found["embedder"]) == (True, "none/0")
    assert _run("doctor", str(db), "--repair").stdout
    _run("doctor", str(db), "--reembed", "--embedder", "ngrams")
    assert rows(_run("doctor", str(db), "--json"))[0]["embedder"].startswith("ngrams")
    assert "I like tea." in run(db, "search", "tea").stdout


def run(db: Path, *arguments: str, text: str = "", expect: int = 0) -> Done:
    """The command on one file; a new file is made without vectors."""
    made = ["--embedder", "none"] if arguments[0] == "add" and not db.exists() else []
    return _run(*arguments, "--db", str(db), *made, text=text, expect=expect)


def rows(done: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.split("\n") if line]


def _run(
    *arguments: str, text: str | bytes = "", expect: int = 0, env: dict[str, str] | None = None
) -> Done:
    """Run the command in this process, with streams that are no terminals."""
    given = text.encode() if isinstance(text, str) else text
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["memwise", *arguments]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), "utf-8")),
        mock.patch.dict(os.environ, env or {}),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        cli.main()
    assert end.value.code == expect, err.getvalue()
    return Done(expect, out.getvalue(), err.getvalue())


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SRC), "PYTHONIOENCODING": "utf-8"}
