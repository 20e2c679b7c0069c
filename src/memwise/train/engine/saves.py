"""Operations that keep something else than their input, and make the gradient of that.

One autograd Function a kind. Outputs are those of torch's own operation; a `Save` says what is kept
of the input and how a gradient is made of it. Everything is kept with `save_for_backward`: tensors
on `ctx` escape hooks, recomputation and every account of saved bytes.

Shapes: N tokens (all axes but the last), I inputs, O outputs, K rows of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from memwise.codec.project import KINDS, Drawn
from memwise.codec.th_pack import pack, unpack
from memwise.errors import InvalidKnob
from memwise.train.engine.act_tables import Steps

_BLOCK_CPU, _BLOCK = 1 << 15, 1 << 22  # numbers at once: in the cache, or in few kernel calls


def _first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses to be differentiated itself, where torch's decorator may leave terms out unsaid."""

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "an operation swapped by compress_activations has no second derivative; leave out "
                "create_graph=True, or this module from the policy"
            )
        return backward(ctx, *grads)

    return checked


# --- pointwise functions: the interval instead of the input


class Pointwise(Function):
    """y = f(x), with the gradient gy * level[interval of x]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], table: Steps) -> Tensor:
        """What `run` makes of x, in place if `run` is."""
        ctx.table, ctx.kind = table, x.dtype
        codes = intervals(x, table)
        y = run(x)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(codes)
        return y

    @staticmethod
    @_first_order
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        (codes,) = ctx.saved_tensors
        return scaled(gy, codes, ctx.table).to(ctx.kind), None, None


class Dropout(Function):
    """y = x * noise, of which one bit a number is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """What `F.dropout` gives for the same state of the random numbers."""
        noise = F.dropout(torch.ones_like(x), p, True)
        ctx.table = Steps((0.5,), (0.0, 1 / (1 - p)))
        ctx.save_for_backward(intervals(noise, ctx.table))
        return noise.mul_(x)

    @staticmethod
    @_first_order
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None]:
        """The gradient of x."""
        (codes,) = ctx.saved_tensors
        return scaled(gy, codes, ctx.table), None


