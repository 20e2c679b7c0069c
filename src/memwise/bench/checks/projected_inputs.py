"""Training in a projected space: the peak of a whole step, and the loss beside GaLore's.

- primary: most bytes at one moment of a step (weights, gradients, states, activations) beside
  AdamW in full; shapes are the items; GaLore of equal rank stands beside
- the shares of what is kept of linear inputs, and of states, from storages
- loss: a model that knows books learns Wikipedia, beside GaLore of equal rank, AdamW, frozen
  linear layers and a projection that is drawn only once; windows of text are the items
- learning rates were chosen on the last tenth of the training text
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from memwise.bench.checks.adapters import WIDTH, Ground, ground
from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import ByteLM, fit, window_nll
from memwise.train.engine.act_space import SpaceOptimizer
from memwise.train.engine.activations import Tape, compress_activations
from memwise.train.measure import bytes_of, measure
from memwise.train.policies.adamw import AdamW
from memwise.train.policies.compact import CompAct
from memwise.train.policies.galore import GaLore

SHAPES = ((256, 4, 8, 256), (256, 6, 8, 192), (320, 4, 8, 256), (192, 8, 8, 256))
N_STEPS, N_FADE, SIZE, CONTEXT = 300, 150, 8, 128
RATES = {"mine": 1e-2, "galore": 1e-2, "adamw": 3e-3}
SLACK = 0.03  # "within a few per cent of GaLore at equal rank"
NEVER = 10**9

Values = NDArray[np.float64]
Around = Callable[[], AbstractContextManager[object]]


def run(method: CompAct, data: Path | None, seed: int) -> list[Row]:
    """A row of bytes and one of loss."""
    at = ground(data)
    return [_bytes(method, at, seed), _loss(method, at, seed)]


def _made(policy: Any, model: ByteLM, lr: float) -> tuple[torch.optim.Optimizer, Around]:
    """The optimizer, and what is entered around a forward and backward pass."""
    if isinstance(policy, CompAct):
        optimizer = policy(model, lr=lr, betas=(0.9, 0.95))
        return optimizer, partial(compress_activations, model, optimizer.policy)
    return policy(model.parameters(), lr=lr, betas=(0.9, 0.95)), nullcontext


def _bytes(method: CompAct, at: Ground, seed: int) -> Row:
    found: dict[str, list[int]] = {"mine": [], "galore": [], "adamw": []}
    kept, states, began = [], [], time.perf_counter()
    for width, n_layers, size, context in SHAPES:
        galore = GaLore(rank=round(method.ratio * width))
        for name, policy in (("mine", method), ("galore", galore), ("adamw", AdamW())):
            model = ByteLM(width, n_layers, context=context, seed=seed)
            optimizer, around = _made(policy, model, 1e-3)
            for turn in range(2):  # the first one makes the states
                ids = at.text.batch(turn, size, context, seed)
                with measure(model, optimizer) as report:
                    with around() as tape:
                        model(ids).backward()
                    optimizer.step()
                optimizer.zero_grad()
            found[name].append(report.ledger.peak("device"))
            if isinstance(optimizer, SpaceOptimizer) and isinstance(tape, Tape):
                linear = tape.report().by_kind["linear"]
                kept.append(linear.held_bytes / linear.plain_bytes)
                planes = optimizer.policy.space.planes.values()
                own = bytes_of([optimizer.state[plane.coordinates] for plane in planes])
                states.append(own / (2 * sum(plane.weight.nbytes for plane in planes)))
    seconds = time.perf_counter() - began
    plain = np.array(found["adamw"])
    ratio = np.array(found["mine"]) / plain
    return Row(
        "peak of a training step / AdamW's", float(ratio.mean()), 1.0,
        paired_interval(ratio, np.ones(len(ratio)), seed), len(ratio),
        {
            "GaLore of equal rank": float(np.mean(np.array(found["galore"]) / plain)),
            "kept of linear inputs": float(np.mean(kept)),
            "states of linear weights": float(np.mean(states)),
        },
        {
            f"{what}: {method.ratio:g} of plain's, to 2 %": bool(
                np.allclose(values, method.ratio, rtol=0.02)
            )
            for what, values in (("linear inputs", kept), ("their weights' states", states))
        },
        bytes=max(found["mine"]), baseline_bytes=int(plain.max()), seconds=seconds,
        data="ByteLM of 4 to 8 layers, batches of 8 x 192 to 256 bytes",
        note="weights, gradients, states and activations, the batch excepted",
    )  # fmt: skip


def _loss(method: CompAct, at: Ground, seed: int) -> Row:
    rank = round(method.ratio * WIDTH)
    began = time.perf_counter()
    mine = _trained(method, at, seed, RATES["mine"])
    seconds = time.perf_counter() - began
    galore = _trained(GaLore(rank=rank, gap=method.gap), at, seed, RATES["galore"])
    others = {
        "AdamW": _trained(AdamW(), at, seed, RATES["adamw"]),
        "linear layers frozen": _trained(AdamW(), at, seed, RATES["adamw"], frozen=True),
        "drawn once": _trained(replace(method, gap=NEVER), at, seed, RATES["mine"]),
        "untuned": at.judged(at.model()),
    }
    interval = paired_interval(mine, galore, seed)
    return Row(
        "nat per byte (beside GaLore of equal rank)", float(mine.mean()), float(galore.mean()),
        interval, len(mine), {name: float(nll.mean()) for name, nll in others.items()},
        {
            f"at most {SLACK:.0%} above GaLore's": interval[1] <= SLACK * float(galore.mean()),
            "better than frozen linear layers": (
                paired_interval(mine, others["linear layers frozen"], seed)[1] < 0
            ),
        },
        primary=False, seconds=seconds, data=f"books, then {N_STEPS} steps of WikiText-2",
    )  # fmt: skip


def _trained(policy: Any, at: Ground, seed: int, lr: float, frozen: bool = False) -> Values:
    model = at.model()
    for module in model.modules():
        if frozen and isinstance(module, nn.Linear):
            module.requires_grad_(False)
    optimizer, around = _made(policy, model, lr)
    fit(model, optimizer, at.text, N_STEPS, SIZE, CONTEXT, seed, around, n_fade=N_FADE)
    return window_nll(model, at.text, 96, CONTEXT)
