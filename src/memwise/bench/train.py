"""The room `train` side by side: optimizers, what is saved for the backward pass, and adapters.

A byte model that knows books learns Wikipedia from the same batches in every row; windows of text
that nobody trains on judge it. Bytes and times are those of a model of 3.4 M parameters on 16
windows of 256 bytes; times are medians of ratios to a reference that is run in turn. Packages that
others make are measured beside ours where they are installed: bitsandbytes, torchao, galore-torch.

Where Gemma-3-270M is installed, the last part tunes it inside a quarter of what plain AdamW takes.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memwise import catalogue, models
from memwise.bench.checks.adapters import RATES, Ground, ground
from memwise.bench.data import books
from memwise.bench.engine import Row, in_rounds, paired_interval
from memwise.bench.training import ByteLM, fit
from memwise.errors import MissingExtra, UnsupportedModel
from memwise.train.engine.activations import ActivationPolicy, compress_activations
from memwise.train.engine.adapters import AdapterPolicy
from memwise.train.engine.optimizer import OptimizerPolicy
from memwise.train.measure import bytes_of, peak, persistent
from memwise.train.tune import Settings, tune
from memwise.train.tune_data import Windows, start_of, tokenized
from memwise.train.tune_plan import CausalLoss, judged

Params: TypeAlias = Iterable[nn.Parameter]
Make: TypeAlias = Callable[[Params, float], torch.optim.Optimizer]
Around: TypeAlias = Callable[[ByteLM], AbstractContextManager[object]]
Values: TypeAlias = NDArray[np.float64]

SEED = 0
_REFERENCE = "torch AdamW, fused"
_PLAIN = "plain autograd"
_FULL = "full tuning"
_N_STEPS, _N_FADE, _N_ROUNDS = 200, 100, 7
_SIZE, _CONTEXT = 16, 256  # of the batch whose bytes and time are measured
# Chosen on the last tenth of the training text; AdamW's for all whose steps have its size.
_LR = 2e-3
_RATES = {
    "lion": 5e-4, "sgdm": 1e-1, "adafactor": 2e-2, "torch Adafactor": 2e-2,
    "galore": 1.6e-2, "online_subspace_descent": 1.6e-2, "galore-torch, rank 64": 4e-3,
}  # fmt: skip
_OPTIMIZERS, _ACTIVATIONS, _ADAPTERS, _STACK = (
    "Optimizers", "Saved for the backward pass, AdamW", "Adapters, AdamW",
    "Gemma-3-270M, 30 steps of 256 tokens",
)  # fmt: skip


def run(data: Path | None) -> dict[str, list[Row]]:
    """All parts.

    Args:
        data: folder of the data sets.
    """
    at = ground(data)
    parts: list[Callable[[], dict[str, list[Row]]]] = [
        partial(_optimizers, at), partial(_activations, at), partial(_adapters, at), _stack,
    ]  # fmt: skip
    found: dict[str, list[Row]] = {}
    for part in parts:
        for name, rows in part().items():
            found.setdefault(name, []).extend(rows)
    return found


def _told(subjects: Mapping[str, Any], part: str) -> Iterable[Any]:
    return track(subjects.items(), part, console=Console(stderr=True), transient=True)


def _policies(kind: type) -> dict[str, Any]:
    """Those of a kind that need nothing but their knobs."""
    found = {}
    for entry in catalogue.cards():
        if entry.room == "train":
            made = catalogue.load(entry.key)
            if issubclass(made, kind) and made.__call__ is kind.__call__:
                found[entry.name] = made()
    return found


# --- optimizers


def _optimizers(at: Ground) -> dict[str, list[Row]]:
    made: dict[str, Make] = {_REFERENCE: partial(torch.optim.AdamW, fused=True, weight_decay=0.0)}
    made |= _peers()
    made |= {name: _own(policy) for name, policy in _policies(OptimizerPolicy).items()}
    theirs = _after(at, made[_REFERENCE], _LR)
    exact = _stepping(made[_REFERENCE], _LR)[1]
    rows = {}
    for name, make in _told(made, _OPTIMIZERS):
        lr = _RATES.get(name, _LR)
        own = theirs if name == _REFERENCE else _after(at, make, lr)
        step, states, extra = _stepping(make, lr)
        times = _ratios(step, _stepping(made[_REFERENCE], _LR)[0])
        rows[name] = [
            _loss(own, theirs, states, exact),
            in_rounds("states / AdamW's", np.array([states / exact])),
            in_rounds("extra in a step, MiB", np.array([extra / 2**20]), baseline=0.0),
            in_rounds("step / fused", times),
        ]
    return _in(_OPTIMIZERS, rows)


def _own(policy: OptimizerPolicy) -> Make:
    return lambda params, lr: policy(params, lr=lr)


def _peers() -> dict[str, Make]:
    found: dict[str, Make] = {"torch Adafactor": torch.optim.Adafactor}
    if importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes AdamW8bit"] = _class("bitsandbytes.optim", "AdamW8bit")
    if importlib.util.find_spec("torchao"):
        found |= {f"torchao {n}": _class("torchao.optim", n) for n in ("AdamW8bit", "AdamW4bit")}
    if importlib.util.find_spec("galore_torch"):
        found["galore-torch, rank 64"] = _galore
    return found


def _class(module: str, name: str) -> Make:
    made = getattr(importlib.import_module(module), name)
    return lambda params, lr: made(params, lr=lr, weight_decay=0.0)


def _galore(params: Params, lr: float) -> torch.optim.Optimizer:
    given = list(params)
    low, rest = ([p for p in given if (p.ndim == 2) == flat] for flat in (True, False))
    group = {"params": low, "rank": 64, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
    make: Any = importlib.import_module("galore_torch").GaLoreAdamW
    made: torch.optim.Optimizer = make(
        [{"params": rest}, group], lr=lr, weight_decay=0.0, no_deprecation_warning=True
    )
    return made


def _after(at: Ground, make: Make, lr: float) -> Values:
    model = at.model()
    fit(
        model, make(model.parameters(), lr), at.text, _N_STEPS, 8, model.pos.num_embeddings, SEED,
        n_fade=_N_FADE,
    )  # fmt: skip
    return at.judged(model)


def _stepping(make: Make, lr: float) -> tuple[Callable[[], object], int, int]:
    """A step that can be repeated, the bytes of its states, and those it takes for a moment."""
    model = ByteLM(seed=SEED)
    draws = torch.Generator().manual_seed(SEED)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=draws) * 1e-2
    optimizer = make(model.parameters(), lr)
    optimizer.step()
    return optimizer.step, bytes_of(optimizer.state), peak(optimizer.step).peak_bytes


# --- what is saved for the backward pass


def _activations(at: Ground) -> dict[str, list[Row]]:
    around: dict[str, Around] = {_PLAIN: _nothing}
    around |= {"torch checkpoint": _Checkpointed, "torch linear_cross_entropy": _Headless}
    around |= {name: _compressed(p) for name, p in _policies(ActivationPolicy).items()}
    model = ByteLM(seed=SEED)
    batch = at.text.batch(0, _SIZE, _CONTEXT, SEED)
    theirs = _saving(at, _nothing)
    exact, gradient = _passes(model, batch, _nothing)
    rows = {}
    for name, enter in _told(around, _ACTIVATIONS):
        own = theirs if name == _PLAIN else _saving(at, enter)
        highest, mine = _passes(model, batch, enter)
        times = _ratios(_pass(model, batch, enter), _pass(model, batch, _nothing))
        error = float((mine - gradient).norm() / gradient.norm())
        rows[name] = [
            _loss(own, theirs, highest, exact),
            in_rounds("peak / plain's", np.array([highest / exact])),
            in_rounds("gradient error", np.array([error]), baseline=0.0),
            in_rounds("passes / plain's", times),
        ]
    return _in(_ACTIVATIONS, rows)


def _nothing(model: ByteLM) -> AbstractContextManager[object]:
    return nullcontext()


def _compressed(policy: ActivationPolicy) -> Around:
    return lambda model: compress_activations(model, policy)


class _Checkpointed:
    """Each block through torch's checkpoint."""

    def __init__(self, model: ByteLM) -> None:
        self.blocks = list(model.blocks)

    def __enter__(self) -> None:
        for block in self.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def __exit__(self, *about: object) -> None:
        for block in self.blocks:
            del block.forward


