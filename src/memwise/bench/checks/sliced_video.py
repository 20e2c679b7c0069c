"""A space-time U-Net in slices: peak memory for the same output, and spared denoising steps.

- primary: peak of a denoising step, as a part of the plain one; several shapes are the items
- beside it each operation sliced alone, and another number of slices
- rehash: a video diffusion model is trained on moving digits; noisy videos that it cleans with
  spared steps are compared with those of all steps, beside as many steps that lie evenly
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memwise.bench.data import data_folder
from memwise.bench.engine import Row, paired_interval
from memwise.train.engine.reversible import seeded
from memwise.train.engine.sliced import Chain, Reusable
from memwise.train.measure import peak
from memwise.train.policies.streamlined_inference import StreamlinedInference

SHAPES = ((8, 32, 16), (16, 32, 16), (16, 24, 32), (32, 32, 8), (16, 48, 8), (24, 32, 16))
N_FRAMES, SIDE, CHANNELS = 8, 20, 12
N_TRAINED, N_STEPS, N_VIDEOS = 250, 50, 24
NOISE = 1.2  # angle of the start: cos = 0.36 of the video in sin = 0.93 of noise
FRAMES, ROWS, COLUMNS = 1, 3, 4  # axes of (B, F, C, H, W)


def run(method: StreamlinedInference, data: Path | None, seed: int) -> list[Row]:
    """Rows of bytes and of spared steps."""
    return [_peaks(method, seed), _rehash(method, data, seed)]


# --- the model


class _ByFrame(nn.Module):
    """Layers of an image, for each frame apart."""

    free = (FRAMES,)

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, *inputs: Tensor) -> Tensor:  # (B, F, C, H, W)
        x = torch.cat(inputs, 2) if len(inputs) > 1 else inputs[0]
        y: Tensor = self.layers(x.flatten(0, 1))
        return y.view(*x.shape[:2], *y.shape[1:])


class _ByPixel(nn.Module):
    """One half of attention over time, for each pixel apart."""

    free = (ROWS, COLUMNS)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:  # (B, F, C, H, W) -> (B, F, 3 C, H, W)
        y: Tensor = self.qkv(self.norm(x.movedim(2, -1)))
        return y.movedim(-1, 2)


class _OverTime(nn.Module):
    """The other half: each pixel's frames are mixed."""

    free = (ROWS, COLUMNS)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, F, 3 C, H, W) -> (B, F, C, H, W)
        q, k, v = x.permute(0, 3, 4, 1, 2).chunk(3, -1)  # (B, H, W, F, C) each
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v) + v)
        return y.permute(0, 3, 4, 1, 2)


def _spatial(n_inputs: int, width: int) -> list[nn.Module]:
    """An inverted bottleneck, eight times as wide inside, in two steps."""
    return [
        _ByFrame(nn.Conv2d(n_inputs, 8 * width, 3, padding=1), nn.SiLU()),
        _ByFrame(nn.Conv2d(8 * width, width, 3, padding=1), nn.GroupNorm(4, width)),
    ]


def _temporal(width: int) -> list[nn.Module]:
    return [_ByPixel(width), _OverTime(width)]


class VideoUNet(nn.Module):
    """Predicts clean videos from noisy ones (B, F, 1, H, W) and the part of noise in them.

    Args:
        width: channels at full resolution.
        seed: of the initial weights.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.enter = Chain(*_spatial(2, width), *_temporal(width))
        self.deep = Reusable(
            Chain(
                _ByFrame(nn.AvgPool2d(2)), *_spatial(width, width), *_temporal(width),
                *_spatial(width, width), _ByFrame(nn.Upsample(scale_factor=2)),
            )
        )  # fmt: skip
        self.leave = Chain(
            *_spatial(2 * width, width), *_temporal(width), _ByFrame(nn.Conv2d(width, 1, 1))
        )
        seeded(self, seed)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Map videos (B, F, 1, H, W) and their parts of noise (B,) to clean videos."""
        shallow = self.enter(torch.cat([x, noise[:, None, None, None, None].expand_as(x)], 2))
        made: Tensor = self.leave(shallow, self.deep(shallow))
        return made


# --- bytes


def _peaks(method: StreamlinedInference, seed: int) -> Row:
    """Items: frames x side x channels. No step is spared, so that bytes are compared alone."""
    sliced = replace(method, similarity=2.0)
    mine, alone, other, errors, sizes = [], [], [], [], []
    for n_frames, side, width in SHAPES:
        net = VideoUNet(width, seed)
        draws = torch.Generator().manual_seed(seed)
        x = torch.randn((1, n_frames, 1, side, side), generator=draws)
        step = partial(torch.no_grad()(net), x, torch.ones(1))
        want, whole = step(), _peak(step)
        with sliced(net):
            errors.append(float((step() - want).abs().max()))
            part = _peak(step)
            _grouped(net, False)
            alone.append(_peak(step) / whole)
            _grouped(net, True)
        with replace(sliced, n_slices=2)(net):
            other.append(_peak(step) / whole)
        mine.append(part / whole)
        sizes.append((part, whole))
    values = np.array(mine)
    return Row(
        "peak of a denoising step / plain", float(values.mean()), 1.0,
        paired_interval(values, np.ones_like(values), seed), len(values),
        {
            "each operation alone": float(np.mean(alone)),
            "2 slices": float(np.mean(other)),
            "largest difference of the output": max(errors),
        },
        {
            "outputs equal within 1e-5": max(errors) < 1e-5,
            "each operation alone peaks half as high again": bool(
                (np.array(alone) > 1.5 * values).all()
            ),
            "2 slices peak higher": bool((np.array(other) > values).all()),
        },
        bytes=sizes[-1][0], baseline_bytes=sizes[-1][1],
        data="space-time U-Net, 8 to 32 frames of 24 to 48 pixels",
    )  # fmt: skip


