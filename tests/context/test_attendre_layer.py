"""Queries that wait, against a loop over pairs in float64, and against full attention."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from memwise.context.engine.waiting import WaitingAttention  # noqa: E402
from memwise.context.policies.attendre_layer import AttendreLayer  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

WIDTH, N_TOKENS = 16, 23


def made(memory: int, delay: int) -> Any:
    """A layer whose attention decides what comes out, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = AttendreLayer(delay=delay, memory=memory, n_heads=2)(WIDTH).double()
        for param in layer.parameters():
            if param.ndim > 1:
                torch.nn.init.normal_(param, std=0.6)
    return layer


def stream(n_rows: int = 2, n_tokens: int = N_TOKENS) -> Any:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(n_rows, n_tokens, WIDTH, generator=draws, dtype=torch.float64)


@torch.no_grad()
def run(layer: Any, x: Any, chunk: int) -> Any:
    found, line = [], None
    for part in x.split(chunk, 1):
        out, line = layer(part, line)
        found.append(out)
    return torch.cat([*found, layer.finish(line)], 1)


def turned(x: Any, at: int) -> Any:
    half = x.shape[-1] // 2
    angle = at * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


@torch.no_grad()
def by_pairs(layer: Any, x: Any, sees: Any) -> Any:
    """The output of a layer whose token i attends to the tokens of sees(i)."""
    rows = []
    for row in x:
        parts = layer.qkv(layer.norm(row)).view(len(row), 3, layer.n_heads, -1)
        found = torch.zeros(len(row), *parts.shape[2:], dtype=x.dtype)
        for i in range(len(row)):
            for head in range(layer.n_heads):
                query = turned(parts[i, 0, head], i)
                logits = torch.stack([query @ turned(parts[j, 1, head], j) for j in sees(i)])
                share = (logits / math.sqrt(len(query))).softmax(0)
                found[i, head] = share @ torch.stack([parts[j, 2, head] for j in sees(i)])
        rows.append(row + layer.out(found.flatten(1)))
    return torch.stack(rows)


@pytest.mark.parametrize(("memory", "delay"), [(1, 0), (6, 0), (6, 5), (9, 4), (40, 3)])
@pytest.mark.parametrize("chunk", [1, 5, N_TOKENS])
def test_a_query_meets_what_is_held_when_its_turn_comes(
    memory: int, delay: int, chunk: int
) -> None:
    layer, x = made(memory, delay), stream()

    def sees(i: int) -> list[int]:
        newest = min(i + delay, N_TOKENS - 1)
        return list(range(max(0, newest - memory + 1), newest + 1))

    expected = by_pairs(layer, x, sees)
    torch.testing.assert_close(run(layer, x, chunk), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, N_TOKENS])
def test_who_waits_for_the_whole_text_attends_on_both_sides(chunk: int) -> None:
    layer, x = made(N_TOKENS + 1, N_TOKENS), stream()
    expected = by_pairs(layer, x, lambda i: range(N_TOKENS))
    torch.testing.assert_close(run(layer, x, chunk), expected, atol=1e-12, rtol=0)


def test_what_comes_out_is_late_and_nothing_is_lost() -> None:
    layer, x = made(8, 5), stream()
    line, n_out = None, []
    with torch.no_grad():
        for part in x.split(2, 1):
            out, line = layer(part, line)
            n_out.append(out.shape[1])
    assert n_out[:4] == [0, 0, 1, 2]
    assert sum(n_out) == N_TOKENS - 5
    assert layer.finish(line).shape[1] == 5


def test_a_stream_holds_no_more_however_long_it_is() -> None:
    layer = made(8, 5)
    line, sizes = None, []
    with torch.no_grad():
        for part in stream(1, 120).split(10, 1):
            _, line = layer(part, line)
            sizes.append(line.nbytes)
    assert set(sizes) == {8 * WIDTH * (8 + 8 + 5 + 5)}


def test_a_batch_is_its_rows() -> None:
    layer, x = made(9, 4), stream(3)
    together = run(layer, x, 5)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], run(layer, x[row : row + 1], 5))


def test_later_tokens_teach_those_that_waited_for_them() -> None:
    layer, x = made(9, 4), stream(1).requires_grad_()
    out, _ = layer(x)
    (slope,) = torch.autograd.grad(out[0, 6].sum(), x)
    reached = slope[0].abs().sum(-1) > 0
    assert reached.nonzero().flatten().tolist() == list(range(2, 11))


@pytest.mark.parametrize("knobs", [{"delay": -1}, {"memory": 16}, {"n_heads": 0}])
def test_knobs_that_make_no_layer_are_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(InvalidKnob, match="above the delay"):
        AttendreLayer(**knobs)


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="width=10"):
        WaitingAttention(10, 4, 8, 2)
