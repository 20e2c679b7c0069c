"""Actions: what can be done with what one module saves for its backward pass.

Two kinds. Some look at single saved tensors (`pack`) and work for any operation, of code that we do
not own too. Others put another operation in place of the module's (`swap`), the only way to save
something else and use another formula backward. A plan gives a site one action or several: the
first that swaps its operation, and all that look at tensors, tried in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memwise.codec.spec import parse
from memwise.codec.th import Codec
from memwise.errors import InvalidKnob
from memwise.train.engine.act_hooks import (
    Action,
    Coded,
    Form,
    Hooks,
    OnDisk,
    OnHost,
    Remade,
    Restrided,
    Spot,
    in_storage_order,
)
from memwise.train.engine.act_tables import FUNCTIONS, Settings, Steps, steps
from memwise.train.engine.saves import (
    Conv,
    Convolution,
    Dropout,
    FrozenNorm,
    Linear,
    Pointwise,
    RMSNorm,
    SketchSave,
    check_sketch,
)

Run = Callable[..., Any]

_CODES = "codes"
_OF_NO_AXIS = ("none", "tensor", "group")  # scales that do not ask where a row ends

_CONVS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


# --- single tensors


@dataclass(frozen=True)
class Keep(Action):
    """Autograd keeps what it would."""

    def __str__(self) -> str:
        return "keep"


@dataclass(frozen=True)
class Quant(Action):
    """Keeps codes of a codec; what several operations save is coded once, by the first of them.

    Attributes:
        codec: its name; one that rounds to the nearest.
    """

    codec: str

    def __post_init__(self) -> None:
        """Refuses a codec that draws: recomputed and shared tensors have to come out the same."""
        if parse(self.codec).rounding.kind == "stochastic":
            raise InvalidKnob(f"codec {self.codec!r} draws; take it without 'stochastic'")

    def pack(self, t: Tensor, hooks: Hooks) -> Form | None:
        """Codes, one copy for all operations that save this tensor; None beyond its range."""
        if t.numel() * t.element_size() > t.untyped_storage().nbytes():
            return None  # an expanded tensor has fewer numbers than it shows
        codec = Codec(parse(self.codec))
        # Attention saves as heads what a linear layer saves as rows: one storage, one set of codes.
        flat = in_storage_order(t) if codec.spec.scale.kind in _OF_NO_AXIS else None
        try:
            if flat is None:
                return hooks.shared(t, _CODES, lambda: Coded(t, codec))
            form = hooks.shared(flat, _CODES, lambda: Coded(flat, codec))
            return Restrided(form, t.shape, t.stride())
        except InvalidKnob as problem:
            hooks.note(hooks.stack[-1].name if hooks.stack else "(outside)", f"kept: {problem}")
            return None

    def __str__(self) -> str:
        return self.codec


@dataclass(frozen=True)
class Remake(Action):
    """Makes outputs of cheap functions again from the inputs that their own backward keeps.

    The normalised input of a linear layer, or the GELU between two of them, then costs nothing,
    wherever these functions were called.
    """

    def pack(self, t: Tensor, hooks: Hooks) -> Form | None:
        """A recipe, where the tensor is the output of such a function."""
        return Remade.of(t)

    def __str__(self) -> str:
        return "remake"


@dataclass(frozen=True)
class Offload(Action):
    """Moves saved tensors to another tier.

    Attributes:
        store: "host" or "disk".
        folder: where files are made; None = the system's folder for temporary files.
    """

    store: str = "disk"
    folder: str | None = None

    def __post_init__(self) -> None:
        """Refuses unknown stores."""
        if self.store not in ("host", "disk"):
            raise InvalidKnob(f"store={self.store!r}: use 'host' or 'disk'")

    def pack(self, t: Tensor, hooks: Hooks) -> Form | None:
        """A copy elsewhere, one for all operations; None for what is on the host already."""
        if self.store == "disk":
            return hooks.shared(t, str(self), lambda: OnDisk(t, hooks.folder(self.folder)))
        if t.device.type == "cpu":
            hooks.note(hooks.stack[-1].name if hooks.stack else "(outside)", "is on the host")
            return None
        return hooks.shared(t, str(self), lambda: OnHost(t))

    def __str__(self) -> str:
        return f"offload to {self.store}"


# --- other operations


class Swap(Action):
    """An action that puts another operation in place of a module's own."""

    def swap(self, module: nn.Module, run: Run, spot: Spot | None, hooks: Hooks) -> Run | None:
        """The new forward pass, or None where there is none for this module.

        Args:
            module: of one of torch's classes, with the forward pass of this class.
            run: its forward pass.
            spot: where to count; None where another pass counts.
            hooks: of the tape.
        """
        raise NotImplementedError


