"""Training in a projected space: linear layers keep, learn from and step in fewer features.

For W (O, I) a random P (I, r) is drawn from a seed. The forward pass keeps x P in place of its
input x, the backward pass makes the gradient G P = gy^T (x P) of W's coordinates, and the
optimizer, whose states are as small, moves these; the move is carried back, W += scale * D P^T.
Neither P nor a gradient of W's shape ever exists. Every so often P is drawn again, and the states
stay.

Autograd brings a gradient to a leaf of its shape. So each weight has a leaf of shape (O, r) whose
storage is one number; it has numbers of its own only while it is moved.

Shapes: N tokens, I inputs, O outputs, r coordinates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memwise.budget import Budget
from memwise.codec.project import Drawn
from memwise.errors import InvalidKnob, UnsupportedModel
from memwise.train.engine.act_actions import Planned, Run, Swap, autocast, is_hf_conv1d
from memwise.train.engine.act_hooks import Hooks, Spot
from memwise.train.engine.act_sites import sites
from memwise.train.engine.activations import ActivationPolicy, Site
from memwise.train.engine.optimizer import OptimizerPolicy
from memwise.train.engine.saves import Linear, ProjectSave


@dataclass(eq=False)
class Plane:
    """One weight and its coordinates.

    Attributes:
        weight: the parameter.
        turned: whether it lies as (I, O).
        group: name of what draws one P together.
        coordinates: leaf (O, r) that receives gradients; its storage is one number.
    """

    weight: nn.Parameter
    turned: bool
    group: str
    coordinates: nn.Parameter

    @property
    def matrix(self) -> Tensor:
        """The weight as (O, I)."""
        return self.weight.data.t() if self.turned else self.weight.data


class Space:
    """The projected weights of a model, and the seeds of their projections.

    Modules with one parent and as many inputs share P, so that what is kept of an input which
    several of them take (queries, keys, values) is kept once.

    Args:
        model: whose linear layers are projected, where they learn and r < I.
        rank: r for I inputs.
        kind: of the draws, as `Drawn` has them.
        seed: of all projections.

    Attributes:
        planes: by weight.
        redrawn: how often P was drawn again.

    Raises:
        UnsupportedModel: nothing in it can be projected.
    """

    def __init__(self, model: nn.Module, rank: Callable[[int], int], kind: str, seed: int) -> None:
        self.kind, self.seed, self.redrawn = kind, seed, 0
        self.planes: dict[Tensor, Plane] = {}
        modules = dict(model.named_modules())
        for site in sites(model):
            weight: Any = getattr(modules[site.name], "weight", None)
            if site.kind != "linear" or not site.native or not weight.requires_grad:
                continue
            turned = is_hf_conv1d(modules[site.name])
            n_out, n_in = weight.shape[::-1] if turned else weight.shape
            if rank(n_in) < n_in and weight not in self.planes:
                group = f"{site.name.rpartition('.')[0]}/{n_in}"
                self.planes[weight] = Plane(weight, turned, group, _leaf(weight, n_out, rank(n_in)))
        if not self.planes:
            raise UnsupportedModel(
                f"{type(model).__name__} has no linear layer that learns and has more inputs than "
                "coordinates; take a smaller ratio"
            )

    def projection(self, plane: Plane) -> Drawn:
        """P (I, r) of a weight, as it is drawn at present."""
        n_in, rank = plane.matrix.shape[1], plane.coordinates.shape[1]
        name = f"{self.seed} {self.redrawn} {plane.group}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little")
        return Drawn(n_in, rank, seed, self.kind)


def _leaf(weight: Tensor, n_out: int, rank: int) -> nn.Parameter:
    return nn.Parameter(weight.new_zeros(1).expand(n_out, rank))


@dataclass(frozen=True)
class Project(Swap):
    """Keeps the coordinates of a linear layer's input, and makes the gradient of its weight's.

    Attributes:
        space: of the weights.
    """

    space: Space

    def swap(self, module: nn.Module, run: Run, spot: Spot | None, hooks: Hooks) -> Run | None:
        """For linear layers whose weight has coordinates."""
        weight: Any = module.weight
        plane = self.space.planes.get(weight)
        if plane is None:
            return None

        def forward(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled() or not weight.requires_grad:
                return run(x)
            # What is held anyhow costs nothing more, and gives the same numbers when it is
            # projected later; a repeated pass cannot know what is held.
            late = spot is not None and hooks.holds(x)
            save = ProjectSave(self.space.projection(plane), late)
            bias: Any = module.bias
            x, rest, off = autocast(x, weight.t() if plane.turned else weight, bias)
            if spot is not None:
                hooks.would_keep(x, spot)
            with off:
                y: Tensor = Linear.apply(x, *rest, plane.coordinates, save, hooks)
            return y

        return forward

    def __str__(self) -> str:
        return "project"


@dataclass(frozen=True)
class InSpace(ActivationPolicy):
    """Projects the inputs of all weights of a space.

    Attributes:
        space: of a model.
    """

    space: Space

    def plan(self, sites: Sequence[Site], budget: Budget | None) -> Mapping[str, Planned]:
        """`Project` for linear layers; those without coordinates stay as they are."""
        return {site.name: Project(self.space) for site in sites if site.kind == "linear"}


class SpaceOptimizer(torch.optim.Optimizer):
    """Moves projected weights by their coordinates, and all other parameters as they are.

        optimizer = CompAct()(model, lr=1e-3)
        with compress_activations(model, optimizer.policy):
            loss = model(batch)
            loss.backward()
        optimizer.step()

    Gradients of projected weights stand at `optimizer.coordinates()`: that is where to clip them.

    Args:
        model: whose parameters are moved.
        space: of its projected weights.
        states: the optimizer to use there, any of this room.
        lr: step size.
        gap: steps from one P to the next.
        scale: factor of what is carried back.
        hyper: hyperparameters of the rule.

    Attributes:
        policy: for `compress_activations`.

    Raises:
        InvalidKnob: a hyperparameter is unknown or out of range.
    """

    def __init__(
        self, model: nn.Module, space: Space, states: OptimizerPolicy, lr: float, gap: int,
        scale: float, hyper: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.policy, self._space, self._gap, self._scale = InSpace(space), space, gap, scale
        self._n_steps = 0
        rest = [p for p in model.parameters() if p.requires_grad and p not in space.planes]
        # The decay is the weight's, not that of its coordinates, which start at 0 every step.
        decay = hyper.get("weight_decay", states.rule.defaults().get("weight_decay", 0.0))
        still = {"weight_decay": 0.0} if "weight_decay" in states.rule.defaults() else {}
        groups = [{"params": self.coordinates(), "decay": decay, **still}]
        groups += [{"params": rest}] if rest else []
        self._inner = states(groups, lr=lr, **hyper)
        super().__init__(self._inner.param_groups, self._inner.defaults)
        self._link()

    def coordinates(self) -> list[nn.Parameter]:
        """The leaves (O, r) that receive the gradients of projected weights."""
        return [plane.coordinates for plane in self._space.planes.values()]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient, one projected weight after another.

        Raises:
            InvalidKnob: a gradient is NaN or infinite, or a projected weight has one of its own
                shape; nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        planes = [p for p in self._space.planes.values() if self._has_gradient(p)]
        held = {p: p.grad for group in self.param_groups for p in group["params"]}
        for plane in planes:
            plane.coordinates.grad = None
        self._inner.step()
        for param in held:
            param.grad = None  # the inner optimizer moves what has a gradient: one at a time
        for plane in planes:
            plane.coordinates.grad = held[plane.coordinates]
            self._move(plane)
            plane.coordinates.grad = None
        for param, grad in held.items():
            param.grad = grad
        self._n_steps += 1
        if self._n_steps % self._gap == 0:
            self._space.redrawn += 1
        return loss

    def _has_gradient(self, plane: Plane) -> bool:
        if plane.weight.grad is not None:
            raise InvalidKnob(
                f"a projected weight {tuple(plane.weight.shape)} has a gradient of its own: run "
                "forward and backward inside compress_activations(model, optimizer.policy)"
            )
        grad = plane.coordinates.grad
        if grad is not None and not bool(grad.sum(dtype=torch.float32).isfinite()):
            raise InvalidKnob(
                "a gradient of coordinates is NaN or infinite, and was not used; skip this step as "
                "torch.amp.GradScaler does, or clip the gradients"
            )
        return grad is not None

    def _move(self, plane: Plane) -> None:
        leaf, group, matrix = plane.coordinates, self.param_groups[0], plane.matrix
        none = leaf.data
        leaf.data = torch.zeros(leaf.shape, dtype=torch.float32, device=leaf.device).to(leaf.dtype)
        self._inner.step()
        if group["decay"]:
            matrix.mul_(1 - group["lr"] * group["decay"])
        self._space.projection(plane).add_back(matrix, leaf.data, self._scale)
        leaf.data = none

    def state_dict(self) -> dict[str, Any]:
        """States, and which projections are in use."""
        return {
            "optimizer": self._inner.state_dict(),
            "n_steps": self._n_steps,
            "redrawn": self._space.redrawn,
            "seed": self._space.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state: the run goes on as if it had not been interrupted.

        Raises:
            InvalidKnob: it was saved by another rule or with other codecs.
        """
        self._inner.load_state_dict(state_dict["optimizer"])
        self._n_steps = state_dict["n_steps"]
        self._space.redrawn, self._space.seed = state_dict["redrawn"], state_dict["seed"]
        self._link()

    def _link(self) -> None:
        """One set of groups and states for what schedulers change and the inner optimizer reads."""
        self.param_groups, self.state = self._inner.param_groups, self._inner.state
