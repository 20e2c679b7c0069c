"""How many bytes a training step takes: at its highest moment, for its backward, and to stay.

Three rulers, each for the question that it answers exactly:

- `peak`: the highest level above the start. On a CPU it is the running sum of the memory events of
  `torch.profiler`, on CUDA the allocator's own counters. Resident set size and `tracemalloc` answer
  another question: freed pages are reused, and tensors are not Python objects.
- `saved`: what autograd keeps for the backward pass, by module and operation.
- `persistent`: parameters, buffers, gradients and optimizer states, counted in storages, so that
  views and tied weights count once.

`measure` takes all three of one step. Run a step unmeasured first: the first one also allocates
gradients and lazy optimizer states, and chooses kernels.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function

from memwise.budget import Ledger, readable
from memwise.errors import InvalidKnob, MemwiseError

DeviceLike = str | torch.device

_N_PRINTED = 24  # sites, as many as a screen shows
OUTSIDE = "(outside the model)"
_STEP, _REST = "optimizer step", "rest"
_MARK, _FREED, _MEMORY = "memwise.measure: ", "memwise.measure freed: ", "[memory]"

# The profiler and CUDA's peak counter exist once in a process, and a second user of either makes
# the first one's figures silently wrong.
_RULER_IN_USE = Lock()


# --- the highest moment


@dataclass(frozen=True, slots=True)
class Peak:
    """What a piece of work did to the memory of one device.

    Attributes:
        peak_bytes: the highest level above the level at the start.
        kept_bytes: the level at the end above the level at the start; negative where more was freed
            than made.
        largest_bytes: the largest single allocation; None on CUDA, which does not record it.
    """

    peak_bytes: int
    kept_bytes: int
    largest_bytes: int | None

    def __str__(self) -> str:
        largest = "" if self.largest_bytes is None else f", largest {readable(self.largest_bytes)}"
        return f"peak {readable(self.peak_bytes)}, kept {readable(self.kept_bytes)}{largest}"


def peak(fn: Callable[[], object], *, device: DeviceLike = "cpu") -> Peak:
    """Run `fn` once and measure the memory that it took above what was there before.

    What `fn` returns is still alive when `kept_bytes` is read: a forward pass that returns its loss
    keeps its activations. `fn` may be a whole training step or only `optimizer.step`.

    Note:
        Blind on a CPU to what does not come from torch's allocator (LAPACK workspaces, half of the
        peak of an SVD; numpy; Python objects), to threads that `fn` starts in Python, and to the
        freeing of older memory that no Python object reaches: where the forward pass was run
        before, its activations are not seen to go. On CUDA the allocator's peak statistic is reset.

    Args:
        fn: the work.
        device: "cpu", or a CUDA device.

    Raises:
        InvalidKnob: the device is not one that can be measured here.
        MemwiseError: a measurement or another profiler is already running.
    """
    with _ruler(torch.device(device)) as ruler:
        result = fn()
    del result
    return _from_start(ruler.spans())


class _Span(NamedTuple):
    """Levels in bytes, from one mark to the next, all from the same zero."""

    label: str
    start: int
    top: int
    end: int
    largest: int | None


class _Ruler(Protocol):
    def mark(self, label: str) -> None:
        """Begin a span of this name where the work stands now."""

    def spans(self) -> list[_Span]:
        """All spans in order, once the work is over."""


def _from_start(spans: Sequence[_Span]) -> Peak:
    start = spans[0].start
    return Peak(max(span.top for span in spans) - start, spans[-1].end - start, _largest(spans))


def _each_from_its_start(spans: Sequence[_Span]) -> Peak:
    highest = max(span.top - span.start for span in spans)
    return Peak(highest, sum(span.end - span.start for span in spans), _largest(spans))


def _largest(spans: Sequence[_Span]) -> int | None:
    return max((span.largest for span in spans if span.largest is not None), default=None)


@contextmanager
def _ruler(device: torch.device) -> Iterator[_Ruler]:
    if device.type not in ("cpu", "cuda"):
        raise InvalidKnob(f"device {str(device)!r} cannot be measured; use 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidKnob(f"device {str(device)!r} is not here: torch sees no CUDA; use 'cpu'")
    if not _RULER_IN_USE.acquire(blocking=False):
        raise MemwiseError(
            "a measurement is already running in this process and a second one would spoil its "
            "figures; measure one after the other"
        )
    try:
        # Cycles that an earlier call left would be freed in the middle and hide the peak.
        gc.collect()
        if device.type == "cuda":
            allocator = _CudaRuler(device)
            yield allocator
            allocator.mark(_REST)
        else:
            with _ProfilerRuler() as events:
                yield events
    finally:
        _RULER_IN_USE.release()


class _ProfilerRuler:
    """The running sum of the profiler's memory events: each allocation and each free.

    The profiler does not know the size of blocks that were made before it started, and says nothing
    when they are freed. So each storage that Python knows of is watched until it dies.
    """

    def __enter__(self) -> _ProfilerRuler:
        if torch.autograd._profiler_enabled():
            raise MemwiseError(
                "a torch profiler is already running and two of them lose all events; "
                "measure outside of it"
            )
        self._older = [
            weakref.ref(storage, partial(_note_freed, storage.data_ptr(), storage.nbytes()))
            for storage in _storages_of_python()
        ]
        # Kineto tells of its starts and stops on stderr, at whatever level it reads once.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        self.mark(_REST)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.mark(_REST)
        self._profile.__exit__(kind, error, trace)
        self._older.clear()

    def mark(self, label: str) -> None:
        with record_function(_MARK + label):
            pass

    def spans(self) -> list[_Span]:
        found: list[_Span] = []
        for label, changes in self._changes():
            level = top = start = found[-1].end if found else 0
            for change in changes:
                level += change
                top = max(top, level)
            found.append(_Span(label, start, top, level, max([0, *changes])))
        return found[:-1]  # the last mark is the end

    def _changes(self) -> list[tuple[str, list[int]]]:
        """Each mark with the changes in bytes up to the next one."""
        events = self._events()
        first: dict[int, int] = {}
        for event in events:
            if event.name == _MEMORY:
                first.setdefault(event.extra_fields.ptr, event.extra_fields.alloc_size)

        marked: list[tuple[str, list[int]]] = []
        for event in events:
            if event.name.startswith(_MARK):
                marked.append((event.name.removeprefix(_MARK), []))
            elif event.name.startswith(_FREED) and marked:
                address, n_bytes = map(int, event.name.removeprefix(_FREED).split())
                # A block of an earlier measurement: its free is an event of its own.
                if first.get(address, 0) >= 0:
                    marked[-1][1].append(-n_bytes)
            elif event.name == _MEMORY and marked and event.extra_fields.device.type == "cpu":
                marked[-1][1].append(event.extra_fields.alloc_size)
        if len(marked) < 2:
            raise MemwiseError(
                "another torch profiler ran during the measurement and took its events; "
                "measure without it"
            )
        return marked

    def _events(self) -> list[Any]:
        results: Any = self._profile.profiler.kineto_results if self._profile.profiler else None
        waiting = [] if results is None else results.experimental_event_tree()[::-1]
        found = []
        while waiting:
            event = waiting.pop()
            found.append(event)
            waiting.extend(reversed(event.children))
        return sorted(found, key=lambda event: event.start_time_ns)


def _storages_of_python() -> Iterator[torch.UntypedStorage]:
    """Yield the storages on the host of all tensors that are alive, and of their gradients."""
    # By exact type: others carry their bytes in tensors of these, or have none to show.
    tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    seen: set[int] = set()
    for tensor in (*tensors, *gradients):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            continue
        storage = tensor.untyped_storage()
        # Fixed ones lie in memory of numpy or of a file, which the profiler does not count either.
        if storage.data_ptr() not in seen and storage.nbytes() and storage.resizable():
            seen.add(storage.data_ptr())
            yield storage


def _note_freed(address: int, n_bytes: int, _: weakref.ref[torch.UntypedStorage]) -> None:
    with record_function(f"{_FREED}{address} {n_bytes}"):
        pass


class _CudaRuler:
    """The allocator's counters, read and reset at each mark."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[_Span] = []
        self._begin(_REST)

    def mark(self, label: str) -> None:
        top = torch.cuda.max_memory_allocated(self._device)
        end = torch.cuda.memory_allocated(self._device)
        self._spans.append(_Span(self._label, self._start, top, end, None))
        self._begin(label)

    def spans(self) -> list[_Span]:
        return self._spans

    def _begin(self, label: str) -> None:
        self._label = label
        torch.cuda.reset_peak_memory_stats(self._device)
        self._start = torch.cuda.memory_allocated(self._device)


