import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from memwise import catalogue
from memwise.catalogue import Card, Entry
from memwise.errors import InvalidKnob, MissingExtra, UnknownMethod

PAPERS = """\
id\troom\tfamily\tname\tkind\ttitle\tarxiv\tyear
1\trecall\trecall\tA-MEM\tmethod\tA-MEM: Agentic Memory\t2502.12110\t2025
2\trecall\trecall\tCOAT\tmethod\tCOAT\t\t
3\tplan\tplan\tWall\tstudy\tThe Wall\t\t
4\tdocs\tsurvey\tReview\tsurvey\tA Review\t\t
"""
METHOD = '''\
from dataclasses import dataclass

from memwise.catalogue import Card


@dataclass(frozen=True)
class Remember:
    """Keep what is linked.

    More about it.

    Attributes:
        links: notes that one note may point to,
            in notes.
        ratio (float): share kept.

    Note:
        Not as in the paper.
    """

    card = Card(
        paper=1,
        claim="2 times "
        "better",
        check="locomo",
        baseline="fifo",
        better="higher",
        margin=0.1,
        requires=("torch",),
    )
    links: int = 5
    ratio: float = 1 / 3

    def keep(self, x: int) -> int:
        """Keep it."""
        return x + 1  # one more
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with two rooms, four papers and one method."""
    (tmp_path / "papers.tsv").write_text(PAPERS)
    _write(tmp_path, "recall/policies/a_mem.py", METHOD)
    _write(tmp_path, "bench/checks/locomo.py", "def run(method, data, seed):\n    return []\n")
    return tmp_path


def test_all_papers_are_listed_once_with_a_state() -> None:
    listing = catalogue.methods()
    assert [row.paper for row in listing] == list(range(1, 211))
    assert len({row.name for row in listing}) == 210
    assert {row.state for row in listing} <= set(catalogue.STATES)
    per_room = Counter(row.room for row in listing)
    assert (per_room["recall"], per_room["context"], per_room["layers"]) == (30, 25, 59)


def test_arxiv_ids_are_well_formed_unique_and_agree_with_the_year() -> None:
    papers = [paper for paper in catalogue.papers() if paper.arxiv]
    assert len({paper.arxiv for paper in papers}) == len(papers)
    for paper in papers:
        month, _, number = paper.arxiv.partition(".")
        assert len(month) == 4
        assert month.isdigit()
        assert number.isdigit()
        assert 1 <= int(month[2:]) <= 12
        assert paper.year == 2000 + int(month[:2])


def test_surveys_and_studies_are_pages_and_the_rest_is_planned() -> None:
    for row in catalogue.methods():
        if not row.cards:
            page = row.about.kind in ("survey", "study") or row.room == "docs"
            assert row.state == ("page only" if page else "planned")


def test_a_card_is_read_without_importing_its_file(package: Path) -> None:
    (entry,) = catalogue.cards(package)
    assert entry.key == "recall/a_mem"
    assert entry.class_name == "Remember"
    assert entry.summary == "Keep what is linked."
    assert (entry.claim, entry.margin, entry.requires) == ("2 times better", 0.1, ("torch",))
    assert entry.about is not None
    assert entry.about.link == "https://arxiv.org/abs/2502.12110"


def test_knobs_come_with_default_and_meaning(package: Path) -> None:
    links, ratio = catalogue.find("a_mem", package).knobs
    assert (links.name, links.type, links.default) == ("links", "int", "5")
    assert links.doc == "notes that one note may point to, in notes."
    assert (ratio.name, ratio.default, ratio.doc) == ("ratio", "1 / 3", "share kept.")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("margin=0.1", "margin=MARGIN", "literals"),
        ("margin=0.1", "margin=0.05 * 2", "literals"),
        ("margin=0.1,", "", r"lacks \['margin'\]"),
        ("margin=0.1", "margin=0.1, title='A'", r"unknown arguments \['title'\]"),
        ("card = Card(", "other = Card(", "holds 0 cards"),
    ],
)
def test_a_card_that_cannot_be_read_is_refused(
    package: Path, old: str, new: str, message: str
) -> None:
    _write(package, "recall/policies/a_mem.py", METHOD.replace(old, new))
    with pytest.raises(InvalidKnob, match=message):
        catalogue.cards(package)


def test_two_cards_in_one_file_are_refused(package: Path) -> None:
    second = METHOD[METHOD.index("@dataclass") :].replace("Remember", "Again")
    _write(package, "recall/policies/a_mem.py", METHOD + second)
    with pytest.raises(InvalidKnob, match="holds 2 cards"):
        catalogue.cards(package)


def test_a_bare_name_works_while_it_is_unique(package: Path) -> None:
    assert catalogue.find("a_mem", package) == catalogue.find("recall/a_mem", package)
    _write(package, "context/policies/a_mem.py", METHOD)
    assert catalogue.find("context/a_mem", package).room == "context"
    with pytest.raises(UnknownMethod, match="context/a_mem, recall/a_mem"):
        catalogue.find("a_mem", package)


def test_a_miss_names_what_is_near(package: Path) -> None:
    with pytest.raises(UnknownMethod, match=r"no method 'a_men'; near names: a_mem"):
        catalogue.find("a_men", package)
    with pytest.raises(UnknownMethod, match="`memwise methods` lists all"):
        catalogue.find("../../etc/passwd", package)
    with pytest.raises(UnknownMethod, match=r"COAT .paper 2, room recall. has none"):
        catalogue.find("coat", package)


def test_a_missing_extra_comes_with_the_command_to_type() -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'memwise\[nothing_like_it\]'"):
        catalogue.need("nothing_like_it", what="recall/a_mem")


def test_states_follow_the_evidence(package: Path) -> None:
    entry = catalogue.find("a_mem", package)
    assert catalogue.state(entry) == "built"

    _record(entry, interval=[0.11, 0.2])
    assert catalogue.state(entry) == "effect shown"
    _record(entry, interval=[0.09, 0.2])
    assert catalogue.state(entry) == "built"
    _record(entry, interval=[0.11, 0.2], behaves={"oracle is best": False})
    assert catalogue.state(entry) == "built"
    _record(entry, interval=[0.11, 0.2], code="0" * 64)
    assert catalogue.state(entry) == "stale"


def test_a_negative_result_needs_a_measured_row_and_a_reason(package: Path) -> None:
    explained = METHOD.replace("margin=0.1", "margin=0.1, negative='the data is too easy'")
    _write(package, "recall/policies/a_mem.py", explained)
    entry = catalogue.find("a_mem", package)
    assert catalogue.state(entry) == "built"
    _record(entry, interval=[-0.1, 0.05])
    assert catalogue.state(entry) == "negative result"


def test_a_paper_takes_the_best_state_of_its_methods(package: Path) -> None:
    for name, interval in (("coat_states", [0.2, 0.3]), ("coat_activations", [0.0, 0.3])):
        _write(package, f"recall/policies/{name}.py", METHOD.replace("paper=1", "paper=2"))
        _record(catalogue.find(name, package), interval=interval)
    coat = catalogue.methods(package)[1]
    assert coat.methods == ("recall/coat_activations", "recall/coat_states")
    assert coat.state == "effect shown"


def test_a_study_with_a_measured_method_is_more_than_a_page(package: Path) -> None:
    _write(package, "plan/policies/wall.py", METHOD.replace("paper=1", "paper=3"))
    _record(catalogue.find("wall", package), interval=[0.2, 0.3])
    states = {row.name: row.state for row in catalogue.methods(package)}
    assert (states["Wall"], states["Review"]) == ("effect shown", "page only")


@pytest.mark.parametrize(
    ("better", "interval", "shown"),
    [
        ("higher", (0.1, 0.3), False),
        ("higher", (0.1001, 0.3), True),
        ("lower", (-0.3, -0.1), False),
        ("lower", (-0.3, -0.1001), True),
        ("lower", (0.2, 0.3), False),
    ],
)
def test_the_whole_interval_must_lie_beyond_the_margin(
    better: Any, interval: tuple[float, float], shown: bool
) -> None:
    card = Card(paper=1, claim="", check="", baseline="", better=better, margin=0.1)
    row = {"primary": True, "interval": interval, "behaves": {}}
    context = {"primary": False, "interval": (0, 0), "behaves": {}}
    assert catalogue.effect_shown(card, [row, context]) is shown
    assert not catalogue.effect_shown(card, [context])
    assert not catalogue.effect_shown(card, [])


def test_prose_and_layout_leave_the_code_hash_alone(package: Path) -> None:
    before = catalogue.code_hash(catalogue.find("a_mem", package))
    prose = (
        METHOD.replace("Keep it.", "Hold it.")
        .replace("# one more", "# another")
        .replace("x + 1", "(x +  1)")
        .replace('"better"', '"worse"')
        .replace("margin=0.1", "margin=0.1, negative='why'")
    )
    _write(package, "recall/policies/a_mem.py", prose)
    assert catalogue.code_hash(catalogue.find("a_mem", package)) == before


@pytest.mark.parametrize(
    ("old", "new"), [("x + 1", "x + 2"), ("links: int = 5", "links: int = 6"), ("0.1,", "0.05,")]
)
def test_code_knobs_and_margin_change_the_code_hash(package: Path, old: str, new: str) -> None:
    before = catalogue.code_hash(catalogue.find("a_mem", package))
    _write(package, "recall/policies/a_mem.py", METHOD.replace(old, new))
    assert catalogue.code_hash(catalogue.find("a_mem", package)) != before


def test_the_code_of_the_check_changes_the_code_hash(package: Path) -> None:
    entry = catalogue.find("a_mem", package)
    before = catalogue.code_hash(entry)
    _write(package, "bench/checks/locomo.py", "def run(method, data, seed):\n    return [1]\n")
    assert catalogue.code_hash(entry) != before


def test_attributes_are_read_from_one_section_only() -> None:
    doc = textwrap.dedent("""\
        Do it.

        Args:
            other: no knob.

        Attributes:
            first: one: with a colon.
            second:
                on its own line.

        Raises:
            InvalidKnob: never.""")
    assert catalogue.attributes(doc) == {
        "first": "one: with a colon.",
        "second": "on its own line.",
    }
    assert catalogue.attributes("Do it.") == {}


@pytest.mark.parametrize(
    ("name", "file"), [("A-MEM", "a_mem"), ("M+", "m"), ("Think-in-Memory", "think_in_memory")]
)
def test_a_file_is_named_after_its_paper(name: str, file: str) -> None:
    assert catalogue.snake(name) == file


def _write(package: Path, name: str, source: str) -> None:
    path = package / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


def _record(entry: Entry, **changes: Any) -> None:
    row = {
        "metric": "R@10",
        "primary": True,
        "behaves": {"oracle is best": True},
        "code": catalogue.code_hash(entry),
        **changes,
    }
    entry.results_path.parent.mkdir(parents=True, exist_ok=True)
    entry.results_path.write_text(json.dumps(row) + "\n")
