"""Reversible sequences: only the last hidden state is kept, the backward pass works out the others.

The hidden state is split into n parts. Each function reads all parts but one and adds to that one,
so it can be undone by subtracting the same again:

    y_k = x_k + F_k(y_1 .. y_{k-1}, x_{k+1} .. x_n)        forward,  k = 1 .. n
    x_k = y_k - F_k(y_1 .. y_{k-1}, x_{k+1} .. x_n)        backward, k = n .. 1

The backward pass takes the functions in reverse: it runs F_k again, differentiates it, subtracts
what it gave, and holds the graph of one function at a time. What is kept does not grow with depth.

Shapes: D width of the hidden state along `dim`, P = D / n width of a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


class ReversibleSequence(nn.Module):
    """A chain of residual functions whose inputs are worked out anew instead of being kept.

    Kept for the backward pass: the output, and the state of the random generators before each
    function that draws (5 KB on a CPU, 16 bytes on CUDA). Values and gradients are those of the
    same formula under ordinary autograd, up to rounding; dropout draws the same masks, autocast is
    as it was, and buffers such as the statistics of a BatchNorm are updated once.

    A reconstruction is as exact as the hidden state's type, and bfloat16 would drift: between the
    functions the state is at least float32, whatever the type of what goes in and comes out.

    Note:
        Between forward and backward pass the functions must stay in the same mode (train or eval).
        There is no second derivative.

    Args:
        parts: n, parts of the hidden state.
        fns: functions in order, n a layer; the k-th of a layer gets all parts but the k-th as its
            arguments, each (..., P, ...), and returns what is added to the k-th.
        dim: axis along which the hidden state is split.

    Raises:
        InvalidKnob: fewer than two parts, or functions that do not make whole layers.
    """

    def __init__(self, parts: int, fns: Sequence[nn.Module], dim: int = -1) -> None:
        super().__init__()
        if parts < 2 or len(fns) % parts:
            raise InvalidKnob(
                f"parts={parts} with {len(fns)} functions: give at least two parts and one "
                "function for each part of each layer"
            )
        self.parts, self.dim = parts, dim
        self.fns = nn.ModuleList(fns)

    def forward(self, x: Tensor) -> Tensor:  # (..., D, ...) -> (..., D, ...)
        """The hidden state after all functions.

        Raises:
            InvalidKnob: the hidden state cannot be split into equal parts.
        """
        if x.shape[self.dim] % self.parts:
            raise InvalidKnob(
                f"a width of {x.shape[self.dim]} cannot be split into {self.parts} equal parts"
            )
        owned = [[w for w in fn.parameters() if w.requires_grad] for fn in self.fns]
        # Each once, so that a weight that several functions share gets the sum from one place.
        weights = list(dict.fromkeys(w for some in owned for w in some))
        output: Tensor = _Reversible.apply(self, owned, x, *weights)
        return output

    def plain(self, x: Tensor) -> Tensor:  # (..., D, ...) -> (..., D, ...)
        """The same for ordinary autograd to follow, which keeps what every function needs."""
        parts = list(_state(x).chunk(self.parts, self.dim))
        for i, fn in enumerate(self.fns):
            k = i % self.parts
            parts[k] = parts[k] + fn(*_others(parts, k, x.dtype))
        return torch.cat(parts, self.dim).to(x.dtype)

    @torch.no_grad()
    def inverse(self, y: Tensor) -> Tensor:
        """The hidden state before all functions, from the one after; nothing may draw."""
        state = _state(y).clone()
        parts = state.chunk(self.parts, self.dim)
        for i in reversed(range(len(self.fns))):
            k = i % self.parts
            parts[k].sub_(self.fns[i](*_others(parts, k, y.dtype)))
        return state.to(y.dtype)


def _state(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _others(parts: Sequence[Tensor], k: int, dtype: torch.dtype) -> list[Tensor]:
    """What the function of part k reads, in the type that it was built for."""
    return [part.to(dtype) for j, part in enumerate(parts) if j != k]


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """Draw the weights of a model anew from a generator of their own, and return it.

    Matrices and kernels are drawn with a variance of 1 / fan-in, biases are zero; the vectors of
    norms stay as they are.
    """
    draws = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            fan_in = weight[0].numel()
            nn.init.normal_(weight, std=fan_in**-0.5, generator=draws)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
    return model


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chain: ReversibleSequence, owned: list[list[Tensor]], x: Tensor, *weights: Tensor
    ) -> Tensor:
        y = _state(x).clone(memory_format=torch.contiguous_format)
        parts = y.chunk(chain.parts, chain.dim)
        ctx.chain, ctx.owned, ctx.ambient = chain, owned, _Ambient.now(x.device)
        draws: list[Tensor | None] = []
        for i, fn in enumerate(chain.fns):
            k = i % chain.parts
            before = _random_states(x.device)
            with ctx.ambient.entered():
                parts[k].add_(fn(*_others(parts, k, x.dtype)))
            drawn = any(
                not torch.equal(a, b) for a, b in zip(before, _random_states(x.device), strict=True)
            )
            draws += before if drawn else [None] * len(before)
        # Weights cost nothing here, and autograd then notices when one was changed in between.
        ctx.save_for_backward(y, *draws, *weights)
        ctx.n_draws, ctx.dtype = len(draws), x.dtype
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        chain: ReversibleSequence = ctx.chain
        y, *saved = ctx.saved_tensors
        draws, weights = saved[: ctx.n_draws], saved[ctx.n_draws :]
        state = y.clone()
        grad = _state(grad_y).clone(memory_format=torch.contiguous_format)
        parts = state.chunk(chain.parts, chain.dim)
        grads = grad.chunk(chain.parts, chain.dim)
        places = {id(w): i for i, w in enumerate(dict.fromkeys(w for o in ctx.owned for w in o))}
        of_weights: list[Tensor | None] = [None] * len(weights)
        n_generators = ctx.n_draws // len(chain.fns)

        for i in reversed(range(len(chain.fns))):
            k = i % chain.parts
            others = [one.detach().requires_grad_() for one in _others(parts, k, ctx.dtype)]
            states = draws[i * n_generators : (i + 1) * n_generators]
            with torch.enable_grad(), ctx.ambient.entered(), _replayed(states, y.device):
                added = _without_updates(chain.fns[i], others)
            if added.requires_grad:
                found = torch.autograd.grad(
                    added, [*others, *ctx.owned[i]], grads[k].to(added.dtype), allow_unused=True
                )
                targets = (*grads[:k], *grads[k + 1 :])
                for target, one in zip(targets, found[: len(others)], strict=True):
                    if one is not None:
                        target.add_(one)
                for w, one in zip(ctx.owned[i], found[len(others) :], strict=True):
                    before = of_weights[places[id(w)]]
                    if one is not None:
                        of_weights[places[id(w)]] = one if before is None else before + one
            parts[k].sub_(added.detach())
        grad_x = grad.to(ctx.dtype) if ctx.needs_input_grad[2] else None
        return None, None, grad_x, *of_weights


def _without_updates(fn: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """Run `fn` once more; what it would write into its buffers goes into copies."""
    copies = {name: buffer.clone() for name, buffer in fn.named_buffers()}
    output: Tensor = torch.func.functional_call(fn, copies, tuple(inputs))
    return output


@dataclass(frozen=True, slots=True)
class _Ambient:
    """The autocast that a forward pass ran under.

    Attributes:
        device: type of the device.
        enabled: whether it was on.
        dtype: the lower type.
    """

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> _Ambient:
        kind = device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    @contextmanager
    def entered(self) -> Iterator[None]:
        # Without its cache: a weight cast where no gradients are recorded would stay in it, and
        # give the next use of that weight no gradient.
        with torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False):
            yield


def _random_states(device: torch.device) -> list[Tensor]:
    """States of the generators that a function on this device may draw from."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_random_states(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _replayed(states: Sequence[Tensor | None], device: torch.device) -> Iterator[None]:
    """Draw again what was drawn from these states, and leave the generators as they are now."""
    kept = [state for state in states if state is not None]
    if not kept:
        yield
        return
    now = _random_states(device)
    _set_random_states(kept, device)
    try:
        yield
    finally:
        _set_random_states(now, device)
