"""Was it seen? Streams of scenes, long ones and a few short ones, in a memory of few frames.

A scene is one handwritten digit that is shown again and again, moved and with noise. A memory of
equal bytes takes the stream in; afterwards clean pictures, in each place where a frame may have
shown them, are compared with what it holds. Judged is, for the short scenes of a stream, the share
of strangers that look less familiar (area under the curve); strangers are pictures of digits that
were never shown.

What must hold: all frames tell short scenes from strangers; folding the neighbours that are least
alike, which a mistaken reading of the method does, is worse than folding those that are most alike.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from memwise.bench.checks.sliced_video import digits
from memwise.bench.engine import Row, paired_interval
from memwise.catalogue import load
from memwise.context.engine.features import FeatureMemory, FeaturePolicy, budget_for
from memwise.context.policies.moviechat import MovieChat

N_STREAMS, N_PLACES = 96, 44
_LONG, _SHORT, _STRANGERS = 14, 6, 40
_LONG_FRAMES, _SHORT_FRAMES = (20, 60), (3, 5)
_NOISE = 0.25  # of the pixels' range
_SIDE = 28
_MOVES = tuple(itertools.product((-1, 0, 1), repeat=2))  # pixels down and to the right


@dataclass(frozen=True)
class Stream:
    """A stream and what is asked of it.

    Attributes:
        frames: (T, 1, 784).
        short: clean pictures of the short scenes (s, 784).
        long: of the long ones.
        strangers: pictures that were not shown.
    """

    frames: Tensor
    short: Tensor
    long: Tensor
    strangers: Tensor


def streams(data: Path | None, n: int, seed: int) -> list[Stream]:
    """Streams of scenes, each picture in one stream only."""
    pictures, _ = digits(data)
    draws = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pictures), generator=noise)
    size, found = _LONG + _SHORT + _STRANGERS, []
    for i in range(n):
        own = pictures[order[i * size : (i + 1) * size]]
        scenes = [(own[j], draws.randint(*_LONG_FRAMES)) for j in range(_LONG)]
        scenes += [(own[_LONG + j], draws.randint(*_SHORT_FRAMES)) for j in range(_SHORT)]
        draws.shuffle(scenes)
        frames = []
        for picture, length in scenes:
            for _ in range(length):
                moved = picture.roll(draws.choice(_MOVES), (0, 1))
                noisy = moved + _NOISE * torch.randn(_SIDE, _SIDE, generator=noise)
                frames.append(noisy.flatten()[None])
        flat = own.flatten(1)
        found.append(
            Stream(
                torch.stack(frames), flat[_LONG : _LONG + _SHORT], flat[:_LONG],
                flat[_LONG + _SHORT :],
            )
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class _LeastAlike(MovieChat):
    """The mistaken reading: the most different neighbours become one."""

    def next(self, alike: Tensor) -> int:
        """The pair that is least alike."""
        return int(alike.argmin())


@dataclass(frozen=True)
class _AnyPair(MovieChat):
    """Neighbours at random become one."""

    def next(self, alike: Tensor) -> int:
        """Drawn from the numbers themselves, so that it is the same each time."""
        return random.Random(float(alike.sum())).randrange(len(alike))


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """How well short and long scenes are told from strangers."""
    todo = streams(data, N_STREAMS, seed)
    policies = {
        "mine": method, "baseline": load(f"context/{method.card.baseline}")(),
        "newest": load("context/newest_frames")(), "random": load("context/random_frames")(),
    }  # fmt: skip
    if isinstance(method, MovieChat):
        knobs = vars(method)
        policies |= {"least alike": _LeastAlike(**knobs), "any pair": _AnyPair(**knobs)}
    budget = budget_for(N_PLACES, (1, _SIDE * _SIDE))
    held = {name: [_held(policy, one, budget) for one in todo] for name, policy in policies.items()}
    rows = []
    for what in ("short", "long"):
        scores = {
            name: np.array([_told(m.frames, one, what) for m, one in zip(each, todo, strict=True)])
            for name, each in held.items()
        }
        scores["all frames"] = np.array([_told(one.frames, one, what) for one in todo])
        mine, base = scores.pop("mine"), scores.pop("baseline")
        means = {name: float(values.mean()) for name, values in scores.items()}
        behaves = {"all frames tell them from strangers": means["all frames"] > 0.9}
        if what == "short" and "least alike" in means:
            behaves["folding what is least alike is worse"] = means["least alike"] < mine.mean()
            behaves["folding any pair is worse"] = means["any pair"] < mine.mean()
        first = held["mine"][0]
        rows.append(
            Row(
                f"{what} scenes told from strangers", float(mine.mean()), float(base.mean()),
                paired_interval(mine, base, seed), len(mine), means, behaves,
                primary=what == "short", bytes=_bytes(first),
                baseline_bytes=_bytes(held["baseline"][0]),
                data=f"MNIST, {len(todo)} streams of about {len(todo[0].frames)} frames, "
                f"{N_PLACES} places",
            )
        )  # fmt: skip
    return rows


def _held(policy: FeaturePolicy, stream: Stream, budget: int) -> FeatureMemory:
    memory = FeatureMemory(policy, (1, _SIDE * _SIDE), budget)
    for frame in stream.frames:
        memory.add(frame)
    return memory


def _told(frames: Tensor, stream: Stream, what: str) -> float:
    """Share of pairs in which the scene looks more familiar than the stranger."""
    held = F.normalize(frames.flatten(1), dim=-1)

    def familiar(pictures: Tensor) -> Tensor:
        images = F.normalize(pictures, dim=-1).view(-1, _SIDE, _SIDE)
        moved = torch.stack([images.roll(move, (1, 2)) for move in _MOVES])
        return (moved.flatten(2) @ held.T).amax((0, 2))

    seen, strange = familiar(getattr(stream, what)), familiar(stream.strangers)
    above: NDArray[np.float64] = (seen[:, None] > strange[None]).double().numpy()
    return float(above.mean())


def _bytes(memory: FeatureMemory) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in memory.tensors().values())
