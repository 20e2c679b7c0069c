"""How long the answer to a prompt will be: buckets of lengths, chosen from the prompt's vector.

Multinomial logistic regression, fitted by accelerated gradient descent from zero: no seed.

Shapes: n prompts, D width of a vector, C buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memwise.errors import InvalidKnob

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Buckets:
    """Equal ranges of lengths, the last one ending at the limit.

    Attributes:
        n: of them.
        limit: longest length, in tokens.
    """

    n: int
    limit: int

    def of(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bucket of each length (n,), the first for lengths of 1 and up, the last beyond it."""
        found = -(-np.asarray(lengths, np.int64) * self.n // self.limit) - 1
        return np.clip(found, 0, self.n - 1)

    def ends(self) -> NDArray[np.int64]:
        """Longest length of each bucket (C,), in tokens."""
        return (np.arange(1, self.n + 1) * self.limit) // self.n


@dataclass(frozen=True, eq=False)
class LengthPredictor:
    """Chooses a bucket for a vector.

    Attributes:
        buckets: of lengths.
        centre: of the vectors (D,).
        weight: (D + 1, C), the last row for the constant.
        scale: what centred vectors are multiplied by.
    """

    buckets: Buckets
    centre: Values
    weight: Values
    scale: float

    @classmethod
    def fitted(
        cls, vectors: Values, lengths: NDArray[np.int64], buckets: Buckets, decay: float,
        n_steps: int,
    ) -> LengthPredictor:  # fmt: skip
        """Fit to prompts whose lengths are known.

        Args:
            vectors: (n, D).
            lengths: in tokens (n,).
            buckets: of lengths.
            decay: weight of the squared norm; the constants are free.
            n_steps: of descent.

        Raises:
            InvalidKnob: shapes do not belong together, or nothing is there.
        """
        x = np.asarray(vectors, float)
        if x.ndim != 2 or not x.size or len(x) != len(lengths):
            raise InvalidKnob(
                f"vectors {x.shape} and {len(lengths)} lengths: give vectors (n, D), n >= 1, and "
                "a length for each"
            )
        centre = x.mean(0)
        scale = 1.0 / max(float(np.sqrt(((x - centre) ** 2).mean())), 1e-12)
        x = _with_constant((x - centre) * scale)
        weight = _descent(x, np.eye(buckets.n)[buckets.of(lengths)], decay, n_steps)
        return cls(buckets, centre, weight, scale)

    def probabilities(self, vectors: Values) -> Values:
        """How likely each bucket is (n, C)."""
        x = (np.asarray(vectors, float) - self.centre) * self.scale
        return _softmax(_with_constant(x) @ self.weight)

    def __call__(self, vectors: Values) -> NDArray[np.int64]:
        """Longest length of the likeliest bucket of each vector (n,), in tokens."""
        return self.buckets.ends()[self.probabilities(vectors).argmax(1)]


def _descent(x: Values, wanted: Values, decay: float, n_steps: int) -> Values:
    """Nesterov's accelerated gradient with the step that the curvature allows."""
    penalty = np.full((x.shape[1], 1), decay)
    penalty[-1] = 0.0
    # The softmax's curvature is at most 1/2.
    steepest = 0.5 * float(np.linalg.eigvalsh(x.T @ x / len(x))[-1]) + decay
    weight = ahead = np.zeros((x.shape[1], wanted.shape[1]))
    for k in range(n_steps):
        slope = x.T @ (_softmax(x @ ahead) - wanted) / len(x) + penalty * ahead
        after = ahead - slope / steepest
        ahead = after + k / (k + 3) * (after - weight)
        weight = after
    return weight


def _softmax(logits: Values) -> Values:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True))


def _with_constant(x: Values) -> Values:
    return np.column_stack([x, np.ones(len(x))])
