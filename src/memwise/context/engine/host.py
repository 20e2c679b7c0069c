"""A model while it is bounded: long inputs go through it in chunks, into slots that do not grow.

For the time of `with bounded(...)` the model's attention is ours, and the forward pass of its
decoder cuts what it is given into chunks and lets the policy choose before the slots are full. So
`generate()`, a plain call and scoring a long text all stay inside the budget. Other caches, and
none, work as always meanwhile.

Shapes: B batch, q tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn

from memwise.budget import Budget, BudgetLike
from memwise.codec.spec import Spec, parse
from memwise.context.engine.attention import NAME
from memwise.context.engine.cache import BudgetedCache, Forward
from memwise.context.engine.plan import FULL, SLIDING, Allocator, Shape, Uniform, budget_for
from memwise.context.engine.policy import CachePolicy
from memwise.context.engine.rotary import Rotary
from memwise.context.engine.store import EMPTY
from memwise.errors import InvalidKnob, UnsupportedModel

Tensor: TypeAlias = torch.Tensor

CHUNK = 128  # tokens: more is hardly faster, and costs room in every layer
_ANY = (1, 1, 1, 1)  # a mask of this rank is handed through untouched, and ours does not look at it


@contextmanager
def bounded(
    model: nn.Module, policy: CachePolicy, budget: BudgetLike, *, chunk: int = CHUNK,
    question: Sequence[int] = (), allocator: Allocator | None = None, codec: str | None = None,
) -> Iterator[BudgetedCache]:  # fmt: skip
    """Run a Hugging Face model with a KV cache of so many bytes and no more, at any moment.

    Args:
        model: decoder-only, with rotary positions; full and sliding attention layers.
        policy: which tokens stay in the full-attention layers, e.g. `InfiniPot()`.
        budget: bytes for keys, values, positions, what the policy notes, and the chunk's own.
        chunk: most tokens that go through the model at once; smaller chunks leave more slots.
        question: tokens that will be asked for. The text is then compressed in their light, by
            policies that look at attention.
        allocator: how slots are shared among layers; all have the same number if not given.
        codec: that keys and values are held in once they are a chunk old, for example
            `int8/group64` or `int4/group32`; a budget then holds more slots.

    Yields:
        The cache, for `model.generate(..., past_key_values=cache)` or `model(...)`.

    Raises:
        UnsupportedModel: a model of another kind.
        BudgetExceeded: not even the least that the policy needs fits.
        InvalidKnob: a chunk below 1.
    """
    host = Host(model, codec)
    probe = host.probe(policy, question)
    cache = host.cache(policy, Budget(budget), chunk, probe, allocator or Uniform())
    with host.installed():
        yield cache


def bytes_for(
    model: nn.Module, policy: CachePolicy, n_slots: int, *, chunk: int = CHUNK, batch: int = 1,
    question: Sequence[int] = (), codec: str | None = None,
) -> Budget:  # fmt: skip
    """The budget that keeps so many slots in each full-attention layer of a model.

    Args:
        model: as for `bounded`.
        policy: the same that will be used.
        n_slots: tokens that stay when some have to go.
        chunk: as for `bounded`.
        batch: rows at once.
        question: as for `bounded`.
        codec: as for `bounded`.
    """
    host = Host(model, codec)
    n_probe = len(host.probe(policy, question))
    return budget_for(host.shape, policy, n_slots, chunk, n_probe, batch)


class Host:
    """What the engine needs of a model.

    Args:
        model: as for `bounded`.
        codec: of keys and values.
    """

    def __init__(self, model: nn.Module, codec: str | None = None) -> None:
        # Of transformers' own making: what torch knows of a module says too little.
        self.model: Any = model
        self.decoder: Any = decoder_of(model)
        self.rotary = Rotary(self.decoder)
        self.shape = replace(_shape(self.decoder), codec=codec)
        if codec is not None:
            _check_codec(parse(codec), self.shape.width)
        self._forward: Callable[..., Any] = self.decoder.forward

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (B, q, V) of hidden states."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def probe(self, policy: CachePolicy, question: Sequence[int]) -> tuple[int, ...]:
        """What the model is shown before slots are chosen."""
        if len(question) and policy.window:
            return tuple(int(token) for token in question)
        return policy.probe(self.decoder.config.vocab_size)

    def cache(
        self, policy: CachePolicy, budget: Budget, chunk: int, probe: tuple[int, ...],
        allocator: Allocator,
    ) -> BudgetedCache:  # fmt: skip
        """An empty cache for this model."""
        if chunk < 1:
            raise InvalidKnob(f"chunk={chunk}: at least one token has to go through the model")
        if policy.raw_keys:
            self.rotary.check(FULL, self.shape.width)
        merges = policy.raw_keys or type(policy).merge is not CachePolicy.merge
        if self.shape.codec and merges:
            raise InvalidKnob(
                f"{type(policy).__name__} merges or moves keys, which codec={self.shape.codec!r} "
                "would round again each time: leave codec= out"
            )
        if policy.needs_text and self.model.get_output_embeddings() is None:
            raise UnsupportedModel(
                f"{type(policy).__name__} asks how likely tokens are; {type(self.model).__name__} "
                "has no output layer: give the causal language model"
            )
        return BudgetedCache(self, policy, budget, chunk, probe, allocator)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the model use our attention and our forward pass; as it was, afterwards."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        own = vars(self.decoder).get("forward")
        self._forward = self.decoder.forward
        self.decoder.forward = self.forward
        try:
            yield
        finally:
            if own is None:
                del self.decoder.forward
            else:
                self.decoder.forward = own
            self.model.set_attn_implementation(before)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """The decoder's forward pass, in chunks where the cache is one of ours."""
        cache = past_key_values
        if not isinstance(cache, BudgetedCache) or cache.host is not self:
            return self._forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=cache, inputs_embeds=inputs_embeds, **kwargs,
            )  # fmt: skip
        if input_ids is None:
            raise InvalidKnob(
                "a bounded cache needs input_ids: what became of a token cannot be told without"
            )
        batch, n_tokens = input_ids.shape
        cache.open(batch)
        if position_ids is None:
            position_ids = cache.n_seen + torch.arange(n_tokens, device=input_ids.device)[None]
        positions = position_ids.expand(batch, -1)
        self._check_length(cache, n_tokens)
        slots_at = _without_padding(positions, attention_mask, cache.n_seen)
        new_turn = cache.begins_turn(n_tokens)
        outs = []
        for first in range(0, n_tokens, cache.chunk):
            some = slice(first, first + cache.chunk)
            part = Forward(cache, input_ids[:, some], positions[:, some], slots_at[:, some])
            part.new_turn = new_turn and first == 0
            if cache.must_choose(part.ids.shape[1]):
                self.choose(cache)
            out = self._run(part, **kwargs)
            cache.end(part, out.last_hidden_state)
            outs.append(out)
        return _joined(outs)

    def _check_length(self, cache: BudgetedCache, n_tokens: int) -> None:
        most = getattr(self.decoder.config, "max_position_embeddings", None)
        if most and cache.n_seen + n_tokens > most and not cache.policy.any_length:
            raise InvalidKnob(
                f"{cache.n_seen + n_tokens} tokens, and {type(self.model).__name__} was made for "
                f"{most}: shorten the text, or choose a policy that reaches further, such as "
                "LMInfinite"
            )

    @torch.no_grad()
    def choose(self, cache: BudgetedCache) -> None:
        """Let the policy choose slots, after the probe has gone through the model."""
        probed = None
        if cache.probe:
            ids = torch.tensor([cache.probe], device=self.device).expand(cache.batch, -1)
            at = cache.next_positions(len(cache.probe), self.device)
            probed = Forward(cache, ids, at, at, is_probe=True)
            self._run(probed)
        cache.choose(probed)

    def _run(self, part: Forward, **kwargs: Any) -> Any:
        cache = part.cache
        cache.forward = part
        try:
            return self._forward(
                input_ids=part.ids, attention_mask=part.ids.new_empty(_ANY),
                position_ids=part.positions, past_key_values=cache, memwise=part, **kwargs,
            )  # fmt: skip
        finally:
            cache.forward = None


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a Hugging Face model that holds its layers.

    Raises:
        UnsupportedModel: it is no decoder-only model with a list of layers.
    """
    config = getattr(model, "config", None)
    find = getattr(model, "get_decoder", None)
    if config is None or find is None or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(model).__name__} is no decoder-only Hugging Face model; memwise.context works "
            "on such models with RoPE, for example Llama, Qwen, Mistral and Gemma"
        )
    decoder = find() or model
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise UnsupportedModel(f"{type(decoder).__name__} has no list of decoder layers")
    return decoder


def _shape(decoder: nn.Module) -> Shape:
    config: Any = decoder.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [SLIDING if window else FULL] * config.num_hidden_layers
    if unknown := sorted(set(kinds) - {FULL, SLIDING}):
        raise UnsupportedModel(
            f"{type(decoder).__name__} has layers of the kinds {unknown}; "
            "full and sliding attention are known"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModel(f"{type(decoder).__name__} caps its attention logits (Gemma 2)")
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModel(f"layers of {type(decoder).__name__} share keys and values")
    if FULL not in kinds:
        raise UnsupportedModel(
            f"all layers of {type(decoder).__name__} slide: their cache is bounded anyway"
        )
    n_heads = config.num_attention_heads
    return Shape(
        layer_types=tuple(kinds),
        n_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        n_query_heads=n_heads,
        width=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        window=int(window or 0),
        itemsize=next(decoder.parameters()).dtype.itemsize,
    )


def _check_codec(spec: Spec, width: int) -> None:
    """Refuse codecs that cannot write one vector alone.

    Raises:
        InvalidKnob: it needs more than the vector.
    """
    alone = spec.scale.kind in ("none", "row", "group")
    fits = width % max(spec.scale.group, 1) == 0 and width * spec.grid.bits % 8 == 0
    plain = spec.packing.kind in ("dense", "byte") and spec.rounding.kind == "nearest"
    if not (alone and fits and plain):
        raise InvalidKnob(
            f"codec {spec.name!r} cannot hold vectors of {width} numbers one by one: name one with "
            f"factors by row or by groups that divide {width}, dense and rounded to nearest, such "
            "as int8/row or int4/group32"
        )


def _without_padding(positions: Tensor, mask: Any, n_seen: int) -> Tensor:
    """Positions (B, q), `EMPTY` where the mask says padding."""
    if mask is None:
        return positions
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise InvalidKnob("a bounded cache wants attention_mask of shape (batch, tokens), or none")
    if mask.shape[1] != n_seen + positions.shape[1]:
        raise InvalidKnob(
            f"attention_mask has {mask.shape[1]} columns; the cache has seen {n_seen} tokens and "
            f"{positions.shape[1]} are new: give a mask of all of them"
        )
    own = mask[:, n_seen:].bool()
    return positions if bool(own.all()) else positions.masked_fill(~own, EMPTY)


def _joined(outs: list[Any]) -> Any:
    """One output of the chunks' outputs."""
    whole = outs[-1]
    if len(outs) > 1:
        whole.last_hidden_state = torch.cat([out.last_hidden_state for out in outs], 1)
        if whole.get("hidden_states") is not None:
            layers = zip(*(out.hidden_states for out in outs), strict=True)
            whole.hidden_states = tuple(torch.cat(parts, 1) for parts in layers)
    return whole
