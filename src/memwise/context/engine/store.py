"""Slots: the preallocated place of a layer's keys, values and what is noted of each.

Nothing here ever grows, and nothing is concatenated: that would hold the old and the new at once.
Tokens are written behind the last one, and what is kept moves to the front block by block, so that
a block is all that is ever held twice. In a codec, the newest tokens are floats, and become codes
when the room that they lie in is needed.

Shapes: B batch, H key-value heads, C slots there are, n of them in use, m kept, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch

from memwise.codec.spec import parse
from memwise.codec.th import Codec, Packed

Tensor: TypeAlias = torch.Tensor

BLOCK = 32  # slots that are moved, or encoded, at once
SEEN = 256  # slots that are decoded at once
EMPTY = -1  # position of a slot that holds nothing


class Dense:
    """A vector for each slot, as it is.

    Args:
        like: (B, H, D), of the type that is held.
        capacity: C.
    """

    def __init__(self, like: Tensor, capacity: int) -> None:
        self.held = like.new_zeros(*like.shape[:2], capacity, like.shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, slots along the third axis, by the end of its name."""
        return {"": self.held}

    def used(self, n: int) -> dict[str, Tensor]:
        """Views of what n slots use."""
        return {"": self.held[:, :, :n]}

    def read(self, first: int, last: int) -> Tensor:
        """Vectors of these slots (B, H, last - first, D); a view, which may be written to."""
        return self.held[:, :, first:last]

    def append(self, n: int, vectors: Tensor) -> None:
        """Write vectors (B, H, q, D) behind n slots."""
        self.held[:, :, n : n + vectors.shape[2]] = vectors

    def keep(self, chosen: Tensor, n: int) -> None:
        """Move chosen slots (B, H, m) of n to the front."""
        _to_front(self.held, chosen)

    def keep_last(self, n_tokens: int, n: int) -> None:
        """Move the newest of n slots to the front."""
        _last_to_front(self.held, n_tokens, n)


