"""Step functions in place of derivatives: which of a few intervals an input lies in says enough.

The derivative f' of an activation function is replaced by a function that is constant on each of
2^b intervals. Borders minimise the squared error, found by dynamic programming over a grid:

    D[k][j] = min_i D[k-1][i] + cost(i, j)

where cost(i, j) is the error of the best constant on [x_i, x_j]: its level is the mean of f' there,
(f(x_j) - f(x_i)) / (x_j - x_i), so two running sums give every cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from memwise.errors import InvalidKnob

REACH = 10.0  # f' is fitted on [-REACH, REACH]; beyond, the outermost levels go on
N_CELLS = 640
_FINE = 8  # points of the midpoint rule in each cell

Function = Callable[[Tensor], Tensor]
Settings = tuple[float | str, ...]

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "GELU": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "SiLU": F.silu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Softplus": lambda x, beta=1.0, threshold=20.0: F.softplus(x, beta, threshold),
    "ELU": lambda x, alpha=1.0: F.elu(x, alpha),
    "Mish": F.mish,
}


@dataclass(frozen=True)
class Steps:
    """A step function: `levels[i]` between `borders[i - 1]` and `borders[i]`.

    Attributes:
        borders: ascending; a number on a border belongs to the interval below it.
        levels: one more than there are borders.
    """

    borders: tuple[float, ...]
    levels: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Bits that name an interval."""
        return max(1, (len(self.levels) - 1).bit_length())


@lru_cache(maxsize=128)
def steps(name: str, settings: Settings, bits: int) -> Steps:
    """The best 2^bits intervals for the derivative of a function of `FUNCTIONS`.

    Args:
        name: class of the module.
        settings: what `FUNCTIONS[name]` takes after x.
        bits: 1 to 4.

    Raises:
        InvalidKnob: no such function, or bits out of range.
    """
    if name not in FUNCTIONS:
        raise InvalidKnob(f"no table for {name!r}; there is one for {', '.join(FUNCTIONS)}")
    if bits not in (1, 2, 3, 4):
        raise InvalidKnob(f"bits={bits!r}: an interval takes 1 to 4 bits")
    cells = Cells.of(lambda x: FUNCTIONS[name](x, *settings))
    cuts = best_cuts(cells.costs(), 1 << bits)
    ends = [0, *cuts, len(cells.x) - 1]
    levels = [cells.level(i, j) for i, j in pairwise(ends)]
    return Steps(tuple(cells.x[cuts].tolist()), tuple(levels))


@dataclass(frozen=True)
class Cells:
    """A grid with running integrals of f' and of its square, all (N_CELLS + 1,) float64."""

    x: NDArray[np.float64]
    first: NDArray[np.float64]
    second: NDArray[np.float64]

    @classmethod
    def of(cls, f: Function, n_cells: int = N_CELLS) -> Cells:
        """The cells of f on [-REACH, REACH]."""
        x = np.linspace(-REACH, REACH, n_cells + 1)
        width = 2 * REACH / n_cells
        inside = (np.arange(_FINE) + 0.5) / _FINE * width
        slope = _slope(f, (x[:-1, None] + inside).ravel()).reshape(n_cells, _FINE)
        square = (slope**2).mean(1) * width
        # The same rule for both integrals: a constant slope then costs exactly nothing.
        return cls(x, _running(slope.mean(1) * width), _running(square))

    def level(self, i: int, j: int) -> float:
        """Mean of f' on [x_i, x_j]."""
        return float((self.first[j] - self.first[i]) / (self.x[j] - self.x[i]))

    def costs(self) -> NDArray[np.float64]:
        """Squared error of the best constant on [x_i, x_j]; infinite for j <= i."""
        length = self.x[None] - self.x[:, None]
        first = self.first[None] - self.first[:, None]
        second = self.second[None] - self.second[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            cost = second - first**2 / length
        return np.where(length > 0, np.maximum(cost, 0.0), np.inf)


def best_cuts(costs: NDArray[np.float64], n: int) -> list[int]:
    """Where to cut the grid into n intervals at the least sum of costs."""
    best, before = costs[0], []
    for _ in range(n - 1):
        total = best[:, None] + costs
        before.append(total.argmin(0))
        best = total.min(0)
    cuts = [costs.shape[1] - 1]
    for choice in reversed(before):
        cuts.append(int(choice[cuts[-1]]))
    return cuts[:0:-1]


def _slope(f: Function, at: NDArray[np.float64]) -> NDArray[np.float64]:
    with torch.enable_grad():
        x = torch.from_numpy(at).requires_grad_()
        (slope,) = torch.autograd.grad(f(x).sum(), x)
    return slope.numpy()


def _running(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(parts)])
