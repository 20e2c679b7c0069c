"""Frames of a clip that are edited one by one, and look alike because all attend to a few anchors.

A diffusion model edits some frames together and leaves their keys and values behind, for each
self-attention and each step. Every other frame is then edited by itself and attends to [anchors;
itself]. What is held grows with the anchors and not with the clip, and the other frames may be
edited in any order, in any parts, on any machine that has the anchors.

Shapes: B frames at once, A anchors, T tokens of a frame, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from memwise.budget import Budget, BudgetLike, Ledger
from memwise.catalogue import Card
from memwise.context.engine.partial import attend, merge
from memwise.errors import InvalidKnob, UnsupportedModel

Tensor: TypeAlias = torch.Tensor
Sampler: TypeAlias = Callable[..., Tensor]
"""Edits frames: takes the inputs of some frames, frames first, and runs all steps of the model."""
Attention: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, queries, keys and values (B, H, T, D) to what they read (B, H, T, D)."""


class AnchorCache:
    """Keys and values of the anchors (1, H, A T, D), for each self-attention and step.

    Args:
        budget: bytes of all of them; None for no end.
    """

    def __init__(self, budget: BudgetLike | None = None) -> None:
        self._ledger = Ledger(None if budget is None else Budget(budget))
        self._pairs: list[list[tuple[Tensor, Tensor]]] = []

    @property
    def n_layers(self) -> int:
        """Self-attentions."""
        return len(self._pairs)

    @property
    def n_steps(self) -> int:
        """Steps, which are the same number in all layers; 0 while nothing is held."""
        return len(self._pairs[0]) if self._pairs else 0

    @property
    def n_bytes(self) -> int:
        """Bytes that are held."""
        pairs = (pair for steps in self._pairs for pair in steps)
        return sum(x.untyped_storage().nbytes() for pair in pairs for x in pair)

    def pair(self, layer: int, step: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer at a step.

        Raises:
            InvalidKnob: the anchors have not seen this step.
        """
        if layer >= self.n_layers or step >= len(self._pairs[layer]):
            raise InvalidKnob(
                f"step {step} of layer {layer}: the anchors have {self.n_steps} steps of "
                f"{self.n_layers} layers; edit all frames with the same model and steps"
            )
        return self._pairs[layer][step]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Copy keys and values (A, H, T, D) of a layer's next step, and return them as one row.

        Raises:
            BudgetExceeded: they do not fit; nothing has changed.
        """
        new_bytes = keys.numel() * keys.element_size() + values.numel() * values.element_size()
        self._ledger.set("device", "anchors", self.n_bytes + new_bytes)
        pair = _as_one_row(keys), _as_one_row(values)
        if layer == self.n_layers:
            self._pairs.append([])
        self._pairs[layer].append(pair)
        return pair


@contextmanager
def recorded(model: nn.Module, cache: AnchorCache) -> Iterator[None]:
    """Let each batch be the anchors: they attend to each other, and the cache gets what they are.

    Raises:
        BudgetExceeded: the cache is full; it is of no use then.
        InvalidKnob: the cache has anchors already.
        UnsupportedModel: see `followed`.
    """
    if cache.n_steps:
        raise InvalidKnob(f"a cache with {cache.n_steps} steps of anchors: give a new one")

    def attention(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        shared = cache.append(layer, keys, values)
        return attend(query, *shared, None, query.shape[-1] ** -0.5)[0]

    with _replaced(model, attention):
        yield


@contextmanager
def followed(model: nn.Module, cache: AnchorCache) -> Iterator[None]:
    """Let each frame attend to the anchors and itself, through all steps once.

    Raises:
        InvalidKnob: the model runs more or fewer steps than it did for the anchors.
        UnsupportedModel: no self-attention is an `nn.MultiheadAttention` with the batch first, or
            one has dropout, masks, or other keys than its inputs give.
    """
    steps = [0] * cache.n_layers

    def attention(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        pair = cache.pair(layer, steps[layer] if layer < len(steps) else 0)
        steps[layer] += 1
        scale = query.shape[-1] ** -0.5
        return merge([attend(query, *pair, None, scale), attend(query, keys, values, None, scale)])

    with _replaced(model, attention):
        yield
    if any(n != cache.n_steps for n in steps):
        raise InvalidKnob(
            f"{min(steps)} steps, and {cache.n_steps} of the anchors: edit all frames with as many"
        )


@torch.no_grad()
def hold(
    model: nn.Module, sample: Sampler, inputs: Sequence[Tensor], budget: BudgetLike | None = None
) -> tuple[Tensor, AnchorCache]:
    """Edit the anchors together.

    Args:
        model: the one that `sample` runs.
        sample: edits frames.
        inputs: what `sample` takes of the anchors, frames first.
        budget: bytes of the cache.

    Returns:
        The edited anchors, and what other frames follow.
    """
    cache = AnchorCache(budget)
    with recorded(model, cache):
        frames = sample(*inputs)
    return frames, cache


@torch.no_grad()
def follow(
    model: nn.Module, cache: AnchorCache, sample: Sampler, inputs: Sequence[Tensor],
    n_at_once: int = 1,
) -> Tensor:  # fmt: skip
    """Edit frames, each by itself beside the anchors; an empty cache has none.

    Args:
        model: the one that `sample` runs.
        cache: from `hold`; it is only read.
        sample: edits frames.
        inputs: what `sample` takes of the frames, frames first.
        n_at_once: frames in a batch. With 1 the output is the same to the last bit however a clip
            is split; a larger number is faster, and equal up to rounding.

    Raises:
        InvalidKnob: there are no frames, or `n_at_once` is below 1.
    """
    if n_at_once < 1 or not len(inputs[0]):
        raise InvalidKnob(f"n_at_once={n_at_once}, {len(inputs[0])} frames: give 1 or more of each")
    made = []
    for some in zip(*(x.split(n_at_once) for x in inputs), strict=True):
        with followed(model, cache) if cache.n_steps else nullcontext():
            made.append(sample(*some))
    return torch.cat(made)


@dataclass(frozen=True, eq=False)
class Edited:
    """A clip that was edited.

    Attributes:
        frames: in the order of the clip.
        anchors: places of the anchors.
        cache: what the other frames followed.
    """

    frames: Tensor
    anchors: tuple[int, ...]
    cache: AnchorCache


@dataclass(frozen=True)
class FramePolicy:
    """Which frames of a clip are anchors; its call edits a clip."""

    card: ClassVar[Card]

    def anchors(self, n_frames: int) -> tuple[int, ...]:
        """Places of the anchors in a clip, growing; none leaves every frame alone."""
        raise NotImplementedError

    def __call__(
        self, model: nn.Module, sample: Sampler, inputs: Sequence[Tensor],
        budget: BudgetLike | None = None, n_at_once: int = 1,
    ) -> Edited:  # fmt: skip
        """Edit the anchors of a clip, then its other frames.

        Args:
            model: denoiser whose self-attentions are `nn.MultiheadAttention`.
            sample: edits frames; it runs the model the same number of times whatever it is given.
            inputs: what `sample` takes, the clip's frames first: sources, noise.
            budget: bytes of the anchors' keys and values; None for no end.
            n_at_once: frames in a batch behind the anchors, see `follow`.

        Raises:
            BudgetExceeded: the anchors do not fit.
            InvalidKnob: there are no frames, or `n_at_once` is below 1.
            UnsupportedModel: see `followed`.
        """
        n_frames = len(inputs[0])
        places = self.anchors(n_frames)
        others = [place for place in range(n_frames) if place not in places]
        cache, parts = AnchorCache(budget), []
        if places:
            frames, cache = hold(model, sample, [x[list(places)] for x in inputs], budget)
            parts.append(frames)
        if others or not places:
            some = [x[others] for x in inputs]
            parts.append(follow(model, cache, sample, some, n_at_once))
        order = torch.tensor([*places, *others]).argsort()
        made = torch.cat(parts)
        return Edited(made[order.to(made.device)], places, cache)


@contextmanager
def _replaced(model: nn.Module, attention: Attention) -> Iterator[None]:
    """Let self-attentions, numbered by their first use, attend in another way."""
    found = [x for x in model.modules() if isinstance(x, nn.MultiheadAttention)]
    if not found:
        raise UnsupportedModel("this model has no nn.MultiheadAttention that frames could share")
    for module in found:
        _need_plain(module)
    selves: dict[nn.MultiheadAttention, int] = {}
    hooks = []
    try:
        for module in found:
            # A transformer layer of torch goes past its attention's forward unless that has a hook.
            hooks.append(module.register_forward_pre_hook(_nothing))
            module.forward = partial(_forward, module, module.forward, attention, selves)  # type: ignore[method-assign]
        yield
    finally:
        for module in found:
            module.__dict__.pop("forward", None)
        for hook in hooks:
            hook.remove()


def _forward(
    module: nn.MultiheadAttention, plain: Callable[..., tuple[Tensor, Tensor | None]],
    attention: Attention, selves: dict[nn.MultiheadAttention, int],
    query: Tensor, key: Tensor, value: Tensor,
    key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """In place of a module's forward; attention to anything but the queries stays as it was."""
    if not query is key is value:
        return plain(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
            is_causal,
        )  # fmt: skip
    if key_padding_mask is not None or attn_mask is not None or is_causal:
        raise UnsupportedModel("a self-attention has a mask; frames share those that see all")
    layer = selves.setdefault(module, len(selves))
    joined = F.linear(query, module.in_proj_weight, module.in_proj_bias)  # (B, T, 3 H D)
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in joined.chunk(3, -1))
    read = attention(layer, q, k, v).transpose(1, 2).flatten(2)
    return module.out_proj(read.to(query.dtype)), None


def _need_plain(module: nn.MultiheadAttention) -> None:
    wrong = {
        "the batch is not first": not module.batch_first,
        "keys or values have another width": not module._qkv_same_embed_dim,
        "it adds keys of its own": module.bias_k is not None or module.add_zero_attn,
        "it drops out; call eval()": module.training and module.dropout > 0,
    }
    for what, found in wrong.items():
        if found:
            raise UnsupportedModel(f"frames cannot share an attention of this model: {what}")


def _nothing(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    pass


def _as_one_row(x: Tensor) -> Tensor:
    """(A, H, T, D) to a copy (1, H, A T, D) that shares no storage."""
    copied = x.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    return copied.flatten(1, 2)[None]
