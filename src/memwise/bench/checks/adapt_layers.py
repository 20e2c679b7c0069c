"""A quarter of the blocks in training at a time: chosen by learned importance, or by chance.

- primary: gradients and optimizer states during training, as a share of those of LoRA on all blocks
- control: blocks drawn uniformly, with all else the same
- behaves: importance moves, loses to chance in at most one of three seeds, agrees with what leaving
  a block out costs, and ends close to LoRA on all blocks
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from memwise.bench.checks.adapters import CONTEXT, Ground, Values, ground
from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import ByteLM
from memwise.train.engine.adapters import Handle
from memwise.train.engine.switching import LayerSwitch
from memwise.train.measure import persistent, saved
from memwise.train.policies.ist import IST, Sampler

WIDTH, LAYERS = 64, 12
STEPS, RATE, SIZE = 150, 5e-3, 8
SEEDS = 3


@dataclass
class Trained:
    """One run.

    Attributes:
        model: after tuning.
        handle: its adapters.
        nll: nat per byte of each window.
        state_bytes: gradients and optimizer states, every tenth step.
        saved_bytes: what autograd kept, every tenth step.
        importance: of each block at the end; empty without a sampler.
    """

    model: ByteLM
    handle: Handle
    nll: Values
    state_bytes: Values
    saved_bytes: Values
    importance: Tensor


def run(method: IST, data: Path | None, seed: int) -> list[Row]:
    """Bytes in training as a share of LoRA's, and nat per byte beside a uniform choice."""
    at = ground(data, WIDTH, LAYERS)
    seeds = [seed + nth for nth in range(SEEDS)]
    mine = [_trained(at, method, one, by_importance=True) for one in seeds]
    chance = [_trained(at, replace(method, rate=0.0), one, by_importance=True) for one in seeds]
    full = [_trained(at, method, one, by_importance=False) for one in seeds]

    share = np.concatenate([a.state_bytes / b.state_bytes for a, b in zip(mine, full, strict=True)])
    kept = np.concatenate([a.saved_bytes / b.saved_bytes for a, b in zip(mine, full, strict=True)])
    nll, by_chance, by_all = (np.stack([r.nll for r in runs]) for runs in (mine, chance, full))
    wins = int((nll.mean(1) <= by_chance.mean(1)).sum())
    learned = torch.stack([one.importance for one in mine])
    agreement = _spearman(learned.mean(0).numpy(), _left_out(full[0], at))
    states = Row(
        "gradients and optimizer states, share of LoRA's", float(share.mean()), 1.0,
        paired_interval(share, np.ones(len(share)), seed), len(share),
        {"Spearman of importance and leaving out": agreement, "seeds won against chance": wins},
        {
            "importance moves": bool((learned.std(1) > 0).all()),
            "not worse than chance in 2 of 3 seeds": wins >= 2,
            "importance agrees with leaving a block out": agreement > 0.3,
            "ends within 3 % of LoRA on all blocks": nll.mean() < 1.03 * by_all.mean(),
        },
        data=f"byte model of {LAYERS} blocks, {STEPS} steps, {SEEDS} seeds",
    )  # fmt: skip
    ones = np.ones(len(kept))
    activations = Row(
        "saved bytes, share of LoRA's", float(kept.mean()), 1.0, paired_interval(kept, ones, seed),
        len(kept), primary=False, note="saving starts below the lowest block in training",
    )  # fmt: skip
    quality = Row(
        f"nat per byte after {STEPS} steps, beside a uniform choice", float(nll.mean()),
        float(by_chance.mean()), paired_interval(nll.mean(0), by_chance.mean(0), seed),
        nll.shape[1],
        {
            "LoRA on all blocks": float(by_all.mean()),
            "untuned": float(at.judged(at.model()).mean()),
        },
        primary=False, data="books, then wikitext2",
    )  # fmt: skip
    return [states, activations, quality]


def _trained(at: Ground, method: IST, seed: int, by_importance: bool) -> Trained:
    model = at.model()
    handle = method(model, seed=seed)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=RATE, weight_decay=0.0)
    sampler: Sampler | None = method.sampler(handle, optimizer, seed) if by_importance else None
    states, kept = [], []
    for step in range(STEPS):
        ids = at.text.batch(step, SIZE, CONTEXT, seed)
        if sampler is not None:
            sampler(lambda ids=ids: model(ids))  # type: ignore[misc]
        if step % 10 == 9:
            kept.append(saved(model, lambda ids=ids: model(ids)).held_bytes)  # type: ignore[misc]
        optimizer.zero_grad()
        model(ids).backward()
        optimizer.step()
        if step % 10 == 9:
            book = persistent(model, optimizer)
            states.append(book["device", "gradients"] + book["device", "optimizer states"])
    nll = at.judged(model)
    importance = torch.zeros(0) if sampler is None else sampler.importance
    in_training, for_backward = np.array(states, np.float64), np.array(kept, np.float64)
    return Trained(model, handle, nll, in_training, for_backward, importance)


def _left_out(run: Trained, at: Ground) -> Values:
    """What training text costs more when the delta of one block is left out, for each block."""
    ids = at.text.batch(STEPS, 32, CONTEXT, 0)
    switch = LayerSwitch(run.handle, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0))
    cost = []
    with torch.no_grad():
        for layer in switch.layers:
            with switch.damped([layer], 0.0):
                cost.append(float(run.model(ids)))
    return np.array(cost)


def _spearman(a: Values, b: Values) -> float:
    first, second = (np.argsort(np.argsort(x)).astype(np.float64) for x in (a, b))
    return float(np.corrcoef(first, second)[0, 1])
