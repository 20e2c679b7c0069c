"""Linear maps as U diag(s) V^T, of which all sizes and a few directions at a time are trained.

The columns of U and V are directions, the numbers s their sizes. A map gives gradients for s and
for R columns on each side, never for a whole matrix, and the optimizer keeps states for no more.
After some steps other columns are drawn; now and then U and V are found anew, since columns that
were trained apart are no longer orthogonal.

What is saved are gradients and states: U and V together take about twice the bytes of the weight.

Shapes: O outputs, I inputs, M = min(O, I) directions, R of them in training, B tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memwise.errors import InvalidKnob, UnsupportedModel
from memwise.train.engine import adapted
from memwise.train.engine.adapted import Target, select, users
from memwise.train.engine.optimizer import MemOptimizer, OptimizerPolicy

_DIRECTIONS = 0  # the group of columns; in the other lies all else


class SpectralPolicy(Protocol):
    """Which directions are trained, and for how long."""

    @property
    def rank(self) -> int:
        """Directions of each map in training at a time, R."""

    @property
    def every(self) -> int:
        """Steps of an iteration, in which they stay the same."""

    @property
    def n_warmup(self) -> int:
        """Steps until directions move at the full rate, in each iteration."""

    def draw(self, sizes: Tensor, draws: torch.Generator) -> Tensor:
        """Numbers (R,) of different directions, given the sizes (M,), on the CPU."""

    def refactors(self, n_directions: int, iteration: int) -> bool:
        """Whether U and V are found anew before this iteration, counted from 0."""


class SpectralLinear(nn.Module):
    """A linear map in factors.

    `left` (O, M) and `right` (I, M) always hold all columns; those in training are parameters of
    their own, (O, R) and (I, R), which `settle` writes back after a step.

    Args:
        origin: the map, whose bias is taken over.
        rank: R, below min(O, I).
    """

    left: Tensor
    right: Tensor
    active: Tensor

    def __init__(self, origin: nn.Linear, rank: int) -> None:
        super().__init__()
        left, sizes, right = _factors(origin.weight.detach())
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.register_buffer("active", torch.arange(rank, device=left.device))
        self.sizes = nn.Parameter(sizes)  # (M,)
        self.left_trained = nn.Parameter(left[:, :rank].clone())
        self.right_trained = nn.Parameter(right[:, :rank].clone())
        self.register_parameter("bias", origin.bias)
        self.train(origin.training)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., O) for x (..., I)."""
        y: Tensor = _Factored.apply(x, self.sizes, self.left_trained, self.right_trained, self)
        bias: Any = self.bias
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes."""
        n_out, n_in = len(self.left), len(self.right)
        return f"in_features={n_in}, out_features={n_out}, rank={len(self.active)}"

    def weight(self) -> Tensor:
        """The weight (O, I), dense."""
        return (self.left * self.sizes.detach()) @ self.right.T

    @torch.no_grad()
    def settle(self) -> None:
        """Bring the trained columns back to length 1, and into U and V."""
        for whole, trained in ((self.left, self.left_trained), (self.right, self.right_trained)):
            trained.div_(trained.norm(dim=0, keepdim=True))
            whole.index_copy_(1, self.active, trained)

    @torch.no_grad()
    def select(self, active: Tensor) -> None:
        """Train these columns (R,) from now on."""
        self.active.copy_(active)
        self.left_trained.copy_(self.left[:, self.active])
        self.right_trained.copy_(self.right[:, self.active])

    @torch.no_grad()
    def refactor(self) -> None:
        """Find U, s and V of the same weight anew, orthogonal and by falling size."""
        left, sizes, right = _factors(self.weight())
        self.left.copy_(left)
        self.sizes.copy_(sizes)
        self.right.copy_(right)
        self.select(self.active)

    def plain(self) -> nn.Linear:
        """The map with a dense weight."""
        n_out, n_in = len(self.left), len(self.right)
        made = nn.Linear(n_in, n_out, bias=False, device="meta")
        made.weight = nn.Parameter(self.weight())
        made.register_parameter("bias", self.bias)  # type: ignore[arg-type]
        return made.train(self.training)


class _Factored(torch.autograd.Function):
    """x V diag(s) U^T; keeps x alone for the backward pass, as a dense map does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: Tensor, left_trained: Tensor, right_trained: Tensor,
        own: SpectralLinear,
    ) -> Tensor:  # fmt: skip
        # The trained columns come in for their gradients; their values stand in U and V.
        ctx.save_for_backward(x, sizes, own.left, own.right, own.active)
        return (((x.to(sizes.dtype) @ own.right) * sizes) @ own.left.T).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor, None]:
        x, sizes, left, right, active = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1]).to(sizes.dtype)  # (B, I)
        out = grad.reshape(-1, grad.shape[-1]).to(sizes.dtype)  # (B, O)
        inner, of_inner = flat @ right, out @ left  # (B, M) each
        of_sizes = (inner * of_inner).sum(0)
        # Of a direction at size 1: dL/dU_i = (dL/dW) V_i, without s_i but with its sign.
        sign = torch.where(sizes[active] < 0, -1.0, 1.0).to(sizes.dtype)
        of_left = out.T @ (inner[:, active] * sign)
        of_right = flat.T @ (of_inner[:, active] * sign)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = ((of_inner * sizes) @ right.T).view(x.shape).to(x.dtype)
        return of_x, of_sizes, of_left, of_right, None


