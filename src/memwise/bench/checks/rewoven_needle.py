"""Do hidden states of a text, woven into a question, bring back what the cache has dropped?

Gemma-3-270M reads an essay with a code of five digits through a cache of 128 slots in each
full-attention layer, first and newest tokens only, so that the code is gone. What the method keeps
is noted meanwhile, with nothing added; then the last tokens of the essay and the question go
through, with it. Judged is the nll of the digits; what it costs is the nll of the essay's end.
Strength and gates are chosen on other codes in other essays.

What must hold: a full cache reads the code, and the baseline, the same cache alone, does not. The
method with the memory of another essay, and with the states of the code's own tokens and no others,
are shown beside it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memwise.bench.engine import Row, paired_interval
from memwise.bench.needle import CHUNK, Item, items, readings
from memwise.catalogue import load
from memwise.context.engine.edit import Pass
from memwise.context.engine.editor import edited
from memwise.context.engine.host import bounded, bytes_for
from memwise.context.engine.ring import HiddenRing
from memwise.context.policies.contextual_memory_reweaving import ContextualMemoryReweaving
from memwise.models import LocalModel, local_model

N_ITEMS, N_SLOTS, N_END = 12, 128, 60
STRENGTHS = (0.1, 0.3, 1.0)  # that are tried
_ONLY = 9.0  # a gate that leaves next to nothing to the others
BUDGET = "8MiB"


class Kept(NamedTuple):
    """What is left of an essay.

    Attributes:
        path: of the saved cache.
        memory: what the method noted.
        sure: the states of the code's sentence alone.
        cache_bytes: of the cache.
    """

    path: Path
    memory: HiddenRing
    sure: HiddenRing
    cache_bytes: int


@dataclass(frozen=True)
class _Told(ContextualMemoryReweaving):
    """Remembers tokens that are named beforehand."""

    positions: tuple[int, ...] = ()

    def remember(self, passed: Pass) -> Tensor:
        """Those."""
        return torch.isin(passed.at, torch.tensor(self.positions))


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Nat per digit of the code, and per token of the essay's end."""
    lm = local_model()
    every = items(lm.tokenizer, data, N_ITEMS, False, seed)
    tuned, todo = every[::4], [one for i, one in enumerate(every) if i % 4]
    method, tried = _chosen(lm, method, tuned)
    full = readings(lm, lambda _: load("context/random")(), todo, 0, False)
    with tempfile.TemporaryDirectory() as folder:
        kept = [
            read(lm, method, one, Path(folder) / f"{i}.safetensors") for i, one in enumerate(todo)
        ]
        off = replace(method, strength=0.0)
        others = [*kept[1:], kept[0]]
        scores = {
            "mine": [asked(lm, method, *each) for each in _with(todo, kept, kept)],
            "baseline": [asked(lm, off, *each) for each in _with(todo, kept, kept)],
            "memory of another essay": [asked(lm, method, *e) for e in _with(todo, kept, others)],
            "states of the code alone": [
                asked(lm, method, one, own, own.sure.clone())
                for one, own in zip(todo, kept, strict=True)
            ],
        }
    found = {name: np.array(each) for name, each in scores.items()}
    ring, cache_bytes = kept[0].memory.n_bytes, kept[0].cache_bytes
    n_held = np.mean([_held(own.memory, one) for own, one in zip(kept, todo, strict=True)])
    notes = (
        f"{n_held:.0f} of {len(todo[0].needle)} tokens of the sentence are in the ring; {tried}",
        f"the last {N_END} tokens before the question",
    )
    rows = []
    for i, metric in enumerate(("nat per digit", "nat per token of the text")):
        mine, base = (found[name][:, i] for name in ("mine", "baseline"))
        controls = {name: float(each[:, i].mean()) for name, each in list(found.items())[2:]}
        behaves = {}
        if i == 0:
            controls["full cache"] = float(np.mean([one.mean for one in full]))
            behaves = {
                "a full cache reads the code": controls["full cache"] < 0.3,
                "the baseline does not": float(base.mean()) > 1.5,
                "the memory of another essay does not help as much": float(mine.mean())
                < controls["memory of another essay"],
            }
        rows.append(
            Row(
                metric, float(mine.mean()), float(base.mean()), paired_interval(mine, base, seed),
                len(mine), controls, behaves, primary=i == 0, bytes=cache_bytes + ring,
                baseline_bytes=cache_bytes,
                data=f"{N_SLOTS} slots a full layer of 1,000 tokens of essays",
                note=notes[i],
            )
        )  # fmt: skip
    return rows