class Coded:
    """A vector for each slot: codes, and floats for the newest, as many as there is room for.

    Args:
        like: (B, H, D), of the type that comes out.
        capacity: C.
        room: slots of the floats; all of them become codes when the next do not fit.
        name: codec whose factors are those of one vector, or of groups within it.
    """

    def __init__(self, like: Tensor, capacity: int, room: int, name: str) -> None:
        self._codec, self._dtype, self._room = Codec(parse(name)), like.dtype, room
        self._tail, self.settled = Dense(like, room), 0
        one = self._codec.encode(like.new_zeros(1, like.shape[-1]))
        self._kinds = {part: array.dtype for part, array in one.arrays.items()}
        self._parts = {
            part: _movable(array).new_zeros(*like.shape[:2], capacity, array.numel())
            for part, array in one.arrays.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Codes, factors, and the newest vectors."""
        parts = {f".{part}": array for part, array in self._parts.items()}
        return {"": self._tail.held, **parts}

    def used(self, n: int) -> dict[str, Tensor]:
        """Views of what n slots use."""
        parts = {f".{part}": array[:, :, : self.settled] for part, array in self._parts.items()}
        return {"": self._tail.read(0, n - self.settled), **parts}

    def read(self, first: int, last: int) -> Tensor:
        """Vectors of these slots (B, H, last - first, D)."""
        middle = min(max(self.settled, first), last)
        new = self._tail.read(middle - self.settled, last - self.settled)
        if middle == first:
            return new
        old = self._decoded(first, middle)
        return old if middle == last else torch.cat([old, new], 2)

    def append(self, n: int, vectors: Tensor) -> None:
        """Write vectors (B, H, q, D) behind n slots."""
        if n - self.settled + vectors.shape[2] > self._room:
            self._settle(n)
        self._tail.append(n - self.settled, vectors)

    def keep(self, chosen: Tensor, n: int) -> None:
        """Move chosen slots (B, H, m) of n to the front; what is not in codes yet, becomes so."""
        self._settle(n)
        for array in self._parts.values():
            _to_front(array, chosen)
        self.settled = chosen.shape[-1]

    def keep_last(self, n_tokens: int, n: int) -> None:
        """Move the newest of n slots to the front; they become codes."""
        self._settle(n)
        for array in self._parts.values():
            _last_to_front(array, n_tokens, n)
        self.settled = n_tokens

    def _settle(self, n: int) -> None:
        for first in range(self.settled, n, BLOCK):
            last = min(n, first + BLOCK)
            some = self._tail.read(first - self.settled, last - self.settled)
            packed = self._codec.encode(some.flatten(0, 2))
            for part, array in packed.arrays.items():
                held = self._parts[part]
                held[:, :, first:last] = _movable(array).view(*some.shape[:3], held.shape[-1])
        self.settled = n

    def _decoded(self, first: int, last: int) -> Tensor:
        width = self._tail.held.shape[-1]
        arrays = {part: array[:, :, first:last] for part, array in self._parts.items()}
        n_rows = arrays["codes"].shape[:3].numel()
        flat = {part: array.reshape(n_rows, -1) for part, array in arrays.items()}
        flat = {
            part: (array if part == "codes" else array.flatten()).view(self._kinds[part])
            for part, array in flat.items()
        }
        packed = Packed(self._codec.spec.name, (n_rows, width), self._dtype, flat)
        return self._codec.decode(packed).view(*arrays["codes"].shape[:3], width)


def _movable(array: Tensor) -> Tensor:
    """The same bits in a type that can be gathered."""
    return array.view(torch.int16) if array.dtype == torch.uint16 else array


Vectors: TypeAlias = Dense | Coded


class Slots:
    """Slots of one layer.

    A slot's position is that of its token in the text; `EMPTY` marks padding. Slots stand in the
    order in which their tokens came.

    Args:
        keys: shape (B, H, D) and type of what is stored, as the model gives it.
        values: the same of the values.
        capacity: C.
        columns: numbers that are noted of a slot, by name, with what a new slot has.
        movable: keys are bare, and `place` says to which positions they are turned.
        codec: of keys and values; None keeps them as they are.
        room: slots of the newest tokens, which a codec leaves as they are.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, capacity: int, columns: Mapping[str, float],
        movable: bool = False, codec: str | None = None, room: int = 0,
    ) -> None:  # fmt: skip
        self.capacity, self.n, self.fresh = capacity, 0, dict(columns)
        self.keys, self.values = (
            Dense(like, capacity) if codec is None else Coded(like, capacity, room, codec)
            for like in (keys, values)
        )
        shape = (*keys.shape[:2], capacity)
        self.pos = torch.full(shape, EMPTY, dtype=torch.int32, device=keys.device)
        self.place = torch.full_like(self.pos, EMPTY) if movable else self.pos
        self.columns = {
            name: torch.full(shape, start, dtype=torch.float32, device=keys.device)
            for name, start in columns.items()
        }
        self.has_empty = False

    def notes(self) -> dict[str, Tensor]:
        """What is noted of slots (B, H, C), by name."""
        held = {"pos": self.pos, **self.columns}
        return held if self.place is self.pos else held | {"place": self.place}

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name."""
        return {
            **{f"keys{end}": tensor for end, tensor in self.keys.tensors().items()},
            **{f"values{end}": tensor for end, tensor in self.values.tensors().items()},
            **self.notes(),
        }

    def used(self) -> dict[str, Tensor]:
        """Views of what the slots in use hold, by name."""
        return {
            **{f"keys{end}": tensor for end, tensor in self.keys.used(self.n).items()},
            **{f"values{end}": tensor for end, tensor in self.values.used(self.n).items()},
            **{name: tensor[:, :, : self.n] for name, tensor in self.notes().items()},
        }

    def blocks(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of the slots from `start` on, some at a time."""
        for first in range(start, self.n, SEEN):
            last = min(self.n, first + SEEN)
            yield self.keys.read(first, last), self.values.read(first, last)

    def append(self, keys: Tensor, values: Tensor, pos: Tensor) -> None:
        """Write tokens behind the last: keys and values (B, H, q, D), positions (B, q)."""
        n_new = keys.shape[2]
        place = slice(self.n, self.n + n_new)
        self.keys.append(self.n, keys)
        self.values.append(self.n, values)
        self.pos[:, :, place] = self.place[:, :, place] = pos[:, None]
        for name, start in self.fresh.items():
            self.columns[name][:, :, place] = start
        self.n += n_new

    def drop_last(self, n_tokens: int) -> None:
        """Forget the newest tokens, as if they had never come."""
        self.n -= n_tokens

    def keep(self, chosen: Tensor) -> None:
        """Keep slots (B, H, m), ascending, in that order; the others are gone."""
        self.keys.keep(chosen, self.n)
        self.values.keep(chosen, self.n)
        for tensor in self.notes().values():
            _to_front(tensor, chosen)
        self._has(chosen.shape[-1])

    def keep_last(self, n_tokens: int) -> None:
        """Keep the newest tokens."""
        if n_tokens == self.n:
            return
        self.keys.keep_last(n_tokens, self.n)
        self.values.keep_last(n_tokens, self.n)
        for tensor in self.notes().values():
            _last_to_front(tensor, n_tokens, self.n)
        self._has(n_tokens)

    def _has(self, n: int) -> None:
        self.n = n
        if self.has_empty:
            self.has_empty = bool((self.pos[:, :, :n] == EMPTY).any())


def _to_front(tensor: Tensor, chosen: Tensor) -> None:
    """Move chosen slots to the front; as they ascend, no later block reads what was overwritten."""
    for first in range(0, chosen.shape[-1], BLOCK):
        at = chosen[:, :, first : first + BLOCK]
        if tensor.ndim == 4:
            at = at[..., None].expand(*at.shape, tensor.shape[-1])
        tensor[:, :, first : first + at.shape[2]] = tensor.gather(2, at)


def _last_to_front(tensor: Tensor, n_tokens: int, n: int) -> None:
    """Move the newest of n slots to the front, as many at once as they move, so none overlap."""
    start = n - n_tokens
    for first in range(0, n_tokens, start):
        last = min(n_tokens, first + start)
        tensor[:, :, first:last] = tensor[:, :, start + first : start + last]