# --- what is held for the backward pass


@dataclass(frozen=True, slots=True)
class Site:
    """One place that saves tensors for the backward pass.

    Attributes:
        module: dotted name of the innermost module at work; "" is the model itself.
        op: the torch function that saved, or the name of a custom autograd Function.
        held_bytes: storages that this site was the first to save.
        shared_bytes: storages that it saved after another site had: compressing them here frees
            nothing while the other still holds them.
        n_tensors: saved tensors, parameters and buffers among them.
    """

    module: str
    op: str
    held_bytes: int
    shared_bytes: int
    n_tensors: int


@dataclass(frozen=True, slots=True)
class Saved:
    """What autograd held at the moment it held most; for one forward pass, after it.

    Attributes:
        sites: in the order in which they first saved.
    """

    sites: tuple[Site, ...]

    @property
    def held_bytes(self) -> int:
        """Bytes of all sites, each storage once, parameters and buffers not counted."""
        return sum(site.held_bytes for site in self.sites)

    def by_op(self) -> dict[str, int]:
        """Bytes held by each operation, largest first."""
        return _summed((site.op, site.held_bytes) for site in self.sites)

    def by_module(self) -> dict[str, int]:
        """Bytes held by each module itself, without its children, largest first."""
        return _summed((site.module, site.held_bytes) for site in self.sites)

    def __str__(self) -> str:
        ordered = sorted(self.sites, key=lambda site: -site.held_bytes)
        rows = [
            (
                site.module or "(model)",
                site.op,
                *map(readable, (site.held_bytes, site.shared_bytes)),
            )
            for site in ordered[:_N_PRINTED]
        ]
        if len(ordered) > _N_PRINTED:
            rest = sum(site.held_bytes for site in ordered[_N_PRINTED:])
            rows.append((f"{len(ordered) - _N_PRINTED} more sites", "", readable(rest), ""))
        rows.append(("all", "", readable(self.held_bytes), ""))
        return _table(("module", "op", "held", "held elsewhere"), rows, n_words=2)


