"""Neurons on a disk: bytes and reads a token, step by step, beside the streaming of whole matrices.

A small byte model with ReLU gates, trained to keep most of them silent, reads text it never saw, a
token at a time, with half of the bytes of its matrices. Windows of text are the items. Every step
of the method is measured on the same tokens: a load of everything, whole matrices beside what fits,
a predictor, a window, bundled rows. Pages are dropped after each read, so seconds are cold ones;
those with pages kept stand beside.

What must hold: each step saves bytes or reads; with an exact predictor the logits are those of the
plain model; the learned one costs at most 1 % of loss, and one that names other neurons costs more.
Gemma's gates, which are GELUs, are measured and refused.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from memwise.bench import relu
from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import corpus
from memwise.catalogue import load
from memwise.context.engine.neurons import fires
from memwise.context.engine.streaming import Stream, streamed
from memwise.context.engine.weight_policy import WeightPolicy
from memwise.context.policies.llm_in_a_flash import LLMInAFlash
from memwise.errors import UnsupportedModel
from memwise.models import local_model

N_WINDOWS, N_WARM, N_LEARNED = 12, 4, 192
SHARE = 0.5  # of the matrices' bytes, which is the budget
_LOSS, _EXACT = 1.01, 1e-5  # the spec's bounds
_SILENT = 0.9
_TUNED, _SHOWN = 1_000_003, 64  # a batch of training text that training did not draw; Gemma's text

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Apart(LLMInAFlash):
    """Each projection has rows of its own, as without bundling.

    Attributes:
        lessons: what was learned of each layer, one after another, so that layout alone differs.
    """

    together = False

    lessons: Iterator[Mapping[str, Tensor]] = field(default_factory=lambda: iter(()))

    def learn(self, x: Tensor, fires: Tensor, gate: Tensor) -> Mapping[str, Tensor]:
        """The next of the lessons."""
        return next(self.lessons)


@dataclass(frozen=True)
class Exact(LLMInAFlash):
    """The gate itself says which neurons fire."""

    def learn(self, x: Tensor, fires: Tensor, gate: Tensor) -> Mapping[str, Tensor]:
        """The gate."""
        return {"gate": gate}

    def predict(self, x: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """What passes it."""
        return x @ known["gate"].T > 0


@dataclass(frozen=True)
class Others(LLMInAFlash):
    """As many neurons as are predicted, but others."""

    def predict(self, x: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """Half of all neurons further on."""
        likely = super().predict(x, known)
        return likely.roll(likely.shape[1] // 2, 1)


@dataclass(frozen=True)
class Found:
    """What some windows cost, (n,) each.

    Attributes:
        n_bytes: read a token.
        reads: a token.
        nll: nat per byte.
        seconds: a token.
        logits: (n, T, 256).
        held_bytes: most that was held at one moment.
    """

    n_bytes: Values
    reads: Values
    nll: Values
    seconds: Values
    logits: Tensor
    held_bytes: int


def run(method: LLMInAFlash, data: Path | None, seed: int) -> list[Row]:
    """Rows of bytes, of reads, of loss, of seconds and of silence."""
    lm, text = relu.model(data), corpus(data)
    ids = text.windows(N_WINDOWS, relu.CONTEXT - 1)
    learned = text.batch(_TUNED, N_LEARNED, relu.CONTEXT - 1, seed)
    n_all = matrix_bytes(lm)
    knobs, half = vars(method), int(SHARE * n_all)
    plain = load("context/layer_stream")()
    with tempfile.TemporaryDirectory() as folder:
        known = taught(lm, method, Path(folder) / "bundles", half, learned)
        apart = Apart(**knobs, lessons=iter(known))
        steps: dict[str, tuple[WeightPolicy, int]] = {
            "everything": (plain, 2 * largest(lm)),
            "whole matrices": (plain, half),
            "predictor": (replace(apart, keep=0), half),
            "window": (apart, half),
            "bundles": (method, half),
            "exact": (Exact(**knobs), n_all),
            "others": (Others(**knobs), half),
        }
        # Those that differ in what they read, and not in how it lies, share a file.
        same = {"everything": "whole matrices", "window": "predictor", "others": "bundles"}
        places = {name: Path(folder) / same.get(name, name) for name in steps}
        found = {
            name: measured(lm, *steps[name], places[name], ids, learned, keep_pages=False)
            for name in steps
        }
        warm = {
            name: measured(lm, *steps[name], places[name], ids[:N_WARM], learned, keep_pages=True)
            for name in ("everything", "whole matrices", "bundles")
        }
        recall, extra = predicted(lm, method, places["bundles"], steps["bundles"][1], ids)
    dense = decoded(lm, ids)
    return [
        *_moved(found, n_all, seed),
        _loss(found, dense, ids, recall, extra, seed),
        *_seconds(found, warm, seed),
        _silence(lm, ids, method, seed),
    ]


# --- running


def taught(
    lm: Any, method: LLMInAFlash, path: Path, budget: int, learned: Tensor
) -> list[dict[str, Tensor]]:
    """Make the method's file, and say what it has learned of each layer."""
    with streamed(lm, method, path, budget, text=learned) as stream:
        return [
            {name: tensor.clone() for name, tensor in sparse.known.items()}
            for sparse in stream.sparse
        ]