def _chosen(lm: LocalModel, method: Any, todo: list[Item]) -> tuple[Any, str]:
    """The method with the best strength and gates, and what each gave."""
    n = len(method.gates)
    gates = [(0.0,) * n, *(tuple(_ONLY * (i == j) for j in range(n)) for i in range(n))]
    names = ["all layers", *(f"layer {i + 1} of {n}" for i in range(n))]
    change = dict.fromkeys(((s, i) for i in range(n + 1) for s in STRENGTHS), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for one in todo:
            kept = read(lm, method, one, Path(folder) / "cache.safetensors")
            base = asked(lm, replace(method, strength=0.0), one, kept, kept.memory.clone())[0]
            for strength, i in change:
                policy = replace(method, strength=strength, gates=gates[i])
                nats = asked(lm, policy, one, kept, kept.memory.clone())[0]
                change[strength, i] += (nats - base) / len(todo)
    strength, i = min(change, key=lambda cell: change[cell])
    told = ", ".join(f"{names[i]} {s:g}: {value:+.2f}" for (s, i), value in change.items())
    best = replace(method, strength=strength, gates=gates[i])
    return best, f"change in nats by gate and strength on {len(todo)} other items: {told}"


def _with(
    todo: list[Item], kept: list[Kept], whose: list[Kept]
) -> list[tuple[Item, Kept, HiddenRing]]:
    return [
        (one, own, other.memory.clone()) for one, own, other in zip(todo, kept, whose, strict=True)
    ]


def _held(memory: HiddenRing, item: Item) -> int:
    return len(set(memory.at[0].tolist()) & set(item.needle))


@torch.no_grad()
def read(lm: LocalModel, method: Any, item: Item, path: Path) -> Kept:
    """Let the model read all but the end of an essay, and note what the method keeps."""
    noting = replace(method, strength=0.0)
    told = _Told(**vars(noting), positions=tuple(item.needle))
    with (
        edited(lm.model, noting, budget=BUDGET) as editor,
        edited(lm.model, told, budget="1MiB") as sure,
        bounded(lm.model, _few(), _bytes(lm), chunk=CHUNK) as cache,
    ):
        lm.model.get_decoder()(torch.tensor([item.context[:-N_END]]), past_key_values=cache)
        cache.save(path)
        n_bytes = sum(cache.report().held_bytes.values())
    assert editor.memory is not None
    assert sure.memory is not None
    return Kept(path, editor.memory, sure.memory, n_bytes)


@torch.no_grad()
def asked(
    lm: LocalModel, method: Any, item: Item, kept: Kept, memory: HiddenRing
) -> tuple[float, float]:
    """Mean nll of the digits, and of the essay's end."""
    rest = (*item.context[-N_END:], *item.ask, *item.lead, *item.digits)
    with (
        edited(lm.model, method, memory=memory),
        bounded(lm.model, _few(), _bytes(lm), chunk=CHUNK) as cache,
    ):
        cache.load(kept.path)
        logits = lm.model(torch.tensor([rest[:-1]]), past_key_values=cache).logits[0]
    nats = -logits.float().log_softmax(-1).gather(1, torch.tensor(rest[1:])[:, None])[:, 0]
    return float(nats[-5:].mean()), float(nats[: N_END - 1].mean())


def _few() -> Any:
    return load("context/streaming_llm")()


def _bytes(lm: LocalModel) -> int:
    return int(bytes_for(lm.model, _few(), N_SLOTS, chunk=CHUNK))
