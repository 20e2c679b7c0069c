"""Measure the same work twice, with memwise and from the heap itself, and print both as JSON.

LD_PRELOAD=malloc_peak.so python heap_truth.py malloc_peak.so
"""

import ctypes
import gc
import json
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memwise.train.measure import measure, peak

VOLUME = torch.linspace(-1, 1, 1 << 18).sin().view(1, 8, 32, 32, 32)
KERNEL = torch.ones(16, 8, 3, 3, 3)


class Block(nn.Module):
    """A pre-norm transformer block, (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in parts)
        mixed = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v  # (B, H, T, D/H)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class Stack(nn.Module):
    def __init__(self, n_layers: int, recompute: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(128, 4) for _ in range(n_layers))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


class Cube(torch.autograd.Function):
    """y = x**3, with one tensor saved as it should be and one hidden on the context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.square = x * x
        return ctx.square * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (2 * ctx.square + x * x)


class Int8(torch.autograd.Function):
    """y = x**2, with x saved in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = x.abs().max() / 127
        ctx.save_for_backward((x / scale).round().to(torch.int8), scale)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        codes, scale = ctx.saved_tensors
        return 2 * grad * codes * scale


def applied(function: type[torch.autograd.Function]) -> Callable[[], None]:
    layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(3))
    x = torch.randn(4096, 256)

    def step() -> None:
        out = x
        for layer in layers:
            out = function.apply(layer(out))
        out.mean().backward()

    return step


def trained(model: nn.Module, x: Tensor) -> Callable[[], None]:
    return lambda: model(x).square().mean().backward()


def lm_head() -> Callable[[], None]:
    head, x, y = nn.Linear(64, 8192), torch.randn(512, 64), torch.randint(8192, (512,))
    return lambda: F.cross_entropy(head(x), y).backward()


def optimizer_step() -> Callable[[], None]:
    weights = [nn.Parameter(torch.randn(1024, 1024)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return torch.optim.AdamW(weights, foreach=True).step


def whole_step() -> Callable[[], None]:
    # Frees the gradients of the step before: memory that is older than the measurement.
    model, x = Stack(2, recompute=False), torch.randn(8, 128, 128)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def convnet() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in pairwise([3, 32, 32, 32]):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)


@torch.no_grad()
def conv3d() -> Tensor:
    return F.conv3d(VOLUME, KERNEL, padding=1)


@torch.no_grad()
def sort() -> tuple[Tensor, Tensor]:
    return torch.sort(VOLUME.flatten())


@torch.no_grad()
def svd() -> tuple[Tensor, ...]:
    return torch.linalg.svd(VOLUME.view(512, 512))


def workloads() -> Iterator[tuple[str, Callable[[], object]]]:
    tokens = torch.randn(8, 128, 128)
    yield "transformer", trained(Stack(4, recompute=False), tokens)
    yield "checkpointed", trained(Stack(4, recompute=True), tokens)
    yield "custom Function", applied(Cube)
    yield "int8", applied(Int8)
    yield "convnet", trained(convnet(), torch.randn(4, 3, 96, 96))
    yield "LM head", lm_head()
    yield "conv3d", conv3d
    yield "sort", sort
    yield "optimizer step", optimizer_step()
    yield "whole step", whole_step()
    yield "svd", svd


def heap_peak(heap: ctypes.CDLL, fn: Callable[[], object]) -> int:
    gc.collect()
    heap.heap_reset()
    before = heap.heap_level()
    fn()
    return int(heap.heap_peak()) - before


def main() -> None:
    heap = ctypes.CDLL(sys.argv[1])
    for read in (heap.heap_level, heap.heap_peak):
        read.restype = ctypes.c_longlong
    torch.set_num_threads(1)
    gc.freeze()  # each measurement collects garbage first: leave the imported libraries out
    torch.manual_seed(0)

    rows = {}
    for name, fn in workloads():
        fn()
        with measure(nn.Identity()) as report:
            fn()
        rows[name] = {
            "heap": heap_peak(heap, fn),
            "peak": peak(fn).peak_bytes,
            "measure": report.peak.peak_bytes,
        }
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
