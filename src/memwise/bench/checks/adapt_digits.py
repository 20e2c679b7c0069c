"""A diffusion model of four bits learns one subject: five slanted, thick digits of one class.

- baseline: one set of scales for all timesteps (PEQA), same steps, same pictures, same noise
- subject score: cosine in the features of a classifier between what (class, token) draws and the
  subject; prompt score: share of (other class, token) that the classifier reads as that class
- items are subjects: eight of them, each from another class or other pictures
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memwise.bench.data import data_folder
from memwise.bench.engine import Row, paired_interval
from memwise.models import cached
from memwise.train.engine.adapters import AdapterPolicy, Handle
from memwise.train.engine.switching import AdapterBank
from memwise.train.measure import bytes_of
from memwise.train.policies.peqa import PEQA
from memwise.train.policies.quantized_diffusion_personalization import (
    QuantizedDiffusionPersonalization,
)

SIDE, WIDTH = 14, 256
T, SAMPLING = 100, 20  # timesteps, and those of them that sampling visits
N_TOKENS = 8  # words without a meaning; the last is never seen before personalization
PRETRAINING, TUNING, BATCH = 4000, 300, 64
RATE = 1e-3
SUBJECTS, SHOTS, DRAWN = 8, 5, 64

Activate = Callable[[int], None]


class Denoiser(nn.Module):
    """A residual MLP that tells the noise in a picture, given timestep, class and token."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(SIDE * SIDE, WIDTH), nn.Linear(WIDTH, SIDE * SIDE)
        self.digit, self.token = nn.Embedding(10, WIDTH), nn.Embedding(N_TOKENS + 1, WIDTH)
        self.time = nn.Embedding(T, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(),
                nn.Linear(2 * WIDTH, WIDTH),
            )
            for _ in range(3)
        )  # fmt: skip
        draws = torch.Generator().manual_seed(0)
        for param in self.parameters():
            if param.ndim == 2:
                nn.init.normal_(param, std=WIDTH**-0.5, generator=draws)

    def forward(self, x: Tensor, t: Tensor, digit: Tensor, token: Tensor) -> Tensor:
        """Noise (B, 196) for pictures (B, 196); timestep, class and token are (B,)."""
        told = self.time(t) + self.digit(digit) + self.token(token)
        h = self.enter(x)
        for block in self.blocks:
            h = h + block(h + told)
        noise: Tensor = self.leave(h)
        return noise


def run(
    method: QuantizedDiffusionPersonalization, data: Path | None, seed: int
) -> list[Row]:  # fmt: skip
    """Subject score plus prompt score, beside PEQA."""
    pictures, digits = _mnist(data)
    eye = _classifier(pictures, digits)
    start = _denoiser(pictures, digits)
    both = replace(method, selected=None)
    policies: dict[str, AdapterPolicy] = {
        "method": method, "S2": both, "late": replace(method, selected=len(method.edges)),
        "PEQA": PEQA(method.codec),
    }  # fmt: skip
    subject: dict[str, list[float]] = {name: [] for name in [*policies, "untuned"]}
    prompt: dict[str, list[float]] = {name: [] for name in [*policies, "untuned"]}
    set_bytes = 0
    for nth in range(SUBJECTS):
        one = _Subject(pictures, digits, eye, nth, seed)
        for name, policy in [*policies.items(), ("untuned", PEQA(method.codec))]:
            model = Denoiser()
            model.load_state_dict(start)
            handle = policy(model)
            activate, ranges = _ranges(policy, handle)
            if name != "untuned":
                one.teach(model, handle, activate, ranges)
            if name == "method":
                set_bytes = bytes_of(list(handle.parameters(handle.names[0])))
            likeness, obedience = one.scores(model, activate)
            subject[name].append(likeness)
            prompt[name].append(obedience)
    total = {name: np.array(subject[name]) + np.array(prompt[name]) for name in subject}
    controls = {f"{name}, sum": float(v.mean()) for name, v in total.items()}
    controls |= {f"{name}, subject": float(np.mean(v)) for name, v in subject.items()}
    controls |= {f"{name}, prompt": float(np.mean(v)) for name, v in prompt.items()}
    value, base = total["method"], total["PEQA"]
    behaves = {
        "PEQA gains likeness": np.mean(subject["PEQA"]) > np.mean(subject["untuned"]) + 0.02,
        "PEQA loses obedience": np.mean(prompt["PEQA"]) < np.mean(prompt["untuned"]) - 0.02,
        "likeness is not given up": np.mean(subject["method"]) > np.mean(subject["PEQA"]) - 0.02,
        "a set is not moved by the timesteps of another": _apart(both, start),
    }
    return [
        Row(
            "subject + prompt score", float(value.mean()), float(base.mean()),
            paired_interval(value, base, seed), SUBJECTS, controls,
            {name: bool(held) for name, held in behaves.items()}, bytes=set_bytes,
            baseline_bytes=bytes_of(start), data="mnist10k at 14 x 14",
            note="bytes: one set of scales beside the dense model",
        )
    ]  # fmt: skip


