"""Text in which things come again after the window is over: nat per byte with a memory before it.

A small Llama over bytes, trained with 256, reads pieces of Wikipedia of 1,024 bytes that it never
saw. All through a piece boxes are shown, label and sign; the sign in a box stays the same, so who
remembers the box knows it. The method has 192 slots in each layer, half of them its window; the
baseline is a window of that half. Judged are the last 640 bytes, then the signs alone that were
not shown again for longer than any window here, then pieces without boxes.

What must hold: as many slots of the newest, of modes that never fold (a queue in front of the
window), and of a memory that keeps tokens at random are all worse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memwise.bench.engine import Row, paired_interval
from memwise.bench.length import TRAINED, fill, model, nll, since_shown, text
from memwise.catalogue import load
from memwise.context.engine.step import Step
from memwise.context.policies.camelot import CAMELoT

N_PIECES, N_SLOTS, CHUNK = 48, 192, 64
_BYTES, _JUDGED = 4 * TRAINED, 640
_FILLED, _MENTIONS = 12, 48  # boxes of a piece, and how often any is shown
_WINDOW = N_SLOTS + CHUNK  # the newest that as many slots hold at most


@dataclass(frozen=True)
class _Drawn(CAMELoT):
    """As many tokens before the window, kept at random."""

    def score(self, step: Step) -> Tensor:
        score = step.at_random(0)
        score[:, :, step.n - (step.n_slots - self.n_modes(step.n_slots)) :] = torch.inf
        return score

    def merge(self, step: Step, kept: Tensor) -> None:
        """Fold nothing."""


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Nat per byte of text with boxes, of signs after a long time, and of text without."""
    lm, plain = model(data), text(data).windows(N_PIECES, _BYTES - 1)
    draws = torch.Generator().manual_seed(seed)
    boxes = torch.stack([fill(row, _FILLED, _MENTIONS, draws) for row in plain])
    late = torch.stack([since_shown(row)[1:] > _WINDOW for row in boxes])
    everything = torch.ones_like(late)
    newest = load(f"context/{method.card.baseline}")()
    others = {
        "the newest, as many slots": newest,
        "no folding": replace(method, alike=1.0),
        "a random memory": _Drawn(method.alike, method.share),
    }

    def row(metric: str, ids: Tensor, judged: Tensor, primary: bool) -> Row:
        def read(policy: Any, n_slots: int = N_SLOTS) -> NDArray[np.float64]:
            found = nll(lm, ids, policy, n_slots, CHUNK)[:, -_JUDGED:]
            counts = judged[:, -_JUDGED:].to(found)
            values: NDArray[np.float64] = ((found * counts).sum(1) / counts.sum(1)).double().numpy()
            return values

        mine = read(method)
        theirs = read(newest, N_SLOTS - method.n_modes(N_SLOTS))
        controls = {name: float(read(policy).mean()) for name, policy in others.items()}
        holds = {f"{name}: worse": value > mine.mean() for name, value in controls.items()}
        return Row(
            metric, float(mine.mean()), float(theirs.mean()), paired_interval(mine, theirs, seed),
            len(mine), controls, holds if primary else {}, primary=primary,
            data=f"WikiText-2, {len(ids)} pieces of {_BYTES} bytes, {N_SLOTS} slots",
        )  # fmt: skip

    return [
        row(f"nat per byte, {_FILLED} boxes in the text", boxes, everything, True),
        row(f"nat of a sign not shown for {_WINDOW} bytes", boxes, late, True),
        row("nat per byte, plain text", plain, everything, False),
    ]
