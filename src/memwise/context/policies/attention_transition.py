"""Attention that moves through a prompt, block by block, as it goes up through the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.edit import EditPolicy, Rows
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor

_STRONG, _WEAK = 100, 5  # shares of what is handed over
_BACK = 3  # blocks between the rows of a layer and their target
_START = 3  # first tokens of a text, which are in no block


@dataclass(frozen=True)
class AttentionTransition(EditPolicy):
    """Drop weak attention in some rows of a prompt and hand it to one block of tokens a layer.

    A prompt is cut into `n_layers + 3` blocks. In layer l, the rows of block l + 3 turn to block l,
    and the last rows of the prompt to the block whose rows the layer before has changed. A head
    takes part where any weight on the target exceeds the threshold: all its weights below are
    dropped, and what is missing to 1, times `strength`, goes to the target. The last layer, and
    tokens after the prompt, are left alone.

    Attributes:
        inner: threshold of the rows of a block, as a share of even attention.
        outer: threshold of the last rows, in the same unit.
        strength: factor on what is handed over; 0 leaves the model as it is.
        window: last rows of the prompt, in tokens.
        begin: first tokens before the blocks, in tokens.
        renormalise: let changed rows sum to 1 again.

    Raises:
        InvalidKnob: a negative knob, or no window.

    Note:
        The prompt is the pass that begins a text, so it has to go in at once. As in the reference,
        rows sum to more than 1 where `strength` is above 1. Keys that a query cannot see, in layers
        that slide, are given nothing.
    """

    card = Card(
        paper=112,
        claim="LLaMA-7B on XSum, 800 to 1,900 tokens: GPT-4 rates its summaries above plain ones",
        check="lead_sentence",
        baseline="full_cache",
        better="lower",
        margin=0.0,
        requires=("torch",),
        negative="Gemma-3-270M, 16 articles of 900 tokens: the true lead gets 3.028 nats a token "
        "with it, 3.026 without, 3.023 with random blocks; thresholds and strength made no "
        "difference above 0.004 on other articles either",
    )

    inner: float = 0.5
    outer: float = 0.5
    strength: float = 4.0
    window: int = 200
    begin: int = 5
    renormalise: bool = False

    def __post_init__(self) -> None:
        if min(self.inner, self.outer, self.strength, self.begin) < 0 or self.window < 1:
            raise InvalidKnob(
                f"{self}: thresholds, strength and begin must be 0 or more, window 1 or more"
            )

    def layers(self, n_layers: int) -> range:
        """All but the last."""
        return range(n_layers - 1)

    def edit_probs(self, rows: Rows) -> Tensor | None:
        """Attention of the rows of a prompt that belong to this layer."""
        if rows.n_past or not self.strength:
            return None
        moves = [(self.among(rows.at, *own), target, tau) for own, target, tau in self.moves(rows)]
        if not any(bool(own.any()) for own, *_ in moves):
            return None
        probs = rows.probs
        for own, target, tau in moves:
            aimed = self.among(rows.keys_at, *target)[:, None, None] & rows.seen
            probs = self.move(probs, own[:, None, :, None], aimed, tau[:, None, None, None])
        return probs

    def moves(
        self, rows: Rows
    ) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]]:
        """Rows from and to, their target from and to, and the threshold; each (B,)."""
        layer, n_blocks, end = rows.layer, rows.n_layers + _BACK, rows.n_tokens
        last = end - self.window
        found = []
        size = (last - self.begin - _START + n_blocks - 1) // n_blocks
        first = (layer + _BACK) * size + self.begin + _START
        target = self.target(rows, first - _BACK * size, size, first)
        tau = self.inner / (first - self.begin).clamp_min(1)
        found.append(((first, (first + size).minimum(last)), target, tau))
        if layer >= 1:
            size = (last - _START + n_blocks - 1) // n_blocks
            target = self.target(rows, (layer + _BACK - 1) * size + _START, size, last)
            too_short = torch.where(last > _START, last, end)
            found.append(((too_short, end), target, self.outer / last.clamp_min(1)))
        return found

    def target(self, rows: Rows, first: Tensor, size: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """The block (B,), (B,) that is handed attention: as many tokens, and none from `end` on."""
        return first, (first + size).minimum(end)

    def among(self, at: Tensor, first: Tensor, end: Tensor) -> Tensor:
        """Which places (B, n) lie between two."""
        return (at >= first[:, None]) & (at < end[:, None])

    def move(self, probs: Tensor, own: Tensor, aimed: Tensor, tau: Tensor) -> Tensor:
        """Hand what is weak (B, H, r, n) to what is aimed at, in rows of one's own (B, 1, r, 1)."""
        strong = probs >= tau
        takes_part = own & ((probs > tau) & aimed).any(-1, keepdim=True)
        kept = probs * strong
        missing = 1 - kept.sum(-1, keepdim=True)
        shares = torch.where(strong, _STRONG, _WEAK) * aimed
        moved = kept + self.strength * missing * shares / shares.sum(-1, keepdim=True).clamp_min(1)
        if self.renormalise:
            moved = moved / moved.sum(-1, keepdim=True)
        return torch.where(takes_part, moved, probs)
