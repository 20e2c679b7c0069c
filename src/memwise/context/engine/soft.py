"""Memory that is learned: a model writes what it reads into a few slots, and only they stay.

A compressor holds a model and whatever is trained for compressing. It makes of a text a cache of
soft slots, with which `generate` goes on; what the text's own tokens left is dropped.

Shapes: B batch, H key-value heads, M slots, q new tokens, D width of a head, d of hidden states,
V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from memwise.catalogue import Card
from memwise.context.engine.attention import NAME, causal
from memwise.context.engine.host import Host
from memwise.context.engine.plan import FULL
from memwise.errors import InvalidKnob, StoreCorrupt, UnsupportedModel

Tensor: TypeAlias = torch.Tensor

_FORMAT = "memwise.soft/1"
_MASKED = ("eager", "sdpa", NAME)  # attention functions that look at a mask of pairs
MEMORY, REPEAT = 0, 1  # marks: "hold what was read", "write it out"


@dataclass(frozen=True)
class SoftPolicy:
    """What a text becomes. A policy holds knobs, and its call builds the compressor of a model."""

    card: ClassVar[Card]

    @property
    def n_segment(self) -> int:
        """Tokens that are compressed at once."""
        raise NotImplementedError

    @property
    def n_slots(self) -> int:
        """Slots that they become."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, seed: int = 0) -> Compressor:
        """Build a compressor around a model, to be trained.

        Args:
            model: decoder-only, with rotary positions and full attention in every layer.
            seed: of the initial marks.

        Raises:
            UnsupportedModel: a model of another kind.
        """
        raise NotImplementedError

    def _positive(self, **knobs: int) -> None:
        for name, value in knobs.items():
            if value < 1:
                raise InvalidKnob(f"{name}={value} must be 1 or more")


