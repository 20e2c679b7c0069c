"""Hidden states of surprising tokens, kept in a ring and woven into later ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from memwise.catalogue import Card
from memwise.context.engine.edit import Edit, EditPolicy, Pass
from memwise.context.engine.ring import HiddenRing
from memwise.context.engine.store import EMPTY
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class ContextualMemoryReweaving(EditPolicy):
    """Keep hidden states of surprising tokens at some layers; add to later ones what is like them.

    At each of the layers the states of what has passed are mixed by likeness to the state of the
    new token, and the mixture is added, in proportion to the size of the state. What the model
    expected is not kept, and the oldest goes when the ring is full.

    Attributes:
        depths: where the layers lie, from 0 at the first to 1 at the last.
        gates: weight of each, before a softmax over all.
        strength: size of what is added, as a ratio of the state's own; 0 leaves the model as it is.
        novel: least surprisal of what is kept, in nats.
        decay: factor on the weight of an entry, for each token since.

    Raises:
        InvalidKnob: depths or a decay that lie outside, or another number of gates.

    Note:
        The paper is vague here and gives no code; states are compared as they are (`W_q = I`), and
        gate and strength are chosen by hand, not trained. A layer reads its own ring only. Only
        tokens of earlier forward passes can be read, so a text that goes in at once does not see
        itself.
    """

    card = Card(
        paper=23,
        claim="higher recall over 4 lengths of input at a modest overhead; no number to rely on",
        check="rewoven_needle",
        baseline="streaming_llm",
        better="lower",
        margin=0.0,
        requires=("torch",),
    )

    depths: tuple[float, ...] = (1 / 3, 2 / 3, 1.0)
    gates: tuple[float, ...] = (0.0, 0.0, 0.0)
    strength: float = 0.1
    novel: float = 2.0
    decay: float = 0.9999

    def __post_init__(self) -> None:
        if not all(0 <= depth <= 1 for depth in self.depths) or not 0 < self.decay <= 1:
            raise InvalidKnob(
                f"depths={self.depths} must lie in [0, 1], decay={self.decay} above 0 and up to 1"
            )
        if len(self.gates) != len(self.depths) or not self.depths:
            raise InvalidKnob(f"{len(self.gates)} gates, {len(self.depths)} depths: one for each")

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """The layers at those depths."""
        return tuple(round(depth * (n_layers - 1)) for depth in self.depths)

    def memory_layers(self, n_layers: int) -> tuple[int, ...]:
        """The same, once each: in a model of few layers some fall together."""
        return tuple(dict.fromkeys(self.layers(n_layers)))

    def remember(self, passed: Pass) -> Tensor:
        """What surprised the model."""
        return passed.surprisal > self.novel

    def edit_hidden(self, edit: Edit) -> Tensor | None:
        """With what the ring holds of like states."""
        held = edit.memory.at != EMPTY  # (B, N)
        if not self.strength or not bool(held.any()):
            return None
        own = [layer == edit.layer for layer in self.layers(edit.n_layers)]
        gate = float(torch.tensor(self.gates).double().softmax(0)[own].sum())
        found = self.recall(edit.states, edit.at, edit.memory, edit.layer)
        size = edit.states.pow(2).mean(-1, keepdim=True).sqrt()
        added = self.strength * gate * size * F.layer_norm(found, found.shape[-1:])
        # A row of the batch whose ring is empty, and padding, stay as they are.
        told = held.any(1)[:, None, None] & (edit.at != EMPTY)[..., None]
        return torch.where(told, edit.states + added, edit.states)

    def recall(self, states: Tensor, at: Tensor, memory: HiddenRing, layer: int) -> Tensor:
        """The mixture of what is held (B, q, D), by likeness and age."""
        entries = memory.states(layer)
        logits = states @ entries.mT * states.shape[-1] ** -0.5  # (B, q, N)
        if self.decay < 1:
            age = (at[..., None] - memory.at[:, None]).clamp_min(0)
            logits = logits + age * torch.tensor(self.decay, dtype=logits.dtype).log()
        floor = torch.finfo(logits.dtype).min
        return logits.masked_fill((memory.at == EMPTY)[:, None], floor).softmax(-1) @ entries
