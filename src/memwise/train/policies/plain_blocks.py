"""The same network under ordinary autograd."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from memwise.catalogue import Card
from memwise.train.engine.reversible import ReversibleSequence


@dataclass(frozen=True)
class PlainBlocks:
    """Keep what every block needs for its backward pass, as autograd does; nothing is dropped.

    Calling it with a model gives a copy with the same weights, whose reversible sequences are
    ordinary residual ones.
    """

    card = Card(
        paper=None,
        claim="the same formula and weights, all activations kept",
        check="reversible",
        baseline="plain_blocks",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    def __call__(self, model: nn.Module) -> nn.Module:
        """A copy of `model` that keeps all activations."""
        twin = copy.deepcopy(model)
        if isinstance(twin, ReversibleSequence):
            return _Ordinary(twin)
        for module in [m for m in twin.modules() if not isinstance(m, _Ordinary)]:
            for name, child in module.named_children():
                if isinstance(child, ReversibleSequence):
                    setattr(module, name, _Ordinary(child))
        return twin


class _Ordinary(nn.Module):
    def __init__(self, sequence: ReversibleSequence) -> None:
        super().__init__()
        self.sequence = sequence

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sequence.plain(x)