def _peak(step: Callable[[], Tensor]) -> int:
    step()
    return peak(step).peak_bytes


def _grouped(net: nn.Module, grouped: bool) -> None:
    for module in net.modules():
        if isinstance(module, Chain):
            module.grouped = grouped


# --- spared steps


def digits(data: Path | None) -> tuple[Tensor, Tensor]:
    """Images (n, 28, 28) in [0, 1] and labels (n,)."""
    folder = data_folder(data) / "mnist10k"
    found = []
    for name, header in (("images-idx3", 16), ("labels-idx1", 8)):
        raw = gzip.decompress((folder / f"dev8000-{name}-ubyte.gz").read_bytes())
        found.append(torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8))
    return found[0].view(-1, 28, 28) / 255, found[1].long()


def moving(images: Tensor, n: int, draws: torch.Generator) -> Tensor:
    """Videos (n, F, 1, S, S) in [-1, 1] of digits at half size that drift and bounce."""
    small = F.avg_pool2d(images[:, None], 2)[:, 0]  # (., 14, 14)
    room = SIDE - small.shape[-1]
    chosen = torch.randint(len(small), (n,), generator=draws).tolist()
    start = torch.randint(room + 1, (n, 2), generator=draws)
    speed = torch.randint(-2, 3, (n, 2), generator=draws)
    video = torch.zeros(n, N_FRAMES, 1, SIDE, SIDE)
    for i, image in enumerate(chosen):
        for t in range(N_FRAMES):
            # A triangle wave: what leaves at one side comes back from it.
            place = (start[i] + t * speed[i]) % (2 * room)
            row, column = torch.minimum(place, 2 * room - place).tolist()
            video[i, t, 0, row : row + 14, column : column + 14] = small[image]
    return 2 * video - 1


def _trained(images: Tensor, seed: int) -> VideoUNet:
    net, draws = VideoUNet(CHANNELS, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    criterion = nn.MSELoss()
    for _ in range(N_TRAINED):
        x = moving(images, 8, draws)
        angle = torch.rand(8, generator=draws) * torch.pi / 2
        noisy = _mix(x, torch.randn(x.shape, generator=draws), angle)
        optimizer.zero_grad()
        criterion(net(noisy, angle.sin()), x).backward()
        optimizer.step()
    return net


def _mix(x: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
    """A noisy video; the squares of both parts add to 1."""
    part = angle[:, None, None, None, None]
    return part.cos() * x + part.sin() * noise


@torch.no_grad()
def _sample(net: VideoUNet, start: Tensor, n_steps: int) -> Tensor:
    """DDIM: from noisy videos to clean ones in even steps of the angle, without further draws."""
    x = start
    angles = torch.linspace(NOISE, 0, n_steps + 1)
    for now, after in pairwise(angles):
        clean = net(x, now.sin().expand(len(x))).clamp(-1, 1)
        noise = (x - now.cos() * clean) / now.sin()
        x = after.cos() * clean + after.sin() * noise
    return x


def _psnr(mine: Tensor, true: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    error = (mine - true).double().square().flatten(1).mean(1).clamp(min=1e-12)
    return (10 * torch.log10(4 / error)).numpy()


def _rehash(method: StreamlinedInference, data: Path | None, seed: int) -> Row:
    """Items: videos. Both runs compute the deep part equally often."""
    images, _ = digits(data)
    net = _trained(images[:6000], seed)
    draws = torch.Generator().manual_seed(seed + 1)
    unseen = moving(images[6000:], N_VIDEOS, draws)
    # So small a model makes no digits of noise alone; it cleans videos that are mostly noise.
    noise = torch.randn(unseen.shape, generator=draws)
    start = _mix(unseen, noise, torch.full((N_VIDEOS,), NOISE))
    began = time.process_time()
    full = _sample(net, start, N_STEPS)
    whole_s = time.process_time() - began
    began = time.process_time()
    with method(net) as memory:
        spared = _sample(net, start, N_STEPS)
    seconds = time.process_time() - began
    n_deep = memory.reused.count(False)
    value, base = _psnr(spared, full), _psnr(_sample(net, start, n_deep), full)
    low, high = paired_interval(value, base, seed)
    moved, true = (float(video.diff(dim=1).abs().mean()) for video in (full, unseen))
    cleaned = float(_psnr(full, unseen).mean())
    blank = float(_psnr(torch.full_like(unseen, -1), unseen).mean())
    return Row(
        "PSNR to all steps, rehash / fewer steps", float(value.mean()), float(base.mean()),
        (low, high), len(value),
        {
            "deep parts computed": n_deep / N_STEPS,
            "time / all steps": seconds / whole_s,
            "all steps, beside the true video": cleaned,
            "a blank video, beside the true video": blank,
            "motion, of the true one": moved / true,
        },
        {
            "above 25 dB": bool(value.mean() > 25),
            "about half of the steps": 0.4 <= n_deep / N_STEPS <= 0.65,
            "better than as many steps that lie evenly": low > 0,
            "the videos are cleaned: nearer to the true ones than blank": cleaned > blank + 3,
            "the videos move": moved > 0.5 * true,
        },
        primary=False, seconds=seconds, data="moving digits, videos of 8 frames",
    )  # fmt: skip
