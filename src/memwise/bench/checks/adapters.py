"""Tuning on other text: a byte model trained on books learns Wikipedia, in the same few steps.

- baseline: LoRA on dense weights, then merged and rounded to the method's codec, so that both end
  with the same bytes a weight; a method without a codec stands beside LoRA as it is
- codecs of three bits are shown at two as well: so small a model loses 1 % to rounding tuned
  weights to three bits, where LLaMA-7B is lost (perplexity 19 in the place of 6), and 7 % at two
- what tuning may use is the training text; learning rates were chosen on its last tenth
- the frozen model, its reading order and the windows that judge are the same for all
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from memwise.bench.data import books, data_folder
from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import ByteLM, Corpus, fit, window_nll
from memwise.codec.th import codec
from memwise.models import cached
from memwise.train.engine.adapters import AdapterPolicy, Handle
from memwise.train.measure import bytes_of
from memwise.train.policies.lora import LoRA

WIDTH, LAYERS, HEADS, CONTEXT = 128, 4, 4, 128
PRETRAINING = 1500  # steps, about five minutes of one core, once
STEPS = 200
RATES = {
    "LoRA": 5e-3,
    "QLoRA": 5e-3,
    "PEQA": 5e-3,
    "RandLoRA": 1e-3,
    "LoRS": 5e-3,
    "READ": 1e-2,
    "head": 2e-3,
}

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Ground:
    """Where adapters start, and what they are to learn.

    Attributes:
        start: parameters of the model that knows books.
        text: Wikipedia, to learn and to be judged on.
        size: width and blocks of the model.
    """

    start: dict[str, torch.Tensor]
    text: Corpus
    size: tuple[int, int]

    def model(self) -> ByteLM:
        """The model that knows books."""
        model = ByteLM(*self.size, HEADS, CONTEXT)
        model.load_state_dict(self.start)
        return model

    def tuned(
        self, model: nn.Module, params: Iterable[nn.Parameter], lr: float, seed: int,
        n_steps: int = STEPS, head: Sequence[nn.Parameter] = (),
    ) -> float:  # fmt: skip
        """Train these parameters, and a head at its own rate; returns the seconds a step took."""
        began = time.perf_counter()
        groups = [
            {"params": list(params), "lr": lr},
            {"params": list(head), "lr": RATES["head"]},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
        fit(model, optimizer, self.text, n_steps, context=CONTEXT, seed=seed)
        return (time.perf_counter() - began) / n_steps

    def judged(self, model: ByteLM) -> Values:
        """Nat per byte of each window."""
        return window_nll(model, self.text, 96, CONTEXT)


def ground(data: Path | None, width: int = WIDTH, n_layers: int = LAYERS) -> Ground:
    """The shared start; a model of each size is trained once and cached.

    Raises:
        InvalidKnob: no folder with the data sets.
    """
    folder = data_folder(data) / "wikitext2"
    text = Corpus.of(
        *((folder / n).read_text("utf-8") for n in ("valid.txt", "test_first_half.txt"))
    )
    known = "\n\n".join(story for _, story in books(data_folder(data)))

    def train(where: Path) -> None:
        model = ByteLM(width, n_layers, HEADS, CONTEXT)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        fit(model, optimizer, Corpus.of(known, known[:1000]), PRETRAINING, context=CONTEXT)
        torch.save(model.state_dict(), where / "model.pt")

    key = f"bytelm-books-{width}x{n_layers}-{CONTEXT}-{PRETRAINING}-{len(known)}"
    start = torch.load(cached(key, train) / "model.pt", weights_only=True)
    return Ground(start, text, (width, n_layers))


def run(method: AdapterPolicy, data: Path | None, seed: int) -> list[Row]:
    """Nat per byte after tuning, beside LoRA that is rounded afterwards."""
    at = ground(data)
    dense = at.model()
    untuned = at.judged(dense)
    lora = LoRA()(dense, seed=seed)
    at.tuned(dense, lora.parameters(), RATES["LoRA"], seed)
    after = at.judged(dense)
    targets = list(lora.sites)
    assert lora.merge()
    lora.remove()
    known = {"untuned, dense": float(untuned.mean()), "LoRA, dense": float(after.mean())}

    def beside(own: AdapterPolicy) -> Row:
        name = getattr(own, "codec", None)
        if name is None:
            return _tuned(own, at, after, {"untuned": known["untuned, dense"]}, seed)
        rounded = copy.deepcopy(dense)
        round_off(rounded, targets, name)
        return _tuned(own, at, at.judged(rounded), known, seed, name)

    rows = [beside(method)]
    if (coarser := _coarser(method)) != method:
        rows.append(replace(beside(coarser), primary=False))
    return rows


def _tuned(
    method: AdapterPolicy, at: Ground, base: Values, known: dict[str, float], seed: int,
    name: str = "",
) -> Row:  # fmt: skip
    model = at.model()
    handle = method(model, seed=seed)
    codes = _codes(model)
    start = handle.state_dict()
    rounded = at.judged(model)  # a fresh adapter changes nothing
    seconds = at.tuned(model, handle.parameters(), RATES[type(method).__name__], seed)
    value = at.judged(model)
    behaves = {
        "the codes are the same bytes before and after": _same(codes, _codes(model)),
        "under 2 % of the model is trained": _share(handle) < 0.02 or not name,
        "two tasks are switched without a trace": _switched(at, model, handle, start),
    }
    if not name:
        return _row(value, base, known, behaves, seed, seconds)
    lost = float(rounded.mean()) - known["untuned, dense"]
    controls = {**known, "untuned, rounded": float(rounded.mean())}
    behaves["rounding costs something"] = lost > 0.005
    behaves["at least 70 % of it is won back"] = float(rounded.mean() - value.mean()) > 0.7 * lost
    row = _row(value, base, controls, behaves, seed, seconds, name)
    return _with_bytes(row, model, at.model())


def _coarser(method: Any) -> Any:
    """The method with codes of two bits in the place of three."""
    name = getattr(method, "codec", "")
    return replace(method, codec=name.replace("uint3", "uint2")) if "uint3" in name else method


def round_off(model: nn.Module, targets: Iterable[str], name: str) -> None:
    """Put the weights of these maps on the grid of a codec."""
    for target in targets:
        weight: Any = model.get_submodule(target).weight
        weight.data = codec(name).fake(weight.detach())


def _row(
    value: Values, base: Values, controls: dict[str, float], behaves: dict[str, bool], seed: int,
    seconds: float, name: str = "dense",
) -> Row:  # fmt: skip
    return Row(
        f"nat per byte after {STEPS} steps, {name}", float(value.mean()), float(base.mean()),
        paired_interval(value, base, seed), len(value), controls, behaves, seconds=seconds,
        data="books, then wikitext2 valid; judged on test_first_half", note="seconds: one step",
    )  # fmt: skip


def _with_bytes(row: Row, model: nn.Module, dense: nn.Module) -> Row:
    return replace(row, bytes=bytes_of(model), baseline_bytes=bytes_of(dense))


def _share(handle: Handle) -> float:
    report = handle.report()
    return report.trained / report.total


def _codes(model: nn.Module) -> list[torch.Tensor]:
    return [b.clone() for n, b in model.named_buffers() if n.endswith("weight_codes")]


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _switched(at: Ground, model: ByteLM, handle: Handle, other: dict[str, Any]) -> bool:
    """Whether loading another task and the first again restores the scores bit for bit."""
    ids = at.text.windows(4, CONTEXT)[:, :-1]
    scores: Callable[[], torch.Tensor] = lambda: model.logits(ids)  # noqa: E731
    with torch.no_grad():
        before, own = scores(), handle.state_dict()
        handle.load(other)
        changed = not torch.equal(scores(), before)
        handle.load(own)
        return changed and torch.equal(scores(), before)