def _ranges(policy: AdapterPolicy, handle: Handle) -> tuple[Activate, list[tuple[int, int]]]:
    """What to do at a timestep, and the ranges of timesteps that are trained."""
    if not isinstance(policy, QuantizedDiffusionPersonalization):
        return (lambda t: None), [(0, T)]
    bank: AdapterBank = policy.bank(handle, T)
    return bank.at, policy.trained(T)


class _Subject:
    """Pictures of one subject, and how well a model knows it."""

    def __init__(
        self, pictures: Tensor, digits: Tensor, eye: nn.Module, nth: int, seed: int
    ) -> None:
        self.digit = nth % 10
        self.draws = torch.Generator().manual_seed(seed * 100 + nth)
        own = pictures[digits == self.digit]
        pick = torch.randperm(len(own), generator=self.draws)
        self.shots = _styled(own[pick[:SHOTS]])
        self.prior = own[pick[SHOTS:]]
        self.eye = eye
        self.seed = seed * 100 + nth

    def teach(
        self, model: Denoiser, handle: Handle, activate: Activate, ranges: list[tuple[int, int]]
    ) -> None:
        """DreamBooth: the subject with the token, and its class without, in equal parts."""
        params = [p for p in handle.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(params, lr=RATE)
        draws = torch.Generator().manual_seed(self.seed)
        half = BATCH // 2
        for step in range(TUNING):
            first, last = ranges[step % len(ranges)]
            activate(first)
            t = torch.randint(first, last, (BATCH,), generator=draws)
            shots = self.shots[torch.randint(SHOTS, (half,), generator=draws)]
            prior = self.prior[torch.randint(len(self.prior), (half,), generator=draws)]
            token = torch.tensor([N_TOKENS] * half + [0] * half)
            digit = torch.full((BATCH,), self.digit)
            loss = _loss(model, torch.cat([shots, prior]), t, digit, token, draws)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def scores(self, model: Denoiser, activate: Activate) -> tuple[float, float]:
        """Likeness to the subject, and obedience to the other classes."""
        draws = torch.Generator().manual_seed(self.seed + 1)
        own = torch.full((DRAWN,), self.digit)
        others = torch.tensor([d for d in range(10) if d != self.digit] * (DRAWN // 4))
        drawn = _sample(model, activate, torch.cat([own, others]), draws)
        with torch.no_grad():
            seen, wanted = _features(self.eye, drawn[:DRAWN]), _features(self.eye, self.shots)
            likeness = F.cosine_similarity(seen, wanted.mean(0, keepdim=True)).mean()
            read = self.eye(drawn[DRAWN:]).argmax(1) % 10
        return float(likeness), float((read == others).double().mean())


def _alphas() -> Tensor:
    """Share of the signal's variance (T,) that is left at each timestep."""
    at = (torch.arange(T) + 1) / (T + 1)
    return torch.cos(at * torch.pi / 2).square()


def _loss(
    model: Denoiser, x: Tensor, t: Tensor, digit: Tensor, token: Tensor, draws: torch.Generator
) -> Tensor:
    noise = torch.randn(x.shape, generator=draws)
    left = _alphas()[t, None]
    told: Tensor = model(left.sqrt() * x + (1 - left).sqrt() * noise, t, digit, token)
    return F.mse_loss(told, noise)


@torch.no_grad()
def _sample(model: Denoiser, activate: Activate, digit: Tensor, draws: torch.Generator) -> Tensor:
    """Pictures (n, 196) of these classes with the token, by DDIM; each timestep uses its set."""
    alphas = _alphas()
    x: Tensor = torch.randn((len(digit), SIDE * SIDE), generator=draws)
    token = torch.full((len(digit),), N_TOKENS)
    visited = list(range(T - 1, -1, -T // SAMPLING))
    for t, after in zip(visited, [*visited[1:], None], strict=True):
        activate(t)
        noise = model(x, torch.full((len(digit),), t), digit, token)
        clean: Tensor = ((x - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()).clamp(-1, 1)
        if after is None:
            return clean
        x = alphas[after].sqrt() * clean + (1 - alphas[after]).sqrt() * noise
    return x


def _apart(policy: QuantizedDiffusionPersonalization, start: dict[str, Tensor]) -> bool:
    """Whether a loss at one range's timesteps leaves the other sets without a gradient."""
    model = Denoiser()
    model.load_state_dict(start)
    handle = policy(model)
    bank = policy.bank(handle, T)
    alone = []
    for name, (first, last) in zip(handle.names, policy.trained(T), strict=True):
        for t in (first, last - 1):
            model.zero_grad()
            bank.at(t)
            none, at = torch.zeros(2, dtype=torch.int64), torch.full((2,), t)
            model(torch.zeros(2, SIDE * SIDE), at, none, none).sum().backward()
            sets = {n: list(handle.parameters(n)) for n in handle.names}
            moved = {n for n, params in sets.items() if any(p.grad is not None for p in params)}
            alone.append(moved == {name})
    return all(alone)


def _styled(pictures: Tensor) -> Tensor:
    """Slanted by half a picture and thick."""
    images = pictures.view(-1, 1, SIDE, SIDE)
    grid = F.affine_grid(
        torch.tensor([[[1.0, 0.6, 0.0], [0.0, 1.0, 0.0]]]).expand(len(images), 2, 3),
        [len(images), 1, SIDE, SIDE], align_corners=False,
    )  # fmt: skip
    slanted = F.grid_sample(images + 1, grid, align_corners=False) - 1
    thick = F.max_pool2d(slanted, 2, stride=1, padding=1)[..., :SIDE, :SIDE]
    return thick.reshape(-1, SIDE * SIDE)


def _mnist(data: Path | None) -> tuple[Tensor, Tensor]:
    """Pictures (n, 196) in [-1, 1] and digits (n,)."""
    folder = data_folder(data) / "mnist10k"
    raw: Any = gzip.decompress((folder / "dev8000-images-idx3-ubyte.gz").read_bytes())
    labels: Any = gzip.decompress((folder / "dev8000-labels-idx1-ubyte.gz").read_bytes())
    images = torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
    small = F.avg_pool2d(images.float() / 127.5 - 1, 2).flatten(1)
    return small, torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8).long()


def _classifier(pictures: Tensor, digits: Tensor) -> nn.Module:
    """Reads digit and style (20 classes: the styled ones follow the plain)."""
    eye = nn.Sequential(nn.Linear(SIDE * SIDE, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())
    eye.append(nn.Linear(64, 20))
    draws = torch.Generator().manual_seed(1)
    for param in eye.parameters():
        param.data = torch.randn(param.shape, generator=draws) * 0.06
    optimizer = torch.optim.Adam(eye.parameters(), lr=1e-3)
    for _ in range(600):
        pick = torch.randint(len(pictures), (128,), generator=draws)
        x, y = pictures[pick], digits[pick]
        loss = F.cross_entropy(eye(torch.cat([x, _styled(x)])), torch.cat([y, y + 10]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return eye


def _features(eye: nn.Module, x: Tensor) -> Tensor:
    layers: Any = eye
    found: Tensor = layers[:-1](x)
    return found


def _denoiser(pictures: Tensor, digits: Tensor) -> dict[str, Tensor]:
    """Trained once on all classes, with words that mean nothing; cached."""

    def train(where: Path) -> None:
        model = Denoiser()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        fade = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING)
        draws = torch.Generator().manual_seed(2)
        for _ in range(PRETRAINING):
            pick = torch.randint(len(pictures), (128,), generator=draws)
            t = torch.randint(T, (128,), generator=draws)
            token = torch.randint(N_TOKENS, (128,), generator=draws)
            loss = _loss(model, pictures[pick], t, digits[pick], token, draws)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            fade.step()
        torch.save(model.state_dict(), where / "model.pt")

    folder = cached(f"denoiser-mnist10k-{SIDE}-{WIDTH}-{T}-{PRETRAINING}", train)
    start: dict[str, Tensor] = torch.load(folder / "model.pt", weights_only=True)
    return start
