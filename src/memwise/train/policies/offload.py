"""Baseline: saved tensors wait on the host or on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memwise.budget import Budget
from memwise.catalogue import Card
from memwise.train.engine.act_actions import Offload as Away
from memwise.train.engine.act_actions import Planned
from memwise.train.engine.activations import ActivationPolicy, Site


@dataclass(frozen=True)
class Offload(ActivationPolicy):
    """Keep nothing on the device: saved tensors lie in another tier until the backward pass.

    Tensors that several operations save are moved once. Small ones, parameters and the batch stay.
    Copies are synchronous: nothing is hidden behind the computation.

    Attributes:
        store: "disk" (files of raw numbers) or "host" (pinned memory; for a model on the host
            there is nothing to move, and the report says so).
        folder: where the files are made; None = the system's folder for temporary files.

    Raises:
        InvalidKnob: there is no such store.
    """

    store: str = "disk"
    folder: str | None = None

    card = Card(
        paper=None,
        claim="gradients as without it, to the bit",
        check="activations",
        baseline="keep",
        better="lower",
        margin=0.3,
        requires=("torch",),
        kind="baseline",
    )

    def __post_init__(self) -> None:
        Away(self.store, self.folder)

    def plan(self, sites: Sequence[Site], budget: Budget | None) -> Mapping[str, Planned]:
        return dict.fromkeys((site.name for site in sites), Away(self.store, self.folder))
