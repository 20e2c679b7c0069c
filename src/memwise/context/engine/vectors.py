"""Segments that an encoder turns into vectors, which a decoder sees as slots of its own.

The encoder is a copy of the decoder. It reads a segment with a mark behind each group of tokens;
what it makes of the marks is projected to keys and values of the decoder's layers. Segments are
read one after another and know nothing of each other; their slots stand side by side.

Shapes: B batch, n tokens of a segment, t groups of it, d of hidden states, H key-value heads,
D width of a head, V vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeAlias

import torch
from torch import nn

from memwise.context.engine.plan import FULL
from memwise.context.engine.rotary import turn
from memwise.context.engine.soft import (
    MEMORY,
    Compressor,
    SoftCache,
    SoftPolicy,
    cross_entropy,
)
from memwise.errors import InvalidKnob, UnsupportedModel

Tensor: TypeAlias = torch.Tensor


class VectorPolicy(SoftPolicy):
    """Which of the encoder's hidden states a layer of the decoder is given.

    Attributes:
        group: tokens that a vector stands for.
        segment: tokens that the encoder reads at once; whole groups.
        trains_decoder: whether the decoder learns together with the encoder.

    Raises:
        InvalidKnob: a knob below 1, or a segment that is no whole groups.
    """

    group: int
    segment: int
    trains_decoder: bool

    def __post_init__(self) -> None:
        self._positive(group=self.group, segment=self.segment)
        if self.segment % self.group:
            raise InvalidKnob(f"segment={self.segment} is no whole groups of {self.group} tokens")

    @property
    def n_segment(self) -> int:
        """Tokens that are compressed at once."""
        return self.segment

    @property
    def n_slots(self) -> int:
        """Slots that they become."""
        return self.segment // self.group

    def source(self, layer: int, n_layers: int) -> int:
        """The layer of the encoder, from 0, whose output the decoder's layer is given."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, seed: int = 0) -> VectorCompressor:
        """Build an encoder beside a model."""
        return VectorCompressor(self, model, seed)


class Projection(nn.Module):
    """Hidden states to keys and values of a layer; starts as the layer's own.

    Args:
        layer: of the decoder.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        own = layer.self_attn
        if hasattr(own, "k_norm") or not hasattr(own, "k_proj"):
            raise UnsupportedModel(
                f"{type(own).__name__} makes its keys in a way of its own; a plain k_proj and "
                "v_proj are known, as Llama, Mistral and Qwen2 have them"
            )
        self.norm = deepcopy(layer.input_layernorm)
        self.keys, self.values = deepcopy(own.k_proj), deepcopy(own.v_proj)
        self.requires_grad_()

    def forward(self, hidden: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Bare keys and values (B, H, t, D) of hidden states (B, t, d)."""
        normed = self.norm(hidden)
        keys, values = (
            part(normed).unflatten(-1, (-1, width)).transpose(1, 2)
            for part in (self.keys, self.values)
        )
        return keys, values


class VectorCompressor(Compressor):
    """An encoder beside the model, which is the decoder.

    Where the policy does not train the decoder, the gradients of the model are switched off.

    Args:
        policy: the knobs.
        model: the decoder.
        seed: of the initial marks.
    """

    policy: VectorPolicy

    def __init__(self, policy: VectorPolicy, model: nn.Module, seed: int) -> None:
        super().__init__(policy, model, seed)
        self.host.rotary.check(FULL, self.host.shape.width)
        self.encoder = deepcopy(self.host.decoder).requires_grad_()
        self.projections = nn.ModuleList(Projection(layer) for layer in self.host.decoder.layers)
        model.requires_grad_(policy.trains_decoder)

    def learnt(self, ids: Tensor) -> SoftCache:
        """What a text (B, n) becomes; tokens after the last whole group are held as they are."""
        cache = SoftCache(len(self.host.shape.layer_types))
        n_whole = ids.shape[1] - ids.shape[1] % self.policy.group
        for segment in ids[:, :n_whole].split(self.policy.n_segment, 1):
            self.read(cache, segment)
        if n_whole < ids.shape[1]:
            at = torch.arange(n_whole, ids.shape[1], device=ids.device)
            self.run(self.embed(ids[:, n_whole:]), at, cache)
        return cache

    def read(self, cache: SoftCache, ids: Tensor) -> None:
        """Put the slots of a segment (B, n) of whole groups behind those that are there."""
        n, first = ids.shape[1], cache.get_seq_length()
        ends = torch.arange(self.policy.group, n + 1, self.policy.group, device=ids.device) - 1
        shape = self.host.shape
        for index, hidden in enumerate(self.vectors(ids)):
            keys, values = self.projections[index](hidden, shape.width)
            cos, sin = self.host.rotary.table((first + ends)[None], FULL, keys)
            layer = cache.layers[index]
            layer.update(turn(keys, cos[:, None], sin[:, None]), values)
            layer.n_gone += n - len(ends)

    def vectors(self, ids: Tensor) -> list[Tensor]:
        """For each layer of the decoder, what the encoder made of a segment's marks (B, t, d)."""
        group = self.policy.group
        words = self.encoder.get_input_embeddings()(ids).unflatten(1, (-1, group))
        marks = self.marks[MEMORY].expand(*words.shape[:2], 1, -1)
        laid = torch.cat([words, marks], 2).flatten(1, 2)
        states = self.encoder(inputs_embeds=laid, output_hidden_states=True, use_cache=False)
        made = [state[:, group :: group + 1] for state in states.hidden_states[1:]]
        return [made[self.policy.source(i, len(made))] for i in range(len(made))]

    def forward(self, ids: Tensor) -> Tensor:
        """Nat a token of writing the text out again from its vectors alone."""
        self.check_whole(ids, self.policy.group)
        return self.answer_loss(self.learnt(ids), ids)

    def answer_loss(self, cache: SoftCache, ids: Tensor) -> Tensor:
        """Nat a token of tokens (B, q) that are to be written from memory.

        To let the model write out an instruction first that was compressed with the text, let the
        tokens be the instruction and its answer.
        """
        return cross_entropy(self.spell(cache, ids, self._next(cache, ids.shape[1])), ids)

    def answer(self, cache: SoftCache, n_tokens: int) -> Tensor:
        """So many tokens (B, q) as the model writes them from memory; they stay in the cache."""
        return self.write(cache, self._next(cache, n_tokens))

    @torch.no_grad()
    def repeat(self, cache: SoftCache) -> Tensor:
        """A text (B, n) of whole groups as the model writes it out of its slots."""
        n = cache.get_seq_length()
        if cache.n_held * self.policy.group != n:
            raise InvalidKnob(f"{n} tokens are not all in slots: repeat what was compressed alone")
        return self.answer(cache.part(0, cache.n_held, n), n)

    def _next(self, cache: SoftCache, n_tokens: int) -> Tensor:
        first = cache.get_seq_length()
        return torch.arange(first, first + n_tokens, device=self.host.device)
