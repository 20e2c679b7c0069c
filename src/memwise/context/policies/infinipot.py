"""A pot of slots that is distilled whenever it is full, without a question in sight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin, pin_out, smooth, spread
from memwise.context.engine.step import Step
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class InfiniPot(CachePolicy):
    """Keep what a general prompt attends to and what the model did not expect; the rest goes.

    When the slots are full, a catalyst prompt goes through the model and is forgotten again. A
    share of the slots stays for being unexpected when it came, the others for the attention of that
    prompt. Unexpected is a passage, the mean of neighbours; attention is shared among neighbours.
    What stays is put side by side, right before the next token.

    Attributes:
        catalyst: tokens of the prompt; none = the newest `queries` tokens stand for it.
        novel: share of the slots that stays for being unexpected.
        kernel: neighbours whose novelty is averaged and whose attention is shared, in tokens; odd.
        sinks: first tokens that stay, in tokens.
        queries: newest tokens whose attention counts where there is no catalyst, in tokens.

    Raises:
        InvalidKnob: a share outside of 0 and 1, or another knob below 1.

    Note:
        The paper leaves share and pooling open. A fact is a run of tokens that are all somewhat
        unexpected, and lone names in a text are more so: by the highest novelty among neighbours,
        or with half of the slots, facts are lost.
    """

    card = Card(
        paper=33,
        claim="4k slots match models trained for long contexts on LongBench; needles in 1M tokens",
        check="needle_blind",
        baseline="streaming_llm",
        better="lower",
        margin=0.0,
        requires=("torch",),
    )

    columns: ClassVar[dict[str, float]] = {"novelty": 0.0}
    raw_keys = True
    needs_text = True
    any_length = True

    catalyst: tuple[int, ...] = ()
    novel: float = 0.75
    kernel: int = 21
    sinks: int = 4
    queries: int = 16

    def __post_init__(self) -> None:
        self._positive(kernel=self.kernel, sinks=self.sinks, queries=self.queries)
        if not 0 <= self.novel <= 1:
            raise InvalidKnob(f"novel={self.novel} is a share: give a number from 0 to 1")

    @property
    def window(self) -> int:
        """The newest queries, where there is no prompt."""
        return 0 if self.catalyst else self.queries

    @property
    def floor(self) -> int:
        """The sinks, and one of each kind."""
        return self.sinks + 2

    def probe(self, vocabulary: int) -> tuple[int, ...]:
        """The catalyst prompt."""
        return self.catalyst

    def observe(self, step: Step) -> None:
        """Note how little each token was expected."""
        step["novelty"][:, :, -step.n_new :] = step.surprisal[:, None]

    def score(self, step: Step) -> Tensor:
        """Unexpected slots first, as many as their share, then by the prompt's attention."""
        novelty = spread(pin_out(step["novelty"], self.sinks), self.kernel)
        attention = smooth(pin_out(step.received, self.sinks), self.kernel)
        n_novel = min(int(self.novel * (step.n_slots - self.sinks)), step.n)
        order = novelty.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        score = attention + (order < n_novel) * (1 + attention.amax(-1, keepdim=True))
        return pin(score, self.sinks)

    def place(self, step: Step) -> Tensor:
        """Side by side, in their order, up to the newest token's place."""
        last = step.place.amax(-1, keepdim=True)
        n = step.n
        side = last - n + 1 + torch.arange(n, dtype=last.dtype, device=last.device)
        return side.where(step.pos >= 0, step.place)
