"""Memory-efficient backpropagation through linear layers by random sums (arXiv 2201.13195)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memwise.budget import Budget
from memwise.catalogue import Card
from memwise.train.engine.act_actions import Planned, Sketch
from memwise.train.engine.activations import ActivationPolicy, Site


@dataclass(frozen=True)
class RandomizedLinearBackward(ActivationPolicy):
    """Keep, of the input x (N, I) of a linear layer, S^T x (K, I) for a random S with E[S S^T] = 1.

    Output and gradient of the input are exact. x is dropped after the forward pass; the weight's
    gradient is (S^T gy)^T (S^T x), right in the mean, and S is drawn again from its seed. Layers
    that take the same input keep one sketch together. An input that another operation keeps
    anyhow is used as it is, and costs nothing more.

    Attributes:
        ratio: K / N, in (0, 1].
        sketch: "gaussian", "rademacher" (signs), or "rows" (K of the N tokens, scaled by N / K).

    Note:
        The paper also has sketches by cosine and Fourier transforms, which are left out here.

    Raises:
        InvalidKnob: a knob is out of range.
    """

    ratio: float = 0.2
    sketch: str = "gaussian"

    card = Card(
        paper=181,
        claim="11.30 -> 9.20 GiB for RoBERTa on GLUE at 20 % of the tokens, little loss of score",
        check="activations",
        baseline="keep",
        better="lower",
        margin=0.186,
        requires=("torch",),
    )

    def __post_init__(self) -> None:
        Sketch(self.ratio, self.sketch)

    def plan(self, sites: Sequence[Site], budget: Budget | None) -> Mapping[str, Planned]:
        sketch = Sketch(self.ratio, self.sketch)
        return {site.name: sketch for site in sites if site.kind == "linear"}
