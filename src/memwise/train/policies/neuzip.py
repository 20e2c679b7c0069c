"""NeuZip (arXiv 2410.20650): weights whose exponents are entropy-coded, decoded layer by layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from memwise.catalogue import Card
from memwise.codec.th_mantissa import BITS
from memwise.errors import InvalidKnob
from memwise.train.engine.compressed import Compressed


@dataclass(frozen=True)
class NeuZip:
    """Keep sign and mantissa of each weight as they are, and Huffman codes of its exponents.

    A layer's weight is decoded for its forward pass and again for its backward pass; nothing
    decoded is kept. In training each weight is decoded, moved and encoded as soon as its gradient
    is there, and the gradient goes. Nothing is dropped: losses, gradients and weights are those of
    a plain run to the bit. With few mantissa bits, for inference, the mantissas are rounded, in
    groups of 512 that share the mantissa of their largest weight.

        zipped = NeuZip()(model)
        optimizer = zipped.optimizer(AdamW(), lr=1e-3)
        model(batch).backward()  # moves the weights
        zipped.restore()

    Attributes:
        mantissa_bits: None = all, without loss; else 0, 1, 2, 3 or 7.

    Note:
        Chunks are of 32 K weights, coded with zlib's Huffman coder on the CPU; the paper's are of
        64 KiB, coded on the GPU.

    Raises:
        InvalidKnob: no such number of bits.
    """

    mantissa_bits: int | None = None

    card = Card(
        paper=142,
        claim="training Llama-3-8B in under 16 GB instead of 31 GB, with identical dynamics",
        check="zipped_weights",
        baseline="keep",
        better="lower",
        margin=0.3,
        requires=("torch",),
    )

    def __post_init__(self) -> None:
        if self.mantissa_bits is not None and self.mantissa_bits not in BITS:
            raise InvalidKnob(
                f"mantissa_bits={self.mantissa_bits!r}: use None or one of "
                f"{', '.join(map(str, BITS))}"
            )

    def __call__(self, model: nn.Module, keep: Collection[str] = ()) -> Compressed:
        """Compress the weights of a model in place.

        Args:
            model: on its device.
            keep: names of weights that stay as they are, for instance those that the model reads
                by itself and not through their module.

        Raises:
            InvalidKnob: a weight is NaN or infinite, and was to be rounded; or a name is unknown.
            UnsupportedModel: nothing in it can be compressed.
        """
        return Compressed(model, self.mantissa_bits, keep)