def saved(model: nn.Module, fn: Callable[[], object]) -> Saved:
    """Run `fn` once and list what autograd keeps for its backward pass.

    `fn` is a forward pass that returns its outputs, or one with its backward pass. Storages of the
    model's parameters and buffers are not counted, views of them included; the batch is, where an
    operation keeps it.

    Note:
        Blind to tensors that a custom Function puts on its `ctx` instead of through
        `save_for_backward`, and to what inner hooks keep in their own way (checkpointing,
        `save_on_cpu`, compressed activations); `peak(forward).kept_bytes` sees them all. While it
        watches, autograd does not notice that a saved tensor was changed in place. Where several
        tensors share a storage, the whole storage counts.
    """
    with _watched(model) as tape:
        result = fn()
        found = tape.saved()
    del result
    return found


class _Storage(NamedTuple):
    device: str
    address: int
    n_bytes: int
    tier: str | None  # None = the device that holds the tensor

    @property
    def key(self) -> tuple[str, int]:
        return self.device, self.address


class _Held:
    """A saved tensor; it lives exactly as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Entry(NamedTuple):
    alive: weakref.ref[_Held]
    module: str
    op: str
    storages: tuple[_Storage, ...]


class _Tape:
    """Follows the saved tensors of one model from packing to release."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {storage.key for storage in _carried([*model.parameters(), *model.buffers()])}
        self._entries: dict[int, _Entry] = {}
        self._holders: Counter[tuple[str, int]] = Counter()
        self._n_packed = self._now = self._top = 0
        self._at_top = False
        self._sites: tuple[Site, ...] = ()
        self.modules: list[str] = []
        self.ops: list[str] = []

    def saved(self) -> Saved:
        if self._at_top:
            self._sites = self._by_site()
        return Saved(self._sites)

    def pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        storages = tuple(storage for storage in _carried([tensor]) if storage.key not in self._own)
        for storage in storages:
            if self._holders[storage.key] == 0:
                self._now += storage.n_bytes
            self._holders[storage.key] += 1

        op = _custom_function() or (self.ops[-1] if self.ops else "")
        module = self.modules[-1] if self.modules else OUTSIDE
        alive = weakref.ref(held, partial(self._released, self._n_packed))
        self._entries[self._n_packed] = _Entry(alive, module, op, storages)
        self._n_packed += 1
        if self._now > self._top:
            self._top, self._at_top = self._now, True
        return held

    def unpack(self, held: _Held) -> Tensor:
        return held.tensor

    def _released(self, number: int, _: weakref.ref[_Held]) -> None:
        if self._at_top:
            self._sites, self._at_top = self._by_site(), False
        for storage in self._entries.pop(number).storages:
            self._holders[storage.key] -= 1
            if self._holders[storage.key] == 0:
                self._now -= storage.n_bytes

    def _by_site(self) -> tuple[Site, ...]:
        held: Counter[tuple[str, str]] = Counter()
        shared: Counter[tuple[str, str]] = Counter()
        n_tensors: Counter[tuple[str, str]] = Counter()
        first: dict[tuple[str, int], tuple[str, str]] = {}
        for entry in self._entries.values():
            here = entry.module, entry.op
            n_tensors[here] += 1
            for storage in entry.storages:
                seen = storage.key in first
                if not seen:
                    held[here] += storage.n_bytes
                elif first[storage.key] != here:
                    shared[here] += storage.n_bytes
                first.setdefault(storage.key, here)
        return tuple(Site(*at, held[at], shared[at], n) for at, n in n_tensors.items())


