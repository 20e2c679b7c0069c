"""An associative memory in front of the window: tokens that leave it sharpen or replace a mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch

from memwise.catalogue import Card
from memwise.context.engine.policy import CachePolicy
from memwise.context.engine.step import Step
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class CAMELoT(CachePolicy):
    """Keep the newest tokens, and modes: means of older tokens alike; modes long unused go.

    A share of the slots of each head are modes. A token that leaves the window is folded into the
    mode whose key is most like its own, by a running mean of bare keys and of values; a token that
    is like none becomes a mode in place of the one that was written longest ago. All modes stand
    right before the window.

    Attributes:
        alike: cosine of two keys above which a token is folded into a mode; 1 never folds.
        share: share of the slots that are modes.

    Raises:
        InvalidKnob: a knob outside of 0 and 1.

    Note:
        A token reads all modes, each as one token, where the paper reads for each token of the
        window the one mode that its key retrieves. Tokens that leave together are compared with
        the modes before them, and the first ones to leave fill the modes whether alike or not.
    """

    card = Card(
        paper=174,
        claim="up to 29.7 % lower perplexity on arXiv with a frozen Llama-2-7B",
        check="long_repeats",
        baseline="sliding_window",
        better="lower",
        margin=0.0,
        requires=("torch",),
    )

    columns: ClassVar[dict[str, float]] = {"count": 1.0, "written": -1.0}
    raw_keys = True
    any_length = True

    alike: float = 0.93
    share: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("alike", self.alike), ("share", self.share)):
            if not 0 <= value <= 1:
                raise InvalidKnob(f"{name}={value}: give a number from 0 to 1")

    @property
    def floor(self) -> int:
        """A mode, and the newest."""
        return 2

    def n_modes(self, n_slots: int) -> int:
        """Modes among so many slots."""
        return min(max(1, int(self.share * n_slots)), n_slots - 1)

    def score(self, step: Step) -> Tensor:
        """The window, then what was written last, folded tokens excepted."""
        at, like, mode = self._leaving(step)
        written = torch.maximum(step["written"], step.pos.float())
        came = written[:, :, at]
        folded = torch.where(like > self.alike, came, -1.0)
        score = written.scatter_reduce(2, mode, folded, "amax")
        score[:, :, at] = came.masked_fill(like > self.alike, -1.0)
        score[:, :, at.stop :] = torch.inf
        return score

    def merge(self, step: Step, kept: Tensor) -> None:
        """Fold the tokens that leave into the modes that they are like."""
        at, like, mode = self._leaving(step)
        gone = torch.ones_like(step.pos, dtype=torch.bool).scatter_(2, kept, False)
        folds = (like > self.alike) & gone[:, :, at]
        step["count"].scatter_add_(2, mode, folds.float())
        came = torch.where(folds, step.pos[:, :, at].float(), -1.0)
        step["written"].scatter_reduce_(2, mode, came, "amax")
        count = step["count"].gather(2, mode)[..., None]
        for held in (step.keys, step.values):
            where = mode[..., None].expand(*mode.shape, held.shape[-1])
            change = folds[..., None] * (held[:, :, at] - held.gather(2, where)) / count.to(held)
            held.scatter_add_(2, where, change.to(held.dtype))

    def place(self, step: Step) -> Tensor:
        """Modes before the window's first token, the window as it is."""
        n_modes = self.n_modes(step.n_slots)
        edge = step.place.amax(-1, keepdim=True) - (step.n - n_modes)
        place = step.place.clone()
        place[:, :, :n_modes] = edge.where(step.pos[:, :, :n_modes] >= 0, place[:, :, :n_modes])
        return place

    def _leaving(self, step: Step) -> tuple[slice, Tensor, Tensor]:
        """Slots that leave the window; how alike (B, H, e) the best mode of each is, and which."""
        n_modes = self.n_modes(step.n_slots)
        leaving = slice(n_modes, step.n - (step.n_slots - n_modes))
        return leaving, *step.nearest(leaving, slice(0, n_modes))
