"""Draw quality against bytes: the one picture in which all rooms can be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memwise.budget import readable
from memwise.catalogue import need
from memwise.errors import InvalidKnob

_INK, _SOFT, _MUTED, _ACCENT, _PAPER = "#1d2433", "#5b6478", "#8a93a6", "#c2410c", "#ffffff"
# Where a label may stand beside its point, best first: offset in points, alignments. The front's
# line leaves its points to the right and downwards, so their labels go up and left first.
_UP_LEFT = (((-5, 5), "right", "bottom"), ((0, 8), "center", "bottom"))
_PLACES = (
    ((8, 0), "left", "center"),
    ((-8, 0), "right", "center"),
    ((0, 8), "center", "bottom"),
    ((0, -8), "center", "top"),
    ((6, 7), "left", "bottom"),
    ((-6, 7), "right", "bottom"),
    ((6, -7), "left", "top"),
    ((-6, -7), "right", "top"),
    ((8, 18), "left", "bottom"),
    ((8, -18), "left", "top"),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One subject of the plot.

    Attributes:
        label: its name.
        bytes: what it holds, measured; at least 1.
        quality: the metric, higher is better unless the plot says otherwise.
        role: baselines and controls are drawn hollow.
    """

    label: str
    bytes: int
    quality: float
    role: Literal["method", "baseline"] = "method"


def pareto(points: Sequence[Point], better: Literal["higher", "lower"] = "higher") -> list[Point]:
    """The points that no other matches with fewer bytes, fewest bytes first."""
    sign = 1.0 if better == "higher" else -1.0
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, -sign * p.quality)):
        if not front or sign * point.quality > sign * front[-1].quality:
            front.append(point)
    return front


def quality_bytes(
    points: Sequence[Point],
    path: Path,
    title: str,
    *,
    ylabel: str = "quality",
    xlabel: str = "bytes held",
    better: Literal["higher", "lower"] = "higher",
) -> None:
    """Draw labelled points and their Pareto front over a base-2 byte axis, as PNG.

    Args:
        points: at least one.
        path: the file; folders are made.
        title: one line.
        ylabel: the metric.
        xlabel: what the bytes are of.
        better: direction in which the metric improves.

    Raises:
        InvalidKnob: no points, or a point without bytes.
        MissingExtra: matplotlib is not installed.
    """
    if not points or any(point.bytes < 1 for point in points):
        raise InvalidKnob("a plot needs points that hold at least one byte each")
    need("bench", what="drawing a plot")
    from matplotlib.figure import Figure  # no pyplot: it keeps figures of the whole process

    figure = Figure(figsize=(8, 5), dpi=150, facecolor=_PAPER, layout="constrained")
    axes = figure.add_subplot()
    front = pareto(points, better)
    _byte_axis(axes, points)
    _front_line(axes, front)
    for point in points:
        _mark(axes, point, point in front)
    axes.set_title(title, loc="left", color=_INK, fontsize=13, fontweight="bold", pad=12)
    axes.set_xlabel(xlabel, color=_INK)
    axes.set_ylabel(f"{ylabel}  ({better} is better)", color=_INK)
    axes.margins(y=0.12)
    axes.grid(axis="y", color="#e8ebf1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.tick_params(colors=_INK, labelsize=9, length=3, color=_MUTED)
    _label(figure, axes, points, front)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _byte_axis(axes: Any, points: Sequence[Point]) -> None:
    low = math.floor(math.log2(min(point.bytes for point in points)) - 0.3)
    high = math.ceil(math.log2(max(point.bytes for point in points)) + 0.9)  # room for labels
    step = max(1, round((high - low) / 8))
    ticks = [2.0**power for power in range(max(low, 0), high + 1) if power % step == 0]
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.0**low, 2.0**high)
    axes.set_xticks(ticks, [readable(int(tick)) for tick in ticks])
    axes.minorticks_off()


def _front_line(axes: Any, front: Sequence[Point]) -> None:
    """A step line: what the best subject within so many bytes reaches."""
    right = axes.get_xlim()[1]
    x = [*(point.bytes for point in front), right]
    y = [*(point.quality for point in front), front[-1].quality]
    axes.step(x, y, where="post", color=_ACCENT, linewidth=1.4, alpha=0.45, zorder=1)


def _mark(axes: Any, point: Point, leads: bool) -> None:
    colour = _ACCENT if leads else _MUTED
    fill = colour if point.role == "method" else _PAPER
    axes.scatter(
        point.bytes, point.quality, s=46, color=fill, edgecolors=colour, linewidths=1.6, zorder=3
    )


def _label(figure: Any, axes: Any, points: Sequence[Point], front: Sequence[Point]) -> None:
    """Put each name at the first place that covers no point, no name and no edge."""
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()  # places the axes, so that boxes are final
    spots = [axes.transData.transform((point.bytes, point.quality)) for point in points]
    taken: list[Any] = []
    order = sorted(range(len(points)), key=lambda i: (points[i] not in front, -points[i].quality))
    for i in order:
        leads = points[i] in front
        text = axes.annotate(
            points[i].label,
            (points[i].bytes, points[i].quality),
            xytext=(0, 0),
            textcoords="offset points",
            color=_INK if leads else _SOFT,
            fontsize=9,
            fontweight="bold" if leads else "normal",
            path_effects=[withStroke(linewidth=2.5, foreground=_PAPER)],
            zorder=4,
        )
        tried: list[tuple[int, Any, Any]] = []
        for place in (*_UP_LEFT, *_PLACES) if leads else _PLACES:
            box = _stand(text, place)
            tried.append((_clashes(box, axes.bbox, taken, spots), place, box))
        _, place, box = min(tried, key=lambda entry: entry[0])  # the first of the least
        _stand(text, place)
        taken.append(box)


def _stand(text: Any, place: tuple[tuple[int, int], str, str]) -> Any:
    """Move a label; returns the box it then covers, in pixels."""
    offset, horizontal, vertical = place
    text.set(position=offset, ha=horizontal, va=vertical)
    return text.get_window_extent()


def _clashes(box: Any, frame: Any, taken: Sequence[Any], spots: Sequence[Any]) -> int:
    """How many names and points a label box covers; leaving the frame counts as much."""
    inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
    names = sum(bool(box.overlaps(other)) for other in taken)
    near = box.padded(7)  # pixels, about the radius of a mark
    covered = sum(bool(near.contains(*spot)) for spot in spots)
    return 2 * (not inside) + names + covered
