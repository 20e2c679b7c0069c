"""Slice by slice: peak memory of a chain of operations = input + output + one slice's in-betweens.

An operation that treats the positions of an axis alike and apart (frames of a spatial convolution,
pixels of an attention over time, tokens of an MLP) has that axis *free*: it may be run on a slice of
it. Run singly that saves little, since each operation's whole output is still there for the next;
run as a group, the longest chain of operations with one free axis goes through slice after slice and
only its last output is ever whole. An operation without that free axis ends the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, TypeAlias

import torch
from torch import nn

from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


def sliced(
    fn: Callable[..., Tensor], axis: int, size: int, *inputs: Tensor, out: Tensor | None = None
) -> Tensor:
    """Compute `fn(*inputs)` slice by slice along a free axis, into one output.

    For inference, and for the forward pass of code that records its own gradient: the output is
    written in place.

    Args:
        fn: treats the positions of `axis` apart; may change all other axes.
        axis: the free axis, of the inputs and of the output.
        size: positions of a slice.
        *inputs: tensors that are cut alike.
        out: receives the output; by default a new tensor.

    Raises:
        InvalidKnob: size below 1, inputs of different lengths, or a fn that changes the length.
    """
    lengths = {x.shape[axis] for x in inputs}
    if size < 1 or len(lengths) != 1:
        raise InvalidKnob(
            f"size={size} with lengths {sorted(lengths)} along axis {axis}: slices need a size of "
            "at least 1 and inputs of one length"
        )
    length = lengths.pop()
    for first in range(0, length, size):
        n = min(size, length - first)
        part = fn(*(x.narrow(axis, first, n) for x in inputs))
        if part.shape[axis] != n:
            raise InvalidKnob(
                f"a slice of {n} along axis {axis} became {part.shape[axis]}: that axis is not free"
            )
        if out is None:
            shape = list(part.shape)
            shape[axis] = length
            out = part.new_empty(shape)
        out.narrow(axis, first, n).copy_(part)
        del part  # or it would lie beside the next slice's in-betweens
    assert out is not None
    return out


class Chain(nn.Module):
    """Operations in order, each with the axes that it leaves free; runs plainly unless told to slice.

    Args:
        *steps: modules with an attribute `free`, a tuple of axes in order of preference. The first
            step takes the inputs, each other the output of the one before.

    Attributes:
        size: parts into which a free axis is cut; None = plainly.
        grouped: run the longest chain of one free axis as a group; False slices each step alone.
    """

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.n_slices: int | None = None
        self.grouped = True

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output of the last step."""
        if self.n_slices is None:
            return _run(list(self.steps), *inputs)
        for axis, group in _groups(list(self.steps), self.grouped):
            if axis is None:
                inputs = (_run(group, *inputs),)
            else:
                size = -(-inputs[0].shape[axis] // self.n_slices)
                run = _Run(group)
                inputs = (sliced(run, axis, size, *inputs),)
        return inputs[0]


