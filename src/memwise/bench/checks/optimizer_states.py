"""Do states in few bits train as well as states in float32, and do the parts matter?

A byte language model that knows books learns Wikipedia from the same batches under the method, the
baseline and ablations of the method; the windows of text that nobody trained on are the paired
items. The error of one step is measured on the states that the baseline ended with. A run whose
numbers diverge counts as chance.

Trained from nothing, the model sits on a plateau for about 300 steps, and two runs that differ in
one rounding leave it at different times: their losses then lie up to 3 % apart, which hides what is
asked here. So that is context, with one run of each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memwise.bench.checks.adapters import Ground, ground
from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import N_BYTES, ByteLM, Corpus, corpus, fit, window_nll
from memwise.catalogue import load
from memwise.codec.th import codec
from memwise.errors import InvalidKnob
from memwise.train.engine.optimizer import OptimizerPolicy
from memwise.train.measure import bytes_of

Tensor = torch.Tensor

_N_STEPS, _SIZE, _CONTEXT, _LR, _N_WINDOWS = 300, 8, 128, 1e-3, 64
_N_FADE = 150  # steps
_N_SEEDS = 3  # one run differs from the next by more than what is to be seen
_BETAS, _EPS = (0.9, 0.95), 1e-8
_M, _V = "exp_avg", "exp_avg_sq"


@dataclass(frozen=True)
class _As(OptimizerPolicy):
    """AdamW with given codecs; vectors have no second axis for rank1."""

    names: Mapping[str, str] = field(default_factory=dict)

    def codecs(self, shape: Sequence[int]) -> Mapping[str, str]:
        if int(np.prod(shape)) < 4096:
            return {}
        flat = len(shape) < 2
        return {s: n.replace("rank1", "group128") if flat else n for s, n in self.names.items()}


@dataclass(frozen=True)
class _Case:
    """What a method must show.

    Attributes:
        most: states at most, as a share of float32's.
        slack: loss above the baseline's that counts as none, relative; the papers claim no loss.
        worse: ablation whose step must err more.
        ablations: name -> codecs of both moments.
    """

    most: float
    slack: float
    worse: str
    ablations: Mapping[str, Mapping[str, str]]


_CASES = {
    "adamw4bit": _Case(
        0.135,
        0.01,
        "with a zero level",
        {
            "with a zero level": {_M: "dyn4/group128", _V: "dyn4/group128"},
            "groups of 2048": {_M: "dyn4/group2048", _V: "linear4/group2048"},
            "8 bits": {_M: "dyn8/group256", _V: "linear8/group256"},
        },
    ),
    "coat_states": _Case(
        0.30,
        0.005,
        "without expansion",
        {"without expansion": {_M: "e4m3/group128", _V: "e4m3/group128"}},
    ),
}


@dataclass(frozen=True)
class _Trained:
    """One training run.

    Attributes:
        nll: (n,) nat per byte of the validation windows.
        seconds: what training took.
        moments: both moments (n, d) of every matrix, at the end; empty where they lie encoded.
    """

    nll: NDArray[np.float64]
    seconds: float
    moments: Sequence[tuple[Tensor, Tensor]]


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Relative loss beside the baseline's, and the error of one step beside the ablations'."""
    at = ground(data)
    baseline = load(f"train/{method.card.baseline}")()
    name = type(method).__module__.rpartition(".")[2]
    case = _CASES.get(name, _Case(1.0, 0.0, "", {}))
    seeds = range(seed, seed + _N_SEEDS)
    mine, all_theirs = (
        [_tuned(policy, at, each) for each in seeds] for policy in (method, baseline)
    )
    theirs = all_theirs[0]
    others = {name: _tuned(_As(names), at, seed) for name, names in case.ablations.items()}
    # In units of the baseline's loss under the same seed, so that hard windows weigh no more.
    value = np.concatenate([a.nll / b.nll.mean() for a, b in zip(mine, all_theirs, strict=True)])
    units = np.concatenate([one.nll / one.nll.mean() for one in all_theirs])
    bound = (1 + case.slack) * units
    own, exact = (_state_bytes(policy, seed) for policy in (method, baseline))
    share = own / exact
    rows = [
        Row(
            f"loss beside the baseline's and {case.slack:.1%}", float(value.mean()),
            float(bound.mean()), paired_interval(value, bound, seed), len(value),
            {name: float((o.nll / theirs.nll.mean()).mean()) for name, o in others.items()}
            | {f"seed {s}": float(part.mean())
               for s, part in zip(seeds, value.reshape(_N_SEEDS, -1), strict=True)},
            {f"states take at most {case.most:g} of the baseline's": share <= case.most},
            bytes=own, seconds=mine[0].seconds, baseline_bytes=exact,
            data=f"books, then {_N_STEPS} steps of WikiText-2, {_N_SEEDS} seeds",
            note=f"states {share:.4f} of the baseline's in a model of 3.4 M parameters; "
            f"{mine[0].seconds / theirs.seconds:.2f} times its training time in a smaller one",
        )
    ]  # fmt: skip
    if theirs.moments and case.worse:
        rows.append(_step_error(method, case, theirs.moments, seed))
    rows.append(_from_nothing(method, baseline, corpus(data), seed))
    return rows


