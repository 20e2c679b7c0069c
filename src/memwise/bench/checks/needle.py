"""Does a code in a long text survive in a few slots?

The method and its baseline keep 128 slots in each full-attention layer of Gemma-3-270M, of 1,000
tokens. Methods that look at attention are told the question before the text, and so is their
baseline; the others are not. With a second set, decoys, other numbers stand in the text.

What must hold: the full cache and an oracle of as many slots read the code, random slots do not; a
question for something else does not help.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memwise.bench.engine import Row, paired_interval
from memwise.bench.needle import Item, Reading, items, oracle_for, readings
from memwise.catalogue import load
from memwise.context.engine.policy import CachePolicy
from memwise.models import LocalModel, local_model

N_ITEMS, N_DECOYS, N_SLOTS = 16, 8, 128
_NO_BETTER = 1.5  # nats: what is not read; chance among ten digits is 2.3


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Nat per digit, plain and with decoys."""
    lm = local_model()
    plain = items(lm.tokenizer, data, N_ITEMS, False, seed)
    decoys = items(lm.tokenizer, data, N_DECOYS, True, seed)
    return [
        _row(lm, method, plain, seed, "nat per digit", True),
        _row(lm, method, decoys, seed, "nat per digit, decoys in the text", False),
    ]


def _row(
    lm: LocalModel, method: Any, todo: list[Item], seed: int, metric: str, primary: bool
) -> Row:
    known = method.window > 0
    baseline, chance, oracle = (
        load(f"context/{name}")() for name in (method.card.baseline, "random", "oracle")
    )

    def told(policy: CachePolicy) -> Callable[[Item], CachePolicy]:
        return lambda item: oracle_for(policy, item) if type(policy) is type(oracle) else policy

    def given(policy: CachePolicy, n_slots: int = N_SLOTS, asked: str = "ask") -> list[Reading]:
        return readings(lm, told(policy), todo, n_slots, known, asked)

    mine, theirs, full, sure, any_ = (
        given(method), given(baseline), given(chance, 0), given(oracle), given(chance)
    )  # fmt: skip
    controls = {"full cache": full, "oracle": sure, "random": any_}
    if known:
        controls["another question"] = given(method, asked="wrong")
    means = {name: float(_nats(found).mean()) for name, found in controls.items()}
    behaves = {
        "full cache and oracle read it": max(means["full cache"], means["oracle"]) < 0.3,
        "random slots do not": means["random"] > _NO_BETTER,
    }
    if known:
        behaves["another question does not help"] = means["another question"] > _NO_BETTER
    n_read = sum(one.is_read for one in mine)
    return Row(
        metric, float(_nats(mine).mean()), float(_nats(theirs).mean()),
        paired_interval(_nats(mine), _nats(theirs), seed), len(mine), means, behaves,
        primary=primary, bytes=mine[0].held_bytes, baseline_bytes=theirs[0].held_bytes,
        data=f"{N_SLOTS} slots a full layer of 1,000 tokens of essays, question "
        + ("known" if known else "unknown"),
        note=f"{n_read} of {len(mine)} codes read in full; "
        f"{np.mean([one.kept for one in mine]):.0f} of {len(todo[0].needle)} tokens of the "
        f"sentence left; a full cache holds {mine[0].full_bytes} bytes",
    )  # fmt: skip


def _nats(found: list[Reading]) -> NDArray[np.float64]:
    return np.array([one.mean for one in found])
