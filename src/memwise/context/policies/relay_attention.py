"""RelayAttention: one copy of a shared prefix, attended by all requests of a batch at once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from memwise.budget import BudgetLike
from memwise.catalogue import Card
from memwise.context.engine.relay import Prefix, RelayCache, relayed
from memwise.errors import InvalidKnob


@dataclass(frozen=True)
class RelayAttention:
    """Keep the prefix of a batch of requests once, and drop nothing: the result is exact.

    Attributes:
        n_rows: query rows of a head of which logits exist at once; fewer take less memory.

    Raises:
        InvalidKnob: `n_rows` is below 1.

    Note:
        The paper has one system prompt. Here a prefix may continue another one, each part is
        attended on its own, and sliding layers have what they see of the prefix.
    """

    card = Card(
        paper=117,
        claim="up to 2.2 times the request rate and 2 times the throughput with a system prompt",
        check="shared_prefix",
        baseline="replicated_prefix",
        better="lower",
        margin=0.2,
        requires=("torch",),
    )

    n_rows: int = 256

    def __post_init__(self) -> None:
        if self.n_rows < 1:
            raise InvalidKnob(f"n_rows={self.n_rows}: at least one row has to be attended at once")

    def __call__(
        self, model: nn.Module, prefix: Prefix | None, budget: BudgetLike | None = None
    ) -> AbstractContextManager[RelayCache]:
        """Let a model generate behind a prefix; see `relayed`."""
        return relayed(model, prefix, budget, n_rows=self.n_rows)
