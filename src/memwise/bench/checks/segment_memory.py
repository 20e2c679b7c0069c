"""Which digits did a long video show? A small vision transformer that reads it segment by segment.

Each segment shows one handwritten digit again and again, and another for a moment; at the end of
the last segment the question is, for each of the ten digits, whether the video showed it. One
transformer is trained on single segments; from its weights each method is trained further on whole
videos, for as many steps and on the same videos. Judged are the ten answers to videos of pictures
that nobody trained on.

- primary: right answers, beside the transformer that sees the last segment alone; controls are all
  activations (what can be had at most), other ways to reduce, and the chosen one at other sizes
- beside it: bytes of the memory, and the peak of reading a segment, which grow with its size
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.checks.sliced_video import digits
from memwise.bench.engine import Row, paired_interval
from memwise.catalogue import load
from memwise.context.engine.building import weights_from
from memwise.context.engine.consolidate import SegmentMemory, SegmentPolicy
from memwise.context.policies.mc_vit import MCViT
from memwise.train.measure import peak

N_SEGMENTS, N_FRAMES, N_MOMENTS = 4, 30, 1
WIDTH, N_LAYERS, N_HEADS, PIXELS = 64, 3, 4, 14 * 14
N_SHORT, N_LONG, BATCH, N_JUDGED = 700, 250, 32, 400
_RATE, _NOISE = 1e-3, 0.1
_SIZES = (1, 2, 6, 30)


class Videos:
    """Videos without end, with the answers to their ten questions.

    Args:
        pictures: (n, 196).
        labels: (n,).
        seed: of the videos.
    """

    def __init__(self, pictures: Tensor, labels: Tensor, seed: int) -> None:
        self.pictures, self.labels = pictures, labels
        self.draws, self.noise = random.Random(seed), torch.Generator().manual_seed(seed)

    def batch(self, n: int, n_segments: int) -> tuple[Tensor, Tensor]:
        """Frames (n, S, F, 196) and which digits are shown (n, 10)."""
        shown = torch.stack([self._segment() for _ in range(n * n_segments)])
        frames = self.pictures[shown]
        frames = frames + _NOISE * torch.randn(frames.shape, generator=self.noise)
        seen = F.one_hot(self.labels[shown.view(n, -1)], 10).amax(1)
        return frames.view(n, n_segments, N_FRAMES, -1), seen.float()

    def _segment(self) -> Tensor:
        """Which picture each frame shows: one, and others for one to three frames each."""
        long, *brief = self.draws.sample(range(len(self.pictures)), 1 + N_MOMENTS)
        shown = torch.full((N_FRAMES,), long)
        room = N_FRAMES // N_MOMENTS
        for i, picture in enumerate(brief):
            start = i * room + self.draws.randrange(room - 3)
            shown[start : start + self.draws.randint(1, 3)] = picture
        return shown


class Viewer(nn.Module):
    """Frames as tokens, ten questions beside those of the last segment, and an encoder for both."""

    def __init__(self, policy: SegmentPolicy, seed: int) -> None:
        super().__init__()
        self.encoder = policy(WIDTH, N_LAYERS, N_HEADS, seed=seed)
        draws = torch.Generator().manual_seed(seed)
        self.questions = nn.Parameter(0.3 * torch.randn(10, WIDTH, generator=draws))
        with weights_from(seed):
            self.patch, self.head = nn.Linear(PIXELS, WIDTH), nn.Linear(WIDTH, 1)

    def remembered(
        self, segments: Tensor, draws: torch.Generator | None = None
    ) -> SegmentMemory | None:
        """The memory of segments (B, S, F, P); gradients do not flow through it."""
        memory: SegmentMemory | None = None
        with torch.no_grad():
            for segment in segments.unbind(1):
                _, memory = self.encoder(self.patch(segment), memory, draws)
        return memory

    def forward(self, video: Tensor, draws: torch.Generator | None = None) -> Tensor:
        """For a video (B, S, F, P) how likely each digit was shown (B, 10), as logits."""
        memory = self.remembered(video[:, :-1], draws)
        asked = self.questions.expand(len(video), -1, -1)
        out, _ = self.encoder(torch.cat([self.patch(video[:, -1]), asked], 1), memory, draws)
        answers: Tensor = self.head(out[:, -10:])[..., 0]
        return answers


def run(method: SegmentPolicy, data: Path | None, seed: int) -> list[Row]:
    """Rows of right answers and of bytes; ways and sizes of reduction where the method has them."""
    images, labels = digits(data)
    small = F.avg_pool2d(images[:, None], 2).flatten(1)
    seen = small[:6000], labels[:6000]
    short = _trained(load("context/lone_segments")(), *seen, N_SHORT, 1, seed).state_dict()
    policies: dict[str, SegmentPolicy] = {
        "mine": method,
        "baseline": load(f"context/{method.card.baseline}")(),
        "all tokens": load("context/whole_segments")(),
    }
    if isinstance(method, MCViT):
        policies |= {how: replace(method, method=how) for how in ("coreset", "random")}
    viewers = {
        name: _trained(policy, *seen, N_LONG, N_SEGMENTS, seed, short)
        for name, policy in policies.items()
    }
    judged = Videos(small[6000:], labels[6000:], seed + 1).batch(N_JUDGED, N_SEGMENTS)
    right = {name: _right(viewer, *judged) for name, viewer in viewers.items()}
    mine, base = right.pop("mine"), right.pop("baseline")
    means = {name: float(values.mean()) for name, values in right.items()}
    shown = float(judged[1].mean())
    chance, whole = max(shown, 1 - shown), means["all tokens"]
    behaves = {
        "all tokens do better than the baseline": whole > base.mean() + 0.1,
        "the baseline knows more than chance": base.mean() > chance,
    }
    if isinstance(method, MCViT):
        added = (mine.mean() - base.mean()) / (whole - base.mean())
        behaves |= {
            "it has four fifths of what all tokens add": added > 0.8,
            "any memory is better than none": min(means.values()) > base.mean(),
            "a random subset of the same size is worse": means["random"] < mine.mean(),
        }
        sizes = _sizes(method, viewers["mine"], judged)
        fewest, fewer, *_ = sizes.values()
        behaves["fewer memories are worse"] = fewest < fewer < mine.mean()
        means |= sizes
    n_bytes = [
        memory.n_bytes if (memory := viewers[name].remembered(judged[0][:1, :-1])) else 0
        for name in ("mine", "baseline", "all tokens")
    ]
    answers = Row(
        "digits rightly judged shown or not", float(mine.mean()), float(base.mean()),
        paired_interval(mine, base, seed), len(mine), means | {"chance": chance}, behaves,
        bytes=n_bytes[0], baseline_bytes=n_bytes[1],
        data=f"MNIST, {N_JUDGED} videos of {N_SEGMENTS} segments of {N_FRAMES} frames",
        note=f"all tokens take {n_bytes[2]} bytes",
    )  # fmt: skip
    return [answers, *([_peaks(method, seed)] if isinstance(method, MCViT) else [])]


def _sizes(method: MCViT, viewer: Viewer, judged: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Right answers with other numbers of memories than it was trained with, from few to all."""
    found = {}
    for size in _SIZES:
        viewer.encoder.policy = replace(method, kept_ratio=size / N_FRAMES)
        found[f"{size} of {N_FRAMES}"] = float(_right(viewer, *judged).mean())
    viewer.encoder.policy = method
    return found


