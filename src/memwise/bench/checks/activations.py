"""What an activation policy saves, beside plain autograd, and what that does to training.

Bytes of a whole forward and backward pass of a byte language model are measured on several batches,
the loss after training from the same weights on the same batches, with the windows of text that
nobody trained on as the paired items, and the error of gradients of the trained model. So short a
training forgives rough gradients, so whether what is saved is used shows in the gradients: a cruder
ablation of the policy must err more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import ByteLM, Corpus, corpus, fit, window_nll
from memwise.budget import Budget
from memwise.train.engine.act_actions import Planned, Quant
from memwise.train.engine.activations import ActivationPolicy, Report, Site, compress_activations
from memwise.train.measure import peak

_N_STEPS, _SIZE, _CONTEXT, _LR, _N_WINDOWS = 200, 8, 128, 2e-3, 64
_N_BATCHES = 3  # for the bytes
_N_DRAWS = 8

Values = NDArray[np.float64]


@dataclass(frozen=True)
class _Coded(ActivationPolicy):
    """All saved tensors under one codec: what COAT would be without its choice of scales."""

    codec: str

    def plan(self, sites: Sequence[Site], budget: Budget | None) -> Mapping[str, Planned]:
        return dict.fromkeys((site.name for site in sites), Quant(self.codec))


@dataclass(frozen=True)
class _Case:
    """What a policy must show.

    Attributes:
        slack: loss above plain autograd's that counts as none, relative.
        knob: name of the field that the ablations change; "" for policies of their own.
        ablations: name -> value of the knob, or the policy.
        at_most: ablation -> slack of its own.
        cruder: an ablation whose gradients must err at least 1.5 times as much.
        kind: of the sites whose bytes are told apart.
        share: what they may hold of what they held, from the policy.
        dtype: of the model whose bytes are measured.
        judged: "peak" of the step or what is "held" between the passes: what the margin is about.
    """

    slack: float
    knob: str = ""
    ablations: Mapping[str, Any] = field(default_factory=dict)
    at_most: Mapping[str, float] = field(default_factory=dict)
    cruder: str = ""
    kind: str = ""
    share: Callable[[Any], float] = lambda policy: 1.0
    dtype: torch.dtype = torch.float32
    judged: str = "peak"


_CASES = {
    "FewBitBackward": _Case(
        0.01, "bits", {"4 bits": 4, "1 bit": 1}, {"4 bits": 0.003}, "1 bit", "act",
        lambda policy: policy.bits / 32,
    ),
    "RandomizedLinearBackward": _Case(
        0.05, "ratio", {"half": 0.5, "a 50th": 0.02}, {"half": 0.02}, "a 50th", "linear",
        lambda policy: policy.ratio,
    ),
    "CoatActivations": _Case(
        0.005, "", {"one scale a tensor": _Coded("e4m3/tensor"), "2 bits": _Coded("int2/group16")},
        {}, "2 bits", "linear", lambda policy: 0.5, torch.bfloat16, "held",
    ),
}  # fmt: skip
_EXACT = _Case(0.0005)


def run(method: ActivationPolicy, data: Path | None, seed: int) -> list[Row]:
    """Rows of bytes, of loss, and for sketches of variance."""
    text = corpus(data)
    case = _CASES.get(type(method).__name__, _EXACT)
    trained = _trained(None, text, seed)
    rows = [*_bytes(method, case, text, seed), _loss(method, case, text, trained, seed)]
    rows.append(_errors(method, case, text, trained, seed))
    if type(method).__name__ == "RandomizedLinearBackward":
        rows.append(_variance(method, text, seed))
    return rows


# --- bytes


def _bytes(method: ActivationPolicy, case: _Case, text: Corpus, seed: int) -> list[Row]:
    model = ByteLM(seed=seed).to(case.dtype)
    mine, plain, held, kept, reports = [], [], [], [], []
    began = time.perf_counter()
    for step in range(-1, _N_BATCHES):  # the first one makes the gradients and is not counted
        batch = text.batch(step + 10_000, _SIZE, 256, seed)
        found = [_step(model, batch, policy) for policy in (method, None)]
        if step < 0:
            continue
        mine.append(found[0][0])
        plain.append(found[1][0])
        held.append(found[0][1].peak_bytes)
        kept.append(found[1][1].peak_bytes)
        reports.append(found[0][1])
    seconds = time.perf_counter() - began
    ratio = {"peak": np.array(mine) / plain, "held": np.array(held) / kept}
    first = reports[0]
    at_kind = first.by_kind.get(case.kind)
    behaves = {}
    if at_kind is not None:
        share = at_kind.held_bytes / at_kind.plain_bytes
        wanted = case.share(method)
        behaves[f"{case.kind} sites hold {wanted:.3g} of what they held, to 2 %"] = (
            abs(share / wanted - 1) <= 0.02
        )
    return [
        Row(
            f"{_WORDS[name]} / plain's", float(values.mean()), 1.0,
            paired_interval(values, np.ones(len(values)), seed), len(values),
            {"reached": first.reached_ratio}, behaves if name == case.judged else {},
            primary=name == case.judged, bytes=max(mine if name == "peak" else held),
            baseline_bytes=max(plain if name == "peak" else kept), seconds=seconds,
            data=f"ByteLM, {str(case.dtype).removeprefix('torch.')}, {_SIZE} x 256 bytes",
            note="bytes vary with the batch by nothing but rounding up",
        )
        for name, values in ratio.items()
    ]  # fmt: skip


_WORDS = {"peak": "peak of forward and backward", "held": "held between the passes"}


@dataclass(frozen=True)
class _Nothing(ActivationPolicy):
    """Plain autograd, counted."""


def _step(
    model: ByteLM, batch: torch.Tensor, policy: ActivationPolicy | None
) -> tuple[int, Report]:
    """Peak of one step and what was held in it; the peak of plain autograd without any hooks."""
    reports = []

    def counted() -> None:
        with compress_activations(model, policy or _Nothing()) as tape:
            model(batch).backward()
        reports.append(tape.report())

    def plain() -> None:
        model(batch).backward()

    if policy is not None:
        found = peak(counted)
    else:
        counted()
        found = peak(plain)
    return found.peak_bytes, reports[0]


# --- loss


def _loss(method: ActivationPolicy, case: _Case, text: Corpus, trained: ByteLM, seed: int) -> Row:
    ablations = _ablations(method, case)
    began = time.perf_counter()
    mine = _judged(_trained(method, text, seed), text)
    seconds = time.perf_counter() - began
    plain = _judged(trained, text)
    others = {n: _judged(_trained(ablations[n], text, seed), text) for n in case.at_most}

    def within(nll: Values, slack: float) -> bool:
        return paired_interval(nll, plain, seed)[1] <= slack * float(plain.mean())

    behaves = {f"loss at most {case.slack:.2%} above plain's": within(mine, case.slack)}
    for name, slack in case.at_most.items():
        behaves[f"{name}: at most {slack:.2%} above plain's"] = within(others[name], slack)
    return Row(
        "loss after training, nat per byte", float(mine.mean()), float(plain.mean()),
        paired_interval(mine, plain, seed), len(mine),
        {name: float(nll.mean()) for name, nll in others.items()}, behaves, primary=False,
        seconds=seconds, data=f"{_N_STEPS} steps of {_SIZE} x {_CONTEXT} bytes",
    )  # fmt: skip


def _ablations(method: ActivationPolicy, case: _Case) -> dict[str, Any]:
    return {
        name: replace(method, **{case.knob: value}) if case.knob else value
        for name, value in case.ablations.items()
    }


def _trained(policy: ActivationPolicy | None, text: Corpus, seed: int) -> ByteLM:
    model = _small(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, betas=(0.9, 0.95), weight_decay=0.1)
    around = partial(compress_activations, model, policy or _Nothing())
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # sketches take their seed from it
        fit(model, optimizer, text, _N_STEPS, _SIZE, _CONTEXT, seed, around)
    return model


def _judged(model: ByteLM, text: Corpus) -> Values:
    return window_nll(model, text, _N_WINDOWS, _CONTEXT)


def _small(seed: int) -> ByteLM:
    return ByteLM(width=128, n_layers=3, context=_CONTEXT, seed=seed)


# --- gradients


def _errors(method: ActivationPolicy, case: _Case, text: Corpus, model: ByteLM, seed: int) -> Row:
    """Error of the gradient of a trained model, relative to its length."""
    policies = {"": method, **_ablations(method, case)}
    errors: dict[str, list[float]] = {name: [] for name in policies}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        for i in range(_N_DRAWS):
            batch = text.batch(30_000 + i, _SIZE, _CONTEXT, seed)
            exact = _gradient(model, batch, _Nothing())
            for name, policy in policies.items():
                found = _gradient(model, batch, policy)
                errors[name].append(float((found - exact).norm() / exact.norm()))
    mine, zero = np.array(errors.pop("")), np.zeros(_N_DRAWS)
    behaves = {}
    if case.cruder:
        behaves[f"{case.cruder}: at least 1.5 times the error"] = bool(
            np.mean(errors[case.cruder]) >= 1.5 * mine.mean()
        )
    return Row(
        "relative error of the gradient", float(mine.mean()), 0.0,
        paired_interval(mine, zero, seed), len(mine),
        {name: float(np.mean(values)) for name, values in errors.items()}, behaves, primary=False,
        data=f"{_N_DRAWS} batches of {_SIZE} x {_CONTEXT} bytes after training",
    )  # fmt: skip


def _variance(method: ActivationPolicy, text: Corpus, seed: int) -> Row:
    """Variance of a gradient over draws of the sketch, beside that over batches."""
    model = _small(seed)
    batches = [text.batch(20_000 + i, _SIZE, _CONTEXT, seed) for i in range(_N_DRAWS)]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        drawn = [_gradient(model, batches[0], method) for _ in range(_N_DRAWS)]
    exact = [_gradient(model, batch, _Nothing()) for batch in batches]
    mine, other = (
        np.array([float((g - torch.stack(set_).mean(0)).square().sum()) for g in set_])
        for set_ in (drawn, exact)
    )
    return Row(
        "variance of the gradient over draws / over batches", float(mine.mean() / other.mean()),
        1.0, paired_interval(mine / other.mean(), np.ones(_N_DRAWS), seed), _N_DRAWS,
        primary=False, data=f"initial weights, batches of {_SIZE} x {_CONTEXT} bytes",
    )  # fmt: skip


def _gradient(model: ByteLM, batch: torch.Tensor, policy: ActivationPolicy) -> torch.Tensor:
    model.zero_grad()
    with compress_activations(model, policy):
        model(batch).backward()
    return torch.cat([p.grad.flatten() for p in model.blocks.parameters() if p.grad is not None])
