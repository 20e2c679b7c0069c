"""What an adapter adds to a frozen linear map; no kind ever keeps a dense (O, I) matrix.

Autograd is given the input and the trained numbers, nothing else: products are formed again in the
backward pass, in the type of the trained numbers, whatever the type of the model.

Shapes: B tokens (all leading axes), I inputs, O outputs, R rank, N bases, G groups of a row.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memwise.codec.spec import parse
from memwise.errors import InvalidKnob
from memwise.train.engine.bases import Base, multiply, multiply_back, working

_COLUMNS = 256  # of the random bases that are multiplied with at once


class Delta(nn.Module):
    """Trained numbers beside one frozen weight.

    Attributes:
        folds_packed: whether `fold` loses nothing on a packed weight.
    """

    folds_packed: ClassVar[bool] = False

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Outputs (..., O) of base and delta together, bias included."""
        raise NotImplementedError

    def weight(self, base: Base) -> Tensor:
        """The change of the weight (O, I), dense: for merging and for tests."""
        raise NotImplementedError

    def fold(self, base: Base) -> None:
        """Move the change into the base, in place; into a packed one only if `folds_packed`."""
        assert base.weight is not None
        base.weight.add_(self.weight(base).to(base.dtype))


class LowRank(Delta):
    """LoRA: scale * B A, with B = 0 at the start.

    Args:
        shape: (O, I).
        rank: R.
        alpha: the scale, times the rank.
        generator: of the draws of A, on the CPU.
        dtype: of A and B.

    Raises:
        InvalidKnob: the rank is below 1.
    """

    def __init__(
        self, shape: tuple[int, int], rank: int, alpha: float, generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        if rank < 1:
            raise InvalidKnob(f"rank={rank}: give 1 or more")
        n_out, n_in = shape
        drawn = torch.rand((rank, n_in), generator=generator, dtype=dtype) * 2 - 1
        self.A = nn.Parameter(drawn / math.sqrt(n_in))  # (R, I)
        self.B = nn.Parameter(torch.zeros((n_out, rank), dtype=dtype))  # (O, R)
        self.scale = alpha / rank

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Outputs (..., O)."""
        added: Tensor = _Product.apply(x, self.A, self.B, self.scale)
        return base.linear(x) + added

    def weight(self, base: Base) -> Tensor:
        """Scale * B A."""
        return (self.B @ self.A) * self.scale


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scale = scale
        return (((x.to(a.dtype) @ a.T) @ b.T) * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, a, b = ctx.saved_tensors
        gx, ga, gb = _low_rank_gradients(x, grad, a, b, ctx.scale)
        if not ctx.needs_input_grad[0]:
            return None, ga, gb, None
        return (gx @ a).view(x.shape).to(x.dtype), ga, gb, None


def _low_rank_gradients(
    x: Tensor, grad: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the inner product x A^T (B, R), of A and of B."""
    flat = x.reshape(-1, x.shape[-1]).to(a.dtype)
    out = grad.reshape(-1, grad.shape[-1]).to(a.dtype) * scale
    inner = out @ b
    return inner, inner.T @ flat, out.T @ (flat @ a.T)


class MaskedLowRank(LowRank):
    """LoRS: scale * M * (B A), where M tells the weights that pruning has left.

    The adapters get the gradient of the unmasked product (straight through), so that no gradient of
    the size of the weight exists; the input gets the exact one.
    """

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Outputs (..., O)."""
        y: Tensor = _MaskedProduct.apply(x, self.A, self.B, self.scale, base)
        return base.biased(y)

    def weight(self, base: Base) -> Tensor:
        """Scale * M * (B A)."""
        if base.weight is None:
            raise InvalidKnob("a mask is read off a dense weight; this one is packed")
        return (base.weight != 0) * (self.B @ self.A) * self.scale


class _MaskedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, base: Base) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scale, ctx.base = scale, base
        return multiply(x, base, _masked(a, b, scale))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, a, b = ctx.saved_tensors
        _, ga, gb = _low_rank_gradients(x, grad, a, b, ctx.scale)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = multiply_back(grad, ctx.base, _masked(a, b, ctx.scale))
        return gx, ga, gb, None, None


def _masked(a: Tensor, b: Tensor, scale: float) -> Any:
    def adjust(rows: slice, block: Tensor) -> Tensor:
        change = (b[rows] @ a).mul_(scale).to(block.dtype)
        return change.mul_(block != 0).add_(block)

    return adjust


class RandomBases(nn.Module):
    """The frozen random matrices that all layers of RandLoRA take slices of.

    Args:
        shapes: (O, I) of every layer.
        rank: R.
        seed: they are drawn from it, and so never saved.
        dtype: of the matrices.
    """

    A: Tensor  # (R, min)
    B: Tensor  # (N, max, R)

    def __init__(
        self, shapes: list[tuple[int, int]], rank: int, seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        least = max(min(shape) for shape in shapes)
        draws = torch.Generator().manual_seed(seed)
        a = torch.rand((rank, least), generator=draws, dtype=dtype) * 2 - 1
        size = (-(-least // rank), max(max(shape) for shape in shapes), rank)
        b = torch.rand(size, generator=draws, dtype=dtype) * 2 - 1
        self.register_buffer("A", a / a.std(), persistent=False)
        self.register_buffer("B", b / b.std(), persistent=False)


class RandomFullRank(Delta):
    """RandLoRA: scale * sum_j B_j diag(lam_j) A diag(gam_j), of full rank; lam = 0 at the start.

    A lies on the smaller side of the weight; where that is the output, the sum is transposed.

    Args:
        shape: (O, I).
        bases: shared by all layers.
        scale: factor of the sum.
    """

    def __init__(self, shape: tuple[int, int], bases: RandomBases, scale: float) -> None:
        super().__init__()
        rank, least = bases.A.shape[0], min(shape)
        n_bases = -(-least // rank)
        dtype = bases.A.dtype
        self.lam = nn.Parameter(torch.zeros((rank, n_bases), dtype=dtype))  # (R, N)
        fill = 1 / max(n_bases, least)
        self.gam = nn.Parameter(torch.full((n_bases, least), fill, dtype=dtype))  # (N, min)
        self.bases = bases
        self.shape, self.scale = shape, scale

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Outputs (..., O)."""
        added: Tensor = _RandomSum.apply(x, self.lam, self.gam, self)
        return base.linear(x) + added

    def weight(self, base: Base) -> Tensor:
        """The sum, formed base by base."""
        total = torch.zeros(self.shape, dtype=self.lam.dtype, device=self.lam.device)
        for chunk in self.chunks():
            small, large = self.factors(chunk)
            scaled = self.scaled(small, chunk)
            total += large @ scaled if self.on_inputs else (large @ scaled).T
        return total * self.scale

    @property
    def on_inputs(self) -> bool:
        """Whether A is on the side of the inputs."""
        return self.shape[1] <= self.shape[0]

    def chunks(self) -> list[slice]:
        """Ranges of bases that are worked on at once."""
        rank, n_bases = self.lam.shape
        step = max(1, _COLUMNS // rank)
        return [slice(at, min(n_bases, at + step)) for at in range(0, n_bases, step)]

    def factors(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """A (1, R, min), and the B_j side by side (max, n R)."""
        small = self.bases.A[None, :, : min(self.shape)]
        large = self.bases.B[chunk, : max(self.shape)]
        return small, large.transpose(0, 1).reshape(max(self.shape), -1)

    def scaled(self, small: Tensor, chunk: slice) -> Tensor:
        """The diag(lam_j) A diag(gam_j) one under the other (n R, min)."""
        lam, gam = self.lam.T[chunk, :, None], self.gam[chunk, None]
        return (lam * small * gam).flatten(0, 1)


class _RandomSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lam: Tensor, gam: Tensor, own: RandomFullRank) -> Tensor:
        ctx.save_for_backward(x, lam, gam)  # so that a change in place before backward is noticed
        ctx.own = own
        flat = x.reshape(-1, x.shape[-1]).to(lam.dtype)
        y = flat.new_zeros((flat.shape[0], own.shape[0]))
        for chunk in own.chunks():
            small, large = own.factors(chunk)
            scaled = own.scaled(small, chunk)
            y += (flat @ scaled.T) @ large.T if own.on_inputs else (flat @ large) @ scaled
        return (y * own.scale).view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, lam, gam = ctx.saved_tensors
        own = ctx.own
        flat = x.reshape(-1, x.shape[-1]).to(lam.dtype)
        out = grad.reshape(-1, grad.shape[-1]).to(lam.dtype) * own.scale
        gx, glam, ggam = torch.zeros_like(flat), torch.empty_like(lam), torch.empty_like(gam)
        for chunk in own.chunks():
            small, large = own.factors(chunk)
            scaled = own.scaled(small, chunk)
            if own.on_inputs:
                inner = out @ large  # (B, n R)
                of_scaled = inner.T @ flat  # (n R, min), the gradient of `scaled`
                gx += inner @ scaled
            else:
                of_scaled = (flat @ large).T @ out
                gx += (out @ scaled.T) @ large.T
            by_a = of_scaled.view(-1, lam.shape[0], gam.shape[1]) * small  # (n, R, min)
            glam[:, chunk] = (by_a @ gam[chunk, :, None])[..., 0].T
            ggam[chunk] = (by_a * lam.T[chunk, :, None]).sum(1)
        needed = ctx.needs_input_grad[0]
        return gx.view(x.shape).to(x.dtype) if needed else None, glam, ggam, None


class Scales(Delta):
    """PEQA: the scales of a packed weight are trained, its codes stay: W' = (s / s0) W.

    Args:
        base: packed, with scales of rows or of groups that do not cross rows.

    Raises:
        InvalidKnob: the base is dense, or its scales lie otherwise.
    """

    folds_packed: ClassVar[bool] = True
    start: Tensor

    def __init__(self, base: Base) -> None:
        super().__init__()
        packed = base.packed
        n_out, n_in = base.shape
        kind = parse(packed.codec).scale if packed is not None else None
        if packed is None or kind is None or kind.kind not in ("row", "group"):
            raise InvalidKnob(
                f"scales are trained on a base packed by row or group, not on "
                f"{'a dense one' if packed is None else packed.codec}; try 'uint4/group64'"
            )
        if kind.group and n_in % kind.group:
            raise InvalidKnob(
                f"groups of {kind.group} cross the rows of {n_in} inputs; take a divisor of {n_in}"
            )
        found = packed.arrays["scale"].detach().float().reshape(n_out, -1)
        self.register_buffer("start", found, persistent=False)  # (O, G)
        self.scale = nn.Parameter(found.clone())

    def ratio(self) -> Tensor:
        """Factor (O, G) of the weights of each group; 1 where a group holds one value."""
        return torch.where(self.start > 0, self.scale / self.start.clamp(min=1e-38), 1.0)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Outputs (..., O)."""
        y: Tensor = _ScaledProduct.apply(x, self.scale, self, base)
        return base.biased(y)

    def weight(self, base: Base) -> Tensor:
        """The change of the decoded weight."""
        change = self.ratio() - 1
        blocks = base.blocks(torch.float32)
        grouped = [
            block.view(*change[rows].shape, -1) * change[rows, :, None].to(block.dtype)
            for rows, block in ((rows, block.clone()) for rows, block in blocks)
        ]
        return torch.cat([part.flatten(1) for part in grouped])

    def fold(self, base: Base) -> None:
        """Write the scales into the packed base; its codes stay as they are."""
        packed = cast(Any, base.packed)
        ratio = self.ratio().flatten()
        for name in ("scale", "zero"):
            if name in packed.arrays:
                packed.arrays[name].mul_(ratio.to(packed.arrays[name].dtype))
        self.start.copy_(self.scale)


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, own: Scales, base: Base) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.own, ctx.base = own, base
        ratio = own.ratio()
        return multiply(x, base, lambda rows, block: _scaled(block, ratio[rows]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, _ = ctx.saved_tensors
        start, ratio = ctx.own.start, ctx.own.ratio()
        flat, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        gx = torch.zeros(flat.shape, dtype=working(x), device=x.device)
        gs = torch.empty_like(ratio)
        for rows, block in ctx.base.blocks(working(x)):
            # A gradient of the weight exists for a block of rows at a time.
            of_weight = (out[:, rows].T @ flat).to(block.dtype) * block
            gs[rows] = of_weight.view(*ratio[rows].shape, -1).sum(-1).to(ratio.dtype)
            if ctx.needs_input_grad[0]:
                gx += out[:, rows] @ _scaled(block, ratio[rows]).to(out.dtype)
        gs = torch.where(start > 0, gs / start.clamp(min=1e-38), 0.0)
        needed = ctx.needs_input_grad[0]
        return gx.view(x.shape).to(x.dtype) if needed else None, gs, None, None


def _scaled(block: Tensor, ratio: Tensor) -> Tensor:
    """A decoded block (r, I) times the ratios (r, G) of its groups, in place."""
    block.view(*ratio.shape, -1).mul_(ratio.to(block.dtype)[..., None])
    return block
