"""Reversible networks: bytes that do not grow with depth, for the gradients of ordinary autograd.

- Reversible-DARTS: bytes kept by the forward pass of 16 layers, as a part of those under ordinary
  autograd; which operation the search picks, beside random search of equal time
- Reversible-3D-UNet: the largest volume of equal peak bytes, and Dice at equal volume
- both: gradients beside autograd, drift in bfloat16
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memwise.bench.engine import Row, paired_interval
from memwise.errors import InvalidKnob
from memwise.train.engine.reversible import ReversibleSequence
from memwise.train.measure import peak
from memwise.train.policies.plain_blocks import PlainBlocks
from memwise.train.policies.reversible_3d_unet import Reversible3DUNet, UNet3D
from memwise.train.policies.reversible_darts import ReversibleDARTS, SearchNet

FEW, MANY, DEEP, DRIFTING = 4, 16, 24, 64  # layers
N_SEARCHES, N_STEPS, TOKENS, VOCABULARY, SEARCH_WIDTH = 40, 100, 12, 8, 32
SIDE, N_TRAINED, N_JUDGED = 16, 60, 24


def run(
    method: ReversibleDARTS | Reversible3DUNet | PlainBlocks, data: Path | None, seed: int
) -> list[Row]:
    """Rows of one of the two methods; the data is generated.

    Raises:
        InvalidKnob: asked of their baseline, which has nothing to stand beside.
    """
    match method:
        case ReversibleDARTS():
            return [_kept(method, seed), _exact(method, seed), _search(method, seed)]
        case Reversible3DUNet():
            return [_volumes(method, seed), _dice(method, seed), _volume_gradients(method, seed)]
    raise InvalidKnob(
        "plain_blocks is the baseline of this check; run it for reversible_darts or "
        "reversible_3d_unet"
    )


# --- both


def kept(fn: Callable[[], object]) -> int:
    """Bytes above the start that a forward pass leaves behind, its output included."""
    fn()  # the first pass also chooses kernels
    return peak(fn).kept_bytes


def _draw(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    weights = [w for w in model.parameters() if w.requires_grad]
    loss = model(leaf).double().square().mean()
    found = torch.autograd.grad(loss, [leaf, *weights], allow_unused=True)
    return [torch.zeros(1) if one is None else one for one in found]


def error(mine: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """|mine - true| / |true|, over all tensors together."""
    flat = [torch.cat([one.double().flatten() for one in some]) for some in (mine, true)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


# --- Reversible-DARTS


def _kept(method: ReversibleDARTS, seed: int) -> Row:
    """Items: number of parts x width x tokens."""
    shares, growth, checkpointed, sizes = [], [], [], []
    for n_parts in (2, 4):
        for width in (64, 128):
            for tokens in (32, 128):
                policy = replace(method, n_parts=n_parts)
                x = _draw((4, tokens, width), seed).requires_grad_()
                few, many = policy(width, FEW, seed), policy(width, MANY, seed)
                plain = PlainBlocks()(many)
                mine, whole = kept(partial(many, x)), kept(partial(plain, x))
                shares.append(mine / whole)
                growth.append(mine / kept(partial(few, x)))
                checkpointed.append(kept(partial(_by_layer, many, x)) / whole)
                sizes.append((mine, whole))
    values = np.array(shares)
    return Row(
        f"bytes kept, {MANY} layers / plain", float(values.mean()), 1.0,
        paired_interval(values, np.ones_like(values), seed), len(values),
        {
            f"{MANY} layers / {FEW} layers, worst": max(growth),
            "checkpointed by layer / plain": float(np.mean(checkpointed)),
        },
        {
            f"{MANY} layers keep what {FEW} keep, within 10 %": max(growth) < 1.1,
            "less than checkpointing by layer": bool((values < np.array(checkpointed)).all()),
        },
        bytes=sizes[-1][0], baseline_bytes=sizes[-1][1],
        data="2 and 4 parts, widths 64 and 128, 32 and 128 tokens",
    )  # fmt: skip


def _by_layer(net: ReversibleSequence, x: Tensor) -> Tensor:
    """The same network, the input of each layer kept."""
    for first in range(0, len(net.fns), net.parts):
        layer = ReversibleSequence(net.parts, list(net.fns[first : first + net.parts]))
        x = cast(Tensor, checkpoint(layer.plain, x, use_reentrant=False))
    return x


def _exact(method: ReversibleDARTS, seed: int) -> Row:
    """Gradients of 24 layers; items: seeds x parts. The measure of truth is float64."""
    inversions, mine, theirs = [], [], []
    for n_parts in (2, 4):
        for draw in range(4):
            net = replace(method, n_parts=n_parts)(64, DEEP, seed + draw)
            x = _draw((2, 32, 64), seed + draw)
            inversions.append(error([net.inverse(net(x))], [x]))
            grads, plain = _gradients(net, x), _gradients(PlainBlocks()(net), x)
            true = _gradients(PlainBlocks()(net).double(), x.double())
            mine.append(error(grads, true))
            theirs.append(error(plain, true))
    value, base = np.array(mine), np.array(theirs)
    drifts = drift(method(64, DRIFTING, seed), _draw((2, 32, 64), seed))
    worst = max(inversions)
    return Row(
        f"error of the gradient, {DEEP} layers", float(value.mean()), float(base.mean()),
        paired_interval(value, base, seed), len(value),
        {"inversion, largest": worst, "gradient, largest": float(value.max()), **drifts},
        {
            "inversion error below 1e-5": worst < 1e-5,
            "gradient error below 1e-4": bool((value < 1e-4).all()),
            f"{DRIFTING} layers under autocast: error below bfloat16's own rounding, 2^-8": (
                drifts["bf16 autocast"] < 2**-8
            ),
        },
        primary=False, data="float32 beside float64 autograd",
    )  # fmt: skip


def drift(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Errors of the gradient in bfloat16, all beside float64."""
    plain = PlainBlocks()(net)
    true = _gradients(PlainBlocks()(net).double(), x.double())
    found = {}
    with torch.autocast("cpu", torch.bfloat16):
        found["bf16 autocast"] = error(_gradients(net, x), true)
        found["bf16 autocast, plain"] = error(_gradients(plain, x), true)
    found["bf16 model"] = error(_gradients(net.bfloat16(), x.bfloat16()), true)
    found["bf16 model, plain"] = error(_gradients(plain.bfloat16(), x.bfloat16()), true)
    return found