class _OpNames(TorchFunctionMode):
    """Keeps the name of the torch function at work on top of a stack."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._names.append(func.__name__.strip("_"))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._names.pop()


_APPLY_CODE = torch.autograd.Function.apply.__code__


def _custom_function() -> str:
    """Name of the custom Function whose `apply` called the hook that called this, or ""."""
    # Its tensors are packed after its forward has returned, by C code directly under `apply`.
    frame = sys._getframe(2)
    if frame is None or frame.f_code is not _APPLY_CODE:
        return ""
    return str(frame.f_locals["cls"].__name__).strip("_")


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Tape]:
    tape = _Tape(model)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(_pusher(tape.modules, name), prepend=True)
            # Also where it raises: recomputation ends its last forward pass in that way.
            leave = module.register_forward_hook(_popper(tape.modules), always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(saved_tensors_hooks(tape.pack, tape.unpack))
        stack.enter_context(_OpNames(tape.ops))
        yield tape


def _pusher(names: list[str], name: str) -> Callable[[nn.Module, Any], None]:
    def push(module: nn.Module, inputs: Any) -> None:
        names.append(name)

    return push


def _popper(names: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def pop(module: nn.Module, inputs: Any, outputs: Any) -> None:
        names.pop()

    return pop


# --- what stays


def persistent(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    device: DeviceLike | None = None,
    ledger: Ledger | None = None,
) -> Ledger:
    """State in a ledger which bytes stay between steps.

    The kinds are "parameters" (those of the optimizer too), "buffers", "gradients",
    "optimizer states" (every tensor that the optimizer reaches, however nested) and "attributes"
    (what modules and parameters keep beside these, compressed weights for example). Each storage
    counts once, under the first kind that has it; tensor subclasses count with their inner tensors.
    Numpy arrays and `bytes` count as well, since compressed things live in them.

    Note:
        Blind to what only a closure or an object outside Python reaches.

    Args:
        model: whose parameters, buffers, gradients and attributes to count.
        optimizer: whose states to count.
        device: what the tier "device" means, by default the device of the model's first parameter.
            Tensors that are mapped from a file are on "disk", all others in "host".
        ledger: where to write; by default a new one.

    Raises:
        BudgetExceeded: they do not fit the ledger's budget.
    """
    book = Ledger() if ledger is None else ledger
    _state(book, _persistent_rows(model, optimizer, _device(model, device)))
    return book


def bytes_of(value: object) -> int:
    """Bytes of all tensors, arrays and `bytes` reachable from `value`, each storage once."""
    unique = {storage.key: storage.n_bytes for storage in _storages(value)}
    return sum(unique.values())


_Rows = dict[tuple[str, str], int]


def _persistent_rows(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device
) -> _Rows:
    owned = list(model.parameters())
    if optimizer is not None:
        owned += [weight for group in optimizer.param_groups for weight in group["params"]]
    gradients = [weight.grad for weight in owned if weight.grad is not None]

    # The optimizer reaches the attributes of its parameters too, so its states come last.
    kinds: dict[str, Iterable[_Storage]] = {
        "parameters": _carried(owned),
        "buffers": _carried(model.buffers()),
        "gradients": _carried(gradients),
        "attributes": _storages([model, owned]),
        "optimizer states": _storages({} if optimizer is None else vars(optimizer)),
    }
    rows: _Rows = {}
    claimed: set[tuple[str, int]] = set()
    for kind, storages in kinds.items():
        rows["device", kind] = 0
        for storage in storages:
            if storage.key in claimed:
                continue
            claimed.add(storage.key)
            tier = storage.tier or ("device" if storage.device == device.type else "host")
            rows[tier, kind] = rows.get((tier, kind), 0) + storage.n_bytes
    return rows


def _state(ledger: Ledger, rows: _Rows) -> None:
    # What left a tier goes first: a step that moves bytes must not look as if it held them twice.
    gone = [(tier, kind) for tier, kind, *_ in ledger if kind in {kind for _, kind in rows}]
    lines = dict.fromkeys(gone, 0) | rows
    for (tier, kind), n_bytes in sorted(lines.items(), key=lambda row: row[1] - ledger[row[0]]):
        ledger.set(tier, kind, n_bytes)


def _device(model: nn.Module, device: DeviceLike | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _storages(value: object) -> Iterator[_Storage]:
    """Yield the storages of every tensor, array and `bytes` reachable from `value`."""
    # Holding what was seen keeps its `id` from being given to something else.
    seen: dict[int, object] = {}
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            yield from _carried([item])
        elif isinstance(item, (np.ndarray, bytes, bytearray)):
            yield _host_storage(item)
        waiting.extend(_parts(item))


def _parts(item: object) -> Iterator[object]:
    """Yield what `item` holds: its elements, else its attributes."""
    if isinstance(item, (type, ModuleType, str, bytes, bytearray, np.ndarray)):
        return
    if isinstance(item, Mapping):
        yield from item.values()
    if isinstance(item, (list, tuple, set, frozenset, deque)):
        yield from item
    yield from getattr(item, "__dict__", {}).values()
    for base in type(item).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(item, name, None)


def _carried(tensors: Iterable[Tensor]) -> Iterator[_Storage]:
    """Yield the storages that carry the values of tensors, whatever is attached to them."""
    for tensor in tensors:
        inner = _inner(tensor)
        yield from _carried(inner)
        if inner or tensor.is_meta:
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes():
            tier = None if storage.filename is None else "disk"
            yield _Storage(storage.device.type, storage.data_ptr(), storage.nbytes(), tier)


def _inner(tensor: Tensor) -> list[Tensor]:
    """The tensors that carry the bytes of one without a storage of its own."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def _host_storage(value: np.ndarray[Any, Any] | bytes | bytearray) -> _Storage:
    if not isinstance(value, np.ndarray):
        return _Storage("cpu", id(value), len(value), None)
    tier = None
    while True:
        tier = "disk" if isinstance(value, np.memmap) else tier
        if not isinstance(value.base, np.ndarray):
            return _Storage("cpu", value.ctypes.data, value.nbytes, tier)
        value = value.base