class Wrap(Action):
    """An action on a block as a whole: it decides how the block's forward pass is run."""

    def wrap(self, module: nn.Module, run: Run, spot: Spot, hooks: Hooks) -> Run:
        """The new forward pass.

        Args:
            module: the block.
            run: its forward pass.
            spot: where to count.
            hooks: of the tape; `hooks.shares` holds what the blocks have in common.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FewBit(Swap):
    """Keeps, of the input of an activation function, the interval it lies in.

    Attributes:
        bits: of an interval's number, 1 to 4.
    """

    bits: int = 3

    def __post_init__(self) -> None:
        """Refuses what no table has."""
        if self.bits not in (1, 2, 3, 4):
            raise InvalidKnob(f"bits={self.bits!r}: an interval takes 1 to 4 bits")

    def swap(self, module: nn.Module, run: Run, spot: Spot | None, hooks: Hooks) -> Run | None:
        """For the functions that have tables; piecewise linear ones take one exact bit."""
        exact = exact_steps(module)
        if exact is not None:
            return _pointwise(run, exact, spot, hooks, keeps_output=isinstance(module, nn.ReLU))
        op = type(module).__name__
        if op not in FUNCTIONS:
            return None
        table = steps(op, _settings(module), self.bits)
        return _pointwise(run, table, spot, hooks, keeps_output=op in ("Tanh", "Sigmoid"))

    def __str__(self) -> str:
        return f"few-bit {self.bits}"


@dataclass(frozen=True)
class Sketch(Swap):
    """Keeps, of the input of a linear layer, random sums of its tokens.

    Attributes:
        ratio: sums a token.
        kind: "gaussian", "rademacher" or "rows".
    """

    ratio: float = 0.5
    kind: str = "gaussian"

    def __post_init__(self) -> None:
        """Refuses sketches that cannot be."""
        check_sketch(self.ratio, self.kind)

    def swap(self, module: nn.Module, run: Run, spot: Spot | None, hooks: Hooks) -> Run | None:
        """For linear layers, those of transformers' GPT-2 among them."""
        if not isinstance(module, nn.Linear) and not is_hf_conv1d(module):
            return None
        turned = is_hf_conv1d(module)

        def forward(x: Tensor) -> Tensor:
            weight: Any = module.weight
            if not torch.is_grad_enabled() or not weight.requires_grad:
                return run(x)
            # A sketch beside the original would cost bytes and accuracy. Not asked where a pass is
            # repeated, since both have to choose the same.
            if spot is not None and hooks.holds(x):
                return run(x)
            save = SketchSave(self.ratio, self.kind, hooks.next_seed())
            bias: Any = module.bias
            x, rest, off = autocast(x, weight.t() if turned else weight, bias)
            if spot is not None:
                hooks.would_keep(x, spot)
            with off:
                return Linear.apply(x, *rest, rest[0], save, hooks)

        return forward

    def __str__(self) -> str:
        return f"{self.kind} sketch {self.ratio:g}"


@dataclass(frozen=True)
class Drop(Swap):
    """Keeps only what the gradients that are asked for need, and masks as bits; exact.

    The input of a convolution goes where its weight is frozen, that of a batch normalisation by
    running statistics too; ReLU, leaky ReLU and dropout keep a bit a number, RMSNorm one copy.
    """

    def swap(self, module: nn.Module, run: Run, spot: Spot | None, hooks: Hooks) -> Run | None:
        """For the layers named above; torch's linear layer and LayerNorm keep no more already."""
        exact = exact_steps(module)
        if exact is not None:
            return _pointwise(run, exact, spot, hooks, keeps_output=isinstance(module, nn.ReLU))
        for kinds, make in _DROPS:
            if isinstance(module, kinds):
                return make(module, run, spot, hooks)
        return None

    def __str__(self) -> str:
        return "needed only"


@dataclass(frozen=True)
class Recompute(Action):
    """Keeps the input of a module and runs its forward pass again in the backward pass.

    Swaps planned for modules inside of it hold in both passes; other actions inside of it have
    nothing to act on. Batch statistics are updated once, random numbers are drawn again the same.
    """

    def __str__(self) -> str:
        return "recompute"


