"""Slice by slice: the peak of a chain of operations = input + output + in-betweens of one slice.

An operation that treats the positions of an axis apart (frames of a spatial convolution, pixels of
an attention over time, tokens of an MLP) has that axis *free*: it may be run on a slice of it. Run
singly that saves little, since each operation's whole output is there for the next. Run as a group,
the longest chain of operations with one free axis goes through slice after slice, and only its last
output is ever whole. An operation without that free axis ends the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
    """Operations in order, each with its free axes; runs plainly until told to slice.

    A step is a module with an attribute `free`: its free axes, the preferred one first. An axis
    must have the same number and length before and after the step.

    Args:
        *steps: the first takes the inputs, each other one the output of the one before.

    Attributes:
        n_slices: parts that a free axis is cut into; None runs plainly.
        grouped: whether the longest chain of one free axis is one group; else each step is its own.
    """

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.n_slices: int | None = None
        self.grouped = True

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output of the last step."""
        if self.n_slices is None:
            return run(list(self.steps), *inputs)
        for axis, group in groups(list(self.steps), self.grouped):
            if axis is None:
                inputs = (run(group, *inputs),)
                continue
            size = -(-inputs[0].shape[axis] // self.n_slices)
            inputs = (sliced(partial(run, group), axis, size, *inputs),)
        return inputs[0]


def run(steps: Sequence[nn.Module], *inputs: Tensor) -> Tensor:
    """The output of the last step, with no more than one step's input and output held."""
    for step in steps:
        inputs = (step(*inputs),)
    return inputs[0]


def groups(
    steps: Sequence[nn.Module], grouped: bool = True
) -> Iterator[tuple[int | None, Sequence[nn.Module]]]:
    """Cut steps into the longest runs that share a free axis, greedily from the front.

    Yields:
        The axis, or None for steps without any, and the steps of the group.
    """
    while steps:
        runs = {axis: _shared(steps, axis) if grouped else 1 for axis in _free(steps[0])}
        axis = max(runs, key=lambda axis: runs[axis], default=None)
        n = 1 if axis is None else runs[axis]
        yield axis, steps[:n]
        steps = steps[n:]


def _shared(steps: Sequence[nn.Module], axis: int) -> int:
    """Steps from the front on that all leave this axis free."""
    return len(list(takewhile(lambda step: axis in _free(step), steps)))


def _free(step: nn.Module) -> tuple[int, ...]:
    axes: Any = step.free
    return tuple(axes)


class Reusable(nn.Module):
    """A part of a denoiser whose output one step may take over from the step before.

    Args:
        inner: the part.

    Attributes:
        steps: what remembers the output; None computes it at every call.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.steps: StepMemory | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output of the part, or that of the last call."""
        if self.steps is None:
            return run([self.inner], *inputs)
        return self.steps.output(self.inner, *inputs)


class StepMemory:
    """One output, kept while the next step may reuse it.

    After two outputs in a row were alike, the next one is not computed; the one after it is, so
    that a reused output is never older than one step. One memory serves one run over one batch.

    Args:
        similarity: cosine of two outputs from which on they are alike.

    Attributes:
        last: the kept output.
        reused: for each call since the start, whether it was spared.
    """

    def __init__(self, similarity: float) -> None:
        self.similarity = similarity
        self.last: Tensor | None = None
        self.reused: list[bool] = []
        self._alike = False

    def output(self, fn: nn.Module, *inputs: Tensor) -> Tensor:
        """What `fn` gives, or what it gave at the step before."""
        last = self.last
        self.reused.append(self._alike)
        if self._alike and last is not None:
            self._alike = False
            return last
        fresh: Tensor = fn(*inputs)
        if last is not None:
            cosine = torch.cosine_similarity(fresh.flatten(), last.flatten(), dim=0)
            self._alike = bool(cosine >= self.similarity)
        self.last = fresh
        return fresh
