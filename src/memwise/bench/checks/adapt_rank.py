"""Full rank from few numbers: matrices to be matched, and a model to be tuned.

- primary: how much of an orthogonal matrix, whose directions all count the same, is left
  unmatched, beside LoRA with at least as many numbers
- control: a target of rank 4, where LoRA must win
- context: a Gaussian target, and tuning the byte model at equal numbers
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.checks.adapters import RATES, STEPS, ground
from memwise.bench.engine import Row, paired_interval
from memwise.train.engine.adapters import AdapterPolicy, Handle
from memwise.train.measure import bytes_of
from memwise.train.policies.lora import LoRA
from memwise.train.policies.randlora import RandLoRA

SIDE, RANK = 64, 4
TARGETS, FITTING = 8, 1200

Values = NDArray[np.float64]


def run(method: RandLoRA, data: Path | None, seed: int) -> list[Row]:
    """What stays unmatched, and nat per byte."""
    small = replace(method, rank=RANK, alpha=2.0 * RANK)
    numbers = _numbers(small)
    rival = LoRA(rank=math.ceil(numbers / (2 * SIDE)), alpha=2.0)
    kinds: dict[str, Callable[[torch.Generator], Tensor]] = {
        "orthogonal": lambda draws: torch.linalg.qr(torch.randn(SIDE, SIDE, generator=draws))[0],
        "Gaussian": lambda draws: torch.randn(SIDE, SIDE, generator=draws) / math.sqrt(SIDE),
        "rank 4": lambda draws: (
            torch.randn(SIDE, 4, generator=draws) @ torch.randn(4, SIDE, generator=draws) / 16
        ),
    }
    left = {kind: _left(small, draw, seed) for kind, draw in kinds.items()}
    base = {kind: _left(rival, draw, seed) for kind, draw in kinds.items()}
    behaves = {
        "LoRA has at least as many numbers": _numbers(rival) >= numbers,
        "random weights give the full rank": _rank(small) == SIDE,
        "LoRA wins on a target of rank 4": base["rank 4"].mean() < left["rank 4"].mean() - 0.05,
    }
    rows = [
        Row(
            f"share left of {_article(kind)} target", float(value.mean()), float(base[kind].mean()),
            paired_interval(value, base[kind], seed), len(value),
            behaves=behaves if kind == "orthogonal" else {}, primary=kind == "orthogonal",
            data=f"{TARGETS} matrices of {SIDE} x {SIDE}, {numbers} numbers",
        )
        for kind, value in left.items()
    ]  # fmt: skip
    return [*rows, _tuning(method, data, seed)]


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _numbers(policy: AdapterPolicy) -> int:
    return sum(p.numel() for p in policy(_map()).parameters())


def _map() -> nn.Module:
    return nn.Sequential(nn.Linear(SIDE, SIDE, bias=False))


def _rank(policy: AdapterPolicy) -> int:
    handle = policy(_map())
    draws = torch.Generator().manual_seed(1)
    for param in handle.parameters():
        param.data = torch.randn(param.shape, generator=draws)
    return int(torch.linalg.matrix_rank(_change(handle)))


def _change(handle: Handle) -> Tensor:
    site = handle.sites["0"]
    assert site.delta is not None
    return site.delta.weight(site.base)


def _left(policy: AdapterPolicy, draw: Callable[[torch.Generator], Tensor], seed: int) -> Values:
    """Share of the squared norm of each target that the fitted delta does not match."""
    found = []
    for nth in range(TARGETS):
        target = draw(torch.Generator().manual_seed(seed * 1000 + nth))
        handle = policy(_map(), seed=nth)
        optimizer = torch.optim.Adam(handle.parameters(), lr=0.02)
        fade = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FITTING)
        for _ in range(FITTING):
            # Over white inputs, the mean squared error of the outputs is that of the weights.
            loss = (_change(handle) - target).square().sum() / target.square().sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            fade.step()
        found.append(float(loss.detach()))
    return np.array(found)


def _tuning(method: RandLoRA, data: Path | None, seed: int) -> Row:
    at = ground(data)
    model, peer = at.model(), at.model()
    handle = method(model, seed=seed)
    n_trained = sum(p.numel() for p in handle.parameters())
    ranked = LoRA(rank=1)(peer, seed=seed)
    rank = math.ceil(n_trained / sum(p.numel() for p in ranked.parameters()))
    ranked.remove()
    lora = LoRA(rank=rank, alpha=2.0 * rank)(peer, seed=seed)
    at.tuned(model, handle.parameters(), RATES["RandLoRA"], seed)
    at.tuned(peer, lora.parameters(), RATES["LoRA"], seed)
    value, base = at.judged(model), at.judged(peer)
    low, high = paired_interval(value, base, seed)
    return Row(
        f"nat per byte after {STEPS} steps", float(value.mean()), float(base.mean()), (low, high),
        len(value), {"untuned": float(at.judged(at.model()).mean())},
        {"tuning is not worse than LoRA's by 0.02 nat": high < 0.02}, primary=False,
        bytes=bytes_of(list(handle.parameters())), baseline_bytes=bytes_of(list(lora.parameters())),
        data="books, then wikitext2", note=f"bytes: trained numbers; LoRA of rank {rank}",
    )  # fmt: skip
