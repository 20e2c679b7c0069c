"""Requests under a budget of keys and values: whole texts, whatever was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import llama, tokens  # noqa: E402

from memwise.context.engine.batch_worker import ModelWorker  # noqa: E402
from memwise.context.engine.lengths import Buckets, LengthPredictor, _softmax  # noqa: E402
from memwise.context.engine.scheduler import (  # noqa: E402
    Batch,
    BatchScheduler,
    Request,
    Reserving,
    SimulatedWorker,
    StepCosts,
)
from memwise.context.policies.s3 import S3  # noqa: E402
from memwise.context.policies.worst_case_reservation import WorstCaseReservation  # noqa: E402
from memwise.errors import BudgetExceeded, InvalidKnob  # noqa: E402

COSTS = StepCosts(pass_s=1.0, read_s=0.01, row_s=0.1, held_s=0.001)


class Paged(Reserving):
    """One token at a time; the newest gives way."""

    def first(self, request: Request) -> int:
        return 1

    def grown(self, n_tokens: int) -> int:
        return n_tokens + 1

    def gives_way(self, full: int, running: Sequence[int], fits: bool) -> int | None:
        return None if fits else running[-1]


POLICIES = {"worst": WorstCaseReservation(), "s3": S3(), "slow growth": S3(growth=1.01),
            "paged": Paged()}  # fmt: skip


class Watched(SimulatedWorker):
    """Counts rows, as a cache would hold them, and remembers who joined and who left."""

    def __init__(self, n_prompts: list[int], lengths: list[int]) -> None:
        super().__init__(COSTS, n_prompts, lengths)
        self.rows: dict[int, int] = {}
        self.most = 0
        self.batches: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.dropped: list[int] = []

    def step(self, batch: Batch) -> Any:
        assert not set(batch.joining) & self.rows.keys()
        assert set(batch.running) == self.rows.keys()
        assert batch.joining or batch.running
        for i in batch.joining:
            self.rows[i] = self.n_prompts[i] + self.written[i]
        for i in batch.running:
            self.rows[i] += 1
        self.most = max(self.most, sum(self.rows.values()))
        self.batches.append((tuple(batch.joining), tuple(batch.running)))
        return super().step(batch)

    def drop(self, request: int) -> None:
        del self.rows[request]
        self.dropped.append(request)


def load_of(n: int = 30, limit: int = 40, seed: int = 0) -> tuple[list[int], list[int], list[int]]:
    draws = np.random.default_rng(seed)
    return tuple(draws.integers(1, most, n).tolist() for most in (15, limit + 1, limit + 1))


# --- the scheduler


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("budget", [540, 1000, 10**6])
def test_every_text_is_complete_and_the_budget_holds(name: str, budget: int) -> None:
    n_prompts, lengths, predicted = load_of()
    requests = [Request(p, 40, told) for p, told in zip(n_prompts, predicted, strict=True)]
    worker = Watched(n_prompts, lengths)
    found = BatchScheduler(POLICIES[name], budget, 10).run(requests, worker)
    assert found.written == tuple(lengths)
    assert 10 * worker.most <= found.peak_bytes <= budget
    assert worker.rows == {}
    assert len(worker.dropped) == len(lengths) + found.n_preempted
    assert found.seconds == pytest.approx(sum(_seconds(worker)))


def _seconds(worker: Watched) -> list[float]:
    """Seconds of each step, told again from the batches alone."""
    written = [0] * len(worker.lengths)
    seconds = []
    for joining, running in worker.batches:
        read = sum(worker.n_prompts[i] + written[i] for i in joining)
        held = sum(worker.n_prompts[i] + written[i] for i in running)
        seconds.append(1.0 + 0.01 * read + 0.1 * len(running) + 0.001 * held)
        for i in (*joining, *running):
            written[i] += 1
    return seconds


def test_with_true_lengths_nobody_gives_way() -> None:
    n_prompts, lengths, _ = load_of()
    requests = [Request(p, 40, n) for p, n in zip(n_prompts, lengths, strict=True)]
    found = BatchScheduler(S3(), 1000, 10).run(requests, Watched(n_prompts, lengths))
    assert found.n_preempted == found.n_again == 0


def test_the_worst_case_never_gives_way() -> None:
    n_prompts, lengths, _ = load_of()
    requests = [Request(p, 40) for p in n_prompts]
    found = BatchScheduler(POLICIES["worst"], 1000, 10).run(requests, Watched(n_prompts, lengths))
    assert found.n_preempted == 0


def test_a_reservation_that_is_too_small_doubles_and_the_text_goes_on() -> None:
    worker = Watched([5], [20])
    found = BatchScheduler(S3(), 1000, 10).run([Request(5, 40, 3)], worker)
    # 3, 6, 12, 24 tokens: full after the third, sixth and twelfth.
    assert worker.dropped == [0, 0, 0, 0]
    assert found.n_preempted == 3
    assert found.n_again == (5 + 2) + (5 + 5) + (5 + 11)
    assert found.peak_bytes == (5 + 24) * 10
    assert [len(joining) for joining, _ in worker.batches[:8]] == [1, 0, 0, 1, 0, 0, 1, 0]


def test_a_reservation_ends_at_the_limit() -> None:
    found = BatchScheduler(S3(), 450, 10).run([Request(5, 40, 30)], Watched([5], [99]))
    assert found.written == (40,)
    assert found.peak_bytes == 450


def test_requests_join_as_soon_as_there_is_room_the_longest_first() -> None:
    worker = Watched([1, 1, 1, 1], [2, 6, 4, 3])
    requests = [Request(1, 8, n) for n in (2, 6, 4, 3)]
    BatchScheduler(S3(), 12, 1).run(requests, worker)
    # 7 of 12 for the text of 6 tokens, 5 for that of 4; then the one of 3, then the one of 2.
    assert [joining for joining, _ in worker.batches] == [(1, 2), (), (), (), (3,), (), (0,), ()]


def test_in_pages_the_newest_gives_way_and_the_oldest_never() -> None:
    worker = Watched([1, 1, 1], [9, 9, 9])
    found = BatchScheduler(Paged(), 12, 1).run([Request(1, 10)] * 3, worker)
    assert found.written == (9, 9, 9)
    assert found.n_preempted > 0
    assert worker.dropped.count(0) == 1


def test_more_room_is_never_slower_when_nothing_is_mispredicted() -> None:
    n_prompts, lengths, _ = load_of(60)
    requests = [Request(p, 40, n) for p, n in zip(n_prompts, lengths, strict=True)]
    speeds = [
        BatchScheduler(S3(), room, 10).run(requests, Watched(n_prompts, lengths)).tokens_per_s
        for room in (540, 2000, 10**6)
    ]
    assert speeds == sorted(speeds)


def test_what_is_wasted_is_what_is_reserved_without_rows() -> None:
    costs = StepCosts(1.0, 0.0, 0.0, 0.0)
    found = BatchScheduler(POLICIES["worst"], 100, 10).run(
        [Request(2, 8)], SimulatedWorker(costs, [2], [3])
    )
    assert found.wasted_bytes == pytest.approx(10 * np.mean([10 - 2, 10 - 3, 10 - 4]))
    assert (found.n_steps, found.rows, found.seconds) == (3, 1.0, 3.0)
    assert found.tokens_per_s == 1.0


def test_nothing_to_serve_takes_no_step() -> None:
    found = BatchScheduler(S3(), 100, 10).run([], SimulatedWorker(COSTS, [], []))
    assert (found.n_steps, found.written, found.seconds) == (0, (), 0.0)


def test_a_request_that_cannot_run_alone_is_refused_before_anything_runs() -> None:
    worker = Watched([5, 70], [3, 3])
    with pytest.raises(BudgetExceeded, match="request 1 may grow to 110 tokens"):
        BatchScheduler(S3(), 1000, 10).run([Request(5, 40), Request(70, 40)], worker)
    assert worker.batches == []


# --- the model


@torch.no_grad()
def alone(model: Any, ids: list[int], n_tokens: int) -> list[int]:
    """Greedy tokens, each by a plain pass over the whole text."""
    text = torch.tensor([ids])
    for _ in range(n_tokens):
        chosen = model(text, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, chosen], 1)
    return text[0, len(ids) :].tolist()


@pytest.mark.parametrize("predicted", [1, 3, 20])
def test_texts_are_those_of_one_by_one_generation(model: Any, predicted: int) -> None:
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 12, 5, 9)]
    worker = ModelWorker(model, prompts)
    probe = ModelWorker(model, [prompts[1]])
    probe.step(Batch([0], []))
    token_bytes = probe.held_bytes // 12
    requests = [Request(len(prompt), 20, predicted) for prompt in prompts]
    budget = 60 * token_bytes
    found = S3()(budget, token_bytes).run(requests, worker)
    assert worker.texts == [alone(model, prompt, 20) for prompt in prompts]
    assert (found.n_preempted > 0) == (predicted < 20)
    assert found.rows > 1
    assert 0 < worker.peak_bytes <= found.peak_bytes <= budget
    assert worker.held_bytes == 0


def test_a_text_ends_with_its_stop() -> None:
    model = llama()
    prompt = tokens(1, 6)[0].tolist()
    wanted = alone(model, prompt, 12)
    stop = wanted[7]
    worker = ModelWorker(model, [prompt], [stop])
    BatchScheduler(S3(), 1 << 30, 1).run([Request(6, 12, 2)], worker)
    assert worker.texts == [wanted[: wanted.index(stop) + 1]]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="empty"):
        ModelWorker(llama(), [[1], []])


# --- costs


def test_costs_are_found_again_from_exact_times() -> None:
    counts = [(0, 1, 10), (0, 4, 100), (0, 8, 900), (16, 0, 0), (64, 0, 0)]
    seconds = [COSTS.seconds(*row) for row in counts]
    found = StepCosts.fitted(counts, seconds)
    for name in ("pass_s", "read_s", "row_s", "held_s"):
        assert getattr(found, name) == pytest.approx(getattr(COSTS, name))


def test_no_cost_is_below_zero() -> None:
    counts = [(0, 1, 10), (0, 1, 1000), (0, 8, 80), (16, 0, 0), (64, 0, 0)]
    found = StepCosts.fitted(counts, [2.0, 1.0, 3.0, 1.1, 1.4])
    assert min(found.pass_s, found.read_s, found.row_s, found.held_s) == 0.0
    assert found.pass_s > 0


# --- lengths


def test_a_length_lies_in_the_bucket_whose_end_is_the_first_to_hold_it() -> None:
    for n, limit in ((10, 512), (3, 10), (7, 7)):
        buckets = Buckets(n, limit)
        ends = buckets.ends()
        assert ends[-1] == limit
        wanted = [min(int(np.searchsorted(ends, length)), n - 1) for length in range(1, 2 * limit)]
        assert buckets.of(np.arange(1, 2 * limit)).tolist() == wanted


def test_the_predictor_reaches_the_optimum() -> None:
    draws = np.random.default_rng(0)
    vectors = draws.normal(size=(60, 3))
    lengths = draws.integers(1, 31, 60)
    buckets = Buckets(3, 30)
    found = LengthPredictor.fitted(vectors, lengths, buckets, 0.1, 2000)
    x = np.column_stack([(vectors - found.centre) * found.scale, np.ones(60)])
    slope = x.T @ (_softmax(x @ found.weight) - np.eye(3)[buckets.of(lengths)]) / 60
    slope[:-1] += 0.1 * found.weight[:-1]
    assert np.abs(slope).max() < 1e-9


def test_lengths_that_the_vectors_tell_are_predicted() -> None:
    draws = np.random.default_rng(0)
    vectors = draws.normal(size=(300, 8))
    lengths = np.where(vectors[:, 0] > 0, 95, 5)
    predict = S3(decay=0.001).predictor(vectors[:200], lengths[:200], 100)
    wanted = np.where(lengths[200:] > 50, 100, 10)
    assert (predict(vectors[200:]) == wanted).mean() > 0.95
    assert predict.probabilities(vectors).sum(1) == pytest.approx(np.ones(300))


def test_equal_vectors_are_given_the_commonest_bucket() -> None:
    predict = S3().predictor(np.ones((5, 2)), np.array([5, 15, 15, 15, 95]), 100)
    assert predict(np.ones((1, 2))).tolist() == [20]


# --- errors


def test_bad_knobs_and_requests_are_refused() -> None:
    for bad in ({"n_buckets": 0}, {"growth": 1.0}, {"decay": -1.0}, {"n_steps": 0}):
        with pytest.raises(InvalidKnob):
            S3(**bad)
    for bad_request in ((0, 1), (1, 0), (1, 1, -1)):
        with pytest.raises(InvalidKnob):
            Request(*bad_request)
    with pytest.raises(InvalidKnob, match="token_bytes=0"):
        BatchScheduler(S3(), 10, 0)
    with pytest.raises(InvalidKnob, match="no room"):
        S3().predictor(np.ones((2, 2)), np.ones(2, int), 9)
    with pytest.raises(InvalidKnob, match="lengths"):
        S3().predictor(np.ones((2, 2)), np.ones(3, int), 90)
