"""A pruned model is tuned and stays pruned: half of its weights by magnitude, or by Wanda's score.

- baseline: LoRA, merged, and masked again at the end, so that both end equally sparse
- control: the same masked product under plain autograd, which keeps dense matrices
- behaves: zeros stay zeros, the peak of a step is LoRA's and clearly below the control's, and the
  gradient that drops the mask costs little
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memwise.bench.checks.adapters import CONTEXT, RATES, STEPS, Ground, Values, ground
from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import ByteLM
from memwise.train.engine.adapted import select
from memwise.train.engine.adapters import AdapterPolicy, Site
from memwise.train.engine.bases import Base
from memwise.train.engine.deltas import MaskedLowRank
from memwise.train.measure import peak
from memwise.train.policies.lora import LoRA
from memwise.train.policies.lors import LoRS

SPARSITY = 0.5

Prune = Callable[[Ground], ByteLM]


class _ByAutograd(MaskedLowRank):
    """The same delta, as autograd differentiates W + M * (B A)."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Outputs, from a dense matrix that autograd keeps."""
        assert base.weight is not None
        return F.linear(x, base.weight + self.weight(base), base.bias)


@dataclass(frozen=True)
class MaskedByAutograd(LoRS):
    """Plain autograd on the masked product."""

    def delta(self, site: Site) -> MaskedLowRank:
        """The delta of a map."""
        return _ByAutograd(site.base.shape, self.rank, self.alpha, site.draws)


def run(method: LoRS, data: Path | None, seed: int) -> list[Row]:
    """Nat per byte of the sparse, tuned and merged model."""
    at = ground(data)
    return [
        _row(at, kind, prune, method, seed)
        for kind, prune in {"magnitude": _by_magnitude, "Wanda": _by_wanda}.items()
    ]


def _row(at: Ground, kind: str, prune: Prune, method: LoRS, seed: int) -> Row:
    pruned = prune(at)
    masks = {name: _weight(m) != 0 for name, m in select(pruned, None).items()}
    value, kept = _tuned(at, prune, method, masks, seed, again=False)
    base, _ = _tuned(at, prune, LoRA(method.rank, method.alpha), masks, seed, again=True)
    exact, _ = _tuned(at, prune, MaskedByAutograd(method.rank, method.alpha), masks, seed, False)
    peaks = {
        name: _step_peak(policy)
        for name, policy in {
            "LoRS": method, "LoRA": LoRA(method.rank), "autograd": MaskedByAutograd(method.rank),
        }.items()
    }  # fmt: skip
    behaves = {
        "zeros stay zeros": kept,
        "the peak is at most 5 % above LoRA's": peaks["LoRS"] < 1.05 * peaks["LoRA"],
        "the peak is 20 % below that of autograd": peaks["LoRS"] < 0.8 * peaks["autograd"],
        "within 2 % of exact gradients": value.mean() < 1.02 * exact.mean(),
    }
    controls = {
        "pruned, untuned": float(at.judged(pruned).mean()),
        "exact gradients, by autograd": float(exact.mean()),
        **{f"peak of a step in MB, {name}": n / 1e6 for name, n in peaks.items()},
    }
    return Row(
        f"nat per byte after {STEPS} steps, 50 % by {kind}", float(value.mean()),
        float(base.mean()), paired_interval(value, base, seed), len(value), controls, behaves,
        bytes=peaks["LoRS"], baseline_bytes=peaks["LoRA"], data="books, then wikitext2",
        note="bytes: peak of a step of a wider model, above its start",
    )  # fmt: skip


def _tuned(
    at: Ground, prune: Prune, policy: AdapterPolicy, masks: dict[str, Tensor], seed: int,
    again: bool,
) -> tuple[Values, bool]:  # fmt: skip
    """Nat per byte of each window once merged; and whether all zeros are still there."""
    model = prune(at)
    handle = policy(model, seed=seed)
    at.tuned(model, handle.parameters(), RATES["LoRS"], seed)
    assert handle.merge()
    handle.remove()
    for name, mask in masks.items() if again else ():
        _weight(model.get_submodule(name)).data.mul_(mask)
    kept = all(
        bool((_weight(model.get_submodule(name))[~mask] == 0).all()) for name, mask in masks.items()
    )
    return at.judged(model), kept


def _step_peak(policy: AdapterPolicy) -> int:
    """Highest level of a forward and backward pass above its start, over as many tokens as wide.

    What LoRS forms anew is a block of rows at a time, 1.5 MB whatever the batch: beside the 2 MB
    that 32 tokens take it would be all that is seen.
    """
    model = ByteLM(512, 2, 4, 128)
    handle = policy(model)
    ids = torch.zeros((4, 129), dtype=torch.int64)

    def step() -> None:
        for param in handle.parameters():
            param.grad = None
        model(ids).backward()

    step()
    return peak(step).peak_bytes


def _by_magnitude(at: Ground) -> ByteLM:
    model = at.model()
    for module in select(model, None).values():
        _drop(_weight(module), _weight(module).abs())
    return model


def _by_wanda(at: Ground) -> ByteLM:
    """Score |w| times the norm of its input over training text, compared within an output."""
    model = at.model()
    maps = select(model, None)
    squares: dict[str, Tensor] = {}
    hooks = []
    for name, module in maps.items():

        def note(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            squares[name] = inputs[0].detach().flatten(0, -2).square().sum(0)

        hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(at.text.batch(0, 32, CONTEXT, 0))
    for hook in hooks:
        hook.remove()
    for name, module in maps.items():
        _drop(_weight(module), _weight(module).abs() * squares[name].sqrt())
    return model


def _drop(weight: Tensor, score: Tensor) -> None:
    """Zero the weights of the lower half of the scores in each row."""
    n_dropped = int(SPARSITY * weight.shape[1])
    places = score.argsort(dim=1)[:, :n_dropped]
    weight.data.scatter_(1, places, 0.0)


def _weight(module: nn.Module) -> Any:
    return module.weight
