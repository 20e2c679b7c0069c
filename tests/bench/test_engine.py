import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from memwise import catalogue
from memwise.bench import engine
from memwise.bench.engine import Comparison, Row, paired_interval
from memwise.catalogue import Card, Entry
from memwise.errors import InvalidKnob

UP = Row("R@10", 0.8, 0.6, (0.15, 0.25), 100, controls={"random": 0.01, "oracle": 1.0})
LEVEL = Row("R@10", 0.6, 0.6, (0.0, 0.0), 100)
CARD = Card(1, "0.8 against 0.6", "fake", "plain", "higher", 0.1)


@dataclass(frozen=True)
class Method:
    card = CARD
    k: int = 3


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., engine.Report]:
    """Run `engine.check` on a made-up method whose check returns the given rows."""
    path = tmp_path / "memwise" / "room" / "policies" / "method.py"
    checks = tmp_path / "memwise" / "bench" / "checks"
    for file in (path, checks / "fake.py"):
        file.parent.mkdir(parents=True)
        file.write_text("x = 1\n")

    def run(rows: Sequence[Row], record: bool = False, **card: object) -> engine.Report:
        entry = Entry(
            **{**vars(CARD), **card},
            name="method",
            room="room",
            class_name="Method",
            path=path,
            knobs=(),
            doc="",
            about=None,
        )
        check = ModuleType("memwise.bench.checks.fake")
        check.run = lambda method, data, seed: rows if method == Method() else []
        monkeypatch.setitem(sys.modules, check.__name__, check)
        monkeypatch.setattr(catalogue, "find", lambda name: entry)
        monkeypatch.setattr(catalogue, "load", lambda name: Method)
        return engine.check("method", record=record)

    return run


def coverage(n_groups: int, spread: float, grouped: bool) -> float:
    """Share of 150 simulated experiments whose interval holds the true difference of 0.3."""
    rng = np.random.default_rng(7)
    held = 0
    for seed in range(150):
        groups = np.repeat(np.arange(n_groups), 12)
        effect = 0.3 + spread * rng.standard_normal(n_groups)[groups]
        baseline = rng.standard_normal(groups.size)
        method = baseline + effect + rng.standard_normal(groups.size)
        low, high = paired_interval(method, baseline, seed, 400, groups if grouped else None)
        held += low <= 0.3 <= high
    return held / 150


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    assert 0.90 <= coverage(n_groups=10, spread=0.0, grouped=False) <= 0.99


def test_items_that_hang_together_need_groups_to_be_covered() -> None:
    assert coverage(n_groups=15, spread=1.0, grouped=False) < 0.6
    assert coverage(n_groups=15, spread=1.0, grouped=True) > 0.85


def test_the_interval_depends_on_the_seed_and_on_nothing_else() -> None:
    method, baseline = np.random.default_rng(0).random((2, 50))
    groups = ["a"] * 20 + ["b"] * 30
    for labels in (None, groups):
        first = paired_interval(method, baseline, 3, groups=labels)
        assert first == paired_interval(method, baseline, 3, groups=labels)
        assert first != paired_interval(method, baseline, 4, groups=labels)


def test_resampling_in_blocks_draws_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_DRAWS_AT_ONCE", 250)
    low, high = paired_interval(np.arange(100.0), np.zeros(100), 0, n_boot=501)
    assert low < 49.5 < high


def test_equal_values_give_an_interval_without_width() -> None:
    same = np.linspace(0, 1, 20)
    assert paired_interval(same, same, 0) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("method", "baseline", "groups"),
    [
        ([1.0], [1.0, 2.0], None),
        ([], [], None),
        ([1.0, np.nan], [1.0, 1.0], None),
        ([[1.0]], [[1.0]], None),
        ([1.0, 2.0], [1.0, 2.0], ["a"]),
    ],
)
def test_values_that_do_not_pair_are_refused(
    method: list[float], baseline: list[float], groups: list[str] | None
) -> None:
    with pytest.raises(InvalidKnob):
        paired_interval(np.array(method), np.array(baseline), 0, groups=groups)


@pytest.mark.parametrize(
    "wrong", [{"value": np.nan}, {"interval": (0.2, 0.1)}, {"n": 0}, {"controls": {"x": np.inf}}]
)
def test_a_row_that_says_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidKnob):
        replace(UP, **wrong)


def test_an_interval_beyond_the_margin_shows_the_effect(judge: Callable) -> None:
    report = judge([UP, replace(LEVEL, primary=False)])
    assert report.effect
    assert report.state == "effect shown"
    assert report.rows[0] == UP


def test_a_method_that_is_its_baseline_shows_no_effect(judge: Callable) -> None:
    for margin in (0.1, 0.0):
        report = judge([LEVEL], margin=margin)
        assert not report.effect
        assert report.state == "no effect"


