"""Pruned matrices of Gemma-3-270M on a disk: a cold load, bytes and tokens a second, beside dense.

Half of each row is set to zero by magnitude, and both formats hold bf16. Judged is the time of a
cold load; bytes follow from a formula, and are shown beside it, layer by layer. Time is measured in
turns, with pages dropped after each read: a pass of loading alone, and whole tokens inside one
budget, beside tokens with pages kept; a slow link is the same disk held to a rate.

What must hold: every matrix comes back to the bit; bytes are those of the formula; columns and row
ends (CSR) gain nothing at one half; the streamed model's logits are the resident model's; and what
the plan says beforehand about time is what is measured, on this disk and on the slow link.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from memwise.bench.data import data_folder
from memwise.bench.engine import Row, paired_interval
from memwise.budget import readable
from memwise.catalogue import load
from memwise.codec.th import codec
from memwise.context.engine.pruning import prune
from memwise.context.engine.streaming import streamed
from memwise.context.engine.weight_plan import Rates
from memwise.context.engine.weight_policy import WeightPolicy
from memwise.context.engine.weight_store import ALIGN, Bundle, WeightFile, WeightStore
from memwise.models import LocalModel, local_model

RATIO, GRID = 0.5, "bf16"
BUDGET = 120_000_000  # bytes; the matrices take 400 MB in float32
N_ROUNDS, N_TOKENS = 4, 4
_BEFORE = 8  # tokens before those that are timed
SLOW_BYTES_S, N_SLOW = 25e6, 14  # a card or a network disk; the matrices of two layers
N_CALIBRATION, N_JUDGED = 128, 192  # tokens

Values = NDArray[np.float64]


class Slow(WeightFile):
    """A file whose bytes come no faster than a link would bring them."""

    def _into(self, place: Tensor, offset: int, fd: int | None = None) -> float:
        seconds = super()._into(place, offset, fd)
        wanted = len(place) / SLOW_BYTES_S
        time.sleep(max(0.0, wanted - seconds))
        return max(seconds, wanted)


@dataclass(frozen=True)
class Timed:
    """One round.

    Attributes:
        load_s: seconds of reading and decoding what one pass needs.
        token_s: seconds of a token.
        rates: of the disk and of decoding.
        break_even: bytes a second of a disk below which the codec pays.
        pays: whether the plan says that the codec pays.
        verdict: that in words.
    """

    load_s: float
    token_s: float
    rates: Rates
    break_even: float
    pays: bool
    verdict: str


Turns: TypeAlias = Mapping[str, Sequence[Timed]]


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Rows of bytes, of seconds on this disk and on a slow link, of tokens, and of the loss."""
    gemma = local_model()
    article = (data_folder(data) / "wikitext2" / "test_first_half.txt").read_text("utf-8")
    ids = torch.tensor([gemma.tokenizer(article[:8000]).input_ids])
    given, rest = ids[:, :N_CALIBRATION], ids[:, N_CALIBRATION : N_CALIBRATION + N_JUDGED]
    judged = torch.cat([ids[:, :1], rest], dim=1)  # a text begins with its start token
    whole = gemma.model.to(torch.bfloat16).float()  # numbers that bf16 can hold
    losses = {"unpruned": _nll(gemma, judged)}
    kept = {name: p.detach().clone() for name, p in whole.model.layers.named_parameters()}
    prune(whole, RATIO, given)
    losses["by the inputs' norms too"] = _nll(gemma, judged)
    for name, param in whole.model.layers.named_parameters():
        param.data.copy_(kept[name])
    del kept
    prune(whole, RATIO)
    losses["pruned by magnitude"] = _nll(gemma, judged)
    policies: dict[str, WeightPolicy] = {
        "dense": replace(load("context/layer_stream")(), grid=GRID),
        "sparse": replace(method, grid=GRID),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in policies}
        expected = _logits(whole, judged)
        made = {n: _made(whole, policies[n], paths[n], judged, expected) for n in policies}
        bundles = {n: made[n].bundles for n in policies}
        exact = all(one.exact for one in made.values())
        bytes_row = _bytes(whole, bundles["dense"], bundles["sparse"], exact, seed)
        timed, warm = (_turns(whole, policies, paths, judged, keep) for keep in (False, True))
        slow = {n: _slow(paths[n], made[n].mark) for n in policies}
    held = max(one.held_bytes for one in made.values())
    return [bytes_row, *_times(timed, warm, slow, held, seed), _losses(losses, seed)]


# --- bytes


