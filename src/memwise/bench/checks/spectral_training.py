"""A byte model learns from nothing, and its matrices may train few numbers at a time.

- items: windows of text that nobody trains on, once a seed; in units of the distance between LoRA's
  loss and that of full training, so that the difference is the share of this gap that is closed
- LoRA, and ReLoRA, which merges and starts anew as often as SST draws, train at least as many
  numbers; embeddings, norms and the head are trained by all
- controls: the largest directions always, and factors that are never found anew
- learning rates were chosen on another seed and the last part of the training text; ReLoRA has
  LoRA's
- the model is small and sees 1,000 steps: after 300 all arms still learn what embeddings can hold,
  and LoRA is not behind full training
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import ByteLM, Corpus, corpus, fit, window_nll
from memwise.train.engine.adapters import Handle
from memwise.train.engine.spectral import SpectralLinear
from memwise.train.measure import persistent
from memwise.train.policies.lora import LoRA
from memwise.train.policies.sst import SST

WIDTH, LAYERS, HEADS, CONTEXT, SIZE = 48, 2, 2, 64, 16
RANK = WIDTH // 12
STEPS, FADE, EVERY, WARMUP = 1000, 300, 100, 10
RATES = {"full": 5e-3, "SST": 2e-2, "LoRA": 5e-3, "ReLoRA": 5e-3}
BETAS = (0.9, 0.95)
SEEDS, WINDOWS = 2, 64

Values = NDArray[np.float64]


@dataclass(frozen=True)
class _Largest(SST):
    """The largest directions at every draw."""

    def draw(self, sizes: Tensor, draws: torch.Generator) -> Tensor:
        return sizes.topk(self.rank).indices


@dataclass(frozen=True)
class _Kept(SST):
    """Factors that are never found anew."""

    def refactors(self, n_directions: int, iteration: int) -> bool:
        return False


@dataclass(frozen=True)
class _Run:
    """One training run.

    Attributes:
        nll: (n,) nat per byte of each window.
        skew: largest inner product of two columns of a map; 0 without factors.
        seconds: of training.
        held: bytes by kind: weights, gradients, optimizer states.
    """

    nll: Values
    skew: float
    seconds: float
    held: dict[str, int]

    @property
    def loss(self) -> float:
        """Nat per byte."""
        return float(self.nll.mean())


class _Restarted(torch.optim.AdamW):
    """ReLoRA: every so often deltas move into the weights and start anew, without states."""

    def __init__(self, handle: Handle, groups: Sequence[dict[str, Any]], lr: float, seed: int):
        super().__init__(groups, lr=lr, betas=BETAS, weight_decay=0.0)
        self.handle, self.n_steps = handle, 0
        self.draws = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """As AdamW, with a warm-up of the deltas after each restart."""
        group = self.param_groups[0]
        rate = group["lr"]
        group["lr"] = rate * min(1.0, (self.n_steps % EVERY + 1) / WARMUP)
        super().step()
        group["lr"] = rate
        self.n_steps += 1
        if self.n_steps % EVERY:
            return
        for site in self.handle.sites.values():
            delta: Any = site.delta
            delta.fold(site.base)
            drawn = torch.rand(delta.A.shape, generator=self.draws) * 2 - 1
            delta.A.copy_(drawn / math.sqrt(delta.A.shape[1]))
            delta.B.zero_()
            for param in (delta.A, delta.B):
                self.state.pop(param)


def run(method: SST, data: Path | None, seed: int) -> list[Row]:
    """The share of LoRA's gap to full training that is left, and what the arms hold."""
    text = corpus(data)
    small = replace(method, rank=RANK, every=EVERY, n_warmup=WARMUP)
    seeds = range(seed, seed + SEEDS)
    arms = {
        "SST": [_factored(small, text, one) for one in seeds],
        "full": [_full(text, one) for one in seeds],
        "LoRA": [_adapted(text, one, restarted=False) for one in seeds],
        "ReLoRA": [_adapted(text, one, restarted=True) for one in seeds],
        "largest directions": [_factored(_as(_Largest, small), text, one) for one in seeds],
        "never found anew": [_factored(_as(_Kept, small), text, one) for one in seeds],
    }
    gaps = [a.loss - b.loss for a, b in zip(arms["LoRA"], arms["full"], strict=True)]
    left = {
        name: np.concatenate(
            [(r.nll - f.loss) / gap for r, f, gap in zip(runs, arms["full"], gaps, strict=True)]
        )
        for name, runs in arms.items()
    }
    value, base = left["SST"], left["LoRA"]
    sst, full, lora = (arms[name][0] for name in ("SST", "full", "LoRA"))
    behaves = {
        "LoRA is worse than full training": min(gaps) > 0.03,
        "full training is not beaten": bool(value.mean() >= 0),
        "better than ReLoRA": paired_interval(value, left["ReLoRA"], seed)[1] < 0,
        "better than the largest directions alone": (
            paired_interval(value, left["largest directions"], seed)[1] < 0
        ),
        "columns stay nearer to orthogonal than without new factors": (
            max(r.skew for r in arms["SST"]) < min(r.skew for r in arms["never found anew"]) / 2
        ),
        "LoRA trains at least as many bytes": (sst.held["gradients"] <= lora.held["gradients"]),
    }
    controls = {f"{name}, share": float(v.mean()) for name, v in left.items()}
    controls |= {f"{n}, nat": float(np.mean([r.loss for r in runs])) for n, runs in arms.items()}
    controls |= {f"{n}, skew": arms[n][0].skew for n in ("SST", "never found anew")}
    row = Row(
        "share of LoRA's gap to full training that is left", float(value.mean()),
        float(base.mean()), paired_interval(value, base, seed), len(value), controls, behaves,
        bytes=sum(sst.held.values()), baseline_bytes=sum(lora.held.values()), seconds=sst.seconds,
        data=f"books and WikiText-2, {STEPS} steps, rank {RANK} of {WIDTH}, {SEEDS} seeds",
    )  # fmt: skip
    return [row, _held(sst, full, lora)]


