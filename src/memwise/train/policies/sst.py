"""Train a few singular directions of every weight at a time (SST, arXiv 2405.15481)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.train.engine import spectral
from memwise.train.engine.adapted import Target
from memwise.train.engine.spectral import SpectralOptimizer


@dataclass(frozen=True)
class SST:
    """Keep W as U diag(s) V^T, with gradients and states of s and of a few columns alone.

    All sizes s are trained always; of the columns of U and V `rank` are drawn for `every` steps,
    large ones more often: half of the chance is equal, half goes by size. Their gradient leaves out
    the factor s, so that small directions turn as fast as large ones; after each step they are
    brought back to length 1. Once as many columns were drawn as there are, the factors are found
    anew. What is dropped: states of columns that are not in training, and gradients of whole
    matrices, which never exist. U and V take about twice the bytes of the weights.

        optimizer = SST(rank=64)(model, lr=1e-3)
        ...  # train as with any optimizer
        SST().restore(model)

    Attributes:
        rank: columns of each map in training at a time.
        every: steps until others are drawn.
        n_warmup: steps of each draw in which the columns' step size rises to the full one.

    Raises:
        InvalidKnob: a knob is below 1.

    Note:
        Maps with no more than `rank` directions are trained whole. Only columns warm up, since
        only their states are new. Where a size has crossed zero, the gradient of its direction
        keeps the sign. The paper's hyperbolic networks are left out.
    """

    rank: int = 64
    every: int = 200
    n_warmup: int = 20

    card = Card(
        paper=59,
        claim="OPT-125M at rank 8.3 % of the width: 67.6 % of LoRA's gap in perplexity closed",
        check="spectral_training",
        baseline="lora",
        better="lower",
        margin=0.4,
        requires=("torch",),
    )

    def __post_init__(self) -> None:
        if min(self.rank, self.every, self.n_warmup) < 1:
            raise InvalidKnob(
                f"rank={self.rank}, every={self.every}, n_warmup={self.n_warmup}: give at least 1"
            )

    def __call__(
        self, model: nn.Module, lr: float = 1e-3, *, target: Target = None, seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0,
    ) -> SpectralOptimizer:  # fmt: skip
        """Put the linear maps of a model into factors, and make the optimizer of all it trains.

        Args:
            model: changed in place until `restore`.
            lr: step size.
            target: which maps; by default all in the model's blocks.
            seed: of the draws.
            betas: of both moments.
            weight_decay: of all but the directions.

        Raises:
            InvalidKnob: nothing matches, what matches is no nn.Linear, or a number is out of range.
            UnsupportedModel: two maps share a weight, or some are in factors already.
        """
        maps = spectral.factor(model, target, self.rank)
        hyper = {"betas": betas, "weight_decay": weight_decay}
        return SpectralOptimizer(model, maps, self, lr, seed, hyper)

    def restore(self, model: nn.Module) -> None:
        """Put plain linear maps back, in place; parameters are others afterwards."""
        spectral.restore(model)

    def draw(self, sizes: Tensor, draws: torch.Generator) -> Tensor:
        share = sizes / sizes.sum().clamp(min=torch.finfo(sizes.dtype).tiny)
        chance = (1 / len(sizes) + share) / 2
        return torch.multinomial(chance, self.rank, replacement=False, generator=draws)

    def refactors(self, n_directions: int, iteration: int) -> bool:
        return iteration % -(-n_directions // self.rank) == 0
