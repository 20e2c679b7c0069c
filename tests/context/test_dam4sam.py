"""DAM4SAM: its gate on constructed masks, against plain loops, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from memwise.context.engine.features import FeatureMemory, budget_for  # noqa: E402
from memwise.context.policies.dam4sam import DAM4SAM, Masks  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

SHAPE, SIDE = (1, 2), 16


def square(top: int, left: int, size: int = 4) -> Any:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[top : top + size, left : left + size] = True
    return mask


def masks(other: Any = None, iou: float = 0.9, size: int = 4) -> Masks:
    chosen = square(2, 2, size)
    return Masks(chosen, (chosen if other is None else chosen | other)[None], iou)


def memory(n_places: int = 8) -> FeatureMemory:
    policy = DAM4SAM()
    return FeatureMemory(policy, SHAPE, budget_for(n_places, SHAPE, n_numbers=policy.n_numbers))


def after(n: int, last: Masks) -> list[int]:
    """Kinds, after n plain frames and one more."""
    held = memory()
    for _ in range(n):
        held.add(torch.ones(SHAPE), seen=masks())
    held.add(torch.ones(SHAPE), seen=last)
    return held.kinds.tolist()


FAR = square(10, 10)


@pytest.mark.parametrize(
    ("n", "last", "resolves"),
    [
        (6, masks(FAR), True),
        (5, masks(FAR), False),
        (6, masks(FAR, iou=0.8), False),
        (6, masks(FAR, size=5), False),
        (6, masks(), False),
        (6, masks(square(6, 6, 1)), True),  # 16 of 25 cells of the box
    ],
)
def test_each_condition_of_the_gate_decides(n: int, last: Masks, resolves: bool) -> None:
    assert after(n, last)[-1] == int(resolves)


def by_loops(seen: Masks) -> bool:
    """The distractor test on sets of cells."""
    chosen = {tuple(c) for c in seen.chosen.nonzero().tolist()}

    def box(cells: Any) -> int:
        rows, columns = zip(*cells, strict=True)
        return (max(rows) - min(rows) + 1) * (max(columns) - min(columns) + 1)

    for other in seen.others:
        left = {tuple(c) for c in other.nonzero().tolist()} - chosen
        parts = []
        while left:
            part, todo = set(), [max(left)]
            while todo:
                r, c = todo.pop()
                if (r, c) in left:
                    left.remove((r, c))
                    part.add((r, c))
                    todo += [(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            parts.append(part)
        # Of equals the one that was found last, as its label is the smallest.
        if parts and box(chosen) / box(chosen | max(reversed(parts), key=len)) <= 0.7:
            return True
    return False


def test_the_distractor_test_is_the_loop() -> None:
    draws, found = torch.Generator().manual_seed(0), []
    while len(found) < 60:
        chosen = square(3, 3, 9)
        other = torch.rand(1, SIDE, SIDE, generator=draws) < 0.25
        seen = Masks(chosen, other, 1.0)
        rest = (other[0] & ~chosen).sum()
        if rest:
            found.append((DAM4SAM().distracted(seen), by_loops(seen)))
    assert all(mine == true for mine, true in found)
    assert 0 < sum(true for _, true in found) < 60


def test_an_absent_target_writes_nothing() -> None:
    held = memory()
    held.add(torch.ones(SHAPE), seen=masks())
    before = held.times.tolist(), held.numbers.tolist()
    held.add(torch.ones(SHAPE), seen=Masks(FAR & False, FAR[None], 0.9))
    assert (held.times.tolist(), held.numbers.tolist()) == before


def test_the_first_frame_stays_and_recent_ones_are_every_fifth_and_the_newest() -> None:
    held = memory()
    for _ in range(53):
        held.add(torch.ones(SHAPE))
    assert held.times.tolist() == [0, 30, 35, 40, 45, 50, 52]
    for _ in range(40):
        held.add(torch.ones(SHAPE), seen=masks(FAR))
    assert held.times[0] == 0
    assert held.kinds.sum() == 4


def test_the_areas_are_saved(tmp_path: Any) -> None:
    held, other = memory(), memory()
    for _ in range(3):
        held.add(torch.ones(SHAPE), seen=masks())
    held.save(tmp_path / "kept")
    other.load(tmp_path / "kept")
    assert other.numbers.tolist() == [16.0] * 3 + [0.0] * 7


def test_bad_knobs_are_refused() -> None:
    with pytest.raises(InvalidKnob, match="every"):
        DAM4SAM(every=0)
    with pytest.raises(InvalidKnob, match="n_resolving=1: give a number from 2"):
        DAM4SAM(n_resolving=1)
    with pytest.raises(InvalidKnob, match="min_iou"):
        DAM4SAM(min_iou=2)
