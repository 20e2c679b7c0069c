"""Tokens of a pass when a tree of guesses is verified, by Gemma-3-270M on a book it was not given.

Prompts are trained on pieces of books, once, and kept in the cache folder until the code or a knob
changes; other pieces say which guesses are often right. Judged are greedy continuations of pieces
of a book that was used for neither: tokens of a pass, and that the text is the one of ordinary
decoding. How often the guesses for 2, 3 and 4 tokens on name what the model says there is counted
on the same book, beside prompts that are not trained, the commonest tokens, and the tokens that
followed the longest earlier occurrence of the last ones.

The time of a pass by the size of the tree, and the size that is the fastest here, are shown and not
judged: on a processor each node pays for an output layer of 262,144 words.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from memwise.bench.data import books
from memwise.bench.engine import Row, in_rounds, paired_interval
from memwise.catalogue import load
from memwise.context.engine import prompts as chains
from memwise.context.engine.draft import Drafted, Drafter, fastest
from memwise.context.engine.relay import RelayHost
from memwise.models import GEMMA_SHA256, LocalModel, cached, local_model

N_TRAIN, N_CALIBRATE, N_HELD_OUT = 32, 8, 8
_LENGTH, _START, _NEW = 128, 64, 24  # tokens of a piece, of what is continued, that are new
_PLACES, _TOP, _ROUNDS = 16, 5, 5
_SUFFIX = 3  # most tokens that are looked up


@dataclass(frozen=True)
class Pieces:
    """Tokens of pieces of text, by what they are for."""

    train: list[list[int]]
    calibrate: list[list[int]]
    held_out: list[list[int]]


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Tokens of a pass, guesses that are right, time."""
    lm = local_model()
    pieces = _pieces(lm.tokenizer, data)
    prompts, taken_s = _trained(method, lm, pieces.train, seed)
    start = chains.untrained(RelayHost(lm.model), method.n_prompts, seed)
    hits = method.hits(lm.model, prompts, pieces.calibrate)
    mine = method.drafter(lm.model, prompts, hits, method.n_nodes)
    plain = load(f"context/{method.card.baseline}")()(lm.model)
    return [
        _passes(method, lm, pieces, mine, plain, start, hits, taken_s, seed),
        *_guesses(lm, pieces, prompts, start, seed),
        _speed(method, lm, pieces, prompts, hits),
    ]


