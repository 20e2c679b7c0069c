"""Memories of segments: how they are reduced, against plain loops, and what attends to them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import methods_of  # noqa: E402

from memwise.catalogue import load  # noqa: E402
from memwise.context.engine.consolidate import (  # noqa: E402
    METHODS,
    SegmentPolicy,
    consolidate,
)
from memwise.context.policies.lone_segments import LoneSegments  # noqa: E402
from memwise.context.policies.mc_vit import MCViT  # noqa: E402
from memwise.context.policies.whole_segments import WholeSegments  # noqa: E402
from memwise.errors import BudgetExceeded, InvalidKnob  # noqa: E402
from memwise.train.measure import bytes_of, peak  # noqa: E402

WIDTH = 16
each_policy = pytest.mark.parametrize("name", methods_of(SegmentPolicy))
each_method = pytest.mark.parametrize("method", METHODS)


def vectors(*shape: int, seed: int = 0) -> Any:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


def draws(seed: int = 0) -> Any:
    return torch.Generator().manual_seed(seed)


def encoder(policy: Any, n_layers: int = 2, **more: Any) -> Any:
    built = policy(WIDTH, n_layers, 4, **more).double()
    for weight in built.parameters():  # so loud that attention decides what comes out
        torch.nn.init.normal_(weight, std=0.4, generator=draws(1))
    return built


def read(built: Any, segments: Any, memory: Any = None) -> tuple[Any, Any]:
    outs = []
    for segment in segments:
        out, memory = built(segment, memory)
        outs.append(out)
    return outs, memory


# --- reducing


def farthest(points: Any, n: int) -> list[int]:
    mean = points.mean(0)
    chosen = [min(range(len(points)), key=lambda i: math.dist(points[i], mean))]
    while len(chosen) < n:
        rest = [i for i in range(len(points)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(math.dist(points[i], points[j]) for j in chosen)))
    return chosen


def lloyd(points: Any, centers: list[Any], n_passes: int) -> list[Any]:
    for _ in range(n_passes):
        near = [min(range(len(centers)), key=lambda c: math.dist(p, centers[c])) for p in points]
        groups = [[p for p, c in zip(points, near, strict=True) if c == k]
                  for k in range(len(centers))]  # fmt: skip
        centers = [torch.stack(g).mean(0) if g else c for g, c in zip(groups, centers, strict=True)]
    return centers


def test_the_coreset_is_the_farthest_point_traversal() -> None:
    x = vectors(3, 20, 4)
    for some, mine in zip(x, consolidate(x, 6, "coreset", draws()), strict=True):
        assert torch.equal(mine, some[sorted(farthest(some, 6))])


def test_the_coreset_covers_within_twice_the_best_radius() -> None:
    points = vectors(9, 2)

    def radius(chosen: Any) -> float:
        return float(torch.cdist(points, chosen).amin(1).amax())

    best = min(radius(points[list(some)]) for some in itertools.combinations(range(9), 3))
    assert radius(consolidate(points[None], 3, "coreset", draws())[0]) <= 2 * best


def test_groups_are_those_of_the_plain_loop() -> None:
    x = vectors(3, 20, 4)
    for some, mine in zip(x, consolidate(x, 5, "kmeans", draws()), strict=True):
        expected = lloyd(some, [some[i] for i in sorted(farthest(some, 5))], 5)
        torch.testing.assert_close(mine, torch.stack(expected), atol=1e-12, rtol=0)


def test_a_random_subset_favours_nobody() -> None:
    x = torch.arange(10.0).expand(2000, 10)[..., None]
    taken = consolidate(x, 3, "random", draws())[..., 0]
    assert (taken.diff(dim=1) > 0).all()
    # 2000 draws with p = .3: six standard deviations of 20.5.
    assert (taken.long().flatten().bincount() - 600).abs().max() < 123


@each_method
def test_as_many_as_there_are_is_all_of_them(method: str) -> None:
    x = vectors(2, 7, 3)
    assert torch.equal(consolidate(x, 7, method, draws()), x)
    assert torch.equal(consolidate(x, 70, method, draws()), x)
    assert consolidate(x, 0, method, draws()).shape == (2, 0, 3)


@each_method
def test_equal_vectors_are_reduced_too(method: str) -> None:
    kept = consolidate(torch.ones(2, 7, 3), 4, method, draws())
    assert torch.equal(kept, torch.ones(2, 4, 3))


@each_method
def test_no_gradient_flows_into_what_is_kept(method: str) -> None:
    x = vectors(1, 7, 3).requires_grad_()
    for n_kept in (0, 3, 7):
        assert not consolidate(x, n_kept, method, draws()).requires_grad


# --- the encoder


def naive(built: Any, segments: Any) -> list[Any]:
    """All memories kept, one query at a time."""
    seen: list[list[Any]] = [[] for _ in built.blocks]
    outs = []
    for segment in segments:
        x = list(segment)
        for block, held in zip(built.blocks, seen, strict=True):
            held += x
            after = []
            for token in x:
                q = block.query(block.norm1(token)).view(4, -1)
                keys, values = zip(
                    *(block.key_value(block.norm1(old)).chunk(2) for old in held), strict=True
                )
                mixed = []
                for head in range(4):
                    k, v = (torch.stack([p.view(4, -1)[head] for p in part])
                            for part in (keys, values))  # fmt: skip
                    mixed.append(torch.softmax(k @ q[head] / 2, 0) @ v)
                token = token + block.out(torch.cat(mixed))
                after.append(token + block.mlp(block.norm2(token)))
            x = after
        outs.append(built.norm(torch.stack(x)))
    return outs


def test_all_tokens_give_what_the_plain_loop_gives() -> None:
    built, segments = encoder(WholeSegments()), vectors(3, 1, 5, WIDTH)
    outs, memory = read(built, segments)
    for mine, expected in zip(outs, naive(built, segments[:, 0]), strict=True):
        torch.testing.assert_close(mine[0], expected, atol=1e-10, rtol=0)
    assert torch.equal(torch.cat(memory.layer(0), 1), torch.cat(list(segments), 1))


@each_method
def test_a_ratio_of_one_is_all_tokens_to_the_bit(method: str) -> None:
    segments = vectors(3, 2, 5, WIDTH)
    mine, _ = read(encoder(MCViT(kept_ratio=1.0, method=method)), segments)
    whole, _ = read(encoder(WholeSegments()), segments)
    assert all(torch.equal(a, b) for a, b in zip(mine, whole, strict=True))


def test_without_a_memory_each_segment_is_alone() -> None:
    built, segments = encoder(LoneSegments()), vectors(3, 2, 5, WIDTH)
    outs, memory = read(built, segments)
    assert torch.equal(outs[-1], built(segments[-1])[0])
    assert (len(memory.segments), memory.n_tokens, memory.n_bytes) == (3, 0, 0)


def test_what_is_kept_changes_what_is_read() -> None:
    first, last = vectors(2, 2, 5, WIDTH)
    built = encoder(MCViT())
    _, memory = built(first)
    _, other = built(-first)
    assert not torch.allclose(built(last, memory)[0], built(last, other)[0])


@each_policy
def test_a_video_goes_on_from_what_is_held(name: str) -> None:
    built, segments = encoder(load(f"context/{name}")()), vectors(4, 2, 12, WIDTH)
    outs, memory = read(built, segments)
    _, half = read(built, segments[:2])
    resumed, again = read(built, segments[2:], half)
    assert torch.equal(resumed[-1], outs[-1])
    assert all(map(torch.equal, memory.segments[-1], again.segments[-1]))


@each_policy
def test_a_video_in_a_batch_is_as_alone(name: str) -> None:
    built, segments = encoder(load(f"context/{name}")()), vectors(3, 2, 12, WIDTH)
    outs, _ = read(built, segments)
    alone, _ = read(built, segments[:, :1])
    torch.testing.assert_close(outs[-1][:1], alone[-1], atol=1e-12, rtol=0)


@each_policy
def test_policies_share_their_weights(name: str) -> None:
    built = load(f"context/{name}")()(WIDTH, 2, 4, seed=3)
    other = MCViT()(WIDTH, 2, 4, seed=3)
    for (a, mine), (b, expected) in zip(
        built.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert a == b
        assert torch.equal(mine, expected)


def test_building_draws_no_random_numbers_of_the_process() -> None:
    before = torch.random.get_rng_state()
    MCViT()(WIDTH, 2, 4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_gradients_stop_at_the_memories() -> None:
    built, (first, last) = encoder(MCViT()), vectors(2, 2, 5, WIDTH).requires_grad_()
    _, memory = built(first)
    built(last, memory)[0].sum().backward()
    assert all(weight.grad is not None for weight in built.parameters())
    assert not any(layer.requires_grad for layer in memory.segments[0])


@pytest.mark.parametrize(("ratio", "n"), [(0.01, 1), (0.1, 1), (0.4, 5), (1.0, 12)])
def test_memories_of_a_segment_are_as_many_as_the_ratio_says(ratio: float, n: int) -> None:
    _, memory = read(encoder(MCViT(kept_ratio=ratio)), vectors(3, 2, 12, WIDTH))
    assert memory.n_tokens == 3 * n
    held = {f"{i} {j}": x for i, some in enumerate(memory.segments) for j, x in enumerate(some)}
    assert memory.n_bytes == bytes_of(held) == 2 * 3 * n * 2 * WIDTH * 8


def test_what_is_kept_does_not_change_with_the_tokens_it_was_taken_of() -> None:
    built, segment = encoder(WholeSegments()), vectors(2, 5, WIDTH)
    _, memory = built(segment)
    segment.zero_()
    assert memory.layer(0)[0].abs().min() > 0


def test_no_memory_is_held_twice() -> None:
    _, memory = read(encoder(MCViT()), segments := vectors(3, 2, 12, WIDTH))
    _, longer = read(encoder(MCViT()), segments, memory)
    assert all(a is b for a, b in zip(memory.segments, longer.segments[:3], strict=True))


def test_a_memory_of_other_videos_is_refused() -> None:
    segment = vectors(2, 5, WIDTH)
    _, memory = encoder(MCViT())(segment)
    with pytest.raises(InvalidKnob, match="segment before"):
        encoder(MCViT())(segment[:1], memory)
    with pytest.raises(InvalidKnob, match="segment before"):
        encoder(MCViT(), n_layers=3)(segment, memory)


def test_a_segment_that_does_not_fit_is_refused() -> None:
    segments = vectors(3, 1, 10, WIDTH)
    two = 2 * 2 * WIDTH * 8  # segments of one memory in two layers
    built = encoder(MCViT(), budget=two)
    _, memory = read(built, segments[:2])
    assert memory.n_bytes == two
    with pytest.raises(BudgetExceeded, match="raise budget"):
        built(segments[2], memory)


def test_the_peak_grows_with_the_ratio_in_a_line() -> None:
    segments = vectors(6, 1, 20, WIDTH)

    def bytes_at(ratio: float) -> int:
        built = encoder(MCViT(kept_ratio=ratio))
        with torch.no_grad():
            _, memory = read(built, segments[:-1])
            built(segments[-1], memory)
            return peak(lambda: built(segments[-1], memory)).peak_bytes

    low, middle, high, most = (bytes_at(ratio) for ratio in (0.2, 0.4, 0.6, 0.8))
    assert 0 < middle - low == high - middle == most - high


@pytest.mark.parametrize("knobs", [{"kept_ratio": 0.0}, {"kept_ratio": 1.5}, {"method": "best"}])
def test_bad_knobs_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(InvalidKnob, match=next(iter(knobs))):
        MCViT(**knobs)
    with pytest.raises(InvalidKnob, match="multiple"):
        MCViT()(10, 1, 3)
    with pytest.raises(InvalidKnob, match="method"):
        consolidate(vectors(1, 3, 2), 1, "best", draws())
    with pytest.raises(InvalidKnob, match="n_kept"):
        consolidate(vectors(1, 3, 2), -1, "random", draws())
