"""PPD: a few trained embeddings guess later tokens, and a tree of guesses is verified at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from memwise.catalogue import Card
from memwise.context.engine import prompts as chains
from memwise.context.engine.draft import Drafter, DraftTree, fastest
from memwise.context.engine.relay import RelayHost
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class PPD:
    """Keep guesses that the model confirms, drop the others: greedy text stays, passes go.

    Attributes:
        n_prompts: trained embeddings, one for each token that is guessed beyond the next.
        n_nodes: most tokens of a tree, the current one included; the fastest size is measured.
        n_ranks: guesses of each prompt that a tree may hold.
        n_steps: steps of training.
        n_places: places of a text at which prompts are put in a step.
        lr: learning rate, beside the size of a number of an embedding.
        decay: weight of each prompt in training beside that of the one before it.

    Raises:
        InvalidKnob: a number that has to be 1 or more is not, or a rate is not above 0.

    Note:
        Every guess has a whole chain of prompts behind it, where the paper trims chains: as only
        the chain behind what was accepted passes the output layer, prompts are cheap here. There
        are no groups of prompts whose outputs are averaged. The divergence in training is taken
        over the tokens that occur in the texts.
    """

    card = Card(
        paper=30,
        claim="up to 2.49 times faster with 0.0002 % of the parameters trained",
        check="draft_tree",
        baseline="plain_decoding",
        better="higher",
        margin=0.3,
        requires=("torch",),
    )

    n_prompts: int = 3
    n_nodes: int = 16
    n_ranks: int = 10
    n_steps: int = 160
    n_places: int = 20
    lr: float = 0.1
    decay: float = 0.8

    def __post_init__(self) -> None:
        for name in ("n_prompts", "n_nodes", "n_ranks", "n_steps", "n_places"):
            if getattr(self, name) < 1:
                raise InvalidKnob(f"{name}={getattr(self, name)} must be 1 or more")
        if self.lr <= 0 or not 0 < self.decay <= 1:
            raise InvalidKnob(
                f"lr={self.lr}, decay={self.decay}: give a rate above 0 and a decay in (0, 1]"
            )

    def __call__(
        self, model: nn.Module, texts: Sequence[Sequence[int]], seed: int = 0,
        progress: Callable[[str, float], None] | None = None,
    ) -> Drafter:  # fmt: skip
        """Train prompts for a model and measure which tree is the fastest here.

        Args:
            model: as for `bounded`; it stays as it is.
            texts: tokens of texts of the kind that will be written; every fourth only calibrates.
            seed: of training.
            progress: told what is done, and its share.
        """
        if len(texts) < 2:
            raise InvalidKnob(f"{len(texts)} texts: give some to train on and one to calibrate on")
        calibration = texts[3::4] or texts[-1:]
        rest = [text for text in texts if text not in calibration]
        prompts = self.train(model, rest, seed, progress)
        hits = self.hits(model, prompts, calibration)
        drafters = {n: self.drafter(model, prompts, hits, n) for n in self.sizes}
        accepted = {n: drafter.tree.expected(hits) for n, drafter in drafters.items()}
        seconds = {n: drafter.seconds(texts[0]) for n, drafter in drafters.items()}
        return drafters[fastest(seconds, accepted)]

    @property
    def sizes(self) -> list[int]:
        """Sizes of trees that are tried: 1, which is ordinary decoding, and doublings of it."""
        return [n for n in (2**i for i in range(self.n_nodes.bit_length())) if n <= self.n_nodes]

    def train(
        self, model: nn.Module, texts: Sequence[Sequence[int]], seed: int = 0,
        progress: Callable[[str, float], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """Trained prompts (m, E)."""
        host = RelayHost(model)
        return chains.trained(
            host, texts, chains.untrained(host, self.n_prompts, seed), n_steps=self.n_steps,
            n_places=self.n_places, lr=self.lr, decay=self.decay, seed=seed, progress=progress,
        )  # fmt: skip

    def hits(self, model: nn.Module, prompts: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        """How often each guess of each prompt is right (m, k)."""
        host = RelayHost(model)
        reads = [chains.read(host, text) for text in texts]
        return chains.hits(host, reads, prompts, self.n_ranks, self.n_places)

    def drafter(self, model: nn.Module, prompts: Tensor, hits: Tensor, n_nodes: int) -> Drafter:
        """Decoding with the best tree of a size."""
        return Drafter(model, prompts, DraftTree.best(hits, n_nodes))