class SpectralOptimizer(MemOptimizer):
    """AdamW on all that a model trains, with the directions of its maps drawn anew in between.

    A run is resumed from the model's and the optimizer's `state_dict`, loaded into what the same
    call has made of a model of the same shape.

    Args:
        model: with `maps` in it.
        maps: the factored maps, by name.
        policy: which directions, and for how long.
        lr: step size of all.
        seed: of the draws.
        hyper: those of AdamW; directions have no decay, since their lengths are 1.

    Raises:
        InvalidKnob: a hyperparameter is out of range.
    """

    def __init__(
        self, model: nn.Module, maps: Mapping[str, SpectralLinear], policy: SpectralPolicy,
        lr: float, seed: int, hyper: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.maps, self.spectral = dict(maps), policy
        directions = [p for m in maps.values() for p in (m.left_trained, m.right_trained)]
        known = {id(param) for param in directions}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        # What counts steps lies in the group, so that it is saved with it.
        first = {"params": directions, "weight_decay": 0.0, "seed": seed, "n_steps": 0}
        groups: list[dict[str, Any]] = [first, {"params": rest}]
        super().__init__(groups, OptimizerPolicy(), lr, hyper)
        self._begin(0)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all, bring directions back to length 1, and draw others where it is time to.

        Raises:
            InvalidKnob: the gradient of a map is NaN or infinite; nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_numbers()
        super().step()
        for module in self.maps.values():
            module.settle()
        group = self.param_groups[_DIRECTIONS]
        group["n_steps"] += 1
        iteration, within = divmod(group["n_steps"], self.spectral.every)
        if within == 0:
            self._begin(iteration)
        return loss

    def _move(self, param: Tensor, group: Mapping[str, Any], scratch: Any) -> None:
        if group is self.param_groups[_DIRECTIONS]:
            # The states of directions are new in each iteration, and their first steps the largest.
            within = group["n_steps"] % self.spectral.every
            group = {**group, "lr": group["lr"] * min(1.0, (within + 1) / self.spectral.n_warmup)}
        super()._move(param, group, scratch)

    def _begin(self, iteration: int) -> None:
        """Draw the directions of an iteration, and forget the states of the old ones."""
        seed = self.param_groups[_DIRECTIONS]["seed"]
        for index, module in enumerate(self.maps.values()):
            if iteration and self.spectral.refactors(len(module.sizes), iteration):
                module.refactor()
                self.state.pop(module.sizes, None)  # its numbers stand in another order
            place = (seed * 1_000_003 + index) * 100_003 + iteration
            draws = torch.Generator().manual_seed(place % (1 << 32))
            module.select(self.spectral.draw(module.sizes.detach().abs().float().cpu(), draws))
            for param in (module.left_trained, module.right_trained):
                self.state.pop(param, None)
                param.grad = None

    def _require_numbers(self) -> None:
        grads = [p.grad for m in self.maps.values() for p in m.parameters() if p.grad is not None]
        sums = [grad.sum(dtype=torch.float32) for grad in grads]
        if sums and not bool(torch.stack(sums).isfinite().all()):
            raise InvalidKnob(
                "a factored map got a gradient that is NaN or infinite, and did not use it; skip "
                "this step as torch.amp.GradScaler does, or clip the gradients"
            )


def factor(model: nn.Module, target: Target, rank: int) -> dict[str, SpectralLinear]:
    """Put the linear maps of a model into factors, in place; returns the maps by name.

    Frozen maps, and those with no more than `rank` directions, stay as they are.

    Args:
        model: changed in place.
        target: which maps; by default all in the model's blocks, or all where it has none, and
            never one that shares its weight with an embedding.
        rank: directions that are trained at a time.

    Raises:
        InvalidKnob: nothing is left to be trained so, or what matches is no nn.Linear.
        UnsupportedModel: two maps share a weight, or some are in factors already.
    """
    if known := [name for name, m in model.named_modules() if isinstance(m, SpectralLinear)]:
        raise UnsupportedModel(f"{known[0]} is in factors already; call restore(model) first")
    chosen: dict[str, Any] = dict(select(model, target))
    if others := [name for name, module in chosen.items() if type(module) is not nn.Linear]:
        raise InvalidKnob(f"{others[0]} is no nn.Linear; leave it out of target={target!r}")
    linear = {
        name: module
        for name, module in chosen.items()
        if module.weight.requires_grad and min(module.weight.shape) > rank
    }
    if not linear:
        raise InvalidKnob(
            f"target={target!r} matches no trained map with more than rank={rank} directions"
        )
    count = users(model)
    if shared := [name for name, module in linear.items() if count[id(module.weight)] > 1]:
        raise UnsupportedModel(f"{shared[0]} shares its weight; leave it out of the target")
    made = {}
    for name, module in linear.items():
        made[name] = SpectralLinear(module, rank)
        adapted.replace(model, module, made[name])
    return made


def restore(model: nn.Module) -> None:
    """Put plain linear maps with dense weights where factored ones stand."""
    for module in list(model.modules()):
        if isinstance(module, SpectralLinear):
            adapted.replace(model, module, module.plain())


def _factors(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, M), s (M,) and V (I, M) of a weight (O, I), in its type."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    left, sizes, right = torch.linalg.svd(exact, full_matrices=False)
    return (
        left.to(weight.dtype).contiguous(),
        sizes.to(weight.dtype),
        right.T.to(weight.dtype).contiguous(),
    )
