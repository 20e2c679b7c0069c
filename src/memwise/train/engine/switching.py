"""Adapters that are not all on at once: a few layers at a time, or one set for each range of a key.

- `LayerSwitch`: which blocks are trained now; the optimizer forgets the others
- `AdapterBank`: which set of deltas is active, by a number such as the step of a diffusion
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from memwise.errors import InvalidKnob
from memwise.train.engine.adapters import Handle


class LayerSwitch:
    """Trains some blocks of an adapted model and freezes the others.

    Args:
        handle: the adapters.
        optimizer: over all of its parameters.
    """

    def __init__(self, handle: Handle, optimizer: torch.optim.Optimizer) -> None:
        self.handle, self.optimizer = handle, optimizer
        self.layers = handle.layers

    def select(self, layers: Iterable[int]) -> None:
        """Train these blocks alone; the states of the others are dropped."""
        self.handle.freeze_layers(set(self.layers) - set(layers), self.optimizer)

    @contextmanager
    def damped(self, layers: Iterable[int], gain: float) -> Iterator[None]:
        """Multiply what the deltas of these blocks add by `gain`, for a while."""
        hushed = set(layers)
        modules = [m for n, m in self.handle.sites.items() if self.handle.layer(n) in hushed]
        for module in modules:
            module.gain = gain
        try:
            yield
        finally:
            for module in modules:
                module.gain = 1.0


class AdapterBank:
    """Several sets of deltas on one frozen model, of which a number picks one.

    Args:
        handle: adapters with one name a range, in rising order.
        edges: where the next range begins; one fewer than the names.

    Raises:
        InvalidKnob: the edges do not rise or do not fit the names.
    """

    def __init__(self, handle: Handle, edges: Sequence[float]) -> None:
        if len(edges) != len(handle.names) - 1 or sorted(set(edges)) != list(edges):
            raise InvalidKnob(f"edges={edges!r} must rise and number {len(handle.names) - 1}")
        self.handle, self.edges = handle, tuple(edges)

    def name(self, key: float) -> str:
        """Name of the set that owns this number; a range holds its lower end."""
        return self.handle.names[bisect_right(self.edges, key)]

    def at(self, key: float) -> None:
        """Activate the set that owns this number."""
        self.handle.set_active(self.name(key))
