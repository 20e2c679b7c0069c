"""Clips that an image model repaints frame by frame: do the frames look alike?

- a small denoiser is trained on single pictures: a digit comes out as its negative, and how bright
  the ground and how dark the digit are is free, so that noise decides it
- clips of moving digits that it never saw; each frame has its own noise
- primary: difference of neighbouring frames after the motion is undone, as a part of what lone
  frames have; beside it all frames as anchors, and anchors of other clips
- the repainted digit must stay the digit, and clips must stay different from each other: frames
  that are blended or grey would be alike too
- bytes of the anchors for clips of several lengths, and the bits of a clip that is split
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.checks.sliced_video import digits
from memwise.bench.engine import Row, paired_interval
from memwise.context.engine.anchors import FramePolicy, follow, hold
from memwise.context.engine.building import weights_from
from memwise.context.policies.lone_frames import LoneFrames

SIDE, PATCH, DIGIT = 28, 4, 20  # pixels of a frame, a patch, and the part of it that is a digit
WIDTH, N_LAYERS, N_HEADS = 64, 3, 4
N_TRAINED, BATCH, RATE = 1500, 24, 2e-3
N_STEPS = 10
N_CLIPS, N_FRAMES = 24, 10
LENGTHS = (5, 10, 20)  # frames of clips of which bytes are counted
GRAIN = 0.3  # noise of the camera
FOREIGN = 0.8  # anchors of other clips leave at least this part of what lone frames have


def run(method: FramePolicy, data: Path | None, seed: int) -> list[Row]:
    """Rows of the likeness of frames and of bytes."""
    images, _ = digits(data)
    net = trained(images[:6000], seed)
    clips = [moving(images[6000:], N_FRAMES, seed + 1 + i) for i in range(N_CLIPS)]
    return [_alike(method, net, clips, seed), _bytes(method, net, images[6000:], seed)]


# --- pictures


@dataclass(frozen=True, eq=False)
class Clip:
    """A moving digit.

    Attributes:
        source: what a camera saw (F, 1, S, S), the digit bright on a dark ground, from -1 to 1.
        noise: that the frames are made of (F, 1, S, S).
        places: corner of the digit (F, 2).
        digit: the digit itself (1, D, D), from 0 to 1.
    """

    source: Tensor
    noise: Tensor
    places: Tensor
    digit: Tensor


def moving(images: Tensor, n_frames: int, seed: int) -> Clip:
    """A digit that drifts and bounces, a pixel or two a frame."""
    draws = torch.Generator().manual_seed(seed)
    room = SIDE - DIGIT
    digit = _digit(images[torch.randint(len(images), (1,), generator=draws)])
    start = torch.randint(2 * room, (2,), generator=draws)
    speed = torch.randint(1, 3, (2,), generator=draws)
    # A triangle wave: what leaves at one side comes back from it.
    walked = (start + torch.arange(n_frames)[:, None] * speed) % (2 * room)
    places = torch.minimum(walked, 2 * room - walked)
    frames = _placed(digit.expand(n_frames, -1, -1), places)
    grain, noise = (torch.randn(frames.shape, generator=draws) for _ in range(2))
    return Clip(2 * frames - 1 + GRAIN * grain, noise, places, digit)


def windows(frames: Tensor, places: Tensor) -> Tensor:
    """Frames (F, 1, S, S) with the motion undone (F, D, D)."""
    corners = zip(frames[:, 0], places.tolist(), strict=True)
    return torch.stack([x[i : i + DIGIT, j : j + DIGIT] for x, (i, j) in corners])


def _digit(images: Tensor) -> Tensor:
    """The middle of each image, in which the digit is."""
    edge = (images.shape[-1] - DIGIT) // 2
    return images[:, edge : edge + DIGIT, edge : edge + DIGIT]


def _placed(digit: Tensor, places: Tensor) -> Tensor:
    """Frames (n, 1, S, S) of digits (n, D, D) at corners (n, 2)."""
    frames = torch.zeros(len(digit), 1, SIDE, SIDE)
    for frame, one, (i, j) in zip(frames, digit, places.tolist(), strict=True):
        frame[0, i : i + DIGIT, j : j + DIGIT] = one
    return frames


def _examples(images: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sources and repainted pictures (BATCH, 1, S, S)."""
    chosen = torch.randint(len(images), (BATCH,), generator=draws)
    places = torch.randint(SIDE - DIGIT + 1, (BATCH, 2), generator=draws)
    frames = _placed(_digit(images[chosen]), places)
    source = 2 * frames - 1 + GRAIN * torch.randn(frames.shape, generator=draws)
    ground, ink = torch.rand((2, BATCH, 1, 1, 1), generator=draws)  # each from 0 to 1
    return source, ground * (1 - frames) + (ink - 1) * frames