# --- all of it


@dataclass(init=False)
class Report:
    """What one step took; complete once the `with` block of `measure` has ended.

    Attributes:
        peak: the whole step, above the level at its start; gradients that it made are in it.
        optimizer_peak: the optimizer's part, above the level where it began; with several calls the
            highest of them; None where the optimizer did not step.
        saved: what autograd held for the backward pass.
        ledger: what stays, by kind, now and at its peak. The line "transient" is what the step took
            above its start, so `ledger.peak("device")` is all that the step needed at one moment,
            the caller's batch excepted.
    """

    peak: Peak
    optimizer_peak: Peak | None
    saved: Saved
    ledger: Ledger

    def __getattr__(self, name: str) -> Any:
        # Reached only while the fields above are not set.
        if name in type(self).__dataclass_fields__:
            raise AttributeError(f"{name!r} is not known yet: read it after the `with` block")
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def __str__(self) -> str:
        parts = [("step", self.peak)]
        if self.optimizer_peak is not None:
            parts.append((_STEP, self.optimizer_peak))
        rows = [
            (name, readable(part.peak_bytes), readable(part.kept_bytes), _or_dash(part))
            for name, part in parts
        ]
        moments = _table(("above the start", "peak", "kept", "largest"), rows, n_words=1)
        return f"{moments}\n\n{self.saved}\n\n{self.ledger}"


