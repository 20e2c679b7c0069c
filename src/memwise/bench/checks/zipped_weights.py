"""Compressed weights: bytes of a language model's blocks, equality to the bit, peaks, rounding.

- primary: bytes of the codes beside bf16, on the blocks of Gemma-3-270M, which are the items; every
  weight has to come back to the bit
- a byte model is trained compressed and plain, in bf16: losses and weights have to be equal, and
  the peak of a step is measured beside a plain step and one that frees each gradient at once
- Gemma's loss with few bits of mantissa in its blocks, windows of text as the items; its embedding,
  which is its head too, bears less, and stands beside
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.data import data_folder
from memwise.bench.engine import Row, paired_interval
from memwise.bench.training import ByteLM, Corpus, corpus
from memwise.codec.spec import blocks
from memwise.codec.th_pack import rotate
from memwise.models import LocalModel, local_model
from memwise.train.engine.optimizer import MemOptimizer
from memwise.train.measure import measure, peak
from memwise.train.policies.adafactor import Adafactor
from memwise.train.policies.adamw import AdamW
from memwise.train.policies.neuzip import NeuZip

N_STEPS, SIZE, CONTEXT = 50, 4, 64
N_WINDOWS, N_TOKENS, AT_ONCE = 12, 96, 6
SHAPES = ((256, 4), (256, 6), (320, 4))  # width, layers
LOSSY = (3, 1, 0)
_KEPT = ("pos.weight",)  # the model reads it by itself

Values = NDArray[np.float64]
Around = Callable[[], AbstractContextManager[object]]


def run(method: NeuZip, data: Path | None, seed: int) -> list[Row]:
    """Rows of bytes, of training and of rounding."""
    text = corpus(data)
    gemma = local_model()
    gemma.model.to(torch.bfloat16)
    article = (data_folder(data) / "wikitext2" / "test_first_half.txt").read_text("utf-8")
    return [
        _bytes(method, gemma, seed),
        _peaks(method, text, seed),
        _rounded(method, gemma, article, seed),
    ]


# --- bytes


def _bytes(method: NeuZip, gemma: LocalModel, seed: int) -> Row:
    found: list[float] = []
    bound: list[float] = []
    controls: dict[str, list[float]] = {f"{bits} bits of mantissa": [] for bits in LOSSY}
    exact, n_bytes, n_plain, began = True, 0, 0, time.perf_counter()
    for block in gemma.model.model.layers:
        before = [param.detach().clone() for param in block.parameters()]
        compressed = method(block)
        found.append(compressed.n_bytes / compressed.plain_bytes)
        n_bytes, n_plain = n_bytes + compressed.n_bytes, n_plain + compressed.plain_bytes
        compressed.restore()
        exact &= all(map(_same, before, block.parameters()))
        bound.append(_entropy(block) / 16 + 0.5)
        for bits in LOSSY:
            short = replace(method, mantissa_bits=bits)(copy.deepcopy(block))
            controls[f"{bits} bits of mantissa"].append(short.n_bytes / short.plain_bytes)
    ratio = np.array(found)
    return Row(
        "bytes of a block's weights / bf16's", float(ratio.mean()), 1.0,
        paired_interval(ratio, np.ones(len(ratio)), seed), len(ratio),
        {"entropy of each chunk's exponents": float(np.mean(bound))}
        | {name: float(np.mean(values)) for name, values in controls.items()},
        {
            "every weight comes back to the bit": exact,
            "at most 0.70": bool((ratio <= 0.70).all()),
            "not below the entropy": bool((ratio >= bound).all()),
        },
        bytes=n_bytes, baseline_bytes=n_plain, seconds=time.perf_counter() - began,
        data="Gemma-3-270M, decoded from its 4-bit file", note="seconds: all codes, both ways",
    )  # fmt: skip


def _entropy(block: nn.Module) -> float:
    """Bits of an exponent by the counts of its chunk, in the mean over the weights of a block."""
    n_bits, n = 0.0, 0
    for param in block.parameters():
        if param.ndim != 2:
            continue
        exponents, _ = rotate(param.detach().flatten())
        for chunk in blocks(*param.shape):
            counts = exponents[chunk.flat].int().bincount().double()
            counts = counts[counts > 0]
            n_bits -= float((counts * (counts / chunk.size).log2()).sum())
            n += chunk.size
    return n_bits / n


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().view(torch.int16), b.detach().view(torch.int16))


# --- training


def _peaks(method: NeuZip, text: Corpus, seed: int) -> Row:
    """Most bytes at one moment of a step with few states and few activations."""
    began = time.perf_counter()
    equal = _trains_alike(method, text, seed)
    seconds = time.perf_counter() - began
    mine: list[int] = []
    plain: list[int] = []
    freed: list[int] = []
    one_at_a_time = True
    for width, n_layers in SHAPES:
        ids = text.batch(0, 1, 32, seed)
        for peaks, kind in ((mine, "zipped"), (plain, "plain"), (freed, "freed")):
            model = ByteLM(width, n_layers, context=CONTEXT, seed=seed).bfloat16()
            largest = max(param.nbytes for param in model.parameters())
            if kind == "zipped":
                before = _inference(model, ids)
                compressed = method(model, _KEPT)
                one_at_a_time &= _inference(model, ids) <= before + 1.1 * largest + (1 << 19)
                optimizer: torch.optim.Optimizer = compressed.optimizer(Adafactor(), lr=1e-3)
            else:
                optimizer = Adafactor()(model.parameters(), lr=1e-3)
            around: Around = nullcontext
            if kind == "freed" and isinstance(optimizer, MemOptimizer):
                around = optimizer.step_in_backward
            for _ in range(2):  # the first one makes the states
                with measure(model, optimizer) as report, around():
                    model(ids).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            peaks.append(report.ledger.peak("device"))
    ratio = np.array(mine) / plain
    return Row(
        "peak of a training step / plain's", float(ratio.mean()), 1.0,
        paired_interval(ratio, np.ones(len(ratio)), seed), len(ratio),
        {"plain weights, gradients freed at once": float(np.mean(np.array(freed) / plain))},
        {
            f"losses and weights of {N_STEPS} steps of AdamW equal to the bit": equal,
            "one decoded weight at a time": one_at_a_time,
            "less than freeing gradients alone": bool((np.array(mine) < freed).all()),
        },
        primary=False, bytes=max(mine), baseline_bytes=max(plain), seconds=seconds,
        data="ByteLM in bf16, Adafactor, 32 bytes a batch",
    )  # fmt: skip


def _trains_alike(method: NeuZip, text: Corpus, seed: int) -> bool:
    plain, mine = (ByteLM(128, 3, context=CONTEXT, seed=seed).bfloat16() for _ in range(2))
    usual = AdamW()(plain.parameters(), lr=1e-3)
    compressed = method(mine, _KEPT)
    compressed.optimizer(AdamW(), lr=1e-3)
    equal = True
    for step in range(N_STEPS):
        ids = text.batch(step, SIZE, CONTEXT, seed)
        loss, other = mine(ids), plain(ids)
        equal &= _same(loss, other)
        loss.backward()
        other.backward()
        usual.step()
        usual.zero_grad()
    compressed.restore()
    return equal and all(map(_same, mine.parameters(), plain.parameters()))


def _inference(model: nn.Module, ids: Tensor) -> int:
    with torch.no_grad():
        return peak(lambda: model(ids)).peak_bytes


# --- rounding


def _rounded(method: NeuZip, gemma: LocalModel, article: str, seed: int) -> Row:
    ids = gemma.tokenizer(article[: N_WINDOWS * N_TOKENS * 8], add_special_tokens=False).input_ids
    start = gemma.tokenizer.bos_token_id
    windows = torch.tensor(
        [[start, *ids[i * N_TOKENS : (i + 1) * N_TOKENS]] for i in range(N_WINDOWS)]
    )
    gemma.model.float()  # the same weights; most CPUs multiply bf16 slowly
    exact = _judged(gemma, windows)
    weights = [(param, param.data) for param in gemma.model.parameters()]
    layers = gemma.model.model.layers
    cases: dict[str, tuple[nn.Module, int | None]] = {
        "without loss, embedding too": (gemma.model, None),
        "3 bits, embedding too": (gemma.model, 3),
        **{f"{bits} bits": (layers, bits) for bits in LOSSY},
    }
    found: dict[str, Values] = {}
    for name, (part, bits) in cases.items():
        compressed = replace(method, mantissa_bits=bits)(part)
        found[name] = _judged(gemma, windows)
        compressed.restore()
        for param, data in weights:
            param.data = data
    three = found.pop("3 bits")
    interval = paired_interval(three, exact, seed)
    change = float(np.exp((three - exact).mean()) - 1)
    return Row(
        "nat per token, blocks in 3 bits of mantissa", float(three.mean()), float(exact.mean()),
        interval, len(three),
        {name: float(nll.mean()) for name, nll in found.items()}
        | {"perplexity's change": change},
        {
            "without loss: equal to the bit": bool(
                (found["without loss, embedding too"] == exact).all()
            ),
            "3 bits: perplexity rises by less than 1 %": bool(np.exp(interval[1]) < 1.01),
            "0 bits: visibly worse": paired_interval(found["0 bits"], exact, seed)[0] > 0.02,
        },
        primary=False, data=f"{N_WINDOWS} windows of WikiText-2, {N_TOKENS} tokens",
        note="weights of bf16, products in float32",
    )  # fmt: skip


@torch.no_grad()
def _judged(gemma: LocalModel, windows: Tensor) -> Values:
    """Nat per token of each window."""
    found = []
    for ids in torch.split(windows, AT_ONCE):
        scores = gemma.model(ids[:, :-1]).logits
        nll = [F.cross_entropy(s.float(), i[1:]) for s, i in zip(scores, ids, strict=True)]
        found += [float(one) for one in nll]
    return np.array(found)
