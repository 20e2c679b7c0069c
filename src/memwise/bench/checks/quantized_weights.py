"""Weights, moments and basis in few bits beside GaLore: loss, bytes, fits, rounding of steps.

A byte language model that knows books learns Wikipedia from the same batches, rank a quarter of the
width, under the method and its baseline with the same first gap; windows of text that nobody
trained on are the paired items. Bytes are those of what a checkpoint of the model holds and of all
states, after training.

Must hold: far fewer bytes, fewer fits, and at a small rate weights that are rounded to nearest stay
nearly where they are while weights that are rounded at random learn. What a model learns with its
stored weights frozen does not count there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memwise.bench.checks.adapters import WIDTH, Ground, ground
from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import fit, window_nll
from memwise.catalogue import load
from memwise.train.measure import bytes_of

_N_STEPS, _SIZE, _CONTEXT, _N_WINDOWS, _N_FADE = 300, 8, 128, 64, 150
_N_SEEDS = 3
_LR, _SMALL_LR, _GAP = 1.6e-2, 4e-4, 20  # the rate is GaLore's own; its step is a quarter of it
_SLACK, _MOST_BYTES, _MOST_FITS = 0.03, 0.45, 0.6  # the spec's
_NEAREST = "uint8/group256"


@dataclass(frozen=True)
class _Run:
    """One training run: nat per byte of the windows, bytes, fits of the basis, seconds."""

    nll: NDArray[np.float64]
    n_bytes: int
    n_fits: int
    seconds: float


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Relative loss beside GaLore's and 3 %, and what a small rate does."""
    at = ground(data)
    rank = WIDTH // 4
    mine, theirs = (
        [_tuned(policy, at, _LR, each) for each in range(seed, seed + _N_SEEDS)]
        for policy in (
            replace(method, rank=rank, gap=_GAP),
            replace(load(f"train/{method.card.baseline}")(), rank=rank, gap=_GAP),
        )
    )
    value = np.concatenate([a.nll / b.nll.mean() for a, b in zip(mine, theirs, strict=True)])
    units = np.concatenate([one.nll / one.nll.mean() for one in theirs])
    bound = (1 + _SLACK) * units
    share = mine[0].n_bytes / theirs[0].n_bytes
    fewer = sum(one.n_fits for one in mine) / sum(one.n_fits for one in theirs)
    loss = Row(
        f"loss beside GaLore's and {_SLACK:.0%}", float(value.mean()), float(bound.mean()),
        paired_interval(value, bound, seed), len(value),
        {
            "bytes beside GaLore's": share,
            "fits beside GaLore's": fewer,
            **{f"seed {seed + i}": float(part.mean())
               for i, part in enumerate(value.reshape(_N_SEEDS, -1))},
        },
        {
            f"weights, states and basis take at most {_MOST_BYTES:g} of GaLore's":
                share <= _MOST_BYTES,
            f"at most {_MOST_FITS:g} of GaLore's fits": fewer <= _MOST_FITS,
        },
        bytes=mine[0].n_bytes, seconds=mine[0].seconds, baseline_bytes=theirs[0].n_bytes,
        data=f"books, then {_N_STEPS} steps of WikiText-2, rank {rank}, {_N_SEEDS} seeds",
    )  # fmt: skip
    return [loss, _small_steps(replace(method, rank=rank, gap=_GAP), at, seed)]


def _small_steps(method: Any, at: Ground, seed: int) -> Row:
    """What is learned at a rate whose steps are far below a level of the codes."""
    small = partial(_tuned, at=at, lr=_SMALL_LR, seed=seed)
    random_, nearest, frozen = (
        small(method).nll,
        small(replace(method, weight_codec=_NEAREST)).nll,
        small(method, frozen=True).nll,  # embedding and head are no linear maps, and learn
    )
    share = (frozen.mean() - nearest.mean()) / (frozen.mean() - random_.mean())
    untuned = window_nll(at.model(), at.text, _N_WINDOWS, _CONTEXT)
    return Row(
        f"nat per byte at a rate of {_SMALL_LR:g}", float(random_.mean()), float(nearest.mean()),
        paired_interval(random_, nearest, seed), len(random_),
        {
            "stored weights frozen": float(frozen.mean()),
            "untuned": float(untuned.mean()),
            "share of it that nearest learns": float(share),
        },
        {"rounded to nearest, less than a quarter of it is learned": bool(share < 0.25)},
        primary=False, data="the same, one seed",
        note="the column of the baseline is the method with weights rounded to nearest; judged is "
        "what the stored weights learn, beside all else, which learns in any case",
    )  # fmt: skip


def _tuned(policy: Any, at: Ground, lr: float, seed: int, frozen: bool = False) -> _Run:
    model = at.model()
    if hasattr(policy, "store"):
        for module in policy.store(model).values():
            module.weight.requires_grad_(not frozen)
    optimizer = policy([p for p in model.parameters() if p.requires_grad], lr=lr)
    start = time.perf_counter()
    fit(model, optimizer, at.text, _N_STEPS, _SIZE, _CONTEXT, seed, n_fade=_N_FADE)
    seconds = time.perf_counter() - start
    bases = [
        state
        for state in optimizer.state.values()
        if any(name.startswith("basis") for name in state)
    ]
    n_fits = sum(state.get("n_fits", -(-_N_STEPS // policy.gap)) for state in bases)
    held: list[Tensor] = list(model.state_dict().values())
    nll = window_nll(model, at.text, _N_WINDOWS, _CONTEXT)
    return _Run(nll, bytes_of(held) + bytes_of(optimizer.state), n_fits, seconds)
