"""Does what was mentioned several times survive in an eighth of the slots, long after?

A small Llama over bytes reads pieces of Wikipedia as long as it was trained with. A box is shown
in them, label and sign, four times, 20 bytes apart; then nothing is heard of it for three lengths
of the slots, and its label comes last. Judged is the sign, of which the label says nothing but
that it is one of 8. The baseline is a window of the newest, as many slots.

What must hold: an oracle of as many slots finds it, the window does not, and random slots, of which
some hold one of the four, find it less often.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memwise.bench.engine import Row, paired_interval
from memwise.bench.length import CHANCE, N_BOXES, N_SIGNS, TRAINED, model, nll, show, text
from memwise.catalogue import load

N_PIECES, N_SLOTS, CHUNK = 128, TRAINED // 8, 16
_FIRST, _APART, _MENTIONS = 60, 20, 4
_FOUND, _LOST = CHANCE / 2, 0.9 * CHANCE


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Nat of the sign: of a box that was shown four times, and once."""
    lm, pieces = model(data), text(data).windows(N_PIECES, TRAINED - 1)
    draws = torch.Generator().manual_seed(seed)
    box, sign = (torch.randint(n, (N_PIECES,), generator=draws) for n in (N_BOXES, N_SIGNS))
    places = [_FIRST + i * _APART for i in range(_MENTIONS)]
    baseline, oracle = (load(f"context/{name}")() for name in (method.card.baseline, "oracle"))
    policies = {
        "oracle": replace(oracle, positions=(places[-1], places[-1] + 1)),
        "full cache": None,
        "random": load("context/random")(),
        "h2o": load("context/h2o")(),
    }
    rows = []
    for times in (_MENTIONS, 1):
        ids = show(pieces, box, sign, (*places[-times:], TRAINED - 2))

        def read(policy: Any, ids: Tensor = ids) -> NDArray[np.float64]:
            found = nll(lm, ids, policy, N_SLOTS, CHUNK)[:, -1]
            values: NDArray[np.float64] = found.double().numpy()
            return values

        mine, theirs = read(method), read(baseline)
        controls = {name: float(read(policy).mean()) for name, policy in policies.items()}
        holds = {
            "an oracle and the full cache find it":
                max(controls["oracle"], controls["full cache"]) <= _FOUND,
            "the newest do not": theirs.mean() >= _LOST,
        }  # fmt: skip
        if times > 1:
            holds["random slots are worse"] = controls["random"] > mine.mean()
        rows.append(
            Row(
                f"nat of a sign shown {times} times", float(mine.mean()), float(theirs.mean()),
                paired_interval(mine, theirs, seed), N_PIECES, controls | {"chance": CHANCE}, holds,
                primary=times > 1,
                data=f"WikiText-2, {N_PIECES} pieces of {TRAINED} bytes, {N_SLOTS} slots",
            )
        )  # fmt: skip
    return rows