class _Task(nn.Module):
    """Say the symbols backwards: only attention can move them over any distance."""

    def __init__(self, net: SearchNet, seed: int) -> None:
        super().__init__()
        self.net = net
        self.symbols = nn.Parameter(_draw((VOCABULARY, SEARCH_WIDTH), seed))
        self.places = nn.Parameter(_draw((TOKENS, SEARCH_WIDTH), seed + 1))
        self.head = nn.Parameter(_draw((SEARCH_WIDTH, VOCABULARY), seed + 2) * SEARCH_WIDTH**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        scores = self.net(self.symbols[ids] + self.places) @ self.head
        return F.cross_entropy(scores.flatten(0, 1), ids.flip(1).flatten())


def _batch(seed: int, step: int, half: int) -> Tensor:
    """Sequences of one half of the data: the halves differ in their draws and share none."""
    draws = torch.Generator().manual_seed((2 * step + half) * 100_003 + seed)
    return torch.randint(VOCABULARY, (16, TOKENS), generator=draws)


def _train(task: _Task, weights: list[nn.Parameter], n_steps: int, seed: int) -> float:
    """Train on one half; the loss on the other."""
    optimizer = torch.optim.Adam(weights, lr=3e-3)
    for step in range(n_steps):
        optimizer.zero_grad()
        task(_batch(seed, step, 0)).backward()
        optimizer.step()
    with torch.no_grad():
        return float(torch.stack([task(_batch(seed, step, 1)) for step in range(4)]).mean())


def _searched(method: ReversibleDARTS, seed: int) -> list[str]:
    """First order: a step of the weights on one half, a step of alpha on the other."""
    task = _Task(method(SEARCH_WIDTH, 1, seed), seed)
    alphas = task.net.alphas()
    rest = [w for w in task.parameters() if all(w is not alpha for alpha in alphas)]
    of_weights = torch.optim.Adam(rest, lr=3e-3)
    of_alphas = torch.optim.Adam(alphas, lr=3e-2, betas=(0.5, 0.999))
    for step in range(N_STEPS):
        for half, optimizer in enumerate((of_weights, of_alphas)):
            task.zero_grad()
            task(_batch(seed, step, half)).backward()
            optimizer.step()
    return task.net.chosen()


def _random_search(method: ReversibleDARTS, seed: int, seconds: float) -> tuple[list[str], int]:
    """The best of as many random choices, each trained as long, as fit into this time."""
    rng = np.random.default_rng(seed)
    net = method(SEARCH_WIDTH, 1, seed)
    found: list[tuple[float, list[str]]] = []
    began = time.process_time()
    while not found or time.process_time() - began < seconds:
        chosen = [str(op) for op in rng.choice(method.ops, method.n_parts)]
        task = _Task(net.derived(chosen, seed), seed)
        found.append((_train(task, list(task.parameters()), N_STEPS, seed), chosen))
    return min(found)[1], len(found)


def _search(method: ReversibleDARTS, seed: int) -> Row:
    """Items: searches. A hit: attention, without which the task cannot be done, is among them."""
    mine, random, tried, seconds = [], [], [], 0.0
    for draw in range(N_SEARCHES):
        began = time.process_time()
        chosen = _searched(method, seed * 1000 + draw)
        took = time.process_time() - began
        picked, n = _random_search(method, seed * 1000 + draw, took)
        mine.append("attention" in chosen)
        random.append("attention" in picked)
        tried.append(n)
        seconds += took
    value, base = (np.array(some, float) for some in (mine, random))
    low, high = paired_interval(value, base, seed)
    chance = 1 - (1 - 1 / len(method.ops)) ** method.n_parts
    return Row(
        "search picks the operation that the task needs", float(value.mean()), float(base.mean()),
        (low, high), len(value),
        {"one random choice": chance, "choices tried by random search": float(np.mean(tried))},
        {"more often than random search of equal time": low > 0},
        primary=False, seconds=seconds, data="saying 12 symbols backwards",
    )  # fmt: skip


# --- Reversible-3D-UNet


def _volumes(method: Reversible3DUNet, seed: int) -> Row:
    """The largest volume that needs no more than the plain peak; items: pairs a run x channels."""
    shares, checkpointed, growth, sizes = [], [], [], []
    for channels in ((16, 32), (16, 32, 64)):
        few, many = (replace(method, n_blocks=n)(channels, seed=seed) for n in (1, 4))
        x = _draw((1, 1, SIDE, SIDE, SIDE), seed)
        growth.append(kept(partial(many, x)) / kept(partial(few, x)))
        for n_blocks in (1, 2, 3):
            net = replace(method, n_blocks=n_blocks)(channels, seed=seed)
            plain = PlainBlocks()(net)
            allowed = _step_peak(plain, SIDE)
            length = _largest(net, allowed)
            shares.append(length / SIDE)
            checkpointed.append(_largest(_Checkpointed(plain), allowed) / SIDE)
            sizes.append((_step_peak(net, length), allowed))
    values = np.array(shares)
    return Row(
        "volume at equal peak bytes / plain", float(values.mean()), 1.0,
        paired_interval(values, np.ones_like(values), seed), len(values),
        {
            "each run of blocks checkpointed": float(np.mean(checkpointed)),
            "bytes kept, 4 pairs a run / 1 pair, worst": max(growth),
        },
        {
            "4 pairs a run keep what 1 pair keeps, within 10 %": max(growth) < 1.1,
            "a larger volume than by checkpointing": bool((values > np.array(checkpointed)).all()),
            "never more than the plain peak": all(mine <= whole for mine, whole in sizes),
        },
        bytes=sizes[-1][0], baseline_bytes=sizes[-1][1],
        data=f"a step on one volume of {SIDE} x {SIDE} x its length",
    )  # fmt: skip


def _step_peak(net: nn.Module, length: int) -> int:
    """Peak of a training step on one volume, above weights and gradients."""
    x = torch.zeros(1, 1, length, SIDE, SIDE)

    def step() -> None:
        net(x).square().mean().backward()

    step()
    return peak(step).peak_bytes


def _largest(net: nn.Module, allowed: int) -> int:
    """The greatest length, in steps of 4, whose peak is allowed; the peak rises with the length."""
    length = 4
    guess = 4 * int(SIDE * allowed / _step_peak(net, SIDE) / 4)
    length = max(length, guess)
    while length > 4 and _step_peak(net, length) > allowed:
        length -= 4
    while _step_peak(net, length + 4) <= allowed:
        length += 4
    return length


class _Checkpointed(nn.Module):
    """The plain network, only the input of each run of blocks kept."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        unet = cast(UNet3D, self.net)
        for runs in (unet.encoder, unet.decoder):
            for i, blocks in enumerate(runs):
                runs[i] = _Recomputed(blocks)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


class _Recomputed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(self.inner, x, use_reentrant=False))


def ellipsoids(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three nested ellipsoids in noise: volumes (n, 1, S, S, S) and classes 0 .. 3 of their voxels.

    The two inner ones have each other's brightness in every second volume, so that a voxel's class
    follows from the place and not from its value alone.
    """
    draws = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, SIDE)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)  # (S, S, S, 3)
    labels = torch.zeros((n, SIDE, SIDE, SIDE), dtype=torch.long)
    for i in range(n):
        center = 0.3 * torch.randn(3, generator=draws).clamp(-1, 1)
        radii = 0.5 + 0.3 * torch.rand(3, generator=draws)
        distance = ((grid - center) / radii).norm(dim=-1)
        for level, edge in enumerate((1.0, 0.75, 0.5), 1):
            labels[i][distance < edge] = level
    bright = torch.tensor([[0.0, 1.0, 2.0, 1.5], [0.0, 1.0, 1.5, 2.0]])
    flipped = torch.arange(n) % 2
    x = bright[flipped[:, None, None, None], labels]
    return (x + 0.5 * torch.randn(x.shape, generator=draws))[:, None], labels


