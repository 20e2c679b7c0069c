"""Which clip was it? Streams of clips that are read once and asked about afterwards.

A clip shows a handwritten digit in two noisy frames, with a bright square in one of the corners. In
each stream some digits come again and again, and others once. A question names a digit and asks for
the corner: of its second clip, which nobody can tell from the clip alone, or of its only clip. Each
method learns from streams without end, for as many steps and on the same streams; judged are
streams of pictures that nobody trained on.

- primary: how often the clip in question is among those picked, for second clips, beside clips that
  are read alone
- beside it the same for only clips, where nothing may be lost, and how often the corner is named;
  controls are clips at even distances and chance
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.checks.sliced_video import digits
from memwise.bench.engine import Row, paired_interval
from memwise.catalogue import load
from memwise.context.engine.building import weights_from
from memwise.context.engine.clips import ClipMemory, ClipPolicy, Picked

REPEATED, N_ONCE, N_FRAMES = (4, 3), 3, 2  # clips of the digits that come again; digits of one clip
N_CLIPS = sum(REPEATED) + N_ONCE
WIDTH, N_LAYERS, N_HEADS, SIDE = 64, 2, 4, 14
N_STEPS, BATCH, N_JUDGED = 700, 32, 500
_RATE, _NOISE, _CORNERS = 1e-3, 0.1, 4
SECOND, ONLY = 0, 1


@dataclass(frozen=True)
class Streams:
    """Streams and what is asked of them.

    Attributes:
        frames: (B, C, T, 196).
        shown: digit of each clip (B, C).
        kinds: SECOND or ONLY, of each question (B, A).
        asked: digit of each question (B, A).
        places: of the clip in question (B, A).
        corners: of each clip (B, C).
    """

    frames: Tensor
    shown: Tensor
    kinds: Tensor
    asked: Tensor
    places: Tensor
    corners: Tensor


class Streamed:
    """Makes streams of the pictures of one part of the data.

    Args:
        pictures: (n, 14, 14).
        labels: (n,).
        seed: of the streams.
    """

    def __init__(self, pictures: Tensor, labels: Tensor, seed: int) -> None:
        self.pictures = pictures
        self.of = [torch.nonzero(labels == digit)[:, 0].tolist() for digit in range(10)]
        self.draws, self.noise = random.Random(seed), torch.Generator().manual_seed(seed)

    def batch(self, n: int) -> Streams:
        """So many streams, which ask for the second clip of all that repeats and for all others."""
        orders, questions = zip(*(self._order() for _ in range(n)), strict=True)
        kinds, asked, places = torch.tensor(questions).unbind(-1)  # (B, A) each
        chosen = [[self.draws.choice(self.of[digit]) for digit in order] for order in orders]
        corners = torch.randint(_CORNERS, (n, N_CLIPS), generator=self.noise)
        clips = self.pictures[torch.tensor(chosen)]  # (B, C, 14, 14)
        ends = slice(0, 3), slice(SIDE - 3, SIDE)
        for corner, (rows, columns) in enumerate(itertools.product(ends, ends)):
            clips[..., rows, columns][corners == corner] = 1.0
        frames = clips.flatten(2)[:, :, None].expand(-1, -1, N_FRAMES, -1)
        frames = frames + _NOISE * torch.randn(frames.shape, generator=self.noise)
        return Streams(frames, torch.tensor(orders), kinds, asked, places, corners)

    def _order(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Digits of the clips, and the questions as (kind, digit, place)."""
        chosen = self.draws.sample(range(10), len(REPEATED) + N_ONCE)
        again, once = chosen[: len(REPEATED)], chosen[len(REPEATED) :]
        order = [
            digit for digit, times in zip(again, REPEATED, strict=True) for _ in range(times)
        ] + once
        self.draws.shuffle(order)
        second = [
            (SECOND, digit, [i for i, other in enumerate(order) if other == digit][1])
            for digit in again
        ]
        return order, second + [(ONLY, digit, order.index(digit)) for digit in once]


