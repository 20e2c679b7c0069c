"""Prompts without the phrases that the model could have guessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.context.engine.excerpt import Prompt, PromptPolicy


@dataclass(frozen=True)
class SelectiveContext(PromptPolicy):
    """Keep the phrases that carry most information for the model, drop what it foresaw.

    A phrase has the sum of the self-information of its tokens. The text is read in windows that
    begin anew, so that its later parts do not seem ever less informative.

    Note:
        Phrases are function words with the content words after them, found by rules, where the
        paper takes noun phrases of a parser. The number of tokens is given, not a percentile.
    """

    card = Card(
        paper=146,
        claim="50 % less context: 36 % less memory and 32 % less time at -0.023 BERTScore",
        check="shorter_prompt",
        baseline="random_phrases",
        better="lower",
        margin=0.0,
        requires=("torch",),
        negative="with half of the tokens the last sentence of a passage costs 3.909 nat a token, "
        "behind random phrases 3.841 and behind the newest ones 3.443; 20 passages",
    )

    def score(self, prompt: Prompt) -> Sequence[float]:
        """The information of each phrase."""
        return prompt.information
