"""Tokens a second under one budget of keys and values, by how much is reserved for each request.

Requests are the signatures of functions of Python's standard library, answers their docstrings, so
lengths are those of real text. Packages are either learned from or served, never both. The clock is
simulated with costs of a step that are measured with Gemma-3-270M; the same scheduler then serves
some requests with that model itself, all predictions far too short, and the texts must be those of
one-by-one generation.

Beside the method: a reservation for the longest text (the baseline), for the mean length, for the
true length (oracle), pages without reservations, and the method with predictions that belong to
other prompts or always name the shortest bucket.
"""

from __future__ import annotations

import ast
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from memwise.bench.engine import Row, paired_interval
from memwise.catalogue import load
from memwise.context.engine.batch_worker import ModelWorker
from memwise.context.engine.lengths import Buckets, LengthPredictor
from memwise.context.engine.scheduler import (
    Batch,
    BatchScheduler,
    Request,
    Reserving,
    Served,
    SimulatedWorker,
    StepCosts,
)
from memwise.models import LocalModel, local_model
from memwise.recall.engine.embed import embedder

LIMIT = 512  # most new tokens
N_TRAIN, N_LOADS, N_REQUESTS = 1600, 20, 80  # signatures learned from; loads, and requests in each
N_WORST = 4  # requests for which the budget holds the longest text
PAGE = 16  # tokens
_LONGEST_PROMPT = 128  # tokens
_STEPS = ((1, 64), (1, 448), (4, 64), (4, 448), (16, 64), (16, 256), (32, 64))  # requests, rows
_READS, _TIMES = (8, 32, 128), 3
_REAL, _REAL_LIMIT, _REAL_PREDICTED = 5, 8, 2
_ASIDE = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """Prompts of some packages.

    Attributes:
        prompts: signatures.
        packages: of each.
        n_prompts: their tokens.
        lengths: tokens of the answers, the end included, at most the limit.
        vectors: of the prompts.
    """

    prompts: list[str]
    packages: list[str]
    n_prompts: Lengths
    lengths: Lengths
    vectors: NDArray[np.float64]


@dataclass(frozen=True)
class Mean(Reserving):
    """Room for so many tokens, whoever asks."""

    n_tokens: int

    def first(self, request: Request) -> int:
        """The same for all."""
        return self.n_tokens


