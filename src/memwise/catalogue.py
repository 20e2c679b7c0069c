"""Every method, declared once: its card stands in its own file and is read here without importing.

`papers.tsv` (the papers) joined with the cards (what is built) joined with `results/` (what was
measured) gives `methods()`. CLI, docs, tests and bench read these, so nothing else lists methods.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from memwise.errors import InvalidKnob, MissingExtra, UnknownMethod

PACKAGE = Path(__file__).parent

# Best evidence first: a paper that several cards carry takes the first of their states.
STATES = ("effect shown", "negative result", "stale", "built", "page only", "planned")

# The module that proves an extra of pyproject.toml to be installed.
_PROOF = {
    "torch": "torch",
    "embed": "onnxruntime",
    "serve": "fastapi",
    "postgres": "psycopg",
    "bench": "matplotlib",
    "plan": "scipy",
}


@dataclass(frozen=True)
class Card:
    """What a method promises and how that is checked; written with literals in the method's file.

    Attributes:
        paper: id in `papers.tsv`; None for baselines and controls.
        claim: the paper's own number, in its words.
        check: name of a file in `bench/checks`.
        baseline: name of the card it is measured against.
        better: direction in which the check's primary metric improves.
        margin: distance from the baseline that counts as the effect, in units of that metric.
        requires: extras that must be installed, as pyproject.toml names them.
        negative: why the effect does not show, where it honestly does not.
        kind: "method", or what the card stands for instead ("baseline", "control", "benchmark").
    """

    paper: int | None
    claim: str
    check: str
    baseline: str
    better: Literal["higher", "lower"]
    margin: float
    requires: tuple[str, ...] = ()
    negative: str = ""
    kind: str = "method"


@dataclass(frozen=True)
class Knob:
    """One field of a method's dataclass: name, type and default as source, and its docs."""

    name: str
    type: str
    default: str
    doc: str


@dataclass(frozen=True)
class Paper:
    """One line of `papers.tsv`; `arxiv` and `year` are empty where they could not be confirmed."""

    id: int
    room: str
    family: str
    name: str
    kind: str
    title: str
    arxiv: str
    year: int | None

    @property
    def link(self) -> str:
        """Address of the abstract; empty without an arXiv id."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


@dataclass(frozen=True, kw_only=True)
class Entry(Card):
    """A card as read from its file, with all that follows from where it stands.

    Attributes:
        name: file name without its ending.
        room: folder that holds `policies`.
        class_name: the class that carries the card.
        path: the method's file.
        knobs: the dataclass fields that the class itself declares.
        doc: docstring of the class.
        about: the paper, where there is one.
    """

    name: str
    room: str
    class_name: str
    path: Path
    knobs: tuple[Knob, ...]
    doc: str
    about: Paper | None

    @property
    def key(self) -> str:
        """`room/name`, unique in the package."""
        return f"{self.room}/{self.name}"

    @property
    def module(self) -> str:
        """Dotted name of the method's module."""
        return f"memwise.{self.room}.policies.{self.name}"

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return self.doc.partition("\n")[0]

    @property
    def check_path(self) -> Path:
        """The file that holds the check."""
        return self.path.parents[2] / "bench" / "checks" / f"{self.check}.py"

    @property
    def results_path(self) -> Path:
        """Where the recorded rows of this method lie."""
        return self.path.parents[2] / "results" / self.room / f"{self.name}.jsonl"


@dataclass(frozen=True)
class Method:
    """One paper with what is built of it: a row of `memwise methods`.

    Attributes:
        paper: id in `papers.tsv`.
        name: the paper's short name.
        room: folder that it belongs to.
        state: one of `STATES`.
        methods: keys (`room/name`) of the cards that carry the paper.
        about: the whole line of `papers.tsv`.
        cards: those cards.
    """

    paper: int
    name: str
    room: str
    state: str
    methods: tuple[str, ...]
    about: Paper
    cards: tuple[Entry, ...]


def methods(package: Path = PACKAGE) -> list[Method]:
    """Return all papers in the order of `papers.tsv`, each with its cards and its state."""
    found = cards(package)
    listing = []

    for paper in papers(package):
        carriers = tuple(entry for entry in found if entry.paper == paper.id)
        states = {state(entry) for entry in carriers} or {_without_card(paper)}
        listing.append(
            Method(
                paper=paper.id,
                name=paper.name,
                room=paper.room,
                state=min(states, key=STATES.index),
                methods=tuple(entry.key for entry in carriers),
                about=paper,
                cards=carriers,
            )
        )
    return listing