class SoftLayer(DynamicLayer):
    """Slots of one layer, some of which stand for tokens that are gone.

    Attributes:
        n_gone: positions that were taken, less the slots that are held.
    """

    is_croppable = False
    keys: Any  # (B, H, M, D), once there are slots
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.n_gone = 0

    @property
    def n_held(self) -> int:
        """Slots."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        """Positions taken: the next token's, whatever is still held."""
        return self.n_held + self.n_gone

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask has, and the position of the first."""
        return self.n_held + query_length, self.n_gone

    def keep(self, slots: Tensor, n_positions: int) -> None:
        """Hold these slots (M,) and no others, as if so many positions were taken."""
        self.keys, self.values = self.keys[:, :, slots], self.values[:, :, slots]
        self.n_gone = n_positions - len(slots)

    def reset(self) -> None:
        """Forget all."""
        super().reset()
        self.n_gone = 0


class SoftCache(Cache):
    """What a text became; for `generate(past_key_values=...)` and for a plain call.

    It grows by the tokens that follow, which are held as they are. The attention mask must not
    hide anything: give none, or one without padding.

    Args:
        n_layers: of the model.
    """

    layers: Any  # a list of SoftLayer

    def __init__(self, n_layers: int) -> None:
        super().__init__(layers=[SoftLayer() for _ in range(n_layers)])

    @property
    def n_held(self) -> int:
        """Slots of a layer."""
        n: int = self.layers[0].n_held
        return n

    @property
    def n_bytes(self) -> int:
        """Bytes of all keys and values, from their storages."""
        found = [t for layer in self.layers if layer.n_held for t in (layer.keys, layer.values)]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in found}.values())

    def keep(self, slots: Tensor, n_positions: int) -> None:
        """In every layer, hold these slots (M,) alone, as if so many positions were taken."""
        for layer in self.layers:
            layer.keep(slots, n_positions)

    def part(self, first: int, last: int, n_positions: int) -> SoftCache:
        """A cache of some slots, as if so many positions were taken; this one stays as it is."""
        other = SoftCache(len(self.layers))
        for own, new in zip(self.layers, other.layers, strict=True):
            new.lazy_initialization(own.keys, own.values)
            new.keys, new.values = own.keys[:, :, first:last], own.values[:, :, first:last]
            new.n_gone = n_positions - (last - first)
        return other

    def prompt(self, ids: Tensor) -> Tensor:
        """What `generate` is given: ids (B, q) behind a filler for each position that is taken.

        `generate` wants all tokens of a text, and cuts off as many as the cache has seen. Fillers
        are a token of the prompt, as it takes a padding token for something to be hidden.
        """
        return torch.cat([ids[:, :1].expand(-1, self.get_seq_length()), ids], 1)


class Compressor(nn.Module):
    """A model, and what is trained so that it compresses.

    What is trained is what requires gradients: `trained()`.

    Args:
        policy: the knobs.
        model: decoder-only, with rotary positions and full attention in every layer.
        seed: of the initial marks.

    Attributes:
        marks: (2, d), embeddings that stand in no vocabulary: `MEMORY` and `REPEAT`.

    Raises:
        UnsupportedModel: a model of another kind.
    """

    def __init__(self, policy: SoftPolicy, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.policy, self.host = policy, Host(model)
        self.model: Any = model
        if set(self.host.shape.layer_types) != {FULL}:
            raise UnsupportedModel(
                f"{type(model).__name__} has sliding layers, which would still see the tokens that "
                "are compressed; take a model with full attention in every layer, such as Llama"
            )
        if (how := self.host.model.config._attn_implementation) not in _MASKED:
            raise UnsupportedModel(
                f"attention by {how!r} looks at no mask of pairs: load the model with "
                "attn_implementation='sdpa'"
            )
        words: Tensor = self.host.model.get_input_embeddings().weight
        draws = torch.Generator().manual_seed(seed)
        drawn = torch.randn(2, words.shape[1], generator=draws) * float(words.detach().std())
        self.marks = nn.Parameter(drawn.to(words))

    def trained(self) -> dict[str, nn.Parameter]:
        """What an optimizer is to be given, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def extra_bytes(self) -> int:
        """Bytes of the weights that compressing needs beside the model's own."""
        own = {p.data_ptr() for p in self.model.parameters()}
        added = [p for p in self.parameters() if p.data_ptr() not in own]
        return sum(p.untyped_storage().nbytes() for p in added)

    @torch.no_grad()
    def compress(self, ids: Tensor) -> SoftCache:
        """What a text (B, n) becomes, to go on with; nothing is kept for gradients.

        Raises:
            InvalidKnob: there is no text.
        """
        if not ids.shape[1]:
            raise InvalidKnob("a text of 0 tokens: there is nothing to compress")
        return self.learnt(ids)

    def learnt(self, ids: Tensor) -> SoftCache:
        """The same with gradients; tokens after the last whole segment are held as they are."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """What training minimises, for texts (B, n) of whole segments; in nat a token."""
        raise NotImplementedError

    def spell(self, cache: SoftCache, ids: Tensor, at: Tensor) -> Tensor:
        """Logits (B, q, V) of tokens that are written from memory, each after the true ones.

        Args:
            cache: the memory; what is written stays in it.
            ids: the tokens (B, q).
            at: their positions (q,).
        """
        words = self.embed(ids[:, :-1])
        start = self.marks[REPEAT].expand(len(ids), 1, -1)
        return self.run(torch.cat([start, words], 1), at, cache)

    @torch.no_grad()
    def write(self, cache: SoftCache, at: Tensor) -> Tensor:
        """Tokens (B, q) that the model writes from memory on its own, the likeliest each time.

        Args:
            cache: the memory; what is written stays in it.
            at: positions (q,) of what is written.
        """
        n_rows = len(cache.layers[0].keys)
        new = self.marks[REPEAT].expand(n_rows, 1, -1)
        found = []
        for place in at.split(1):
            found.append(self.run(new, place, cache)[:, -1].argmax(-1, keepdim=True))
            new = self.embed(found[-1])
        return torch.cat(found, 1)

    def save(self, path: str | PathLike[str]) -> None:
        """Write what was trained, for `load`; the file appears when it is whole."""
        path = Path(path)
        tensors = {name: p.detach().contiguous() for name, p in self.trained().items()}
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, {"format": _FORMAT, "policy": repr(self.policy)})
        os.replace(part, path)

    @torch.no_grad()
    def load(self, path: str | PathLike[str]) -> None:
        """Be as trained as the compressor that was saved; nothing has changed where it raises.

        Raises:
            InvalidKnob: it was of another policy, or around a model of another shape.
            StoreCorrupt: the file is not one of these.
        """
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise StoreCorrupt(f"{path} is no saved compressor: {error}") from error
        if meta.get("format") != _FORMAT:
            raise StoreCorrupt(f"{path} is no saved compressor: it does not say {_FORMAT!r}")
        if meta["policy"] != repr(self.policy):
            raise InvalidKnob(f"{path} was saved of {meta['policy']}; this is {self.policy!r}")
        own = self.trained()
        if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in own.items()}:
            raise InvalidKnob(f"{path} was saved around a model of another shape")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    # --- what compressors are made of

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (B, q, d)."""
        words: Tensor = self.model.get_input_embeddings()(ids)
        return words

    def run(
        self, words: Tensor, at: Tensor, cache: SoftCache | None, sees: Tensor | None = None
    ) -> Tensor:
        """Logits (B, q, V) of one pass through the model.

        Args:
            words: embeddings (B, q, d).
            at: positions (q,).
            cache: that it sees and writes to.
            sees: (q, n), which slots each sees, those of this pass included; None = all that came
                before.
        """
        if sees is None:
            sees = causal(cache.n_held if cache else 0, words.shape[1], words.device)
        # The model's own is wrong where slots are there and no position is taken.
        mask = words.new_zeros(sees.shape).masked_fill(~sees, torch.finfo(words.dtype).min)
        mask = mask.expand(len(words), 1, -1, -1)
        logits: Tensor = self.model(
            inputs_embeds=words, attention_mask=mask, position_ids=at.expand(len(words), -1),
            past_key_values=cache, use_cache=cache is not None,
        ).logits  # fmt: skip
        return logits

    def check_whole(self, ids: Tensor, step: int) -> None:
        """Refuse texts (B, n) that are no segments of so many tokens.

        Raises:
            InvalidKnob: a part of one is left over.
        """
        if ids.shape[1] == 0 or ids.shape[1] % step:
            raise InvalidKnob(
                f"{ids.shape[1]} tokens are no whole segments of {step}: cut the text"
            )


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean nat of tokens (B, q) under logits (B, q, V)."""
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())
