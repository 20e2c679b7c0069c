"""Feed-forward layers whose neurons lie on the disk and are read when they are about to fire.

A neuron is a row of the gate and of the up-projection and a column of the down-projection. Those
in use stand at the front of preallocated matrices: one that goes is overwritten by the last, so
that nothing is allocated, and a product needs no gathering.

Shapes: B batch, T tokens, D width, F neurons of a layer, m of them held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from memwise.context.engine.weight_policy import NeuronPolicy
from memwise.context.engine.weight_store import Bundle, WeightFile
from memwise.errors import InvalidKnob, UnsupportedModel

Tensor: TypeAlias = torch.Tensor
Ids: TypeAlias = NDArray[np.int64]

INPUTS, OUTPUT = ("gate_proj", "up_proj"), "down_proj"
_MOVED = 12  # rows of a projection that are moved at once
_PROBE = (-8.0, -1.0, -1e-3, 0.0)  # where a neuron has to be silent


def matrices_of(mlp: nn.Module) -> dict[str, nn.Linear]:
    """The projections of a feed-forward layer with silent neurons, inputs first.

    Raises:
        UnsupportedModel: other projections, biases, or a gate that is never silent.
    """
    found = {name: getattr(mlp, name, None) for name in (*INPUTS, OUTPUT)}
    known = {name: module for name, module in found.items() if isinstance(module, nn.Linear)}
    if not {"up_proj", OUTPUT} <= set(known) or any(m.bias is not None for m in known.values()):
        raise UnsupportedModel(
            f"{type(mlp).__name__} has no up_proj and down_proj without biases: its neurons cannot "
            "be told apart"
        )
    act: Any = mlp.act_fn
    if torch.count_nonzero(act(torch.tensor(_PROBE))):
        raise UnsupportedModel(
            f"{type(mlp).__name__} has the gate {type(act).__name__}, which is not zero below "
            "zero: no neuron of it is silent. Take a model with ReLU, or stream whole matrices"
        )
    return known


def rows_of(mlp: nn.Module) -> list[Tensor]:
    """What belongs to each neuron, one matrix (F, D) a projection, inputs first."""
    known = matrices_of(mlp)
    return [m.weight.T if name == OUTPUT else m.weight for name, m in known.items()]


@torch.no_grad()
def fires(mlp: Any, x: Tensor) -> Tensor:
    """Which neurons (N, F) fire for x (N, D)."""
    fired: Tensor = mlp.act_fn(x @ rows_of(mlp)[0].T) != 0
    return fired


class Held:
    """The neurons of one layer that are in memory.

    Args:
        file: where all of them are.
        bundles: one of rows that hold all of a neuron, or one for each projection.
        n_parts: projections.
        capacity: neurons that there is room for.
    """

    def __init__(
        self, file: WeightFile, bundles: Sequence[Bundle], n_parts: int, capacity: int
    ) -> None:
        self.file, self.bundles = file, bundles
        n_all = bundles[0].shape[0]
        self.capacity, self._n_parts = min(capacity, n_all), n_parts
        self._n_moved = _at_once(bundles, n_parts)
        dtype = getattr(torch, bundles[0].dtype)
        self.matrices = [torch.empty(self.capacity, b.shape[1], dtype=dtype) for b in bundles]
        self.n = 0
        self._ids = np.full(self.capacity, -1)  # of the neuron at each place
        self._place = np.full(n_all, -1)  # of each neuron
        self.fired = np.full(n_all, -1)  # the newest token that each fired for

    @property
    def n_bytes(self) -> int:
        """Bytes of what is preallocated, and of rows on their way to another place."""
        rows = sum(matrix.untyped_storage().nbytes() for matrix in self.matrices)
        notes = self._ids.nbytes + self._place.nbytes + self.fired.nbytes
        return rows + notes + self._n_moved * max(matrix[:1].nbytes for matrix in self.matrices)

    @staticmethod
    def room(n_bytes: int, bundles: Sequence[Bundle], n_parts: int) -> int:
        """Neurons of so many projections that fit in so many bytes."""
        a_row = max(b.decoded_bytes // b.shape[0] for b in bundles)
        a_neuron = sum(b.decoded_bytes // b.shape[0] for b in bundles)
        fixed = 2 * 8 * bundles[0].shape[0] + _at_once(bundles, n_parts) * a_row
        return max(0, (n_bytes - fixed) // (a_neuron + 8))

    def ids(self) -> Ids:
        """The neurons that are held, in the order of their places."""
        return self._ids[: self.n]

    def parts(self) -> list[Tensor]:
        """Their rows, (m, D) a projection, views."""
        if len(self.matrices) > 1:
            return [matrix[: self.n] for matrix in self.matrices]
        return list(self.matrices[0][: self.n].chunk(self._n_parts, dim=1))

    def hold(self, wanted: Ids) -> None:
        """Read the wanted ones that are missing; others go, the longest silent first, for room.

        Args:
            wanted: (m,), rising, no more than there is room for.
        """
        missing = wanted[self._place[wanted] < 0]
        excess = self.n + len(missing) - self.capacity
        if excess > 0:
            idle = np.setdiff1d(self.ids(), wanted)
            self.drop(idle[np.argsort(self.fired[idle], kind="stable")[:excess]])
        some = slice(self.n, self.n + len(missing))
        for bundle, matrix in zip(self.bundles, self.matrices, strict=True):
            self.file.read_rows(bundle, missing, matrix[some])
        self._ids[some] = missing
        self._place[missing] = np.arange(some.start, some.stop)
        self.n = some.stop

    def drop(self, ids: Ids) -> None:
        """Let neurons go; the last ones take the places that become free in front of them."""
        left = self.n - len(ids)
        places = self._place[ids]
        holes = places[places < left]
        stays = np.ones(self.n - left, bool)
        stays[places[places >= left] - left] = False
        movers = left + np.flatnonzero(stays)
        for first in range(0, len(holes), self._n_moved):
            some = slice(first, first + self._n_moved)
            to, of = (torch.from_numpy(i[some]) for i in (holes, movers))
            for matrix in self.matrices:
                matrix[to] = matrix[of]
        self._place[ids] = -1
        self._ids[holes] = self._ids[movers]
        self._place[self._ids[holes]] = holes
        self.n = left

    def drop_silent(self, since: int) -> None:
        """Let go what has not fired for any token from `since` on."""
        ids = self.ids()
        self.drop(ids[self.fired[ids] < since])


def _at_once(bundles: Sequence[Bundle], n_parts: int) -> int:
    """Rows that are moved at once: as many bytes, whether a row holds one projection or all."""
    return max(1, _MOVED * len(bundles) // n_parts)


class SparseFFN:
    """Stands in for the forward pass of a feed-forward layer.

    Args:
        mlp: whose place it takes.
        policy: that says which neurons will fire.
        known: what the policy has learned of this layer.
        held: room for neurons.
    """

    def __init__(
        self, mlp: Any, policy: NeuronPolicy, known: Mapping[str, Tensor], held: Held
    ) -> None:
        self.mlp, self.policy, self.known, self.held = mlp, policy, known, held
        self.n_tokens = 0

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        if torch.is_grad_enabled():
            raise InvalidKnob(
                "streamed weights have no gradients: call the model inside torch.no_grad()"
            )
        flat = x.reshape(-1, x.shape[-1])
        likely = self.policy.predict(flat, self.known).view(*x.shape[:2], -1).any(0)  # (T, F)
        wanted = self._note(likely)
        out = self._sum(flat, wanted)
        self.n_tokens += x.shape[1]
        if self.policy.window:
            self.held.drop_silent(self.n_tokens - self.policy.window)
        else:
            self.held.drop(self.held.ids())
        return out.view_as(x)

    def _note(self, likely: Tensor) -> Ids:
        """The neurons that fire for some token, whose newest is noted."""
        table = likely.numpy()
        wanted = np.flatnonzero(table.any(0))
        newest = len(table) - 1 - table[::-1, wanted].argmax(0)
        self.held.fired[wanted] = self.n_tokens + newest
        return wanted

    def _sum(self, x: Tensor, wanted: Ids) -> Tensor:
        """What the neurons add up to, (N, D), as many at once as there is room for."""
        if len(wanted) <= self.held.capacity:
            self.held.hold(wanted)
            return self._product(x)
        out = torch.zeros_like(x)
        for first in range(0, len(wanted), self.held.capacity):
            self.held.drop(self.held.ids())
            self.held.hold(wanted[first : first + self.held.capacity])
            out += self._product(x)
        return out

    def _product(self, x: Tensor) -> Tensor:
        *inputs, down = self.held.parts()
        hidden = self.mlp.act_fn(x @ inputs[0].T)
        if len(inputs) > 1:
            hidden = hidden * (x @ inputs[1].T)
        out: Tensor = hidden @ down
        return out
