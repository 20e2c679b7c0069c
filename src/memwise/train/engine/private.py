"""Differentially private SGD: each example's gradient clipped, their sum moved by, noise for all.

No gradient of a single example is ever formed. One backward pass goes to the outputs of the linear
maps and tables, whose inputs were noted in the forward pass; both together give the norm of each
example's gradient and, once these are known, the sum of the clipped ones (Goodfellow 2015, arXiv
1510.01799; Li et al. 2021, arXiv 2110.05679). The gradient of a table is rows, never a table.

A policy says what becomes of the noise of tables: drawn at once, or owed (`ledger.RowLedger`).

Shapes: B examples, T positions of each, D width of a table, r rows.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from memwise.catalogue import Card
from memwise.errors import InvalidKnob, MemwiseError, UnsupportedModel
from memwise.train.engine.ledger import BLOCK, Noise, RowLedger

Tensor: TypeAlias = torch.Tensor

ORDERS = tuple(range(2, 257))  # of the Renyi divergences that an epsilon is the best of
_SMALLEST_NORM = 1e-6
_WARNING = "holds the seed of the noise: keep it as secret as the data"


@dataclass(frozen=True)
class PrivatePolicy:
    """How private the training is; calling it builds the optimizer.

    Attributes:
        noise_multiplier: standard deviation of the noise, in units of `max_norm`.
        max_norm: length to which the gradient of an example is cut.

    Raises:
        InvalidKnob: the noise is negative or the norm not positive.
    """

    noise_multiplier: float = 1.0
    max_norm: float = 1.0

    card: ClassVar[Card]

    def __post_init__(self) -> None:
        if not self.noise_multiplier >= 0 or not self.max_norm > 0:
            raise InvalidKnob(
                f"noise_multiplier={self.noise_multiplier}, max_norm={self.max_norm}: give one "
                "that is not below 0 and one above 0"
            )

    def deferred(self) -> Noise | None:
        """How noise that rows of a table owe is drawn; None = no row ever owes any."""
        return None

    def __call__(
        self, model: nn.Module, lr: float = 0.1, *, batch_size: int, seed: int | None = None
    ) -> PrivateSGD:
        """An optimizer for the linear maps and tables of this model.

        Args:
            model: whose trained parameters all belong to `nn.Linear` and `nn.Embedding` modules.
            lr: step size.
            batch_size: expected number of examples in a step; the sum is divided by it.
            seed: of the noise; None draws one from the system, as real privacy wants.

        Raises:
            InvalidKnob: lr is negative or the batch empty.
            UnsupportedModel: other modules hold trained parameters, or they are shared.
        """
        return PrivateSGD(model, self, lr, batch_size, seed)


@dataclass(frozen=True)
class _Call:
    """One use of a module in a forward pass: its input, and where its output's gradient is."""

    module: nn.Linear | nn.Embedding
    taken: Tensor
    edge: GradientEdge
    given: Tensor | None
    version: int


