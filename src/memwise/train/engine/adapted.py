"""Linear maps with deltas in the place of plain ones, and where in a model they belong.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from memwise.codec.th import Packed
from memwise.errors import InvalidKnob, UnsupportedModel
from memwise.train.engine.bases import Base
from memwise.train.engine.deltas import Delta

Target: TypeAlias = str | Callable[[str, nn.Module], bool] | None
"""Regular expression searched in names of modules, or a test of name and module, or the default."""

_ARRAY = "weight_"  # packed arrays are buffers beside where the weight was


class AdaptedLinear(nn.Module):
    """A frozen linear map with named deltas, of which one is active; stands where the map stood.

    Args:
        origin: nn.Linear or Conv1D, whose parameters are taken over, not copied.
        packed: the encoded weight, which then replaces the dense one.
        shared: whether another module uses the same weight, so that nothing may be merged into it.

    Attributes:
        deltas: by name.
        active: name of the delta that is added; None = the frozen map alone.
        gain: factor of the delta's share of the output; 1 but while layers are compared.
        origin: the replaced module where its weight is still dense, else None.
    """

    def __init__(self, origin: nn.Module, packed: Packed | None = None, shared: bool = False):
        super().__init__()
        weight: Any = origin.weight
        self.transposed = not isinstance(origin, nn.Linear)
        self.shared = shared
        self.register_parameter("bias", origin.bias)  # type: ignore[arg-type]
        self.register_parameter("weight", weight)
        self._packed: tuple[str, tuple[int, ...], torch.dtype] | None = None
        # In a tuple, so that it is no child: its parameters would appear twice.
        self._origin: tuple[nn.Module, ...] = (origin,)
        if packed is not None:
            self.store(packed)
        self.deltas = nn.ModuleDict()
        self.active: str | None = None
        self.gain = 1.0
        self.train(origin.training)

    def store(self, packed: Packed) -> None:
        """Keep the weight in this form from now on; the dense one is let go."""
        del self.weight
        for name, array in packed.arrays.items():
            self.register_buffer(_ARRAY + name, array)
        self._packed = packed.codec, packed.shape, packed.dtype
        self._origin = ()

    @property
    def origin(self) -> nn.Module | None:
        """What stood here, where it can be put back."""
        return self._origin[0] if self._origin else None

    @property
    def codec(self) -> str | None:
        """Name of the codec of the weight; None where it is dense."""
        return self._packed[0] if self._packed else None

    @property
    def delta(self) -> Delta | None:
        """The active delta."""
        found: Any = None if self.active is None else self.deltas[self.active]
        return found

    @property
    def base(self) -> Base:
        """The frozen map."""
        bias: Any = self.bias
        if self._packed is None:
            weight: Any = self.weight
            return Base(weight.T if self.transposed else weight, None, bias)
        name, shape, dtype = self._packed
        arrays = {
            key.removeprefix(_ARRAY): value
            for key, value in self._buffers.items()
            if value is not None
        }
        return Base(None, Packed(name, shape, dtype, arrays), bias)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., O) for x (..., I)."""
        base, delta = self.base, self.delta
        if delta is None:
            return base.linear(x)
        y: Tensor = delta(x, base)
        if self.gain == 1:
            return y
        alone = base.linear(x)
        return alone + self.gain * (y - alone)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        """Move between devices; the arrays of a codec keep their types."""
        before = {key: value.dtype for key, value in self._buffers.items() if value is not None}
        arrays = {key: value for key, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for key, dtype in before.items():
            moved = self._buffers[key]
            if moved is not None and moved.dtype != dtype:
                self._buffers[key] = arrays[key].to(moved.device)
        return self

    def extra_repr(self) -> str:
        """What is stored, and what is added to it."""
        n_out, n_in = self.base.shape
        kind = self.codec or str(self.base.dtype).removeprefix("torch.")
        return f"in_features={n_in}, out_features={n_out}, base={kind}, active={self.active}"


def select(model: nn.Module, target: Target) -> dict[str, nn.Module]:
    """The linear maps that a target means, by name, each module once."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {name: m for name, m in model.named_modules() if _is_linear(m)}
    if target is None:
        layers = block_numbers(model)
        free = {name: m for name, m in linear.items() if id(_weight(m)) not in embeddings}
        return {name: m for name, m in free.items() if name in layers} or free
    wanted = re.compile(target).search if isinstance(target, str) else None
    chosen = {
        name: m
        for name, m in linear.items()
        if (wanted(name) if wanted else target(name, m))  # type: ignore[operator]
    }
    for name, module in chosen.items():
        if id(_weight(module)) in embeddings:
            raise InvalidKnob(
                f"{name} shares its weight with an embedding; leave it out of target={target!r}"
            )
    return chosen


def blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Name and members of the model's stack of blocks: its ModuleList with the most parameters.

    Raises:
        UnsupportedModel: it has none.
    """
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer = [(n, m) for n, m in stacks if not any(n.startswith(f"{other}.") for other, _ in stacks)]
    if not outer:
        raise UnsupportedModel(f"{type(model).__name__} has no ModuleList of blocks to work on")
    name, stack = max(outer, key=lambda one: sum(p.numel() for p in one[1].parameters()))
    return name, list(stack)


def block_numbers(model: nn.Module) -> dict[str, int]:
    """Number of the block of each module that lies in one (the outermost ModuleList counts)."""
    stacks = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    found = {}
    for name, _ in model.named_modules():
        around = [stack for stack in stacks if name.startswith(f"{stack}.")]
        if around:
            found[name] = int(name[len(min(around, key=len)) + 1 :].split(".")[0])
    return found


def _is_linear(module: nn.Module) -> bool:
    """Linear maps with a weight of their own; transformers' Conv1D is one with it transposed."""
    named = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return type(module) is nn.Linear or isinstance(module, AdaptedLinear) or named


def _weight(module: nn.Module) -> Any:
    return getattr(module, "weight", None)


def users(model: nn.Module) -> dict[int, int]:
    """How many modules use each parameter."""
    users: dict[int, int] = {}
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None:
                users[id(param)] = users.get(id(param), 0) + 1
    return users


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands; a module that is used twice stands in two places."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
