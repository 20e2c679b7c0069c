import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from memwise.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if page.exists()]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))

_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Words after ```python name the markers a block needs; without one it runs with every `make test`.
_MARKERS = ("model", "data", "slow", "gpu")


def _commands() -> Iterator[tuple[str, Any]]:
    group: Any = get_command(app)
    context = typer.Context(group, info_name="memwise")
    for name in group.list_commands(context):
        yield name, group.get_command(context, name)


def _blocks(page: Path, language: str) -> list[tuple[set[str], str]]:
    found = _FENCE.findall(page.read_text("utf-8"))
    return [(set(words.split()), code) for kind, words, code in found if kind == language]


def _stories() -> Iterator[Any]:
    """Yield each page's Python as one script a set of markers: later blocks see earlier ones."""
    for page in PAGES:
        blocks = _blocks(page, "python")
        for needs in sorted({tuple(sorted(words)) for words, _ in blocks}):
            script = "\n".join(code for words, code in blocks if words <= set(needs))
            marks = [getattr(pytest.mark, word) for word in needs]
            yield pytest.param(script, marks=marks, id=" ".join((page.name, *needs)))


def test_generated_pages_are_fresh() -> None:
    done = _run("scripts/sync.py", "--check", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "command"), list(_commands()))
def test_every_command_and_every_parameter_has_help(name: str, command: Any) -> None:
    assert command.help, name
    assert command.help.splitlines()[0].endswith((".", "?"))
    for parameter in command.params:
        assert getattr(parameter, "help", ""), f"{name} {parameter.name}"


@pytest.mark.parametrize("name", [name for name, _ in _commands()])
def test_every_command_is_documented(name: str) -> None:
    assert f"\n## memwise {name}\n" in (ROOT / "docs" / "cli.md").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_targets_that_pages_type_exist(page: Path) -> None:
    verbs = {name for name, _ in _commands()}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    typed = "\n".join(
        code for kind in ("console", "sh", "bash", "shell") for _, code in _blocks(page, kind)
    )
    lines = [line.removeprefix("$ ") for line in typed.splitlines()]
    for line in lines:
        if found := re.match(r"memwise ([a-z]+)", line):
            assert found[1] in verbs, line
        if found := re.match(r"make ([a-z]+)", line):
            assert found[1] in targets, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_name_only_known_markers(page: Path) -> None:
    for words, code in _blocks(page, "python"):
        assert words <= set(_MARKERS), code


@pytest.mark.parametrize("script", list(_stories()))
def test_python_in_pages_runs(script: str, tmp_path: Path) -> None:
    done = _run("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    done = _run(str(example), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, env=environment
    )
