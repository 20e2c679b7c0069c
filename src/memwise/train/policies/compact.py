"""CompAct (arXiv 2410.15352): linear layers keep and learn from a random few features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.train.engine.act_space import Space, SpaceOptimizer
from memwise.train.engine.optimizer import OptimizerPolicy


@dataclass(frozen=True)
class CompAct:
    """Keep x P (N, r) of the input x (N, I) of every linear layer, and gradients and states in r.

    P is Gaussian, drawn from a seed wherever it is needed, and drawn again every `gap` steps while
    the states stay. Output and gradient of the input are exact. Dropped are x, after the forward
    pass, and what the weight's gradient has outside of P: no matrix of the weight's shape is made.
    Calling it on a model gives the optimizer, and that the policy for the activations.

    Attributes:
        ratio: r / I, in (0, 1).
        gap: steps from one P to the next.
        scale: factor of the steps that are carried back.

    Note:
        Layers of one parent with as many inputs share P, so that queries, keys and values keep one
        thing. An input that another operation keeps anyhow is projected in the backward pass.
        Over a few hundred steps of tuning a P that is drawn once does no worse: `gap` is for long
        training.

    Raises:
        InvalidKnob: a knob is out of its range.
    """

    ratio: float = 0.25
    gap: int = 50
    scale: float = 0.25

    card = Card(
        paper=124,
        claim="25-30 % lower peak in pre-training, about 50 % in fine-tuning, close to GaLore",
        check="projected_inputs",
        baseline="adamw",
        better="lower",
        margin=0.25,
        requires=("torch",),
    )

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1 or self.gap < 1:
            raise InvalidKnob(
                f"ratio={self.ratio!r}, gap={self.gap!r}: keep a share in (0, 1) of the features, "
                "and P for at least 1 step"
            )

    def __call__(
        self, model: nn.Module, lr: float = 1e-3, states: OptimizerPolicy | None = None,
        seed: int = 0, **hyper: Any,
    ) -> SpaceOptimizer:  # fmt: skip
        """The optimizer of a model; its `policy` is what `compress_activations` takes.

        Args:
            model: whose linear layers are projected.
            lr: step size.
            states: how the states are stored, by any optimizer of this room; None = AdamW's.
            seed: of the projections.
            **hyper: those of the rule (`betas`, `eps`, `weight_decay`, ...).

        Raises:
            InvalidKnob: a hyperparameter is unknown or out of range.
            UnsupportedModel: it has no linear layer that could be projected.
        """
        space = Space(model, lambda n_in: max(1, round(self.ratio * n_in)), "gaussian", seed)
        own = OptimizerPolicy() if states is None else states
        return SpaceOptimizer(model, space, own, lr, self.gap, self.scale, hyper)
