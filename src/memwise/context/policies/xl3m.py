"""Long prompts, of which only the segments stay after which the model is surest of its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.context.engine.excerpt import Prompt, PromptPolicy, Reader, Span, segments
from memwise.errors import InvalidKnob


@dataclass(frozen=True)
class XL3M(PromptPolicy):
    """Keep the segments of a text after which a question has the clearest answer; drop the rest.

    Each segment goes through the model with the question behind it, alone, so nothing grows with
    the text. The lower the entropy of the next token, the sooner a segment stays. The first
    segment, the head of the text, always does if it fits.

    Attributes:
        length: tokens of a segment, in tokens.

    Raises:
        InvalidKnob: a length below 1, or a text without a question.

    Note:
        The entropy is that of the token after the question; the paper leaves open whether the
        tokens of the question count too. Certainty can be fooled: text that repeats itself makes a
        model sure of anything.
    """

    card = Card(
        paper=151,
        claim="Llama-2-7B answers on over 20M tokens with 8 accelerators of 64 GB",
        check="surest_segments",
        baseline="random_segments",
        better="lower",
        margin=0.5,
        requires=("torch",),
    )

    length: int = 128

    def __post_init__(self) -> None:
        if self.length < 1:
            raise InvalidKnob(f"length={self.length}: a segment has 1 token or more")

    def units(self, text: str, question: str, reader: Reader) -> list[Span]:
        """Segments of equal numbers of tokens."""
        if not question.strip():
            raise InvalidKnob("XL3M judges segments by a question: give question=")
        return segments(text, reader, self.length)

    def score(self, prompt: Prompt) -> Sequence[float]:
        """How sure the model is; the head comes first."""
        rest = [-prompt.doubt(unit) for unit in range(1, len(prompt.units))]
        return [math.inf, *rest]
