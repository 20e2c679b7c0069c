"""Do heads that learnt which tokens answers want keep a code that nobody has asked for yet?

Heads for the three full-attention layers of Gemma-3-270M are trained in some minutes on short texts
with questions and answers: facts planted in books, and real questions with their passages (NQ). The
code of `needle` is a kind of fact that they never saw, in another kind of text, five times as long.
They are kept in the cache folder, as the Gemma terms cover them, until code or data change.

Judged are nat per digit at 128 and at 64 slots of 1,000 tokens, the question unknown, and how many
of the tokens that the answer attends to most are among those that the heads put first.

What must hold: the full cache and an oracle of as many slots read the code, random slots do not,
and heads that were never trained do worse than trained ones in both respects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memwise.bench.engine import Row, paired_interval
from memwise.bench.needle import Item, Reading, items, oracle_for, readings
from memwise.bench.retaining import heads
from memwise.catalogue import load
from memwise.context.engine import retaining
from memwise.context.engine.host import Host
from memwise.context.engine.retaining import Lesson
from memwise.models import LocalModel, local_model

N_ITEMS, N_SLOTS, FEW_SLOTS = 8, 128, 64
_WANTED = 0.1  # share of tokens that count as wanted
_N_STUDIED = 4
_NO_BETTER = 1.5  # nats: what is not read; chance among ten digits is 2.3


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Nat per digit in more and in fewer slots, and wanted tokens that heads miss."""
    lm = local_model()
    trained = replace(method, heads=str(heads(lm, data) / "heads.safetensors"))
    todo = items(lm.tokenizer, data, 2 * N_ITEMS, False, seed)[::2]
    missed = _missed(lm, trained, method, todo[:: N_ITEMS // _N_STUDIED], seed)
    return [
        _row(lm, trained, method, todo, N_SLOTS, seed),
        _row(lm, trained, method, todo[::2], FEW_SLOTS, seed),
        missed,
    ]


def _row(
    lm: LocalModel, trained: Any, method: Any, todo: list[Item], n_slots: int, seed: int
) -> Row:
    policies = {
        name: load(f"context/{name}")() for name in (method.card.baseline, "keydiff", "random")
    }
    oracle = load("context/oracle")()

    def read(policy_of: Callable[[Item], Any], slots: int = n_slots) -> NDArray[np.float64]:
        return _nats(readings(lm, policy_of, todo, slots, False))

    mine = readings(lm, lambda _: trained, todo, n_slots, False)
    theirs = readings(lm, lambda _: policies[method.card.baseline], todo, n_slots, False)
    controls = {
        "full cache": read(lambda _: policies["random"], 0),
        "oracle": read(lambda item: oracle_for(oracle, item)),
        "random": read(lambda _: policies["random"]),
        "untrained heads": read(lambda _: method),
        "keydiff": read(lambda _: policies["keydiff"]),
    }
    means = {name: float(nats.mean()) for name, nats in controls.items()}
    values, base = _nats(mine), _nats(theirs)
    n_read = sum(one.is_read for one in mine)
    return Row(
        f"nat per digit, {n_slots} slots", float(values.mean()), float(base.mean()),
        paired_interval(values, base, seed), len(values), means,
        {
            "full cache and oracle read it": max(means["full cache"], means["oracle"]) < 0.3,
            "random slots do not": means["random"] > _NO_BETTER,
            "untrained heads are worse": means["untrained heads"] > values.mean(),
        },
        primary=n_slots == N_SLOTS, bytes=mine[0].held_bytes, baseline_bytes=theirs[0].held_bytes,
        data=f"{n_slots} slots a full layer of 1,000 tokens of essays, question unknown",
        note=f"{n_read} of {len(mine)} codes read in full; "
        f"{np.mean([one.kept for one in mine]):.0f} of {len(todo[0].needle)} tokens of the "
        f"sentence left; bytes include the heads",
    )  # fmt: skip


def _missed(lm: LocalModel, trained: Any, method: Any, todo: Sequence[Item], seed: int) -> Row:
    shape = Host(lm.model).shape
    seen = [
        retaining.study(
            lm.model,
            Lesson(item.context + item.ask + item.lead + item.digits, len(item.lead + item.digits)),
        )
        for item in todo
    ]

    def missed(weights: retaining.Weights) -> NDArray[np.float64]:
        return np.array(
            [
                np.mean([_miss(one, retaining.retained(weights, layer, one.inputs))
                         for layer, one in by_layer.items()])
                for by_layer in seen
            ]
        )  # fmt: skip

    mine, theirs = (missed(dict(own.weights(shape))) for own in (trained, method))
    return Row(
        f"wanted tokens that heads miss, top {_WANTED:.0%}", float(mine.mean()),
        float(theirs.mean()), paired_interval(mine, theirs, seed), len(mine),
        {"chance": 1 - _WANTED}, {"trained heads miss fewer": mine.mean() < theirs.mean()},
        primary=False, data="1,000 tokens of essays",
        note="the baseline here is heads that were never trained",
    )  # fmt: skip


def _miss(seen: retaining.Seen, score: Any) -> float:
    n = int(_WANTED * len(score))
    first = [set(x[:, 0].topk(n).indices.tolist()) for x in (seen.wanted, score)]
    return 1 - len(first[0] & first[1]) / n


def _nats(found: list[Reading]) -> NDArray[np.float64]:
    return np.array([one.mean for one in found])
