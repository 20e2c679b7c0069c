"""Video denoising slice by slice, with spared steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from memwise.catalogue import Card
from memwise.errors import InvalidKnob, UnsupportedModel
from memwise.train.engine.sliced import Chain, Reusable, StepMemory


@dataclass(frozen=True)
class StreamlinedInference:
    """Run each chain of operations on slices of its free axis, and reuse what hardly changes.

    Spatial operations are cut by frames, temporal ones by pixels; the longest chain with one free
    axis goes through as a group, so only its input, its output and the in-betweens of one slice are
    held. Where the deep feature of two denoising steps was alike, the next step takes it over
    (step rehash) and computes the outer blocks alone. For inference: one run over one batch.

        with StreamlinedInference()(unet) as memory: sample(unet)

    Attributes:
        n_slices: parts that a free axis is cut into.
        similarity: cosine of the deep features of two steps from which on the next one is spared;
            above 1 no step is.

    Note:
        The model is built of `Chain` (what may be cut) and `Reusable` (what may be spared). The
        paper's threshold is not known; the kept feature costs its own bytes.
    """

    card = Card(
        paper=19,
        claim="AnimateDiff peaks at 11 GB in place of 42",
        check="sliced_video",
        baseline="plain_blocks",
        better="lower",
        margin=0.6,
        requires=("torch",),
    )
    n_slices: int = 7
    similarity: float = 0.95

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[StepMemory]:
        """While entered, the model runs in slices and spares steps; afterwards it is as before.

        Raises:
            InvalidKnob: fewer than one slice.
            UnsupportedModel: the model has no `Chain`, or more than one `Reusable`.
        """
        if self.n_slices < 1:
            raise InvalidKnob(f"n_slices={self.n_slices}: an axis is cut into at least 1")
        chains = [module for module in model.modules() if isinstance(module, Chain)]
        parts = [module for module in model.modules() if isinstance(module, Reusable)]
        if not chains or len(parts) > 1:
            raise UnsupportedModel(
                f"{type(model).__name__} has {len(chains)} Chain and {len(parts)} Reusable; build "
                "it of Chain modules whose steps name their free axes, with at most one Reusable"
            )
        before = [(chain, chain.n_slices) for chain in chains]
        memory = StepMemory(self.similarity)
        held = [(part, part.steps) for part in parts]
        try:
            for chain in chains:
                chain.n_slices = self.n_slices
            for part in parts if self.similarity <= 1 else []:
                part.steps = memory
            with torch.no_grad():
                yield memory
        finally:
            for chain, n_slices in before:
                chain.n_slices = n_slices
            for part, steps in held:
                part.steps = steps
