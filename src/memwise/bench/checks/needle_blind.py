"""Does a code in a long text survive in a few slots, if nobody knows what will be asked?

The method and its baseline keep 128 slots in each full-attention layer of Gemma-3-270M, of 1,000
tokens of an essay; the question comes afterwards. Methods with a prompt of their own are given one
that names no thing of the text.

What must hold: the full cache and an oracle of as many slots read the code, random slots do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from memwise.bench.engine import Row, paired_interval
from memwise.bench.needle import Item, items, oracle_for, readings
from memwise.catalogue import load
from memwise.models import LocalModel, local_model

N_ITEMS, N_DECOYS, N_SLOTS = 16, 8, 128
_NO_BETTER = 1.5  # nats: what is not read; chance among ten digits is 2.3
_CATALYST = "\n\nImportant facts to remember from the text above: The"
_ABLATIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "InfiniPot": {"attention alone": {"novel": 0.0}, "novelty alone": {"novel": 1.0}},
}


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Nat per digit, plain and with decoys."""
    lm = local_model()
    if "catalyst" in {knob.name for knob in fields(method)}:
        prompt = lm.tokenizer(_CATALYST, add_special_tokens=False).input_ids
        method = replace(method, catalyst=tuple(prompt))
    plain = items(lm.tokenizer, data, N_ITEMS, False, seed)
    decoys = items(lm.tokenizer, data, N_DECOYS, True, seed)
    return [
        _row(lm, method, plain, seed, "nat per digit", True),
        _row(lm, method, decoys, seed, "nat per digit, decoys in the text", False),
    ]


def _row(
    lm: LocalModel, method: Any, todo: list[Item], seed: int, metric: str, primary: bool
) -> Row:
    baseline, chance, oracle = (
        load(f"context/{name}")() for name in (method.card.baseline, "random", "oracle")
    )
    mine, theirs = (
        readings(lm, lambda _, own=own: own, todo, N_SLOTS, False)  # type: ignore[misc]
        for own in (method, baseline)
    )
    controls = {
        "full cache": readings(lm, lambda _: chance, todo, 0, False),
        "oracle": readings(lm, lambda item: oracle_for(oracle, item), todo, N_SLOTS, False),
        "random": readings(lm, lambda _: chance, todo, N_SLOTS, False),
    }
    if primary:
        for name, knobs in _ABLATIONS.get(type(method).__name__, {}).items():
            other = replace(method, **knobs)
            controls[name] = readings(lm, lambda _, own=other: own, todo, N_SLOTS, False)  # type: ignore[misc]
    means = {name: float(np.mean([one.mean for one in found])) for name, found in controls.items()}
    values, base = (np.array([one.mean for one in found]) for found in (mine, theirs))
    n_read = sum(one.is_read for one in mine)
    return Row(
        metric, float(values.mean()), float(base.mean()), paired_interval(values, base, seed),
        len(values), means,
        {
            "full cache and oracle read it": max(means["full cache"], means["oracle"]) < 0.3,
            "random slots do not": means["random"] > _NO_BETTER,
        },
        primary=primary, bytes=mine[0].held_bytes, baseline_bytes=theirs[0].held_bytes,
        data=f"{N_SLOTS} slots a full layer of 1,000 tokens of essays, question unknown",
        note=f"{n_read} of {len(mine)} codes read in full; "
        f"{np.mean([one.kept for one in mine]):.0f} of {len(todo[0].needle)} tokens of the "
        f"sentence left; a full cache holds {mine[0].full_bytes} bytes",
    )  # fmt: skip
