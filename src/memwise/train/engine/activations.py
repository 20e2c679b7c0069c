"""The activation engine: fewer bytes between the forward and the backward pass.

A policy sees the sites of a model, one a module, and plans an action for each. For the time of a
`with` block the modules' forward passes are wrapped: the wrapper says which module is at work, so
that the hooks on saved tensors know what is planned, or it runs another operation altogether. On
exit the model is as it was; a backward pass may still follow.

Sites come from the structure of the modules alone. Their bytes are known where there is a budget:
the first batch then goes through the model once more beforehand, with nothing held, so that this
pass takes no more memory than inference. What functions save outside of any module's reach (a loss
computed after the model, `F.gelu` in a block's own forward pass) belongs to the innermost module at
work: actions on single tensors reach it there, swapped operations do not, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from memwise.budget import Budget, BudgetLike, readable
from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.train.engine.act_actions import Planned, Recompute, Sketch, Swap, Wrap, steady
from memwise.train.engine.act_hooks import Hooks, Spot, own_storages
from memwise.train.engine.act_plan import (
    EXACT,
    Plan,
    any_of,
    cheapest,
    each,
    fitting,
    is_inside,
    recomputed,
)
from memwise.train.engine.act_sites import Site, sites

Run = Callable[..., Any]
_SEEDS = 1 << 31


@dataclass(frozen=True)
class ActivationPolicy:
    """What happens to what a model saves for its backward pass; override `plan`."""

    card: ClassVar[Card]

    def plan(self, sites: Sequence[Site], budget: Budget | None) -> Mapping[str, Planned]:
        """An action, or several that are tried in order, for sites by name; left out = keep."""
        return {}


@dataclass(frozen=True)
class Share:
    """Bytes of a group of sites.

    Attributes:
        plain_bytes: what plain autograd would have kept, as far as it was seen.
        held_bytes: what was kept instead, on the device.
    """

    plain_bytes: int
    held_bytes: int

    def __add__(self, other: Share) -> Share:
        return Share(self.plain_bytes + other.plain_bytes, self.held_bytes + other.held_bytes)


@dataclass(frozen=True)
class Report:
    """What was kept, each storage once, summed over the forward passes of the block.

    What lies inside of a recomputed block is never saved and not seen: it is in no number.

    Attributes:
        by_kind: kind of site -> bytes.
        by_action: action -> bytes; "keep" is what no action reached.
        by_site: (site, action) -> bytes.
        peak_bytes: held at most at one moment.
        skipped: (site, why an action could not be done) -> how often.
    """

    by_kind: Mapping[str, Share]
    by_action: Mapping[str, Share]
    by_site: Mapping[tuple[str, str], Share]
    peak_bytes: int
    skipped: Mapping[tuple[str, str], int]

    @property
    def plain_bytes(self) -> int:
        """What plain autograd would have kept."""
        return sum(share.plain_bytes for share in self.by_action.values())

    @property
    def held_bytes(self) -> int:
        """What was kept."""
        return sum(share.held_bytes for share in self.by_action.values())

    @property
    def reached_ratio(self) -> float:
        """Share of the bytes seen that an action reached."""
        kept = self.by_action.get("keep", Share(0, 0)).plain_bytes
        return 1 - kept / self.plain_bytes if self.plain_bytes else 0.0

    def __str__(self) -> str:
        rows = [("kind or action", "plain", "held")]
        for group in (self.by_kind, self.by_action):
            rows += [(n, readable(s.plain_bytes), readable(s.held_bytes)) for n, s in group.items()]
        rows.append(("all", readable(self.plain_bytes), readable(self.held_bytes)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
        lines.append(
            f"reached {self.reached_ratio:.0%}, at most {readable(self.peak_bytes)} at a time"
        )
        lines += [f"{name or '(model)'}: {why} ({n})" for (name, why), n in self.skipped.items()]
        return "\n".join(lines)


class Tape:
    """What happens in one `with` block.

    Attributes:
        plan: site -> actions, once it is known.
        sites: of the model, once they are known.
    """

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self.plan: Mapping[str, Planned] = {}
        self.sites: tuple[Site, ...] = ()

    @property
    def held_bytes(self) -> int:
        """Bytes kept for the backward pass now, on the device."""
        return self._hooks.now_bytes

    @property
    def peak_bytes(self) -> int:
        """Bytes kept at most."""
        return self._hooks.peak_bytes

    def state(self, site: str) -> Any:
        """What the action on a whole block shares with that on others; None where there is none."""
        actions = (action for action in each(self.plan[site]) if isinstance(action, Wrap))
        return next((self._hooks.shares(action, lambda: None) for action in actions), None)

    def report(self) -> Report:
        """Bytes by kind, action and site, and what could not be done."""
        by_kind: dict[str, Share] = {}
        by_action: dict[str, Share] = {}
        by_site: dict[tuple[str, str], Share] = {}
        for (site, kind, action), line in self._hooks.lines.items():
            one = Share(line.plain_bytes, line.held_bytes)
            by_kind[kind] = by_kind.get(kind, Share(0, 0)) + one
            by_action[action] = by_action.get(action, Share(0, 0)) + one
            by_site[site, action] = one
        return Report(by_kind, by_action, by_site, self.peak_bytes, dict(self._hooks.notes))


class compress_activations:
    """Train with fewer bytes between forward and backward; the model is as it was on exit.

        with compress_activations(model, policy=FewBitBackward(bits=3)) as tape:
            loss = model(batch)
            loss.backward()
        print(tape.report())

    Without a policy, exact and cheap things are done: only what the gradients need is kept, and
    outputs of cheap functions are made again. With a budget on top, the first of these that fits is
    taken: nothing, exact and cheap, as few recomputed blocks as it takes, codes of 8 bits, codes of
    4 bits; `tape.plan` names it. The object can be entered again, and then remembers its plan.

    Note:
        A budget costs one to a few extra forward passes of the first batch, in which batch
        statistics and random numbers are put back; other side effects of the model happen then.
        It covers what is kept from forward to backward, and one recomputed block; not what single
        operations need while they run. In-place changes of a saved tensor raise as always, but of
        one that was coded too. Second derivatives do not go through swapped operations. Sketches
        draw their seed from torch's random numbers, once a block.

    Args:
        model: whose forward passes are wrapped. Its call is what a budget is planned for.
        policy: what to do; None leaves it to the budget.
        budget: bytes that may be held for the backward pass at any moment.

    Raises:
        BudgetExceeded: when the model is called, and no plan or not this policy's fits; later, if
            a batch needs more than the first one.
        InvalidKnob: it is entered twice, or the model was never called while a budget waited.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: ActivationPolicy | None = None,
        budget: BudgetLike | None = None,
    ) -> None:
        self._model, self._policy = model, policy
        self._budget = None if budget is None else Budget(budget)
        self._modules = dict(model.named_modules())
        self._known: dict[Any, tuple[tuple[Site, ...], Plan]] = {}
        self._stack: ExitStack | None = None

    def __enter__(self) -> Tape:
        if self._stack is not None:
            raise InvalidKnob("compress_activations is entered already; make a second one")
        hooks = Hooks(own_storages(self._model), self._budget)
        tape = self._tape = Tape(hooks)
        self._found, self._run = sites(self._model), self._model.forward
        run: Run | None = None
        with ExitStack() as stack:
            if self._budget is None:
                tape.sites, tape.plan = self._found, self._unbounded()
                run = self._installed(tape.plan, hooks, stack)

            # Its call is also the moment when a budget learns of the batch.
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal run
                if run is None:
                    if not torch.is_grad_enabled() or self._stack is None:
                        return self._run(*args, **kwargs)
                    tape.sites, tape.plan = self._fitted(args, kwargs)
                    run = self._installed(tape.plan, hooks, self._stack)
                return run(*args, **kwargs)

            stack.enter_context(_swapped(self._model, forward))
            stack.enter_context(saved_tensors_hooks(hooks.pack, hooks.unpack))
            self._stack = stack.pop_all()
        return tape

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        assert self._stack is not None
        stack, self._stack = self._stack, None
        stack.close()
        if kind is None and not self._tape.sites:
            raise InvalidKnob(
                f"budget={self._budget}: {type(self._model).__name__} was never called itself, so "
                "nothing was planned and nothing saved; call the model, or leave budget out"
            )

    def _unbounded(self) -> Plan:
        if self._policy is None:
            return dict.fromkeys((site.name for site in self._found), EXACT)
        return self._policy.plan(self._found, None)

    def _fitted(self, args: Any, kwargs: Any) -> tuple[tuple[Site, ...], Plan]:
        """Sites with their bytes, and a plan that fits the budget for this batch."""
        assert self._budget is not None
        key = _situation(self._model, args, kwargs)
        if key in self._known:
            return self._known[key]

        def held(plan: Plan) -> int:
            return self._dry(plan, args, kwargs).peak_bytes

        by_site: dict[str, int] = {}
        for (name, *_), line in self._dry({}, args, kwargs).lines.items():
            by_site[name] = by_site.get(name, 0) + line.held_bytes
        found = tuple(replace(site, saved_bytes=by_site.get(site.name, 0)) for site in self._found)
        if self._policy is None:
            plan = cheapest(found, self._budget, held)
        else:
            plan = self._policy.plan(found, self._budget)
            fitting(found, self._budget, plan, held(plan), type(self._policy).__name__)
        self._known[key] = found, plan
        return self._known[key]

    def _dry(self, plan: Plan, args: Any, kwargs: Any) -> Hooks:
        """Run the batch forward and count what would be kept, keeping nothing."""
        hooks = Hooks(own_storages(self._model), keeping=False)
        devices = {t.device.index for t in self._model.parameters() if t.is_cuda}
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=sorted(devices)))
            stack.enter_context(steady(self._model))
            run = self._installed(plan, hooks, stack)
            stack.enter_context(saved_tensors_hooks(hooks.pack, hooks.unpack))
            run(*args, **kwargs)
        return hooks

    # --- the wrappers

    def _installed(self, plan: Plan, hooks: Hooks, stack: ExitStack) -> Run:
        """Wrap the forward passes of all modules but the model's own, which is returned wrapped."""
        names = [site.name for site in self._found]
        if unknown := sorted(plan.keys() - set(names)):
            raise InvalidKnob(f"the plan names a site {unknown[0]!r} that the model does not have")
        if any(any_of(actions, Sketch) for actions in plan.values()):
            hooks.seed_with(int(torch.randint(_SEEDS, ())))
        again = recomputed(plan)
        run: Run = self._run
        for site in self._found:
            if any(is_inside(site.name, block) for block in again):
                continue
            if site.name in again:
                spot = Spot(site.name, site.kind, (), str(Recompute()))
                made = self._recomputing(site, plan, hooks)
            else:
                made, spot = self._operation(site, plan.get(site.name, ()), hooks)
                for action in each(plan.get(site.name, ())):
                    if isinstance(action, Wrap):
                        made = action.wrap(self._modules[site.name], made, spot, hooks)
            wrapped = _attributed(made, spot, hooks)
            if site.name:
                stack.enter_context(_swapped(self._modules[site.name], wrapped))
            else:
                run = wrapped
        return run

    def _forward(self, site: Site) -> Run:
        return self._modules[site.name].forward if site.name else self._run

    def _operation(
        self, site: Site, planned: Planned, hooks: Hooks, *, counted: bool = True
    ) -> tuple[Run, Spot]:
        """The forward pass of a module, swapped where an action can, and where it counts."""
        actions = each(planned)
        of_tensors = tuple(a for a in actions if not isinstance(a, Swap | Recompute | Wrap))
        for action in actions:
            if not isinstance(action, Swap):
                continue
            if not site.native:
                if site.kind not in ("block", "other"):
                    hooks.note(site.name, f"{action}: {site.op} has a forward pass of its own")
                continue
            spot = Spot(site.name, site.kind, of_tensors, str(action))
            made = action.swap(
                self._modules[site.name], self._forward(site), spot if counted else None, hooks
            )
            if made is not None:
                return made, spot
        return self._forward(site), Spot(site.name, site.kind, of_tensors)

    def _recomputing(self, site: Site, plan: Plan, hooks: Hooks) -> Run:
        """A module whose forward pass runs again in the backward pass."""
        module, forward = self._modules[site.name], self._forward(site)
        inner = []
        for other in self._found:
            if is_inside(other.name, site.name) and other.native:
                made, _ = self._operation(other, plan.get(other.name, ()), hooks, counted=False)
                if made != self._forward(other):
                    inner.append((self._modules[other.name], made))

        # Both passes find the same operations, also where the second one comes after the exit.
        def body(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for child, made in inner:
                    stack.enter_context(_swapped(child, made))
                return forward(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(
                body, *args, use_reentrant=False,
                context_fn=lambda: (nullcontext(), steady(module)), **kwargs,
            )  # fmt: skip

        return run


def _attributed(run: Run, spot: Spot, hooks: Hooks) -> Run:
    """A forward pass during which the hooks know which module is at work."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hooks.stack.append(spot)
        try:
            return run(*args, **kwargs)
        finally:
            hooks.stack.pop()

    return forward


@contextmanager
def _swapped(module: nn.Module, run: Run) -> Iterator[None]:
    """Give one module, not its class, another forward pass for a while."""
    had = "forward" in vars(module)
    old = module.forward
    vars(module)["forward"] = run
    try:
        yield
    finally:
        if had:
            vars(module)["forward"] = old
        else:
            del vars(module)["forward"]


def _situation(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a plan's bytes depend on: shapes of the batch, what is trained, and modes."""
    trained = tuple(param.requires_grad for param in model.parameters())
    modes = tuple(module.training for module in model.modules())
    return trained, modes, _shapes(args), _shapes(kwargs)


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.requires_grad
    if isinstance(value, Mapping):
        return tuple((name, _shapes(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_shapes(item) for item in value)
    return type(value)
