"""Baseline: differentially private SGD with noise for every row of every table in every step."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.train.engine.private import PrivatePolicy


@dataclass(frozen=True)
class DPSGD(PrivatePolicy):
    """Keep nothing beside the weights: each step draws noise for all of them, and adds it.

    Attributes:
        noise_multiplier: standard deviation of the noise, in units of `max_norm`.
        max_norm: length to which the gradient of an example is cut.

    Raises:
        InvalidKnob: the noise is negative or the norm not positive.

    Note:
        Abadi et al. 2016, arXiv 1607.00133. The gradient of a table is kept as rows all the same.
    """

    noise_multiplier: float = 1.0
    max_norm: float = 1.0

    card = Card(
        paper=None,
        claim="gradients cut to a norm, and Gaussian noise on their sum",
        check="deferred_noise",
        baseline="lazydp",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )
