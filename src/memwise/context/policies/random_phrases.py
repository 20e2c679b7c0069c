"""Any phrases of a prompt: what choosing them has to beat."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.context.engine.excerpt import Prompt, PromptPolicy


@dataclass(frozen=True)
class RandomPhrases(PromptPolicy):
    """Keep phrases at random, whatever they say.

    Attributes:
        seed: of the draws.
    """

    card = Card(
        paper=None,
        claim="0 knowledge of the text",
        check="shorter_prompt",
        baseline="random_phrases",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="control",
    )

    seed: int = 0

    def score(self, prompt: Prompt) -> Sequence[float]:
        """Draws that follow from the text and the seed."""
        draws = random.Random(f"{self.seed} {prompt.text}")
        return [draws.random() for _ in prompt.units]