class PrivateSGD(torch.optim.Optimizer):
    """DP-SGD (Abadi et al. 2016, arXiv 1607.00133): `backward` in place of the loss's, then `step`.

    The model's `state_dict` never holds a row that owes noise. The optimizer's own one holds the
    seed: it is for going on, not for release.

    Args:
        model: as in `PrivatePolicy.__call__`.
        policy: clipping, noise, and when tables get it.
        lr: step size.
        batch_size: expected number of examples in a step.
        seed: of the noise.

    Note:
        The draws are statistical, not cryptographic. Weights that are read otherwise than through
        their module's call or `state_dict` want `flush` before.
    """

    def __init__(
        self, model: nn.Module, policy: PrivatePolicy, lr: float, batch_size: int, seed: int | None
    ) -> None:
        if not lr >= 0 or batch_size < 1:
            raise InvalidKnob(f"lr={lr}, batch_size={batch_size}: give lr >= 0 and a batch")
        self.policy, self.batch_size = policy, batch_size
        self.modules = _trained(model)
        self.n_steps, self.seed = 0, secrets.randbits(63) if seed is None else seed
        trained = [p for m in self.modules for p in m.parameters(False) if p.requires_grad]
        super().__init__(trained, {"lr": lr})
        self._draws = torch.Generator(trained[0].device).manual_seed(self.seed)
        self._calls: list[_Call] = []
        self._sums: dict[Tensor, Tensor] = {}
        self._rows: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}
        self._hooks: list[Any] = [m.register_forward_hook(self._note) for m in self.modules]
        for module in self.modules:
            if isinstance(module, nn.Embedding) and policy.deferred() is not None:
                self._open(module)

    def _open(self, module: nn.Embedding) -> None:
        self._ledger(module.weight).open()

        def before_reading(read: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if read is not module:
                raise MemwiseError(
                    "this is a copy of a table that waits for its noise; call the optimizer's "
                    "close() before the model is copied"
                )
            self._ledger(module.weight).pay(inputs[0].unique().long())

        def before_saving(*_: Any) -> None:
            self._ledger(module.weight).flush()

        self._hooks += [
            module.register_forward_pre_hook(before_reading),
            module.register_state_dict_pre_hook(before_saving),
        ]

    def _ledger(self, weight: Tensor) -> RowLedger:
        noise = self.policy.deferred()
        assert noise is not None
        params = self.param_groups[0]["params"]
        place = next(i for i, param in enumerate(params) if param is weight)
        # Far apart for every table, and within the 64 bits of a signed number.
        key = (self.seed + place * 0x632BE59BD9B4E019) % (1 << 63)
        return RowLedger(weight.data, self.state[weight], noise, key)

    def _note(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad and any(module is m for m in self.modules):
            # Where a view is changed in place, autograd forgets the edge that was noted.
            given = output.detach() if output._is_view() else None
            taken, edge = inputs[0].detach(), get_gradient_edge(output)
            self._calls.append(_Call(module, taken, edge, given, output._version))

    @torch.no_grad()
    def backward(self, losses: Tensor) -> None:
        """Take in a batch: the sum of the gradients of its examples, each cut to `max_norm`.

        Several calls before one step add up.

        Args:
            losses: (B,), one an example, each of which depends on its own example alone.

        Raises:
            InvalidKnob: losses are no vector, or the gradient of an example is not finite; nothing
                was taken in then.
            UnsupportedModel: a module has seen something else than B examples on its first axis, or
                its output was changed in place.
        """
        calls, self._calls = self._calls, []
        if losses.ndim != 1:
            raise InvalidKnob(f"losses have shape {tuple(losses.shape)}: give one an example")
        if not len(losses):
            return  # Poisson sampling draws an empty batch at times
        if any(call.given is not None and call.given._version != call.version for call in calls):
            raise UnsupportedModel(
                "the output of a linear map was changed in place; use the operation that makes a "
                "new tensor"
            )
        with torch.enable_grad():
            total, edges = losses.sum(), [call.edge for call in calls]
        grads = torch.autograd.grad(total, edges, allow_unused=True)
        sites = list(self._sites(calls, grads, len(losses)))
        norms = torch.stack([_squares(*site) for site in sites]).sum(0).sqrt()
        if not bool(norms.isfinite().all()):
            raise InvalidKnob("an example has a gradient that is NaN or infinite: leave it out")
        share = (self.policy.max_norm / (norms + _SMALLEST_NORM)).clamp(max=1.0)
        for module, taken, grad in sites:
            self._take_in(module, taken, grad * share[:, None, None])

    def _sites(
        self, calls: list[_Call], grads: tuple[Tensor | None, ...], n: int
    ) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """Of each module that was used: inputs (B, T, ...) and gradients (B, T, D)."""
        for module in self.modules:
            taken, given = [], []
            for call, grad in zip(calls, grads, strict=True):
                if call.module is module and grad is not None:
                    ids = isinstance(module, nn.Embedding)
                    width = () if ids else call.taken.shape[-1:]
                    if len(grad) != n or grad.ndim < 2:
                        raise UnsupportedModel(
                            f"a {type(module).__name__} gave {tuple(grad.shape)} for {n} examples; "
                            "their axis must be the first one everywhere"
                        )
                    taken.append(call.taken.reshape(n, -1, *width))
                    given.append(grad.reshape(n, -1, grad.shape[-1]))
            if taken:
                yield module, torch.cat(taken, 1), torch.cat(given, 1)

    def _take_in(self, module: nn.Module, taken: Tensor, grad: Tensor) -> None:
        if isinstance(module, nn.Embedding):
            rows = (taken.flatten(), grad.flatten(0, 1))
            self._rows.setdefault(module.weight, []).append(rows)
            return
        for name, param in module.named_parameters(recurse=False):
            if param.requires_grad:
                flat = grad.flatten(0, 1)
                found = flat.sum(0) if name == "bias" else flat.T @ taken.flatten(0, 1)
                self._sums[param] = self._sums[param] + found if param in self._sums else found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move by what was taken in and by this step's noise; returns what the closure returns.

        Raises:
            InvalidKnob: a plain `loss.backward()` has filled a gradient; nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [(p, g["lr"] / self.batch_size) for g in self.param_groups for p in g["params"]]
        if any(param.grad is not None for param, _ in params):
            raise InvalidKnob("gradients of no clipping: call optimizer.backward(losses) instead")
        for param, scale in params:
            std = scale * self.policy.noise_multiplier * self.policy.max_norm
            if param in self._sums:
                param.sub_(self._sums[param], alpha=scale)
            for rows, grad in self._rows.get(param, []):
                param.index_add_(0, rows, grad, alpha=-scale)
            if "paid" in self.state.get(param, {}):
                self._ledger(param).owe(std)
            else:
                _disturb(param, std, self._draws)
        self._sums, self._rows = {}, {}
        self.n_steps += 1
        return loss

    def flush(self) -> None:
        """Give every row the noise that it owes: before tables are read past their modules."""
        for param, state in self.state.items():
            if "paid" in state:
                self._ledger(param).flush()

    def close(self) -> None:
        """Flush, and let go of the model: it then trains, copies and saves as any other."""
        self.flush()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def epsilon(self, delta: float, n_examples: int) -> float:
        """Privacy spent so far: (epsilon, delta) where each batch was a Poisson sample.

        Args:
            delta: chance that epsilon does not hold; usual is below 1 / n_examples.
            n_examples: from which the batches were drawn.
        """
        rate = min(1.0, self.batch_size / n_examples)
        return epsilon(self.policy.noise_multiplier, rate, self.n_steps, delta)

    def state_dict(self) -> dict[str, Any]:
        """What going on needs, for `load_state_dict` beside the model's; tables are flushed."""
        self.flush()
        own = {"seed": self.seed, "draws": self._draws.get_state(), "n_steps": self.n_steps}
        return {**super().state_dict(), "private": {"warning": _WARNING, **own}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another run was saved, draw for draw; the model is loaded beside it.

        Raises:
            InvalidKnob: it was saved by an optimizer of another kind.
        """
        groups = self.param_groups
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in groups for param in group["params"]]
        kept = {key: sorted(state) for key, state in state_dict["state"].items()}
        own = {i: sorted(self.state[p]) for i, p in enumerate(params) if p in self.state}
        if "private" not in state_dict or kept != own:
            raise InvalidKnob(
                f"{type(self.policy).__name__} cannot go on from this state: it was not saved by "
                "the same kind of private optimizer on the same tables"
            )
        super().load_state_dict(state_dict)
        # torch has cast the ledgers to the parameters' type by now.
        for key, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                whole = value.detach().to(param.device).clone() if torch.is_tensor(value) else value
                self.state[param][name] = whole
        private = state_dict["private"]
        self.seed, self.n_steps = private["seed"], private["n_steps"]
        self._draws.set_state(private["draws"].cpu())


def epsilon(noise_multiplier: float, sample_rate: float, n_steps: int, delta: float) -> float:
    """Epsilon of (epsilon, delta) privacy after steps of the sampled Gaussian mechanism.

    Renyi divergences of whole orders (Mironov et al. 2019, arXiv 1908.10530, eq. 3.3), turned into
    epsilon as by Balle et al. 2020, arXiv 1905.09982, theorem 21. It is an upper bound.

    Args:
        noise_multiplier: standard deviation over the clipping norm; 0 gives infinity.
        sample_rate: chance of an example to be in a batch.
        n_steps: of training.
        delta: chance that epsilon does not hold.
    """
    if n_steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    found = []
    for a in ORDERS:
        divergence = n_steps * _log_moment(noise_multiplier, sample_rate, a) / (a - 1)
        found.append(divergence - (math.log(delta) + math.log(a)) / (a - 1) + math.log1p(-1 / a))
    return max(0.0, min(found))


def _log_moment(noise_multiplier: float, sample_rate: float, order: int) -> float:
    k = torch.arange(order + 1, dtype=torch.float64)
    top = torch.tensor(float(order), dtype=torch.float64)
    choose = torch.lgamma(top + 1) - torch.lgamma(k + 1) - torch.lgamma(top - k + 1)
    # 0 * log 0 is 0 where every example is in every batch.
    rate = torch.tensor(sample_rate, dtype=torch.float64)
    chance = torch.xlogy(k, rate) + torch.xlogy(top - k, 1 - rate)
    return float(torch.logsumexp(choose + chance + (k * k - k) / (2 * noise_multiplier**2), 0))


def _squares(module: nn.Module, taken: Tensor, grad: Tensor) -> Tensor:
    """Squared norm (B,) of each example's gradient of a module's parameters."""
    pairs = grad @ grad.mT  # (B, T, T)
    if isinstance(module, nn.Embedding):
        return (pairs * (taken[:, :, None] == taken[:, None, :])).sum((1, 2))
    found = torch.zeros(len(grad), dtype=grad.dtype, device=grad.device)
    assert isinstance(module, nn.Linear)
    if module.weight.requires_grad:
        found += (pairs * (taken @ taken.mT)).sum((1, 2))
    if module.bias is not None and module.bias.requires_grad:
        found += pairs.sum((1, 2))
    return found


def _disturb(param: Tensor, std: float, draws: torch.Generator) -> None:
    """Subtract fresh noise from all of a parameter, a block at a time."""
    flat = param.data.view(-1)
    for first in range(0, len(flat), BLOCK):
        some = flat[first : first + BLOCK]
        some.sub_(torch.empty_like(some).normal_(generator=draws), alpha=std)


def _trained(model: nn.Module) -> list[nn.Linear | nn.Embedding]:
    """The modules whose parameters are trained."""
    found: list[nn.Linear | nn.Embedding] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise UnsupportedModel(
                f"{name or 'the model'} is a {type(module).__name__} with trained parameters; "
                "private training knows nn.Linear and nn.Embedding: freeze it or replace it"
            )
        if isinstance(module, nn.Embedding) and (
            module.padding_idx is not None or module.max_norm or module.scale_grad_by_freq
        ):
            raise UnsupportedModel(
                f"{name} has padding_idx, max_norm or scale_grad_by_freq; leave them out"
            )
        if any(p.dtype not in (torch.float32, torch.float64) for p in own):
            raise UnsupportedModel(f"{name} is not in float32; small noise would be rounded away")
        if any(id(p) in seen or not p.is_contiguous() for p in own):
            raise UnsupportedModel(f"{name} shares its parameters, or they lie in strides")
        seen |= {id(p) for p in own}
        found.append(module)
    if not found:
        raise UnsupportedModel("no linear map and no table of this model is trained")
    return found
