"""Update rules: what an optimizer does with a gradient, on float32 blocks and in place.

A rule is pure arithmetic. It knows neither how its states are stored between steps nor how large
the tensor is: the engine hands it one block after another.

Shapes: r rows of d coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch

from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor
Hyper: TypeAlias = Mapping[str, Any]


class Rule(Protocol):
    """One way to turn gradients into steps.

    Attributes:
        states: names of the tensors it carries from step to step, each of the parameter's shape.
    """

    states: ClassVar[tuple[str, ...]]

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of a parameter group, beside `lr`, with their defaults."""

    def check(self, hyper: Hyper) -> None:
        """Refuse hyperparameters that cannot be.

        Raises:
            InvalidKnob: one is out of its range.
        """

    def apply(
        self, weight: Tensor, grad: Tensor, states: Mapping[str, Tensor], hyper: Hyper, t: int,
        scratch: Tensor,
    ) -> None:  # fmt: skip
        """Move a block of the weights and its states, all (r, d) float32, in place.

        Args:
            weight: the block.
            grad: its gradient, which stays as it is.
            states: by name, as they were after step t - 1; zeros before the first.
            hyper: the parameter group.
            t: number of this step, from 1.
            scratch: may be overwritten.
        """

    def advance(self, name: str, state: Tensor, weight: Tensor, grad: Tensor, hyper: Hyper) -> None:
        """Move a block of one state alone, as `apply` does: for what must be known before a step.

        Args:
            name: of the state.
            state: (r, d) float32, changed in place.
            weight: (r, d) of the parameter's type, before the step.
            grad: (r, d).
            hyper: the parameter group.
        """