@dataclass(frozen=True)
class Made:
    """A file of weights.

    Attributes:
        exact: the streamed model's logits, and all weights afterwards, are what they were.
        held_bytes: most that was held at one moment.
        bundles: what is in it.
        mark: its fingerprint.
    """

    exact: bool
    held_bytes: int
    bundles: Mapping[str, Bundle]
    mark: Mapping[str, str]


def _made(lm: Any, policy: WeightPolicy, path: Path, ids: Tensor, expected: Tensor) -> Made:
    """Make the file, with every matrix through the ring once."""
    before = [p.detach().clone() for p in lm.model.layers.parameters()]
    with streamed(lm, policy, path, BUDGET) as stream:
        same = torch.equal(_logits(lm, ids), expected)
        held = stream.store.ledger.peak()
    same &= all(map(_same, before, lm.model.layers.parameters()))
    return Made(same, held, stream.file.bundles, stream.mark)


def _bytes(
    lm: Any, dense_ones: Mapping[str, Bundle], bundles: Mapping[str, Bundle], exact: bool, seed: int
) -> Row:
    layers = range(len(lm.model.layers))
    dense, mine = (
        np.array([
            sum(b.n_bytes for name, b in some.items() if name.startswith(f"{i}.")) for i in layers
        ], float)
        for some in (dense_ones, bundles)
    )  # fmt: skip
    formula = True
    csr, n_nonzero, n_all = [0] * len(lm.model.layers), 0, 0
    for i, layer in enumerate(lm.model.layers):
        for key, weight in layer.named_parameters():
            if weight.ndim != 2:
                continue
            count = int(torch.count_nonzero(weight))
            n_bytes = bundles[f"{i}.{key.removesuffix('.weight')}"].n_bytes
            wanted = weight.shape[0] * -(-weight.shape[1] // 8) + 2 * count
            formula &= wanted <= n_bytes < wanted + 2 * ALIGN
            csr[i] += by_columns(weight.bfloat16())
            n_nonzero, n_all = n_nonzero + count, n_all + weight.numel()
    ratio = mine / dense
    return Row(
        "bytes a pass reads of a layer / dense", float(ratio.mean()), 1.0,
        paired_interval(ratio, np.ones(len(ratio)), seed), len(ratio),
        {
            "formula, 1/16 + the share of non-zeros": 1 / 16 + n_nonzero / n_all,
            "columns of 16 bits and row ends (CSR)": float(np.sum(csr) / dense.sum()),
        },
        {
            "every matrix comes back to the bit, logits too": exact,
            "bytes are the formula's": formula,
            "-0.0, NaN, empty rows and ragged ends come back": _hard_ones(),
            "CSR gains nothing at one half": float(np.sum(csr)) >= float(dense.sum()),
        },
        primary=False, bytes=int(mine.sum()), baseline_bytes=int(dense.sum()),
        data=f"Gemma-3-270M, {RATIO:.0%} of each row zero by magnitude",
    )  # fmt: skip


def by_columns(weight: Tensor) -> int:
    """Bytes of a matrix as values, columns in 16 bits and row ends in 32."""
    rows, columns = weight.view(torch.int16).nonzero(as_tuple=True)
    ends = torch.bincount(rows, minlength=len(weight)).cumsum(0).int()
    arrays = (weight[rows, columns], columns.to(torch.int16), ends)
    return sum(array.nbytes for array in arrays)


def _hard_ones() -> bool:
    """A matrix of all that a format may lose."""
    x = torch.zeros(5, 13, dtype=torch.bfloat16)
    x[0, ::2], x[2, 12], x[4, 3] = -0.0, torch.nan, torch.inf
    own = codec(f"{GRID}/sparse")
    return _same(x, own.decode(own.encode(x)))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().view(torch.uint8), b.detach().view(torch.uint8))


# --- seconds


def _turns(
    lm: Any, policies: Mapping[str, WeightPolicy], paths: Mapping[str, Path], ids: Tensor,
    keep_pages: bool,
) -> Turns:  # fmt: skip
    """Rounds of each policy, turn by turn, so that a busy machine slows all of them alike."""
    found: dict[str, list[Timed]] = {name: [] for name in policies}
    for _ in range(N_ROUNDS):
        for name, policy in policies.items():
            found[name].append(_timed(lm, policy, paths[name], ids, keep_pages))
    return found


