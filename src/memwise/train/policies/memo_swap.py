"""MEMO (arXiv 2407.12117): some tokens wait elsewhere, the others are made again, all is placed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from memwise.budget import Budget, BudgetLike
from memwise.catalogue import Card
from memwise.train.engine.act_actions import Planned
from memwise.train.engine.act_sites import sites
from memwise.train.engine.act_swap import TokenSwap
from memwise.train.engine.activations import ActivationPolicy, Site
from memwise.train.engine.arena import Arena, planned, traced


@dataclass(frozen=True)
class MemoSwap(ActivationPolicy):
    """Keep no more than two blocks on the device; swap some tokens' rows, make the others again.

    A block's input and the output of its attention are moved to the store whole. Of everything else
    that a block saves, the rows of the first tokens are moved, as many as the link carries while
    one block is computed, and the rows of the last ones are dropped after the forward pass. In the
    backward pass a block is fetched while the one after it is worked on, and the dropped rows are
    computed again: on these tokens alone, and without attention. Gradients are exact. The last
    block is not moved. What lies outside of blocks, small tensors, parameters and the batch stay.

    `arrange` is the other half: offsets of all allocations of a step in one arena, by mixed-integer
    programs, and so the bytes that the step needs without any fragmentation.

    Attributes:
        alpha: share of the tokens that is swapped, in [0, 1]; None measures it at the first block.
        store: "disk", or "host" (pinned memory; for a model on the host there is nothing to move,
            and the report says so).
        folder: where files are made; None = the system's folder for temporary files.
        room: bytes that the store has; fewer tokens are swapped where it would not hold them.
        solver_s: seconds for each mixed-integer program.

    Note:
        The arrangement is a plan and its size: torch's allocator takes no offsets. Attention has to
        be `scaled_dot_product_attention`; a block that mixes tokens elsewhere, or draws random
        numbers, is noticed by two tokens made again at once, and refused unless alpha is 1.

    Raises:
        InvalidKnob: alpha is not in [0, 1], or there is no such store.
    """

    alpha: float | None = None
    store: str = "disk"
    folder: str | None = None
    room: BudgetLike | None = None
    solver_s: float = 10.0

    card = Card(
        paper=121,
        claim="7B parameters at 1M tokens on 8 GPUs at 52.3 % MFU, 2.42 times Megatron-LM's",
        check="token_swap",
        baseline="keep",
        better="lower",
        margin=0.5,
        requires=("torch",),
    )

    def __post_init__(self) -> None:
        self._swap(1)

    def _swap(self, n_blocks: int) -> TokenSwap:
        room = None if self.room is None else int(Budget(self.room)) // n_blocks
        return TokenSwap(self.alpha, self.store, self.folder, room)

    def plan(self, sites: Sequence[Site], budget: Budget | None) -> Mapping[str, Planned]:
        blocks = [site.name for site in sites if site.kind == "block"]
        return dict.fromkeys(blocks, self._swap(max(1, len(blocks))))

    def arrange(self, model: nn.Module, step: Callable[[], object]) -> Arena:
        """Offsets of everything that one step of a model on the host allocates.

        Args:
            model: whose blocks' passes are planned one by one first.
            step: a forward and backward pass that was run once before.

        Raises:
            MissingExtra: scipy is not installed.
        """
        blocks = [site.name for site in sites(model) if site.kind == "block"]
        trace = traced(step, model, blocks)
        return planned(trace.requests, trace.passes, self.solver_s)
