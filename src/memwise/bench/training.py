"""The ground on which training methods are compared: a byte language model on real text.

Every method starts from the same weights and sees the same batches in the same order; it is judged
on fixed windows of text that nobody trains on, which are the paired items of the checks.

Shapes: B sequences of T bytes, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.data import books, data_folder
from memwise.errors import InvalidKnob

N_BYTES = 256
_BATCH = 16  # windows judged at once


class Block(nn.Module):
    """Pre-norm attention and MLP; every matrix and every non-linearity is a module of its own."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        b, t, d = x.shape
        heads = self.qkv(self.norm1(x)).view(b, t, 3, self.n_heads, d // self.n_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, D / H) each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        x = x + self.down(self.act(self.up(self.norm2(x))))
        return x


class ByteLM(nn.Module):
    """A causal transformer over bytes; its call gives the loss.

    Args:
        width: of the residual stream.
        n_layers: blocks.
        n_heads: heads of each.
        context: longest sequence.
        seed: of the initial weights.
    """

    def __init__(
        self, width: int = 256, n_layers: int = 4, n_heads: int = 4, context: int = 256,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tok, self.pos = nn.Embedding(N_BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, n_heads) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, N_BYTES, bias=False)
        draws = torch.Generator().manual_seed(seed)
        for param in self.parameters():
            if param.ndim == 2:
                nn.init.normal_(param, std=0.02, generator=draws)

    def logits(self, ids: Tensor) -> Tensor:
        """Scores (B, T, 256) of the byte after each of `ids` (B, T)."""
        x = self.tok(ids) + self.pos.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x))
        return scores

    def forward(self, ids: Tensor) -> Tensor:
        """Mean loss in nat per byte of `ids` (B, T + 1)."""
        return F.cross_entropy(self.logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@dataclass(frozen=True)
class Corpus:
    """Text as bytes.

    Attributes:
        train: (n,) int64.
        valid: (m,) int64, never trained on.
    """

    train: Tensor
    valid: Tensor

    @classmethod
    def of(cls, train: str, valid: str) -> Corpus:
        """The two texts in UTF-8."""
        return cls(*(_bytes(text) for text in (train, valid)))

    def batch(self, step: int, size: int, context: int, seed: int) -> Tensor:
        """Windows (size, context + 1) of the training text, drawn for this step."""
        draws = torch.Generator().manual_seed(seed * 100_003 + step)
        at = torch.randint(len(self.train) - context, (size,), generator=draws)
        return torch.stack([self.train[i : i + context + 1] for i in at.tolist()])

    def windows(self, n: int, context: int) -> Tensor:
        """Windows (n, context + 1) that lie evenly in the validation text."""
        last = len(self.valid) - context - 1
        if last < 0:
            raise InvalidKnob(f"{len(self.valid)} bytes of validation text hold no {context + 1}")
        at = torch.linspace(0, last, n).long().tolist()
        return torch.stack([self.valid[i : i + context + 1] for i in at])


def corpus(data: Path | None = None) -> Corpus:
    """Public-domain books and WikiText-2's validation part; judged on its test part's first half.

    Raises:
        InvalidKnob: no folder with the data sets.
    """
    data = data_folder(data)
    folder = data / "wikitext2"
    valid, test = (
        (folder / name).read_text("utf-8") for name in ("valid.txt", "test_first_half.txt")
    )
    return Corpus.of("\n\n".join([*(text for _, text in books(data)), valid]), test)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: Corpus,
    n_steps: int,
    size: int = 8,
    context: int = 256,
    seed: int = 0,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    n_warmup: int = 20,
    n_fade: int = 0,
) -> list[float]:
    """Train, with a linear warm-up of the learning rate; returns the loss of every step.

    Args:
        model: its call on (B, T + 1) bytes gives the loss.
        optimizer: over its parameters.
        text: what is learned.
        n_steps: batches.
        size: sequences in a batch.
        context: bytes a sequence.
        seed: of the order of the batches.
        around: makes what is entered around each forward and backward pass.
        n_warmup: steps until the full learning rate.
        n_fade: last steps, in which it falls to zero: at a constant rate runs that differ in one
            rounding end 1 to 2 % apart, and nothing smaller is seen.
    """

    def rate(t: int) -> float:
        left = (n_steps - t) / n_fade if n_fade else 1.0
        return min(1.0, (t + 1) / n_warmup, left)

    rise = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    for step in range(n_steps):
        with around():
            loss = model(text.batch(step, size, context, seed))
            loss.backward()
        optimizer.step()
        rise.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@torch.no_grad()
def window_nll(
    model: ByteLM, text: Corpus, n_windows: int = 64, context: int = 256
) -> NDArray[np.float64]:
    """Mean nat per byte (n_windows,) of fixed windows of the validation text."""
    found = []
    for ids in torch.split(text.windows(n_windows, context), _BATCH):
        scores = model.logits(ids[:, :-1]).float()
        nll = F.cross_entropy(scores.transpose(1, 2), ids[:, 1:], reduction="none")
        found.append(nll.double().mean(1))
    return torch.cat(found).numpy()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
