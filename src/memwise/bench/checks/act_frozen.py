"""Partial training of a residual conv net: saved bytes beside plain autograd, gradients equal.

Digits go through a net of which a part is trained: the biases and shifts, or the last stage. Body
and statistics are frozen as in fine-tuning. Trained whole, the same net is the control in which
little can be saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memwise.bench.checks.sliced_video import digits
from memwise.bench.engine import Row, paired_interval
from memwise.train.engine.activations import ActivationPolicy, compress_activations
from memwise.train.measure import saved

_N_BATCHES, _SIZE = 4, 64
_WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two convolutions around the residual, with a strided, grouped or dilated first one."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        groups, dilation = (1, 2) if stride == 1 else (4, 1)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, dilation, dilation, groups, bias=False)
        self.norm1, self.act1 = nn.BatchNorm2d(n_out), nn.ReLU()
        self.drop = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.norm2, self.act2 = nn.BatchNorm2d(n_out), nn.ReLU()
        self.skip = nn.Conv2d(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        inner = self.conv2(self.drop(self.act1(self.norm1(self.conv1(x)))))
        mapped: Tensor = self.act2(self.norm2(inner) + self.skip(x))
        return mapped


class ConvNet(nn.Module):
    """Three stages of two blocks and a classifier; its call gives the loss."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        ins = (_WIDTHS[0], *_WIDTHS)
        self.stem = nn.Conv2d(1, _WIDTHS[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(Block(ins[i], width, 1 + (i > 0)), Block(width, width, 1))
            for i, width in enumerate(_WIDTHS)
        )
        self.head = nn.Linear(_WIDTHS[-1], 10)
        draws = torch.Generator().manual_seed(seed)
        for param in self.parameters():
            if param.ndim > 1:
                nn.init.kaiming_normal_(param, generator=draws)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of images (B, 1, H, W)."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), labels)


_PARTS: dict[str, Callable[[str], bool]] = {
    "biases": lambda name: name.endswith("bias"),
    "first and last layer": lambda name: name.startswith(("stem", "head")),
    "everything": lambda name: True,
}
_CONTROL = "everything"


def run(method: ActivationPolicy, data: Path | None, seed: int) -> list[Row]:
    """One row a trained part; all but the last are judged."""
    images, labels = digits(data)
    draws = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=draws)[: _N_BATCHES * _SIZE].view(
        _N_BATCHES, _SIZE
    )
    pictures = images.reshape(len(images), 1, *images.shape[-2:]).float()
    batches = [(pictures[rows], labels[rows].long()) for rows in chosen]
    return [_row(method, part, batches, seed) for part in _PARTS]


def _row(
    method: ActivationPolicy, part: str, batches: list[tuple[Tensor, Tensor]], seed: int
) -> Row:
    model = ConvNet(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # as in fine-tuning; dropout stays on
    for name, param in model.named_parameters():
        param.requires_grad_(_PARTS[part](name))
    held, kept, seconds, plain_s, error, equal = [], [], [], [], 0.0, True
    for i, batch in enumerate(batches):
        kept.append(saved(model, lambda batch=batch: model(*batch)).held_bytes)  # type: ignore[misc]
        plain, _, took = _gradients(model, batch, None, seed + i)
        plain_s.append(took)
        mine, n_bytes, took = _gradients(model, batch, method, seed + i)
        seconds.append(took)
        held.append(n_bytes)
        equal &= all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))
        pairs = zip(mine, plain, strict=True)
        error = max(error, *(float((a - b).norm() / (b.norm() + 1e-12)) for a, b in pairs))
    ratio = np.array(held) / kept
    behaves = {"gradients equal to 1e-5": error <= 1e-5}
    return Row(
        f"held for {part} / plain's", float(ratio.mean()), 1.0,
        paired_interval(ratio, np.ones(len(ratio)), seed), len(ratio),
        {"largest gradient error": error, "time / plain's": min(seconds) / min(plain_s)},
        behaves, primary=part != _CONTROL, bytes=max(held), baseline_bytes=max(kept),
        seconds=sum(seconds), data=f"mnist10k, {_SIZE} a batch, residual conv net",
        note="gradients equal to the bit" if equal else "gradients equal to rounding",
    )  # fmt: skip


def _gradients(
    model: ConvNet, batch: tuple[Tensor, Tensor], method: ActivationPolicy | None, seed: int
) -> tuple[list[Tensor], int, float]:
    model.zero_grad()
    began, n_bytes = time.perf_counter(), 0
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # the same masks of dropout
        if method is None:
            model(*batch).backward()
        else:
            with compress_activations(model, method) as tape:
                model(*batch).backward()
            n_bytes = tape.peak_bytes
    took = time.perf_counter() - began
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], n_bytes, took
