"""Many requests in few bytes of keys and values: who is admitted, who joins, who gives way.

A request reserves room for its prompt and for as many new tokens as a policy says. It joins the
batch between two steps, as soon as its reservation fits, and its room is free for others after the
step in which it ends. A request that fills its reservation before its text ends is the policy's
affair: it grows where it is, or one request gives way. That one loses keys and values, keeps its
text, and waits; when it joins again, prompt and text are read in one pass.

The same code runs a model (`batch_worker.ModelWorker`) and the clock of a cost model
(`SimulatedWorker`).

Rows: a request with a prompt of p tokens and w tokens written holds p + w - 1 rows of keys and
values, as its last token has not been read yet. It reserves p + n rows for n new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from memwise.budget import Budget, BudgetLike, Ledger, readable
from memwise.errors import BudgetExceeded, InvalidKnob

_LINE = ("device", "reserved keys and values")


@dataclass(frozen=True)
class Request:
    """What is known of a request before it runs.

    Attributes:
        n_prompt: tokens of the prompt.
        limit: most new tokens.
        predicted: new tokens that are expected; policies that predict nothing do not read it.
    """

    n_prompt: int
    limit: int
    predicted: int = 0

    def __post_init__(self) -> None:
        if min(self.n_prompt, self.limit) < 1 or self.predicted < 0:
            raise InvalidKnob(
                f"{self}: give a prompt and a limit of 1 token or more, and no negative prediction"
            )


@dataclass(frozen=True)
class Batch:
    """One step: which requests join, and which go on; by index.

    Attributes:
        joining: their prompt, and what they have written before, are read in this step.
        running: one token more is read of each.
    """

    joining: Sequence[int]
    running: Sequence[int]


class Worker(Protocol):
    """What takes the steps; it keeps the texts."""

    def step(self, batch: Batch) -> tuple[float, Collection[int]]:
        """Write one token more for every request of the batch.

        Returns:
            Seconds of the step, and the requests whose text has ended with that token.
        """
        ...

    def drop(self, request: int) -> None:
        """Free keys and values of a request; what it has written stays."""
        ...


class Reserving:
    """How much is reserved, in which order requests are tried, and who gives way.

    The scheduler keeps every reservation between 1 token and the limit of its request.
    """

    def first(self, request: Request) -> int:
        """New tokens that are reserved when a request comes."""
        return request.limit

    def grown(self, n_tokens: int) -> int:
        """New tokens that are reserved after a reservation of `n_tokens` was too small."""
        return 2 * n_tokens

    def order(self, n_tokens: int) -> float:
        """Waiting requests are tried from the smallest value on, equal ones as they came.

        Args:
            n_tokens: new tokens that the request reserves.
        """
        return 0.0

    def gives_way(self, full: int, running: Sequence[int], fits: bool) -> int | None:
        """The request that gives way when a reservation is full; None when it grows where it is.

        The scheduler asks again until the answer is None or the full one itself.

        Args:
            full: the request whose reservation is full.
            running: all that run, that one included; who joined first stands first.
            fits: the grown reservation fits what is left of the budget.
        """
        return full


@dataclass(frozen=True)
class Served:
    """What a run took.

    Attributes:
        seconds: of all steps, by the worker's clock.
        written: new tokens of each request.
        n_steps: passes over the batch.
        n_preempted: how often a request had to give way.
        n_again: tokens that were read a second time because of that.
        peak_bytes: most bytes reserved at one moment.
        wasted_bytes: reserved bytes without a row in them, on average over the steps' time.
        rows: requests in a step, on average over the steps.
    """

    seconds: float
    written: tuple[int, ...]
    n_steps: int
    n_preempted: int
    n_again: int
    peak_bytes: int
    wasted_bytes: float
    rows: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all requests in a second."""
        return sum(self.written) / self.seconds


@dataclass(frozen=True)
class BatchScheduler:
    """Runs requests under a budget of keys and values.

    Attributes:
        policy: reserves and orders.
        budget: bytes that all reservations together may have at any moment.
        token_bytes: keys and values of one token in all layers.
    """

    policy: Reserving
    budget: BudgetLike
    token_bytes: int

    def __post_init__(self) -> None:
        if self.token_bytes < 1:
            raise InvalidKnob(f"token_bytes={self.token_bytes} must be 1 or more")
        Budget(self.budget)

    def run(self, requests: Sequence[Request], worker: Worker) -> Served:
        """Serve all requests to their end.

        Raises:
            BudgetExceeded: a request could not run even alone.
        """
        budget = Budget(self.budget)
        for i, request in enumerate(requests):
            need = (request.n_prompt + request.limit) * self.token_bytes
            if need > budget:
                raise BudgetExceeded(
                    f"request {i} may grow to {request.n_prompt + request.limit} tokens, "
                    f"{readable(need)}, and the budget is {readable(budget)}; raise budget= to "
                    f"{need} bytes or lower the limit"
                )
        return _Run(self.policy, budget, self.token_bytes, requests, worker).served()


