"""The optimizer engine: states in few bytes between steps, in float32 for a moment and in blocks.

A policy says by which rule a parameter moves and with which codec each state is stored. A step goes
through a parameter in blocks of rows: gradient and weights of the block in float32, its states
decoded, the rule applied, the states encoded again in place. So no second copy of a parameter or of
a state ever exists; what a step allocates is a few blocks.

A codec whose factors are shared by rows of different blocks (rank1) is passed twice: first the new
states are computed for their factors alone, then for their codes.

Shapes: n rows of d coordinates, r rows in a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.codec.spec import parse
from memwise.codec.th import Codec, Packed
from memwise.errors import InvalidKnob
from memwise.train.engine.rules import AdamW, Rule

Tensor: TypeAlias = torch.Tensor
Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]

BLOCK = 1 << 14  # coordinates of a block: 64 KiB in float32
EXACT = "fp32"
_SCALES = ("none", "row", "group", "expand", "rank1")  # of which a block of rows can be encoded


@dataclass(frozen=True)
class OptimizerPolicy:
    """How the states of an optimizer are stored; calling it builds the optimizer.

    The base stores them in float32. Override `codecs`.
    """

    card: ClassVar[Card]
    rule: ClassVar[Rule] = AdamW()

    def codecs(self, shape: Sequence[int]) -> Mapping[str, str]:
        """Name of the codec of each state of a parameter of this shape; left out = float32."""
        return {}

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
        policy: rule and codecs.
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
        """Move every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._move(param, group)
        return loss

    def _move(self, param: Tensor, group: Mapping[str, Any]) -> None:
        grad = param.grad
        assert grad is not None
        if grad.is_sparse or not param.is_floating_point():
            raise InvalidKnob(
                f"{type(self.policy).__name__} got a {grad.layout} gradient of {param.dtype}; it "
                "moves dense floating parameters"
            )
        names = self.policy.codecs(param.shape)
        state = self.state[param]
        if not state:
            state.update(_fresh(param, self.policy.rule, names, len(self.state)))
        state["step"] += 1
        _Move(param, grad, self.policy.rule, names, state, group).run()

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
            wanted = _codec_line(self.policy.rule, self.policy.codecs(param.shape))
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
    """Rows and coordinates (n, d) as which a parameter is stored: its first axis by the rest."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _fresh(param: Tensor, rule: Rule, names: Mapping[str, str], seed: int) -> dict[str, Any]:
    """The state before the first step; encoded states are flat: name.array."""
    state: dict[str, Any] = {"step": 0, "seed": seed, "codecs": _codec_line(rule, names)}
    for name in rule.states:
        zeros = torch.zeros(plane(param.shape), dtype=torch.float32, device=param.device)
        if name not in names:
            state[name] = zeros
            continue
        packed = _codec(names[name]).encode(zeros, _draws(param, seed, 0))
        state |= {f"{name}.{part}": array for part, array in packed.arrays.items()}
    return state


def _codec_line(rule: Rule, names: Mapping[str, str]) -> str:
    return " ".join(f"{name}={names.get(name, EXACT)}" for name in rule.states)


@lru_cache(maxsize=256)
def _codec(name: str) -> Codec:
    spec = parse(name)
    if spec.scale.kind not in _SCALES or spec.packing.kind not in ("dense", "byte"):
        raise InvalidKnob(
            f"codec {name!r} cannot hold a state: rows of it are encoded alone, which needs one of "
            f"the scales {', '.join(_SCALES)} and codes that have fixed places"
        )
    return Codec(spec)


def _draws(param: Tensor, seed: int, t: int) -> torch.Generator:
    """A parameter's own draws for stochastic codecs; a resumed run makes the same ones."""
    # The CPU's generator takes 32 bits of its seed; the odd factor spreads neighbours over them.
    return torch.Generator(param.device).manual_seed((seed * 0x9E3779B1 + t) % (1 << 32))


