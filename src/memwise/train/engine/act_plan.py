"""Plans that fit a budget: exact and cheap first, then recomputed blocks, then codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from memwise.budget import Budget, readable
from memwise.errors import BudgetExceeded
from memwise.train.engine.act_actions import Drop, Planned, Quant, Recompute, Remake
from memwise.train.engine.act_hooks import Action
from memwise.train.engine.act_sites import Site

Plan: TypeAlias = Mapping[str, Planned]

EXACT: Planned = (Drop(), Remake())
_LOSSY = ("int8/group128", "int4/group32")


def cheapest(sites: Sequence[Site], budget: Budget, held: Callable[[Plan], int]) -> Plan:
    """The first plan that fits, from nothing at all to codes of 4 bits.

    Args:
        sites: with their bytes.
        budget: for what is kept from forward to backward, and one recomputed block.
        held: bytes that a plan keeps, found by running the batch.

    Raises:
        BudgetExceeded: none fits; the message holds the bytes of each.
    """
    tried: list[str] = []

    def fits(plan: Plan, name: str) -> bool:
        n_bytes = held(plan) + largest_block(sites, plan)
        tried.append(f"{name} {readable(n_bytes)}")
        return n_bytes <= budget

    everywhere = {site.name: EXACT for site in sites}
    for name, plan in (("nothing", {}), ("exact and cheap", everywhere)):
        if fits(plan, name):
            return plan

    blocks = [site.name for site in sites if site.kind == "block"]
    blocks.sort(key=lambda block: -_block_bytes(sites, block))
    if blocks and fits(_recomputed(everywhere, blocks), f"{len(blocks)} recomputed blocks"):
        low, high = 0, len(blocks)
        while high - low > 1:
            some = (low + high) // 2
            fewer = fits(_recomputed(everywhere, blocks[:some]), f"{some} recomputed blocks")
            low, high = (low, some) if fewer else (some, high)
        return _recomputed(everywhere, blocks[:high])

    for codec in _LOSSY:
        plan = {name: (Drop(), Remake(), Quant(codec)) for name in everywhere}
        if fits(plan, codec):
            return plan
    raise BudgetExceeded(
        f"activations do not fit {budget}: {', '.join(tried)}; raise budget=, take smaller batches "
        "or shorter sequences, or wrap what repeats in a ModuleList so that it can be recomputed"
    )


def fitting(sites: Sequence[Site], budget: Budget, plan: Plan, held_bytes: int, name: str) -> None:
    """Refuse a plan that keeps more than the budget.

    Raises:
        BudgetExceeded: it does; the message says how much.
    """
    block = largest_block(sites, plan)
    if held_bytes + block > budget:
        extra = f", {readable(block)} of it for a recomputed block" if block else ""
        plain = readable(sum(site.saved_bytes or 0 for site in sites))
        raise BudgetExceeded(
            f"{name} keeps {readable(held_bytes + block)} of this batch's {plain}{extra}, "
            f"and the budget is {budget}; raise budget=, take smaller batches, or leave policy out "
            "so that a plan is chosen"
        )


def largest_block(sites: Sequence[Site], plan: Plan) -> int:
    """Bytes of the largest recomputed module, which stands in full once in the backward pass."""
    return max((_block_bytes(sites, name) for name in recomputed(plan)), default=0)


def recomputed(plan: Plan) -> list[str]:
    """Sites that a plan recomputes."""
    return [name for name, actions in plan.items() if any_of(actions, Recompute)]


def any_of(planned: Planned, kind: type[object]) -> bool:
    """Whether there is an action of this class among those planned."""
    return any(isinstance(action, kind) for action in each(planned))


def each(planned: Planned) -> tuple[Action, ...]:
    """The actions planned, in order."""
    return planned if isinstance(planned, tuple) else (planned,)


def is_inside(name: str, block: str) -> bool:
    """Whether a module lies inside of another, by their names."""
    return name != block and (not block or name.startswith(f"{block}."))


def _block_bytes(sites: Sequence[Site], block: str) -> int:
    return sum(
        site.saved_bytes or 0 for site in sites if site.name == block or is_inside(site.name, block)
    )


def _recomputed(plan: Plan, blocks: Sequence[str]) -> Plan:
    return {**plan, **dict.fromkeys(blocks, Recompute())}