def measured(
    lm: Any, policy: WeightPolicy, budget: int, path: Path, ids: Tensor, learned: Tensor,
    keep_pages: bool,
) -> Found:  # fmt: skip
    """Read windows (n, T) a token at a time, each beginning with no neurons held."""
    rows: list[tuple[float, ...]] = []
    logits = []
    with streamed(lm, policy, path, budget, text=learned, keep_pages=keep_pages) as stream:
        for window in ids:
            _restart(stream)
            before, start = stream.file.counters.copy(), time.perf_counter()
            scores = _stepwise(lm, window, None if keep_pages else stream)
            seconds = time.perf_counter() - start
            cost = stream.file.counters.since(before)
            logits.append(scores)
            rows.append((cost.bytes_read, cost.reads, seconds))
        held = stream.store.ledger.peak()
    per_token = np.array(rows) / ids.shape[1]
    whole = torch.stack(logits)
    return Found(per_token[:, 0], per_token[:, 1], _nll(whole, ids), per_token[:, 2], whole, held)


def decoded(lm: Any, ids: Tensor) -> Tensor:
    """Logits (n, T, 256) of the plain model, a token at a time."""
    return torch.stack([_stepwise(lm, window, None) for window in ids])


@torch.no_grad()
def _stepwise(lm: Any, window: Tensor, cold: Stream | None) -> Tensor:
    cache, scores = DynamicCache(), []
    for token in window:
        if cold is not None:
            cold.file.drop_pages()
        scores.append(lm(input_ids=token.view(1, 1), past_key_values=cache).logits[0, 0])
    return torch.stack(scores)


def _restart(stream: Stream) -> None:
    for sparse in stream.sparse:
        sparse.held.drop(sparse.held.ids())


def predicted(
    lm: Any, method: LLMInAFlash, path: Path, budget: int, ids: Tensor
) -> tuple[float, float]:
    """Share of the firing neurons that are predicted, and predicted ones for each that fires."""
    seen: list[Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        for layer in lm.model.layers
    ]
    with torch.no_grad():
        lm(input_ids=ids)
    for hook in hooks:
        hook.remove()
    truth = [fires(layer.mlp, x) for layer, x in zip(lm.model.layers, seen, strict=True)]
    with streamed(lm, method, path, budget) as stream:
        likely = [
            method.predict(x, sparse.known) for sparse, x in zip(stream.sparse, seen, strict=True)
        ]
    hits = sum(int((a & b).sum()) for a, b in zip(truth, likely, strict=True))
    n_true, n_likely = (sum(int(mask.sum()) for mask in masks) for masks in (truth, likely))
    return hits / n_true, n_likely / n_true


def matrix_bytes(lm: Any) -> int:
    """Bytes of the matrices of the layers."""
    return sum(p.nbytes for p in lm.model.layers.parameters() if p.ndim == 2)


def largest(lm: Any) -> int:
    """Bytes of the largest of them."""
    return max(int(p.nbytes) for p in lm.model.layers.parameters() if p.ndim == 2)


def _nll(logits: Tensor, ids: Tensor) -> Values:
    nll = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return nll.double().mean(1).numpy()


# --- rows


