"""Fewer tokens a block: bytes that are saved, and what fine-tuning still learns.

A byte language model that knows books in windows of 512 bytes is tuned on Wikipedia, with all
tokens and with half of them a block: chosen by predictors, at random, and those of least predicted
attention. It is judged with all tokens on text nobody trained on.

- primary: bytes held between the passes beside those of all tokens; batches are the items
- peak and time of a step; masking in place of leaving out, which must save nothing
- loss after tuning
- how many of the groups that receive most attention a predictor finds, in text it has not seen
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.checks.adapters import Ground, ground
from memwise.bench.data import books, data_folder
from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import ByteLM, Corpus, fit, window_nll
from memwise.budget import Budget
from memwise.models import cached
from memwise.train.engine.act_actions import Planned, Run, Wrap
from memwise.train.engine.act_hooks import Hooks, Spot
from memwise.train.engine.act_subset import (
    Predictor,
    Score,
    Subsets,
    TokenSubset,
    recall,
    recorded,
)
from memwise.train.engine.activations import ActivationPolicy, Site, compress_activations
from memwise.train.measure import peak
from memwise.train.policies.lemo import LeMo

LONG, SIZE, N_STEPS, N_FADE, LR = 512, 4, 120, 60, 1e-3
STRETCHING = 600  # steps, about four minutes of one core, once
N_BATCHES, N_WINDOWS, N_RECORDED, N_SEEN = 5, 60, 4, 8

Values = NDArray[np.float64]


@dataclass(frozen=True)
class _Nothing(ActivationPolicy):
    """Plain autograd, counted."""


def run(method: LeMo, data: Path | None, seed: int) -> list[Row]:
    """Rows of bytes, of loss and of recall."""
    at = ground(data)
    start = _start(at, data)
    model = _model(at, start)
    batches = [at.text.batch(50_000 + i, SIZE, LONG, seed) for i in range(N_RECORDED)]
    began = time.perf_counter()
    chosen = method(model, batches, seed)
    seconds = time.perf_counter() - began
    others = {
        "at random": _scored(chosen, {n: _random(seed + i) for i, n in enumerate(chosen.of)}),
        "least attention": _scored(chosen, {n: _least(one.score) for n, one in chosen.of.items()}),
    }
    return [
        _bytes(at, model, chosen, seed),
        _tuned(at, start, chosen, others, seed),
        _found(at, model, chosen, seed, seconds),
    ]


def _start(at: Ground, data: Path | None) -> dict[str, Tensor]:
    """Parameters of a model that knows books in the longer context; trained once and cached.

    Positions are stretched first, which by itself costs more than the books have taught.
    """
    known = "\n\n".join(story for _, story in books(data_folder(data)))

    def train(where: Path) -> None:
        model = ByteLM(*at.size, context=LONG)
        places = at.start["pos.weight"].t()[None]
        longer = F.interpolate(places, size=LONG, mode="linear", align_corners=True)[0].t()
        model.load_state_dict({**at.start, "pos.weight": longer})
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        text = Corpus.of(known, known[:1000])
        fit(model, optimizer, text, STRETCHING, SIZE, LONG, n_fade=STRETCHING // 2)
        torch.save(model.state_dict(), where / "model.pt")

    width, n_layers = at.size
    key = f"bytelm-books-{width}x{n_layers}-{LONG}-{STRETCHING}-{len(known)}"
    start: dict[str, Tensor] = torch.load(cached(key, train) / "model.pt", weights_only=True)
    return start


def _model(at: Ground, start: Mapping[str, Tensor]) -> ByteLM:
    model = ByteLM(*at.size, context=LONG)
    model.load_state_dict(start)
    return model


def _scored(chosen: Subsets, scores: Mapping[str, Score]) -> Subsets:
    """As many tokens in each block, by other scores."""
    return Subsets({n: TokenSubset(scores[n], one.keep_ratio) for n, one in chosen.of.items()})


def _random(seed: int) -> Score:
    draws = torch.Generator().manual_seed(seed)
    return lambda x: torch.rand(x.shape[:2], generator=draws)


def _least(score: Score) -> Score:
    return lambda x: -score(x)


# --- bytes


def _bytes(at: Ground, model: ByteLM, chosen: Subsets, seed: int) -> Row:
    mine, plain, peaks, high, times = [], [], [], [], []
    for i in range(-1, N_BATCHES):
        ids = at.text.batch(60_000 + i, SIZE, LONG, seed)
        runs = [_step(model, ids, policy) for policy in (chosen, _Nothing())]
        held, top, took = zip(*runs, strict=True)
        if i < 0:
            continue
        mine.append(held[0])
        plain.append(held[1])
        peaks.append(top[0] / top[1])
        high.append(top)
        times.append(took[0] / took[1])
    ratio = np.array(mine) / plain
    masked = _step(model, at.text.batch(60_000, SIZE, LONG, seed), _Masked())[0] / plain[0]
    return Row(
        "held between the passes / all tokens", float(ratio.mean()), 1.0,
        paired_interval(ratio, np.ones(len(ratio)), seed), len(ratio),
        {
            "peak": float(np.mean(peaks)), "time": float(np.mean(times)),
            "tokens masked instead": masked,
        },
        {
            "at most 0.6": bool((ratio <= 0.6).all()),
            "masking saves nothing": masked >= 0.99,
        },
        bytes=max(mine), baseline_bytes=max(plain), data=f"ByteLM, {SIZE} x {LONG} bytes",
    )  # fmt: skip


class _MaskedBlock(Wrap):
    """A control: half of the tokens pass through the block and are thrown away."""

    def wrap(self, module: nn.Module, run: Run, spot: Spot, hooks: Hooks) -> Run:
        def forward(x: Tensor) -> Tensor:
            kept = torch.arange(x.shape[1]) % 2 == 0
            return torch.where(kept[:, None], run(x), x)

        return forward


class _Masked(ActivationPolicy):
    def plan(self, sites: Sequence[Site], budget: Budget | None) -> Mapping[str, Planned]:
        return {site.name: _MaskedBlock() for site in sites if site.kind == "block"}


def _step(model: ByteLM, ids: Tensor, policy: ActivationPolicy) -> tuple[int, int, float]:
    """Bytes held between the passes, the peak of both, and seconds."""
    tapes = []

    def step() -> None:
        with compress_activations(model, policy) as tape:
            model(ids).backward()
        tapes.append(tape)

    step()
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    top = peak(step).peak_bytes
    return tapes[-1].peak_bytes, top, seconds


# --- what is learned


def _tuned(
    at: Ground, start: Mapping[str, Tensor], chosen: Subsets, others: Mapping[str, Subsets],
    seed: int,
) -> Row:  # fmt: skip
    """Items: windows of text that nobody trained on, judged with all tokens."""
    began = time.perf_counter()
    mine = _after(at, start, chosen, seed)
    seconds = time.perf_counter() - began
    plain = _after(at, start, _Nothing(), seed)
    found = {name: _after(at, start, policy, seed) for name, policy in others.items()}
    untuned = window_nll(_model(at, start), at.text, N_WINDOWS, LONG)
    interval = paired_interval(mine, plain, seed)
    behaves = {"at most 3 % above all tokens": interval[1] <= 0.03 * float(plain.mean())}
    for name, nll in found.items():
        behaves[f"better than tokens {name}"] = paired_interval(mine, nll, seed)[1] < 0
    return Row(
        "loss after tuning, nat per byte", float(mine.mean()), float(plain.mean()), interval,
        len(mine),
        {name: float(nll.mean()) for name, nll in found.items()}
        | {"untuned": float(untuned.mean())},
        behaves, primary=False, seconds=seconds,
        data=f"books, then {N_STEPS} steps of WikiText-2, {SIZE} x {LONG} bytes",
    )  # fmt: skip


def _after(at: Ground, start: Mapping[str, Tensor], policy: ActivationPolicy, seed: int) -> Values:
    model = _model(at, start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    around = partial(compress_activations, model, policy)
    fit(model, optimizer, at.text, N_STEPS, SIZE, LONG, seed, around, n_fade=N_FADE)
    return window_nll(model, at.text, N_WINDOWS, LONG)


def _found(at: Ground, model: ByteLM, chosen: Subsets, seed: int, seconds: float) -> Row:
    """Items: blocks of the model over windows that no predictor has seen."""
    passes = [recorded(model, list(chosen.of), ids[None]) for ids in at.text.windows(N_SEEN, LONG)]
    recalls, chance = [], []
    n_bytes = 0
    for name, one in chosen.of.items():
        assert isinstance(one.score, Predictor)
        recalls += [recall(one.score, found[name], one.keep_ratio) for found in passes]
        chance += [one.keep_ratio] * len(passes)
        n_bytes += sum(param.nbytes for param in one.score.parameters())
    mine, other = np.array(recalls), np.array(chance)
    return Row(
        "groups of most attention found (beside chance)", float(mine.mean()), float(other.mean()),
        paired_interval(mine, other, seed), len(mine),
        {f"share of {name}": one.keep_ratio for name, one in chosen.of.items()},
        {"more than 0.85": float(mine.mean()) > 0.85},
        primary=False, bytes=n_bytes, seconds=seconds, data="text not seen",
        note="bytes and seconds are those of all predictors and of their fitting",
    )  # fmt: skip
