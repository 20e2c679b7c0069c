"""Subspaces in which an optimizer sees the gradient of a matrix: rank r instead of its short side.

A matrix G (n, d) is projected on its shorter side by a basis P with r columns: R = P^T G, (r, d),
where n <= d, and R = G P, (n, r), where it is taller. The rule's states are as small as R, and what
the rule would add to a weight there is carried back: W += scale * P D.

Shapes: G, W (n, d); P (min(n, d), r); R, D (r, d) or (n, r).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from memwise.codec import project
from memwise.codec.spec import parse
from memwise.codec.th import Codec, Packed
from memwise.codec.th_rows import Scratch
from memwise.train.engine.weights import Weights, rows_a_block

Tensor: TypeAlias = torch.Tensor

ROWS = 1 << 16  # coordinates of a weight that are moved at once
_BASIS = "basis"


@dataclass(frozen=True)
class Subspace:
    """Basis and what is kept of it; a method overrides `fit`, or `follow`, or both.

    Attributes:
        rank: columns of the basis.
        scale: factor of what is carried back.
        codec: name of the codec that the basis is stored in; empty for float32.
    """

    rank: int
    scale: float = 1.0
    codec: str = ""

    def shape(self, plane: tuple[int, int]) -> tuple[int, int]:
        """Shape of what the rule sees of a matrix (n, d)."""
        n, d = plane
        return (self.rank, d) if n <= d else (n, self.rank)

    def fit(self, grad: Tensor, state: dict[str, Any], draws: torch.Generator) -> None:
        """Choose the basis before a step, where it is time to: `keep` it."""
        raise NotImplementedError

    def follow(self, grad: Tensor, state: dict[str, Any], draws: torch.Generator) -> None:
        """Move the basis after a step; the base leaves it."""

    def down(self, grad: Tensor, state: dict[str, Any], draws: torch.Generator) -> Tensor:
        """The gradient in the subspace, float32."""
        self.fit(grad, state, draws)
        basis = self.basis(state).to(grad.dtype)
        low = basis.T @ grad if _is_wide(grad) else grad @ basis
        return low.float()

    def up(
        self, delta: Tensor, weight: Weights, state: dict[str, Any], fade: float,
        draws: torch.Generator,
    ) -> None:  # fmt: skip
        """Fade the weight and add what was found in the subspace, a few rows at a time."""
        basis, (n, d) = self.basis(state), weight.shape
        left, right = (basis, delta) if n <= d else (delta, basis.T)
        step = rows_a_block(weight.shape, [weight.group], ROWS)
        scratch = Scratch()
        if not weight.in_place:
            scratch.lay_out(1, step, d, weight.device)
        for first in range(0, n, step):
            rows = slice(first, min(n, first + step))
            held = weight.bind(scratch, 0, rows.stop - first)
            block = held.decode(first)
            move = (left[rows] @ right).mul_(self.scale)
            block.copy_(move.add_(block, alpha=fade))
            held.encode(first, draws)

    def keep(self, basis: Tensor, state: dict[str, Any]) -> None:
        """Store the basis."""
        if not self.codec:
            state[_BASIS] = basis
            return
        packed = Codec(parse(self.codec)).encode(basis)
        state |= {f"{_BASIS}.{part}": array for part, array in packed.arrays.items()}
        state[f"{_BASIS}.rows"] = len(basis)

    def basis(self, state: dict[str, Any]) -> Tensor:
        """The stored basis, float32."""
        if not self.codec:
            found: Tensor = state[_BASIS]
            return found
        prefix = f"{_BASIS}."
        arrays = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix) and torch.is_tensor(value)
        }
        shape = (state[f"{_BASIS}.rows"], self.rank)
        return Codec(parse(self.codec)).decode(Packed(self.codec, shape, torch.float32, arrays))

    def has_basis(self, state: dict[str, Any]) -> bool:
        """Whether one was kept."""
        return any(key.startswith(_BASIS) for key in state)


@dataclass(frozen=True)
class Refitted(Subspace):
    """The leading singular vectors of a gradient, found again every `gap` steps.

    Attributes:
        gap: steps from fit to fit.
    """

    gap: int = 200

    def fit(self, grad: Tensor, state: dict[str, Any], draws: torch.Generator) -> None:
        """Take the vectors of this step's gradient, where it is time to."""
        if (state["step"] - 1) % self.gap == 0:
            self.keep(leading(grad, self.rank, draws), state)


def leading(grad: Tensor, rank: int, draws: torch.Generator) -> Tensor:
    """Orthonormal basis (min(n, d), rank) of the leading singular vectors on the short side."""
    short = grad if _is_wide(grad) else grad.T
    return project.leading(short.float(), rank, draws)


def overlap(old: Tensor, new: Tensor) -> float:
    """Share of one subspace that lies in the other, in [0, 1], whatever the signs and order."""
    return float((old.T @ new).square().sum() / old.shape[1])


def fits(shape: Sequence[int], rank: int) -> bool:
    """Whether a matrix of this shape is larger than its subspace."""
    return len(shape) == 2 and min(shape) > rank


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]
