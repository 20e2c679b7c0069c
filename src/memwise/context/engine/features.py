"""A memory of features: frames of a stream in a fixed number of places, under a byte budget.

It knows neither heads nor rotary positions: a frame is a block of numbers with a time and a mass,
the frames that were folded into it. A policy says what becomes of a full memory.

Shapes: F places, n of them in use, P tokens of a frame, D width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from memwise.budget import Budget, BudgetLike, Ledger, readable
from memwise.catalogue import Card
from memwise.errors import BudgetExceeded, InvalidKnob, StoreCorrupt

Tensor: TypeAlias = torch.Tensor

_FORMAT = "memwise.features/1"
_NOTES = 8 + 4 + 4  # bytes of a place beside its frame: time, mass, kind


@dataclass(frozen=True)
class FeaturePolicy:
    """What becomes of frames when the places are full. A policy holds knobs and nothing else."""

    card: ClassVar[Card]

    @property
    def least(self) -> int:
        """Places below which this policy cannot work."""
        return 2

    @property
    def n_numbers(self) -> int:
        """Numbers that the policy keeps beside the frames, 4 bytes each."""
        return 0

    def add(self, memory: FeatureMemory, frame: Tensor, time: int, seen: Any = None) -> None:
        """Take a frame (P, D) in; there is a free place, and there must be one afterwards.

        Args:
            memory: whose places are used.
            frame: that came.
            time: when, growing.
            seen: what else is known of it; a policy says what it needs.
        """
        memory.put(frame, time)
        if memory.is_full:
            self.make_room(memory)

    def make_room(self, memory: FeatureMemory) -> None:
        """Free at least one place."""
        raise NotImplementedError


class FeatureMemory:
    """Frames of a stream within so many bytes, at every moment.

    Args:
        policy: what becomes of a full memory.
        shape: (P, D) of a frame.
        budget: bytes of all that is held; it decides the number of places.
        dtype: of the frames.
        device: where they lie.

    Raises:
        BudgetExceeded: the policy needs more places than fit.
    """

    def __init__(
        self, policy: FeaturePolicy, shape: tuple[int, int], budget: BudgetLike,
        dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.policy, self.shape, self.budget = policy, shape, Budget(budget)
        self.dtype = dtype
        a_place = shape[0] * shape[1] * dtype.itemsize + _NOTES
        self.n_places = (int(self.budget) - 4 * policy.n_numbers) // a_place
        if self.n_places < policy.least:
            raise BudgetExceeded(
                f"{type(policy).__name__} needs {policy.least} places of {readable(a_place)} each; "
                f"the budget is {readable(int(self.budget))}: raise budget="
            )
        self._frames = torch.zeros(self.n_places, *shape, dtype=dtype, device=device)
        self._times = torch.zeros(self.n_places, dtype=torch.int64, device=device)
        self._mass = torch.zeros(self.n_places, dtype=torch.float32, device=device)
        self._kinds = torch.zeros(self.n_places, dtype=torch.int32, device=device)
        self.numbers = torch.zeros(policy.n_numbers, dtype=torch.float32, device=device)
        self.n, self.n_seen, self._last = 0, 0, -1
        self.ledger = Ledger(self.budget)
        for name, tensor in self.tensors().items():
            self.ledger.set("device", name, tensor.untyped_storage().nbytes())

    # --- what users ask

    def add(self, frame: Tensor, time: int | None = None, seen: Any = None) -> None:
        """Take a frame in.

        Args:
            frame: (P, D).
            time: later than the last; counted from 0 if not given.
            seen: what the policy wants to know of it.

        Raises:
            InvalidKnob: a frame of another shape, not finite, or a time that does not grow.
        """
        if tuple(frame.shape) != self.shape:
            raise InvalidKnob(
                f"a frame of shape {tuple(frame.shape)}; this memory has {self.shape}"
            )
        if not bool(frame.isfinite().all()):
            raise InvalidKnob("a frame holds numbers that are not finite")
        at = self._last + 1 if time is None else time
        if at <= self._last:
            raise InvalidKnob(f"time {at} is not after the last one, {self._last}")
        self._last, self.n_seen = at, self.n_seen + 1
        self.policy.add(self, frame, at, seen)

    @property
    def frames(self) -> Tensor:
        """What is held (n, P, D), a view."""
        return self._frames[: self.n]

    @property
    def times(self) -> Tensor:
        """When each came (n,), int64; the first of those that were folded together."""
        return self._times[: self.n]

    @property
    def mass(self) -> Tensor:
        """Frames that were folded into each (n,)."""
        return self._mass[: self.n]

    @property
    def kinds(self) -> Tensor:
        """What each is to the policy (n,), int32."""
        return self._kinds[: self.n]

    @property
    def is_full(self) -> bool:
        """No place is free."""
        return self.n == self.n_places

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name."""
        numbers = {"numbers": self.numbers} if len(self.numbers) else {}
        return self._places() | numbers

    def report(self) -> dict[str, Any]:
        """Bytes, places and times, for printing."""
        return {
            "budget": int(self.budget),
            "bytes": {kind: now for _, kind, now, _ in self.ledger},
            "seen": self.n_seen,
            "places": self.n_places,
            "held": self.n,
            "times": self.times.tolist(),
            "mass": self.mass.tolist(),
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write all that is held; the file appears when it is whole."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        held = {name: tensor[: self.n].clone() for name, tensor in self._places().items()}
        held["numbers"] = self.numbers
        numbers = {"seen": self.n_seen, "last": self._last}
        save_file(held, part, {"format": _FORMAT, "state": json.dumps(numbers), **self._own()})
        os.replace(part, target)

    def load(self, path: str | PathLike[str]) -> None:
        """Be what was saved.

        Raises:
            InvalidKnob: it has another policy, shape, type or number of places.
            StoreCorrupt: the file is no memory of features.
        """
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise StoreCorrupt(f"{path} is no saved memory: {error}") from error
        if meta.get("format") != _FORMAT:
            raise StoreCorrupt(f"{path} is no saved memory: it does not say {_FORMAT!r}")
        for what, own in self._own().items():
            if meta[what] != own:
                raise InvalidKnob(f"{path} was saved with another {what}: {meta[what]}, not {own}")
        state = json.loads(meta["state"])
        self.n, self.n_seen, self._last = len(held["times"]), state["seen"], state["last"]
        for name, tensor in self._places().items():
            tensor[: self.n] = held[name]
        if len(self.numbers):
            self.numbers.copy_(held["numbers"])

    # --- what policies do

    def put(self, frame: Tensor, time: int, mass: float = 1.0, kind: int = 0) -> None:
        """Write a frame to the first free place."""
        self._frames[self.n] = frame
        self._times[self.n], self._mass[self.n], self._kinds[self.n] = time, mass, kind
        self.n += 1

    def drop(self, place: int) -> None:
        """Let a frame go; the later ones move up."""
        for tensor in self._places().values():
            for i in range(place, self.n - 1):  # one at a time, so that nothing is held twice
                tensor[i] = tensor[i + 1]
        self.n -= 1

    def fold(self, place: int, weighted: bool = False) -> None:
        """Put a frame and the next into one: their mean, by mass if asked, and the earlier time."""
        a, b = self.mass[place].item(), self.mass[place + 1].item()
        share = b / (a + b) if weighted else 0.5
        self._frames[place].lerp_(self._frames[place + 1], share)
        self._mass[place] += b
        self.drop(place + 1)

    def replace(self, frames: Tensor, times: Sequence[int], mass: Sequence[float]) -> None:
        """Hold these (m, P, D) and no others."""
        self.n = len(times)
        self._frames[: self.n] = frames
        self._times[: self.n] = torch.tensor(list(times))
        self._mass[: self.n] = torch.tensor(list(mass))
        self._kinds[: self.n] = 0

    def mark(self, place: int, kind: int) -> None:
        """Say what a frame is to the policy."""
        self._kinds[place] = kind

    def alike(self, first: int = 0, last: int | None = None) -> Tensor:
        """Cosine of each frame and the next, between two places; (last - first - 1,), float32."""
        flat = self.frames[first:last].flatten(1).float()
        return torch.cosine_similarity(flat[:-1], flat[1:], dim=-1)

    def _places(self) -> dict[str, Tensor]:
        held = {"frames": self._frames, "times": self._times}
        return {**held, "mass": self._mass, "kinds": self._kinds}

    def _own(self) -> dict[str, str]:
        shape = f"{self.n_places} x {self.shape} {self.dtype}"
        return {"policy": repr(self.policy), "shape": shape}


def budget_for(
    n_places: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32, n_numbers: int = 0
) -> Budget:
    """Bytes of so many places of frames (P, D), and of a policy's numbers."""
    return Budget(n_places * (shape[0] * shape[1] * dtype.itemsize + _NOTES) + 4 * n_numbers)