@dataclass(frozen=True)
class Paged(Reserving):
    """No reservation: a page more when it is needed; who came last gives way when none is left."""

    def first(self, request: Request) -> int:
        """One page."""
        return PAGE

    def grown(self, n_tokens: int) -> int:
        """One page more."""
        return n_tokens + PAGE

    def gives_way(self, full: int, running: Sequence[int], fits: bool) -> int | None:
        """Nobody, while there are pages."""
        return None if fits else running[-1]


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Tokens a second, the predictor, a run of the model."""
    lm = local_model()
    train, served = asked(lm.tokenizer, seed)
    predictor = method.predictor(train.vectors, train.lengths, LIMIT)
    return [
        _throughput(method, lm, train, served, predictor, seed),
        _predictor(train, served, predictor, seed),
        _real(method, lm, served),
    ]


# --- requests


def asked(tokenizer: Any, seed: int) -> tuple[Asked, Asked]:
    """Requests of packages that are learned from, and of the others."""
    found = list(_documented(Path(sysconfig.get_path("stdlib"))))
    draws = np.random.default_rng(seed)
    found = [found[i] for i in draws.permutation(len(found))]
    names = sorted({package for package, _, _ in found})
    learned = {names[i] for i in draws.permutation(len(names))[: len(names) // 2]}
    groups: tuple[list[tuple[str, str, str]], ...] = ([], [])
    for item in found:
        groups[item[0] not in learned].append(item)
    embed = embedder("minilm").encode
    sizes = (N_TRAIN, N_LOADS * N_REQUESTS)
    first, second = (
        _asked(tokenizer, embed, group[:n]) for group, n in zip(groups, sizes, strict=True)
    )
    return first, second


def _documented(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Package, signature and docstring of every function that has one."""
    for path in sorted(folder.rglob("*.py")):
        place = path.relative_to(folder)
        if _ASIDE & set(place.parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:
                continue  # templates and modules of another version
        package = Path(place.parts[0]).stem
        for name, node in _functions(tree, ""):
            text = ast.get_docstring(node)
            if text:
                yield package, f"def {name}({ast.unparse(node.args)}):", text


def _functions(
    node: ast.AST, inside: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inside + child.name, child
        deeper = f"{child.name}." if isinstance(child, ast.ClassDef) else inside
        yield from _functions(child, deeper)


def _asked(
    tokenizer: Any, embed: Callable[[list[str]], NDArray[np.float32]],
    items: Sequence[tuple[str, str, str]],
) -> Asked:  # fmt: skip
    packages, prompts, texts = (list(part) for part in zip(*items, strict=True))
    n_prompts = [min(len(ids), _LONGEST_PROMPT) for ids in tokenizer(prompts)["input_ids"]]
    written = tokenizer(texts, add_special_tokens=False)["input_ids"]
    lengths = np.minimum([len(ids) + 1 for ids in written], LIMIT)
    return Asked(prompts, packages, np.array(n_prompts), lengths, np.asarray(embed(prompts), float))


# --- throughput


def _throughput(
    method: Any, lm: LocalModel, train: Asked, served: Asked, predictor: LengthPredictor, seed: int
) -> Row:
    costs, token_bytes = step_costs(lm.model, seed)
    budget = N_WORST * (LIMIT + _LONGEST_PROMPT) * token_bytes
    baseline = load(f"context/{method.card.baseline}")()
    told = predictor(served.vectors)
    others = np.random.default_rng(seed).permutation(told)
    first = np.full_like(told, predictor.buckets.ends()[0])
    runs = {
        "mine": (method, told),
        "worst": (baseline, told),
        "mean reservation": (Mean(round(train.lengths.mean())), told),
        "oracle": (method, served.lengths),
        "paged": (Paged(), told),
        "predictions of other prompts": (method, others),
        "always the shortest bucket": (method, first),
    }
    began = time.perf_counter()
    found = {
        name: _loads(BatchScheduler(policy, budget, token_bytes), costs, served, predicted)
        for name, (policy, predicted) in runs.items()
    }
    seconds = time.perf_counter() - began
    complete = all(
        tuple(served.lengths[part]) == one.written
        for each in found.values()
        for part, one in zip(_parts(len(served.lengths)), each, strict=True)
    )
    speed = {name: np.array([s.tokens_per_s for s in each]) for name, each in found.items()}
    ratio = {name: each / speed["worst"] for name, each in speed.items()}
    mean = {name: float(each.mean()) for name, each in ratio.items()}
    mine = mean.pop("mine")
    worst = mean.pop("worst")
    peak = max(one.peak_bytes for each in found.values() for one in each)
    return Row(
        "tokens a second / worst case's", mine, worst,
        paired_interval(ratio["mine"], ratio["worst"], seed), N_LOADS,
        mean | _context(found) | {"worst case, tokens a second": float(speed["worst"].mean())},
        {
            "every text is complete, whatever is predicted": complete,
            "no more than with the true lengths": mine <= mean["oracle"],
            "predictions of other prompts are worse": mine > mean["predictions of other prompts"],
            "the budget holds at every moment": peak <= budget,
        },
        bytes=max(one.peak_bytes for one in found["mine"]), seconds=seconds,
        baseline_bytes=max(one.peak_bytes for one in found["worst"]),
        data=f"{N_LOADS} loads of {N_REQUESTS} signatures of the standard library",
        note=f"simulated clock: {_ms(costs)}; pages need no prediction at all",
    )  # fmt: skip


def _loads(
    scheduler: BatchScheduler, costs: StepCosts, served: Asked, predicted: Lengths
) -> list[Served]:
    """Serve every load by itself."""
    found = []
    for part in _parts(len(served.lengths)):
        n_prompts, lengths = served.n_prompts[part].tolist(), served.lengths[part].tolist()
        requests = [
            Request(n, LIMIT, told)
            for n, told in zip(n_prompts, predicted[part].tolist(), strict=True)
        ]
        found.append(scheduler.run(requests, SimulatedWorker(costs, n_prompts, lengths)))
    return found


def _parts(n: int) -> list[slice]:
    return [slice(at, at + N_REQUESTS) for at in range(0, n, N_REQUESTS)]


def _context(found: dict[str, list[Served]]) -> dict[str, float]:
    """What the speeds come from, on average over the loads."""
    measures: dict[str, Callable[[Served], float]] = {
        "requests in a step": lambda one: one.rows,
        "gave way": lambda one: one.n_preempted,
        "wasted MiB": lambda one: one.wasted_bytes / 2**20,
    }
    return {
        f"{name}: {what}": float(np.mean([measure(one) for one in each]))
        for what, measure in measures.items()
        for name, each in found.items()
    }


def _ms(costs: StepCosts) -> str:
    return (
        f"{1e3 * costs.pass_s:.0f} ms a pass, {1e3 * costs.read_s:.1f} a token read, "
        f"{1e3 * costs.row_s:.1f} a request, {1e3 * costs.held_s:.3f} a row held"
    )


@torch.no_grad()
def step_costs(model: Any, seed: int) -> tuple[StepCosts, int]:
    """Costs of a step of a model, least of some times, and bytes of a token's keys and values."""
    worker = ModelWorker(model, [range(2, 34)])
    worker.step(Batch([0], []))
    token_bytes, odd = divmod(worker.held_bytes, 32)
    assert not odd
    draws = torch.Generator().manual_seed(seed)
    counts: list[tuple[int, int, int]] = []
    seconds = []
    for n, rows in _STEPS:
        ids = torch.randint(2, 1000, (n, 1), generator=draws)
        taken = [_timed(model, ids, _filled(model, n, rows, draws)) for _ in range(_TIMES)]
        counts.append((0, n, n * rows))
        seconds.append(min(taken))
    for n in _READS:
        ids = torch.randint(2, 1000, (1, n), generator=draws)
        counts.append((n, 0, 0))
        seconds.append(min(_timed(model, ids, DynamicCache()) for _ in range(_TIMES)))
    return StepCosts.fitted(counts, seconds), token_bytes


def _timed(model: Any, ids: torch.Tensor, cache: DynamicCache) -> float:
    began = time.perf_counter()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - began


def _filled(model: Any, n: int, rows: int, draws: torch.Generator) -> DynamicCache:
    """Keys and values of so many rows; what they say does not matter to the clock."""
    config, cache = model.config, DynamicCache()
    shape = (n, config.num_key_value_heads, rows, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(
            torch.randn(shape, generator=draws), torch.randn(shape, generator=draws), layer
        )
    return cache


# --- the predictor


def _predictor(train: Asked, served: Asked, predictor: LengthPredictor, seed: int) -> Row:
    """Nats that the right bucket costs, beside the buckets' frequencies."""
    buckets: Buckets = predictor.buckets
    right = buckets.of(served.lengths)
    often = np.bincount(buckets.of(train.lengths), minlength=buckets.n) + 1.0
    likely = predictor.probabilities(served.vectors)
    each = np.arange(len(right))
    mine, plain = -np.log(likely[each, right]), -np.log(often / often.sum())[right]
    interval = paired_interval(mine, plain, seed, groups=served.packages)
    return Row(
        "nats of the right bucket (beside frequencies)", float(mine.mean()), float(plain.mean()),
        interval, len(right),
        {
            "right bucket": float((likely.argmax(1) == right).mean()),
            "commonest bucket": float((right == often.argmax()).mean()),
            "long enough": float((predictor(served.vectors) >= served.lengths).mean()),
        },
        primary=False, data="signatures of packages that were not learned from",
        note="shown, not judged: below the frequencies, a prompt tells something of the length",
    )  # fmt: skip


# --- the model itself


def _real(method: Any, lm: LocalModel, served: Asked) -> Row:
    """Texts of the scheduler with predictions far too short, beside one-by-one generation."""
    prompts = [lm.tokenizer(text)["input_ids"][:_LONGEST_PROMPT] for text in served.prompts[:_REAL]]
    alone = [_alone(lm, prompt) for prompt in prompts]
    single = ModelWorker(lm.model, prompts[:1])
    single.step(Batch([0], []))
    token_bytes = single.held_bytes // len(prompts[0])
    longest = max(map(len, prompts)) + _REAL_LIMIT
    worker = ModelWorker(lm.model, prompts, [lm.tokenizer.eos_token_id])
    scheduler = method(2 * longest * token_bytes, token_bytes)
    requests = [Request(len(prompt), _REAL_LIMIT, _REAL_PREDICTED) for prompt in prompts]
    found = scheduler.run(requests, worker)
    equal = np.array([text == own for text, own in zip(worker.texts, alone, strict=True)], float)
    return Row(
        "texts equal to one-by-one generation", float(equal.mean()), 1.0,
        (float(equal.min()) - 1, float(equal.max()) - 1), _REAL,
        {"gave way": found.n_preempted, "requests in a step": found.rows},
        {
            "all texts equal under a bad predictor": bool(equal.all()),
            "requests gave way": found.n_preempted > 0,
            "measured bytes stay under the reserved ones": worker.peak_bytes <= found.peak_bytes,
        },
        primary=False, bytes=worker.peak_bytes, seconds=found.seconds,
        data=f"Gemma-3-270M, {_REAL} signatures, {_REAL_LIMIT} new tokens",
        note=f"every prediction is {_REAL_PREDICTED} tokens; the interval holds all texts",
    )  # fmt: skip


@torch.no_grad()
def _alone(lm: LocalModel, prompt: Sequence[int]) -> list[int]:
    """Greedy text, by the plain loop with a cache."""
    ids, cache = list(prompt), DynamicCache()
    text: list[int] = []
    while len(text) < _REAL_LIMIT and (not text or text[-1] != lm.tokenizer.eos_token_id):
        logits = lm.model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits
        text.append(int(logits[0, -1].argmax()))
        ids = text[-1:]
    return text
