"""Weights of two bits: blocks fitted to their old outputs, beside other ways to start.

- baseline: QLoRA with the same codec: round to nearest, B = 0
- control: LoftQ, which rounds and takes the low-rank part of the error in turns, five times
- behaves: the outputs of every block are closest for ApiQ, the more so the deeper, the loss before
  tuning is at most a third of LoftQ's, and the lead lasts through tuning
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memwise.bench.checks.adapters import CONTEXT, RATES, STEPS, Ground, Values, ground
from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import ByteLM
from memwise.codec.th import codec
from memwise.train.engine.adapted import blocks, select
from memwise.train.engine.adapters import Handle
from memwise.train.measure import bytes_of
from memwise.train.policies.apiq import ApiQ
from memwise.train.policies.qlora import QLoRA

CALIBRATION = 16  # batches of 4 x 128 bytes of the training text
TURNS = 5


def run(method: ApiQ, data: Path | None, seed: int) -> list[Row]:
    """Nat per byte before and after tuning."""
    at = ground(data)
    batches = [at.text.batch(10_000 + nth, 4, CONTEXT, seed) for nth in range(CALIBRATION)]
    plain = QLoRA(method.rank, method.alpha, method.codec)
    mine, theirs, loftq = at.model(), at.model(), at.model()
    handles = {
        "ApiQ": method(mine, seed=seed, batches=batches),
        "QLoRA": plain(theirs, seed=seed),
        "LoftQ": _loftq(loftq, plain, seed),
    }
    models = {"ApiQ": mine, "QLoRA": theirs, "LoftQ": loftq}
    dense = at.model()
    start = at.judged(dense)
    errors = {name: _errors(model, dense, batches[0]) for name, model in models.items()}
    before = {name: at.judged(model) for name, model in models.items()}
    after = {name: _tuned(at, models[name], handles[name], seed) for name in models}

    excess = {name: float((nll - start).mean()) for name, nll in before.items()}
    gap = errors["QLoRA"] - errors["ApiQ"]
    untuned = Row(
        "nat per byte before tuning", float(before["ApiQ"].mean()), float(before["QLoRA"].mean()),
        paired_interval(before["ApiQ"], before["QLoRA"], seed), len(start),
        {"dense": float(start.mean()), "LoftQ": float(before["LoftQ"].mean())},
        {
            "excess at most a third of LoftQ's": excess["ApiQ"] < excess["LoftQ"] / 3,
            "closest at every depth": bool((errors["ApiQ"] < errors["LoftQ"]).all()),
            "LoftQ is closer than QLoRA at every depth": bool(
                (errors["LoftQ"] < errors["QLoRA"]).all()
            ),
            "the gap grows with depth": bool((np.diff(gap) > 0).all()),
        },
        bytes=bytes_of(mine), baseline_bytes=bytes_of(theirs), data=f"books, {method.codec}",
        note=f"relative error of the last block: {_listed(errors)}",
    )  # fmt: skip
    tuned = Row(
        f"nat per byte after {STEPS} steps", float(after["ApiQ"].mean()),
        float(after["QLoRA"].mean()), paired_interval(after["ApiQ"], after["QLoRA"], seed),
        len(start), {"LoftQ": float(after["LoftQ"].mean())},
        {"still ahead of LoftQ": paired_interval(after["ApiQ"], after["LoftQ"], seed)[1] < 0},
        data="books, then wikitext2",
    )  # fmt: skip
    return [untuned, tuned]


def _listed(errors: dict[str, Values]) -> str:
    return ", ".join(f"{name} {error[-1]:.3f}" for name, error in errors.items())


def _tuned(at: Ground, model: ByteLM, handle: Handle, seed: int) -> Values:
    at.tuned(model, handle.parameters(), RATES["QLoRA"], seed)
    return at.judged(model)


@torch.no_grad()
def _loftq(model: ByteLM, policy: QLoRA, seed: int) -> Handle:
    """QLoRA, started from rounding and singular vectors in turns."""
    scale = policy.alpha / policy.rank
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in select(model, None).items():
        weight: Any = module.weight
        low = torch.zeros_like(weight)
        for _ in range(TURNS):
            rounded = codec(policy.codec).fake(weight - low)
            u, s, v = torch.linalg.svd(weight - rounded, full_matrices=False)
            root = s[: policy.rank].sqrt()
            b, a = u[:, : policy.rank] * root, root[:, None] * v[: policy.rank]
            low = b @ a
        weight.data = weight - low
        factors[name] = a / scale, b
    handle = policy(model, seed=seed)
    for name, (a, b) in factors.items():
        delta: Any = handle.sites[name].delta
        delta.A.copy_(a)
        delta.B.copy_(b)
    return handle


@torch.no_grad()
def _errors(model: ByteLM, dense: ByteLM, ids: Tensor) -> Values:
    """Squared error of each block's output, as a share of what is there."""
    got, wanted = _outputs(model, ids), _outputs(dense, ids)
    shares = [
        float((g - w).square().sum() / w.square().sum())
        for g, w in zip(got, wanted, strict=True)
    ]  # fmt: skip
    return np.array(shares)


def _outputs(model: ByteLM, ids: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, args, output: found.append(output))
        for block in blocks(model)[1]
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found
