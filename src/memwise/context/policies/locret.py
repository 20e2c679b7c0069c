"""Small trained heads that tell at once which tokens answers will want."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.plan import Shape
from memwise.context.engine.policy import CachePolicy, pin
from memwise.context.engine.retaining import load_heads, retained, untrained
from memwise.context.engine.step import Step

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class Locret(CachePolicy):
    """Keep what trained heads expect answers to attend to, and the newest tokens; the rest goes.

    A token is scored once, when it comes, from its own queries, keys and values; so no later text
    changes the score, and nothing is computed again.

    Attributes:
        heads: safetensors file that `save_heads` wrote; empty = heads that were never trained.
        sinks: first tokens that stay, in tokens.
        stabilizers: newest tokens that stay, in tokens.
        hidden: units of heads that were never trained.
        seed: of heads that were never trained.

    Raises:
        InvalidKnob: a knob below 1, or heads of another model.

    Note:
        The paper pins the newest tokens until the last chunk, of which a stream does not know, and
        the last 100 of the prompt; here the same number is pinned at every choice. First tokens are
        pinned too. Queries and keys come after the model's own norms, where it has some.
    """

    card = Card(
        paper=163,
        claim="20 times (Phi-3-mini-128K) and 8 times (Llama-3.1-8B) smaller caches",
        check="retained",
        baseline="sirllm",
        better="lower",
        margin=0.2,
        requires=("torch",),
    )

    columns: ClassVar[dict[str, float]] = {"retained": 0.0}
    needs_inputs = True

    heads: str = ""
    sinks: int = 4
    stabilizers: int = 16
    hidden: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        self._positive(sinks=self.sinks, stabilizers=self.stabilizers, hidden=self.hidden)

    @property
    def floor(self) -> int:
        """What is pinned, and one that is chosen."""
        return self.sinks + self.stabilizers + 1

    def weights(self, shape: Shape) -> Mapping[str, Tensor]:
        """The retaining heads, one for each full-attention layer."""
        if self.heads:
            return load_heads(self.heads, shape)
        return untrained(shape, self.hidden, self.seed)

    def observe(self, step: Step) -> None:
        """Score the new tokens."""
        first = step.n - step.n_new
        for inputs in step.inputs():
            score = retained(step.weights, step.layer, inputs)  # (B, r, H)
            step["retained"][:, :, first : first + score.shape[1]] = score.mT
            first += score.shape[1]

    def score(self, step: Step) -> Tensor:
        """What the heads said."""
        return pin(step["retained"], self.sinks, self.stabilizers)
