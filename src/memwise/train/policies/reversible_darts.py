"""Differentiable architecture search in a reversible transformer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.train.engine.reversible import ReversibleSequence, seeded


@dataclass(frozen=True)
class ReversibleDARTS:
    """Search the operation of each part of a reversible layer, from the bytes of one hidden state.

    The function of part k is the mixture sum_o softmax(alpha_k)_o op_o of all candidates, with one
    alpha_k for all layers. Kept is the last layer's output; the inputs of all other layers are
    dropped and worked out anew. Weights learn from one half of the data and alpha from the other,
    in turn (first order); `derived` keeps the best operation of each mixture.

    Attributes:
        n_parts: parts that the hidden state is split into.
        ops: candidates, out of identity, conv3, attention, ffn and zero.
        n_heads: heads of an attention.

    Note:
        A function reads the other parts side by side; how the paper mixes them is not certain.
        "identity" is their mean, which for two parts is the other one. Convolution and attention
        see the whole sequence, as in an encoder.
    """

    card = Card(
        paper=199,
        claim="found nets beat the Transformer on 3 WMT pairs; saved bytes do not grow with depth",
        check="reversible",
        baseline="plain_blocks",
        better="lower",
        margin=0.75,
        requires=("torch",),
    )
    n_parts: int = 2
    ops: tuple[str, ...] = ("identity", "conv3", "attention", "ffn", "zero")
    n_heads: int = 2

    def __call__(self, width: int = 64, n_layers: int = 8, seed: int = 0) -> SearchNet:
        """A network from (B, T, width) to (B, T, width), all of whose functions are mixtures.

        Raises:
            InvalidKnob: the width cannot be split, or an operation is unknown.
        """
        if width % (self.n_parts * self.n_heads):
            raise InvalidKnob(f"width={width} cannot be split into {self.n_parts} parts of heads")
        if unknown := sorted(set(self.ops) - _OPS.keys()):
            raise InvalidKnob(f"unknown operation {unknown[0]!r}; known: {', '.join(_OPS)}")
        alphas = [nn.Parameter(torch.zeros(len(self.ops))) for _ in range(self.n_parts)]
        part, others = width // self.n_parts, width - width // self.n_parts
        fns = [
            Mixture({op: _OPS[op](others, part, self.n_heads) for op in self.ops}, alpha, others)
            for _ in range(n_layers)
            for alpha in alphas
        ]
        net = SearchNet(self.n_parts, fns)
        seeded(net, seed)
        return net


class SearchNet(ReversibleSequence):
    """A reversible chain of mixtures with its two groups of parameters."""

    def alphas(self) -> list[nn.Parameter]:
        """What is learned from the validation half."""
        return [mixture.alpha for mixture in self._mixtures(1)]

    def weights(self) -> list[nn.Parameter]:
        """What is learned from the training half."""
        alphas = {id(alpha) for alpha in self.alphas()}
        return [weight for weight in self.parameters() if id(weight) not in alphas]

    def chosen(self) -> list[str]:
        """The operation with the largest alpha, for each part."""
        return [list(m.ops)[int(m.alpha.argmax())] for m in self._mixtures(1)]

    def derived(self, chosen: list[str] | None = None, seed: int = 0) -> SearchNet:
        """A new network with fresh weights that has one operation in each part."""
        names = self.chosen() if chosen is None else chosen
        fns = [m.only(names[i % self.parts]) for i, m in enumerate(self._mixtures(None))]
        net = SearchNet(self.parts, fns)
        seeded(net, seed)
        return net

    def _mixtures(self, n_layers: int | None) -> Iterator[Mixture]:
        stop = None if n_layers is None else n_layers * self.parts
        return (cast(Mixture, fn) for fn in list(self.fns)[:stop])


class Mixture(nn.Module):
    """sum_o softmax(alpha)_o op_o(others), the others normalised and side by side."""

    def __init__(self, ops: dict[str, nn.Module], alpha: nn.Parameter, width: int) -> None:
        super().__init__()
        self.ops, self.alpha, self.norm = nn.ModuleDict(ops), alpha, nn.LayerNorm(width)

    def forward(self, *others: Tensor) -> Tensor:
        """Map n - 1 parts (B, T, P) to what is added to the last one, (B, T, P)."""
        x = self.norm(torch.cat(others, -1))
        added = x.new_zeros(())
        for share, op in zip(torch.softmax(self.alpha, 0), self.ops.values(), strict=True):
            added = added + share * op(x)
        return added

    def only(self, name: str) -> Mixture:
        """The same with one operation."""
        ops = {name: copy.deepcopy(self.ops[name])}
        return Mixture(ops, nn.Parameter(torch.zeros(1)), self.norm.normalized_shape[0])


class _Mean(nn.Module):
    """Of the other parts: for two parts, the identity."""

    def __init__(self, width: int, part: int, n_heads: int) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.part)).mean(-2)


class _Zero(_Mean):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[..., : self.part])


class _Conv3(nn.Module):
    def __init__(self, width: int, part: int, n_heads: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, part, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT).mT


class _Attention(nn.Module):
    def __init__(self, width: int, part: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.out = nn.Linear(width, 3 * part), nn.Linear(part, part)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, P / H) each
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _FFN(nn.Sequential):
    def __init__(self, width: int, part: int, n_heads: int) -> None:
        super().__init__(nn.Linear(width, 4 * part), nn.GELU(), nn.Linear(4 * part, part))


_OPS = {"identity": _Mean, "conv3": _Conv3, "attention": _Attention, "ffn": _FFN, "zero": _Zero}