@torch.no_grad()
def _timed(lm: Any, policy: WeightPolicy, path: Path, ids: Tensor, keep_pages: bool) -> Timed:
    cache = DynamicCache()
    with streamed(lm, policy, path, BUDGET, keep_pages=keep_pages) as stream:
        plan = stream.store.plan
        lm(input_ids=ids[:, :_BEFORE], past_key_values=cache)
        rates = stream.store.measure(len(plan.streamed))
        lm(input_ids=ids[:, _BEFORE : _BEFORE + 1], past_key_values=cache)  # fills the ring again
        if not keep_pages:
            stream.file.drop_pages()
        start = time.perf_counter()
        for i in range(_BEFORE + 1, _BEFORE + 1 + N_TOKENS):
            lm(input_ids=ids[:, i : i + 1], past_key_values=cache)
        token_s = (time.perf_counter() - start) / N_TOKENS
    return Timed(
        plan.seconds(rates), token_s, rates, plan.break_even(rates), plan.pays(rates),
        plan.verdict(rates),
    )  # fmt: skip


def _slow(path: Path, mark: Mapping[str, str]) -> tuple[float, bool]:
    """Seconds of loading some matrices from a slow link, and whether the plan says it pays."""
    file = Slow(path, mark)
    names = list(file.bundles)[:N_SLOW]
    try:
        some = [file.bundles[name] for name in names]
        # One place and nothing resident, so that all of them are read.
        budget = sum(max(sizes) for sizes in zip(*map(_sizes, some), strict=True))
        store = WeightStore(file, budget, names, n_ring=1)
        rates = store.measure(len(names))
        store.close()
    finally:
        file.close()
    return store.plan.seconds(rates), store.plan.pays(rates)


def _sizes(bundle: Bundle) -> tuple[int, int, int]:
    """Bytes of a place, of the scratch and of the decoder."""
    return bundle.decoded_bytes, bundle.n_bytes, bundle.work_bytes


def _times(
    timed: Turns, warm: Turns, slow: Mapping[str, tuple[float, bool]], held_bytes: int, seed: int
) -> list[Row]:
    load, token, kept = (
        {name: np.array([getattr(one, what) for one in turns]) for name, turns in some.items()}
        for some, what in ((timed, "load_s"), (timed, "token_s"), (warm, "token_s"))
    )
    (on_link_s, says_so), (dense_s, _) = slow["sparse"], slow["dense"]
    on_link = on_link_s / dense_s
    ratio, speed = load["sparse"] / load["dense"], token["dense"] / token["sparse"]
    mine, dense = timed["sparse"][-1], timed["dense"][-1]
    return [
        Row(
            "seconds of a cold load / dense", float(ratio.mean()), 1.0,
            paired_interval(ratio, np.ones(N_ROUNDS), seed), N_ROUNDS,
            {
                "disk, MB/s": mine.rates.read_bytes_s / 1e6,
                "decoding, GB/s": mine.rates.decode_bytes_s / 1e9,
                "pays on disks below, MB/s": mine.break_even / 1e6,
                "dense bf16 to float32, GB/s": dense.rates.decode_bytes_s / 1e9,
                f"from a link of {SLOW_BYTES_S / 1e6:.0f} MB/s": on_link,
            },
            {
                "the plan says which is faster, on this disk": mine.pays == (ratio.mean() < 1),
                "the plan says which is faster, on the link": says_so == (on_link < 1),
                "on the link it pays": on_link < 1,
            },
            data="pages dropped after each read", note=mine.verdict,
        ),
        Row(
            "tokens a second / dense", float(speed.mean()), 1.0,
            paired_interval(speed, np.ones(N_ROUNDS), seed), N_ROUNDS,
            {"with pages kept": float((kept["dense"] / kept["sparse"]).mean())},
            {"inside the budget": held_bytes <= BUDGET},
            primary=False, bytes=held_bytes,
            data=f"cold, {readable(BUDGET)} for the matrices of the layers",
            note=f"one token at a time; {token['dense'].mean():.2f} s a token dense",
        ),
    ]  # fmt: skip


# --- loss


def _losses(losses: Mapping[str, Values], seed: int) -> Row:
    value, plain = losses["pruned by magnitude"], losses["unpruned"]
    return Row(
        "nat per token of the pruned model", float(value.mean()), float(plain.mean()),
        paired_interval(value, plain, seed), len(value),
        {"by magnitude times the inputs' norms": float(losses["by the inputs' norms too"].mean())},
        primary=False, data=f"WikiText-2, {N_JUDGED} tokens",
        note="what pruning without repair costs, whatever the format; the baseline is unpruned",
    )  # fmt: skip


def _nll(gemma: LocalModel, ids: Tensor) -> Values:
    nll = F.cross_entropy(_logits(gemma.model, ids)[0, :-1], ids[0, 1:], reduction="none")
    return nll.double().numpy()


@torch.no_grad()
def _logits(lm: Any, ids: Tensor) -> Tensor:
    logits: Tensor = lm(input_ids=ids, use_cache=False).logits
    return logits.float()
