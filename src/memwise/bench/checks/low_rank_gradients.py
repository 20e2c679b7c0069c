"""What does it cost to see gradients in a subspace, and must the subspace move?

A byte language model learns the same batches from the same weights; rank is a quarter of the width.
Controls: AdamW in full rank, a subspace drawn at random, and one that stays where the first
gradient had it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import ByteLM, Corpus, corpus, fit, window_nll
from memwise.catalogue import load
from memwise.train.engine.optimizer import OptimizerPolicy
from memwise.train.engine.subspace import Refitted, Subspace, fits
from memwise.train.measure import bytes_of

Tensor = torch.Tensor

_WIDTH, _N_STEPS, _SIZE, _CONTEXT = 128, 300, 8, 128
_RANK = _WIDTH // 4
_LR, _LR_FULL = 1e-2, 2e-3  # GaLore's documented rate, and one that suits AdamW at this size
_SLACK = 0.01  # loss above the baseline's that counts as none: the noise between seeds
_NEVER = 10**9


@dataclass(frozen=True)
class _Drawn(Subspace):
    """A basis drawn once at random."""

    def fit(self, grad: Tensor, state: dict[str, Any], draws: torch.Generator) -> None:
        if not self.has_basis(state):
            m = min(grad.shape)
            noise = torch.randn(m, self.rank, generator=draws, device=grad.device)
            self.keep(torch.linalg.qr(noise)[0], state)


@dataclass(frozen=True)
class _In(OptimizerPolicy):
    """AdamW in a given subspace."""

    space: Subspace = field(default_factory=lambda: Refitted(_RANK))

    def subspace(self, shape: Sequence[int]) -> Subspace | None:
        return self.space if fits(shape, self.space.rank) else None


@dataclass(frozen=True)
class _Trained:
    nll: NDArray[np.float64]
    state_bytes: int
    seconds: float


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Loss relative to the baseline's, on the same windows of text."""
    text = corpus(data)
    baseline = load(f"train/{method.card.baseline}")()
    mine = _trained(replace(method, rank=_RANK), text, seed, _LR)
    full = _trained(load("train/adamw")(), text, seed, _LR_FULL)
    theirs = full
    if method.card.baseline != "adamw":
        theirs = _trained(replace(baseline, rank=_RANK), text, seed, _LR)
    others = {
        "full rank": full,
        "random subspace": _trained(_In(_Drawn(_RANK, method.scale)), text, seed, _LR),
        "first subspace": _trained(_In(Refitted(_RANK, method.scale, gap=_NEVER)), text, seed, _LR),
    }
    unit = theirs.nll.mean()
    bound = (1 + _SLACK) * theirs.nll / unit
    value = float(mine.nll.mean() / unit)
    controls = {name: float(other.nll.mean() / unit) for name, other in others.items()}
    share = mine.state_bytes / full.state_bytes
    return [
        Row(
            f"loss beside the baseline's and {_SLACK:.0%}", value, float(bound.mean()),
            paired_interval(mine.nll / unit, bound, seed), len(mine.nll), controls,
            {
                "better than a random subspace": value < controls["random subspace"],
                "better than the first subspace": value < controls["first subspace"],
                "states take at most 0.6 of full rank's": share <= 0.6,
            },
            bytes=mine.state_bytes, seconds=mine.seconds, baseline_bytes=theirs.state_bytes,
            data=f"books and WikiText-2, {_N_STEPS} steps, rank {_RANK} of {_WIDTH}",
            note=f"states {share:.3f} of full rank's, "
            f"{mine.seconds / theirs.seconds:.2f} times the baseline's training time",
        )
    ]  # fmt: skip


def _trained(policy: OptimizerPolicy, text: Corpus, seed: int, lr: float) -> _Trained:
    model = ByteLM(width=_WIDTH, n_layers=3, context=_CONTEXT, seed=seed)
    optimizer = policy(model.parameters(), lr=lr, betas=(0.9, 0.95))
    start = time.perf_counter()
    fit(model, optimizer, text, _N_STEPS, _SIZE, _CONTEXT, seed)
    seconds = time.perf_counter() - start
    return _Trained(window_nll(model, text, context=_CONTEXT), bytes_of(optimizer.state), seconds)