class _Move:
    """One step of one parameter."""

    def __init__(
        self, param: Tensor, grad: Tensor, rule: Rule, names: Mapping[str, str],
        state: Mapping[str, Any], hyper: Mapping[str, Any],
    ) -> None:  # fmt: skip
        shape = plane(param.shape)
        self.whole = param.is_contiguous()
        self.weight = (param if self.whole else param.contiguous()).view(shape)
        self.param, self.grad = param, grad.reshape(shape)
        self.rule, self.hyper, self.t = rule, hyper, int(state["step"])
        self.codecs = {name: _codec(names[name]) for name in rule.states if name in names}
        self.packed = {
            name: Packed(codec.spec.name, shape, torch.float32, _arrays(state, name))
            for name, codec in self.codecs.items()
        }
        self.exact = {name: state[name] for name in rule.states if name not in names}
        self.rows = _rows_a_block(shape, self.codecs.values())
        size = (self.rows, shape[1])
        count = len(self.codecs) + 1 + (param.dtype != torch.float32)
        self.blocks = list(torch.empty((count, *size), dtype=torch.float32, device=param.device))
        self.draws = _draws(param, int(state["seed"]), self.t)

    def run(self) -> None:
        """Decode, apply the rule, encode, block after block."""
        target = self._with_new_factors()
        for rows in self._ranges():
            states, weight = self._decoded(rows), self._weight(rows)
            self._apply(rows, weight, states)
            if self.param.dtype != torch.float32:
                self.weight[rows].copy_(weight)
            for name, codec in self.codecs.items():
                codec.encode_rows(target[name], rows, states[name], self.draws)
        if not self.whole:
            self.param.copy_(self.weight.view(self.param.shape))
        for name, packed in target.items():
            for part, array in self.packed[name].arrays.items():
                if array is not packed.arrays[part]:
                    array.copy_(packed.arrays[part])

    def _ranges(self) -> Iterator[slice]:
        n = self.weight.shape[0]
        for first in range(0, n, self.rows):
            yield slice(first, min(n, first + self.rows))

    def _decoded(self, rows: slice) -> dict[str, Tensor]:
        n = rows.stop - rows.start
        states = {name: state[rows] for name, state in self.exact.items()}
        for (name, codec), block in zip(self.codecs.items(), self.blocks, strict=False):
            states[name] = codec.decode(self.packed[name], rows, out=block[:n])
        return states

    def _weight(self, rows: slice) -> Tensor:
        if self.param.dtype == torch.float32:
            return self.weight[rows]
        return self.blocks[-2][: rows.stop - rows.start].copy_(self.weight[rows])

    def _apply(self, rows: slice, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        scratch = self.blocks[-1][: rows.stop - rows.start]
        grad = self.grad[rows].float()
        self.rule.apply(weight, grad, states, self.hyper, self.t, scratch)

    def _with_new_factors(self) -> dict[str, Packed]:
        """Where the new codes go: the same codes, under factors that the new states need."""
        largest = {
            name: _Largest(self.packed[name])
            for name, codec in self.codecs.items()
            if codec.spec.scale.kind == "rank1"
        }
        if not largest:
            return self.packed
        kept = {name: state.clone() for name, state in self.exact.items()}
        for rows in self._ranges():
            states = self._decoded(rows) | {name: state[rows] for name, state in kept.items()}
            self._apply(rows, self.weight[rows].float().clone(), states)
            for name, seen in largest.items():
                seen.add(rows, states[name])
        return self.packed | {name: seen.packed() for name, seen in largest.items()}


class _Largest:
    """The largest magnitudes of rows and columns, gathered block by block: factors of rank1."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        n, d = packed.shape
        scale = packed.arrays["scale"]
        self._rows, self._columns = scale.new_zeros(n), scale.new_zeros(d)

    def add(self, rows: slice, x: Tensor) -> None:
        """Take in a block (r, d)."""
        magnitude = x.abs()
        self._rows[rows] = magnitude.amax(1)
        torch.maximum(self._columns, magnitude.amax(0), out=self._columns)

    def packed(self) -> Packed:
        """The same codes, to be written anew under these factors; a factor of 0 means zeros."""
        found = torch.cat([self._rows, self._columns])
        lifted = found.clamp(min=torch.finfo(found.dtype).tiny)
        arrays = dict(self._packed.arrays, scale=torch.where(found > 0, lifted, found))
        return Packed(self._packed.codec, self._packed.shape, self._packed.dtype, arrays)


def _arrays(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The stored arrays of an encoded state."""
    return {
        key.removeprefix(f"{name}."): value
        for key, value in state.items()
        if key.startswith(f"{name}.")
    }


def _rows_a_block(shape: tuple[int, int], codecs: Iterable[Codec]) -> int:
    """Rows of a block: about `BLOCK` coordinates, and no group cut in two."""
    n, d = shape
    least = math.lcm(*(_rows_a_group(codec, d) for codec in codecs))
    return min(n, max(least, BLOCK // max(d, 1) // least * least))


def _rows_a_group(codec: Codec, d: int) -> int:
    group = max(codec.spec.scale.group, 1)
    return math.lcm(group, max(d, 1)) // max(d, 1)