def test_an_interval_that_touches_the_margin_shows_no_effect(judge: Callable) -> None:
    assert not judge([UP], margin=0.15).effect


def test_one_level_primary_row_spoils_the_effect(judge: Callable) -> None:
    assert not judge([UP, LEVEL]).effect


def test_context_alone_shows_no_effect(judge: Callable) -> None:
    assert not judge([replace(UP, primary=False)]).effect


def test_a_control_that_misbehaves_spoils_the_effect(judge: Callable) -> None:
    good, bad = {"shuffled links lose the gain": True}, {"random is at chance": False}
    assert judge([replace(UP, behaves=good)]).effect
    report = judge([UP, replace(UP, primary=False, behaves=good | bad)])
    assert not report.effect
    assert "ok  shuffled links lose the gain" in report.text()
    assert "NO  random is at chance" in report.text()


def test_lower_is_better_where_the_card_says_so(judge: Callable) -> None:
    down = replace(UP, interval=(-0.25, -0.15))
    assert judge([down], better="lower").effect
    assert not judge([UP], better="lower").effect
    assert not judge([down], better="lower", margin=0.2).effect


def test_a_negative_card_turns_a_miss_into_a_negative_result(judge: Callable) -> None:
    report = judge([LEVEL], negative="the effect needs a larger model")
    assert report.state == "negative result"
    assert "the effect needs a larger model" in report.text()
    assert judge([UP], negative="not needed after all").state == "effect shown"


def test_evidence_is_replaced_and_never_appended(judge: Callable) -> None:
    path = judge([LEVEL, LEVEL], record=True).entry.results_path
    assert len(path.read_text().splitlines()) == 2
    report = judge([UP], record=True)
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == report.json()[0]
    assert [file.name for file in path.parent.iterdir()] == ["method.jsonl"]


def test_evidence_reads_back_as_it_was_judged(judge: Callable) -> None:
    report = judge([UP], record=True)
    recorded = catalogue.rows(report.entry)
    assert catalogue.is_current(report.entry, recorded)
    assert catalogue.effect_shown(report.entry, recorded) is report.effect
    assert catalogue.state(report.entry) == "effect shown"


def test_evidence_is_kept_when_the_next_run_fails(judge: Callable) -> None:
    path = judge([UP], record=True).entry.results_path
    before = path.read_bytes()
    with pytest.raises(InvalidKnob, match="no rows"):
        judge([], record=True)
    assert path.read_bytes() == before


def test_nothing_is_written_without_being_asked(judge: Callable) -> None:
    assert not judge([UP]).entry.results_path.exists()


def test_a_record_says_what_ran_and_not_on_whose_machine(judge: Callable) -> None:
    (record,) = judge([UP]).json()
    assert record["baseline_name"] == "plain"
    assert record["seed"] == 0
    assert set(record["versions"]) >= {"memwise", "python", "numpy"}
    assert record["machine"].split(", ")[1] == platform.machine()
    assert platform.node() not in json.dumps(record)


def test_the_text_sets_controls_beside_each_number(judge: Callable) -> None:
    lines = judge([replace(UP, bytes=1 << 20, note="audited gold")]).text().splitlines()
    (row,) = (line for line in lines if line.startswith("R@10"))
    for shown in ("0.800", "0.600", "+0.2 [+0.15, +0.25]", "1 MiB", "random 0.010, oracle 1.000"):
        assert shown in row
    assert "audited gold" in "\n".join(lines)


def test_a_card_without_a_check_is_a_clear_error(judge: Callable) -> None:
    with pytest.raises(InvalidKnob, match="no such check"):
        judge([UP], check="unwritten")


def test_a_room_without_a_side_by_side_is_a_clear_error() -> None:
    with pytest.raises(InvalidKnob, match="attic"):
        engine.bench("attic")


def test_a_room_side_by_side_writes_rows_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    rows = {"ours": [replace(UP, bytes=4096)], "plain": [replace(UP, value=0.6, bytes=2048)]}
    room = ModuleType("memwise.bench.room")
    room.__spec__ = ModuleSpec(room.__name__, None)
    room.run = lambda data: rows
    monkeypatch.setitem(sys.modules, room.__name__, room)
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path)
    (tmp_path / "room" / "policies").mkdir(parents=True)

    found = engine.bench("room", out=tmp_path / "out")
    assert found == Comparison("room", rows)
    assert len((tmp_path / "out" / "room.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "out" / "room.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_has_a_line_a_method_and_a_column_a_metric() -> None:
    other = replace(UP, metric="@500 tok", value=0.7)
    text = Comparison("room", {"ours": [UP, other], "plain": [LEVEL]}).text()
    head, ours, plain = (line.split() for line in text.splitlines())
    assert head == ["method", "R@10", "@500", "tok", "bytes", "seconds"]
    assert ours[:3] == ["ours", "0.800", "0.700"]
    assert plain[:3] == ["plain", "0.600", "-"]