class _Headless:
    """The loss by torch's function that makes no logits."""

    def __init__(self, model: ByteLM) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.forward = self._loss  # type: ignore[method-assign]

    def __exit__(self, *about: object) -> None:
        del self.model.forward

    def _loss(self, ids: Tensor) -> Tensor:
        model = self.model
        x = model.tok(ids[:, :-1]) + model.pos.weight[: ids.shape[1] - 1]
        for block in model.blocks:
            x = block(x)
        loss: Tensor = F.linear_cross_entropy(
            model.norm(x).flatten(0, 1), model.head.weight, ids[:, 1:].flatten()
        )
        return loss


def _saving(at: Ground, enter: Around) -> Values:
    model = at.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # sketches take their seeds from it
        fit(
            model, optimizer, at.text, _N_STEPS, 8, model.pos.num_embeddings, SEED,
            partial(enter, model), n_fade=_N_FADE,
        )  # fmt: skip
    return at.judged(model)


def _pass(model: ByteLM, batch: Tensor, enter: Around) -> Callable[[], None]:
    def passes() -> None:
        with enter(model):
            model(batch).backward()

    return passes


def _passes(model: ByteLM, batch: Tensor, enter: Around) -> tuple[int, Tensor]:
    """Peak of forward and backward above parameters and gradients, and the gradient."""
    passes = _pass(model, batch, enter)
    passes()
    highest = peak(passes).peak_bytes
    model.zero_grad(set_to_none=False)
    passes()
    return highest, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# --- adapters


