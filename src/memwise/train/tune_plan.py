"""What fits: weights, adapters, optimizer and activations for a budget, best first.

The ways to train are tried from the one that changes most to the one that needs least. Each is
first counted, without a tensor being made; then a real step of it is measured, and taken back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memwise import catalogue
from memwise.budget import Budget, Ledger, readable
from memwise.codec.spec import parse
from memwise.errors import BudgetExceeded, InvalidKnob
from memwise.train.engine.activations import compress_activations
from memwise.train.engine.adapted import Target, select
from memwise.train.engine.adapters import AdapterPolicy, Handle
from memwise.train.engine.heads import LOGITS, linear_cross_entropy
from memwise.train.engine.optimizer import MemOptimizer, OptimizerPolicy
from memwise.train.measure import bytes_of, peak, persistent

FULL = "full"
_LOGITS_BYTES = 3 * 4 * LOGITS  # logits of a chunk, and what is made of them


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        adapter: method that adapts the model, by name; "full" trains every weight.
        optimizer: method that moves what is trained.
        in_backward: each gradient is used and freed as soon as it is there.
    """

    adapter: str
    optimizer: str
    in_backward: bool = False

    def __str__(self) -> str:
        return f"{self.adapter} with {self.optimizer}" + (
            ", stepping in the backward pass" if self.in_backward else ""
        )


WAYS = (
    Way(FULL, "adamw"),
    Way(FULL, "coat_states"),
    Way(FULL, "adamw4bit", in_backward=True),
    Way("lora", "adamw"),
    Way("qlora", "adamw"),
)
"""What is tried where nothing is asked for, best first."""


def ways(adapter: str | None, optimizer: str | None) -> list[Way]:
    """The ways that hold to what is asked for.

    Raises:
        InvalidKnob: there is no such adapter or optimizer.
    """
    if adapter not in (None, FULL):
        _require(adapter, AdapterPolicy, "adapter")
    if optimizer is not None:
        _require(optimizer, OptimizerPolicy, "optimizer")
    found = [way for way in WAYS if adapter in (None, way.adapter)]
    found = found or [Way(str(adapter), "adamw")]
    if optimizer is None:
        return found
    fixed = [Way(way.adapter, optimizer, way.in_backward) for way in found]
    return list(dict.fromkeys(fixed))


def _require(name: str, kind: type, what: str) -> None:
    entry = catalogue.find(f"train/{name}")
    made = catalogue.load(entry.key)
    needs_more = kind is AdapterPolicy and made.__call__ is not AdapterPolicy.__call__
    if not issubclass(made, kind) or needs_more:
        raise InvalidKnob(f"{what} {name!r} cannot be used here; `memwise methods` lists others")


