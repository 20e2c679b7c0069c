"""GaLore on weights, basis and moments that lie in few bits (Q-GaLore, arXiv 2407.08296)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.train.engine.adapted import Target
from memwise.train.engine.optimizer import OptimizerPolicy
from memwise.train.engine.subspace import Subspace, fits, leading, overlap
from memwise.train.engine.weights import StoredLinear, store_weights

Tensor = torch.Tensor
_LEAST_SIZE = 4096  # states with fewer numbers stay in float32


@dataclass(frozen=True)
class Lazy(Subspace):
    """Leading singular vectors, found again the more rarely the less they have turned.

    Attributes:
        gap: steps from fit to fit, at first.
        patience: comparisons of old and new whose mean counts.
        threshold: mean from which on the gap of this matrix doubles.
    """

    gap: int = 200
    patience: int = 5
    threshold: float = 0.4

    def fit(self, grad: Tensor, state: dict[str, Any], draws: torch.Generator) -> None:
        if state["step"] < state.get("due", 1):
            return
        new = leading(grad, self.rank, draws)
        gap, alike = state.get("gap", self.gap), state.get("alike", [])
        if self.has_basis(state):
            chance = self.rank / len(new)  # two random subspaces share as much
            share = overlap(self.basis(state), new)
            alike = [*alike, (share - chance) / (1 - chance)][-self.patience :]
            if len(alike) == self.patience and sum(alike) / len(alike) >= self.threshold:
                gap *= 2
        self.keep(new, state)
        due, n_fits = state["step"] + gap, state.get("n_fits", 0) + 1
        state |= {"gap": gap, "alike": alike, "due": due, "n_fits": n_fits}


@dataclass(frozen=True)
class QGaLore(OptimizerPolicy):
    """Keep weights and moments in eight bits, and the basis that gradients are seen in in four.

    Each matrix is moved in a subspace of its gradient, which is found again every `gap` steps, or
    twice as rarely each time it is seen to stay. `store` puts a model's weights into codes; there
    is no float copy, and a step rounds at random to one of the two levels around, so that what is
    far smaller than a level still moves the weight in the mean. What is dropped, at every step: the
    part of the gradient outside of the subspace, and what the codes cannot hold.

    Attributes:
        rank: columns of the basis.
        gap: steps from fit to fit, at first.
        scale: factor of the steps in the subspace.
        patience: comparisons of old and new basis that the decision to wait longer rests on.
        threshold: their mean, 0 by chance and 1 for the same subspace, from which on gaps double.
        weight_codec: codec of stored weights.
        basis_codec: codec of the basis.

    Raises:
        InvalidKnob: rank, gap or patience is below 1.

    Note:
        Subspaces are compared whole: the sign of a single vector, which the paper's cosine of the
        leading vectors depends on, means nothing.
    """

    rank: int = 64
    gap: int = 200
    scale: float = 0.25
    patience: int = 5
    threshold: float = 0.4
    weight_codec: str = "uint8/group256/stochastic"
    basis_codec: str = "uint4/group256"

    card = Card(
        paper=65,
        claim="LLaMA-7B from scratch in 16 GB; over 60 % fewer SVDs than GaLore at no loss",
        check="quantized_weights",
        baseline="galore",
        better="lower",
        margin=0.0,
        requires=("torch",),
    )

    def __post_init__(self) -> None:
        if min(self.rank, self.gap, self.patience) < 1:
            raise InvalidKnob(
                f"rank={self.rank}, gap={self.gap}, patience={self.patience}: give at least 1"
            )

    def store(self, model: nn.Module, target: Target = None) -> dict[str, StoredLinear]:
        """Put the linear maps of a model into codes, in place, before the optimizer is built."""
        return store_weights(model, self.weight_codec, target)

    def codecs(self, shape: Sequence[int]) -> Mapping[str, str]:
        if math.prod(shape) < _LEAST_SIZE:
            return {}
        return {"exp_avg": "dyn8/group256", "exp_avg_sq": "linear8/group256"}

    def subspace(self, shape: Sequence[int]) -> Lazy | None:
        if not fits(shape, self.rank):
            return None
        return Lazy(
            self.rank, self.scale, self.basis_codec, self.gap, self.patience, self.threshold
        )
