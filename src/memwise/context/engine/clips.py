"""A memory of clips: each is read with what is held of the clip before, and a question picks some.

A small causal transformer reads [carried memory, clip, summary tokens, indicator token]. Its states
at the summary tokens are the memory of the clip, and are carried into the next one; its state at
the indicator token says what the clip is about. A question goes through the same transformer, and
the clips whose indicators are nearest to its own are handed to a reader, in the order of time. The
video is never read again, and what the reader gets does not grow with it.

Shapes: B videos, C clips, T tokens of a clip, Q of a question, S summary tokens, V clips that are
picked, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from memwise.budget import Budget, BudgetLike, Ledger
from memwise.catalogue import Card
from memwise.context.engine.building import need_layers, weights_from
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True, eq=False)
class ClipMemory:
    """What is held of the clips that were read; a new one is made with each clip.

    Attributes:
        summaries: (B, C, S, D).
        indicators: (B, C, D), of length 1.
    """

    summaries: Tensor
    indicators: Tensor

    @property
    def n_clips(self) -> int:
        """C, clips that were read."""
        return self.indicators.shape[1]

    @property
    def n_bytes(self) -> int:
        """Bytes that are held."""
        held = (self.summaries, self.indicators)
        return sum(tensor.untyped_storage().nbytes() for tensor in held)


@dataclass(frozen=True, eq=False)
class Picked:
    """What a reader gets.

    Attributes:
        tokens: summaries of the clips, in the order of time (B, V S, D).
        places: which clips (B, V), growing.
        alike: cosine of the question and each clip (B, C).
    """

    tokens: Tensor
    places: Tensor
    alike: Tensor


@dataclass(frozen=True)
class ClipPolicy:
    """What goes from clip to clip, and which ones a question gets; its call builds the module.

    Attributes:
        n_summary: tokens that a clip becomes.
        n_picked: clips that a question gets.

    Raises:
        InvalidKnob: a knob below 1.
    """

    card: ClassVar[Card]

    n_summary: int = 4
    n_picked: int = 2

    def __post_init__(self) -> None:
        for name in ("n_summary", "n_picked"):
            if (value := getattr(self, name)) < 1:
                raise InvalidKnob(f"{name}={value}: give 1 or more")

    def carry(self, summary: Tensor) -> Tensor | None:
        """What the next clip is read with (B, S, D), of the summary of a clip; None for nothing."""
        return summary

    def pick(self, scores: Tensor, n_picked: int) -> Tensor:
        """Places of the clips (B, n_picked) that a question gets, from their scores (B, C)."""
        return scores.topk(n_picked).indices

    def __call__(
        self, width: int = 256, n_layers: int = 4, n_heads: int = 4,
        budget: BudgetLike | None = None, seed: int = 0,
    ) -> ClipStreamer:  # fmt: skip
        """A streaming encoder of clips; all policies have the same weights under the same names.

        Args:
            width: D.
            n_layers: of the transformer.
            n_heads: of each attention.
            budget: bytes of the memory, and of the next one while a clip comes to it; None for no
                end.
            seed: of the weights.

        Raises:
            InvalidKnob: the width is no multiple of the heads, or there are no layers.
        """
        need_layers(width, n_layers, n_heads)
        with weights_from(seed):
            return ClipStreamer(
                self, width, n_layers, n_heads, None if budget is None else Budget(budget)
            )


class ClipStreamer(nn.Module):
    """Reads clips one after another, and picks some for a question.

    Frames, words, positions in a clip, and the reader of what is picked are the caller's.
    """

    def __init__(
        self, policy: ClipPolicy, width: int, n_layers: int, n_heads: int, budget: Budget | None
    ) -> None:
        super().__init__()
        self.policy, self.budget = policy, budget
        self.carried, self.summary = (
            nn.Parameter(0.5 * torch.randn(policy.n_summary, width)) for _ in range(2)
        )
        self.indicator = nn.Parameter(0.5 * torch.randn(width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, n_heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.sharpness = nn.Parameter(torch.tensor(10.0))

    def forward(self, clip: Tensor, memory: ClipMemory | None = None) -> ClipMemory:
        """Read the next clip (B, T, D); None begins a video.

        Raises:
            BudgetExceeded: the memory with this clip would be larger.
            InvalidKnob: the memory is of other videos, or of another encoder.
        """
        n, (n_rows, _, width) = self.policy.n_summary, clip.shape
        none = ClipMemory(clip.new_zeros(n_rows, 0, n, width), clip.new_zeros(n_rows, 0, width))
        held = memory or none
        if held.summaries.shape[::2] != (n_rows, n) or held.summaries.shape[-1] != width:
            raise InvalidKnob(
                f"a memory of {tuple(held.summaries.shape)}; this clip and encoder have "
                f"({n_rows}, any, {n}, {width}): give the memory that the clip before returned"
            )
        last = self.policy.carry(held.summaries[:, -1]) if held.n_clips else None
        states = self._read(clip, last, self.summary)
        summary, indicator = states[:, None, -n - 1 : -1], _unit(states[:, -1:])
        ledger = Ledger(self.budget)
        ledger.set("device", "memory", held.n_bytes)
        ledger.set("device", "next memory", held.n_bytes + summary.nbytes + indicator.nbytes)
        return ClipMemory(
            torch.cat([held.summaries, summary], 1), torch.cat([held.indicators, indicator], 1)
        )

    def ask(
        self, question: Tensor, memory: ClipMemory, draws: torch.Generator | None = None
    ) -> Picked:
        """What a reader gets for a question (B, Q, D).

        In training (with `draws`) clips are drawn by their scores without replacement, by Gumbel
        noise, and tokens carry the gradient of the share of their clip in the softmax of scores.

        Args:
            question: one for each video.
            memory: of the clips so far.
            draws: random numbers for training; None picks the best.
        """
        asked = _unit(self._read(question, None, None)[:, -1])
        alike = (memory.indicators @ asked[..., None])[..., 0]  # (B, C)
        scores = self.sharpness * alike
        noisy = scores if draws is None else scores.detach() + _gumbel(scores, draws)
        n_picked = min(self.policy.n_picked, memory.n_clips)
        places = self.policy.pick(noisy, n_picked).sort().values
        tokens = memory.summaries.take_along_dim(places[..., None, None], 1)  # (B, V, S, D)
        if draws is not None:
            share = scores.softmax(-1).take_along_dim(places, 1)[..., None, None]
            tokens = tokens * (1 + share - share.detach())
        return Picked(tokens.flatten(1, 2), places, alike)

    def _read(self, x: Tensor, carried: Tensor | None, summary: Tensor | None) -> Tensor:
        """States of [what is carried, x, summary tokens, indicator], each seeing those before."""
        n_rows = len(x)
        parts = [self.carried.expand(n_rows, -1, -1) + (0 if carried is None else carried), x]
        if summary is not None:
            parts.append(summary.expand(n_rows, -1, -1))
        parts.append(self.indicator + x.mean(1, keepdim=True))
        states = torch.cat(parts, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(
            states.shape[1], states.device, states.dtype
        )
        for layer in self.layers:
            states = layer(states, mask, is_causal=True)
        read: Tensor = self.norm(states)
        return read


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _gumbel(like: Tensor, draws: torch.Generator) -> Tensor:
    """Noise with which the largest sums are a sample from the softmax, without replacement."""
    waits = torch.empty(like.shape, dtype=like.dtype, device=draws.device)
    return -waits.exponential_(generator=draws).log().to(like.device)