# --- the model


class Denoiser(nn.Module):
    """Predicts the repainted picture from a noisy one, its source and the part of noise."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with weights_from(seed):
            self.enter = nn.Linear(2 * PATCH**2 + 2, WIDTH)
            self.place = nn.Parameter(0.1 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    WIDTH, N_HEADS, 2 * WIDTH, 0.0, batch_first=True, norm_first=True
                )
                for _ in range(N_LAYERS)
            )
            self.leave = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PATCH**2))

    def forward(self, x: Tensor, source: Tensor, angle: Tensor) -> Tensor:
        """Map pictures (B, 1, S, S), sources and angles (B,) to clean pictures."""
        patches = F.unfold(torch.cat([x, source], 1), PATCH, stride=PATCH).mT  # (B, T, 2 P P)
        part = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
        tokens = torch.cat([patches, part.expand(-1, patches.shape[1], -1)], -1)
        states = self.enter(tokens) + self.place
        for layer in self.layers:
            states = layer(states)
        made: Tensor = F.fold(self.leave(states).mT, SIDE, PATCH, stride=PATCH)
        return made


def trained(images: Tensor, seed: int) -> Denoiser:
    """A denoiser that saw single pictures only."""
    net, draws = Denoiser(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, N_TRAINED)
    criterion = nn.MSELoss()
    for _ in range(N_TRAINED):
        source, target = _examples(images, draws)
        angle = torch.rand(BATCH, generator=draws) * torch.pi / 2
        part = angle[:, None, None, None]
        noise = torch.randn(target.shape, generator=draws)
        made = net(part.cos() * target + part.sin() * noise, source, angle)
        optimizer.zero_grad()
        criterion(made, target).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def sampler(net: Denoiser) -> Callable[[Tensor, Tensor], Tensor]:
    """DDIM in even steps of the angle, from noise to pictures, without further draws."""
    angles = torch.linspace(torch.pi / 2, 0, N_STEPS + 1)

    def sample(source: Tensor, noise: Tensor) -> Tensor:
        x = noise
        for now, after in pairwise(angles):
            clean = net(x, source, now.expand(len(x)))
            x = after.cos() * clean + after.sin() * (x - now.cos() * clean) / now.sin()
        return x

    return sample


# --- likeness


@dataclass(frozen=True)
class _AllFrames(FramePolicy):
    """Every frame is an anchor."""

    def anchors(self, n_frames: int) -> tuple[int, ...]:
        return tuple(range(n_frames))


def _alike(method: FramePolicy, net: Denoiser, clips: Sequence[Clip], seed: int) -> Row:
    """Items: clips."""
    began = time.process_time()
    mine = _edited(method, net, clips)
    seconds = time.process_time() - began
    lone, every = _edited(LoneFrames(), net, clips), _edited(_AllFrames(), net, clips)
    same = [
        LoneFrames()(net, sampler(net), [c.source, c.noise[:1].expand_as(c.noise)]).frames
        for c in clips
    ]
    base = _errors(lone, clips)
    value, other = _errors(mine, clips) / base.mean(), _foreign(method, net, clips) / base.mean()
    joint = float((_errors(every, clips) / base.mean()).mean())
    drawn, drawn_alone = _drawn(mine, clips), _drawn(lone, clips)
    spread = _spread(mine) / _spread(every)
    return Row(
        "difference of frames, motion undone / lone frames", float(value.mean()), 1.0,
        paired_interval(value, base / base.mean(), seed), len(value),
        {
            "all frames are anchors": joint,
            "anchors of other clips": float(other.mean()),
            "lone frames of the same noise": float((_errors(same, clips) / base.mean()).mean()),
            "likeness to the digit": drawn,
            "likeness to the digit, lone frames": drawn_alone,
            "spread of clips / all frames are anchors": spread,
        },
        {
            "all frames are about as good": abs(joint - float(value.mean())) < 0.25,
            "anchors of other clips do not help": float(other.mean()) > FOREIGN,
            "the digit stays: as like it as in lone frames, within 0.05": (
                drawn > drawn_alone - 0.05
            ),
            "lone frames show the digit": drawn_alone > 0.7,
            "clips stay different, half as much as with all frames at least": spread > 0.5,
        },
        seconds=seconds, data="moving digits, clips of 10 frames",
    )  # fmt: skip


def _edited(policy: FramePolicy, net: Denoiser, clips: Sequence[Clip]) -> list[Tensor]:
    return [
        policy(net, sampler(net), [c.source, c.noise], n_at_once=N_FRAMES).frames for c in clips
    ]


def _foreign(method: FramePolicy, net: Denoiser, clips: Sequence[Clip]) -> NDArray[np.float64]:
    """Errors where each frame follows the anchors of another clip, no two frames the same ones."""
    caches = []
    for clip in clips:
        places = list(method.anchors(len(clip.source)))
        inputs = [clip.source[places], clip.noise[places]]
        caches.append(hold(net, sampler(net), inputs)[1])
    made = []
    for i, clip in enumerate(clips):
        frames = [
            follow(
                net, caches[(i + 1 + j) % len(clips)], sampler(net),
                [clip.source[j : j + 1], clip.noise[j : j + 1]],
            )
            for j in range(len(clip.source))
        ]  # fmt: skip
        made.append(torch.cat(frames))
    return _errors(made, clips)


def _errors(made: Sequence[Tensor], clips: Sequence[Clip]) -> NDArray[np.float64]:
    """Root mean square difference of neighbouring frames of each clip, motion undone."""
    found = []
    for frames, clip in zip(made, clips, strict=True):
        still = windows(frames, clip.places).double()
        found.append(float(still.diff(dim=0).square().mean().sqrt()))
    return np.array(found)


def _drawn(made: Sequence[Tensor], clips: Sequence[Clip]) -> float:
    """Mean correlation of the negative of the frames with the digit."""
    found = []
    for frames, clip in zip(made, clips, strict=True):
        still = -windows(frames, clip.places).double().flatten(1)
        true = clip.digit.double().flatten()[None]
        still, true = (x - x.mean(1, keepdim=True) for x in (still, true))
        found.append(float(F.cosine_similarity(still, true).mean()))
    return float(np.mean(found))


def _spread(made: Sequence[Tensor]) -> float:
    """Standard deviation over clips of how bright they are."""
    return float(torch.stack([frames.mean() for frames in made]).std())


# --- bytes


def _bytes(method: FramePolicy, net: Denoiser, images: Tensor, seed: int) -> Row:
    """Items: lengths of clips."""
    mine, every, equal = [], [], []
    for n_frames in LENGTHS:
        clip = moving(images, n_frames, seed)
        inputs = [clip.source, clip.noise]
        edited = method(net, sampler(net), inputs)
        mine.append(edited.cache.n_bytes)
        every.append(_AllFrames()(net, sampler(net), inputs).cache.n_bytes)
        others = [i for i in range(n_frames) if i not in edited.anchors]
        parts = [
            follow(net, edited.cache, sampler(net), [x[part] for x in inputs])
            for part in (others[len(others) // 2 :], others[: len(others) // 2])
        ]
        equal.append(torch.equal(torch.cat(parts[::-1]), edited.frames[others]))
    share = np.array(mine) / np.array(every)
    return Row(
        "bytes of the anchors / all frames", float(share.mean()), 1.0,
        paired_interval(share, np.ones_like(share), seed), len(share),
        {
            f"{n} frames, MB": n_bytes / 1e6
            for n, n_bytes in zip(LENGTHS, mine, strict=True)
        },
        {
            "as many bytes for a clip of any length": len(set(mine)) == 1,
            "all frames take bytes by their number": every[-1] * LENGTHS[0]
            == every[0] * LENGTHS[-1],
            "two parts give the bits of the whole": all(equal),
        },
        primary=False, bytes=mine[-1], baseline_bytes=every[-1],
        data="moving digits, clips of 5 to 20 frames",
        note="beside all frames as anchors; lone frames hold nothing",
    )  # fmt: skip
