"""A projection that moves a little at every step (Online Subspace Descent, arXiv 2408.12857)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memwise.catalogue import Card
from memwise.codec.th import Packed, codec
from memwise.errors import InvalidKnob
from memwise.train.engine.optimizer import OptimizerPolicy
from memwise.train.engine.subspace import Subspace, fits, leading

Tensor = torch.Tensor
_MOMENTS = {"basis_avg": "dyn8/group256", "basis_avg_sq": "linear8/group256"}
_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Moving(Subspace):
    """A basis P (m, r) that descends |G - P P^T G|^2 + orthogonality |P^T P - I|^2 by Adam.

    Attributes:
        rate: step size of the basis.
        orthogonality: weight of the second term.
    """

    rate: float = 0.005
    orthogonality: float = 0.1

    def fit(self, grad: Tensor, state: dict[str, Any], draws: torch.Generator) -> None:
        if not self.has_basis(state):
            self.keep(leading(grad, self.rank, draws), state)

    def follow(self, grad: Tensor, state: dict[str, Any], draws: torch.Generator) -> None:
        basis, t = self.basis(state), state["step"]
        short = grad.float() if grad.shape[0] <= grad.shape[1] else grad.float().T
        seen = short @ (short.T @ basis) / short.square().sum().clamp(min=1e-30)  # G G^T P, (m, r)
        gram = basis.T @ basis
        # d/dP of tr(A) - 2 tr(P^T A P) + tr(P^T P P^T A P), A = G G^T / |G|^2
        slope = -4 * seen + 2 * basis @ (basis.T @ seen) + 2 * seen @ gram
        slope += 4 * self.orthogonality * (basis @ gram - basis)
        m, v = (self._moment(state, name, basis) for name in _MOMENTS)
        m.lerp_(slope, 1 - _BETAS[0])
        v.mul_(_BETAS[1]).addcmul_(slope, slope, value=1 - _BETAS[1])
        size = (v / (1 - _BETAS[1] ** t)).sqrt_().add_(_EPS)
        self.keep(basis - self.rate / (1 - _BETAS[0] ** t) * m / size, state)
        for name, x in zip(_MOMENTS, (m, v), strict=True):
            arrays = codec(_MOMENTS[name]).encode(x).arrays
            state |= {f"{name}.{part}": array for part, array in arrays.items()}

    def _moment(self, state: dict[str, Any], name: str, like: Tensor) -> Tensor:
        arrays = {
            k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")
        }
        if not arrays:
            return torch.zeros_like(like)
        packed = Packed(_MOMENTS[name], tuple(like.shape), torch.float32, arrays)
        return codec(_MOMENTS[name]).decode(packed)


@dataclass(frozen=True)
class OnlineSubspaceDescent(OptimizerPolicy):
    """Keep both moments of a gradient's projection, the basis, and its own moments in 8 bits.

    The basis starts at the leading singular vectors of the first gradient and then takes one step
    of its own descent after each step of the weights. What is dropped is the part of each gradient
    outside of it. The moments of the projection are carried on unchanged.

    Attributes:
        rank: columns of the basis.
        rate: step size of the basis.
        scale: factor of the steps in the subspace.

    Raises:
        InvalidKnob: the rank is below 1.

    Note:
        The second moment of the basis lies on levels without zero.
    """

    rank: int = 64
    rate: float = 0.005
    scale: float = 0.25

    card = Card(
        paper=166,
        claim="lower perplexity than GaLore for LLaMA 60M to 7B, no SVD after the first step",
        check="low_rank_gradients",
        baseline="galore",
        better="lower",
        margin=0.0,
        requires=("torch",),
    )

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidKnob(f"rank={self.rank}: give at least 1")

    def subspace(self, shape: Sequence[int]) -> Moving | None:
        return Moving(self.rank, self.scale, rate=self.rate) if fits(shape, self.rank) else None
