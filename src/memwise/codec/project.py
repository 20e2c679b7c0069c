"""Projections: fewer coordinates of a matrix instead of fewer bits of each.

A projection M (n, k) has k < n columns. A drawn one is never stored: its seed is, and its rows are
made again in blocks, bit for bit the same, wherever they are needed. A leading one is stored, and
is the best of its rank for the matrix that it was found in.

Shapes: n coordinates before, k after, m rows or columns that ride along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memwise.errors import InvalidKnob

DENSE = ("gaussian", "rademacher")
KINDS = (*DENSE, "rows")

_AT_ONCE = 1 << 18  # numbers of a drawn matrix: 1 MiB
_SPARE_PROBES = 8


class Projection(Protocol):
    """A matrix M (n, k), in whatever form it is kept."""

    def down(self, x: Tensor) -> Tensor:
        """M^T x, (k, m), for x (n, m)."""

    def across(self, x: Tensor) -> Tensor:
        """X M, (m, k), for x (m, n)."""

    def add_back(self, out: Tensor, y: Tensor, scale: float = 1.0) -> None:
        """Add scale * y M^T, for y (m, k), to out (m, n) in place."""


@dataclass(frozen=True)
class Drawn:
    """A random matrix M (n, k) with E[M M^T] = 1, so that M M^T x is right in the mean.

    Draws are float32 and depend on the device's kind; sums are taken in float32 at least.

    Attributes:
        n: coordinates before.
        k: coordinates after.
        seed: of the draws.
        kind: "gaussian" or "rademacher" (signs), of variance 1 / k; or "rows" (k of the n
            coordinates, each as likely, times sqrt(n / k)).

    Raises:
        InvalidKnob: there is no such kind, or k is not in [1, n].
    """

    n: int
    k: int
    seed: int
    kind: str = "gaussian"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidKnob(f"projection {self.kind!r}: use one of {', '.join(KINDS)}")
        if not 1 <= self.k <= self.n:
            raise InvalidKnob(f"a projection of {self.n} coordinates on {self.k}: take 1 to n")

    def down(self, x: Tensor) -> Tensor:
        """M^T x, (k, m), for x (n, m)."""
        if self.kind == "rows":
            return x[self._chosen(x.device)] * math.sqrt(self.n / self.k)
        out = x.new_zeros((self.k, x.shape[1]), dtype=_wide(x))
        for rows, block in self._blocks(x.device):
            out.addmm_(block.to(out.dtype).t(), x[rows].to(out.dtype))
        return out.div_(math.sqrt(self.k)).to(x.dtype)

    def across(self, x: Tensor) -> Tensor:
        """X M, (m, k), for x (m, n)."""
        if self.kind == "rows":
            return x[:, self._chosen(x.device)] * math.sqrt(self.n / self.k)
        out = x.new_zeros((len(x), self.k), dtype=_wide(x))
        for rows, block in self._blocks(x.device):
            out.addmm_(x[:, rows].to(out.dtype), block.to(out.dtype))
        return out.div_(math.sqrt(self.k)).to(x.dtype)

    def add_back(self, out: Tensor, y: Tensor, scale: float = 1.0) -> None:
        """Add scale * y M^T, for y (m, k), to out (m, n) in place."""
        if self.kind == "rows":
            factor = scale * math.sqrt(self.n / self.k)
            out.index_add_(1, self._chosen(out.device), y.to(out.dtype), alpha=factor)
            return
        for rows, block in self._blocks(out.device):
            _add_product(out[:, rows], y, block, scale / math.sqrt(self.k))

    def _blocks(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows (r, k) of M sqrt(k); one after another, as they share their draws."""
        draws = torch.Generator(device).manual_seed(self.seed)
        step = max(1, _AT_ONCE // self.k)
        for first in range(0, self.n, step):
            rows = slice(first, min(self.n, first + step))
            shape = rows.stop - first, self.k
            block = torch.empty(shape, dtype=torch.float32, device=device)
            if self.kind == "gaussian":
                block.normal_(generator=draws)
            else:
                block.random_(0, 2, generator=draws).mul_(2).sub_(1)
            yield rows, block

    def _chosen(self, device: torch.device) -> Tensor:
        draws = torch.Generator(device).manual_seed(self.seed)
        return torch.randperm(self.n, generator=draws, device=device)[: self.k]


@dataclass(frozen=True)
class Leading:
    """The leading singular directions of a matrix; M M^T x is its nearest of rank k.

    Not right in the mean: what lies outside of the directions is gone.

    Attributes:
        basis: (n, k) with orthonormal columns.
    """

    basis: Tensor

    @classmethod
    def of(cls, matrix: Tensor, k: int, draws: torch.Generator) -> Leading:
        """The k leading left singular vectors of a matrix (n, m)."""
        return cls(leading(matrix, k, draws))

    def down(self, x: Tensor) -> Tensor:
        """M^T x, (k, m), for x (n, m)."""
        return self.basis.to(x.dtype).T @ x

    def across(self, x: Tensor) -> Tensor:
        """X M, (m, k), for x (m, n)."""
        return x @ self.basis.to(x.dtype)

    def add_back(self, out: Tensor, y: Tensor, scale: float = 1.0) -> None:
        """Add scale * y M^T, for y (m, k), to out (m, n) in place."""
        _add_product(out, y, self.basis, scale)


def leading(matrix: Tensor, k: int, draws: torch.Generator, n_rounds: int = 2) -> Tensor:
    """Orthonormal basis (n, k), in falling order, of the leading left singular vectors of (n, m).

    A randomized range finder with power iterations (Halko et al. 2011, arXiv 0909.4061, algorithm
    4.4): a full SVD costs more time and allocates where no counter of torch sees it.
    """
    matrix = matrix.to(_wide(matrix))
    n, m = matrix.shape
    n_probes = min(n, k + _SPARE_PROBES)
    probes = torch.randn(m, n_probes, generator=draws, device=matrix.device)
    basis, _ = torch.linalg.qr(matrix @ probes.to(matrix.dtype))
    for _ in range(n_rounds):
        basis, _ = torch.linalg.qr(matrix @ (matrix.T @ basis))
    low = basis.T @ matrix
    values, vectors = torch.linalg.eigh(low @ low.T)
    found: Tensor = basis @ vectors[:, values.argsort(descending=True)[:k]]
    return found


def _add_product(out: Tensor, y: Tensor, rows: Tensor, scale: float) -> None:
    """Add scale * y rows^T to out in place; where it is half as wide, a few of its rows at once."""
    wide = _wide(out)
    rows, step = rows.to(wide).t(), max(1, _AT_ONCE // out.shape[1])
    if out.dtype == wide:
        out.addmm_(y.to(wide), rows, alpha=scale)
        return
    for first in range(0, len(out), step):
        part = out[first : first + step]
        some = y[first : first + step].to(wide)
        part.copy_(torch.addmm(part.to(wide), some, rows, alpha=scale))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
