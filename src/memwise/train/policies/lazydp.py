"""Noise of a table's rows drawn when they are next read (LazyDP, arXiv 2404.08847)."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.train.engine.ledger import Aggregated, Noise
from memwise.train.engine.private import PrivatePolicy


@dataclass(frozen=True)
class LazyDP(PrivatePolicy):
    """Keep the last noised step of each row of a table; draw what it lacks when it is next read.

    DP-SGD adds noise to every row of every table in every step. Here only the rows of a batch get
    theirs, just before the batch reads them: one draw with the variance of all that they lack. What
    is dropped is the order in which a row's noise would have come, which nobody sees. All rows get
    theirs before the table is saved, and by `flush`. Dense layers are trained as by DP-SGD.

    Attributes:
        noise_multiplier: standard deviation of the noise, in units of `max_norm`.
        max_norm: length to which the gradient of an example is cut.

    Raises:
        InvalidKnob: the noise is negative or the norm not positive.

    Note:
        The paper looks one batch ahead in the input queue, and writes a row's gradient and its next
        noise together. Here the table's own call pays for the rows that it is about to read: one
        more write of the batch's rows, and any loop over any loader is right as it is.
    """

    noise_multiplier: float = 1.0
    max_norm: float = 1.0

    card = Card(
        paper=12,
        claim="119 times the training throughput of DP-SGD on average, mathematically equivalent",
        check="deferred_noise",
        baseline="dpsgd",
        better="lower",
        margin=0.9,
        requires=("torch",),
    )

    def deferred(self) -> Noise:
        return Aggregated()