def papers(package: Path = PACKAGE) -> list[Paper]:
    """Read `papers.tsv`."""
    with (package / "papers.tsv").open(encoding="utf-8", newline="") as lines:
        return [
            Paper(
                id=int(line["id"]),
                room=line["room"],
                family=line["family"],
                name=line["name"],
                kind=line["kind"],
                title=line["title"],
                arxiv=line["arxiv"],
                year=int(line["year"]) if line["year"] else None,
            )
            for line in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]


def cards(package: Path = PACKAGE) -> list[Entry]:
    """Read the card of every method file, sorted by key, without importing any of them.

    Raises:
        InvalidKnob: when a file holds no card, more than one, or one that is not literal.
    """
    about = {paper.id: paper for paper in papers(package)}
    return [_read(path, about) for path in sorted(_files(package, "*"))]


def find(name: str, package: Path = PACKAGE) -> Entry:
    """Return the entry of a method by key (`room/name`), or by bare name when that is unique.

    Raises:
        UnknownMethod: on a miss, with near names; on a bare name that two rooms have.
    """
    room, _, bare = name.rpartition("/")
    # A name is matched, never used as a pattern or a path.
    paths = [
        path for path in _files(package, "*") if path.stem == bare and room in ("", path.parts[-3])
    ]
    if len(paths) == 1:
        return _read(paths[0], {paper.id: paper for paper in papers(package)})

    if paths:
        keys = ", ".join(f"{path.parts[-3]}/{path.stem}" for path in sorted(paths))
        raise UnknownMethod(f"method {name!r} stands in several rooms; write one of {keys}")
    raise UnknownMethod(_missing(name, package))


def load(name: str, package: Path = PACKAGE) -> type[Any]:
    """Import the class of a method.

    Raises:
        UnknownMethod: when there is none of that name.
        MissingExtra: when an extra that its card requires is not installed.
    """
    entry = find(name, package)
    need(*entry.requires, what=entry.key)
    loaded: type[Any] = getattr(importlib.import_module(entry.module), entry.class_name)
    return loaded


def need(*extras: str, what: str) -> None:
    """Stop with the command to type when `what` wants extras that are not installed.

    Raises:
        MissingExtra: on the first extra whose module cannot be found.
    """
    for extra in extras:
        if importlib.util.find_spec(_PROOF.get(extra, extra)) is None:
            raise MissingExtra(
                f"{what} needs the extra {extra!r}, which is not installed; "
                f"run: pip install 'memwise[{extra}]'"
            )


def export(room: str, where: Mapping[str, tuple[str, ...]], name: str) -> Any:
    """Import a public name of a room on its first use; the body of each room's `__getattr__`.

    Args:
        room: dotted name of the room's package.
        where: public name -> (module that holds it, extras that module needs...).
        name: the attribute asked for.

    Raises:
        AttributeError: when the room has no such name.
        MissingExtra: when an extra of that module is not installed.
    """
    if name not in where:
        raise AttributeError(f"module {room!r} has no attribute {name!r}")
    module, *extras = where[name]
    need(*extras, what=f"{room}.{name}")
    return getattr(importlib.import_module(module), name)


def rows(entry: Entry) -> list[dict[str, Any]]:
    """Read the recorded rows of a method, current or stale; empty where there are none."""
    if not entry.results_path.exists():
        return []
    return [json.loads(line) for line in entry.results_path.read_text("utf-8").splitlines()]


def is_current(entry: Entry, recorded: Iterable[Mapping[str, Any]]) -> bool:
    """Say whether rows were measured with the code as it stands now."""
    return {row["code"] for row in recorded} == {code_hash(entry)}


def effect_shown(card: Card, recorded: Iterable[Mapping[str, Any]]) -> bool:
    """Judge rows: every primary interval lies beyond the margin and all controls behave.

    Rows are mappings with `interval` (ends of value - baseline), `primary` and `behaves`.
    """
    recorded = list(recorded)
    primary = [row for row in recorded if row["primary"]]
    return (
        bool(primary)
        and all(_beyond(card, row["interval"]) for row in primary)
        and all(all(row["behaves"].values()) for row in recorded)
    )


def state(entry: Entry) -> str:
    """Return how far the evidence of one card goes: one of `STATES`."""
    recorded = rows(entry)
    if not recorded:
        return "built"
    if not is_current(entry, recorded):
        return "stale"
    if effect_shown(entry, recorded):
        return "effect shown"
    return "negative result" if entry.negative else "built"


def code_hash(entry: Entry) -> str:
    """Return the sha256 of the code of a method and of its check, in hex.

    Comments, docstrings, layout and the card's prose (`claim`, `negative`) do not count: none of
    them changes a measurement. `margin` does, so that moving it after the run shows.
    """
    digest = hashlib.sha256()
    for path in (entry.path, entry.check_path):
        source = path.read_text("utf-8") if path.exists() else ""
        digest.update(_skeleton(ast.parse(source)).encode() + b"\0")
    return digest.hexdigest()