def _held(sst: _Run, full: _Run, lora: _Run) -> Row:
    """Gradients and states of the whole model; they say nothing of the weights, which grow."""
    trained = {n: r.held["gradients"] + r.held["optimizer states"] for n, r in
               {"SST": sst, "full": full, "LoRA": lora}.items()}  # fmt: skip
    share = trained["SST"] / trained["full"]
    return Row(
        "gradients and states, share of full training's", share, 1.0, (share - 1, share - 1), 1,
        {
            "LoRA": trained["LoRA"] / trained["full"],
            "weights, share of full training's": sst.held["weights"] / full.held["weights"],
        },
        primary=False, bytes=trained["SST"], baseline_bytes=trained["full"],
        note="embeddings and head are trained whole by all and take most of what is left",
    )  # fmt: skip


def _as(kind: type[SST], method: SST) -> SST:
    return kind(method.rank, method.every, method.n_warmup)


def _factored(method: SST, text: Corpus, seed: int) -> _Run:
    model = _model(seed)
    optimizer = method(model, lr=RATES["SST"], seed=seed, betas=BETAS)
    return _trained(model, optimizer, text, seed)


def _full(text: Corpus, seed: int) -> _Run:
    model = _model(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATES["full"], betas=BETAS, weight_decay=0.0
    )
    return _trained(model, optimizer, text, seed)


def _adapted(text: Corpus, seed: int, restarted: bool) -> _Run:
    """LoRA of one rank more, which makes up for the sizes that SST trains."""
    model = _model(seed)
    handle = LoRA(RANK + 1, 2.0 * (RANK + 1))(model, seed=seed)
    deltas = list(handle.parameters())
    rest = [p for name, p in model.named_parameters() if not _in_a_map(name, handle)]
    for param in rest:
        param.requires_grad_(True)
    groups = [{"params": deltas}, {"params": rest}]
    optimizer: torch.optim.Optimizer
    if restarted:
        optimizer = _Restarted(handle, groups, RATES["ReLoRA"], seed)
    else:
        optimizer = torch.optim.AdamW(groups, lr=RATES["LoRA"], betas=BETAS, weight_decay=0.0)
    return _trained(model, optimizer, text, seed)


def _in_a_map(name: str, handle: Handle) -> bool:
    return any(name.startswith(f"{site}.") for site in handle.sites)


def _model(seed: int) -> ByteLM:
    return ByteLM(WIDTH, LAYERS, HEADS, CONTEXT, seed)


def _trained(
    model: ByteLM, optimizer: torch.optim.Optimizer, text: Corpus, seed: int
) -> _Run:  # fmt: skip
    start = time.perf_counter()
    fit(model, optimizer, text, STEPS, SIZE, CONTEXT, seed, n_fade=FADE)
    seconds = time.perf_counter() - start
    nll = window_nll(model, text, WINDOWS, CONTEXT)
    skew = _skew(model)
    model(text.batch(STEPS, SIZE, CONTEXT, seed)).backward()
    optimizer.step()  # so that gradients and states are there to be counted
    book = persistent(model, optimizer)
    held = {kind: book["device", kind] for kind in ("gradients", "optimizer states")}
    held["weights"] = book["device", "parameters"] + book["device", "buffers"]
    return _Run(nll, skew, seconds, held)


@torch.no_grad()
def _skew(model: nn.Module) -> float:
    found = [0.0]
    for module in model.modules():
        if isinstance(module, SpectralLinear):
            for whole in (module.left, module.right):
                gram = whole.T @ whole
                found.append(float((gram - torch.eye(len(gram))).abs().max()))
    return max(found)
