"""Any segments of a prompt: what asking the model has to beat."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.context.engine.excerpt import Prompt, PromptPolicy, Reader, Span, segments
from memwise.errors import InvalidKnob


@dataclass(frozen=True)
class RandomSegments(PromptPolicy):
    """Keep the head of a text and other segments at random, whatever they say.

    Attributes:
        length: tokens of a segment, in tokens.
        seed: of the draws.

    Raises:
        InvalidKnob: a length below 1.
    """

    card = Card(
        paper=None,
        claim="0 knowledge of text and question",
        check="surest_segments",
        baseline="random_segments",
        better="lower",
        margin=0.0,
        requires=("torch",),
        kind="control",
    )

    length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise InvalidKnob(f"length={self.length}: a segment has 1 token or more")

    def units(self, text: str, question: str, reader: Reader) -> list[Span]:
        """Segments of equal numbers of tokens."""
        return segments(text, reader, self.length)

    def score(self, prompt: Prompt) -> Sequence[float]:
        """Draws that follow from the text and the seed; the head comes first."""
        draws = random.Random(f"{self.seed} {prompt.text}")
        return [math.inf, *(draws.random() for _ in prompt.units[1:])]
