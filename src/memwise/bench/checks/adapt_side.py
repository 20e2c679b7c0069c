"""A side network beside LoRA: what autograd keeps for a step, and what is learned from it.

The head is tuned in all arms, as one for a new task would be: it needs no gradient through the
blocks, and without it a frozen head would be compared with a tuned one.

- primary: bytes saved for the backward pass, as a share of LoRA's, over batches of the tuning text
- behaves: nothing of the frozen blocks is saved, the number of trained numbers does not depend on
  depth, it learns more than the head alone does, and ends at most 3 % above LoRA
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from memwise.bench.checks.adapters import CONTEXT, RATES, STEPS, WIDTH, ground
from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import ByteLM
from memwise.train.measure import Saved, saved
from memwise.train.policies.lora import LoRA
from memwise.train.policies.read import READ

BATCHES = 8


def run(method: READ, data: Path | None, seed: int) -> list[Row]:
    """Saved bytes as a share of LoRA's, and nat per byte after tuning."""
    at = ground(data)
    # The paper's width is a sixth or less of its models'; a quarter here.
    narrow = replace(method, width=min(method.width, WIDTH // 4))
    model, peer, probe = at.model(), at.model(), at.model().requires_grad_(False)
    side, lora = narrow(model, seed=seed), LoRA()(peer, seed=seed)
    heads = [list(_free_head(one).parameters()) for one in (model, peer, probe)]
    batches = [at.text.batch(step, 8, CONTEXT, seed) for step in range(BATCHES)]
    mine, theirs = _saved(model, batches), _saved(peer, batches)

    at.tuned(model, side.parameters(), RATES["READ"], seed, head=heads[0])
    at.tuned(peer, lora.parameters(), RATES["LoRA"], seed, head=heads[1])
    at.tuned(probe, [], RATES["head"], seed, head=heads[2])
    value, base, head = (at.judged(one) for one in (model, peer, probe))

    share = np.array([a.held_bytes / b.held_bytes for a, b in zip(mine, theirs, strict=True)])
    in_blocks = sum(_of_blocks(one) for one in mine)
    memory = Row(
        "saved bytes, share of LoRA's", float(share.mean()), 1.0,
        paired_interval(share, np.ones(BATCHES), seed), BATCHES,
        behaves={
            "the blocks save nothing": in_blocks == 0,
            "6 and 18 blocks train as many numbers": _size(narrow, 6) == _size(narrow, 18),
            "it learns more than the head alone": paired_interval(value, head, seed)[1] < 0,
            "it ends within 3 % of LoRA": value.mean() < 1.03 * base.mean(),
        },
        bytes=mine[0].held_bytes, baseline_bytes=theirs[0].held_bytes, data="batches of 8 x 128",
    )  # fmt: skip
    quality = Row(
        f"nat per byte after {STEPS} steps", float(value.mean()), float(base.mean()),
        paired_interval(value, base, seed), len(value),
        {"head alone": float(head.mean()), "untuned": float(at.judged(at.model()).mean())},
        primary=False, data="books, then wikitext2",
    )  # fmt: skip
    return [memory, quality]


def _free_head(model: ByteLM) -> nn.Module:
    return model.head.requires_grad_(True)


def _saved(model: nn.Module, batches: list[Tensor]) -> list[Saved]:
    return [saved(model, lambda ids=ids: model(ids)) for ids in batches]  # type: ignore[misc]


def _of_blocks(found: Saved) -> int:
    """Bytes that modules inside the blocks saved."""
    return sum(n for name, n in found.by_module().items() if name.count(".") > 1)


def _size(method: READ, n_layers: int) -> int:
    model = ByteLM(32, n_layers, 2, 16)
    return sum(p.numel() for p in method(model).parameters())
