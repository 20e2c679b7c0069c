"""The optimizer engine: states in few bytes between steps, in float32 for a moment and in blocks.

A policy says by which rule a parameter moves, with which codec each state is stored, and in which
subspace, if any, its gradient is seen. A step goes through a parameter in blocks of rows: gradient
and weights of the block in float32, its states decoded, the rule applied, the states encoded again
in place. So no second copy of a parameter or of a state ever exists; what a step allocates is a few
blocks.

A state whose factors are shared by rows of different blocks (rank1) is advanced twice: first alone,
for its factors, then with the others, for its codes. A rule that needs the whole of a matrix before
it moves any of it (Adafactor's means and norms) surveys it first, in the same blocks.

Shapes: n rows of d coordinates, r rows in a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.codec.spec import parse
from memwise.codec.th import Codec
from memwise.codec.th_rows import Bound, Rows, Scratch
from memwise.errors import InvalidKnob
from memwise.train.engine.rules import AdamW, Rule, Surveying, by_rows
from memwise.train.engine.subspace import Subspace
from memwise.train.engine.weights import Dense, StoredWeight, Weights, matrix_of, rows_a_block

Tensor: TypeAlias = torch.Tensor
Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]

BLOCK = 29 << 10  # coordinates of a block; with two encoded states its scratch is 0.45 MiB
LINE, SHORTEST = 1 << 10, 1 << 7  # coordinates of a row of a long vector, at most and at least
EXACT = "fp32"


@dataclass(frozen=True)
class OptimizerPolicy:
    """How the states of an optimizer are stored; calling it builds the optimizer.

    The base stores them in float32, whole. Override `codecs` and `subspace`.
    """

    card: ClassVar[Card]
    rule: ClassVar[Rule] = AdamW()

    def codecs(self, shape: Sequence[int]) -> Mapping[str, str]:
        """Name of the codec of each state of this shape; left out = float32."""
        return {}

    def subspace(self, shape: Sequence[int]) -> Subspace | None:
        """The subspace in which the gradient of a parameter of this shape is seen."""
        return None

    def __call__(self, params: Params, lr: float = 1e-3, **hyper: Any) -> MemOptimizer:
        """An optimizer for these parameters.

        Args:
            params: as any `torch.optim.Optimizer` takes them.
            lr: step size.
            **hyper: those of the rule (`betas`, `eps`, `weight_decay`, ...).

        Raises:
            InvalidKnob: a hyperparameter is unknown or out of range.
        """
        return MemOptimizer(params, self, lr, hyper)


class MemOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose states lie encoded: groups, schedulers, clipping as usual.

    `state_dict` holds tensors, numbers and strings alone, and `load_state_dict` brings them back
    bit for bit, whatever the parameters' type.

    Args:
        params: parameters or groups.
        policy: rule, codecs and subspaces.
        lr: step size.
        hyper: hyperparameters of the rule.

    Raises:
        InvalidKnob: a hyperparameter is unknown or out of range.
    """

    def __init__(
        self, params: Params, policy: OptimizerPolicy, lr: float, hyper: Mapping[str, Any]
    ) -> None:
        defaults = policy.rule.defaults()
        if unknown := sorted(hyper.keys() - defaults.keys()):
            raise InvalidKnob(
                f"{type(policy).__name__} knows no {unknown[0]!r}; known: lr, {', '.join(defaults)}"
            )
        self.policy = policy
        super().__init__(params, {"lr": lr, **defaults, **hyper})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, once its hyperparameters are found to be possible."""
        hyper = {**self.defaults, **param_group}
        if not hyper["lr"] >= 0:
            raise InvalidKnob(f"lr={hyper['lr']!r} must not be below 0")
        self.policy.rule.check(hyper)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; returns what the closure returns.

        Raises:
            InvalidKnob: a gradient is sparse, NaN or infinite; nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [
            (param, group)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        self._require_finite([param for param, _ in moving])
        scratch = Scratch()
        for param, group in moving:
            self._move(param, group, scratch)
        return loss

    @contextmanager
    def step_in_backward(self) -> Iterator[None]:
        """Move every parameter as soon as its gradient is there, and free the gradient.

        Within this context no more than one gradient exists at a time, and `step` has nothing left
        to do. Clipping by the norm of all gradients, and accumulating them, need them all at once.
        """
        groups = [(param, group) for group in self.param_groups for param in group["params"]]
        hooks = [
            param.register_post_accumulate_grad_hook(self._mover(group))
            for param, group in groups
            if param.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _mover(self, group: Mapping[str, Any]) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def move(param: Tensor) -> None:
            self._require_finite([param])
            self._move(param, group, Scratch())
            param.grad = None

        return move

    def _require_finite(self, params: Sequence[Tensor]) -> None:
        """Refuse, before anything moves, what no code can hold."""
        sums = []
        for param in params:
            grad = param.grad
            assert grad is not None
            if grad.is_sparse or not param.is_floating_point():
                raise InvalidKnob(
                    f"{type(self.policy).__name__} got a {grad.layout} gradient of {param.dtype}; "
                    "it moves dense floating parameters"
                )
            coded = self.policy.codecs(param.shape) or isinstance(param, StoredWeight)
            if coded or self.policy.subspace(param.shape):
                sums.append(grad.sum(dtype=torch.float32))
        if sums and not bool(torch.stack(sums).isfinite().all()):
            raise InvalidKnob(
                f"{type(self.policy).__name__} got a gradient that is NaN or infinite, and did "
                "not use it; skip this step as torch.amp.GradScaler does, or clip the gradients"
            )

    def _move(self, param: Tensor, group: Mapping[str, Any], scratch: Scratch) -> None:
        subspace, state, grad = self.policy.subspace(param.shape), self.state[param], param.grad
        assert grad is not None
        names = self._codecs(param.shape)
        if not state:
            line = _codec_line(self.policy.rule, names)
            every = (other for each in self.param_groups for other in each["params"])
            place = next(i for i, other in enumerate(every) if other is param)
            state.update({"step": 0, "seed": place, "codecs": line})
        state["step"] += 1
        draws = _draws(param, state)
        at = plane(param.shape)
        weight = own = matrix_of(param, at)
        if weight is None:
            weight = Dense(param.data.contiguous().view(at))
        grad = grad.reshape(at)
        if subspace is None:
            rule, n_axes = self.policy.rule, param.ndim
            _Move(weight, grad, rule, names, state, group, draws, scratch, n_axes).run()
        else:
            low = subspace.down(grad, state, draws)
            delta, still = torch.zeros_like(low), {**group, "weight_decay": 0.0}
            _Move(Dense(delta), low, self.policy.rule, names, state, still, draws, scratch).run()
            fade = 1 - group["lr"] * group.get("weight_decay", 0.0)
            subspace.up(delta, weight, state, fade, draws)
            subspace.follow(grad, state, draws)
        if own is None and isinstance(weight, Dense):
            param.copy_(weight.matrix.view(param.shape))

    def _codecs(self, shape: Sequence[int]) -> Mapping[str, str]:
        """The codecs of the states of a parameter, which are as small as what the rule sees."""
        subspace = self.policy.subspace(shape)
        return self.policy.codecs(shape if subspace is None else subspace.shape(plane(shape)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, bit for bit.

        Raises:
            InvalidKnob: it was saved by another rule or with other codecs.
        """
        super().load_state_dict(state_dict)
        # torch has cast the states to the parameters' type by now: codes would become floats.
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(saved, params, strict=True):
            if key not in state_dict["state"]:
                continue
            kept = state_dict["state"][key]
            wanted = _codec_line(self.policy.rule, self._codecs(param.shape))
            if kept.get("codecs") != wanted:
                raise InvalidKnob(
                    f"this state was saved with {kept.get('codecs')!r}, and "
                    f"{type(self.policy).__name__} stores {wanted!r}; load it into the optimizer "
                    "that saved it"
                )
            self.state[param] = {
                name: value.detach().to(param.device).clone() if torch.is_tensor(value) else value
                for name, value in kept.items()
            }