def _pieces(tokenizer: Any, data: Path | None) -> Pieces:
    """The last book is held out; of a single one, its last part."""
    found = books(data)
    shared, apart = found[:-1], found[-1][1]
    if not shared:
        middle = len(apart) // 2
        shared, apart = [("", apart[:middle])], apart[middle:]
    n = N_TRAIN + N_CALIBRATE
    each = -(-n // len(shared))
    pieces = [piece for _, text in shared for piece in _cut(tokenizer, text, each)]
    # Every part has pieces of every book.
    calibrate = pieces[:: len(pieces) // N_CALIBRATE][:N_CALIBRATE]
    train = [piece for piece in pieces if piece not in calibrate][:N_TRAIN]
    return Pieces(train, calibrate, _cut(tokenizer, apart, N_HELD_OUT))


def _cut(tokenizer: Any, text: str, n: int) -> list[list[int]]:
    step = len(text) // (n + 1)
    cut = [text[i * step : i * step + 8 * _LENGTH] for i in range(1, n + 1)]
    encoded = [tokenizer.encode(part, add_special_tokens=False) for part in cut]
    return [[tokenizer.bos_token_id, *tokens[1:_LENGTH]] for tokens in encoded]


def _trained(
    method: Any, lm: LocalModel, texts: list[list[int]], seed: int
) -> tuple[Tensor, float]:
    """Trained prompts, and the seconds that it took."""
    code = hashlib.sha256(Path(chains.__file__).read_bytes())
    code.update(repr((method, texts, seed, GEMMA_SHA256)).encode())

    def build(folder: Path) -> None:
        began = time.perf_counter()
        prompts = method.train(lm.model, texts, seed)
        taken = {"seconds": time.perf_counter() - began}
        save_file({"prompts": prompts}, folder / "prompts.safetensors")
        (folder / "taken.json").write_text(json.dumps(taken), "utf-8")

    folder = cached(f"gemma-prompts-{code.hexdigest()[:16]}", build)
    taken = json.loads((folder / "taken.json").read_text("utf-8"))
    return load_file(folder / "prompts.safetensors")["prompts"], taken["seconds"]


# --- passes


def _passes(
    method: Any, lm: LocalModel, pieces: Pieces, mine: Drafter, plain: Drafter, start: Tensor,
    hits: Tensor, taken_s: float, seed: int,
) -> Row:  # fmt: skip
    asked = [piece[:_START] for piece in pieces.held_out]
    ordinary = [plain.generate(ids, _NEW) for ids in asked]
    began = time.perf_counter()
    drafted = [mine.generate(ids, _NEW) for ids in asked]
    seconds = time.perf_counter() - began
    # The same tree, so that only the prompts differ.
    blind = Drafter(lm.model, start, mine.tree)
    unlearned = [blind.generate(ids, _NEW) for ids in asked]
    values = np.array([one.per_pass for one in drafted])
    chance = float(np.mean([one.per_pass for one in unlearned]))
    return Row(
        "tokens of a pass", float(values.mean()), float(_mean(ordinary)),
        paired_interval(values, np.array([one.per_pass for one in ordinary]), seed), len(values),
        {
            "prompts not trained": chance,
            "expected by calibration": mine.tree.expected(hits),
            "training, s": taken_s,
        },
        {
            "the text is that of ordinary decoding": _same(drafted, ordinary),
            "also with prompts that are not trained": _same(unlearned, ordinary),
            "training is what helps": values.mean() > chance,
        },
        bytes=mine.prompts.untyped_storage().nbytes(), seconds=seconds,
        data=f"Gemma-3-270M, {len(values)} pieces of a book, {_NEW} new tokens behind {_START}",
        note=f"a tree of {method.n_nodes} tokens; bytes are those of the prompts",
    )  # fmt: skip


def _mean(drafted: Sequence[Drafted]) -> float:
    return statistics.fmean(one.per_pass for one in drafted)


def _same(found: Sequence[Drafted], wanted: Sequence[Drafted]) -> bool:
    return all(a.tokens == b.tokens for a, b in zip(found, wanted, strict=True))


# --- guesses


def _guesses(
    lm: LocalModel, pieces: Pieces, prompts: Tensor, start: Tensor, seed: int
) -> list[Row]:
    host = RelayHost(lm.model)
    common = Counter(token for piece in pieces.train for token in piece).most_common(_TOP)
    commonest = [token for token, _ in common]
    m = len(prompts)
    found: dict[str, list[Tensor]] = {"mine": [], "not trained": [], "commonest": [], "lookup": []}
    for piece in pieces.held_out:
        text = chains.read(host, piece)
        last = len(piece) - 1 - m
        places = torch.linspace(last // 3, last - 1, _PLACES).long()
        found["mine"].append(chains.ranks(host, text, places, prompts))
        found["not trained"].append(chains.ranks(host, text, places, start))
        later = places[:, None] + 1 + torch.arange(m)
        with torch.no_grad():
            said = torch.stack([host.head(text.hidden[row]).argmax(-1) for row in later])
        found["commonest"].append(_ranks_in([[commonest] * m] * len(places), said))
        looked_up = [_looked_up(piece[: int(place) + 2], m) for place in places]
        found["lookup"].append(_ranks_in(looked_up, said))
    ranks = {name: torch.cat(each) for name, each in found.items()}
    groups = [str(i) for i in range(len(pieces.held_out)) for _ in range(_PLACES)]
    return [_accuracy(ranks, i, top, groups, seed) for top in (1, _TOP) for i in range(m)]


def _accuracy(ranks: dict[str, Tensor], i: int, top: int, groups: list[str], seed: int) -> Row:
    right = {name: (found[:, i] < top).double().numpy() for name, found in ranks.items()}
    mine, other = right.pop("mine"), right.pop("not trained")
    controls = {name: float(values.mean()) for name, values in right.items()}
    return Row(
        f"top-{top} of what comes {i + 2} tokens on", float(mine.mean()), float(other.mean()),
        paired_interval(mine, other, seed, groups=groups), len(mine), controls,
        {
            "better than prompts that are not trained": mine.mean() > other.mean(),
            "better than the commonest tokens": mine.mean() > controls["commonest"],
        },
        primary=False, data="the held-out book",
        note="the baseline is prompts that are not trained; lookup knows the next token",
    )  # fmt: skip


def _looked_up(tokens: list[int], m: int) -> list[list[int]]:
    """What followed the latest earlier occurrence of the longest known end of a text."""
    for n in range(_SUFFIX, 0, -1):
        end = tokens[-n:]
        for first in range(len(tokens) - n - 1, -1, -1):
            if tokens[first : first + n] == end:
                after = tokens[first + n : first + n + m]
                return [[token] for token in after] + [[]] * (m - len(after))
    return [[]] * m


def _ranks_in(guesses: Sequence[Sequence[list[int]]], said: Tensor) -> Tensor:
    """Rank (J, m) of what is said among guesses; beyond all of them where it is not there."""
    return torch.tensor(
        [
            [
                g.index(token) if token in g else len(g) + _TOP
                for g, token in zip(own, row, strict=True)
            ]
            for own, row in zip(guesses, said.tolist(), strict=True)
        ]
    )


# --- time


def _speed(method: Any, lm: LocalModel, pieces: Pieces, prompts: Tensor, hits: Tensor) -> Row:
    """Tokens a second with the size that is the fastest here, beside one token a pass."""
    drafters = {n: method.drafter(lm.model, prompts, hits, n) for n in method.sizes}
    accepted = {n: one.tree.expected(hits) for n, one in drafters.items()}
    rounds = [
        {n: one.seconds(pieces.calibrate[0][:_START], 3) for n, one in drafters.items()}
        for _ in range(_ROUNDS)
    ]
    seconds = {n: statistics.median(one[n] for one in rounds) for n in drafters}
    best = fastest(seconds, accepted)
    gains = [accepted[best] / accepted[1] * one[1] / one[best] for one in rounds]
    controls = {f"pass of {n}, ms": 1000 * taken for n, taken in seconds.items()}
    controls |= {f"tokens of a pass of {n}": tokens for n, tokens in accepted.items()}
    row = in_rounds("tokens a second / ordinary decoding's, expected", gains)
    return replace(
        row, controls=controls | {"size that is chosen": best}, data="one thread",
        note="size 1 is ordinary decoding, and is chosen where no tree is faster",
    )  # fmt: skip
