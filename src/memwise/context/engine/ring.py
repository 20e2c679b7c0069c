"""A ring of hidden states: what some layers held of tokens that mattered, within a byte budget.

It is the only thing that an editor carries from one forward pass to the next. It lies outside the
policy, so that it can be counted, cleared, copied and handed on.

Shapes: B batch, L layers, N places, q tokens of a forward pass, D width of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

from memwise.budget import Budget, BudgetLike, Ledger, readable
from memwise.context.engine.store import EMPTY
from memwise.errors import BudgetExceeded, InvalidKnob

Tensor: TypeAlias = torch.Tensor


class HiddenRing:
    """Hidden states of chosen tokens; when the places are full, the oldest are overwritten.

    Places are made at the first forward pass, when the number of rows is known. A ring belongs to
    one batch of texts from beginning to end: `reset` it before other texts.

    Args:
        layers: of which states are held.
        width: D.
        budget: bytes of all that is held; it decides the number of places.
        dtype: of the states.
        device: where they lie.

    Attributes:
        n_seen: tokens of the text so far, padding included.
    """

    def __init__(
        self, layers: Sequence[int], width: int, budget: BudgetLike,
        dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.layers, self.width, self.budget = tuple(layers), width, Budget(budget)
        self._like = torch.empty(0, dtype=dtype, device=device)
        self.reset()

    def reset(self) -> None:
        """Hold nothing, as before the first forward pass."""
        self.n_seen = 0
        self._tensors: dict[str, Tensor] = {}
        self.ledger = Ledger(self.budget)

    def clone(self) -> HiddenRing:
        """Another ring that holds the same, with bytes of its own."""
        return copy.deepcopy(self)

    @property
    def n_places(self) -> int:
        """Tokens that each row can hold; 0 before the first forward pass."""
        return self._tensors["at"].shape[1] if self._tensors else 0

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is held, from storages."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors.values())

    @property
    def at(self) -> Tensor:
        """Places in their texts of the tokens that are held (B, N), int64; -1 where none is."""
        return self._tensors["at"]

    @property
    def last(self) -> Tensor:
        """What the decoder made of the token that came last (B, 1, D)."""
        return self._tensors["last"]

    def states(self, layer: int) -> Tensor:
        """What a layer was given of them (B, N, D)."""
        return self._tensors["states"][self.layers.index(layer)]

    def open(self, batch: int) -> None:
        """Make the places for so many rows, once.

        Raises:
            BudgetExceeded: not one place a row fits.
            InvalidKnob: the ring holds another number of rows.
        """
        if self._tensors:
            if batch != len(self.at):
                raise InvalidKnob(
                    f"a batch of {batch}, and the ring holds {len(self.at)} texts: reset() it "
                    "before other texts"
                )
            return
        itemsize = self._like.element_size()
        a_place = batch * (len(self.layers) * self.width * itemsize + 8)
        beside = batch * (self.width * itemsize + 8)
        n_places = (int(self.budget) - beside) // a_place
        if n_places < 1:
            raise BudgetExceeded(
                f"a place for {batch} texts takes {readable(a_place)}, and the last token's state "
                f"{readable(beside)}; the budget is {readable(int(self.budget))}: raise budget="
            )
        shape = (len(self.layers), batch, n_places, self.width)
        self._tensors = {
            "states": self._like.new_zeros(shape),
            "at": self._like.new_full((batch, n_places), EMPTY, dtype=torch.int64),
            "next": self._like.new_zeros(batch, dtype=torch.int64),
            "last": self._like.new_zeros(batch, 1, self.width),
        }
        for name, tensor in self._tensors.items():
            self.ledger.set("device", name, tensor.untyped_storage().nbytes())

    def write(self, chosen: Tensor, states: Mapping[int, Tensor], at: Tensor) -> None:
        """Take tokens in, the oldest first.

        Args:
            chosen: which (B, q), bool.
            states: layer -> (B, q, D).
            at: their places in the texts (B, q).
        """
        n_places = self.n_places
        for row, own in enumerate(chosen):
            taken = own.nonzero()[:, 0]
            first = int(self._tensors["next"][row]) + max(0, len(taken) - n_places)
            taken = taken[-n_places:]
            places = (first + torch.arange(len(taken), device=at.device)) % n_places
            for layer in self.layers:
                self.states(layer)[row, places] = states[layer][row, taken]
            self.at[row, places] = at[row, taken]
            self._tensors["next"][row] = (first + len(taken)) % n_places

    def end(self, hidden: Tensor) -> None:
        """A forward pass is over, which made this of its tokens (B, q, D)."""
        self.last.copy_(hidden[:, -1:])
        self.n_seen += hidden.shape[1]