def _moved(found: Mapping[str, Found], n_all: int, seed: int) -> list[Row]:
    """Bytes and reads of a token, with every step."""
    mine, plain = found["bundles"], found["whole matrices"]
    names = ("everything", "whole matrices", "predictor", "window", "bundles")
    n_bytes = {name: float(found[name].n_bytes.mean()) for name in names}
    reads = {name: float(found[name].reads.mean()) for name in names}
    text = f"WikiText-2, {N_WINDOWS} windows of {relu.CONTEXT} bytes"
    values, other = mine.n_bytes / n_all, plain.n_bytes / n_all
    return [
        Row(
            "bytes read a token / the matrices'", float(values.mean()), float(other.mean()),
            paired_interval(values, other, seed), len(values),
            {name: n / n_all for name, n in n_bytes.items()}
            | {"exact predictor": float(found["exact"].n_bytes.mean()) / n_all},
            {
                "whole matrices beside what fits: fewer bytes than everything":
                    n_bytes["whole matrices"] < n_bytes["everything"],
                "predictor: fewer bytes": n_bytes["predictor"] < n_bytes["whole matrices"],
                "window: fewer bytes": n_bytes["window"] < n_bytes["predictor"],
                "bundles: fewer reads, no more bytes":
                    reads["bundles"] < reads["window"]
                    and n_bytes["bundles"] <= n_bytes["window"],
                "all of them inside the budget":
                    max(found[name].held_bytes for name in names[1:]) <= SHARE * n_all,
            },
            bytes=mine.held_bytes, baseline_bytes=plain.held_bytes,
            seconds=float(mine.seconds.sum()) * relu.CONTEXT, data=text,
            note=f"the budget is {SHARE:.0%} of the matrices' bytes; every window begins with no "
            "neurons held",
        ),
        Row(
            "reads a token", float(mine.reads.mean()), float(plain.reads.mean()),
            paired_interval(mine.reads, plain.reads, seed), len(mine.reads), reads,
            primary=False, data=text, note="rows that are neighbours in the file are one read",
        ),
    ]  # fmt: skip


def _loss(
    found: Mapping[str, Found], dense: Tensor, ids: Tensor, recall: float, extra: float, seed: int
) -> Row:
    mine, plain = found["bundles"].nll, _nll(dense, ids)
    far = float((found["exact"].logits - dense).abs().max())
    others = float(found["others"].nll.mean())
    return Row(
        "nat per byte", float(mine.mean()), float(plain.mean()), paired_interval(mine, plain, seed),
        len(mine),
        {
            "loss / the plain model's": float(mine.mean() / plain.mean()),
            "recall of firing neurons": recall,
            "predicted for each that fires": extra,
            "as many other neurons": others,
            "exact predictor, furthest logit": far,
        },
        {
            "at most 1 % more than the plain model": bool(mine.mean() <= _LOSS * plain.mean()),
            "as many other neurons: worse": others > mine.mean() + 0.05,
            "exact predictor: the plain model's logits": far <= _EXACT,
        },
        primary=False, data="WikiText-2",
    )  # fmt: skip


def _seconds(found: Mapping[str, Found], warm: Mapping[str, Found], seed: int) -> list[Row]:
    rows = []
    for kind, some in (("cold", found), ("warm", warm)):
        mine, plain = some["bundles"].seconds, some["whole matrices"].seconds
        base = float(plain.mean())
        rows.append(
            Row(
                f"seconds of a token, {kind} / whole matrices", float(mine.mean()) / base, 1.0,
                paired_interval(mine / base, plain / base, seed), len(mine),
                {name: float(one.seconds.mean()) / base for name, one in some.items()},
                primary=False,
                note="the whole model's time; a matrix here is one large read, a neuron a page, so "
                "a small model says little about a large one",
            )
        )  # fmt: skip
    return rows


@torch.no_grad()
def _silence(lm: Any, ids: Tensor, method: LLMInAFlash, seed: int) -> Row:
    """How many gates are silent: of the trained model, and of Gemma, which is refused."""
    own = _silent(lm, ids)
    gemma = local_model()
    text = gemma.tokenizer(bytes(ids.flatten().tolist()).decode("utf-8", "ignore"))
    other = _silent(gemma.model, torch.tensor([text.input_ids[:_SHOWN]]))
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            streamed(
                gemma.model, method, Path(folder) / "gemma", 1 << 30, text=torch.zeros(1, 2).long()
            ),
        ):
            refused = False
    except UnsupportedModel:
        refused = True
    mine = np.array([float((gates == 0).float().mean()) for gates in own])
    gates = torch.cat([gates.flatten() for gates in other])
    exact = float((gates == 0).float().mean())
    return Row(
        "silent gates", float(mine.mean()), exact,
        paired_interval(mine, np.full(len(mine), exact), seed), len(mine),
        {
            "Gemma-3-270M, exactly zero": exact,
            "Gemma-3-270M, below a hundredth": float((gates.abs() < 0.01).float().mean()),
            "Gemma-3-270M, below zero": float((gates < 0).float().mean()),
        },
        {
            "the trained model: at least 90 %": bool(mine.mean() >= _SILENT),
            "Gemma's GELU is not sparse": exact < 1 - _SILENT,
            "Gemma is refused": refused,
        },
        primary=False, note="items: layers; the baseline is Gemma's",
    )  # fmt: skip


def _silent(lm: Any, ids: Tensor) -> list[Tensor]:
    """What passes the gates of each layer."""
    passed: list[Tensor] = []
    hooks = [
        layer.mlp.act_fn.register_forward_hook(lambda _, __, out: passed.append(out))
        for layer in lm.model.layers
    ]
    lm(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return passed
