"""Baseline: an encoder of which only the last layer is handed on."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.context.engine.vectors import VectorPolicy


@dataclass(frozen=True)
class LastLayerVectors(VectorPolicy):
    """Keep one vector a group of tokens, from the encoder's last layer; drop the tokens.

    Every layer of the decoder projects the same vector to keys and values of its own, so slots
    take as many bytes as where each layer has a vector.

    Attributes:
        group: tokens that a vector stands for.
        segment: tokens that the encoder reads at once; whole groups.
        trains_decoder: whether the decoder learns together with the encoder.

    Raises:
        InvalidKnob: a knob below 1, or a segment that is no whole groups.
    """

    card = Card(
        paper=None,
        claim="the last layer's vectors alone: 1 vector a group for all layers",
        check="rebuild_text",
        baseline="last_layer_vectors",
        better="higher",
        margin=0.0,
        requires=("torch",),
        kind="baseline",
    )

    group: int = 32
    segment: int = 2048
    trains_decoder: bool = True

    def source(self, layer: int, n_layers: int) -> int:
        return n_layers - 1
