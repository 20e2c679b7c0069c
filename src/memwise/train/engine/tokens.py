"""Token subsets: what is left out is never computed, so it leaves nothing behind to be kept.

A mask keeps all bytes; gathering the kept tokens into a shorter sequence frees them. The kept
tokens stay in their order and bring their positions along.

Shapes: B batch, T tokens, K kept tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class TokenGate:
    """Which tokens of each sequence go on; the others skip what runs between gather and scatter.

    Attributes:
        kept: (B, K) int64, positions of the kept tokens, ascending.
    """

    kept: Tensor

    @classmethod
    def random(cls, shape: tuple[int, int], n_kept: int, draws: torch.Generator) -> TokenGate:
        """Keep `n_kept` tokens of each of B sequences of T tokens, drawn apart for each.

        Raises:
            InvalidKnob: fewer than one or more than T tokens would be kept.
        """
        return cls.best(torch.rand(shape, generator=draws, device=draws.device), n_kept)

    @classmethod
    def best(cls, scores: Tensor, n_kept: int) -> TokenGate:  # (B, T)
        """Keep the `n_kept` tokens of highest score.

        Raises:
            InvalidKnob: fewer than one or more than T tokens would be kept.
        """
        if not 1 <= n_kept <= scores.shape[1]:
            raise InvalidKnob(
                f"n_kept={n_kept} of {scores.shape[1]} tokens: keep at least 1, at most all"
            )
        return cls(scores.topk(n_kept, dim=1).indices.sort(dim=1).values)

    def gather(self, x: Tensor) -> Tensor:  # (B, T, ...) -> (B, K, ...)
        """The kept tokens of `x`; of positions (B, T) too."""
        rows = torch.arange(len(self.kept), device=self.kept.device)
        return x[rows[:, None], self.kept]

    def scatter(self, x: Tensor, part: Tensor) -> Tensor:  # (B, T, D), (B, K, D) -> (B, T, D)
        """`x` with `part` in place of the kept tokens; the others pass through."""
        index = self.kept[:, :, None].expand_as(part)
        return x.scatter(1, index, part.to(x.dtype))

    def around(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:  # (B, T, D)
        """`fn` of the kept tokens, the residual path for all others."""
        return self.scatter(x, fn(self.gather(x)))
