"""Swapping by tokens: the peak of a step, gradients to the bit, time beside recomputed blocks.

- primary: peak of a forward and backward pass beside plain autograd's; models are the items
- shares of swapped tokens from none to all: equal gradients, bytes in the store on a line, and as
  many tokens made again as were not swapped
- time of a step of long sequences beside recomputing whole blocks, steps taken in turn
- offsets of a step's allocations beside an allocator that takes them as they come
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import ByteLM, Corpus, corpus
from memwise.train.engine.activations import ActivationPolicy, Tape, compress_activations
from memwise.train.engine.arena import first_fit, in_two_levels, planned, traced
from memwise.train.measure import peak
from memwise.train.policies.memo_swap import MemoSwap
from memwise.train.policies.recompute import Recompute

SHAPES = ((128, 8, 256), (128, 12, 256), (96, 16, 256), (192, 8, 384))  # width, layers, tokens
ALPHAS = (0.0, 0.5, 1.0)
LONG = (128, 4, 4096)
N_TIMED = 8

Values = NDArray[np.float64]


def run(method: MemoSwap, data: Path | None, seed: int) -> list[Row]:
    """Rows of bytes, of time and of offsets."""
    text = corpus(data)
    return [_peaks(method, text, seed), _times(method, text, seed), _arena(method, text, seed)]


def _ground(shape: tuple[int, int, int], text: Corpus, seed: int) -> tuple[ByteLM, Tensor]:
    width, n_layers, context = shape
    model = ByteLM(width, n_layers, 4, context, seed)
    ids = text.batch(0, 8, context, seed)
    model(ids).backward()
    return model, ids


def _step(model: ByteLM, ids: Tensor, policy: ActivationPolicy | None) -> Tape | None:
    model.zero_grad(set_to_none=False)
    if policy is None:
        model(ids).backward()
        return None
    with compress_activations(model, policy) as tape:
        model(ids).backward()
    return tape


def _gradient(model: ByteLM) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _peaks(method: MemoSwap, text: Corpus, seed: int) -> Row:
    mine, plain, again = [], [], []
    equal = linear = counted = True
    for shape in SHAPES:
        model, ids = _ground(shape, text, seed)
        _, n_layers, n_tokens = shape
        _step(model, ids, None)
        exact, moved = _gradient(model), []
        for alpha in ALPHAS:
            policy = replace(method, alpha=alpha)
            tape = _step(model, ids, policy)
            assert tape is not None
            traffic = tape.state("blocks.0")
            equal &= torch.equal(_gradient(model), exact)
            moved.append(traffic.moved_bytes)
            # The last block is not moved.
            rows = (n_layers - 1) * (n_tokens - round(alpha * n_tokens))
            counted &= traffic.again_rows == rows
        low, middle, high = moved
        linear &= abs(middle - (low + high) / 2) <= 0.02 * high and low < 0.3 * high
        plain.append(peak(partial(_step, model, ids, None)).peak_bytes)
        mine.append(peak(partial(_step, model, ids, method)).peak_bytes)
        again.append(peak(partial(_step, model, ids, Recompute())).peak_bytes)
    ratio = np.array(mine) / plain
    return Row(
        "peak of forward and backward / plain's", float(ratio.mean()), 1.0,
        paired_interval(ratio, np.ones(len(ratio)), seed), len(ratio),
        {"blocks recomputed whole": float(np.mean(np.array(again) / plain))},
        {
            "gradients equal to the bit for shares 0, 0.5 and 1": equal,
            "bytes in the store on a line over the shares": linear,
            "just the tokens that were not swapped are made again": counted,
        },
        bytes=max(mine), baseline_bytes=max(plain), data="ByteLM, 8 to 16 layers",
    )  # fmt: skip


def _times(method: MemoSwap, text: Corpus, seed: int) -> Row:
    """Items: turns. Of long sequences, where attention is most of the work and bytes are not."""
    policies: dict[str, ActivationPolicy | None] = {
        "mine": method, "recompute": Recompute(), "plain": None,
        "share 0": replace(method, alpha=0.0),
    }  # fmt: skip
    model, ids = _ground(LONG, text, seed)
    seconds, shares = _timed(model, ids[:1], policies, N_TIMED)
    short, _ = _timed(*_ground(SHAPES[0], text, seed), policies, 5)
    mine, other = seconds["mine"], seconds["recompute"]
    interval = paired_interval(mine, other, seed)
    return Row(
        "time of a step, s (beside recomputed blocks)", float(mine.mean()), float(other.mean()),
        interval, N_TIMED,
        {
            "plain": float(seconds["plain"].mean()),
            "no token swapped": float(seconds["share 0"].mean()),
            "measured share": shares,
            "256 tokens: time / recomputed": float(
                np.median(short["mine"]) / np.median(short["recompute"])
            ),
        },
        {"faster than blocks recomputed whole": interval[1] < 0},
        primary=False, seconds=float(mine.sum()), data=f"ByteLM, {LONG[2]} tokens",
    )  # fmt: skip


def _timed(
    model: ByteLM, ids: Tensor, policies: Mapping[str, ActivationPolicy | None], n: int
) -> tuple[dict[str, Values], float]:
    """Seconds of n steps under each policy, taken in turn, and the mean share that was measured."""
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    shares = []
    for turn in range(-1, n):
        for name, policy in policies.items():
            began = time.perf_counter()
            tape = _step(model, ids, policy)
            if turn < 0:
                continue
            seconds[name].append(time.perf_counter() - began)
            if name == "mine" and tape is not None:
                shares.append(tape.state("blocks.0").alpha)
    return {name: np.array(taken) for name, taken in seconds.items()}, float(np.mean(shares))


def _arena(method: MemoSwap, text: Corpus, seed: int) -> Row:
    """Items: steps of several models, some of them swapped."""
    found, greedy, levels = [], [], []
    largest = seconds = 0.0
    sound = True
    for shape in SHAPES:
        model, ids = _ground(shape, text, seed)
        names = [f"blocks.{i}" for i in range(shape[1])]
        for policy in (None, replace(method, alpha=1.0), replace(method, alpha=0.5)):
            step: Callable[[], object] = partial(_step, model, ids, policy)
            trace = traced(step, model, names, floor=4096)
            arena = planned(trace.requests, trace.passes, method.solver_s)
            sound &= not arena.overlaps()
            seconds += arena.seconds
            found.append(arena.peak_bytes / arena.live_bytes)
            greedy.append(first_fit(trace.requests).peak_bytes / arena.live_bytes)
            if policy is not None and shape == SHAPES[0]:
                both = in_two_levels(trace.requests, trace.passes, method.solver_s)
                levels.append(both.peak_bytes / arena.live_bytes)
            largest = max(largest, arena.peak_bytes)
    mine, other = np.array(found), np.array(greedy)
    interval = paired_interval(mine, other, seed)
    return Row(
        "arena / most live bytes (beside first fit)", float(mine.mean()), float(other.mean()),
        interval, len(mine), {"two levels, always": float(np.mean(levels))},
        {
            "at most 1.02": bool((mine <= 1.02).all()),
            "smaller than placing requests as they come": interval[1] < 0,
            "no two requests lie on each other": sound,
        },
        primary=False, bytes=int(largest), seconds=seconds, data="allocations of steps",
    )  # fmt: skip
