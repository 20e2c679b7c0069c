"""What modules with weights of their own need when they are built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from memwise.errors import InvalidKnob


@contextmanager
def weights_from(seed: int) -> Iterator[None]:
    """Draw what is built inside from a seed, and leave the random numbers of the process alone."""
    with torch.random.fork_rng(devices=[]):
        # Layers of torch take no generator.
        torch.manual_seed(seed)  # noqa: TID251
        yield


def need_layers(width: int, n_layers: int, n_heads: int) -> None:
    """Refuse sizes of which no transformer can be made.

    Raises:
        InvalidKnob: the width is no multiple of the heads, or there are no layers or heads.
    """
    if n_layers < 1 or n_heads < 1 or width % n_heads:
        raise InvalidKnob(
            f"width={width}, n_layers={n_layers}, n_heads={n_heads}: give at least one layer and "
            "one head, and a width that is a multiple of the heads"
        )