def dice(predicted: Tensor, labels: Tensor) -> Tensor:
    """Mean Dice of classes 1 .. 3 for each volume, in points of 100."""
    found = []
    for level in (1, 2, 3):
        mine, true = (one.flatten(1) == level for one in (predicted, labels))
        both = (mine & true).sum(1).double()
        found.append(2 * both / (mine.sum(1) + true.sum(1)).clamp(min=1))
    return 100 * torch.stack(found).mean(0)


def _segmented(net: nn.Module, seed: int) -> Tensor:
    """Train; Dice of volumes that were not trained on."""
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    criterion = nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 1.0, 1.0]))  # most is background
    for step in range(N_TRAINED):
        x, labels = ellipsoids(2, seed * 100_003 + step)
        optimizer.zero_grad()
        criterion(net(x), labels).backward()
        optimizer.step()
    x, labels = ellipsoids(N_JUDGED, seed + 99_991)
    with torch.no_grad():
        return dice(net(x).argmax(1), labels)


def _dice(method: Reversible3DUNet, seed: int) -> Row:
    """Items: volumes."""
    net = method(seed=seed)
    plain = PlainBlocks()(net)
    began = time.process_time()
    value = _segmented(net, seed).numpy()
    seconds = time.process_time() - began
    base = _segmented(plain, seed).numpy()
    plain_seconds = time.process_time() - began - seconds
    x, labels = ellipsoids(N_JUDGED, seed + 99_991)
    by_value = dice((x[:, 0, ..., None] - torch.tensor([0, 1, 1.5, 2])).abs().argmin(-1), labels)
    low, high = paired_interval(value, base, seed)
    return Row(
        "Dice at equal volume", float(value.mean()), float(base.mean()), (low, high), len(value),
        {"by brightness alone": float(by_value.mean()), "time / plain": seconds / plain_seconds},
        {
            "within 1 point of the plain network": low > -1,
            "10 points above brightness alone": value.mean() > by_value.mean() + 10,
        },
        primary=False, seconds=seconds, data="nested ellipsoids",
    )  # fmt: skip


def _volume_gradients(method: Reversible3DUNet, seed: int) -> Row:
    """Items: draws. The measure of truth is float64."""
    mine, theirs = [], []
    for draw in range(6):
        net, x = method(seed=seed + draw), _draw((1, 1, 8, 8, 8), seed + draw)
        plain = PlainBlocks()(net)
        true = _gradients(PlainBlocks()(net).double(), x.double())
        mine.append(error(_gradients(net, x), true))
        theirs.append(error(_gradients(plain, x), true))
    value, base = np.array(mine), np.array(theirs)
    deep = replace(method, n_blocks=DRIFTING // 2)((16,), seed=seed)
    drifts = drift(deep, _draw((1, 1, 8, 8, 8), seed))
    return Row(
        "error of the gradient", float(value.mean()), float(base.mean()),
        paired_interval(value, base, seed), len(value), drifts,
        {
            "gradient error below 1e-4": bool((value < 1e-4).all()),
            f"{DRIFTING} blocks under autocast: at most twice the plain error": (
                drifts["bf16 autocast"] < 2 * drifts["bf16 autocast, plain"]
            ),
        },
        primary=False, data="float32 beside float64 autograd",
    )  # fmt: skip
