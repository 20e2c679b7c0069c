"""A memory of features: its bytes, its policies against plain lists, and what is refused."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import methods_of  # noqa: E402

from memwise.catalogue import load  # noqa: E402
from memwise.context.engine.features import FeatureMemory, FeaturePolicy, budget_for  # noqa: E402
from memwise.context.policies.moviechat import MovieChat  # noqa: E402
from memwise.context.policies.newest_frames import NewestFrames  # noqa: E402
from memwise.context.policies.random_frames import RandomFrames  # noqa: E402
from memwise.context.policies.uniform_frames import UniformFrames  # noqa: E402
from memwise.errors import BudgetExceeded, InvalidKnob, StoreCorrupt  # noqa: E402
from memwise.train.measure import bytes_of, peak  # noqa: E402

SHAPE = (2, 6)
each_policy = pytest.mark.parametrize("name", methods_of(FeaturePolicy))


def frames(n: int, seed: int = 0) -> Any:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(n, *SHAPE, generator=draws, dtype=torch.float64)


def memory(policy: Any, n_places: int) -> FeatureMemory:
    budget = budget_for(n_places, SHAPE, torch.float64, policy.n_numbers)
    return FeatureMemory(policy, SHAPE, budget, torch.float64)


def fed(policy: Any, n_places: int, stream: Any) -> FeatureMemory:
    held = memory(policy, n_places)
    for frame in stream:
        held.add(frame)
    return held


@each_policy
def test_a_long_stream_stays_inside_the_budget(name: str) -> None:
    policy, n_places = load(f"context/{name}")(), 40
    budget = budget_for(n_places, SHAPE, torch.float64, policy.n_numbers)
    held = fed(policy, n_places, frames(200))
    assert 0 < held.n <= held.n_places == n_places
    assert bytes_of(held.tensors()) <= budget
    assert held.times.tolist() == sorted(set(held.times.tolist()))
    assert held.n_seen == 200


@each_policy
def test_no_moment_takes_more_than_the_budget_and_a_few_frames(name: str) -> None:
    shape, n_places = (64, 128), 40
    policy, budget = load(f"context/{name}")(), budget_for(n_places, shape)
    stream = torch.randn(90, *shape)

    def run() -> None:
        held = FeatureMemory(policy, shape, budget)
        for frame in stream:
            held.add(frame)

    # Neighbours are compared in float32, which takes the buffer once more.
    assert peak(run).peak_bytes <= 3 * budget


@each_policy
def test_what_was_saved_goes_on(name: str, tmp_path: Any) -> None:
    policy, stream = load(f"context/{name}")(), frames(160)
    first = fed(policy, 40, stream[:100])
    first.save(tmp_path / "kept")
    second = memory(policy, 40)
    second.load(tmp_path / "kept")
    for frame in stream[100:]:
        first.add(frame)
        second.add(frame)
    assert all(torch.equal(a[: first.n], second.tensors()[n][: first.n])
               for n, a in first.tensors().items())  # fmt: skip
    assert first.report() == second.report()
    other = memory(NewestFrames() if name != "newest_frames" else UniformFrames(), 40)
    with pytest.raises(InvalidKnob, match="another policy"):
        other.load(tmp_path / "kept")
    (tmp_path / "kept").write_bytes(b"nothing")
    with pytest.raises(StoreCorrupt):
        second.load(tmp_path / "kept")


def by_lists(stream: Any, buffer: int, left: int, n_places: int, weighted: bool) -> Any:
    """MovieChat as plain lists of (frame, mass)."""

    def fold(held: list[Any], n: int) -> list[Any]:
        while len(held) > n:
            alike = [
                float(torch.cosine_similarity(a[0].flatten(), b[0].flatten(), dim=0))
                for a, b in itertools.pairwise(held)
            ]
            i = alike.index(max(alike))
            (a, m), (b, k) = held[i], held[i + 1]
            mean = (m * a + k * b) / (m + k) if weighted else (a + b) / 2
            held = [*held[:i], (mean, m + k), *held[i + 2 :]]
        return held

    long: list[Any] = []
    short: list[Any] = []
    for frame in stream:
        short.append((frame, 1))
        if len(short) == buffer:
            long = fold(long + fold(short, left), n_places - buffer)
            short = []
    return long + short


@pytest.mark.parametrize("weighted", [True, False])
def test_moviechat_folds_as_the_loop_does(weighted: bool) -> None:
    stream = frames(67)
    policy = MovieChat(buffer=7, left=2, weighted=weighted)
    held = fed(policy, 12, stream)
    expected = by_lists(stream, 7, 2, 12, weighted)
    torch.testing.assert_close(
        held.frames, torch.stack([f for f, _ in expected]), atol=1e-7, rtol=0
    )
    assert held.mass.tolist() == [m for _, m in expected]


def test_newest_and_even_frames_are_what_they_say() -> None:
    assert fed(NewestFrames(), 8, frames(30)).times.tolist() == list(range(23, 30))
    even = fed(UniformFrames(), 8, frames(100)).times
    assert set((even[1:] - even[:-1]).tolist()) == {16}
    assert even[0] == 0


def test_a_random_sample_favours_nobody() -> None:
    counts = torch.zeros(40)
    for seed in range(300):
        counts[fed(RandomFrames(seed), 9, frames(40)).times] += 1
    # 8 of 40 are held: binomial with p = .2 and n = 300, six standard deviations of 6.9.
    assert (counts - 60).abs().max() < 42


@pytest.mark.parametrize(
    ("frame", "time", "says"),
    [
        (torch.zeros(3, 6), None, "shape"),
        (torch.full(SHAPE, torch.nan), None, "not finite"),
        (torch.zeros(SHAPE), 0, "not after"),
    ],
)
def test_bad_frames_are_refused_and_change_nothing(frame: Any, time: Any, says: str) -> None:
    held = fed(NewestFrames(), 8, frames(3))
    before = held.report()
    with pytest.raises(InvalidKnob, match=says):
        held.add(frame, time)
    assert held.report() == before


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(BudgetExceeded, match="raise budget"):
        memory(MovieChat(), 8)
    with pytest.raises(InvalidKnob, match="left"):
        MovieChat(buffer=4, left=4)


def test_folding_keeps_the_mass() -> None:
    held = fed(MovieChat(buffer=7, left=2), 12, frames(67, seed=random.Random(1).randrange(99)))
    assert held.mass.sum() == 67