def intervals(x: Tensor, table: Steps) -> Tensor:
    """The interval of each number, packed: ceil(N bits / 8) bytes and at most 2 more."""
    flat, bits = x.detach().reshape(-1), table.bits
    n = flat.numel()
    out = torch.empty(-(-n // 8) * bits, dtype=torch.uint8, device=x.device)
    for at in _blocks(n, x.device):
        part = flat[at]
        codes = torch.zeros(-(-part.numel() // 8) * 8, dtype=torch.uint8, device=x.device)
        for border in table.borders:
            codes[: part.numel()].add_(part > border)
        place = slice(at.start // 8 * bits, at.start // 8 * bits + codes.numel() // 8 * bits)
        pack(codes[None], bits, out[None, place])
    return out


def scaled(gy: Tensor, packed: Tensor, table: Steps) -> Tensor:
    """Gy * level[interval], in the shape and type of gy."""
    flat, bits = gy.reshape(-1), table.bits
    out = torch.empty_like(flat)
    levels = torch.tensor(table.levels, dtype=gy.dtype, device=gy.device)
    for at in _blocks(flat.numel(), gy.device):
        n = at.stop - at.start
        place = slice(at.start // 8 * bits, -(-at.stop // 8) * bits)
        codes = unpack(packed[None, place], bits, -(-n // 8) * 8)[0, :n]
        torch.mul(flat[at], levels.index_select(0, codes.int()), out=out[at])
    return out.view(gy.shape)


def _blocks(n: int, device: torch.device) -> Iterator[slice]:
    size = _BLOCK_CPU if device.type == "cpu" else _BLOCK
    return (slice(start, min(n, start + size)) for start in range(0, n, size))


# --- linear layers: a sketch instead of the input


class LinearSave(Protocol):
    """What a linear layer keeps of its input x (N, I) for the gradient of its weight.

    Attributes:
        shares: layers that take the same input and have this in common keep one thing together.
    """

    @property
    def shares(self) -> Hashable: ...  # noqa: D102

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is kept."""

    def grad_weight(self, kept: Sequence[Tensor], gy: Tensor) -> Tensor:
        """The gradient of the weight (O, I), or of its coordinates (O, r), for gy (N, O)."""


@dataclass(frozen=True)
class SketchSave:
    """Keeps S^T x (K, I) and the seed of S (N, K), where E[S S^T] = 1.

    The seed is kept as a tensor: where the forward pass is recomputed, it has to come from the same
    pass as the sketch.

    Attributes:
        ratio: K / N.
        kind: "gaussian", "rademacher" or "rows" (K of the N rows, each as likely).
        seed: of the draws.
    """

    ratio: float
    kind: str
    seed: int
    shares: ClassVar[str] = "sketch"

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """The sketch (K, I) and its seed."""
        k = max(1, round(self.ratio * len(x)))
        return Drawn(len(x), k, self.seed, self.kind).down(x), torch.tensor(self.seed)

    def grad_weight(self, kept: Sequence[Tensor], gy: Tensor) -> Tensor:
        """(S^T gy)^T (S^T x), whose mean over draws is gy^T x."""
        sketch, seed = kept
        return Drawn(len(gy), len(sketch), int(seed), self.kind).down(gy).t() @ sketch


@dataclass(frozen=True)
class ProjectSave:
    """Keeps x P (N, r), which makes the gradient of W's coordinates C (O, r), W = ... + C P^T.

    An input that another operation keeps anyhow is not projected before the backward pass.

    Attributes:
        projection: P (I, r).
        late: whether to keep the input itself.
    """

    projection: Drawn
    late: bool = False

    @property
    def shares(self) -> Hashable:
        """The same projection of the same input, at the same time."""
        return self

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """The projected input (N, r)."""
        return (x if self.late else self.projection.across(x),)

    def grad_weight(self, kept: Sequence[Tensor], gy: Tensor) -> Tensor:
        """Gy^T (x P), (O, r)."""
        (x,) = kept
        return gy.t() @ (self.projection.across(x) if self.late else x)


class Linear(Function):
    """y = x w^T + b, exact; so is the gradient of x. The weight's is made by a `LinearSave`.

    It goes to `target`: the weight itself, or another leaf that stands for it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, save: LinearSave,
        shared: Shared,
    ) -> Tensor:  # fmt: skip
        """What `F.linear` gives."""
        needs_x, _, _, needs_weight, *_ = ctx.needs_input_grad
        kept: tuple[Tensor, ...] = ()
        if needs_weight:
            ctx.shared = shared.of(
                x, save.shares, lambda: save.pack(x.detach().reshape(-1, x.shape[-1]))
            )
            kept = ctx.shared.tensors
        ctx.save, ctx.needs_x = save, needs_x
        ctx.save_for_backward(*kept, *([weight] if needs_x else []))
        return F.linear(x, weight, bias)

    @staticmethod
    @_first_order
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, bias and target."""
        saved = list(ctx.saved_tensors)
        needs_x, _, needs_bias, needs_weight, *_ = ctx.needs_input_grad
        flat = gy.reshape(-1, gy.shape[-1])
        gx = (flat @ saved.pop()).view(*gy.shape[:-1], -1) if needs_x else None
        gw = None
        if needs_weight:
            gw = ctx.save.grad_weight(saved, flat)
            ctx.shared = None
        return gx, None, flat.sum(0) if needs_bias else None, gw, None, None


@dataclass(eq=False)
class Payload:
    """Tensors made of one input, for all operations that take this input."""

    tensors: tuple[Tensor, ...]


class Shared(Protocol):
    """Finds what was already made of a tensor, so that q, k and v keep one thing together."""

    def of(self, x: Tensor, name: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> Payload:
        """What `make` makes of x, or has made of it under this name."""


def check_sketch(ratio: float, kind: str) -> None:
    """Refuse a sketch that cannot be.

    Raises:
        InvalidKnob: the ratio is not in (0, 1], or there is no such kind.
    """
    if not 0 < ratio <= 1:
        raise InvalidKnob(f"ratio={ratio!r}: a sketch keeps a share in (0, 1] of the tokens")
    if kind not in KINDS:
        raise InvalidKnob(f"sketch={kind!r}: use one of {', '.join(KINDS)}")


# --- convolutions and norms: the input only where a gradient needs it


@dataclass(frozen=True)
class Conv:
    """The geometry of a convolution, as `aten::convolution` takes it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class Convolution(Function):
    """A convolution that keeps x only for the weight's gradient, the weight only for that of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv
    ) -> Tensor:  # fmt: skip
        """What torch's own convolution gives."""
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.conv, ctx.shapes = conv, (x.shape, weight.shape)
        ctx.bias_shape = None if bias is None else list(bias.shape)
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return torch.convolution(
            x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.transposed,
            conv.output_padding, conv.groups,
        )  # fmt: skip

    @staticmethod
    @_first_order
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias."""
        conv: Conv = ctx.conv
        # What is not kept is not read either; only its shape is.
        x, weight = (
            gy.new_empty(1).expand(shape) if kept is None else kept
            for kept, shape in zip(ctx.saved_tensors, ctx.shapes, strict=True)
        )
        grads = torch.ops.aten.convolution_backward(
            gy, x, weight, ctx.bias_shape, conv.stride, conv.padding, conv.dilation,
            conv.transposed, conv.output_padding, conv.groups, ctx.needs_input_grad[:3],
        )  # fmt: skip
        wanted = zip(grads, ctx.needs_input_grad[:3], strict=True)
        return *(grad if needed else None for grad, needed in wanted), None


class FrozenNorm(Function):
    """Batch normalisation by running statistics with a frozen weight: linear in x, so x can go."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None,
        bias: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        """What `F.batch_norm` gives in evaluation."""
        ctx.eps = eps
        ctx.save_for_backward(var, weight)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @_first_order
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and bias."""
        var, weight = ctx.saved_tensors
        axes = [axis for axis in range(gy.ndim) if axis != 1]
        gx = gb = None
        if ctx.needs_input_grad[0]:
            factor = (var + ctx.eps).rsqrt()
            factor = factor if weight is None else factor * weight
            gx = gy * factor.to(gy.dtype).view(-1, *[1] * (gy.ndim - 2))
        if ctx.needs_input_grad[4]:
            gb = gy.sum(axes)
        return gx, None, None, None, gb, None


class RMSNorm(Function):
    """y = x / rms(x) * weight with one copy of x; torch's own operation keeps two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, n_axes: int, eps: float) -> Tensor:
        """What `F.rms_norm` gives, to rounding."""
        ctx.axes = tuple(range(x.ndim - n_axes, x.ndim))
        wide = _wide(x)
        inverse = wide.square().mean(ctx.axes, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        y = wide * inverse
        return (y if weight is None else y.mul_(weight)).to(x.dtype)

    @staticmethod
    @_first_order
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and weight."""
        x, inverse, weight = ctx.saved_tensors
        normal, gy = _wide(x) * inverse, _wide(gy)
        gx = gw = None
        if ctx.needs_input_grad[1]:
            gw = (gy * normal).sum(tuple(range(ctx.axes[0]))).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = gy if weight is None else gy * weight
            along = (inner * normal).mean(ctx.axes, keepdim=True)
            gx = ((inner - normal * along) * inverse).to(x.dtype)
        return gx, gw, None, None


def _wide(x: Tensor) -> Tensor:
    """In float32 where it is half as wide."""
    return x.float() if x.element_size() < 4 else x
