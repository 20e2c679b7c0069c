"""The loss of a language model without its logits.

Logits of all tokens over a large vocabulary are often the largest tensor of a training step, and
cross entropy keeps more than one of their size. Here they exist for a few tokens at a time, and
their gradient is made at once, while they are there.

Shapes: N tokens, D hidden, V words.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 1 << 23  # logits at once; 32 MiB in float32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of softmax(hidden weight^T), as torch computes it, in chunks of tokens.

    Args:
        hidden: (N, D).
        weight: (V, D); no gradient of it is made where it needs none.
        targets: (N,) words.

    Returns:
        The mean over tokens, in nats, float32 or wider.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        gx = torch.empty_like(hidden) if needs_hidden else None
        gw = torch.zeros_like(weight) if needs_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        n, step = len(hidden), max(1, LOGITS // len(weight))
        for first in range(0, n, step):
            rows = slice(first, first + step)
            logits = F.linear(hidden[rows], weight).to(wide)
            picked = targets[rows, None]
            highest = logits.amax(1, keepdim=True)
            right = logits.gather(1, picked) - highest
            logits.sub_(highest).exp_()
            mass = logits.sum(1, keepdim=True)
            total += (mass.log() - right).sum()
            if gx is None and gw is None:
                continue
            logits.div_(mass).scatter_add_(1, picked, torch.full_like(right, -1.0)).div_(n)
            change = logits.to(hidden.dtype)
            if gx is not None:
                torch.mm(change, weight, out=gx[rows])
            if gw is not None:
                gw.addmm_(change.T, hidden[rows])
        ctx.save_for_backward(gx)
        ctx.gw = gw  # a gradient already, and as large as the weight: handed on, never copied
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gx,) = ctx.saved_tensors
        gw, ctx.gw = ctx.gw, None
        gx = None if gx is None else gx * grad.to(gx.dtype)
        return gx, None if gw is None else gw.mul_(grad.to(gw.dtype)), None