class CausalLoss(nn.Module):
    """The loss of a Hugging Face causal model, without its logits where the head is a plain matrix.

    Args:
        model: with `logits` in what its call returns.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._headless = False

    @torch.no_grad()
    def look(self, ids: Tensor) -> bool:
        """Whether body and head give what the model gives; without logits from now on if so."""
        body, head = self.model.base_model, self.model.get_output_embeddings()
        if body is self.model or not isinstance(head, nn.Linear) or head.bias is not None:
            return False
        few = ids[:1, :9]
        with _training(self, False):  # dropout would make two equal ways differ
            plain, own = self._plain(few), self._chunked(few)
        self._headless = bool(torch.isclose(plain, own, rtol=1e-4, atol=1e-5))
        return self._headless

    def forward(self, ids: Tensor) -> Tensor:
        """Mean nats per token of (B, T + 1)."""
        return self._chunked(ids) if self._headless else self._plain(ids)

    def _chunked(self, ids: Tensor) -> Tensor:
        hidden = self.model.base_model(input_ids=ids[:, :-1], use_cache=False)[0]
        weight = self.model.get_output_embeddings().weight
        return linear_cross_entropy(hidden.flatten(0, 1), weight, ids[:, 1:].flatten())

    def _plain(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        return nn.functional.cross_entropy(logits.flatten(0, 1).to(wide), ids[:, 1:].flatten())


@dataclass
class Setup:
    """A model that is ready to be trained in one way.

    Attributes:
        way: which.
        loss: of a batch; holds the model.
        optimizer: over what is trained.
        handle: of the adapters; None where every weight is trained.
        around: what is entered around each forward and backward pass.
        ledger: bytes as they were measured in a step.
    """

    way: Way
    loss: CausalLoss
    optimizer: MemOptimizer
    handle: Handle | None
    around: Callable[[], Any] = nullcontext
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is moved."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def backward(self, batches: Sequence[Tensor]) -> float:
        """Gradients of the mean loss over batches, used at once if the way says so."""
        total = 0.0
        with self.optimizer.step_in_backward() if self.way.in_backward else nullcontext():
            for ids in batches:
                with self.around():
                    loss = self.loss(ids) / len(batches)
                    loss.backward()
                total += float(loss.detach())
        return total


def set_up(
    model: Any, way: Way, batch: Tensor, budget: Budget | None, lr: float, seed: int,
    target: Target = None,
) -> Setup:  # fmt: skip
    """Make a model ready in one way, and measure a step of it.

    Raises:
        BudgetExceeded: the way does not fit; the model is as it was, but packed where it packs.
    """
    _fits_at_rest(model, way, budget, target)
    handle = None
    if way.adapter == FULL:
        model.requires_grad_(True)
    else:
        policy = catalogue.load(f"train/{way.adapter}")()
        handle = policy(model, target, seed=seed)
    made = Setup(way, CausalLoss(model), _optimizer(model, handle, way, lr), handle)
    made.loss.train()
    made.loss.look(batch)
    try:
        _choose_activations(made, budget)
        _rehearse(made, batch, budget)
    except BudgetExceeded:
        if handle is not None:
            handle.remove()
        raise
    made.optimizer = _optimizer(model, handle, way, lr)
    return made


def _optimizer(model: nn.Module, handle: Handle | None, way: Way, lr: float) -> MemOptimizer:
    params = model.parameters() if handle is None else handle.parameters()
    policy = catalogue.load(f"train/{way.optimizer}")()
    optimizer: MemOptimizer = policy([p for p in params if p.requires_grad], lr=lr)
    return optimizer


def at_rest(model: nn.Module, way: Way, target: Target = None) -> dict[str, int]:
    """Bytes of weights, gradients and states of a way, counted without making them."""
    sizes = {id(p): p for p in model.parameters()}
    weights = sum(p.numel() * p.element_size() for p in sizes.values())
    policy: OptimizerPolicy = catalogue.load(f"train/{way.optimizer}")()
    if way.adapter == FULL:
        states = sum(_state_bytes(policy, p.shape) for p in sizes.values())
        each = [p.numel() * p.element_size() for p in sizes.values()]
        return {
            "weights": weights,
            "gradients": max(each) if way.in_backward else sum(each),
            "states": states,
        }
    adapter = catalogue.load(f"train/{way.adapter}")()
    name = getattr(adapter, "codec", None)
    if name is not None:
        for module in select(model, target).values():
            weight: Any = module.weight
            weights += parse(name).nbytes(weight.shape) - weight.numel() * weight.element_size()
    return {"weights": weights}  # what an adapter trains is small, and measured


def _state_bytes(policy: OptimizerPolicy, shape: Sequence[int]) -> int:
    names = policy.codecs(shape)
    return sum(
        parse(names[state]).nbytes(shape) if state in names else 4 * math.prod(shape)
        for state in policy.rule.states
    )


def _fits_at_rest(model: nn.Module, way: Way, budget: Budget | None, target: Target) -> None:
    parts = at_rest(model, way, target)
    if budget is not None and sum(parts.values()) > budget:
        listed = ", ".join(f"{kind} {readable(n)}" for kind, n in parts.items())
        raise BudgetExceeded(f"{way} needs more than {readable(sum(parts.values()))} ({listed})")


def _choose_activations(made: Setup, budget: Budget | None) -> None:
    """The cheapest plan that fits into what weights, gradients and states leave."""
    if budget is None:
        return
    loss = made.loss
    held = sum(at_rest(loss.model, made.way).values()) if made.handle is None else bytes_of(loss)
    left = budget - held - _LOGITS_BYTES
    if left <= 0:
        raise BudgetExceeded(f"{made.way} leaves nothing for a batch: it holds {readable(held)}")
    saver = compress_activations(loss, budget=left)
    made.around = lambda: saver


def _rehearse(made: Setup, batch: Tensor, budget: Budget | None) -> None:
    """Measure two steps that move nothing; the second one is what all others are like."""
    for group in made.optimizer.param_groups:
        group["lr"] = 0.0  # times a change of the right size: the weights stay bit for bit

    def step() -> None:
        made.backward([batch])
        made.optimizer.step()

    step()
    made.optimizer.zero_grad(set_to_none=True)
    book = persistent(made.loss, made.optimizer)
    found = peak(step)
    made.optimizer.zero_grad(set_to_none=True)
    book.set("device", "peak of a step above these", found.peak_bytes)
    made.ledger = book
    if budget is not None and book.total() > budget:
        raise BudgetExceeded(f"{made.way} takes {readable(book.total())}, as measured in a step")


@contextmanager
def _training(loss: nn.Module, on: bool) -> Iterator[None]:
    was = loss.training
    loss.train(on)
    try:
        yield
    finally:
        loss.train(was)


def judged(loss: CausalLoss, batches: Sequence[Tensor]) -> float:
    """Mean nats per token of held-out batches."""
    with torch.no_grad(), _training(loss, False):
        return math.fsum(float(loss(ids)) for ids in batches) / len(batches)


def first_that_fits(
    model: Any, candidates: Sequence[Way], batch: Tensor, budget: Budget | None, lr: float | None,
    seed: int,
) -> Setup:  # fmt: skip
    """The first way that fits, ready to be trained.

    Raises:
        BudgetExceeded: none does; the message holds what each would take.
    """
    tried = []
    for way in candidates:
        try:
            return set_up(model, way, batch, budget, rate(way) if lr is None else lr, seed)
        except BudgetExceeded as problem:
            tried.append(str(problem))
    raise BudgetExceeded(
        f"tuning does not fit {budget}: " + "; ".join(tried) + "; raise --budget, or take a "
        "smaller --context or --batch"
    )


def rate(way: Way) -> float:
    """The learning rate where none is given: adapters start from nothing and take larger steps."""
    return 2e-5 if way.adapter == FULL else 5e-4
