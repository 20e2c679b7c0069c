import ast
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import memwise
import memwise.recall
from memwise import catalogue, errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "memwise"

# What a bare import must not pay for: torch, servers, model runtimes, the database, even numpy.
HEAVY = {
    "fastapi",
    "httpx",
    "matplotlib",
    "mcp",
    "numpy",
    "onnxruntime",
    "pydantic",
    "rich",
    "sqlite3",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
    "uvicorn",
}
OPTIONAL = HEAVY - {"numpy", "sqlite3", "rich", "typer"}


def test_the_public_names_are_these() -> None:
    assert memwise.__all__ == ["Budget", "Memory", "__version__", "methods"]
    assert set(memwise.__all__) <= set(dir(memwise))
    assert re.fullmatch(r"\d+\.\d+\.\d+", memwise.__version__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Memories'"):
        memwise.Memories  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Memories'"):
        memwise.recall.Memories  # noqa: B018


def test_importing_memwise_imports_nothing_heavy() -> None:
    assert _loaded("import memwise; memwise.methods()") & HEAVY == set()


def test_importing_recall_imports_nothing_optional() -> None:
    assert _loaded("import memwise.recall") & OPTIONAL == set()


def test_every_name_of_recall_loads_where_torch_is_blocked() -> None:
    blocked = """
        import memwise.recall
        from memwise.errors import MissingExtra
        for name in memwise.recall.__all__:
            extras = memwise.recall._WHERE[name][1:]
            try:
                getattr(memwise.recall, name)
            except MissingExtra as problem:
                assert "torch" in extras, (name, problem)
                assert "pip install 'memwise[torch]'" in str(problem)
            else:
                assert "torch" not in extras, name
    """
    _python("import sys; sys.modules['torch'] = None\n" + inspect.cleandoc(blocked))


def test_all_methods_are_listed_where_every_extra_is_blocked() -> None:
    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(OPTIONAL)}))"
    assert _python(f"{block}; import memwise; print(len(memwise.methods()))") == "210\n"


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn = re.findall(r"^(│? *[├└]── )?(\w+)(?: \((\w+)\))?", errors.__doc__ or "", re.MULTILINE)
    tree = [(len(stem), name, second) for stem, name, second in drawn if hasattr(errors, name)]
    classes = dict(inspect.getmembers(errors, inspect.isclass))
    assert {name for _, name, _ in tree} == set(classes)

    parents = {0: Exception}
    for depth, name, second in tree:
        parent = parents[max(level for level in parents if level < depth)] if depth else Exception
        bases = [parent.__name__, *([second] if second else [])]
        assert [base.__name__ for base in classes[name].__bases__] == bases
        parents = {level: kind for level, kind in parents.items() if level < depth}
        parents[depth] = classes[name]


def test_a_message_prints_as_it_was_written() -> None:
    assert str(errors.UnknownMethod("no method 'x'; near names: y")) == (
        "no method 'x'; near names: y"
    )
    assert isinstance(errors.UnknownMethod("x"), KeyError)


def test_every_extra_is_known_by_the_module_that_proves_it() -> None:
    extras = _project()["optional-dependencies"]
    assert set(extras) - {"all", "dev", "demo"} == set(catalogue._PROOF)
    assert extras["all"] == [f"memwise[{','.join(catalogue._PROOF)}]"]


