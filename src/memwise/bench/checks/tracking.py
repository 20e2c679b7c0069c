"""Is it the same digit? A target among digits of its class, followed through occlusions.

Windows of a picture are compared with the memory's frames; the best is the target and the next
ones are alternatives. The target slowly becomes another image and is hidden three times. Judged
are losses per sequence: visible frames in which the window leaves the target.

What must hold: frames at random, any frame among those that resolve distractors, and writing while
the target is hidden are all worse. Predicted overlap is the best cosine, which is not calibrated: a
method whose gate never opens is its own ablation, and fails.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memwise.bench.checks.sliced_video import digits
from memwise.bench.engine import Row, paired_interval
from memwise.catalogue import load
from memwise.context.engine.features import FeatureMemory, FeaturePolicy, budget_for
from memwise.context.policies.dam4sam import DAM4SAM, Masks

N_SEQUENCES, N_FRAMES, N_PLACES = 40, 200, 8  # one place is free: 7 frames
_SIDE, _PATCH, _OTHERS = 48, 14, 2
_NOISE, _PRESENT, _REACH = 0.15, 0.6, 5  # pixel range, cosine, pixels
_HIDDEN = tuple(range(50, 65)) + tuple(range(100, 115)) + tuple(range(150, 165))


@dataclass(frozen=True)
class _AnyFrame(DAM4SAM):
    """No distractor has to show."""

    def distracted(self, seen: Masks) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class _Always(DAM4SAM):
    """Writes while the target is absent."""

    def present(self, seen: Masks) -> bool:
        """Always."""
        return True


def sequence(pictures: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (T, S, S) and places of the target (T, 2), from its start, its end and others."""
    room = _SIDE - _PATCH
    start = torch.randint(2 * room, (_OTHERS + 1, 2), generator=draws)
    speed = torch.randint(1, 4, (_OTHERS + 1, 2), generator=draws)
    video = _NOISE * torch.randn(N_FRAMES, _SIDE, _SIDE, generator=draws)
    places = torch.zeros(N_FRAMES, 2, dtype=torch.int64)
    for t in range(N_FRAMES):
        turn = (start + t * speed) % (2 * room)
        at = torch.minimum(turn, 2 * room - turn)
        share = (1 - math.cos(2 * math.pi * t / N_FRAMES)) / 2
        places[t] = at[0]
        for i in range(_OTHERS + 1):
            image = pictures[0].lerp(pictures[1], share) if i == 0 else pictures[i + 1]
            if i or t not in _HIDDEN:
                r, c = at[i].tolist()
                video[t, r : r + _PATCH, c : c + _PATCH] += image
    return video, places


def losses(policy: FeaturePolicy, video: Tensor, places: Tensor) -> int:
    """How often the window leaves the visible target."""
    shape, lost, was = (1, _PATCH * _PATCH), 0, True
    memory = FeatureMemory(policy, shape, budget_for(N_PLACES, shape, n_numbers=policy.n_numbers))
    wide = _SIDE - _PATCH + 1
    for t, picture in enumerate(video):
        windows = F.unfold(picture[None, None], _PATCH)[0].T
        if t == 0:
            score = torch.zeros(len(windows))
            score[places[0, 0] * wide + places[0, 1]] = 1
        else:
            held = F.normalize(memory.frames[:, 0], dim=-1)
            score = (F.normalize(windows, dim=-1) @ held.T).amax(1)
        best = int(score.argmax())
        at = torch.tensor([best // wide, best % wide])
        memory.add(windows[best][None], t, _masks(picture, score.view(wide, wide), at))
        if t not in _HIDDEN:
            right = bool((at - places[t]).abs().max() <= _REACH)
            lost += was and not right
            was = right
    return lost


def _masks(picture: Tensor, score: Tensor, at: Tensor) -> Masks:
    best = float(score.max())
    rest = score.clone()
    r, c = at.tolist()
    rest[max(0, r - 7) : r + 8, max(0, c - 7) : c + 8] = -1
    second = divmod(int(rest.argmax()), score.shape[1])
    chosen = _ink(picture, r, c) if best > _PRESENT else torch.zeros_like(picture).bool()
    other = chosen | _ink(picture, *second) if rest.max() > _PRESENT else chosen
    return Masks(chosen, other[None], best)


def _ink(picture: Tensor, row: int, column: int) -> Tensor:
    mask = torch.zeros_like(picture, dtype=torch.bool)
    window = (slice(row, row + _PATCH), slice(column, column + _PATCH))
    mask[window] = picture[window] > 0.4
    return mask


def run(method: DAM4SAM, data: Path | None, seed: int) -> list[Row]:
    """Losses per sequence, beside the newest frames and two ablations."""
    images, labels = digits(data)
    small, draws = F.avg_pool2d(images[:, None], 2)[:, 0], torch.Generator().manual_seed(seed)
    knobs = vars(method)
    policies: dict[str, FeaturePolicy] = {
        "mine": method, "baseline": load(f"context/{method.card.baseline}")(),
        "no distractor test": _AnyFrame(**knobs), "no absence gating": _Always(**knobs),
        "random": load("context/random_frames")(),
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in policies}
    for i in range(N_SEQUENCES):
        same = small[labels == i % 10]
        chosen = torch.randperm(len(same), generator=draws)[: _OTHERS + 2]
        video, places = sequence(same[chosen], draws)
        for name, policy in policies.items():
            found[name].append(losses(policy, video, places))
    values = {name: np.array(each, dtype=np.float64) for name, each in found.items()}
    mine, base = values.pop("mine"), values.pop("baseline")
    means = {name: float(each.mean()) for name, each in values.items()}
    return [
        Row(
            "losses per sequence", float(mine.mean()), float(base.mean()),
            paired_interval(mine, base, seed), len(mine), means,
            {f"{name} is worse": bool(mean > mine.mean()) for name, mean in means.items()},
            data=f"MNIST, {N_SEQUENCES} sequences of {N_FRAMES} frames, 7 frames in memory",
        )
    ]  # fmt: skip