def exact_steps(module: nn.Module) -> Steps | None:
    """The derivative of a function that is linear on both sides of 0."""
    if isinstance(module, nn.ReLU):
        return Steps((0.0,), (0.0, 1.0))
    if isinstance(module, nn.LeakyReLU):
        return Steps((0.0,), (module.negative_slope, 1.0))
    return None


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`: a linear layer with its weight the other way round."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _settings(module: nn.Module) -> Settings:
    match module:
        case nn.GELU():
            return (module.approximate,)
        case nn.Softplus():
            return float(module.beta), float(module.threshold)
        case nn.ELU():
            return (module.alpha,)
    return ()


def _pointwise(
    run: Run, table: Steps, spot: Spot | None, hooks: Hooks, *, keeps_output: bool
) -> Run:
    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not x.requires_grad:
            return run(x)
        y = Pointwise.apply(x, run, table)
        if spot is not None:
            hooks.would_keep(y if keeps_output else x, spot)
        return y

    return forward


def _dropout(module: Any, run: Run, spot: Spot | None, hooks: Hooks) -> Run:
    def forward(x: Tensor) -> Tensor:
        works = module.training and 0 < module.p < 1 and not module.inplace
        if not (works and torch.is_grad_enabled() and x.requires_grad):
            return run(x)
        if spot is not None:
            # The mask has the numbers' size on a CPU, and a byte a number on CUDA.
            line = hooks.line(spot)
            line.plain_bytes += x.numel() * (1 if x.is_cuda else x.element_size())
        return Dropout.apply(x, module.p)

    return forward


def _conv(module: Any, run: Run, spot: Spot | None, hooks: Hooks) -> Run:
    transposed = module.transposed

    def forward(x: Tensor, output_size: list[int] | None = None) -> Tensor:
        batched = x.ndim == module.weight.ndim
        if not torch.is_grad_enabled() or not batched or _lopsided(module):
            return run(x, output_size) if transposed else run(x)
        padding = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = (0,) * len(module.stride)
        elif isinstance(padding, str):
            padding = tuple(module._reversed_padding_repeated_twice[::-2])
        extra = module.output_padding
        if transposed:
            n = len(module.stride)
            extra = module._output_padding(
                x, output_size, module.stride, module.padding, module.kernel_size, n,
                module.dilation,
            )  # fmt: skip
        conv = Conv(
            tuple(module.stride), tuple(padding), tuple(module.dilation), transposed, tuple(extra),
            module.groups,
        )  # fmt: skip
        x, rest, off = autocast(x, module.weight, module.bias)
        if spot is not None:
            hooks.would_keep(x, spot)
        with off:
            return Convolution.apply(x, *rest, conv)

    return forward


def _lopsided(module: Any) -> bool:
    """Whether "same" padding is wider on one side, which torch does with a copy."""
    around = module._reversed_padding_repeated_twice
    return isinstance(module.padding, str) and list(around[::2]) != list(around[1::2])


def _batch_norm(module: Any, run: Run, spot: Spot | None, hooks: Hooks) -> Run:
    def forward(x: Tensor) -> Tensor:
        learns = module.weight is not None and module.weight.requires_grad
        fixed = not module.training and module.running_mean is not None
        if not fixed or learns or not torch.is_grad_enabled():
            return run(x)
        if spot is not None:
            hooks.would_keep(x, spot)
        return FrozenNorm.apply(
            x, module.running_mean, module.running_var, module.weight, module.bias, module.eps
        )

    return forward


def _rms_norm(module: Any, run: Run, spot: Spot | None, hooks: Hooks) -> Run:
    def forward(x: Tensor) -> Tensor:
        weight = module.weight
        mixed = weight is not None and weight.dtype != x.dtype
        if mixed or torch.is_autocast_enabled(x.device.type) or not torch.is_grad_enabled():
            return run(x)
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        if spot is not None:
            hooks.would_keep(x, spot)
            hooks.line(spot).plain_bytes += x.untyped_storage().nbytes()  # the normalised copy
        return RMSNorm.apply(x, weight, len(module.normalized_shape), eps)

    return forward


_DROPS: tuple[tuple[Any, Callable[..., Run]], ...] = (
    (nn.Dropout, _dropout),
    (_CONVS, _conv),
    (_BATCH_NORMS, _batch_norm),
    (nn.RMSNorm, _rms_norm),
)


def autocast(
    x: Tensor, *rest: Tensor | None
) -> tuple[Tensor, list[Tensor | None], AbstractContextManager[Any]]:
    """The tensors in the type that autocast would give them, and what keeps it from casting."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, list(rest), nullcontext()
    low = torch.get_autocast_dtype(device)
    cast = [t if t is None or t.dtype == torch.float64 else t.to(low) for t in rest]
    x = x if x.dtype == torch.float64 else x.to(low)
    return x, cast, torch.autocast(device, enabled=False)


@contextmanager
def steady(module: nn.Module) -> Iterator[None]:
    """Lets buffers (batch statistics) change only as copies while a pass is repeated."""
    # Other tensors in their place: to write the old numbers back would count as an in-place change.
    kept: list[tuple[Any, dict[str, Any]]] = []
    for child in module.modules():
        kept.append((child, dict(child._buffers)))
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for child, buffers in kept:
            child._buffers.update(buffers)


Planned = Action | tuple[Action, ...]
