"""Attention whose queries wait: each meets the keys that came up to `delay` tokens after it.

In a stream no token can look ahead, but its query can stand in line until later keys are there. So
what comes out is as late as the queries wait, and reads both sides. Held are the newest keys and
values, the queries in line, and the input that is added to what they find.

Shapes: B batch, T new tokens, M keys that are held, Q queries in line, H heads, D width of a head,
W width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from memwise.context.engine.rotary import turn
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor

_THETA = 10_000.0  # slowest wavelength of the rotary positions, over 2 pi


@dataclass(frozen=True)
class Line:
    """What a stream holds between two calls.

    Attributes:
        keys: of the newest tokens (B, H, M, D), turned to their positions.
        values: of the same (B, H, M, D).
        queries: that wait (B, H, Q, D), turned to their positions.
        inputs: of the same tokens (B, Q, W).
        n_seen: tokens that were given.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    inputs: Tensor
    n_seen: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        held = (self.keys, self.values, self.queries, self.inputs)
        return sum(tensor.nbytes for tensor in held)


class WaitingAttention(nn.Module):
    """A pre-norm attention layer over a stream, whose output is late by `delay` tokens.

    Args:
        width: W.
        n_heads: H; W / H must be even.
        memory: keys that are held, in tokens.
        delay: tokens that come between a query and its turn.

    Raises:
        InvalidKnob: the memory ends before a query's turn, or the heads cannot share the width.
    """

    def __init__(self, width: int, n_heads: int, memory: int, delay: int) -> None:
        super().__init__()
        self.check(n_heads, memory, delay)
        if width % (2 * n_heads):
            raise InvalidKnob(f"width={width} cannot be split into {n_heads} heads of even width")
        self.n_heads, self.memory, self.delay = n_heads, memory, delay
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    @staticmethod
    def check(n_heads: int, memory: int, delay: int) -> None:
        """Refuse what no layer can be made of.

        Raises:
            InvalidKnob: the memory ends before a query's turn, or there is no head.
        """
        if n_heads < 1 or delay < 0 or memory <= delay:
            raise InvalidKnob(
                f"n_heads={n_heads}, memory={memory}, delay={delay}: give a head, a delay of 0 or "
                "more, and a memory above the delay, as a query that waits still needs its own key"
            )

    def start(self, x: Tensor) -> Line:
        """An empty stream for inputs like x (B, T, W)."""
        n_rows, _, width = x.shape
        none = x.new_empty(n_rows, self.n_heads, 0, width // self.n_heads)
        return Line(none, none, none, x.new_empty(n_rows, 0, width))

    def forward(self, x: Tensor, line: Line | None = None) -> tuple[Tensor, Line]:
        """Take tokens in; give those whose turn has come, and what is held.

        Args:
            x: new tokens (B, T, W).
            line: what the last call gave; None at the beginning.

        Returns:
            Outputs (B, max(0, Q + T - delay), W), oldest first, and what the next call needs.
        """
        line = self.start(x) if line is None else line
        line = self._taken(x, line)
        n_ready = max(0, line.queries.shape[2] - self.delay)
        out = self._attend(line, n_ready)
        return out, Line(
            line.keys[:, :, -self.memory :], line.values[:, :, -self.memory :],
            line.queries[:, :, n_ready:], line.inputs[:, n_ready:], line.n_seen,
        )  # fmt: skip

    def finish(self, line: Line) -> Tensor:
        """Outputs (B, Q, W) of those that still wait: no more tokens will come."""
        return self._attend(line, line.queries.shape[2])

    def _taken(self, x: Tensor, line: Line) -> Line:
        n_rows, n_new, width = x.shape
        heads = self.qkv(self.norm(x)).view(n_rows, n_new, 3, self.n_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        cos, sin = _angles(line.n_seen, n_new, width // self.n_heads, x)
        return Line(
            torch.cat([line.keys, turn(key, cos, sin)], 2),
            torch.cat([line.values, value], 2),
            torch.cat([line.queries, turn(query, cos, sin)], 2),
            torch.cat([line.inputs, x], 1),
            line.n_seen + n_new,
        )

    def _attend(self, line: Line, n_ready: int) -> Tensor:
        """Outputs (B, n_ready, W) of the oldest queries, each as if its turn were only now."""
        device = line.inputs.device
        key_at = torch.arange(line.n_seen - line.keys.shape[2], line.n_seen, device=device)
        first = line.n_seen - line.queries.shape[2]
        query_at = torch.arange(first, first + n_ready, device=device)[:, None]
        newest = (query_at + self.delay).clamp(max=line.n_seen - 1)
        seen = (key_at <= newest) & (key_at > newest - self.memory)  # (n_ready, M)
        found = F.scaled_dot_product_attention(
            line.queries[:, :, :n_ready], line.keys, line.values, seen
        )
        mixed = found.transpose(1, 2).flatten(2)
        return line.inputs[:, :n_ready] + self.out(mixed)


def _angles(first: int, n: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n, D) of n positions."""
    at = torch.arange(first, first + n, device=like.device, dtype=torch.float64)
    speed = _THETA ** -(torch.arange(0, width, 2, device=like.device, dtype=torch.float64) / width)
    angle = torch.outer(at, speed).repeat(1, 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)
