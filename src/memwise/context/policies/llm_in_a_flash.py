"""LLM in a flash (arXiv 2312.11514): feed-forward neurons are read when they are about to fire."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from memwise.catalogue import Card
from memwise.context.engine.weight_policy import NeuronPolicy
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor

_BATCH = 256


@dataclass(frozen=True)
class LLMInAFlash(NeuronPolicy):
    """Keep attention and the neurons of the last tokens; read those that a predictor adds.

    A small classifier a layer, of low rank, says from a layer's input which of its ReLUs will let
    something pass. A neuron's rows of all projections lie side by side, so that one read brings it.
    It stays until it has been silent for `keep` tokens.

    Attributes:
        keep: newest tokens whose neurons stay, in tokens; 0 reads all of them for each pass.
        rank: of the classifiers.
        threshold: chance of firing above which a neuron is read, in (0, 1).
        miss_cost: weight of a neuron that fires against one that does not, in training.
        n_steps: of training, batches of 256 tokens.
        lr: learning rate of the first step; it falls to zero.
        seed: of the classifiers.

    Raises:
        InvalidKnob: a knob out of its range.

    Note:
        A gated layer's neuron fires if its gate does. The classifier sees the input of the
        feed-forward layer, the paper's that of the attention output before its norm. All layers
        have one rank; the paper gives the last ones more.
    """

    card = Card(
        paper=103,
        claim="models of 2 times the memory, 4 to 5 times as fast on a CPU as loading everything",
        check="flash_neurons",
        baseline="layer_stream",
        better="lower",
        margin=0.25,
        requires=("torch",),
    )

    keep: int = 5
    rank: int = 32
    threshold: float = 0.5
    miss_cost: float = 4.0
    n_steps: int = 600
    lr: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep < 0 or min(self.rank, self.n_steps) < 1 or min(self.miss_cost, self.lr) <= 0:
            raise InvalidKnob(
                f"keep={self.keep} must be 0 or more, rank={self.rank} and n_steps={self.n_steps} "
                f"1 or more, miss_cost={self.miss_cost} and lr={self.lr} above 0"
            )
        if not 0 < self.threshold < 1:
            raise InvalidKnob(f"threshold={self.threshold} must lie between 0 and 1")

    @property
    def layout(self) -> str:
        trained = (self.rank, self.miss_cost, self.n_steps, self.lr, self.seed)
        return f"neurons, {'together' if self.together else 'apart'}, predicted by {trained}"

    @property
    def window(self) -> int:
        return self.keep

    @torch.enable_grad()
    def learn(self, x: Tensor, fires: Tensor, gate: Tensor) -> Mapping[str, Tensor]:
        draws = torch.Generator().manual_seed(self.seed)
        width, n_neurons = x.shape[1], fires.shape[1]
        rank = min(self.rank, width)
        rate = fires.float().mean(0).clamp(1e-4, 1 - 1e-4)
        known = {
            "u": torch.randn(width, rank, generator=draws) / math.sqrt(width),
            "v": torch.randn(rank, n_neurons, generator=draws) / math.sqrt(rank),
            "b": rate.logit(),
        }
        known = {name: start.to(x.dtype).requires_grad_() for name, start in known.items()}
        optimizer = torch.optim.Adam(known.values(), self.lr)
        cost = x.new_tensor(self.miss_cost)
        for step in range(self.n_steps):
            optimizer.param_groups[0]["lr"] = self.lr * (1 - step / self.n_steps)
            at = torch.randint(len(x), (_BATCH,), generator=draws)
            chance = self._logits(x[at].detach(), known)
            loss = F.binary_cross_entropy_with_logits(
                chance, fires[at].to(x.dtype), pos_weight=cost
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        return known

    def predict(self, x: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        # sigmoid(x U V + b) > threshold
        return self._logits(x, known) > math.log(self.threshold / (1 - self.threshold))

    def _logits(self, x: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return x @ known["u"] @ known["v"] + known["b"]
