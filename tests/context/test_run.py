"""Reading a long text inside a budget and writing on: the library's and the command's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from typer.testing import CliRunner  # noqa: E402

from memwise.cli import app  # noqa: E402
from memwise.context.run import answer  # noqa: E402
from memwise.errors import BudgetExceeded, InvalidKnob  # noqa: E402
from memwise.models import local_model  # noqa: E402

TEXT = "the river ran under the old bridge and nobody knew its name"


@pytest.fixture(scope="module")
def lm(byte_llama: Path) -> Any:
    return local_model(byte_llama)


def plain(lm: Any, text: str, n_tokens: int) -> str:
    ids = torch.tensor([lm.tokenizer(text).input_ids])
    out = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False
    )
    return str(lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("question", ["", "who ran?"])
def test_a_budget_for_all_writes_what_the_model_writes(lm: Any, question: str) -> None:
    pieces: list[str] = []
    found = answer(lm, TEXT, "1MiB", question=question, n_tokens=9, chunk=8, told=pieces.append)
    assert found.text == plain(lm, TEXT + (f"\n\n{question}" if question else ""), 9)
    assert "".join(pieces) == found.text
    assert found.n_tokens == len(TEXT) + (len(question) + 2 if question else 0)


def test_a_small_budget_holds_and_progress_is_told(lm: Any) -> None:
    read: list[tuple[int, int]] = []
    found = answer(
        lm, 2 * TEXT, "40KiB", n_tokens=3, chunk=2, policy="streaming_llm",
        read=lambda done, of: read.append((done, of)),
    )  # fmt: skip
    assert sum(found.report.held_bytes.values()) <= 40 * 1024 < found.report.full_bytes
    assert read == [(n, 2 * len(TEXT)) for n in (32, 64, 96, 2 * len(TEXT) - 1)]


def test_bad_input_says_what_to_do(lm: Any) -> None:
    with pytest.raises(InvalidKnob, match="empty"):
        answer(lm, " \n", "1MiB")
    with pytest.raises(InvalidKnob, match="at least one"):
        answer(lm, TEXT, "1MiB", n_tokens=0)
    with pytest.raises(InvalidKnob, match="no slots"):
        answer(lm, TEXT, "1MiB", policy="recall/memorybank")
    with pytest.raises(BudgetExceeded, match="raise budget"):
        answer(lm, TEXT, "1KiB")
    with pytest.raises(InvalidKnob, match="made for 128"):
        answer(lm, TEXT * 3, "1MiB")


def test_the_command_reads_a_file_or_stdin(byte_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    knobs = ["--budget", "1MiB", "--tokens", "4"]
    from_file = CliRunner().invoke(app, ["run", str(byte_llama), str(tmp_path / "text"), *knobs])
    from_stdin = CliRunner().invoke(app, ["run", str(byte_llama), "-", *knobs], input=TEXT)
    as_json = CliRunner().invoke(
        app, ["run", str(byte_llama), *knobs, "--json", "--codec", "int8/row"], input=TEXT
    )
    assert from_file.exit_code == from_stdin.exit_code == as_json.exit_code == 0
    assert from_file.stdout == from_stdin.stdout
    assert "without a budget" in from_file.stderr
    record = json.loads(as_json.stdout)
    assert record["tokens"] == len(TEXT)
    assert record["n_seen"] >= len(TEXT)


def test_the_command_refuses_what_is_no_text(byte_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path, says in ((tmp_path / "none", "no file"), (tmp_path / "bytes", "UTF-8")):
        found = CliRunner().invoke(app, ["run", str(byte_llama), str(path)])
        assert isinstance(found.exception, InvalidKnob)
        assert says in str(found.exception)