def plane(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and coordinates (n, d) as which a parameter is stored: its first axis by the rest.

    A long vector is cut into rows where it can be, so that no block has to hold all of it.
    """
    if len(shape) > 1:
        return shape[0], math.prod(shape[1:])
    size = math.prod(shape)
    width = math.gcd(size, LINE)
    return (size // width, width) if size > LINE and width >= SHORTEST else (1, size)


def _codec_line(rule: Rule, names: Mapping[str, str]) -> str:
    return " ".join(f"{name}={names.get(name, EXACT)}" for name in rule.states)


@lru_cache(maxsize=256)
def _codec(name: str) -> Codec:
    return Codec(parse(name))


def _draws(param: Tensor, state: Mapping[str, Any]) -> torch.Generator:
    """A parameter's own draws for stochastic codecs; a resumed run makes the same ones."""
    # The CPU's generator takes 32 bits of its seed; the odd factor spreads neighbours over them.
    seed = state["seed"] * 0x9E3779B1 + state["step"]
    return torch.Generator(param.device).manual_seed(seed % (1 << 32))


class _Move:
    """One step of one matrix (n, d)."""

    def __init__(
        self, weight: Weights, grad: Tensor, rule: Rule, names: Mapping[str, str],
        state: dict[str, Any], hyper: Mapping[str, Any], draws: torch.Generator, scratch: Scratch,
        n_axes: int = 2,
    ) -> None:  # fmt: skip
        n, d = weight.shape
        self.state, self.n_axes = state, n_axes
        self.weight, self.grad, self.rule, self.hyper = weight, grad, rule, hyper
        self.t, self.draws = int(state["step"]), draws
        self.exact, self.coded = {}, {}
        for name in rule.states:
            if name in names:
                arrays = _arrays(state, name) or _zeros(state, name, names[name], weight, draws)
                self.coded[name] = Rows(_codec(names[name]).spec, arrays, (n, d))
            else:
                if name not in state:
                    state[name] = torch.zeros((n, d), device=weight.device)
                self.exact[name] = state[name]
        groups = [rows.spec.scale.group for rows in self.coded.values()]
        self.rows = rows_a_block((n, d), [weight.group, *groups], BLOCK)
        self.scratch, self.spare = scratch, len(self.coded)
        count = len(self.coded) + (not weight.in_place)
        scratch.lay_out(count, self.rows, d, weight.device)

    def run(self) -> None:
        """Decode, apply the rule, encode, block after block."""
        target, found = self._with_new_factors(), self._surveyed()
        for first, n_rows in self._parts():
            sources = self._bound(self.coded, n_rows)
            targets = {
                name: sources[name] if target[name] is coded else bound
                for (name, coded), bound in zip(
                    self.coded.items(), self._bound(target, n_rows).values(), strict=True
                )
            }
            held = self.weight.bind(self.scratch, self.spare, n_rows)
            for row in range(first, self.weight.shape[0] - n_rows + 1, n_rows):
                self._block(slice(row, row + n_rows), held, sources, targets, found)
        for name, coded in target.items():
            for part, array in self.coded[name].arrays.items():
                if array is not coded.arrays[part]:
                    array.copy_(coded.arrays[part])

    def _surveyed(self) -> Mapping[str, Tensor]:
        """What the rule finds of the whole matrix, where it wants to see that first."""
        if not isinstance(self.rule, Surveying):
            return {}
        parts = [
            slice(row, row + n_rows)
            for first, n_rows in self._parts()
            for row in range(first, self.weight.shape[0] - n_rows + 1, n_rows)
        ]
        return self.rule.survey(
            self.weight.read, self.grad, self.n_axes, self.state, self.hyper, self.t, parts
        )

    def _block(
        self, rows: slice, held: Bound, sources: Mapping[str, Bound], targets: Mapping[str, Bound],
        found: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        weight = held.decode(rows.start)
        states = {name: state[rows] for name, state in self.exact.items()} | by_rows(found, rows)
        for name, source in sources.items():
            states[name] = source.decode(rows.start)
        other = self.scratch.other(weight)
        self.rule.apply(weight, self.grad[rows].float(), states, self.hyper, self.t, other)
        for target in targets.values():
            target.encode(rows.start, self.draws)
        held.encode(rows.start, self.draws)

    def _parts(self) -> Iterator[tuple[int, int]]:
        """First row and rows a block: of all full blocks, and of the rest."""
        n, rest = self.weight.shape[0], self.weight.shape[0] % self.rows
        if n >= self.rows:
            yield 0, self.rows
        if rest:
            yield n - rest, rest

    def _bound(self, coded: Mapping[str, Rows], n_rows: int) -> dict[str, Bound]:
        return {
            name: self.scratch.bind(rows, place, n_rows)
            for place, (name, rows) in enumerate(coded.items())
        }

    def _with_new_factors(self) -> dict[str, Rows]:
        """Where the new codes go: the same codes, under factors that the new states need."""
        target = dict(self.coded)
        for name, coded in self.coded.items():
            if coded.spec.scale.kind != "rank1":
                continue
            found = torch.zeros_like(coded.arrays["scale"])
            of_rows, of_columns = found.split([*coded.shape])
            for first, n_rows in self._parts():
                source = self.scratch.bind(coded, 0, n_rows)
                held = self.weight.bind(self.scratch, self.spare, n_rows)
                for row in range(first, self.weight.shape[0] - n_rows + 1, n_rows):
                    rows = slice(row, row + n_rows)
                    state, grad = source.decode(row), self.grad[rows].float()
                    self.rule.advance(name, state, held.decode(row), grad, self.hyper)
                    torch.amax(state.abs_(), 1, out=of_rows[rows])
                    torch.maximum(of_columns, state.amax(0), out=of_columns)
            lifted = found.clamp(min=torch.finfo(found.dtype).tiny)
            scale = torch.where(found > 0, lifted, found)  # a factor of 0 stands for zeros
            target[name] = Rows(coded.spec, {**coded.arrays, "scale": scale}, coded.shape)
        return target


def _arrays(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The stored arrays of an encoded state, which lie in the state as `name.array`."""
    return {
        key.removeprefix(f"{name}."): value
        for key, value in state.items()
        if key.startswith(f"{name}.")
    }


def _zeros(
    state: dict[str, Any], name: str, codec: str, weight: Weights, draws: torch.Generator
) -> Mapping[str, Tensor]:
    """Store an encoded state of zeros."""
    zeros = torch.zeros(1, device=weight.device).expand(weight.shape)
    arrays = _codec(codec).encode(zeros, draws).arrays
    state |= {f"{name}.{part}": array for part, array in arrays.items()}
    return arrays
