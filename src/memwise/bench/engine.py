"""Judge methods by paired rows: a check runs one method, a bench runs a room side by side.

- a `Row` holds one number of the method, the same number of its baseline, and the interval of
  their difference over the same items
- the judgement needs no model and no opinion: interval beyond the card's margin, controls behave
- evidence is a file a method, replaced as a whole, and says nothing about who ran it
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import memwise
from memwise import catalogue
from memwise.budget import readable
from memwise.catalogue import Entry
from memwise.errors import InvalidKnob

_DRAWS_AT_ONCE = 1 << 22  # indices held at once while resampling: 32 MiB


@dataclass(frozen=True)
class Row:
    """One metric of a method beside its baseline, on the same items.

    Attributes:
        metric: what is measured, with its cut ("R@10").
        value: mean of the method.
        baseline: mean of the card's baseline on the same items.
        interval: 95 % paired bootstrap interval of value - baseline.
        n: paired items.
        controls: name -> value of the same metric (random, oracle, ablations).
        behaves: statements about the controls that must hold -> whether they did.
        primary: judged against the card's margin; other rows are context.
        bytes: what the method holds, measured.
        seconds: what the method took.
        baseline_bytes: what the baseline holds, measured.
        data: name of the data.
        note: one remark for the reader.

    Raises:
        InvalidKnob: a number is not finite, the interval is upside down, or n < 1.
    """

    metric: str
    value: float
    baseline: float
    interval: tuple[float, float]
    n: int
    controls: Mapping[str, float] = field(default_factory=dict)
    behaves: Mapping[str, bool] = field(default_factory=dict)
    primary: bool = True
    bytes: int = 0
    seconds: float = 0.0
    baseline_bytes: int = 0
    data: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        low, high = self.interval
        numbers = (self.value, self.baseline, low, high, self.seconds, *self.controls.values())
        if not all(math.isfinite(x) for x in numbers):
            raise InvalidKnob(f"row {self.metric!r} holds a number that is not finite: {numbers}")
        if low > high:
            raise InvalidKnob(f"row {self.metric!r}: the interval {self.interval} is upside down")
        if self.n < 1:
            raise InvalidKnob(f"row {self.metric!r} rests on n = {self.n} items; it needs some")


@dataclass(frozen=True)
class Report:
    """What one check found.

    Attributes:
        entry: the method's card, with its name and room.
        rows: in the order of the check.
        seed: seed of the run.
        wall_s: wall time of the whole check, in seconds.
        code: hash of the code that was judged.
    """

    entry: Entry
    rows: tuple[Row, ...]
    seed: int
    wall_s: float
    code: str

    @property
    def effect(self) -> bool:
        """Every primary row beyond the margin, and every control as it must be."""
        return catalogue.effect_shown(self.entry, [asdict(row) for row in self.rows])

    @property
    def state(self) -> str:
        """`effect shown`, `negative result` (the card says why) or `no effect`."""
        if self.effect:
            return "effect shown"
        return "negative result" if self.rows and self.entry.negative else "no effect"

    def json(self) -> list[dict[str, Any]]:
        """One record a row, as the results files hold them."""
        shared = {
            "method": self.entry.name,
            "room": self.entry.room,
            "baseline_name": self.entry.baseline,
            "better": self.entry.better,
            "margin": self.entry.margin,
            "effect": self.effect,
            "code": self.code,
            "seed": self.seed,
            "wall_s": round(self.wall_s, 3),
            "versions": _versions(),
            "machine": _machine(),
        }
        return [_record(row) | shared for row in self.rows]

    def text(self) -> str:
        """The rows as an aligned table, the controls beside each number, the verdict below."""
        entry = self.entry
        head = ["metric", "value", entry.baseline, "difference", "n", "bytes", "controls"]
        lines = [f"{entry.key}: {entry.claim}", ""]
        lines += _table([head, *(_cells(row) for row in self.rows)], left=("metric", "controls"))
        for row in self.rows:
            lines += [f"  {'ok' if held else 'NO'}  {what}" for what, held in row.behaves.items()]
            lines += [f"  {row.metric}: {row.note}"] if row.note else []
        sign = "above" if entry.better == "higher" else "below"
        margin = entry.margin if entry.better == "higher" else -entry.margin
        reason = f" ({entry.negative})" if self.state == "negative result" else ""
        wanted = f"the interval had to lie {sign} {margin:+g}"
        return "\n".join([*lines, "", f"{self.state}{reason}; {wanted}; {self.wall_s:.1f} s"])


@dataclass(frozen=True)
class Comparison:
    """A room side by side: method -> its rows; the first primary row of each is drawn.

    Attributes:
        room: name of the room.
        rows: name -> rows, in the order they are shown.
    """

    room: str
    rows: Mapping[str, Sequence[Row]]

    def json(self) -> list[dict[str, Any]]:
        """One record a row."""
        return [
            {"method": name, "room": self.room} | _record(row)
            for name, rows in self.rows.items()
            for row in rows
        ]

    def text(self) -> str:
        """A table for each data set: one line a method, one column a metric, bytes and seconds."""
        sets = dict.fromkeys(row.data for rows in self.rows.values() for row in rows)
        return "\n\n".join(self._table(data) for data in sets)

    def _table(self, data: str) -> str:
        apart = {
            name: [replace(row, metric=row.metric.removeprefix(f"{data} ")) for row in rows]
            for name, every in self.rows.items()
            if (rows := [row for row in every if row.data == data])
        }
        metrics = list(dict.fromkeys(row.metric for rows in apart.values() for row in rows))
        body = []
        for name, rows in apart.items():
            value = {row.metric: _number(row.value) for row in rows}
            n_bytes = max(row.bytes for row in rows)
            seconds = max(row.seconds for row in rows)
            cells = [name, *(value.get(metric, "-") for metric in metrics)]
            body.append([*cells, readable(n_bytes) if n_bytes else "-", f"{seconds:.1f}"])
        head = ["method", *metrics, "bytes", "seconds"]
        lines = [data] if data else []
        lines += _table([head, *body], left=("method",))
        goals = [
            (name, goal) for name, rows in apart.items() for r in rows for goal in r.behaves.items()
        ]
        lines += [f"  {'ok' if ok else 'NO'}  {name}: {what}" for name, (what, ok) in goals]
        return "\n".join(lines)


def in_rounds(
    metric: str, values: Sequence[float] | NDArray[np.float64], baseline: float = 1.0
) -> Row:
    """The median of what some rounds measured, beside a plain number."""
    found = np.asarray(values, float)
    ends = float(found.min()) - baseline, float(found.max()) - baseline
    return Row(
        metric, float(np.median(found)), baseline, ends, len(found), primary=False,
        note="the interval holds all rounds",
    )  # fmt: skip


def paired_interval(
    method: NDArray[Any],
    baseline: NDArray[Any],
    seed: int,
    n_boot: int = 2000,
    groups: Sequence[str] | NDArray[Any] | None = None,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of mean(method - baseline) over paired items.

    Args:
        method: per-item values, shape (n,).
        baseline: values of the same items, shape (n,).
        seed: of the resampling.
        n_boot: resamples.
        groups: label of each item, shape (n,). Whole groups are then drawn first and items
            within each drawn group second, so that ten conversations count as ten and not as
            two thousand independent questions. Under about ten groups it is still too narrow.

    Raises:
        InvalidKnob: shapes differ, nothing is there, or a value is not finite.
    """
    difference = np.asarray(method, np.float64) - np.asarray(baseline, np.float64)
    if np.shape(method) != np.shape(baseline) or difference.ndim != 1 or not difference.size:
        raise InvalidKnob(
            f"paired values need one shape (n,), n >= 1; got {np.shape(method)} and "
            f"{np.shape(baseline)}"
        )
    if not np.isfinite(difference).all():
        raise InvalidKnob("paired values hold a number that is not finite; leave no item empty")
    rng = np.random.default_rng(seed)
    if groups is None:
        means = _resampled_sums(difference, n_boot, rng) / difference.size
    else:
        labels = np.asarray(groups)
        if labels.shape != difference.shape:
            raise InvalidKnob(f"groups has shape {labels.shape}, the items {difference.shape}")
        parts = [difference[labels == label] for label in np.unique(labels)]
        means = _clustered_means(parts, n_boot, rng)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _resampled_sums(
    values: NDArray[np.float64], n_boot: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Sums of n_boot resamples of `values`, shape (n_boot,)."""
    step = max(1, _DRAWS_AT_ONCE // values.size)
    sums = [
        values[rng.integers(values.size, size=(min(step, n_boot - done), values.size))].sum(axis=1)
        for done in range(0, n_boot, step)
    ]
    return np.concatenate(sums) if sums else np.zeros(0)


def _clustered_means(
    parts: Sequence[NDArray[np.float64]], n_boot: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Means of n_boot two-stage resamples: as many groups as there are, then items within."""
    chosen = rng.integers(len(parts), size=(n_boot, len(parts)))
    sums, counts = np.zeros(n_boot), np.zeros(n_boot)
    for g, part in enumerate(parts):
        boots = np.nonzero(chosen == g)[0]  # a boot stands here once for each time it drew g
        np.add.at(sums, boots, _resampled_sums(part, boots.size, rng))
        np.add.at(counts, boots, part.size)
    return sums / counts


def check(name: str, data: Path | None = None, seed: int = 0, record: bool = False) -> Report:
    """Run a method's check beside its baseline and controls, and judge it.

    Args:
        name: `room/name`, or the bare name where it is unique.
        data: folder with the data sets; None leaves the choice to the check.
        seed: handed to the check.
        record: replace the method's results file.

    Raises:
        UnknownMethod: no card of that name.
        InvalidKnob: the card names no check that exists, or the check gave no rows.
        MissingExtra: the method or its check needs a package that is not installed.
    """
    entry = catalogue.find(name)
    method = catalogue.load(entry.key)()
    if not entry.check_path.exists():
        raise InvalidKnob(f"{entry.key} names the check {entry.check!r}; there is no such check")
    module = importlib.import_module(f"memwise.bench.checks.{entry.check}")
    start = time.perf_counter()
    rows = tuple(module.run(method, data, seed))
    wall_s = time.perf_counter() - start
    if not rows:
        raise InvalidKnob(f"the check {entry.check!r} gave no rows for {entry.key}; nothing judged")
    report = Report(entry, rows, seed, wall_s, catalogue.code_hash(entry))
    if record:
        _replace(entry.results_path, report.json())
    return report


def bench(
    room: str, data: Path | None = None, out: Path | None = None, n_items: int | None = None
) -> Comparison:
    """Run a room side by side.

    Args:
        room: one that has `bench/<room>.py` with `run(data) -> {method: rows}`.
        data: folder with the data sets.
        out: folder that receives `<room>.jsonl` and `<room>.png`; None writes nothing.
        n_items: texts of each set, in rooms that count them; None = as many as the room wants.

    Raises:
        InvalidKnob: the room has no side-by-side, or counts no items.
        MissingExtra: there is something to draw and no matplotlib.
    """
    rooms = [folder.parent.name for folder in catalogue.PACKAGE.glob("*/policies")]
    able = sorted(r for r in rooms if importlib.util.find_spec(f"memwise.bench.{r}"))
    if room not in able:
        raise InvalidKnob(f"no side-by-side for room {room!r}; there is one for {able}")
    run = importlib.import_module(f"memwise.bench.{room}").run
    if n_items is not None and "n_items" not in inspect.signature(run).parameters:
        raise InvalidKnob(f"room {room!r} counts no items; leave --items out")
    if n_items is not None and n_items < 2:
        raise InvalidKnob(f"items={n_items}: an interval needs 2 at least")
    found = Comparison(room, run(data) if n_items is None else run(data, n_items))
    if out is not None:
        _replace(out / f"{room}.jsonl", found.json())
        _draw(found, out / f"{room}.png")
    return found


def _draw(found: Comparison, path: Path) -> None:
    from memwise.bench.plot import Point, quality_bytes  # matplotlib is an extra

    first = {
        name: next((row for row in rows if row.primary and row.bytes), None)
        for name, rows in found.rows.items()
    }
    points = [Point(name, row.bytes, row.value) for name, row in first.items() if row]
    metric = next((row.metric for row in first.values() if row), "quality")
    quality_bytes(points, path, f"{found.room}: quality against bytes", ylabel=metric)


def _record(row: Row) -> dict[str, Any]:
    # NumPy's numbers and truth values are no JSON.
    plain = {
        "interval": [float(end) for end in row.interval],
        "controls": {name: float(value) for name, value in row.controls.items()},
        "behaves": {name: bool(held) for name, held in row.behaves.items()},
    }
    return asdict(row) | plain


def _replace(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write all records or leave the old file: evidence is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(
        json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records
    )
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)  # mkstemp makes it private, evidence is package data
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    """Versions that can move a number; torch and onnxruntime only where the check used them."""
    found = {"memwise": memwise.__version__, "python": platform.python_version()}
    for name in ("numpy", "torch", "onnxruntime"):
        if name in sys.modules:
            found[name] = str(sys.modules[name].__version__)
    return found


def _machine() -> str:
    """Kind of machine, never its name: "2 cores, x86_64, no GPU"."""
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name(0) if torch and torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores, {platform.machine()}, {gpu}"


def _cells(row: Row) -> list[str]:
    low, high = row.interval
    sizes = [readable(size) for size in (row.bytes, row.baseline_bytes) if size]
    return [
        row.metric + ("" if row.primary else " (context)"),
        _number(row.value),
        _number(row.baseline),
        f"{row.value - row.baseline:+.3g} [{low:+.3g}, {high:+.3g}]",
        str(row.n),
        " / ".join(sizes) or "-",
        ", ".join(f"{name} {_number(value)}" for name, value in row.controls.items()) or "-",
    ]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"


def _table(rows: Sequence[Sequence[str]], left: Sequence[str]) -> list[str]:
    """Columns aligned; those whose head is in `left` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if head in left else f"{cell:>{width}}"
            for cell, width, head in zip(row, widths, rows[0], strict=True)
        ).rstrip()
        for row in rows
    ]