class Viewer(nn.Module):
    """Frames and questions as tokens, a memory of clips, and a small reader of what is picked."""

    def __init__(self, policy: ClipPolicy, seed: int) -> None:
        super().__init__()
        self.streamer = policy(WIDTH, N_LAYERS, N_HEADS, seed=seed)
        with weights_from(seed):
            self.frame = nn.Sequential(
                nn.Linear(SIDE * SIDE, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
            )
            self.kind, self.digit = nn.Embedding(2, WIDTH), nn.Embedding(10, WIDTH)
            self.reader = nn.TransformerEncoderLayer(
                WIDTH, N_HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            self.corner = nn.Linear(WIDTH, _CORNERS)

    def watched(self, frames: Tensor) -> ClipMemory:
        """The memory of streams (B, C, T, P)."""
        memory: ClipMemory | None = None
        for clip in self.frame(frames).unbind(1):
            memory = self.streamer(clip, memory)
        assert memory is not None
        return memory

    def forward(
        self, streams: Streams, draws: torch.Generator | None = None
    ) -> tuple[Tensor, Picked]:
        """Corners of all questions (B A, 4), as logits, and what was picked for each."""
        memory = self.watched(streams.frames)
        n = streams.asked.shape[1]
        each = ClipMemory(
            memory.summaries.repeat_interleave(n, 0), memory.indicators.repeat_interleave(n, 0)
        )
        words = self.kind(streams.kinds.flatten()), self.digit(streams.asked.flatten())
        question = torch.stack(words, 1)  # (B A, 2, D)
        picked = self.streamer.ask(question, each, draws)
        read = self.reader(torch.cat([picked.tokens, question], 1))
        corner: Tensor = self.corner(read[:, -1])
        return corner, picked


def trained(policy: ClipPolicy, streams: Streamed, n_steps: int, seed: int) -> Viewer:
    """A viewer that learned to find the clip in question, and to name its corner."""
    viewer, draws = Viewer(policy, seed), torch.Generator().manual_seed(seed)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(viewer.parameters(), lr=_RATE)
    fade = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, n_steps)
    for _ in range(n_steps):
        some = streams.batch(BATCH)
        corner, picked = viewer(some, draws)
        truth = some.corners.gather(1, some.places).flatten()
        scores = viewer.streamer.sharpness * picked.alike
        loss = criterion(corner, truth) + criterion(scores, some.places.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(viewer.parameters(), 1.0)
        optimizer.step()
        fade.step()
    return viewer.eval()


# --- judging


def run(method: ClipPolicy, data: Path | None, seed: int) -> list[Row]:
    """Rows of clips that are found and of corners that are named, for both kinds of questions."""
    images, labels = digits(data)
    small = F.avg_pool2d(images[:, None], 2)[:, 0]
    alone = load(f"context/{method.card.baseline}")(**vars(method))
    mine, other = (
        trained(policy, Streamed(small[:6000], labels[:6000], seed), N_STEPS, seed)
        for policy in (method, alone)
    )
    streams = Streamed(small[6000:], labels[6000:], seed + 1).batch(N_JUDGED)
    judged = {"mine": _judged(mine, streams), "alone": _judged(other, streams)}
    n_tokens = {_n_tokens(mine, streams.frames[:2].repeat(1, n, 1, 1)) for n in (1, 4)}
    mine.streamer.policy = load("context/uniform_clips")(**vars(method))
    judged["even clips"] = _judged(mine, streams)

    rows = [
        _row(kind, what, judged, method.n_picked, seed)
        for kind in ("second", "only")
        for what in ("found", "named")
    ]
    guessed = float(np.mean([min(1.0, method.n_picked / times) for times in REPEATED]))
    of_digit = float(judged["alone"]["second", "of the digit"].mean())
    controls = {"alone, picks of the digit": of_digit, "any clips of the digit": guessed}
    behaves = {
        "clips alone find the digit": of_digit > 0.9,
        "clips alone cannot count": rows[0].baseline < guessed + 0.05,
        "the reader's tokens do not grow with the stream": len(n_tokens) == 1,
    }
    first = replace(
        rows[0], primary=True, controls={**rows[0].controls, **controls},
        behaves={**rows[0].behaves, **behaves}, note=f"{max(n_tokens)} tokens for the reader",
    )  # fmt: skip
    return [first, *rows[1:]]


_Judged: TypeAlias = dict[tuple[str, str], NDArray[np.float64]]


@torch.no_grad()
def _judged(viewer: Viewer, streams: Streams) -> _Judged:
    """Means of each stream, by kind of question and by what is judged."""
    corner, picked = viewer(streams)
    places = picked.places.unflatten(0, streams.asked.shape)  # (B, A, V)
    shown = streams.shown[:, None].expand(-1, places.shape[1], -1).gather(2, places)
    truth = streams.corners.gather(1, streams.places)
    values = {
        "found": (places == streams.places[..., None]).any(-1),
        "named": corner.argmax(-1).view_as(truth) == truth,
        "of the digit": (shown == streams.asked[..., None]).double().mean(-1),
    }
    # Each stream has as many questions of a kind as any other.
    return {
        (name, what): value[streams.kinds == kind].view(len(truth), -1).double().mean(1).numpy()
        for what, value in values.items()
        for name, kind in (("second", SECOND), ("only", ONLY))
    }


@torch.no_grad()
def _n_tokens(viewer: Viewer, frames: Tensor) -> int:
    """Tokens that a reader gets of streams (B, C, T, P)."""
    question = torch.zeros(len(frames), 2, WIDTH)
    return viewer.streamer.ask(question, viewer.watched(frames)).tokens.shape[1]


def _row(kind: str, what: str, judged: dict[str, _Judged], n_picked: int, seed: int) -> Row:
    each = {name: values[kind, what] for name, values in judged.items()}
    mine, alone, even = each["mine"], each["alone"], float(each["even clips"].mean())
    low, high = paired_interval(mine, alone, seed)
    chance = n_picked / N_CLIPS if what == "found" else 1 / _CORNERS
    behaves = {"clips at even distances are worse": even < mine.mean() - 0.1}
    if kind == "only":
        behaves["nothing is lost where the past does not count"] = low > -0.05
    metric = "clip found" if what == "found" else "corner named"
    return Row(
        f"{kind} clip of a digit: {metric}", float(mine.mean()), float(alone.mean()), (low, high),
        len(mine), {"even clips": even, "chance": chance}, behaves, primary=False,
        data=f"MNIST, {N_JUDGED} streams of {N_CLIPS} clips, {n_picked} picked",
    )  # fmt: skip
