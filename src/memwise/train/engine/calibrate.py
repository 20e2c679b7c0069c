"""Block by block: what a block put out before, and what comes in now that those below are rounded.

Two streams run through the model: the hidden states of the model as it was, and those of the model
as it is rounded so far. A block is fitted so that it gives the first stream's outputs for the
second stream's inputs, and so undoes what the blocks below have lost.

Shapes: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memwise.codec.spec import parse
from memwise.errors import InvalidKnob, UnsupportedModel
from memwise.train.engine.adapted import blocks
from memwise.train.engine.bases import Base
from memwise.train.engine.deltas import LowRank

_OPEN = 4.0  # sigmoid(4) = 0.982: clipping starts almost open


class ClippedLowRank(LowRank):
    """A rounded weight with trained clipping beside scale * B A; for calibration alone.

    The dense base is rounded anew at each call, between sigmoid(low) times the smallest and
    sigmoid(high) times the largest weight of each group, straight through.

    Args:
        base: dense.
        codec: uint* by group.
        rank: of A and B.
        alpha: factor of B A, times the rank.
        generator: of the draws of A, on the CPU.

    Raises:
        InvalidKnob: the base is packed, or the codec is another one.
    """

    def __init__(
        self, base: Base, codec: str, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__(base.shape, rank, alpha, generator, torch.float32)
        spec = parse(codec)
        n_out, n_in = base.shape
        if base.weight is None or not spec.grid.affine or not spec.scale.group:
            raise InvalidKnob(f"codec {codec!r} is not clipped; give 'uint2/group64' or the like")
        if n_in % spec.scale.group:
            raise InvalidKnob(
                f"groups of {spec.scale.group} cross rows of {n_in} inputs; take a divisor"
            )
        self.group, self.steps = spec.scale.group, (1 << spec.grid.bits) - 1
        shape = (n_out, n_in // self.group, 1)
        self.low = nn.Parameter(torch.full(shape, _OPEN))  # (O, G, 1)
        self.high = nn.Parameter(torch.full(shape, _OPEN))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Outputs (..., O) of the rounded weight and the delta."""
        rounded = self.rounded(base) + (self.B @ self.A) * self.scale
        return base.biased(nn.functional.linear(x, rounded.to(x.dtype)))

    def clipped(self, base: Base) -> tuple[Tensor, Tensor, Tensor]:
        """The weight (O, G, group) between its bounds, and the bounds (O, G, 1)."""
        assert base.weight is not None
        grouped = base.weight.detach().float().reshape(*self.low.shape[:2], self.group)
        least, most = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        # A bound on the far side of zero would move away from the weights.
        low = torch.where(least < 0, torch.sigmoid(self.low) * least, least)
        high = torch.where(most > 0, torch.sigmoid(self.high) * most, most)
        return torch.minimum(torch.maximum(grouped, low), high), low, high

    def rounded(self, base: Base) -> Tensor:
        """The weight (O, I) on its grid."""
        clipped, low, high = self.clipped(base)
        step = (high - low).clamp(min=1e-12) / self.steps
        at = (clipped - low) / step
        at = at + (at.round() - at).detach()
        return (low + at * step).view(base.shape)

    def bounded(self, base: Base) -> Tensor:
        """The weight (O, I) between its bounds, which rounding to nearest puts on the same grid."""
        return self.clipped(base)[0].reshape(base.shape)

    def plain(self) -> LowRank:
        """The delta alone, for the packed weight."""
        shape, rank = (self.B.shape[0], self.A.shape[1]), self.B.shape[1]
        found = LowRank(shape, rank, self.scale * rank, torch.Generator())
        found.A, found.B = self.A, self.B
        return found


Fit = Callable[[int, nn.Module, "Stream", Sequence[Tensor]], None]
"""Fits one block: its number, the block, its inputs now, and the outputs it had."""


class Stream:
    """Hidden states on their way through the blocks, one batch each, with what blocks also take."""

    def __init__(self, calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> None:
        self._calls = list(calls)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._calls)

    def run(self, block: nn.Module, nth: int) -> Tensor:
        """What a block puts out for a batch."""
        args, kwargs = self._calls[nth]
        output = block(*args, **kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def after(self, states: Sequence[Tensor]) -> Stream:
        """The stream with these hidden states."""
        return Stream(
            [((x, *args[1:]), kw) for x, (args, kw) in zip(states, self._calls, strict=True)]
        )


def calibrate(model: nn.Module, batches: Sequence[Any], fit: Fit) -> None:
    """Fit the blocks of a model one after the other, from the first to the last.

    Args:
        model: until `fit` changes a block, it must behave as the model that is to be matched.
        batches: what the model is called with.
        fit: changes a block so that it gives those outputs for these inputs.

    Raises:
        InvalidKnob: there are no batches.
        UnsupportedModel: the model has no stack of blocks, or does not pass them hidden states.
    """
    if not batches:
        raise InvalidKnob("calibration needs at least one batch; pass batches=[...]")
    _, stack = blocks(model)
    now = _entering(model, stack[0], batches)
    before = now
    for number, block in enumerate(stack):
        with torch.no_grad():
            wanted = [before.run(block, nth) for nth in range(len(before))]
        fit(number, block, now, wanted)
        with torch.no_grad():
            now = now.after([now.run(block, nth) for nth in range(len(now))])
        before = before.after(wanted)


class _Entered(Exception):
    """Ends a forward pass at the first block."""


def _entering(model: nn.Module, first: nn.Module, batches: Sequence[Any]) -> Stream:
    """What the first block is called with."""
    calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not args:
            raise UnsupportedModel(f"{type(module).__name__} is not given its states by position")
        calls.append((args, kwargs))
        raise _Entered

    hook = first.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for batch in batches:
            try:
                with torch.no_grad():
                    model(batch)
            except _Entered:
                continue
    finally:
        hook.remove()
    return Stream(calls)
