"""A model while it is edited: a policy changes attention, its output or hidden states as they pass.

For the time of `with edited(...)` hooks stand at the layers, and, where a policy edits
probabilities, the model's attention is ours: it shows them to the policy a few queries at a time.
Caches, `generate()`, padding and batches work as always.

Shapes: B batch, Hq query heads, H key-value heads, q tokens, n keys, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from memwise.budget import BudgetLike
from memwise.context.engine.attention import attend
from memwise.context.engine.edit import Edit, EditPolicy, Pass, Rows
from memwise.context.engine.host import Host
from memwise.context.engine.ring import HiddenRing
from memwise.context.engine.store import EMPTY
from memwise.errors import InvalidKnob, UnsupportedModel

Tensor: TypeAlias = torch.Tensor

NAME = "memwise_edited"
_ROWS = 64  # queries of which probabilities exist at once


@contextmanager
def edited(
    model: nn.Module, policy: EditPolicy, *, budget: BudgetLike | None = None,
    memory: HiddenRing | None = None,
) -> Iterator[Editor]:  # fmt: skip
    """Run a Hugging Face model with a policy's changes; it is as it was, afterwards.

    What is remembered follows the rows of a batch: reset it before other texts. Beam search, which
    moves rows, is not followed. A bounded cache can be used inside, as in
    `with edited(...), bounded(...) as cache`, except by policies that edit probabilities.

    Args:
        model: decoder-only, with rotary positions; full and sliding attention layers.
        policy: what is changed, e.g. `MemoryInjections(...)`.
        budget: bytes of what the policy remembers, where it remembers anything.
        memory: goes on with what an earlier editor remembered, in place of `budget`.

    Yields:
        The editor; `editor.memory` holds what is remembered, and `editor.memory.reset()` forgets.

    Raises:
        UnsupportedModel: a model of another kind.
        InvalidKnob: a memory without a budget, or a budget without a memory; or the model is
            bounded already.
    """
    editor = Editor(model, policy, budget, memory)
    with editor.installed():
        yield editor


class Editor:
    """A policy at work on a model; see `edited`.

    Attributes:
        policy: what is changed.
        memory: what is remembered; None where the policy remembers nothing.
    """

    def __init__(
        self, model: nn.Module, policy: EditPolicy, budget: BudgetLike | None,
        memory: HiddenRing | None,
    ) -> None:  # fmt: skip
        self.host, self.policy = Host(model), policy
        self._blocks: Any = self.host.decoder.layers
        self._layers = frozenset(policy.layers(len(self._blocks)))
        self._forward: Callable[..., Any] = self.host.decoder.forward
        if isinstance(getattr(self._forward, "__self__", None), Host):
            raise InvalidKnob(
                "the model is bounded already: write `with edited(...), bounded(...) as cache`"
            )
        self._edits_probs = self._overrides("edit_probs")
        self.memory = self._memory(budget, memory)
        self._now: Pass | None = None

    def _overrides(self, hook: str) -> bool:
        return getattr(type(self.policy), hook) is not getattr(EditPolicy, hook)

    def _memory(self, budget: BudgetLike | None, memory: HiddenRing | None) -> HiddenRing | None:
        layers = tuple(self.policy.memory_layers(len(self._blocks)))
        name = type(self.policy).__name__
        if not layers:
            if budget is None and memory is None:
                return None
            raise InvalidKnob(f"{name} remembers nothing: leave budget= and memory= out")
        if (budget is None) == (memory is None):
            raise InvalidKnob(f"{name} remembers: give budget=, or memory= of an earlier editor")
        weight = self.host.model.get_input_embeddings().weight
        width = self.host.decoder.config.hidden_size
        if budget is not None:
            return HiddenRing(layers, width, budget, weight.dtype, weight.device)
        assert memory is not None
        if (memory.layers, memory.width) != (layers, width):
            raise InvalidKnob(
                f"the memory is of layers {memory.layers} and width {memory.width}; {name} on this "
                f"model wants layers {layers} and width {width}"
            )
        return memory

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the model ask the policy; as it was, afterwards."""
        decoder, model = self.host.decoder, self.host.model
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                if self._overrides("edit_hidden") or self.memory is not None:
                    hook = self._hidden_hook(index)
                    stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
                if self._overrides("edit_output") and index in self._layers:
                    site = _adds_attention(block)
                    stack.callback(site.register_forward_hook(self._output_hook(index)).remove)
            if self._edits_probs:
                stack.callback(model.set_attn_implementation, model.config._attn_implementation)
                model.set_attn_implementation(NAME)
            stack.callback(_restore, decoder, vars(decoder).get("forward"))
            self._forward, decoder.forward = decoder.forward, self.forward
            yield

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Any = None,
        position_ids: Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """The decoder's forward pass, with the policy's changes."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise InvalidKnob("give input_ids or inputs_embeds")
        bounded = kwargs.get("memwise")
        n_past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        at = _places(attention_mask, given, n_past) if bounded is None else bounded.slots_at
        passed = Pass(self.host, input_ids, at, given.shape[1], n_past, self.memory)
        if self.memory is not None:
            self.memory.open(given.shape[0])
        if self._edits_probs:
            self._check_attention(kwargs)
            kwargs["memwise_edit"] = (self, passed)
        self._now = passed
        try:
            out = self._forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs,
            )  # fmt: skip
        finally:
            self._now = None
        if self.memory is not None and not (bounded is not None and bounded.is_probe):
            self._remember(self.memory, passed, out.last_hidden_state)
        return out

    @torch.no_grad()
    def _remember(self, memory: HiddenRing, passed: Pass, hidden: Tensor) -> None:
        passed.hidden = hidden
        chosen = self.policy.remember(passed) & (passed.at != EMPTY)
        memory.write(chosen, passed.states, passed.at)
        memory.end(hidden)

    def _check_attention(self, kwargs: dict[str, Any]) -> None:
        name = type(self.policy).__name__
        if "memwise_edit" in kwargs:
            raise InvalidKnob(f"{name} edits probabilities that another policy edits already")
        if self.host.model.config._attn_implementation != NAME:
            raise InvalidKnob(
                f"{name} edits probabilities, and the model's attention is not the editor's: leave "
                "bounded() or set_attn_implementation() out meanwhile"
            )

    def _hidden_hook(self, layer: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._now is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.memory is not None and layer in self.memory.layers:
                self._now.states[layer] = hidden.detach()
            if layer not in self._layers:
                return None
            new = self.policy.edit_hidden(Edit(self._now, layer, hidden))
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return hook

    def _output_hook(self, layer: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            if self._now is None:
                return None
            states = out[0] if isinstance(out, tuple) else out
            new = self.policy.edit_output(Edit(self._now, layer, states))
            if new is None:
                return None
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return hook

    def attend(
        self, passed: Pass, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Attention (B, Hq, q, D) of one layer, through the policy."""
        if layer not in self._layers:
            return attend(query, key, value, mask, scale)
        if key.shape[2] > passed.seen_at.shape[1]:
            raise InvalidKnob("the cache has places for tokens to come: use a DynamicCache")
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        for first in range(0, query.shape[2], _ROWS):
            some = slice(first, first + _ROWS)
            rows = Rows(passed, layer, some, query[:, :, some], key, mask[:, :, some], scale)
            probs = self.policy.edit_probs(rows)
            if probs is None:
                out[:, :, some] = attend(query[:, :, some], key, value, mask[:, :, some], scale)
                continue
            n_rows, n_heads, n_new, n_keys = probs.shape
            folded = probs.to(value.dtype).reshape(n_rows, key.shape[1], -1, n_keys)
            out[:, :, some] = (folded @ value).view(n_rows, n_heads, n_new, -1)
        return out


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None,
    memwise_edit: tuple[Editor, Pass] | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend as a policy says; outside of an edited pass, as transformers' `sdpa` does.

    Args:
        module: the attention module that calls.
        query: (B, Hq, q, D), turned to its positions.
        key: (B, H, n, D).
        value: (B, H, n, Dv).
        attention_mask: (B, 1, q, n), added to the logits.
        dropout: of the probabilities; refused in an edited pass.
        scaling: of the logits; None = D^-1/2.
        memwise_edit: the editor, and the forward pass.
        softcap: of the logits; refused.
        s_aux: learned sinks; refused.
        **kwargs: of the model, for passes that are not edited.
    """
    if softcap is not None or s_aux is not None:
        raise UnsupportedModel("logits that are capped, or sinks that are learned, are not known")
    if memwise_edit is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    if attention_mask is None:
        raise UnsupportedModel(f"{type(module).__name__} makes no mask: it is no causal decoder")
    if dropout:
        raise InvalidKnob("probabilities are edited without dropout: call model.eval()")
    editor, passed = memwise_edit
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = editor.attend(passed, module.layer_idx, query, key, value, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None


# The mask is always made: nothing is left to the guess of a kernel.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)


def _places(mask: Any, given: Tensor, n_past: int) -> Tensor:
    """Places of all tokens in their texts (B, seen + q), counted without padding; -1 is padding."""
    batch, n_all = given.shape[0], n_past + given.shape[1]
    if mask is None:
        return torch.arange(n_all, device=given.device).expand(batch, -1)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] != n_all:
        raise InvalidKnob(
            f"an edited model wants attention_mask of shape (batch, {n_all}), for all tokens so "
            "far, or none"
        )
    own = mask.bool()
    return (own.cumsum(1) - 1).masked_fill(~own, EMPTY)


def _adds_attention(block: Any) -> nn.Module:
    """The module whose output is what attention adds to the hidden states.

    Where a norm follows the feed-forward part (Gemma), one also follows attention.
    """
    has_after = hasattr(block, "post_feedforward_layernorm")
    site = getattr(block, "post_attention_layernorm" if has_after else "self_attn", None)
    if site is None:
        raise UnsupportedModel(f"{type(block).__name__} has no self_attn that is known")
    found: nn.Module = site
    return found


def _restore(decoder: Any, own: Any) -> None:
    if own is None:
        del decoder.forward
    else:
        decoder.forward = own
