"""Levels of the table grids, as plain numbers in rising order; free of any array library."""

from fractions import Fraction
from functools import cache

# Quantiles of a standard normal, each half averaged on its own so that zero is a level, divided by
# the largest (QLoRA, arXiv 2305.14314, appendix E).
NF4 = tuple(
    float(level)
    for level in """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453
    -0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0
    0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
    """.split()
)


@cache
def levels(grid: str) -> tuple[float, ...]:
    """The levels of nf4, dyn8, dyn4, linear8 or linear4; every backend rounds them to float32."""
    if grid == "nf4":
        return NF4
    n_bits = int(grid[-1])
    return dynamic(n_bits) if grid.startswith("dyn") else linear(n_bits)


def linear(n_bits: int) -> tuple[float, ...]:
    """Even steps up to 1 without zero: an optimizer's second moment divides by its root."""
    return tuple((i + 1) / 2**n_bits for i in range(2**n_bits))


def dynamic(n_bits: int) -> tuple[float, ...]:
    """Signed decades, the finest the farthest from zero (arXiv 1511.04561, as in 8-bit Adam).

    The decade below 10^-i is cut into 2^(n_bits - 2 - i) even steps, whose middles are the levels;
    zero and 1 are added.
    """
    positive = []
    for decade in range(n_bits - 1):
        n_steps = 2 ** (n_bits - 2 - decade)
        step = Fraction(9, 10) / n_steps
        positive += [
            (Fraction(1, 10) + (i + Fraction(1, 2)) * step) / 10**decade for i in range(n_steps)
        ]
    return tuple(sorted([float(x) for x in positive] + [-float(x) for x in positive] + [0.0, 1.0]))
