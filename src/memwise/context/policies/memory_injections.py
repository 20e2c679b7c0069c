"""A memory in words, added to what attention gives in one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.edit import Edit, EditPolicy
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class MemoryInjections(EditPolicy):
    """Add the words of a memory to the attention output of one layer, at every token.

    The memory is the sum of the output layer's rows of its tokens, each counted once. Nothing is
    dropped, and no place of the context is taken.

    Attributes:
        memories: tokens of the memory of each row of the batch; one memory serves all rows.
        layer: in which layer, from 0.
        strength: factor on the memory; 0 leaves the model as it is.

    Raises:
        InvalidKnob: a layer that is not there, or as many memories as there are no rows.

    Note:
        The reference adds to one head's result, which is the same as adding to the layer's. What is
        edited is what attention adds to the hidden states: in Gemma, after the norm that follows
        attention; and rows are as large as Gemma's embeddings, which it scales by the root of
        their width.
    """

    card = Card(
        paper=175,
        claim="probability of the right next token up by up to 424 % on two-hop prompts, GPT-2",
        check="two_hops",
        baseline="full_cache",
        better="higher",
        margin=0.0,
        requires=("torch",),
        negative="the bridge lifts the mean probability of answers from .164 to .195, and random "
        "nouns do to .191; in log-probability it gains .345 nat and nouns .050",
    )

    memories: tuple[tuple[int, ...], ...] = ()
    layer: int = 6
    strength: float = 4.0

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise InvalidKnob(f"layer={self.layer}: the first is 0")

    def layers(self, n_layers: int) -> Sequence[int]:
        """The one."""
        if self.layer >= n_layers:
            raise InvalidKnob(f"layer={self.layer}: the model has {n_layers}, the first is 0")
        return (self.layer,)

    def edit_output(self, edit: Edit) -> Tensor | None:
        """With the memory of each row, at all its tokens."""
        if not self.memories or not self.strength:
            return None
        n_rows = edit.states.shape[0]
        if len(self.memories) not in (1, n_rows):
            raise InvalidKnob(
                f"{len(self.memories)} memories for a batch of {n_rows}: give one a row, or one"
            )
        vectors = torch.stack([self.vector(edit, memory) for memory in self.memories])
        return edit.states + self.strength * vectors[:, None].to(edit.states.dtype)

    def vector(self, edit: Edit, memory: Sequence[int]) -> Tensor:
        """The memory as a direction of the hidden states (D,)."""
        ids = torch.tensor(sorted(set(memory)), dtype=torch.int64, device=edit.states.device)
        return edit.unembed(ids).sum(0)
