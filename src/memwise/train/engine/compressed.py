"""Weights that lie compressed, and are decoded for one operation at a time, forward and backward.

A weight's place is taken by a parameter of its shape whose storage is one number: gradients find
it, optimizers list it, and it costs nothing. The forward pass decodes the weight, uses it and lets
it go; autograd keeps the codes, and the backward pass decodes again. The optimizer moves a weight
as soon as its gradient is there: decode, step, encode, and the gradient goes.

Operations are torch's own, in the same order, so that with lossless codes a run is the same to the
bit.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from memwise.codec.th import Packed, codec
from memwise.codec.th_mantissa import Shortened, lengthen, shorten
from memwise.errors import InvalidKnob, UnsupportedModel
from memwise.train.engine.optimizer import OptimizerPolicy
from memwise.train.measure import bytes_of

LOSSLESS = {
    torch.bfloat16: "bf16/entropy",
    torch.float16: "fp16/entropy",
    torch.float32: "fp32/entropy",
}
_CODES = "compressed_weight"
SMALL = 4096  # numbers; below, a weight stays as it is

Run = Callable[..., Tensor]


@dataclass(eq=False)
class Weight:
    """A compressed weight.

    Attributes:
        n_bits: of mantissas; None = all, without loss.
        stored: its codes.
    """

    n_bits: int | None
    stored: Packed | Shortened | None = None

    def store(self, weight: Tensor) -> None:
        """Take over another value; the old codes go first."""
        self.stored = None
        if self.n_bits is None:
            self.stored = codec(LOSSLESS[weight.dtype]).encode(weight)
        else:
            self.stored = shorten(weight, self.n_bits)

    def dense(self) -> Tensor:
        """The weight, decoded."""
        if isinstance(self.stored, Shortened):
            return lengthen(self.stored)
        assert self.stored is not None
        return codec(self.stored.codec).decode(self.stored)


# --- operations


class _Linear(Function):
    """`F.linear`; keeps x, and no weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return F.linear(x, weight.dense(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        flat = gy.reshape(-1, gy.shape[-1])
        gx = gw = None
        if needs_x:
            gx = (flat @ ctx.weight.dense()).view(*gy.shape[:-1], -1)
        if needs_weight:
            gw = flat.t() @ x.reshape(-1, x.shape[-1])
        return gx, gw, flat.sum(0) if needs_bias else None, None


class _Conv(Function):
    """`torch.convolution`; keeps x, and no weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, place: Tensor, bias: Tensor | None, weight: Weight, where: Any
    ) -> Tensor:
        ctx.weight, ctx.where = weight, where
        ctx.bias_shape = None if bias is None else list(bias.shape)
        # Its gradient by the input takes the input's shape alone.
        ctx.shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return torch.convolution(x, weight.dense(), bias, *where)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        x = gy.new_empty(1).expand(ctx.shape) if x is None else x
        grads = torch.ops.aten.convolution_backward(
            gy, x, ctx.weight.dense(), ctx.bias_shape, *ctx.where, wanted
        )
        return *(g if w else None for g, w in zip(grads, wanted, strict=True)), None, None


class _Embedding(Function):
    """`F.embedding`; keeps the indices."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, place: Tensor, weight: Weight, padding: int, by_count: bool
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rest = place.shape[0], padding, by_count
        return F.embedding(ids, weight.dense())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(gy, ids, *ctx.rest), None, None, None


def _linear(module: Any, weight: Weight) -> Run | None:
    def forward(x: Tensor) -> Tensor:
        x, off = _own_type(x, module.weight)
        with off:
            y: Tensor = _Linear.apply(x, module.weight, module.bias, weight)
        return y

    return forward


def _conv(module: Any, weight: Weight) -> Run | None:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    still = (0,) * len(module.stride)
    where = (module.stride, module.padding, module.dilation, False, still, module.groups)

    def forward(x: Tensor) -> Tensor:
        x, off = _own_type(x, module.weight)
        alone = x.ndim < module.weight.ndim
        with off:
            y: Tensor = _Conv.apply(
                x[None] if alone else x, module.weight, module.bias, weight, where
            )
        return y[0] if alone else y

    return forward


def _embedding(module: Any, weight: Weight) -> Run | None:
    if module.max_norm is not None or module.sparse:
        return None
    padding = -1 if module.padding_idx is None else module.padding_idx

    def forward(ids: Tensor) -> Tensor:
        y: Tensor = _Embedding.apply(ids, module.weight, weight, padding, module.scale_grad_by_freq)
        return y

    return forward


def _own_type(x: Tensor, weight: Tensor) -> tuple[Tensor, AbstractContextManager[Any]]:
    """The input in the weight's type where autocast would cast both, and what keeps it from it."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, nullcontext()
    return x.to(weight.dtype), torch.autocast(device, enabled=False)


_KINDS: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Any, Weight], Run | None]], ...] = (
    ((nn.Linear,), _linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    ((nn.Embedding,), _embedding),
)


# --- models


class Compressed:
    """A model whose large weights lie compressed, until `restore`.

    Weights of linear layers, convolutions and embeddings are compressed where the forward pass is
    torch's own, or scales its output (Gemma's embedding). Parameters stay listed under their
    names; `model.state_dict()` holds decoded weights, and loading one encodes.

    Note:
        A weight that the model reads by itself (`self.pos.weight[:n]`) and not through its module
        reads as NaN: keep it. Under autocast weights are used in their own type. Move the model to
        its device first.

    Args:
        model: whose weights are replaced.
        keep: names of weights that stay as they are.
        n_bits: of mantissas; None = all, without loss.

    Attributes:
        weights: parameter -> its codes.
        left: names of large weights that stay as they are.

    Raises:
        InvalidKnob: a name to keep is unknown, or a weight to be rounded is NaN or infinite.
        UnsupportedModel: nothing in it can be compressed.
    """

    def __init__(
        self, model: nn.Module, n_bits: int | None = None, keep: Collection[str] = ()
    ) -> None:
        self.model = model
        self.weights: dict[Tensor, Weight] = {}
        self.left: list[str] = []
        self._undo: list[Callable[[], object]] = []
        users = self._users()
        large = {p: n for n, p in model.named_parameters() if p.numel() >= SMALL}
        if unknown := sorted(set(keep) - {name for name, _ in model.named_parameters()}):
            raise InvalidKnob(f"keep={unknown[0]!r} is no parameter of the model")
        if not any(param in users and name not in keep for param, name in large.items()):
            raise UnsupportedModel(f"{type(model).__name__} has no weight that could be compressed")
        for param, name in large.items():
            if param not in users or name in keep:
                self.left.append(name)
                continue
            weight = self.weights[param] = Weight(n_bits)
            weight.store(param.data)
            param.data = _nothing(param)
            for module, make in users[param]:
                self._install(module, param, weight, make)

    @property
    def n_bytes(self) -> int:
        """Bytes of the codes."""
        return bytes_of(list(self.weights.values()))

    @property
    def plain_bytes(self) -> int:
        """Bytes of the same weights as they were."""
        return sum(param.numel() * param.element_size() for param in self.weights)

    def optimizer(
        self, states: OptimizerPolicy, lr: float = 1e-3, **hyper: Any
    ) -> CompressedOptimizer:
        """An optimizer that moves each weight within the backward pass.

        Raises:
            InvalidKnob: the codes lose something, or a hyperparameter is unknown or out of range.
        """
        if any(weight.n_bits is not None for weight in self.weights.values()):
            raise InvalidKnob("rounded weights are for inference; train with lossless codes")
        optimizer = CompressedOptimizer(self, states, lr, hyper)
        self._undo.append(optimizer.release)
        return optimizer

    def restore(self) -> None:
        """Give the model its weights again, as they are now."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        for param, weight in self.weights.items():
            param.data = weight.dense()
        self.weights.clear()

    def _users(self) -> dict[Tensor, list[tuple[nn.Module, Run]]]:
        """Modules of each weight, and what compresses it, where all of its modules can."""
        found: dict[Tensor, list[tuple[nn.Module, Any]]] = {}
        unfit: set[Tensor] = set()
        for module in self.model.modules():
            make = next((make for kinds, make in _KINDS if isinstance(module, kinds)), None)
            for name, param in module.named_parameters(recurse=False):
                able = make is not None and name == "weight" and param.dtype in LOSSLESS
                if able and make is not None and make(module, Weight(None)) and _is_native(module):
                    found.setdefault(param, []).append((module, make))
                else:
                    unfit.add(param)
        return {param: users for param, users in found.items() if param not in unfit}

    def _install(self, module: nn.Module, param: Tensor, weight: Weight, make: Any) -> None:
        run = make(module, weight)
        vars(module)[_CODES] = weight  # where whoever counts bytes finds it
        scale = getattr(module, "embed_scale", None)
        if scale is None:
            vars(module)["forward"] = run
        else:  # transformers' scaled embedding
            vars(module)["forward"] = lambda ids: run(ids) * module.embed_scale.to(param.dtype)

        def saved(_: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
            state[f"{prefix}weight"] = weight.dense()

        def opened(*_: Any) -> None:
            param.data = weight.dense()

        def closed(*_: Any) -> None:
            weight.store(param.data)
            param.data = _nothing(param)

        hooks = (
            module.register_state_dict_post_hook(saved),
            module.register_load_state_dict_pre_hook(opened),
            module.register_load_state_dict_post_hook(closed),
        )
        self._undo += [partial(vars(module).pop, name) for name in ("forward", _CODES)]
        self._undo += [hook.remove for hook in hooks]


class CompressedOptimizer(torch.optim.Optimizer):
    """Moves every parameter as soon as its gradient is there, and frees the gradient.

    Gradients cannot be accumulated over passes, nor clipped by the norm of all of them. `step` and
    `zero_grad` find nothing left to do; learning rates may be scheduled as usual. A gradient that
    is NaN raises in the backward pass, when other weights have moved already.

    Args:
        compressed: the model.
        states: the optimizer to use, any of this room.
        lr: step size.
        hyper: hyperparameters of the rule.
    """

    def __init__(
        self, compressed: Compressed, states: OptimizerPolicy, lr: float, hyper: Mapping[str, Any]
    ) -> None:
        self._weights = compressed.weights
        params = [param for param in compressed.model.parameters() if param.requires_grad]
        self._inner = states(params, lr=lr, **hyper)
        super().__init__(self._inner.param_groups, self._inner.defaults)
        self._link()
        self._hooks = [p.register_post_accumulate_grad_hook(self._move) for p in params]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Nothing is left to do; returns what the closure returns, which moves all."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    @torch.no_grad()
    def _move(self, param: Tensor) -> None:
        weight = self._weights.get(param)
        if weight is not None:
            param.data = weight.dense()
        try:
            self._inner.step()  # no other parameter has a gradient
        finally:
            if weight is not None:
                weight.store(param.data)
                param.data = _nothing(param)
            param.grad = None

    def release(self) -> None:
        """Move nothing any more."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """States; the weights are the model's."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, bit for bit.

        Raises:
            InvalidKnob: it was saved by another rule or with other codecs.
        """
        self._inner.load_state_dict(state_dict)
        self._link()

    def _link(self) -> None:
        """One set of groups and states for what schedulers change and the inner optimizer reads."""
        self.param_groups, self.state = self._inner.param_groups, self._inner.state


def _nothing(param: Tensor) -> Tensor:
    """A tensor of the shape whose storage is one number, and no number that could pass unseen."""
    return torch.full((1,), torch.nan, dtype=param.dtype, device=param.device).expand(param.shape)


def _is_native(module: nn.Module) -> bool:
    """Whether its forward pass is torch's own, or a scaled embedding of transformers."""
    if "forward" in vars(module):
        return False
    owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
    scaled = isinstance(module, nn.Embedding) and torch.is_tensor(
        getattr(module, "embed_scale", None)
    )
    return owner.__module__.startswith("torch.nn.modules.") or scaled
