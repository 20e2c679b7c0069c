import struct
import zlib
from pathlib import Path

import pytest

from memwise.bench.plot import Point, pareto, quality_bytes
from memwise.errors import InvalidKnob

POINTS = [
    Point("small", 1 << 10, 0.4, "baseline"),
    Point("large", 1 << 22, 0.8),
    Point("middle", 1 << 15, 0.7),
    Point("beaten", 1 << 16, 0.6),
    Point("level", 1 << 23, 0.8),
]


def test_the_front_holds_what_nothing_smaller_matches() -> None:
    assert [point.label for point in pareto(POINTS)] == ["small", "middle", "large"]
    assert [point.label for point in pareto(POINTS, "lower")] == ["small"]


def test_the_plot_is_a_whole_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "plot.png"
    quality_bytes(POINTS, path, "a title", ylabel="R@10")
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    at, kinds = 8, []
    while at < len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        body = raw[at + 4 : at + 8 + length]
        assert zlib.crc32(body) == struct.unpack(">I", raw[at + 8 + length : at + 12 + length])[0]
        kinds.append(body[:4])
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"


def test_one_point_is_enough(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    quality_bytes(POINTS[:1], tmp_path / "plot.png", "one")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_points_without_bytes_cannot_be_drawn(tmp_path: Path) -> None:
    for points in ([], [Point("nothing", 0, 0.5)]):
        with pytest.raises(InvalidKnob):
            quality_bytes(points, tmp_path / "plot.png", "none")
