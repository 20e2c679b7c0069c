"""Sites: the modules of a model, and what each of them saves for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules import activation, batchnorm, conv, dropout, normalization

from memwise.train.engine.act_actions import is_hf_conv1d

_SOFTMAX = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin)
_ACTS = tuple(
    kind
    for kind in (getattr(activation, name) for name in activation.__all__)
    if kind not in (*_SOFTMAX, nn.MultiheadAttention)
)
_KINDS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("linear", (nn.Linear,)),
    ("conv", (conv._ConvNd,)),
    ("norm", (batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, normalization.RMSNorm)),
    ("dropout", (dropout._DropoutNd,)),
    ("embed", (nn.Embedding, nn.EmbeddingBag)),
    ("softmax", _SOFTMAX),
    ("act", _ACTS),
)


@dataclass(frozen=True)
class Site:
    """One module, with what its own operations save for the backward pass.

    Attributes:
        name: its dotted name; "" is the model itself.
        kind: linear, conv, norm, act, dropout, embed, softmax, block (one of several modules of a
            class in a list) or other.
        op: name of its class.
        block: name of the outermost block that it lies in; "" outside.
        learns: whether it has parameters of its own, and one of them asks for a gradient.
        native: whether its forward pass is torch's own, so that it can be swapped.
        saved_bytes: what plain autograd holds here first, without its children; None where no
            budget asked for it.
    """

    name: str
    kind: str
    op: str
    block: str
    learns: bool
    native: bool
    saved_bytes: int | None = None


def sites(model: nn.Module) -> tuple[Site, ...]:
    """The sites of a model, from its structure; a module that is used twice is one site."""
    blocks = dict.fromkeys(_blocks(model), True)
    return tuple(
        Site(
            name,
            "block" if name in blocks else _kind(module),
            type(module).__name__,
            next((block for block in blocks if name.startswith(f"{block}.")), ""),
            any(param.requires_grad for param in module.parameters(recurse=False)),
            _is_native(module),
        )
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    )


def _kind(module: nn.Module) -> str:
    if is_hf_conv1d(module):
        return "linear"
    return next((kind for kind, classes in _KINDS if isinstance(module, classes)), "other")


def _is_native(module: nn.Module) -> bool:
    """Whether its forward pass is that of a class of torch, or of transformers' linear layer."""
    if "forward" in vars(module):
        return False
    owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return owner.__module__.startswith("torch.nn.modules.") or is_hf_conv1d(module)


def _blocks(model: nn.Module) -> Iterator[str]:
    """Names of the outermost modules that stand in a list with others of their class."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        if any(name == block or name.startswith(f"{block}.") for block in found):
            continue
        children = dict(module.named_children())
        for key, child in children.items():
            alike = sum(type(other) is type(child) for other in children.values())
            if alike > 1 and any(True for _ in child.children()):
                found.append(f"{name}.{key}" if name else key)
    yield from found
