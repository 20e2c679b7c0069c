"""What holds for every method of every room; a new policy is found here by itself.

The rules are plain functions that return what is wrong, so that the tests at the end can show that
each of them bites.
"""

import ast
import dataclasses
import inspect
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memwise import catalogue
from memwise.catalogue import PACKAGE, Card, Entry
from memwise.errors import InvalidKnob, UnknownMethod

ENTRIES = catalogue.cards()
ROOMS = ("recall", "context", "layers", "train", "weights", "learn", "detail", "plan", "bench")
SEES_ALL = {"bench", "plan", "serve", "cli", "cli_memory"}
KINDS = {"method", "baseline", "control", "benchmark", "study"}
LONGEST, TYPICAL = 200, 90  # lines of a method's file

each_method = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)


# --- the cards


@each_method
def test_the_card_on_the_class_is_the_card_that_is_read(entry: Entry) -> None:
    names = [field.name for field in dataclasses.fields(Card)]
    assert _class(entry).card == Card(**{name: getattr(entry, name) for name in names})


@each_method
def test_a_card_points_at_things_that_exist(entry: Entry) -> None:
    assert wrong_card(entry) == []


@each_method
def test_a_reason_for_a_negative_result_stands_beside_a_measured_one(entry: Entry) -> None:
    if entry.negative:
        assert catalogue.state(entry) in ("negative result", "stale")


def test_class_names_are_unique_in_a_room() -> None:
    named = [(entry.room, entry.class_name) for entry in ENTRIES]
    assert len(named) == len(set(named))


def test_all_evidence_belongs_to_a_method() -> None:
    owners = {entry.results_path for entry in ENTRIES}
    assert set(PACKAGE.glob("results/*/*.jsonl")) <= owners


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("results/*/*.jsonl")), ids=lambda p: p.stem)
def test_evidence_holds_no_path_of_a_machine(path: Path) -> None:
    assert not re.search(r"/(home|root|tmp|Users|work)/|[A-Z]:\\\\", path.read_text("utf-8"))


# --- the files


@each_method
def test_a_method_fits_one_short_file(entry: Entry) -> None:
    assert len(entry.path.read_text("utf-8").splitlines()) <= LONGEST


def test_a_typical_method_is_shorter_still() -> None:
    lengths = [len(entry.path.read_text("utf-8").splitlines()) for entry in ENTRIES]
    assert statistics.median(lengths or [0]) <= TYPICAL


@each_method
def test_a_method_sees_its_engine_and_little_else(entry: Entry) -> None:
    assert wrong_imports(entry.path.read_text("utf-8"), entry) == []


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_do_not_import_each_other(room: str) -> None:
    others = {other for other in ROOMS if other != room}
    for path in (PACKAGE / room).rglob("*.py") if room not in SEES_ALL else ():
        seen = {module.split(".")[1] for module in _imports(path) if module.count(".")}
        assert not seen & (others | SEES_ALL), path.relative_to(PACKAGE)


def test_no_file_swallows_every_error() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ExceptHandler) and not _raises_again(node):
                caught = ast.unparse(node.type) if node.type else "everything"
                where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                assert caught not in ("everything", "Exception", "BaseException"), where


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not [
        *PACKAGE.rglob("util*.py"),
        *PACKAGE.rglob("helper*.py"),
        *PACKAGE.rglob("misc*.py"),
    ]


# --- the knob objects


@each_method
def test_a_method_is_a_frozen_dataclass_that_needs_no_arguments(entry: Entry) -> None:
    assert wrong_dataclass(_class(entry)) == []


@each_method
def test_the_docstring_covers_exactly_the_knobs(entry: Entry) -> None:
    assert wrong_docs(_class(entry)) == []


@each_method
def test_load_gives_the_class(entry: Entry) -> None:
    assert _class(entry).__module__ == entry.module


# --- the rules


