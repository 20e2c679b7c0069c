"""Saved tensors on their way: what autograd wants kept, kept in another form and given back.

`Hooks` is the pair of functions that autograd calls for every tensor that an operation saves. It
knows which module is at work, tries the actions planned for it, counts the bytes that stay, and
notices in-place changes, which autograd itself no longer does under hooks.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from memwise.budget import Budget, readable
from memwise.codec.th import Codec, Packed
from memwise.errors import BudgetExceeded
from memwise.train.engine.saves import Payload

SMALL = 4096  # numbers; below, a tensor stays as it is
_WIDTH = 4096  # numbers in a row of a tensor that is coded in the order of its storage
Key = tuple[str, int]  # device and address of a storage


# --- forms in which a tensor is kept


class Form(Protocol):
    """A tensor in some form, for as long as autograd keeps it.

    Attributes:
        storages: where its bytes lie on the tensor's own device.
    """

    storages: Mapping[Key, int]

    def tensor(self) -> Tensor:
        """The tensor again."""


class Whole:
    """The tensor itself, cut off from the graph so that they do not keep each other alive."""

    def __init__(self, t: Tensor) -> None:
        self._t = t.detach()
        storage = t.untyped_storage()
        self.storages: Mapping[Key, int] = {_key(t): storage.nbytes()}

    def tensor(self) -> Tensor:
        """The tensor."""
        return self._t


class Foreign:
    """A tensor of another class or layout, whose bytes are not ours to count."""

    storages: Mapping[Key, int] = {}

    def __init__(self, t: Tensor) -> None:
        self._t = t.detach()

    def tensor(self) -> Tensor:
        """The tensor."""
        return self._t


class Coded:
    """Codes and scales."""

    def __init__(self, t: Tensor, codec: Codec) -> None:
        self._codec = codec
        self._packed: Packed = codec.encode(t)
        arrays = self._packed.arrays.values()
        self.storages: Mapping[Key, int] = {_key(a): a.untyped_storage().nbytes() for a in arrays}

    def tensor(self) -> Tensor:
        """The decoded tensor."""
        return self._codec.decode(self._packed)


class Restrided:
    """What another form holds in the order of its storage, seen as one operation saved it."""

    def __init__(self, form: Form, shape: torch.Size, stride: tuple[int, ...]) -> None:
        self._form, self._shape, self._stride = form, shape, stride
        self.storages: Mapping[Key, int] = form.storages

    def tensor(self) -> Tensor:
        """The tensor, with the strides that it had."""
        return self._form.tensor().as_strided(self._shape, self._stride)


def in_storage_order(t: Tensor) -> Tensor | None:
    """All numbers of a tensor as rows (n, width), without a copy; None where they have gaps.

    The same for all views of the same numbers: the width is a matter of their count alone.
    """
    axes = sorted(range(t.ndim), key=t.stride().__getitem__, reverse=True)
    dense = t.permute(axes)
    return dense.view(-1, math.gcd(t.numel(), _WIDTH)) if dense.is_contiguous() else None


class OnHost:
    """A copy in the memory of the host."""

    storages: Mapping[Key, int] = {}

    def __init__(self, t: Tensor) -> None:
        self._device = t.device
        self._copy = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t)
        self.n_bytes = self._copy.untyped_storage().nbytes()

    def tensor(self) -> Tensor:
        """The copy, back on its device."""
        return self._copy.to(self._device)


class OnDisk:
    """A file of the raw numbers; it goes when the tensor does."""

    storages: Mapping[Key, int] = {}

    def __init__(self, t: Tensor, folder: Folder) -> None:
        self._kind, self._shape, self._device = t.dtype, t.shape, t.device
        self._folder, self._path = folder, folder.new()
        raw = t.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
        raw.tofile(self._path)
        self.n_bytes = raw.nbytes
        weakref.finalize(self, self._path.unlink, missing_ok=True)

    def tensor(self) -> Tensor:
        """The numbers, read again."""
        raw = torch.from_numpy(np.fromfile(self._path, dtype=np.uint8))
        return raw.view(self._kind).view(self._shape).to(self._device)


class Folder:
    """A folder for the files of one tape, removed with the last of them."""

    def __init__(self, parent: str | None) -> None:
        self._path = Path(tempfile.mkdtemp(prefix="memwise-", dir=parent))
        self._n = 0
        weakref.finalize(self, shutil.rmtree, self._path, ignore_errors=True)

    def new(self) -> Path:
        """A path that no other file has."""
        self._n += 1
        return self._path / f"{self._n}.raw"


class Remade:
    """The output of a cheap function, made again from the inputs that its own backward keeps."""

    storages: Mapping[Key, int] = {}

    def __init__(self, node: Any, make: Callable[[Any], Tensor], kind: torch.dtype) -> None:
        # An operation that saves y keeps the function that made y alive anyhow.
        self._node, self._make, self._kind = node, make, kind

    @classmethod
    def of(cls, t: Tensor) -> Remade | None:
        """The recipe of a saved output, seen through a view of all of it; None if there is none."""
        whole = t._base if t._is_view() else t
        if whole is None or whole.numel() != t.numel() or whole.output_nr != 0:
            return None
        if not (whole.is_contiguous() and t.is_contiguous()) or whole.grad_fn is None:
            return None
        make = _RECIPES.get(whole.grad_fn.name())
        # A product keeps both factors only where both have gradients.
        if make is None or None in [edge[0] for edge in whole.grad_fn.next_functions[:2]]:
            return None
        return cls(whole.grad_fn, make, whole.dtype)

    def tensor(self) -> Tensor:
        """The output, to rounding where its inputs are kept exactly."""
        return self._make(self._node).to(self._kind)


def _layer_norm(node: Any) -> Tensor:
    weight, bias = node._saved_weight, node._saved_bias
    # The node does not keep eps, but what came of it: mean and inverse deviation.
    y = (node._saved_input - node._saved_result1).mul_(node._saved_result2)
    y = y if weight is None else y.mul_(weight)
    return y if bias is None else y.add_(bias)


_RECIPES: dict[str, Callable[[Any], Tensor]] = {
    "GeluBackward0": lambda n: F.gelu(n._saved_self, approximate=n._saved_approximate),
    "SiluBackward0": lambda n: F.silu(n._saved_self),
    "MishBackward0": lambda n: F.mish(n._saved_self),
    "SoftplusBackward0": lambda n: F.softplus(n._saved_self, n._saved_beta, n._saved_threshold),
    "LeakyReluBackward0": lambda n: F.leaky_relu(n._saved_self, n._saved_negative_slope),
    "MulBackward0": lambda n: n._saved_self * n._saved_other,
    "NativeLayerNormBackward0": _layer_norm,
}


# --- the hooks


class Action:
    """What is done with what one module saves; a frozen dataclass."""

    def pack(self, t: Tensor, hooks: Hooks) -> Form | None:
        """Another form for a tensor, or None where this action has none for it."""
        return None


@dataclass(frozen=True)
class Spot:
    """A module at work.

    Attributes:
        name: its dotted name.
        kind: its kind of site.
        actions: those that look at single saved tensors, tried in order.
        label: the action that replaced its forward pass, "" if none did.
    """

    name: str
    kind: str
    actions: tuple[Action, ...] = ()
    label: str = ""


OUTSIDE = Spot("(outside)", "outside")


@dataclass
class Line:
    """Bytes of one site under one action, each storage once, summed over forward passes."""

    plain_bytes: int = 0
    held_bytes: int = 0
    n_tensors: int = 0


@dataclass(eq=False)
class Saved:
    """One tensor that one operation saved; it lives exactly as long as autograd keeps it."""

    form: Form | None
    shape: torch.Size
    watch: Tensor
    version: int


@dataclass(eq=False)
class Hooks:
    """The hooks and their accounts.

    Attributes:
        own: storages of parameters and buffers, which are not counted and stay as they are.
        limit: bytes that may be held at any moment.
        keeping: False only counts: nothing is held, so no backward pass is possible.
        stack: modules at work, the innermost last.
        lines: (site, kind, action) -> bytes.
        notes: what could not be done, and where.
        now_bytes: held now, on the device.
        peak_bytes: held at most.
    """

    own: frozenset[Key]
    limit: Budget | None = None
    keeping: bool = True
    stack: list[Spot] = field(default_factory=list)
    lines: dict[tuple[str, str, str], Line] = field(default_factory=dict)
    notes: Counter[tuple[str, str]] = field(default_factory=Counter)
    now_bytes: int = 0
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self._seen: dict[Key, StorageWeakRef] = {}
        self._counted: dict[Any, StorageWeakRef] = {}
        self._holders: Counter[Key] = Counter()
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._forms: weakref.WeakValueDictionary[Any, Form] = weakref.WeakValueDictionary()
        self._payloads: weakref.WeakValueDictionary[Any, Payload] = weakref.WeakValueDictionary()
        self._sources: dict[Any, StorageWeakRef] = {}
        self._folders: dict[str | None, Folder] = {}
        self._shares: dict[Action, Any] = {}
        self._n_packed, self._seed = 0, 0

    @torch.no_grad()
    def pack(self, t: Tensor) -> Saved:
        """Called by autograd for a tensor that an operation saves."""
        spot = self.stack[-1] if self.stack else OUTSIDE
        form, label = self._form(t, spot)
        line = self.line(spot, label)
        line.n_tensors += 1
        if not spot.label and not isinstance(form, Foreign):
            line.plain_bytes += self.first_sight(t)
        watch = form._t if isinstance(form, Whole | Foreign) else _watcher(t)
        saved = Saved(form, t.shape, watch, t._version)
        if self.keeping:
            self._hold(saved, form, line)
        else:
            self._count(t, form, line)
            saved.form, saved.watch = None, _watcher(t)
        self._check()
        return saved

    @torch.no_grad()
    def unpack(self, saved: Saved) -> Tensor:
        """Called by autograd when it needs the tensor."""
        if saved.watch._version != saved.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a saved tensor of shape {tuple(saved.shape)} is at version "
                f"{saved.watch._version}, expected {saved.version}"
            )
        assert saved.form is not None
        return saved.form.tensor().view(saved.shape)

    def of(self, x: Tensor, name: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> Payload:
        """What was made of this tensor for another operation, or what is made of it now."""
        key = (*self._same(x), name)
        found = self._payloads.get(key) if self._is_current(key) else None
        if found is None:
            found = self._payloads[key] = Payload(make())
            self._sources[key] = StorageWeakRef(x.untyped_storage())
        return found

    def shared(self, t: Tensor, name: str, make: Callable[[], Form]) -> Form:
        """A form of this tensor; one for all operations that save the same numbers."""
        key = (*self._same(t), name)
        found = self._forms.get(key) if self._is_current(key) else None
        if found is None:
            found = self._forms[key] = make()
            self._sources[key] = StorageWeakRef(t.untyped_storage())
        return found

    def would_keep(self, t: Tensor, spot: Spot) -> None:
        """Count a tensor that torch's own operation would have kept in place of this one."""
        self.line(spot).plain_bytes += self.first_sight(t)

    def line(self, spot: Spot, label: str = "") -> Line:
        """The account of a site under its swapped operation, else under an action."""
        return self.lines.setdefault((spot.name, spot.kind, spot.label or label), Line())

    def folder(self, parent: str | None) -> Folder:
        """Where the files of this tape lie."""
        if parent not in self._folders:
            self._folders[parent] = Folder(parent)
        return self._folders[parent]

    def seed_with(self, seed: int) -> None:
        """Begin another series of seeds."""
        self._seed = seed

    def next_seed(self) -> int:
        """A seed that no other operation of this tape has."""
        self._seed += 1
        # The CPU's generator takes 32 bits of its seed; the odd factor spreads neighbours.
        return self._seed * 0x9E3779B1 % (1 << 32)

    def holds(self, t: Tensor) -> bool:
        """Whether another operation keeps this tensor as it is."""
        return self._holders[_key(t)] > 0

    def shares(self, action: Action, make: Callable[[], Any]) -> Any:
        """What the modules under one action have in common for the time of this tape."""
        if action not in self._shares:
            self._shares[action] = make()
        return self._shares[action]

    def take(self, n_bytes: int) -> None:
        """Count bytes that an action holds by itself from now on; negative where it lets go."""
        self.now_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        if n_bytes > 0:
            self._check()

    def first_sight(self, t: Tensor) -> int:
        """Bytes of the storage if it was not counted yet, else 0."""
        key = _key(t)
        known = self._seen.get(key)
        if key in self.own or (known is not None and not known.expired()):
            return 0
        self._seen[key] = StorageWeakRef(t.untyped_storage())
        return t.untyped_storage().nbytes()

    def note(self, site: str, what: str) -> None:
        """Remember for the report what could not be done."""
        self.notes[site, what] += 1

    def _form(self, t: Tensor, spot: Spot) -> tuple[Form, str]:
        if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided:
            return Foreign(t), "keep"
        if t.is_leaf or _key(t) in self.own or not t.is_floating_point() or t.numel() < SMALL:
            return Whole(t), "keep"
        for action in spot.actions:
            form = action.pack(t, self)
            if form is not None:
                if self._holders[_key(t)] and not isinstance(form, Remade):
                    self.note(spot.name, "another operation keeps the original, so nothing is won")
                return form, str(action)
        return Whole(t), "keep"

    def _hold(self, saved: Saved, form: Form, line: Line) -> None:
        storages = {k: n for k, n in form.storages.items() if k not in self.own}
        for key, n_bytes in storages.items():
            if self._holders[key] == 0:
                self.now_bytes += n_bytes
                line.held_bytes += n_bytes
            self._holders[key] += 1
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        number, self._n_packed = self._n_packed, self._n_packed + 1
        self._alive[number] = weakref.ref(saved, partial(self._let_go, number, storages))

    def _count(self, t: Tensor, form: Form, line: Line) -> None:
        """Count as `_hold` would, of a form that dies at once."""
        flat = in_storage_order(t) if isinstance(form, Restrided) else None
        token = _key(t) if isinstance(form, Whole) else self._same(t if flat is None else flat)
        known = self._counted.get(token)
        if known is not None and not known.expired():
            return
        self._counted[token] = StorageWeakRef(t.untyped_storage())
        n_bytes = sum(n for key, n in form.storages.items() if key not in self.own)
        line.held_bytes += n_bytes
        self.now_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _check(self) -> None:
        if self.limit is not None and self.now_bytes > self.limit:
            raise BudgetExceeded(
                f"{readable(self.now_bytes)} of activations are to be kept for the backward pass, "
                f"and the budget is {self.limit}; raise budget=, take smaller batches, or a policy "
                "that keeps less"
            )

    def _let_go(self, number: int, storages: Mapping[Key, int], _: Any) -> None:
        del self._alive[number]
        for key, n_bytes in storages.items():
            self._holders[key] -= 1
            if self._holders[key] == 0:
                del self._holders[key]
                self.now_bytes -= n_bytes

    def _same(self, t: Tensor) -> tuple[Any, ...]:
        """What tensors with the same numbers have in common."""
        place = (t.shape[-1:], t.numel()) if t.is_contiguous() else (t.shape, t.stride())
        return (*_key(t), t._version, t.storage_offset(), t.dtype, place)

    def _is_current(self, key: Any) -> bool:
        source = self._sources.get(key)
        # The address may have been given out again.
        return source is not None and not source.expired()


def _key(t: Tensor) -> Key:
    return str(t.device), t.untyped_storage().data_ptr()


def _watcher(t: Tensor) -> Tensor:
    """An empty tensor that shares the version of `t`, and so tells of in-place changes."""
    watch = t.detach()
    watch.data = t.new_empty(0)
    return watch


def own_storages(model: nn.Module) -> frozenset[Key]:
    """Storages of the parameters and buffers of a model."""
    return frozenset(
        _key(t)
        for t in [*model.parameters(), *model.buffers()]
        if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided
    )
