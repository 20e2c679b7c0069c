"""Zeros for the least important weights of each row, so that a sparse format has something to gain.

Shapes: B rows of T tokens, n outputs, D inputs of a linear layer.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn

from memwise.context.engine.host import decoder_of
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@torch.no_grad()
def prune(model: nn.Module, ratio: float, text: Tensor | None = None) -> None:
    """Set a part of each row of the decoder's linear layers to zero, in place.

    Without a text, by magnitude; with one, by magnitude times the norm of what the weight is
    multiplied with (Wanda, arXiv 2306.11695), every layer seeing the unpruned model's inputs.

    Args:
        model: a decoder-only Hugging Face model.
        ratio: share of each row that becomes zero, in [0, 1).
        text: tokens (B, T) that inputs are measured on.

    Raises:
        InvalidKnob: the ratio is out of range.
        UnsupportedModel: the model is of another kind.
    """
    if not 0 <= ratio < 1:
        raise InvalidKnob(f"ratio={ratio}: give a share in [0, 1), such as 0.5")
    layers: nn.Module = decoder_of(model).layers  # type: ignore[assignment]
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    norms = [torch.ones(()) for _ in linears] if text is None else _norms(model, linears, text)
    for module, norm in zip(linears, norms, strict=True):
        score = module.weight.abs() * norm.to(module.weight.dtype)  # (n, D)
        n_zeros = int(ratio * score.shape[1])
        least = score.topk(n_zeros, dim=1, largest=False).indices
        module.weight.scatter_(1, least, 0.0)  # +0.0, which a sparse format leaves out


def _norms(model: nn.Module, linears: list[nn.Linear], text: Tensor) -> list[Tensor]:
    """Norms (D,) of the inputs of each layer over all tokens."""
    squares = [torch.zeros(module.in_features) for module in linears]

    def adder(total: Tensor) -> Any:
        def add(_: nn.Module, args: tuple[Tensor]) -> None:
            total.add_(args[0].float().square().flatten(0, 1).sum(0))

        return add

    hooks = [
        module.register_forward_pre_hook(adder(total))
        for module, total in zip(linears, squares, strict=True)
    ]
    try:
        model(input_ids=text, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [total.sqrt() for total in squares]