def _from_nothing(
    method: OptimizerPolicy, baseline: OptimizerPolicy, text: Corpus, seed: int
) -> Row:
    mine, theirs = (
        _trained(policy, ByteLM(width=128, n_layers=3, context=_CONTEXT, seed=seed), text, seed).nll
        for policy in (method, baseline)
    )
    return Row(
        "nat per byte from nothing", float(mine.mean()), float(theirs.mean()),
        paired_interval(mine, theirs, seed), len(mine), primary=False,
        data=f"books and WikiText-2, {_N_STEPS} steps, one seed",
    )  # fmt: skip


def _tuned(policy: OptimizerPolicy, at: Ground, seed: int) -> _Trained:
    return _trained(policy, at.model(), at.text, seed)


def _trained(policy: OptimizerPolicy, model: ByteLM, text: Corpus, seed: int) -> _Trained:
    hyper = {"betas": _BETAS} if "betas" in policy.rule.defaults() else {}
    optimizer = policy(model.parameters(), lr=_LR, **hyper)
    start = time.perf_counter()
    try:
        fit(model, optimizer, text, _N_STEPS, _SIZE, _CONTEXT, seed, n_fade=_N_FADE)
    except InvalidKnob:  # the loss has left all numbers: no better than chance
        return _Trained(np.full(_N_WINDOWS, np.log(N_BYTES)), 0.0, [])
    seconds = time.perf_counter() - start
    states = [optimizer.state[p] for p in model.parameters() if p.ndim == 2]
    moments = [(s[_M], s[_V]) for s in states if _M in s and _V in s]
    nll = window_nll(model, text, _N_WINDOWS, _CONTEXT)
    return _Trained(nll, seconds, moments)


def _state_bytes(policy: OptimizerPolicy, seed: int) -> int:
    """Storages of all states after a step of the whole model, of usual proportions."""
    model = ByteLM(seed=seed)
    optimizer = policy(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return bytes_of(optimizer.state)


def _step_error(
    method: Any, case: _Case, moments: Sequence[tuple[Tensor, Tensor]], seed: int
) -> Row:
    """Mean change of a step by encoding both moments once, relative to the step: per matrix."""
    mine = _errors(method, moments)
    controls = {name: _errors(_As(names), moments) for name, names in case.ablations.items()}
    worse = controls[case.worse]
    return Row(
        "error of a step", float(mine.mean()), float(worse.mean()),
        paired_interval(mine, worse, seed), len(mine),
        {name: float(errors.mean()) for name, errors in controls.items()},
        {f"larger {case.worse}": bool(mine.mean() < worse.mean())}, primary=False,
        data="moments at the end of the baseline's training",
        note=f"the column of the baseline shows it {case.worse}",
    )  # fmt: skip


def _errors(
    policy: OptimizerPolicy, moments: Sequence[tuple[Tensor, Tensor]]
) -> NDArray[np.float64]:
    found = []
    for m, v in moments:
        names = policy.codecs(m.shape)
        exact = m / (v.sqrt() + _EPS)
        coded_m, coded_v = (
            codec(names[state]).fake(x) if state in names else x for state, x in ((_M, m), (_V, v))
        )
        moved = coded_m / (coded_v.sqrt() + _EPS)
        found.append(float((moved - exact).abs().mean() / exact.abs().mean()))
    return np.array(found)