def _trained(
    policy: SegmentPolicy, pictures: Tensor, labels: Tensor, n_steps: int, n_segments: int,
    seed: int, weights: dict[str, Any] | None = None,
) -> Viewer:  # fmt: skip
    viewer = Viewer(policy, seed)
    if weights:
        viewer.load_state_dict(weights)
    videos = Videos(pictures, labels, seed + 100 * n_segments)
    draws, criterion = torch.Generator().manual_seed(seed), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.AdamW(viewer.parameters(), lr=_RATE)
    fade = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        frames, shown = videos.batch(BATCH, n_segments)
        optimizer.zero_grad()
        criterion(viewer(frames, draws), shown).backward()
        optimizer.step()
        fade.step()
    return viewer.eval()


@torch.no_grad()
def _right(viewer: Viewer, frames: Tensor, shown: Tensor) -> NDArray[np.float64]:
    """Share of right answers to each video."""
    right = [
        ((viewer(some) > 0) == (truth > 0.5)).double().mean(1)
        for some, truth in zip(frames.chunk(4), shown.chunk(4), strict=True)
    ]
    return torch.cat(right).numpy()


# --- bytes


def _peaks(method: MCViT, seed: int) -> Row:
    """Items: lengths of a video. The peak of reading its last segment, beside all tokens."""
    draws = torch.Generator().manual_seed(seed)
    ratios = (0.1, 0.2, 0.3, 0.4)
    mine, curves = [], []
    for n_segments in (8, 16, 32):
        segments = torch.randn(n_segments, 1, 128, WIDTH, generator=draws)
        whole = _peak(load("context/whole_segments")(), segments)
        mine.append(_peak(method, segments) / whole)
        curves.append([_peak(replace(method, kept_ratio=ratio), segments) for ratio in ratios])
    bends = [
        abs(after - before) / max(curve)
        for curve in curves
        for before, after in itertools.pairwise(np.diff(curve))
    ]
    values = np.array(mine)
    return Row(
        "peak of reading the last segment / all tokens", float(values.mean()), 1.0,
        paired_interval(values, np.ones_like(values), seed), len(values),
        {"largest bend of the curve over sizes": max(bends), "at 32 segments": mine[-1]},
        {
            "the peak grows linearly with the memories": bool(max(bends) < 0.05),
            "a third at 32 segments": mine[-1] < 1 / 3,
        },
        primary=False, data="8 to 32 segments of 128 tokens",
    )  # fmt: skip


@torch.no_grad()
def _peak(policy: SegmentPolicy, segments: Tensor) -> int:
    encoder = policy(WIDTH, N_LAYERS, N_HEADS)
    memory: SegmentMemory | None = None
    for segment in segments[:-1]:
        _, memory = encoder(segment, memory)
    read: Callable[[], Any] = partial(encoder, segments[-1], memory)
    read()
    return peak(read).peak_bytes
