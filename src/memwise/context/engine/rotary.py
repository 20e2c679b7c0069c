"""Rotary positions: turned on, taken off again, and put elsewhere.

Attention depends on the difference of two positions only, so a key may be moved as long as it is
turned from its bare form in one go: many small turns add up their rounding, in bfloat16 to nonsense
after a thousand.

Shapes: B batch, H heads, n slots, D width of a head.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, TypeAlias

import torch
from torch import nn

from memwise.errors import UnsupportedModel

Tensor: TypeAlias = torch.Tensor

_FROZEN = ("default", "linear", "llama3", "yarn")  # the same angles at every length


class Rotary:
    """The rotary embedding of a model, with one table of frequencies for each type of layer.

    Args:
        base: the decoder, whose `rotary_emb` gives cosines and sines.

    Raises:
        UnsupportedModel: it has none.
    """

    def __init__(self, base: nn.Module) -> None:
        module = getattr(base, "rotary_emb", None)
        if not isinstance(module, nn.Module):
            raise UnsupportedModel(
                f"{type(base).__name__} has no rotary positions; memwise.context works on "
                "decoder-only models with RoPE, such as Llama, Qwen, Mistral and Gemma"
            )
        self._base, self._module = base, module
        self._by_type = "layer_type" in inspect.signature(module.forward).parameters

    def table(self, positions: Tensor, layer_type: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, n, D), in the type of `like`, of positions (B, n)."""
        if self._by_type:
            return self._module(like, positions, layer_type)
        return self._module(like, positions)

    def check(self, layer_type: str, width: int) -> None:
        """Refuse a model whose keys could not be turned back and elsewhere.

        Raises:
            UnsupportedModel: its angles depend on the length, or it turns keys in its own way.
        """
        kind: Any = self._module.rope_type
        kind = kind.get(layer_type) if isinstance(kind, dict) else kind
        if kind not in _FROZEN:
            raise UnsupportedModel(
                f"rotary positions of type {kind!r} change with the length of the text, so keys "
                "cannot be moved; take a policy that leaves them where they are, as StreamingLLM"
            )
        apply: Any = getattr(sys.modules[type(self._base).__module__], "apply_rotary_pos_emb", None)
        # float32 as most models; what is compared is the order of coordinates, not their rounding.
        x = torch.randn(1, 1, 3, width, generator=torch.Generator().manual_seed(0))
        device = next(self._base.parameters()).device
        x = x.to(device)
        at = torch.tensor([[0, 5, 77]], device=device)
        cos, sin = self.table(at, layer_type, x)
        if apply is None or cos.shape[-1] != width:
            raise UnsupportedModel(
                f"{type(self._base).__name__} turns only a part of a key, or in a way of its own"
            )
        turned = apply(x, x, cos, sin)[1]
        if not torch.allclose(turned, turn(x, cos[:, None], sin[:, None]), atol=1e-5):
            raise UnsupportedModel(
                f"{type(self._base).__name__} pairs the coordinates of a key in a way of its own; "
                "keys of this model cannot be moved"
            )


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (..., n, D) by the angles of cosines and sines that broadcast to it."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def turn_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `turn` made x of, be the table scaled (YaRN) or rounded."""
    a, b = x.chunk(2, -1)
    return (x * cos - torch.cat([-b, a], -1) * sin) / (cos * cos + sin * sin)
