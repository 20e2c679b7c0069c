"""Round weights to two bits and start LoRA so that each block's outputs stay what they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memwise.catalogue import Card
from memwise.errors import InvalidKnob
from memwise.train.engine.adapters import AdapterPolicy, Handle, Site, Target, pack
from memwise.train.engine.calibrate import ClippedLowRank, Stream, calibrate


@dataclass(frozen=True)
class ApiQ(AdapterPolicy):
    """Fit clipping bounds and LoRA together, block by block, then keep codes and LoRA alone.

    Each block gets the inputs that the rounded blocks below give, and is fitted to the outputs that
    it had in the model of full precision; rounding is passed straight through. Kept: packed codes,
    and A and B, which then are tuned as in LoRA. Dropped: the dense weights of a block as soon as
    it is fitted, and the bounds, which have become its scales.

    Attributes:
        codec: of the weights; uint* by group.
        rank: of A and B.
        alpha: their factor, times the rank.
        n_epochs: passes over the calibration batches a block.
        lr: step size of A and B.
        clip_lr: step size of the bounds.
        weight_decay: of both.

    Note:
        Block-wise, with hidden states of the rounded model as inputs; the variant that fits map by
        map and the second target Block(Xq) are left out.
    """

    card = Card(
        paper=4,
        claim="2-bit Llama-2-7B on WikiText-2: perplexity 7.46 after tuning, where QLoRA fails",
        check="adapt_blocks",
        baseline="qlora",
        better="lower",
        margin=0.02,
        requires=("torch",),
    )
    codec: str = "uint2/group64"
    rank: int = 16
    alpha: float = 16.0
    n_epochs: int = 20
    lr: float = 5e-4
    clip_lr: float = 5e-3
    weight_decay: float = 0.1

    def delta(self, site: Site) -> ClippedLowRank:
        return ClippedLowRank(site.base, self.codec, self.rank, self.alpha, site.draws)

    def __call__(
        self, model: nn.Module, target: Target = None, *, seed: int = 0,
        names: Sequence[str] = ("default",), batches: Sequence[Any] = (),
    ) -> Handle:  # fmt: skip
        """Round and adapt the maps of the blocks; `batches` are what the model is called with.

        Raises:
            InvalidKnob: no batches, several names, or a target outside of the blocks.
        """
        if not batches or len(names) != 1:
            raise InvalidKnob(f"ApiQ takes batches=[...] and one name; got {len(batches)}, {names}")
        handle = super().__call__(model, target, seed=seed, names=names)
        if outside := [name for name in handle.sites if handle.layer(name) is None]:
            handle.remove()
            raise InvalidKnob(f"{outside[0]} lies in no block; choose another target")
        handle.set_active(None)

        def fit(number: int, block: nn.Module, inputs: Stream, wanted: Sequence[Tensor]) -> None:
            self._fit(handle, number, block, inputs, wanted)

        calibrate(model, batches, fit)
        handle.set_active(names[0])
        return handle

    def _fit(
        self, handle: Handle, number: int, block: nn.Module, inputs: Stream,
        wanted: Sequence[Tensor],
    ) -> None:  # fmt: skip
        sites = [m for name, m in handle.sites.items() if handle.layer(name) == number]
        name = handle.names[0]
        deltas: list[Any] = [module.deltas[name] for module in sites]
        for module in sites:
            module.active = name
        groups = [
            {"params": [p for d in deltas for p in (d.A, d.B)], "lr": self.lr},
            {"params": [p for d in deltas for p in (d.low, d.high)], "lr": self.clip_lr},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        for step in range(self.n_epochs * len(inputs) if sites else 0):
            nth = step % len(inputs)
            loss = (inputs.run(block, nth).float() - wanted[nth].float()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for module, delta in zip(sites, deltas, strict=True):
            bounded = delta.bounded(module.base).detach().to(module.base.dtype)
            module.deltas[name] = delta.plain()
            module.store(pack(self.codec, bounded))
