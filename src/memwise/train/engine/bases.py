"""Frozen weights under adapters: dense as they were, or packed and decoded in blocks of rows.

A packed weight never exists as a whole: the forward pass decodes a block, multiplies, and lets it
go; the backward pass decodes it again. Autograd is given the packed arrays' owner, not a matrix.

Shapes: B tokens (all leading axes), I inputs, O outputs, r rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memwise.codec.th import Packed, codec

BLOCK = 1 << 17  # coordinates that are decoded at once: 512 KiB in float32

Adjust: TypeAlias = Callable[[slice, Tensor], Tensor]
"""Turns a block of rows (r, I) of the frozen weight into the block that is multiplied with."""


@dataclass(frozen=True)
class Base:
    """A frozen linear map.

    Attributes:
        weight: (O, I) dense, possibly the transposed view of a Conv1D's; None where it is packed.
        packed: the encoded weight (O, I); None where it is dense.
        bias: (O,) or None.
    """

    weight: Tensor | None
    packed: Packed | None
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs (O, I)."""
        if self.packed is not None:
            return self.packed.shape[0], self.packed.shape[1]
        assert self.weight is not None
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weight, or of what was packed."""
        if self.packed is not None:
            return self.packed.dtype
        assert self.weight is not None
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self._array.device

    @property
    def address(self) -> int:
        """The same for maps that share a weight."""
        return self._array.data_ptr()

    @property
    def _array(self) -> Tensor:
        if self.packed is not None:
            return self.packed.arrays["codes"]
        assert self.weight is not None
        return self.weight

    def linear(self, x: Tensor) -> Tensor:
        """Outputs (..., O) for x (..., I), differentiable in x."""
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = _Decoded.apply(x, self)
        return self.biased(y)

    def biased(self, y: Tensor) -> Tensor:
        """Outputs (..., O) with the bias, where there is one."""
        return y if self.bias is None else y + self.bias

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows (r, I) of the weight; a packed one decodes into memory it may reuse."""
        n_out, n_in = self.shape
        step = max(1, BLOCK // max(n_in, 1))
        if self.packed is None:
            assert self.weight is not None
            for first in range(0, n_out, step):
                rows = slice(first, min(n_out, first + step))
                yield rows, self.weight[rows].to(dtype)
            return
        decoder = codec(self.packed.codec)
        device = self.packed.arrays["codes"].device
        room = torch.empty((min(step, n_out), n_in), dtype=dtype, device=device)
        for first in range(0, n_out, step):
            rows = slice(first, min(n_out, first + step))
            yield rows, decoder.decode(self.packed, rows, out=room[: rows.stop - first])


def multiply(x: Tensor, base: Base, adjust: Adjust | None = None) -> Tensor:
    """Inputs (..., I) times the (adjusted) weight: (..., O), without bias, without autograd."""
    flat = x.reshape(-1, x.shape[-1])
    y = x.new_empty((flat.shape[0], base.shape[0]))
    for rows, block in base.blocks(working(x)):
        weight = block if adjust is None else adjust(rows, block)
        y[:, rows] = flat @ weight.to(x.dtype).T
    return y.view(*x.shape[:-1], base.shape[0])


def multiply_back(grad: Tensor, base: Base, adjust: Adjust | None = None) -> Tensor:
    """Gradient of the inputs (..., I) for that of the outputs (..., O)."""
    flat = grad.reshape(-1, grad.shape[-1])
    # Blocks add up: in half precision every sum would round.
    gx = torch.zeros((flat.shape[0], base.shape[1]), dtype=working(grad), device=grad.device)
    for rows, block in base.blocks(working(grad)):
        weight = block if adjust is None else adjust(rows, block)
        gx += flat[:, rows] @ weight.to(grad.dtype)
    return gx.view(*grad.shape[:-1], base.shape[1]).to(grad.dtype)


def working(x: Tensor) -> torch.dtype:
    """The type in which sums are taken: float32, or float64 where x is."""
    return torch.promote_types(x.dtype, torch.float32)


class _Decoded(torch.autograd.Function):
    """A packed linear map; keeps nothing for the backward pass but the packed weight itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Base) -> Tensor:
        """Outputs (..., O)."""
        ctx.base = base
        return multiply(x, base)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        """Gradient of x."""
        return multiply_back(grad, ctx.base) if ctx.needs_input_grad[0] else None, None
