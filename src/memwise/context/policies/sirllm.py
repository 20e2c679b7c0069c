"""What surprised the model stays, and fades from turn to turn of a dialogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy, pin
from memwise.context.engine.step import Step
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class SirLLM(CachePolicy):
    """Keep the first tokens, the newest, and those that the model expected least; the rest goes.

    All layers and heads keep the same tokens. With a decay, what was said in earlier turns of a
    dialogue counts less with each new turn, so that a newer fact outlives an older one.

    Attributes:
        decay: what the surprise of earlier turns is multiplied by when a turn begins, as a ratio;
            1 forgets nothing.
        sinks: first tokens that stay, in tokens.
        recent: newest tokens that stay, in tokens; 0 = none but for their surprise.

    Raises:
        InvalidKnob: a decay outside of 0 and 1, no sinks, or a negative number of newest tokens.

    Note:
        The paper numbers the slots anew, so that it can go on beyond the model's length; here keys
        stay where they are, as Gemma-3 reads them better so (1.7 against 1.9 nat in dialogues other
        than the check's). It gives the first token of a chunk the chunk's highest surprise, as
        nothing foretells it there; here the last hidden state of the chunk before does.
    """

    card = Card(
        paper=98,
        claim="above StreamingLLM on 3 sets: DailyDialog, groceries, rock-paper-scissors",
        check="dialogue",
        baseline="streaming_llm",
        better="lower",
        margin=0.1,
        requires=("torch",),
    )

    columns: ClassVar[dict[str, float]] = {"surprise": 0.0}
    needs_text = True

    decay: float = 1.0
    sinks: int = 4
    recent: int = 0

    def __post_init__(self) -> None:
        self._positive(sinks=self.sinks)
        if not 0 <= self.decay <= 1:
            raise InvalidKnob(f"decay={self.decay} is a ratio: give a number from 0 to 1")
        if self.recent < 0:
            raise InvalidKnob(f"recent={self.recent} is a number of tokens: give 0 or more")

    @property
    def floor(self) -> int:
        """What is pinned, and one that is chosen."""
        return self.sinks + self.recent + 1

    def observe(self, step: Step) -> None:
        """Note the surprise of new tokens; that of earlier turns fades where one begins."""
        surprise, n_old = step["surprise"], step.n - step.n_new
        if step.new_turn:
            surprise[:, :, :n_old] *= self.decay
        surprise[:, :, n_old:] = step.surprisal[:, None]

    def score(self, step: Step) -> Tensor:
        """The surprise that is left."""
        return pin(step["surprise"], self.sinks, self.recent)