def wrong_card(entry: Entry) -> list[str]:
    """List what a card says that is not so."""
    about = {paper.id: paper for paper in catalogue.papers()}
    wrong = []
    if entry.paper is not None:
        if entry.paper not in about:
            wrong.append(f"paper {entry.paper} is not in papers.tsv")
        elif about[entry.paper].room != entry.room:
            wrong.append(f"paper {entry.paper} belongs to room {about[entry.paper].room}")
        if not re.search(r"\d", entry.claim):
            wrong.append("the claim holds no number")
    if entry.kind not in KINDS:
        wrong.append(f"kind {entry.kind!r} is none of {sorted(KINDS)}")
    if entry.better not in ("higher", "lower"):
        wrong.append(f"better {entry.better!r} is neither 'higher' nor 'lower'")
    if entry.margin < 0:
        wrong.append("the margin is negative")
    if not entry.check_path.exists():
        wrong.append(f"there is no check {entry.check!r}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", entry.name):
        wrong.append(f"the file name {entry.name!r} is not in snake case")
    wrong += [
        f"there is no extra {extra!r}" for extra in entry.requires if extra not in catalogue._PROOF
    ]
    try:
        catalogue.find(f"{entry.room}/{entry.baseline}")
    except UnknownMethod as miss:
        wrong.append(f"baseline: {miss}")
    return wrong


def wrong_imports(source: str, entry: Entry) -> list[str]:
    """List the imports of a method's file that it may not have."""
    room = f"memwise.{entry.room}.engine"
    allowed = (room, "memwise.budget", "memwise.codec", "memwise.catalogue", "memwise.errors")
    wrong = []
    for module in _imports_of(source):
        parts = module.split(".")
        if parts[0] == "memwise":
            if not any(module == prefix or module.startswith(f"{prefix}.") for prefix in allowed):
                wrong.append(module)
        elif parts[0] == "torch" and "torch" not in entry.requires:
            wrong.append(f"{module}, without requires=('torch',)")
        elif parts[0] not in sys.stdlib_module_names | {"numpy", "torch", "transformers"}:
            wrong.append(module)
    ladders = [node for node in ast.walk(ast.parse(source)) if _is_ladder(node)]
    return wrong + [f"import ladder in line {node.lineno}" for node in ladders]


def wrong_dataclass(method: type[Any]) -> list[str]:
    """List what keeps a class from being a knob object."""
    if not dataclasses.is_dataclass(method):
        return ["not a dataclass"]
    wrong = []
    if not method.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        wrong.append("not frozen")
    try:
        instance = method()
    except TypeError as problem:
        return [*wrong, f"not default-constructible: {problem}"]

    if eval(repr(instance), {method.__name__: method}) != instance:
        wrong.append("its repr does not build it again")
    if hash(instance) != hash(method()):
        wrong.append("equal objects hash differently")
    if dataclasses.replace(instance) != instance:
        wrong.append("a copy differs")
    return wrong


def wrong_docs(method: type[Any]) -> list[str]:
    """List knobs without docs, docs without a knob, and a first line that is too long."""
    documented: dict[str, str] = {}
    for base in reversed(method.__mro__):
        # A dataclass without a docstring is given its signature for one.
        if base.__doc__ and not base.__doc__.startswith(f"{base.__name__}("):
            documented |= catalogue.attributes(inspect.cleandoc(base.__doc__))
    knobs = {field.name for field in dataclasses.fields(method)}
    own = catalogue.attributes(inspect.getdoc(method) or "")
    first = (inspect.getdoc(method) or "").partition("\n")[0]

    wrong = [f"{name} is not in Attributes" for name in sorted(knobs - documented.keys())]
    wrong += [f"{name} in Attributes is no knob" for name in sorted(own.keys() - knobs)]
    wrong += [f"{name} has no text" for name, text in own.items() if not text]
    if not first.endswith(".") or len(first) > 100:
        wrong.append("the first line is no sentence of at most 100 characters")
    return wrong


def _class(entry: Entry) -> type[Any]:
    for extra in entry.requires:
        pytest.importorskip(catalogue._PROOF[extra])
    return catalogue.load(entry.key)


def _imports(path: Path) -> Iterator[str]:
    return _imports_of(path.read_text("utf-8"))


