"""Labels that need the next 16 tokens of a stream: the share that one layer gets right.

Symbols are drawn evenly; a token is labelled by whether its symbol comes again within the next 16.
Half of the labels are yes, and whatever came before a token says nothing of its own: without
looking ahead nobody can know. One attention layer and one MLP, over the stream in chunks, are
trained on fresh streams and judged on others; the baseline is the same layer whose queries do not
wait.

What must hold: without waiting it guesses, half of the wait leaves half of the labels open, and
full bidirectional attention in the layer's place knows no more than the queries that waited.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.engine import Row, paired_interval

AHEAD, N_SYMBOLS, LENGTH = 16, 24, 64  # (1 - 1/24)^16 is half
N_STEPS, SIZE, N_STREAMS = 180, 24, 64
_WIDTH, _LR, _WARMUP = 64, 3e-3, 50
_CHUNK = 8  # tokens that are given at once when judged
_GUESSED, _SOLVED, _AS_GOOD = 0.6, 0.95, 0.02


class Labeller(nn.Module):
    """Symbols to logits of their labels, through a layer that waits."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(N_SYMBOLS, _WIDTH)
        self.layer = method(_WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(),
            nn.Linear(4 * _WIDTH, 1),
        )  # fmt: skip

    def forward(self, ids: Tensor, chunk: int) -> Tensor:
        """Logits (B, T) of symbols (B, T), given so many at once."""
        found, line = [], None
        for part in ids.split(chunk, 1):  # type: ignore[no-untyped-call]
            out, line = self.layer(self.embed(part), line)
            found.append(out)
        found.append(self.layer.finish(line))
        logits: Tensor = self.mlp(torch.cat(found, 1))[..., 0]
        return logits


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Share of labels that are right, of streams that were not trained on."""
    ids, labels = streams(N_STREAMS, np.random.default_rng(seed))

    def judged(one: Any) -> NDArray[np.float64]:
        model = _trained(one, seed)
        with torch.no_grad():
            right = (model(ids, _CHUNK) > 0) == labels
        found: NDArray[np.float64] = right[:, : LENGTH - AHEAD].double().mean(1).numpy()
        return found

    method = replace(method, delay=AHEAD, memory=4 * AHEAD)
    mine, blind = judged(method), judged(replace(method, delay=0))
    half = float(judged(replace(method, delay=AHEAD // 2)).mean())
    full = float(judged(replace(method, delay=LENGTH, memory=LENGTH + 1)).mean())
    return [
        Row(
            "labels that are right", float(mine.mean()), float(blind.mean()),
            paired_interval(mine, blind, seed), len(mine),
            {"half of the wait": half, "full bidirectional attention": full},
            {
                f"without waiting it guesses, at most {_GUESSED}": blind.mean() <= _GUESSED,
                f"with it, it knows, at least {_SOLVED}": mine.mean() >= _SOLVED,
                "half of the wait lies between": blind.mean() < half < mine.mean(),
                "full attention knows no more": full <= mine.mean() + _AS_GOOD,
            },
            data=f"{N_STREAMS} streams of {LENGTH} symbols out of {N_SYMBOLS}",
            note=f"the baseline is the same layer with delay=0; labels of the last {AHEAD} tokens "
            "do not count",
        )
    ]  # fmt: skip


def streams(n: int, draws: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Symbols (n, T), and whether each comes again within the next 16."""
    ids = torch.from_numpy(draws.integers(N_SYMBOLS, size=(n, LENGTH)))
    ahead = F.pad(ids, (0, AHEAD), value=N_SYMBOLS).unfold(1, AHEAD + 1, 1)
    return ids, (ahead[..., 1:] == ids[..., None]).any(-1)


def _trained(method: Any, seed: int) -> Labeller:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Labeller(method)
    optimizer = torch.optim.AdamW(model.parameters(), _LR, betas=(0.9, 0.98))
    draws = np.random.default_rng(seed + 1)
    for step in range(N_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _LR * min((step + 1) / _WARMUP, (N_STEPS - step) / (0.5 * N_STEPS), 1.0)
        ids, labels = streams(SIZE, draws)
        loss = F.binary_cross_entropy_with_logits(model(ids, LENGTH), labels.float())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return model
