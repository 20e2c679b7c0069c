"""S3: room for as many tokens as a request is predicted to write, and a second try where not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memwise.budget import BudgetLike
from memwise.catalogue import Card
from memwise.context.engine.lengths import Buckets, LengthPredictor
from memwise.context.engine.scheduler import BatchScheduler, Request, Reserving
from memwise.errors import InvalidKnob


@dataclass(frozen=True)
class S3(Reserving):
    """Keep room for the predicted tokens; drop and read again the rows of texts that outgrow it.

    Attributes:
        n_buckets: equal ranges of lengths that the predictor tells apart.
        growth: what a reservation is multiplied by when it was too small.
        decay: weight of the squared norm when the predictor is fitted.
        n_steps: of the predictor's fit.

    Raises:
        InvalidKnob: no bucket or step, no growth, or a negative decay.

    Note:
        The predictor is a linear classifier on vectors that are given, where the paper fine-tunes
        DistilBERT. It is fitted anew by a call to `predictor`; nothing collects mispredictions.
        A text that gave way keeps what it has written, and only its rows are computed again.
    """

    card = Card(
        paper=125,
        claim="up to 6.49 times the throughput of reserving for the worst case",
        check="batch_admission",
        baseline="worst_case_reservation",
        better="higher",
        margin=0.5,
        negative="1.6 times the worst case's throughput, and as much with the predictions of other "
        "prompts: signatures say nothing of a docstring's length, and trying again does the work",
    )

    n_buckets: int = 10
    growth: float = 2.0
    decay: float = 1.0
    n_steps: int = 300

    def __post_init__(self) -> None:
        if min(self.n_buckets, self.n_steps) < 1:
            raise InvalidKnob(f"n_buckets={self.n_buckets}, n_steps={self.n_steps}: give 1 or more")
        if self.growth <= 1 or self.decay < 0:
            raise InvalidKnob(
                f"growth={self.growth}, decay={self.decay}: give a growth above 1 and no negative "
                "decay"
            )

    def __call__(self, budget: BudgetLike, token_bytes: int) -> BatchScheduler:
        """A scheduler under a budget of keys and values.

        Args:
            budget: in bytes.
            token_bytes: keys and values of one token in all layers.
        """
        return BatchScheduler(self, budget, token_bytes)

    def predictor(
        self, vectors: NDArray[np.float64], lengths: NDArray[np.int64], limit: int
    ) -> LengthPredictor:
        """Learn lengths from prompts that were answered.

        Args:
            vectors: of the prompts (n, D), from any embedder.
            lengths: of the answers (n,), in tokens.
            limit: most new tokens of a request.
        """
        if limit < self.n_buckets:
            raise InvalidKnob(f"limit={limit} has no room for n_buckets={self.n_buckets}")
        buckets = Buckets(self.n_buckets, limit)
        return LengthPredictor.fitted(vectors, lengths, buckets, self.decay, self.n_steps)

    def first(self, request: Request) -> int:
        return request.predicted

    def grown(self, n_tokens: int) -> int:
        return int(np.ceil(self.growth * n_tokens))

    def order(self, n_tokens: int) -> float:
        # First fit decreasing: long texts are the hardest to place.
        return -n_tokens
