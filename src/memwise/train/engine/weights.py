"""Weights that an optimizer moves block by block: floats, or codes with no float copy behind them.

A stored linear map multiplies with its codes, decoded in blocks of rows. Its parameter has the
weight's shape and receives its gradient, so that hooks, groups and clipping work as usual; its
storage is one number, NaN, so that who takes it for the weight notices.

Shapes: n (or O) rows of d (or I) coordinates, B tokens (all leading axes), r rows of a block.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from memwise.codec.spec import Rounding, parse
from memwise.codec.th import Codec, Packed
from memwise.codec.th_rows import Bound, Rows, Scratch
from memwise.errors import InvalidKnob
from memwise.train.engine import adapted
from memwise.train.engine.adapted import Target, select
from memwise.train.engine.bases import Base, multiply, multiply_back

Tensor: TypeAlias = torch.Tensor


class Weights(Protocol):
    """A matrix (n, d) that is moved in blocks of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""

    @property
    def group(self) -> int:
        """Coordinates, in flat order, that must be written together."""

    @property
    def in_place(self) -> bool:
        """Whether blocks are views of float32 and need no room."""

    def read(self, rows: slice) -> Tensor:
        """Rows (r, d) in float32, to be looked at."""

    def bind(self, scratch: Scratch, place: int, n_rows: int) -> Bound:
        """What gives so many rows in float32, and takes them back when they have moved."""