def _imports_of(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from memwise import serve` is an import of memwise.serve.
            if module == "memwise":
                yield from (f"memwise.{alias.name}" for alias in node.names)
            else:
                yield module


def _raises_again(handler: ast.ExceptHandler) -> bool:
    # To roll back and go on raising swallows nothing.
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def _is_ladder(node: ast.AST) -> bool:
    return isinstance(node, ast.Try) and any(
        isinstance(inner, ast.Import | ast.ImportFrom)
        for statement in node.body
        for inner in ast.walk(statement)
    )


# --- the rules bite


@dataclasses.dataclass(frozen=True)
class _Good:
    """Keep everything.

    Attributes:
        share: what is kept, as a ratio.
    """

    share: float = 0.5


class _Plain:
    pass


@dataclasses.dataclass
class _Thawed:
    share: float = 0.5

    def __hash__(self) -> int:
        return hash(self.share)


@dataclasses.dataclass(frozen=True)
class _Demanding:
    share: float


@dataclasses.dataclass(frozen=True)
class _Opaque:
    share: float = 0.5

    def __repr__(self) -> str:
        return "_Opaque(share=0.25)"


def _entry(**changes: Any) -> Entry:
    given: dict[str, Any] = {
        "paper": 21,
        "claim": "2 times fewer tokens",
        "check": "no_such_check",
        "baseline": "no_such_baseline",
        "better": "higher",
        "margin": 0.1,
        "name": "a_mem",
        "room": "recall",
        "class_name": "AMem",
        "path": PACKAGE / "recall" / "policies" / "a_mem.py",
        "knobs": (),
        "doc": "Keep everything.",
        "about": None,
    }
    return Entry(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"paper": 999}, "paper 999 is not in papers.tsv"),
        ({"paper": 33}, "paper 33 belongs to room context"),
        ({"claim": "much better"}, "the claim holds no number"),
        ({"kind": "trick"}, "kind 'trick'"),
        ({"better": "more"}, "better 'more'"),
        ({"margin": -0.1}, "the margin is negative"),
        ({"name": "A-MEM"}, "not in snake case"),
        ({"requires": ("jax",)}, "there is no extra 'jax'"),
        ({}, "there is no check 'no_such_check'"),
        ({}, "baseline: no method 'recall/no_such_baseline'"),
    ],
)
def test_a_wrong_card_is_found(changes: dict[str, Any], complaint: str) -> None:
    assert any(complaint in wrong for wrong in wrong_card(_entry(**changes)))


@pytest.mark.parametrize(
    "source",
    [
        "import memwise.serve.rest",
        "from memwise import bench",
        "from memwise.context.engine import Step",
        "from memwise.recall.memory import Memory",
        "from memwise.recall.policies.zep import Zep",
        "from .zep import Zep",
        "import requests",
        "import torch",
        "def late():\n    from memwise.models import local_model",
        "try:\n    import numpy\nexcept ImportError:\n    numpy = None",
    ],
)
def test_an_import_too_many_is_found(source: str) -> None:
    assert wrong_imports(source, _entry())


@pytest.mark.parametrize(
    "source",
    [
        "from memwise.recall.engine.records import Item",
        "from memwise.recall.engine import fuse",
        "from memwise.catalogue import Card",
        "from memwise.codec.np import sign",
        "from dataclasses import dataclass\nimport numpy as np",
    ],
)
def test_what_a_method_needs_is_allowed(source: str) -> None:
    assert wrong_imports(source, _entry()) == []


def test_a_good_knob_object_passes() -> None:
    assert wrong_dataclass(_Good) == wrong_docs(_Good) == []


def test_an_object_that_is_no_frozen_dataclass_is_found() -> None:
    assert wrong_dataclass(_Plain) == ["not a dataclass"]
    assert wrong_dataclass(_Thawed) == ["not frozen"]
    assert "not default-constructible" in wrong_dataclass(_Demanding)[0]
    assert wrong_dataclass(_Opaque) == ["its repr does not build it again"]


def test_a_knob_without_docs_and_docs_without_a_knob_are_found() -> None:
    @dataclasses.dataclass(frozen=True)
    class Silent(_Good):
        """Keep more

        Attributes:
            less: nothing.
            share:
        """

        more: int = 1

    assert wrong_docs(Silent) == [
        "more is not in Attributes",
        "less in Attributes is no knob",
        "share has no text",
        "the first line is no sentence of at most 100 characters",
    ]


def test_a_card_refuses_arguments_that_are_no_literals(tmp_path: Path) -> None:
    path = tmp_path / "recall" / "policies" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("class X:\n    card = Card(1, CLAIM, 'c', 'b', 'higher', 0.1)\n")
    (tmp_path / "papers.tsv").write_text("id\n")
    with pytest.raises(InvalidKnob, match="literals"):
        catalogue.cards(tmp_path)