@runtime_checkable
class Surveying(Protocol):
    """A rule that must have seen all of a matrix before it moves any part of it."""

    def survey(
        self, weight: Callable[[slice], Tensor], grad: Tensor, n_axes: int, state: dict[str, Any],
        hyper: Hyper, t: int, parts: Sequence[slice],
    ) -> Mapping[str, Tensor]:  # fmt: skip
        """Go over a matrix before the step, part after part.

        Args:
            weight: gives rows (r, d) of the weight before the step, in float32.
            grad: (n, d).
            n_axes: of the parameter; a vector may lie in several rows.
            state: what is kept of the parameter; the rule's own small tensors may be added.
            hyper: the parameter group.
            t: number of this step, from 1.
            parts: rows that may be looked at together.

        Returns:
            What `apply` shall find beside its states, by name: tensors of n rows are handed out by
            rows, those of one row whole.
        """


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, as `torch.optim.AdamW` computes it."""

    states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def defaults(self) -> dict[str, Any]:
        """`betas`, `eps` and `weight_decay`."""
        return {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

    def check(self, hyper: Hyper) -> None:
        """Refuse betas outside [0, 1), a negative eps or decay."""
        _check_betas(hyper["betas"])
        _check_floor(hyper, "eps", "weight_decay")

    def apply(
        self, weight: Tensor, grad: Tensor, states: Mapping[str, Tensor], hyper: Hyper, t: int,
        scratch: Tensor,
    ) -> None:  # fmt: skip
        """Move a block by lr * m_hat / (sqrt(v_hat) + eps), after its decay."""
        beta1, beta2 = hyper["betas"]
        # Torch's fused kernel: a quarter of the time of the same six operations one by one.
        torch._fused_adamw_(
            [weight], [grad], [states["exp_avg"]], [states["exp_avg_sq"]], [],
            [_count(t, weight.device)], lr=float(hyper["lr"]), beta1=beta1,
            beta2=beta2, weight_decay=hyper["weight_decay"], eps=hyper["eps"], amsgrad=False,
            maximize=False,
        )  # fmt: skip

    def advance(self, name: str, state: Tensor, weight: Tensor, grad: Tensor, hyper: Hyper) -> None:
        """Fade the mean of the gradients or of their squares, and take in the new one."""
        beta1, beta2 = hyper["betas"]
        if name == "exp_avg":
            state.lerp_(grad, 1 - beta1)
        else:
            state.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


@dataclass(frozen=True)
class Lion:
    """The sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675): one state."""

    states: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def defaults(self) -> dict[str, Any]:
        """`betas` and `weight_decay`."""
        return {"betas": (0.9, 0.99), "weight_decay": 0.0}

    def check(self, hyper: Hyper) -> None:
        """Refuse betas outside [0, 1) or a negative decay."""
        _check_betas(hyper["betas"])
        _check_floor(hyper, "weight_decay")

    def apply(
        self, weight: Tensor, grad: Tensor, states: Mapping[str, Tensor], hyper: Hyper, t: int,
        scratch: Tensor,
    ) -> None:  # fmt: skip
        """Move a block by lr in the direction of each sign, after its decay."""
        beta1, _ = hyper["betas"]
        m = states["exp_avg"]
        weight.mul_(1 - hyper["lr"] * hyper["weight_decay"])
        weight.add_(torch.lerp(m, grad, 1 - beta1, out=scratch).sign_(), alpha=-hyper["lr"])
        self.advance("exp_avg", m, weight, grad, hyper)

    def advance(self, name: str, state: Tensor, weight: Tensor, grad: Tensor, hyper: Hyper) -> None:
        """Fade the momentum, and take in the gradient."""
        state.lerp_(grad, 1 - hyper["betas"][1])


@dataclass(frozen=True)
class SGDM:
    """Stochastic gradient descent with momentum, as `torch.optim.SGD` computes it."""

    states: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def defaults(self) -> dict[str, Any]:
        """`momentum` and `weight_decay` (coupled, as usual for SGD)."""
        return {"momentum": 0.9, "weight_decay": 0.0}

    def check(self, hyper: Hyper) -> None:
        """Refuse a negative momentum or decay."""
        _check_floor(hyper, "momentum", "weight_decay")

    def apply(
        self, weight: Tensor, grad: Tensor, states: Mapping[str, Tensor], hyper: Hyper, t: int,
        scratch: Tensor,
    ) -> None:  # fmt: skip
        """Move a block by lr times the sum of the gradients, faded by `momentum`."""
        m = states["momentum_buffer"]
        decayed = torch.add(grad, weight, alpha=hyper["weight_decay"], out=scratch)
        m.mul_(hyper["momentum"]).add_(decayed)
        weight.add_(m, alpha=-hyper["lr"])

    def advance(self, name: str, state: Tensor, weight: Tensor, grad: Tensor, hyper: Hyper) -> None:
        """Fade the sum, and add the gradient with its decay."""
        state.mul_(hyper["momentum"]).add_(grad).add_(weight, alpha=hyper["weight_decay"])


@dataclass(frozen=True)
class Adafactor:
    """Adam's second moment as a column times a row (Shazeer & Stern 2018, arXiv 1804.04235).

    Of a matrix, n + d numbers are kept: the faded means of each row's and each column's squared
    gradients. A vector keeps all of its own. As `torch.optim.Adafactor` computes it, with one
    difference: a tensor of more than two axes is one matrix, its first axis by the rest, and not a
    stack of matrices of its last two.

    Column means, and the two norms that set the size of a step, need all of a matrix: it is gone
    over twice before it moves. In a subspace there is no weight to take a norm of, and `eps[1]`
    stands for it.
    """

    states: ClassVar[tuple[str, ...]] = ()

    def defaults(self) -> dict[str, Any]:
        """`beta2_decay`, `eps` (of the gradients', of the weights' size), `d`, `weight_decay`."""
        eps = (torch.finfo(torch.float32).eps, 1e-3)
        return {"beta2_decay": -0.8, "eps": eps, "d": 1.0, "weight_decay": 0.0}

    def check(self, hyper: Hyper) -> None:
        """Refuse a positive beta2_decay, a negative eps or decay, a d that is not positive."""
        _check_floor(hyper, "weight_decay")
        eps = hyper["eps"]
        if not isinstance(eps, tuple | list) or len(eps) != 2 or not all(e >= 0 for e in eps):
            raise InvalidKnob(f"eps={eps!r}: give two numbers not below 0")
        if not hyper["beta2_decay"] <= 0:
            raise InvalidKnob(f"beta2_decay={hyper['beta2_decay']!r} must not be above 0")
        if not hyper["d"] > 0:
            raise InvalidKnob(f"d={hyper['d']!r} must be above 0")

    def survey(
        self, weight: Callable[[slice], Tensor], grad: Tensor, n_axes: int, state: dict[str, Any],
        hyper: Hyper, t: int, parts: Sequence[slice],
    ) -> Mapping[str, Tensor]:  # fmt: skip
        """Advance the factors, and find the size of the step from the norms of both."""
        eps, floor = hyper["eps"]
        found = self._factors(grad, n_axes, state, t ** hyper["beta2_decay"], parts)
        if "row_var" in found:
            found["row_mean"] = found["row_var"].mean(0, keepdim=True).clamp_(min=eps)
        # Parts are added up in float64: in how many a matrix is cut must not show in its steps.
        weights, updates = torch.zeros(2, dtype=torch.float64, device=grad.device)
        for rows, block, here in _over(grad, found, parts):
            weights += weight(rows).square().sum()
            update = self._update(block, here, hyper, torch.empty_like(block))
            updates += update.square_().sum()
        rms_weight, rms_update = ((s / grad.numel()).sqrt() for s in (weights, updates))
        size = rms_weight.clamp(min=floor) * min(hyper["lr"], t**-0.5)
        found["size"] = (size / (rms_update / hyper["d"]).clamp(min=1.0)).float().view(1, 1)
        return found

    def _factors(
        self, grad: Tensor, n_axes: int, state: dict[str, Any], share: float,
        parts: Sequence[slice],
    ) -> dict[str, Tensor]:  # fmt: skip
        """The faded means of the squares, moved by `share` towards those of this gradient."""
        n, d = grad.shape
        shapes = {"row_var": (n, 1), "col_var": (1, d)} if n_axes > 1 else {"variance": (n, d)}
        for name, shape in shapes.items():
            if name not in state:
                state[name] = torch.zeros(shape, device=grad.device)
        found: dict[str, Tensor] = {name: state[name] for name in shapes}
        columns = torch.zeros(d, dtype=torch.float64, device=grad.device)
        for _, block, here in _over(grad, found, parts):
            squares = block.square()
            if n_axes > 1:
                here["row_var"].lerp_(squares.mean(1, keepdim=True), share)
                columns += squares.sum(0)
            else:
                here["variance"].lerp_(squares, share)
        if n_axes > 1:
            found["col_var"].lerp_((columns / n).float().view(1, d), share)
        return found

    def _update(
        self, grad: Tensor, found: Mapping[str, Tensor], hyper: Hyper, out: Tensor
    ) -> Tensor:
        """The gradient over the root of its expected square, written into `out`."""
        if "variance" in found:
            out.copy_(found["variance"])
        else:
            torch.mul(found["row_var"], found["col_var"], out=out).div_(found["row_mean"])
        return out.clamp_(min=hyper["eps"][0] ** 2).rsqrt_().mul_(grad)

    def apply(
        self, weight: Tensor, grad: Tensor, states: Mapping[str, Tensor], hyper: Hyper, t: int,
        scratch: Tensor,
    ) -> None:  # fmt: skip
        """Move a block by the update at the size that the survey found, after its decay."""
        update = self._update(grad, states, hyper, scratch).mul_(states["size"])
        weight.mul_(1 - hyper["lr"] * hyper["weight_decay"]).sub_(update)

    def advance(self, name: str, state: Tensor, weight: Tensor, grad: Tensor, hyper: Hyper) -> None:
        """There is nothing of the parameter's shape to advance.

        Raises:
            InvalidKnob: always.
        """
        raise InvalidKnob(f"Adafactor keeps no {name!r} of a parameter's shape; give it no codec")


def by_rows(found: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """What belongs to these rows: a part of the tensors of many rows, and the others whole."""
    return {name: one if len(one) == 1 else one[rows] for name, one in found.items()}


def _over(
    grad: Tensor, found: Mapping[str, Tensor], parts: Sequence[slice]
) -> Iterator[tuple[slice, Tensor, dict[str, Tensor]]]:
    """Rows, their gradient in float32 and what was found of them, part after part."""
    for rows in parts:
        yield rows, grad[rows].float(), by_rows(found, rows)


@lru_cache(maxsize=4)
def _count(t: int, device: torch.device) -> Tensor:
    """The number of a step as the fused kernel wants it."""
    return torch.tensor(float(t), device=device)


def _check_betas(betas: object) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise InvalidKnob(f"betas={betas!r}: give two numbers in [0, 1)")


def _check_floor(hyper: Hyper, *names: str) -> None:
    for name in names:
        if not hyper[name] >= 0:
            raise InvalidKnob(f"{name}={hyper[name]!r} must not be below 0")