@dataclass(frozen=True)
class Dense:
    """A matrix of floats."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.matrix.device

    @property
    def group(self) -> int:
        """Every number is written alone."""
        return 1

    @property
    def in_place(self) -> bool:
        """Whether a block of rows is a view."""
        return self.matrix.dtype == torch.float32

    def read(self, rows: slice) -> Tensor:
        """Rows (r, d) in float32."""
        return self.matrix[rows].float()

    def bind(self, scratch: Scratch, place: int, n_rows: int) -> Bound:
        """Rows of the matrix, copied to scratch where it is not float32."""
        return _Floats(self.matrix, None if self.in_place else scratch.block(place, n_rows), n_rows)


@dataclass(frozen=True)
class _Floats:
    matrix: Tensor
    room: Tensor | None
    n_rows: int

    def decode(self, first: int) -> Tensor:
        block = self.matrix[first : first + self.n_rows]
        return block if self.room is None else self.room.copy_(block)

    def encode(self, first: int, generator: torch.Generator) -> None:
        if self.room is not None:
            self.matrix[first : first + self.n_rows].copy_(self.room)


@dataclass(frozen=True)
class Coded:
    """A matrix of codes."""

    rows: Rows
    device: torch.device
    in_place: bool = False

    @classmethod
    def of(cls, packed: Packed) -> Coded:
        """The matrix that a codec holds; what is written goes into the same arrays."""
        shape = packed.shape[0], packed.shape[1]
        rows = Rows(parse(packed.codec), packed.arrays, shape)
        return cls(rows, packed.arrays["codes"].device)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return self.rows.shape

    @property
    def group(self) -> int:
        """Numbers that share a factor."""
        return max(self.rows.spec.scale.group, 1)

    def read(self, rows: slice) -> Tensor:
        """Rows (r, d), decoded."""
        packed = Packed(self.rows.spec.name, self.shape, torch.float32, self.rows.arrays)
        return Codec(self.rows.spec).decode(packed, rows)

    def bind(self, scratch: Scratch, place: int, n_rows: int) -> Bound:
        """Rows of the matrix, decoded to scratch."""
        return scratch.bind(self.rows, place, n_rows)


class StoredWeight(nn.Parameter):
    """A parameter whose numbers lie in `packed`; its own storage is one NaN.

    Args:
        packed: the encoded weight (O, I).
        requires_grad: whether it is trained.
    """

    packed: Packed

    def __new__(cls, packed: Packed, requires_grad: bool = True) -> StoredWeight:
        """A parameter of the shape and type that were encoded."""
        device = packed.arrays["codes"].device
        empty = _empty(packed.shape, packed.dtype, device)
        made: StoredWeight = torch.Tensor._make_subclass(cls, empty, requires_grad)
        made.packed = packed
        return made

    def dense(self) -> Tensor:
        """The weight (O, I), decoded."""
        return Codec(parse(self.packed.codec)).decode(self.packed)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Go to a device, and decode to this type from now on; the codes keep theirs."""
        arrays = {name: array.to(device) for name, array in self.packed.arrays.items()}
        grad, self.grad = self.grad, None
        self.packed = replace(self.packed, dtype=dtype, arrays=arrays)
        self.data = _empty(self.packed.shape, dtype, device)
        self.grad = None if grad is None else grad.to(device, dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeight:
        """Codes of its own; the clone of torch would be a whole matrix."""
        if id(self) not in memo:
            memo[id(self)] = StoredWeight(copy.deepcopy(self.packed, memo), self.requires_grad)
        found: StoredWeight = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled by its codes."""
        return StoredWeight, (self.packed, self.requires_grad)


class StoredLinear(nn.Module):
    """A linear map whose weight is trained without ever lying there in floats.

    Saved are the codes, under a key that names their codec, so that no other codec takes them over.
    """

    def __init__(self, weight: StoredWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        # The weight comes last: what takes it out for a moment and puts it back changes no order.
        self.register_parameter("bias", bias)
        self.register_parameter("weight", weight)
        self.weight: StoredWeight
        self.bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., O) for x (..., I)."""
        y: Tensor = _Multiplied.apply(x, self.weight)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes and codec."""
        n_out, n_in = self.weight.shape
        return f"in_features={n_in}, out_features={n_out}, weight={self.weight.packed.codec}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredLinear:
        weight = self._parameters.pop("weight")
        assert isinstance(weight, StoredWeight)
        super()._apply(fn, recurse)
        self._parameters["weight"] = weight
        like = fn(torch.empty(1, dtype=weight.dtype, device=weight.device))
        weight.move(like.device, like.dtype)
        return self

    def _saved(self) -> dict[str, Tensor]:
        packed = self.weight.packed
        held = {f"weight.{packed.codec}.{part}": array for part, array in packed.arrays.items()}
        return held if self.bias is None else {**held, "bias": self.bias}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for key, value in self._saved().items():
            destination[prefix + key] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any],
        strict: bool, missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        own = self._saved()
        given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        missing_keys += [prefix + key for key in own.keys() - given.keys()]
        unexpected_keys += [prefix + key for key in given.keys() - own.keys()]
        for key in own.keys() & given.keys():
            if own[key].shape != given[key].shape:
                shapes = f"{tuple(given[key].shape)} for {tuple(own[key].shape)}"
                error_msgs.append(f"{prefix}{key}: got {shapes}")
                continue
            with torch.no_grad():
                own[key].copy_(given[key])


class _Multiplied(torch.autograd.Function):
    """A stored linear map; keeps its inputs for the backward pass, as every linear map does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: StoredWeight) -> Tensor:
        """Outputs (..., O)."""
        ctx.save_for_backward(x)
        ctx.weight = weight
        return multiply(x, _base(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and of the weight."""
        (x,) = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = multiply_back(grad, _base(ctx.weight))
        if ctx.needs_input_grad[1]:
            of_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(ctx.weight.dtype)
        return of_x, of_weight


def store_weights(model: nn.Module, codec: str, target: Target = None) -> dict[str, StoredLinear]:
    """Put the weights of a model's linear maps into a codec, in place; returns the maps by name.

    Do this before an optimizer is built: the parameters are others afterwards. The first rounding
    is to nearest, those of the steps are as the codec says. Maps that share a weight still do.

    Args:
        model: changed in place.
        codec: whose rows can be written alone, such as `uint8/group256/stochastic`.
        target: which maps; by default all in the model's blocks, or all where it has none, and
            never one that shares its weight with an embedding.

    Raises:
        InvalidKnob: nothing matches, what matches is no nn.Linear, or the codec cannot do it.
    """
    spec = parse(codec)
    if spec.scale.kind == "rank1":
        raise InvalidKnob(f"codec {codec!r}: a weight's rows must not share factors; use group256")
    chosen = select(model, target)
    others = [name for name, module in chosen.items() if type(module) is not nn.Linear]
    if others or not chosen:
        what = f"no nn.Linear at {others[0]}" if others else f"nothing matches target={target!r}"
        raise InvalidKnob(f"weights are stored of nn.Linear alone, and there is {what}")
    nearest = Codec(replace(spec, rounding=Rounding()))
    empty = nearest.encode(torch.zeros(1, 1))
    Rows(spec, empty.arrays, (1, 1))  # refuses, before a dense weight is gone, what it cannot write
    made: dict[str, StoredLinear] = {}
    known: dict[int, StoredWeight] = {}
    for name, module in chosen.items():
        weight: Any = module.weight
        if id(weight) not in known:
            packed = replace(nearest.encode(weight.detach()), codec=spec.name)
            known[id(weight)] = StoredWeight(packed, weight.requires_grad)
        bias: Any = module.bias
        made[name] = StoredLinear(known[id(weight)], bias)
        made[name].train(module.training)
        adapted.replace(model, module, made[name])
    return made


def matrix_of(param: Tensor, plane: tuple[int, int]) -> Weights | None:
    """A parameter as rows that can be moved; None where its floats do not lie row after row."""
    if isinstance(param, StoredWeight):
        return Coded.of(param.packed)
    return Dense(param.data.view(plane)) if param.is_contiguous() else None


def rows_a_block(shape: tuple[int, int], groups: Iterable[int], size: int) -> int:
    """Rows of a block of a matrix (n, d): about `size` coordinates, and no group cut in two."""
    n, d = shape
    least = math.lcm(*(math.lcm(max(g, 1), max(d, 1)) // max(d, 1) for g in groups))
    most = max(least, size // max(d, 1) // least * least)
    n_blocks = -(-n // most)
    even = -(-n // max(n_blocks, 1))  # blocks of one size waste no call on a small rest
    return min(n, -(-even // least) * least)


def _base(weight: StoredWeight) -> Base:
    return Base(None, weight.packed, None)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1,), torch.nan, dtype=dtype, device=device).expand(shape)