def _adapters(at: Ground) -> dict[str, list[Row]]:
    subjects: dict[str, AdapterPolicy | None] = {_FULL: None, **_policies(AdapterPolicy)}
    batch = at.text.batch(0, _SIZE, _CONTEXT, SEED)
    theirs = _tuned(at, None, _LR)
    plain = _training(None, batch)
    rows = {}
    for name, policy in _told(subjects, _ADAPTERS):
        lr = RATES.get(type(policy).__name__, 5e-3)
        own = theirs if policy is None else _tuned(at, policy, lr)
        step, held, highest = plain if policy is None else _training(policy, batch)
        rows[name] = [
            _loss(own, theirs, highest, plain[2]),
            in_rounds("held / full's", np.array([held / plain[1]])),
            in_rounds("highest moment / full's", np.array([highest / plain[2]])),
            in_rounds("training step / full's", _ratios(step, plain[0])),
        ]
    return _in(_ADAPTERS, rows)


def _tuned(at: Ground, policy: AdapterPolicy | None, lr: float) -> Values:
    model = at.model()
    params = model.parameters() if policy is None else policy(model, seed=SEED).parameters()
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    fit(
        model, optimizer, at.text, _N_STEPS, 8, model.pos.num_embeddings, SEED, n_fade=_N_FADE
    )  # fmt: skip
    return at.judged(model)


def _training(
    policy: AdapterPolicy | None, batch: Tensor
) -> tuple[Callable[[], None], int, int]:  # fmt: skip
    """A training step, bytes of weights, gradients and states, and those of the highest moment."""
    model = ByteLM(seed=SEED)
    params = model.parameters() if policy is None else policy(model, seed=SEED).parameters()
    optimizer = torch.optim.AdamW(params, lr=0.0, weight_decay=0.0)

    def step() -> None:
        model(batch).backward()
        optimizer.step()

    step()
    held = persistent(model, optimizer).total()
    return step, held, held + peak(step).peak_bytes


# --- weights, adapters, optimizer and activations together


def _stack() -> dict[str, list[Row]]:
    try:
        loaded = models.local_model()
    except (MissingExtra, UnsupportedModel):
        return {}
    settings = Settings(n_steps=30, context=256)
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        book = folder / "book.txt"
        book.write_text(books()[0][1], "utf-8")
        path, start = tokenized(book, loaded.tokenizer, folder), start_of(loaded.tokenizer)
        windows = Windows.of(path, settings.context, SEED, start)
        before, after, plain = _plainly(loaded.model, windows, settings.n_steps)
        del loaded
        report = tune("gemma", book, plain // 4, out=folder / "tuned", settings=settings)
    highest = report["bytes"]["all"]
    mine, theirs = np.array([report["held-out loss after"]]), np.array([after])
    rows["plain AdamW, plain logits"] = [
        _loss(theirs, theirs, plain, plain),
        in_rounds("highest moment / plain's", np.ones(1)),
        in_rounds("loss before", np.array([before]), baseline=before),
    ]
    rows["memwise tune"] = [
        replace(_loss(mine, theirs, highest, plain), note=report["way"]),
        in_rounds("highest moment / plain's", np.array([highest / plain])),
        in_rounds("loss before", np.array([report["held-out loss before"]]), baseline=before),
    ]
    return _in(_STACK, rows)


def _plainly(model: Any, windows: Windows, n_steps: int) -> tuple[float, float, int]:
    """Held-out loss before and after torch's AdamW, and the bytes of its highest moment."""
    loss = CausalLoss(model.requires_grad_(True))
    held_out = [windows.window(n)[None] for n in windows.held_out]
    before = judged(loss, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
    highest = 0
    for nth in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-5 * min((nth + 1) / 2, (n_steps - nth) / (n_steps - 1))

        def step(nth: int = nth) -> None:
            loss(windows.batch(nth, 1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        if nth == 1:  # gradients and states are there
            held = persistent(loss, optimizer).total()
            highest = held + peak(step).peak_bytes
        else:
            step()
        optimizer.zero_grad(set_to_none=nth != 0)
    return before, judged(loss, held_out), highest


# --- rows


def _ratios(mine: Callable[[], object], reference: Callable[[], object]) -> Values:
    """Time beside a reference, round by round."""
    found = []
    for _ in range(_N_ROUNDS + 1):
        each = []
        for call in (mine, reference):
            began = time.perf_counter()
            call()
            each.append(time.perf_counter() - began)
        found.append(each[0] / each[1])
    return np.array(found[1:])  # the first one warms up


def _loss(mine: Values, theirs: Values, n_bytes: int, baseline_bytes: int) -> Row:
    interval = paired_interval(mine, theirs, SEED)
    return Row(
        "nat", float(mine.mean()), float(theirs.mean()), interval, len(mine), bytes=n_bytes,
        baseline_bytes=baseline_bytes,
    )  # fmt: skip


def _in(part: str, rows: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    return {name: [replace(row, data=part) for row in each] for name, each in rows.items()}