class _Run:
    """State of one run."""

    def __init__(
        self, policy: Reserving, budget: Budget, token_bytes: int, requests: Sequence[Request],
        worker: Worker,
    ) -> None:  # fmt: skip
        self.policy, self.token_bytes = policy, token_bytes
        self.requests, self.worker = requests, worker
        self.ledger = Ledger({_LINE[0]: budget})
        self.reserved = [self._bounded(r, policy.first(r)) for r in requests]
        self.written = [0] * len(requests)
        self.waiting = list(range(len(requests)))
        self.running: list[int] = []
        self.n_preempted = self.n_again = 0

    def served(self) -> Served:
        seconds = wasted = 0.0
        n_steps = n_rows = 0
        while self.waiting or self.running:
            joining = self._admitted()
            step_s, ended = self.worker.step(Batch(joining, tuple(self.running)))
            self.running += joining
            for i in self.running:
                self.written[i] += 1
            n_steps += 1
            n_rows += len(self.running)
            seconds += step_s
            wasted += step_s * (self.ledger[_LINE] - self._held_bytes())
            for i in [i for i in self.running if i in ended or self._at_limit(i)]:
                self._leave(i)
            for i in tuple(self.running):
                if i in self.running and self.written[i] == self.reserved[i]:
                    self._overflow(i)
        return Served(
            seconds, tuple(self.written), n_steps, self.n_preempted, self.n_again,
            self.ledger.peak(), wasted / seconds if seconds else 0.0, n_rows / max(n_steps, 1),
        )  # fmt: skip

    def _admitted(self) -> list[int]:
        """First fit: whoever fits joins, in the policy's order."""
        joining = []
        for i in sorted(self.waiting, key=lambda i: (self.policy.order(self.reserved[i]), i)):
            n_bytes = self._bytes(i)
            if self._fits(n_bytes):
                self.ledger.add(*_LINE, n_bytes)
                self.waiting.remove(i)
                joining.append(i)
        return joining

    def _overflow(self, i: int) -> None:
        wanted = self._grown(i)
        more = (wanted - self.reserved[i]) * self.token_bytes
        while i in self.running:
            other = self.policy.gives_way(i, tuple(self.running), self._fits(more))
            if other is None:
                self.ledger.add(*_LINE, more)
                self.reserved[i] = wanted
                return
            self._preempt(other)

    def _preempt(self, i: int) -> None:
        self._leave(i)
        self.waiting.append(i)
        self.n_preempted += 1
        self.n_again += self.requests[i].n_prompt + self.written[i] - 1
        if self.written[i] == self.reserved[i]:
            self.reserved[i] = self._grown(i)

    def _leave(self, i: int) -> None:
        self.worker.drop(i)
        self.running.remove(i)
        self.ledger.release(*_LINE, self._bytes(i))

    def _grown(self, i: int) -> int:
        n_tokens = max(self.policy.grown(self.reserved[i]), self.reserved[i] + 1)
        return self._bounded(self.requests[i], n_tokens)

    @staticmethod
    def _bounded(request: Request, n_tokens: int) -> int:
        return min(max(n_tokens, 1), request.limit)

    def _at_limit(self, i: int) -> bool:
        return self.written[i] == self.requests[i].limit

    def _bytes(self, i: int) -> int:
        return (self.requests[i].n_prompt + self.reserved[i]) * self.token_bytes

    def _fits(self, n_bytes: int) -> bool:
        left = self.ledger.left(_LINE[0])
        return left is None or n_bytes <= left

    def _held_bytes(self) -> int:
        rows = sum(self.requests[i].n_prompt + self.written[i] - 1 for i in self.running)
        return rows * self.token_bytes


# --- the simulated clock


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step, as a sum.

    Attributes:
        pass_s: of every step, such as reading the weights.
        read_s: of every token of those that join.
        row_s: of every request that goes on.
        held_s: of every row of keys and values of those that go on.
    """

    pass_s: float
    read_s: float
    row_s: float
    held_s: float

    @classmethod
    def fitted(
        cls, counts: NDArray[np.float64] | Sequence[Sequence[float]], seconds: Sequence[float]
    ) -> StepCosts:
        """Costs of least relative error, none below 0.

        Args:
            counts: of each measured step (n, 3): tokens read, requests that go on, their rows.
            seconds: that each of them took (n,).
        """
        measured = np.asarray(counts, float).reshape(len(seconds), 3)
        table = np.column_stack([np.ones(len(measured)), measured])
        table /= np.asarray(seconds, float)[:, None]
        free, found = list(range(4)), np.zeros(4)
        while free:
            part = np.linalg.lstsq(table[:, free], np.ones(len(table)), rcond=None)[0]
            if (part >= 0).all():
                found[free] = part
                break
            del free[int(part.argmin())]
        return cls(*map(float, found))

    def seconds(self, n_read: int, n_rows: int, n_held: int) -> float:
        """Of a step with so many tokens read, requests that go on, and rows that these hold."""
        parts = zip(fields(self), (1, n_read, n_rows, n_held), strict=True)
        return float(sum(getattr(self, field.name) * n for field, n in parts))


class SimulatedWorker:
    """Takes time by a cost model and writes as many tokens as each text is known to have.

    Args:
        costs: of a step.
        n_prompts: tokens of each prompt.
        lengths: tokens of each text, 1 or more.
    """

    def __init__(self, costs: StepCosts, n_prompts: Sequence[int], lengths: Sequence[int]) -> None:
        self.costs, self.n_prompts, self.lengths = costs, n_prompts, lengths
        self.written = [0] * len(lengths)

    def step(self, batch: Batch) -> tuple[float, Collection[int]]:
        """Count a token for each request; the seconds are those of the cost model."""
        n_read = sum(self.n_prompts[i] + self.written[i] for i in batch.joining)
        n_held = sum(self.n_prompts[i] + self.written[i] for i in batch.running)
        taken = (*batch.joining, *batch.running)
        for i in taken:
            self.written[i] += 1
        ended = {i for i in taken if self.written[i] == self.lengths[i]}
        return self.costs.seconds(n_read, len(batch.running), n_held), ended

    def drop(self, request: int) -> None:
        """Nothing is held."""