def test_every_dependency_is_pinned_to_a_version_it_allows() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {_normal(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert list(versions) == sorted(versions)

    extras = _project()["optional-dependencies"]
    wanted = [*_project()["dependencies"], *(line for lines in extras.values() for line in lines)]
    for requirement in map(Requirement, wanted):
        if requirement.name != "memwise":
            assert requirement.specifier.contains(versions[_normal(requirement.name)])


def test_what_the_dependencies_want_is_pinned_too() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {_normal(line.partition("==")[0]) for line in lines}
    for name in sorted(pins):
        for line in _requires(name):
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert _normal(needed.name) in pins, f"{name} needs {needed.name}"


def test_the_generated_exports_are_those_of_the_files() -> None:
    classes = {entry.class_name for entry in catalogue.cards() if entry.room == "recall"}
    assert set(memwise.recall.__all__) == {"Context", "Hit", "Memory", "Receipt", *classes}


# --- the command


def test_every_row_of_methods_is_one_line_of_json() -> None:
    done = _memwise("methods", "--json")
    listed = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(listed) == 210
    assert all(list(row) == ["paper", "name", "room", "state", "methods"] for row in listed)


def test_methods_are_chosen_by_room_and_glob() -> None:
    done = _memwise("methods", "--room", "recall", "--json", "*mem*")
    listed = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"A-MEM", "MemGPT", "MemoryBank"} <= {row["name"] for row in listed}
    assert {row["room"] for row in listed} == {"recall"}


def test_a_paper_without_a_method_can_be_shown() -> None:
    done = _memwise("show", "humanlike-cognitive-patterns", "--json")
    shown = json.loads(done.stdout)
    assert (shown["id"], shown["state"], shown["arxiv"]) == (58, "page only", "2412.15501")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "no_such_method"), "no method 'no_such_method'"),
        (("check", "no_such_method"), "no method 'no_such_method'"),
        (("methods", "--room", "attic"), "no room 'attic'; the rooms are bench, context"),
        (("methods", "no_such_method"), "no paper or method is named 'no_such_method'"),
        (("bench", "attic"), "no side-by-side for room 'attic'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    done = _memwise(*arguments, expect=2)
    assert done.stdout == ""
    assert f"memwise: {message}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ad",), "no such command 'ad'. Did you mean 'add'? (see `memwise --help`)"),
        (("add",), "missing argument 'TEXT|FILE|-' (see `memwise add --help`)"),
        (("show", "x", "--nope"), "no such option: --nope (see `memwise show --help`)"),
        (("add", "x", "--db"), "option '--db' requires an argument (see `memwise add --help`)"),
        (("serve", "--port", "0"), "invalid value for '--port': "),
    ],
)
def test_a_wrong_command_line_is_one_line_that_points_to_the_help(
    arguments: tuple[str, ...], message: str
) -> None:
    done = _memwise(*arguments, expect=2)
    assert done.stdout == ""
    assert done.stderr.startswith(f"memwise: {message}")
    assert done.stderr.endswith("--help`)\n")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("show", "nonesuch", "--json"), "UnknownMethod"),
        (("show", "--json"), "UsageError"),
        (("get", "t1", "--db", "none.db", "--json"), "InvalidKnob"),
    ],
)
def test_with_json_an_error_is_json_too(arguments: tuple[str, ...], kind: str) -> None:
    done = _memwise(*arguments, expect=2)
    told = json.loads(done.stderr)
    assert told["error"] == kind
    assert set(told) == {"error", "message"}


def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    done = _memwise("bench", "recall", "--out", str(tmp_path), "--data", "/nonexistent", expect=2)
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("memwise: ")


def test_the_help_is_printed_where_nothing_was_asked() -> None:
    assert "Usage: memwise [OPTIONS] COMMAND" in _memwise(expect=2).stdout
    assert "Usage: memwise add [OPTIONS]" in _memwise("add", "--help").stdout


@pytest.mark.parametrize("coding", ["ascii", "cp1252"])
def test_a_pipe_carries_utf_8_whatever_the_locale(coding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memwise.cli", "show", "日本", "--json"],
        capture_output=True,
        env={**_environment(), "PYTHONIOENCODING": coding, "PYTHONUTF8": "0"},
    )
    assert "日本" in json.loads(done.stderr.decode("utf-8"))["message"]


def test_the_version_is_printed() -> None:
    assert _memwise("--version").stdout == f"memwise {memwise.__version__}\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "memwise.cli", "methods", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(),
        # A shell that runs this in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for other processes")
def test_ctrl_c_ends_with_one_line_and_130() -> None:
    wait = (
        "import time, memwise.cli\n"
        "@memwise.cli.app.command()\n"
        "def wait() -> None:\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(60)\n"
        "import sys; sys.argv = ['memwise', 'wait']\n"
        "memwise.cli.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", wait],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(),
        # A shell that runs this in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline().strip() == b"waiting"
        running.send_signal(signal.SIGINT)
        assert running.stderr.read() == b"memwise: interrupted\n"
    assert running.returncode == 130


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=_environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _loaded(code: str) -> set[str]:
    listed = _python(f"{code}\nimport sys; print(sorted(m for m in sys.modules if '.' not in m))")
    return set(ast.literal_eval(listed))


def _memwise(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "memwise.cli", *arguments],
        capture_output=True,
        text=True,
        env=_environment(),
    )
    assert done.returncode == expect, done.stderr
    return done


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _requires(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []  # an extra that is not installed here


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
