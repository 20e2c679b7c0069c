"""What a paper changes while a model runs: attention, what it adds, or what enters a layer.

A policy holds knobs and nothing else. All that a hook is asked comes with one argument, an `Edit`;
a hook that returns None leaves things as they are.

Shapes: B batch, Hq query heads, q tokens of a forward pass, r of them, n keys, D width of the
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.attention import products
from memwise.context.engine.ring import HiddenRing
from memwise.errors import InvalidKnob, UnsupportedModel

if TYPE_CHECKING:
    from memwise.context.engine.host import Host

Tensor: TypeAlias = torch.Tensor

_LOGIT_ROWS = 16  # tokens of which logits exist at once


@dataclass
class Pass:
    """One pass of some tokens through the model.

    Attributes:
        host: the model.
        tokens: (B, q); None where the model was given embeddings.
        seen_at: places in their texts of all tokens up to now, (B, seen + q); -1 is padding.
        n_new: q.
        n_past: tokens that a cache holds of before, padding included.
        memory: what is held of earlier passes.
        states: hidden states that entered the layers of the memory, by layer (B, q, D).
        hidden: what the decoder made of the tokens (B, q, D), once it has.
    """

    host: Host
    tokens: Tensor | None
    seen_at: Tensor
    n_new: int
    n_past: int
    memory: HiddenRing | None
    states: dict[int, Tensor] = field(default_factory=dict)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def ids(self) -> Tensor:
        """The tokens (B, q).

        Raises:
            InvalidKnob: the model was given embeddings.
        """
        if self.tokens is None:
            raise InvalidKnob("this policy looks at tokens: give input_ids, not inputs_embeds")
        return self.tokens

    @property
    def at(self) -> Tensor:
        """Places of the new tokens in their texts (B, q), from 0; -1 is padding."""
        return self.seen_at[:, -self.n_new :]

    @property
    def n_tokens(self) -> Tensor:
        """Tokens of each text up to now, without padding (B,)."""
        return self.seen_at.amax(1) + 1

    @cached_property
    def surprisal(self) -> Tensor:
        """-log p of each token after those before it (B, q), in nats; 0 for the first of a text."""
        assert self.memory is not None
        _output_layer(self.host)
        before = torch.cat([self.memory.last, self.hidden[:, :-1]], 1)
        found = torch.empty(self.ids.shape, device=self.ids.device)
        for first in range(0, self.n_new, _LOGIT_ROWS):
            rows = slice(first, first + _LOGIT_ROWS)
            logits = self.host.head(before[:, rows]).float()
            found[:, rows] = (
                logits.logsumexp(-1) - logits.gather(2, self.ids[:, rows, None])[..., 0]
            )
        return found.masked_fill(self.at <= 0, 0.0)


class Edit:
    """One layer during a forward pass.

    Attributes:
        layer: which layer of the model, from 0.
        n_layers: layers of the model.
        states: what is edited, (B, q, D): the hidden states that enter the layer, or what its
            attention adds to them.
    """

    def __init__(self, passed: Pass, layer: int, states: Tensor) -> None:
        self._pass, self.layer, self.states = passed, layer, states
        self.n_layers = len(passed.host.shape.layer_types)

    @property
    def ids(self) -> Tensor:
        """Tokens of the pass (B, q)."""
        return self._pass.ids

    @property
    def at(self) -> Tensor:
        """Places of the tokens in their texts (B, q), from 0; -1 is padding."""
        return self._pass.at

    @property
    def n_past(self) -> int:
        """Tokens before this pass, padding included; 0 in the pass that begins a text."""
        return self._pass.n_past

    @property
    def n_tokens(self) -> Tensor:
        """Tokens of each text up to now (B,)."""
        return self._pass.n_tokens

    @property
    def memory(self) -> HiddenRing:
        """What is held of earlier passes, where the policy names layers of a memory."""
        assert self._pass.memory is not None
        return self._pass.memory

    def unembed(self, ids: Tensor) -> Tensor:
        """Rows of the output layer (..., D), in the scale of the model's embeddings."""
        model = self._pass.host.model
        weight: Tensor = _output_layer(self._pass.host).weight
        scale = getattr(model.get_input_embeddings(), "embed_scale", 1.0)
        return weight[ids] * torch.as_tensor(scale, dtype=weight.dtype, device=weight.device)


class Rows(Edit):
    """Attention of some queries in one layer; probabilities exist only if they are asked for.

    Args:
        passed: the forward pass.
        layer: which layer.
        rows: which of its tokens.
        query: (B, Hq, r, D'), turned.
        keys: (B, H, n, D').
        mask: (B, 1, r, n), what is added to the logits; 0 is seen.
        scale: of the logits.
    """

    def __init__(
        self, passed: Pass, layer: int, rows: slice, query: Tensor, keys: Tensor, mask: Tensor,
        scale: float,
    ) -> None:  # fmt: skip
        super().__init__(passed, layer, query)
        self._rows, self._query, self._keys, self._mask, self._scale = (
            rows,
            query,
            keys,
            mask,
            scale,
        )

    @property
    def at(self) -> Tensor:
        """Places of the queries in their texts (B, r)."""
        return self._pass.at[:, self._rows]

    @property
    def keys_at(self) -> Tensor:
        """Places of the keys in their texts (B, n)."""
        return self._pass.seen_at[:, -self._keys.shape[2] :]

    @property
    def seen(self) -> Tensor:
        """Which keys a query may see (B, 1, r, n), bool."""
        return self._mask == 0

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities (B, Hq, r, n), float32 at least."""
        logits = products(self._query, self._keys).flatten(1, 2).mul_(self._scale) + self._mask
        return logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class EditPolicy:
    """What is changed while a model runs; only the hooks that a policy overrides cost anything."""

    card: ClassVar[Card]

    def layers(self, n_layers: int) -> Sequence[int]:
        """Layers at which the hooks are asked."""
        return range(n_layers)

    def memory_layers(self, n_layers: int) -> Sequence[int]:
        """Layers of which hidden states are remembered; with any, `edited` needs a budget."""
        return ()

    def edit_probs(self, rows: Rows) -> Tensor | None:
        """Attention (B, Hq, r, n) in place of `rows.probs`, for some queries at a time."""
        return None

    def edit_output(self, edit: Edit) -> Tensor | None:
        """What attention adds to the hidden states (B, q, D), in place of `edit.states`."""
        return None

    def edit_hidden(self, edit: Edit) -> Tensor | None:
        """Hidden states that enter the layer (B, q, D), in place of `edit.states`."""
        return None

    def remember(self, passed: Pass) -> Tensor:
        """Which tokens of a pass that is over are remembered (B, q), bool."""
        raise NotImplementedError


def _output_layer(host: Host) -> Any:
    """The layer that makes logits of hidden states.

    Raises:
        UnsupportedModel: the model is a decoder alone.
    """
    layer = host.model.get_output_embeddings()
    if layer is None:
        raise UnsupportedModel(
            f"{type(host.model).__name__} has no output layer, which this policy looks at: give "
            "the causal language model"
        )
    return layer