@contextmanager
def measure(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    device: DeviceLike | None = None,
    ledger: Ledger | None = None,
) -> Iterator[Report]:
    """Measure one training step: its peak, what it saves by site, and what stays after it.

        with measure(model, optimizer) as report:
            train_step()
        print(report)

    Everything that `peak`, `saved` and `persistent` say about themselves holds here.

    Args:
        model: the model that is trained.
        optimizer: its optimizer, to tell its part of the step and to count its states.
        device: what to measure, by default the device of the model's first parameter.
        ledger: where to report what stays; by default a new one.

    Raises:
        InvalidKnob: the device is not one that can be measured here.
        MemwiseError: a measurement or another profiler is already running.
        BudgetExceeded: the step needed more than the ledger's budget.
    """
    where = _device(model, device)
    moments = [_persistent_rows(model, optimizer, where)]
    report = Report()
    with _watched(model) as tape, _ruler(where) as ruler, ExitStack() as hooks:

        def note(label: str) -> None:
            moments.append(_persistent_rows(model, optimizer, where))
            ruler.mark(label)

        if optimizer is not None:
            before = optimizer.register_step_pre_hook(lambda *_: note(_STEP))
            after = optimizer.register_step_post_hook(lambda *_: note(_REST))
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield report
    moments.append(_persistent_rows(model, optimizer, where))

    spans = ruler.spans()
    steps = [span for span in spans if span.label == _STEP]
    report.peak = _from_start(spans)
    report.optimizer_peak = _each_from_its_start(steps) if steps else None
    report.saved = tape.saved()
    report.ledger = Ledger() if ledger is None else ledger
    _replay(report.ledger, moments, report.peak)


def _replay(ledger: Ledger, moments: Sequence[_Rows], highest: Peak) -> None:
    """Write the moments of a step in order, its highest one on top of the first."""
    _state(ledger, moments[0])
    ledger.set("device", "transient", highest.peak_bytes)
    ledger.release("device", "transient")
    for rows in moments[1:]:
        _state(ledger, rows)


# --- printing


def _summed(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for name, n_bytes in pairs:
        sums[name] += n_bytes
    return dict(sums.most_common())


def _or_dash(part: Peak) -> str:
    return "-" if part.largest_bytes is None else readable(part.largest_bytes)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, n_words: int) -> str:
    """Columns side by side, the first `n_words` to the left, numbers to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = (
        "  ".join(
            cell.ljust(width) if at < n_words else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(text.rstrip() for text in texts)
