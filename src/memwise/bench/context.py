"""The room `context` side by side: what is still read in few slots, bytes, and time of a token.

Reading: a code of five digits in 1,000 tokens of an essay, read back by Gemma-3-270M; nat per
digit, chance is 2.30. Methods that look at attention know the question, the others do not; each
group has the full cache, an oracle and random slots beside it. Numbers of an item are kept until
the code changes, so a run that was stopped goes on.

Bytes: of what a cache holds while a text of 32,000 tokens is read. Time: of a token, beside
`DynamicCache` in turn, of a small model whose attention is most of its work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from memwise import catalogue
from memwise.bench.data import books
from memwise.bench.engine import Row, in_rounds, paired_interval
from memwise.bench.needle import Item, Reading, items, oracle_for, readings
from memwise.context.engine.host import bounded, bytes_for
from memwise.context.engine.policy import CachePolicy
from memwise.models import LocalModel, local_model

SEED = 0
N_ITEMS = 30
SLOTS, DECOY_SLOTS = (64, 128, 256), 128
_LENGTHS = (1024, 4096, 16384, 32000)
_FULL = "full cache"
_BYTES, _TIME = "bytes held / of a full cache, 256 slots", "time / DynamicCache's"
_N_TOKENS, _N_ROUNDS = 32, 5
_TIMED = {"same length": (2048, 4096), "a quarter of the slots": (8192, 2048)}


def run(data: Path | None, n_items: int = N_ITEMS) -> dict[str, list[Row]]:
    """All parts.

    Args:
        data: folder of the data sets.
        n_items: texts of each set.
    """
    lm = local_model()
    found = _reading(lm, data, n_items)
    for part in (partial(_lengths, lm, data), _speed):
        for name, rows in part().items():
            found.setdefault(name, []).extend(rows)
    return found


def policies() -> dict[str, CachePolicy]:
    """Cache policies that need nothing but their knobs, controls left out."""
    found = {}
    for entry in catalogue.cards():
        if entry.room == "context" and entry.kind != "control":
            made: Any = catalogue.load(entry.key)
            if isinstance(made, type) and issubclass(made, CachePolicy):
                found[entry.name] = made()
    return found


# --- reading


def _reading(lm: LocalModel, data: Path | None, n_items: int) -> dict[str, list[Row]]:
    plain = items(lm.tokenizer, data, n_items, False, SEED)
    decoys = items(lm.tokenizer, data, n_items, True, SEED)
    columns = [("", n, plain) for n in SLOTS] + [(", decoys", DECOY_SLOTS, decoys)]
    found: dict[str, list[Row]] = {}
    for known in (True, False):
        group = {n: p for n, p in policies().items() if (p.window > 0) == known}
        part = "nat per digit, question " + ("known" if known else "unknown")
        for what, n_slots, todo in columns:
            metric = f"{n_slots} slots{what}"
            read = {
                name: readings(lm, make, todo, 0 if name == _FULL else n_slots, known)
                for name, make in _told((_makers() | _plainly(group)).items(), f"{part}, {metric}")
            }
            for name, own in read.items():
                row = _row(metric, own, read["random"], part, primary=not what)
                found.setdefault(name, []).append(row)
    return found


def _makers() -> dict[str, Callable[[Item], CachePolicy]]:
    full, oracle, chance = (
        catalogue.load(f"context/{name}")() for name in ("streaming_llm", "oracle", "random")
    )
    return {
        _FULL: lambda item: full,
        "oracle": lambda item: oracle_for(oracle, item),
        "random": lambda item: chance,
    }


def _plainly(group: dict[str, CachePolicy]) -> dict[str, Callable[[Item], CachePolicy]]:
    return {name: lambda item, policy=policy: policy for name, policy in group.items()}  # type: ignore[misc]


def _row(metric: str, own: list[Reading], chance: list[Reading], part: str, primary: bool) -> Row:
    values, other = (np.array([one.mean for one in found]) for found in (own, chance))
    return Row(
        metric, float(values.mean()), float(other.mean()), paired_interval(values, other, SEED),
        len(values), {"read in full": float(np.mean([one.is_read for one in own]))},
        primary=primary, bytes=own[0].held_bytes, baseline_bytes=own[0].full_bytes, data=part,
        note="the baseline is random slots; its bytes are those of a full cache",
    )  # fmt: skip


# --- bytes


@torch.no_grad()
def _lengths(lm: LocalModel, data: Path | None) -> dict[str, list[Row]]:
    """What is held at some lengths of one text."""
    text = "\n".join(body for _, body in books(data)[:3])
    ids = torch.tensor([lm.tokenizer(text[: 8 * _LENGTHS[-1]]).input_ids[: _LENGTHS[-1]]])
    found: dict[str, list[Row]] = {}
    for codec in (None, "int8/row"):
        policy = catalogue.load("context/streaming_llm")()
        budget = bytes_for(lm.model, policy, 256, codec=codec)
        name = "streaming_llm" + (f", {codec}" if codec else "")
        with bounded(lm.model, policy, budget, codec=codec) as cache:
            first = 0
            for last in _told(_LENGTHS, f"bytes against length, {name}"):
                lm.model.get_decoder()(ids[:, first:last], past_key_values=cache)
                report, first = cache.report(), last
                held = sum(report.held_bytes.values())
                row = in_rounds(f"at {last} tokens", [held / report.full_bytes])
                found.setdefault(name, []).append(
                    replace(row, data=_BYTES, bytes=held, baseline_bytes=report.full_bytes)
                )
    return found


# --- time


def _speed() -> dict[str, list[Row]]:
    """A token, and a whole text, beside `DynamicCache` in turn."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=1 << 16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model: Any = LlamaForCausalLM(config)
    model.eval()
    found: dict[str, list[Row]] = {}
    for what, (n_tokens, n_slots) in _TIMED.items():
        for name in _told(("streaming_llm", "snapkv"), f"time, {what}"):
            token, text = _ratios(model, name, n_tokens, n_slots)
            found.setdefault(name, []).extend(
                replace(in_rounds(f"{kind}, {what}", ratios), data=_TIME)
                for kind, ratios in (("a token", token), ("reading", text))
            )
    return found


@torch.no_grad()
def _ratios(model: Any, name: str, n_tokens: int, n_slots: int) -> tuple[list[float], list[float]]:
    policy = catalogue.load(f"context/{name}")()
    draws = torch.Generator().manual_seed(SEED)
    ids = torch.randint(2, 500, (1, n_tokens), generator=draws)
    budget = bytes_for(model, policy, n_slots)
    token, text = [], []
    for _ in range(_N_ROUNDS):
        full = DynamicCache(config=model.config)
        read = _seconds(lambda full=full: model.model(ids, past_key_values=full))  # type: ignore[misc]
        with bounded(model, policy, budget) as cache:
            mine = _seconds(lambda cache=cache: model.model(ids, past_key_values=cache))  # type: ignore[misc]
            own = [
                _seconds(lambda cache=cache: model(ids[:, :1], past_key_values=cache))  # type: ignore[misc]
                for _ in range(_N_TOKENS)
            ]
        theirs = [
            _seconds(lambda full=full: model(ids[:, :1], past_key_values=full))  # type: ignore[misc]
            for _ in range(_N_TOKENS)
        ]
        text.append(mine / read)
        token.append(statistics.median(own) / statistics.median(theirs))
    return token, text


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _told(subjects: Iterable[Any], part: str) -> Iterable[Any]:
    return track(list(subjects), part, console=Console(stderr=True), transient=True)