def _beyond(card: Card, interval: Iterable[float]) -> bool:
    low, high = interval
    return low > card.margin if card.better == "higher" else high < -card.margin


def _without_card(paper: Paper) -> str:
    # The room `docs` has no code: what stands there gets a page and never a card.
    return "page only" if paper.kind in ("survey", "study") or paper.room == "docs" else "planned"


def _files(package: Path, room: str) -> Iterator[Path]:
    return (path for path in package.glob(f"{room}/policies/*.py") if path.stem != "__init__")


def snake(name: str) -> str:
    """Turn a paper's name into the name its file has: `A-MEM` -> `a_mem`."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _missing(name: str, package: Path) -> str:
    wanted = snake(name.rpartition("/")[2])
    for paper in papers(package):
        if snake(paper.name) == wanted:
            return (
                f"no method {name!r}: {paper.name} (paper {paper.id}, room {paper.room}) has none "
                f"of that name; `memwise methods {paper.name}` says how far it is"
            )
    names = sorted({path.stem for path in _files(package, "*")})
    near = get_close_matches(wanted, names, 3)
    hint = f"near names: {', '.join(near)}" if near else "`memwise methods` lists all of them"
    return f"no method {name!r}; {hint}"


def _read(path: Path, about: Mapping[int, Paper]) -> Entry:
    carriers = [
        (node, call)
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef)
        for call in _card_calls(node)
    ]
    if len(carriers) != 1:
        raise InvalidKnob(
            f"{path} holds {len(carriers)} cards; "
            "write `card = Card(...)` in exactly one class of a method's file"
        )
    node, call = carriers[0]
    arguments = _literals(path, call)
    doc = ast.get_docstring(node) or ""

    return Entry(
        **arguments,
        name=path.stem,
        room=path.parts[-3],
        class_name=node.name,
        path=path,
        knobs=tuple(_knobs(node, doc)),
        doc=doc,
        about=about.get(arguments["paper"]),
    )


def _card_calls(node: ast.ClassDef) -> Iterator[ast.Call]:
    for statement in node.body:
        match statement:
            case ast.Assign(
                targets=[ast.Name("card")], value=ast.Call(func=ast.Name("Card")) as call
            ):
                yield call


def _literals(path: Path, call: ast.Call) -> dict[str, Any]:
    names = [field.name for field in fields(Card)]
    given = dict(zip(names, call.args, strict=False))
    given |= {keyword.arg or "**": keyword.value for keyword in call.keywords}
    wrong = sorted(given.keys() - set(names))
    missing = [name for name in names[:6] if name not in given]
    if wrong or missing:
        raise InvalidKnob(
            f"{path}:{call.lineno}: card has unknown arguments {wrong}, lacks {missing}; "
            f"it takes {', '.join(names)}"
        )
    try:
        return {name: ast.literal_eval(value) for name, value in given.items()}
    except ValueError as problem:
        raise InvalidKnob(
            f"{path}:{call.lineno}: card arguments must be literals ({problem})"
        ) from problem


def _knobs(node: ast.ClassDef, doc: str) -> Iterator[Knob]:
    docs = attributes(doc)
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(name), annotation=annotation, value=value):
                kind = ast.unparse(annotation)
                if not kind.startswith("ClassVar"):
                    default = "" if value is None else ast.unparse(value)
                    yield Knob(name, kind, default, docs.get(name, ""))


def attributes(doc: str) -> dict[str, str]:
    """Read the `Attributes:` section of a Google-style docstring: name -> text, on one line."""
    section = re.search(r"^Attributes:\n((?:[ \t]+.*\n|\n)*)", doc + "\n", re.MULTILINE)
    found: dict[str, str] = {}
    name = ""

    for line in section[1].splitlines() if section else ():
        start = re.match(r" {4}(\w+)(?: \(.*?\))?:\s*(.*)", line)
        if start:
            name, text = start.groups()
            found[name] = text
        elif line.strip() and name:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _skeleton(node: Any) -> str:
    """Write a tree without docstrings, prose and empty fields.

    `ast.dump` would do but for its text, which differs between Python versions: a release that adds
    an empty field would turn every row stale.
    """
    if isinstance(node, list):
        return f"[{','.join(_skeleton(item) for item in node)}]"
    if not isinstance(node, ast.AST):
        return repr(node)

    parts = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list):
            value = [item for item in value if not _is_text(item)]
        if name == "keywords" and isinstance(node, ast.Call) and _is_card(node):
            value = [item for item in value if item.arg not in ("claim", "negative")]
        if value is not None and value != [] and name not in ("ctx", "kind"):
            parts.append(f"{name}={_skeleton(value)}")
    return f"{type(node).__name__}({','.join(parts)})"


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _is_card(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "Card"
