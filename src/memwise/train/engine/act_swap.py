"""Swapping by tokens: of what a block saves, some tokens wait elsewhere, the others are made again.

Nearly all that a transformer block saves is token-wise: a row follows from the same row of the
block's input and of the attention's output. Those two are moved away whole; of everything else the
rows of the first tokens are moved, and the rows of the last ones dropped and computed again, by
running the block on these tokens alone with the attention's output put in its place.

Shapes: B batch, T tokens, M tokens that are moved, R = T - M that are made again, S numbers from
one token to the next in a storage, L parts of a storage that hold T tokens each.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from memwise.errors import InvalidKnob, UnsupportedModel
from memwise.train.engine.act_actions import Run, Wrap, steady
from memwise.train.engine.act_hooks import SMALL, Hooks, Key, Spot, _key, _watcher

Move = tuple[Callable[[Sequence[Tensor]], None], list[Tensor]]
STORES = ("disk", "host")
_N_TRIED = 2  # tokens that are made again at once, to see whether a block can be


@dataclass(frozen=True)
class TokenSwap(Wrap):
    """Moves what a block saves to another tier, by tokens, and makes the other tokens again.

    Attributes:
        alpha: share of the tokens whose rows are moved; None = as many as the link carries while
            one block is computed, measured at the first block.
        store: "disk" or "host".
        folder: where files are made; None = the system's folder for temporary files.
        room_bytes: of the store, for one block; None sets no limit.
    """

    alpha: float | None = None
    store: str = "disk"
    folder: str | None = None
    room_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuses shares outside of [0, 1] and unknown stores."""
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InvalidKnob(f"alpha={self.alpha!r}: a share of the tokens lies in [0, 1]")
        if self.store not in STORES:
            raise InvalidKnob(f"store={self.store!r}: use one of {', '.join(STORES)}")

    def wrap(self, module: nn.Module, run: Run, spot: Spot, hooks: Hooks) -> Run:
        """The block's forward pass, with its saved tensors on their way when it ends."""
        traffic: Traffic = hooks.shares(self, lambda: Traffic(self, hooks))

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return run(*args, **kwargs)
            if self.store == "host" and next(module.parameters()).device.type == "cpu":
                hooks.note(spot.name, "is on the host")
                return run(*args, **kwargs)
            return traffic.through(module, run, spot, args, kwargs)

        return forward

    def __str__(self) -> str:
        share = "measured share" if self.alpha is None else f"{self.alpha:g}"
        return f"swap {share} of tokens to {self.store}"


# --- the other tier


class Place(Protocol):
    """Room for the rows of one tensor, outside of the device."""

    n_bytes: int

    def write(self, rows: Sequence[Tensor]) -> None:
        """Take pieces of memory without gaps."""

    def read(self, rows: Sequence[Tensor]) -> None:
        """Give them back into the same number of pieces."""


class _File:
    def __init__(self, path: Path) -> None:
        self._path, self.n_bytes = path, 0
        weakref.finalize(self, path.unlink, missing_ok=True)

    def write(self, rows: Sequence[Tensor]) -> None:
        with self._path.open("wb") as file:
            for row in rows:
                self.n_bytes += file.write(_raw(row).cpu().numpy().data)

    def read(self, rows: Sequence[Tensor]) -> None:
        with self._path.open("rb") as file:
            for row in rows:
                here = row if row.device.type == "cpu" else torch.empty_like(row, device="cpu")
                file.readinto(_raw(here).numpy().data)
                if here is not row:
                    row.copy_(here)


class _Pinned:
    """Host memory; of a model that lies there itself it is a copy, which saves nothing."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self.n_bytes = 0

    def write(self, rows: Sequence[Tensor]) -> None:
        for row in rows:
            copy = torch.empty(row.shape, dtype=row.dtype, pin_memory=row.is_cuda)
            self._rows.append(copy.copy_(row, non_blocking=True))
            self.n_bytes += copy.nbytes

    def read(self, rows: Sequence[Tensor]) -> None:
        for row, copy in zip(rows, self._rows, strict=True):
            row.copy_(copy, non_blocking=True)


def _raw(row: Tensor) -> Tensor:
    return row.detach().view(torch.uint8)


# --- what is on its way


@dataclass(eq=False)
class _Held:
    """One storage that operations of a block saved, wherever it is at the moment.

    Attributes:
        flat: all of its numbers, where they lie on the device.
        like: an empty tensor of its type and device.
        n: numbers.
        n_bytes: of it on the device.
        step: S; None where it is moved whole.
        place: where its rows wait.
        coming: the reading of them.
        on_device: its bytes there, in a list that outlives it.
    """

    flat: Tensor | None
    like: Tensor
    n: int
    n_bytes: int
    step: int | None = None
    place: Place | None = None
    coming: Future[None] | None = None
    on_device: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, t: Tensor, hooks: Hooks) -> _Held:
        flat = _flat(t)
        held = cls(flat, t.new_empty(0), flat.numel(), flat.nbytes)
        hooks.take(held.n_bytes)
        held.on_device = on_device = [held.n_bytes]
        weakref.finalize(held, lambda: hooks.take(-on_device[0])).atexit = False
        return held

    def rows(self, n_tokens: int, n_moved: int) -> list[Tensor]:
        """The pieces of the storage that are moved."""
        assert self.flat is not None
        if self.step is None:
            return [self.flat]
        return [part[: n_moved * self.step] for part in self.flat.view(-1, n_tokens * self.step)]

    def leaves(self, hooks: Hooks) -> None:
        """The device has it no longer."""
        self.flat = None
        hooks.take(-self.on_device[0])
        self.on_device[0] = 0

    def returns(self, hooks: Hooks) -> None:
        """Room for it on the device."""
        self.flat = self.like.new_empty(self.n)
        self.on_device[0] = self.n_bytes
        hooks.take(self.n_bytes)


@dataclass(eq=False)
class _Saved:
    """One saved tensor: a view of what is held. It lives as long as autograd keeps it."""

    layer: _Layer
    held: _Held
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    watch: Tensor
    version: int

    def tensor(self) -> Tensor:
        assert self.held.flat is not None
        return self.held.flat.as_strided(self.shape, self.stride, self.offset)


@dataclass(eq=False)
class _Layer:
    """One call of a block.

    Attributes:
        order: what was saved, in order; None for what the tape keeps itself.
        attended: of each attention, where in the order it begins and ends, and its output.
        anchors: what the other rows are made from; these stay until the last of them is used.
    """

    module: nn.Module
    run: Run
    args: Any
    kwargs: Any
    state: _State
    x: Any = None
    order: list[weakref.ref[_Saved] | None] = field(default_factory=list)
    given: dict[int, int] = field(default_factory=dict)  # place in the order -> q, k or v
    attended: list[tuple[int, int, _Saved]] = field(default_factory=list)
    anchors: list[_Held] = field(default_factory=list)
    held: weakref.WeakValueDictionary[Any, _Held] = field(
        default_factory=weakref.WeakValueDictionary
    )
    n_tokens: int = 0
    n_moved: int = 0
    before: weakref.ref[_Layer] | None = None
    whole: bool = True  # nothing has left yet, or all is back


@dataclass(frozen=True)
class _State:
    """What a pass depends on beside its inputs."""

    device: str
    autocast: bool
    low: torch.dtype

    @classmethod
    def now(cls, device: str) -> _State:
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    @contextmanager
    def again(self, module: nn.Module) -> Iterator[None]:
        """The same once more; random numbers and buffers are left as they are."""
        devices = sorted({t.device.index for t in module.parameters() if t.is_cuda})
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.random.fork_rng(devices=devices))
            stack.enter_context(steady(module))
            stack.enter_context(torch.autocast(self.device, dtype=self.low, enabled=self.autocast))
            yield


class Traffic:
    """All swapping of one tape: at most two blocks are on the device, beside the one at work.

    A thread of its own moves rows, so that the next block is computed meanwhile. The last block
    that ran is not moved at all, since it is needed first.

    Attributes:
        alpha: share of tokens that is moved, once it is known.
        moved_bytes: written to the store so far.
        again_rows: tokens that were made again so far, summed over blocks.
    """

    def __init__(self, action: TokenSwap, hooks: Hooks) -> None:
        self._action, self._hooks = action, hooks
        self.alpha = action.alpha
        self.moved_bytes = self.again_rows = 0
        self._pool = ThreadPoolExecutor(1, "memwise-swap")
        self._stream: Any = None
        self._last: weakref.ref[_Layer] | None = None
        self._leaving: tuple[Future[None] | None, weakref.ref[_Layer]] | None = None

    # --- forward

    def through(self, module: nn.Module, run: Run, spot: Spot, args: Any, kwargs: Any) -> Any:
        """Run a block and send off what it saved."""
        x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if x is None or x.ndim != 3 or x.shape[1] <= _N_TRIED:
            raise UnsupportedModel(
                f"{spot.name} takes {'no tensor' if x is None else tuple(x.shape)}: rows of tokens "
                f"can be swapped in blocks whose first input is (batch, more than {_N_TRIED} "
                "tokens, width)"
            )
        layer = _Layer(module, run, args, kwargs, _State.now(x.device.type))
        layer.n_tokens, layer.before = x.shape[1], self._last
        began = self._clock(x)
        with saved_tensors_hooks(self._packing(layer, spot), self._unpack), _Watching(self, layer):
            y = run(*args, **kwargs)
        seconds = self._clock(x) - began
        if layer.order:
            self._send(layer, x, spot, seconds)
        return y

    def _clock(self, x: Tensor) -> float:
        if self.alpha is None and x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter()

    def _packing(self, layer: _Layer, spot: Spot) -> Callable[[Tensor], Any]:
        line = self._hooks.line(spot, str(self._action))

        def pack(t: Tensor) -> Any:
            if type(t) not in (Tensor, nn.Parameter) or t.is_leaf or t.numel() < SMALL or (
                t.layout != torch.strided or not t.is_floating_point() or _key(t) in self._hooks.own
            ):  # fmt: skip
                layer.order.append(None)
                return self._hooks.pack(t)
            line.n_tensors += 1
            line.plain_bytes += self._hooks.first_sight(t)
            saved = self._saved(layer, t)
            layer.order.append(weakref.ref(saved))
            return saved

        return pack

    def _saved(self, layer: _Layer, t: Tensor) -> _Saved:
        key: tuple[Key, int, torch.dtype] = (_key(t), t._version, t.dtype)
        held = layer.held.get(key)
        if held is None:
            held = layer.held[key] = _Held.of(t, self._hooks)
        return _Saved(
            layer, held, t.shape, t.stride(), int(t.storage_offset()), _watcher(t), t._version
        )

    def attend(self, layer: _Layer, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Attention mixes tokens: its output is an anchor, and only its inputs are made again."""
        start = len(layer.order)
        out: Tensor = func(*args, **kwargs)
        inputs = _qkv(args, kwargs)
        for i in range(start, len(layer.order)):
            ref = layer.order[i]
            saved = None if ref is None else ref()
            if saved is None:
                continue
            mine = (saved.offset, saved.stride, saved.shape)
            for which, t in enumerate(inputs):
                same = mine == (t.storage_offset(), t.stride(), t.shape)
                if same and saved.held is layer.held.get((_key(t), t._version, t.dtype)):
                    layer.given[i] = which
        layer.attended.append((start, len(layer.order), self._saved(layer, out)))
        return out

    @torch.no_grad()
    def _send(self, layer: _Layer, x: Tensor, spot: Spot, seconds: float) -> None:
        layer.x = self._saved(layer, x), x.requires_grad
        for saved in (layer.x[0], *(out for _, _, out in layer.attended)):
            saved.layer = None  # or it would keep itself alive
            layer.anchors.append(saved.held)
        layer.args, layer.kwargs = _without(layer.args, x), _without(layer.kwargs, x)
        if self.alpha != 1 or self._action.room_bytes is not None:
            self._try(layer, spot)
        held = list(layer.held.values())
        layer.n_moved = self._n_moved(layer, held, seconds)
        self._let_leave()
        job = None
        if self._hooks.keeping:
            job = self._submit(layer, held)
        self._leaving = job, weakref.ref(layer)
        self._last = weakref.ref(layer)

    def _submit(self, layer: _Layer, held: list[_Held]) -> Future[None]:
        moves: list[Move] = []
        for one in held:
            one.place = self._new_place()
            moves.append((one.place.write, one.rows(layer.n_tokens, layer.n_moved)))
        return self._pool.submit(self._carry, moves, self._now())

    def _let_leave(self) -> None:
        """Wait until the block before is written, then free it."""
        if self._leaving is None:
            return
        job, ref = self._leaving
        self._leaving = None
        if job is not None:
            job.result()
        layer = ref()
        if layer is None:
            return
        layer.whole = False
        for one in list(layer.held.values()):
            if one.place is not None:
                self.moved_bytes += one.place.n_bytes
            one.leaves(self._hooks)

    def _new_place(self) -> Place:
        if self._action.store == "disk":
            return _File(self._hooks.folder(self._action.folder).new())
        return _Pinned()

    def _n_moved(self, layer: _Layer, held: list[_Held], seconds: float) -> int:
        """M: what the link carries while a block is computed, and what the store has room for."""
        fixed = sum(one.n_bytes for one in held if one.step is None)
        others = sum(one.n_bytes for one in held if one.step is not None)
        if self.alpha is None and self._hooks.keeping:
            place, began = self._new_place(), time.perf_counter()
            rows = [one.flat for one in held if one.step is None and one.flat is not None]
            self._carry([(place.write, rows)], self._now())
            per_second = fixed / (time.perf_counter() - began)
            self.alpha = _share(per_second * seconds - fixed, others)
        alpha = 1.0 if self.alpha is None else self.alpha
        if self._action.room_bytes is not None:
            alpha = min(alpha, _share(self._action.room_bytes - fixed, others))
        return round(alpha * layer.n_tokens)

    # --- moving

    def _now(self) -> Any:
        """Where the device stands, for the thread to begin after."""
        if not torch.cuda.is_available():
            return None
        return torch.cuda.current_stream().record_event()

    def _carry(self, moves: list[Move], after: Any) -> None:
        """Move rows, in the thread; on CUDA in a stream of its own that is waited for here."""
        on_cuda = any(rows and rows[0].is_cuda for _, rows in moves)
        if on_cuda and self._stream is None:
            self._stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(self._stream) if on_cuda else nullcontext():
            if on_cuda:
                self._stream.wait_event(after)
            for move, rows in moves:
                move(rows)
            if on_cuda:
                self._stream.synchronize()
        moves.clear()  # or the thread would be the last to hold them, for a moment

    # --- backward

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return self._hooks.unpack(saved)
        if saved.watch._version != saved.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a saved tensor of shape {tuple(saved.shape)} is at version "
                f"{saved.watch._version}, expected {saved.version}"
            )
        self._bring(saved.layer)
        return saved.tensor()

    @torch.no_grad()
    def _bring(self, layer: _Layer) -> None:
        """Everything of a block, while the block before it is fetched."""
        if self._leaving is not None and self._leaving[1]() is layer:
            job, _ = self._leaving  # needed before it left
            self._leaving = None
            if job is not None:
                job.result()
        if layer.whole:
            return
        self._fetch(layer)
        before = None if layer.before is None else layer.before()
        if before is not None and not before.whole:
            self._fetch(before)
        for one in list(layer.held.values()):
            if one.coming is not None:
                one.coming.result()
                one.coming = one.place = None
        layer.whole = True
        if layer.n_moved < layer.n_tokens:
            self._make_again(layer)

    def _fetch(self, layer: _Layer) -> None:
        waiting = [one for one in layer.held.values() if one.flat is None]
        moves: list[Move] = []
        for one in waiting:
            one.returns(self._hooks)
            assert one.place is not None
            moves.append((one.place.read, one.rows(layer.n_tokens, layer.n_moved)))
        if moves:
            job = self._pool.submit(self._carry, moves, self._now())
            for one in waiting:
                one.coming = job

    def _make_again(self, layer: _Layer) -> None:
        self.again_rows += layer.n_tokens - layer.n_moved

        def receive(saved: _Saved, rows: Tensor) -> None:
            step, full = saved.held.step, saved.held.flat
            if step is not None and full is not None:
                part = full.view(-1, layer.n_tokens, step)[:, layer.n_moved :]  # (L, R, S)
                part.copy_(_flat(rows).view(part.shape))

        self._run_again(layer, layer.n_moved, receive)

    def _run_again(
        self, layer: _Layer, first: int, receive: Callable[[_Saved, Tensor], None]
    ) -> None:
        """Run a block on its tokens from the first one on, and hand out what that saves."""
        replay = _Replay(layer, first, receive)
        x, learns = layer.x
        rows = x.tensor()[:, first:].detach().requires_grad_(learns)
        args, kwargs = (
            _rows(value, layer.n_tokens, first, rows) for value in (layer.args, layer.kwargs)
        )
        with layer.state.again(layer.module), saved_tensors_hooks(replay.pack, _never), replay:
            layer.run(*args, **kwargs)
        if replay.at != len(layer.order):
            raise UnsupportedModel(
                f"{type(layer.module).__name__} saved {len(layer.order)} tensors in its forward "
                f"pass and {replay.at} when some tokens were made again; take alpha=1"
            )

    def _try(self, layer: _Layer, spot: Spot) -> None:
        """Make two tokens again: which storages have rows, and whether these come out the same."""
        first = layer.n_tokens - _N_TRIED
        fixed = {id(one) for one in layer.anchors}

        def receive(saved: _Saved, rows: Tensor) -> None:
            held, full = saved.held, saved.held.flat
            step = _step(saved, rows, layer.n_tokens)
            if id(held) in fixed or step is None or full is None or held.step not in (None, step):
                return
            made, there = _flat(rows), full.view(-1, layer.n_tokens, step)[:, first:]
            if made.numel() != there.numel():
                return
            error = (made.view(there.shape) - there).abs().max()
            if error > torch.finfo(made.dtype).eps ** 0.5 * there.abs().max():
                raise UnsupportedModel(
                    f"{spot.name} mixes tokens outside of scaled_dot_product_attention, or draws "
                    "random numbers: tokens that were made again differ; take alpha=1, which "
                    "makes none again, or leave this block out"
                )
            held.step = step

        self._run_again(layer, first, receive)


# --- modes and pieces


class _Watching(TorchFunctionMode):
    """Tells of each attention while a block runs."""

    def __init__(self, traffic: Traffic, layer: _Layer) -> None:
        super().__init__()
        self._traffic, self._layer = traffic, layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._traffic.attend(self._layer, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Replay(TorchFunctionMode):
    """Hands out what a block saves on some of its tokens; attention gives what it gave before."""

    def __init__(
        self, layer: _Layer, first: int, receive: Callable[[_Saved, Tensor], None]
    ) -> None:
        super().__init__()
        self._layer, self._first, self._receive = layer, first, receive
        self._attended = iter(layer.attended)
        self.at = 0

    def pack(self, t: Tensor) -> None:
        self._hand(self.at, t)
        self.at += 1

    def _hand(self, at: int, t: Tensor) -> None:
        ref = self._layer.order[at] if at < len(self._layer.order) else None
        saved = None if ref is None else ref()
        if saved is not None:
            with torch.no_grad():
                self._receive(saved, t.detach())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        start, self.at, out = next(self._attended)
        inputs = _qkv(args, kwargs or {})
        for i in range(start, self.at):
            if i in self._layer.given:
                self._hand(i, inputs[self._layer.given[i]])
        learns = any(t.requires_grad for t in inputs)
        return out.tensor()[..., self._first :, :].detach().requires_grad_(learns)


def _never(_: Any) -> Tensor:
    raise AssertionError("nothing is differentiated here")


def _qkv(args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    named = [kwargs[name] for name in ("query", "key", "value") if name in kwargs]
    return [*args[:3], *named]


def _flat(t: Tensor) -> Tensor:
    """All numbers of the storage of a tensor."""
    n = t.untyped_storage().nbytes() // t.element_size()
    return t.detach().as_strided((n,), (1,), 0)


def _step(saved: _Saved, rows: Tensor, n_tokens: int) -> int | None:
    """S, from what differs between a saved tensor and that of two tokens; None without rows."""
    if rows.ndim != len(saved.shape):
        return None
    axes = [i for i, n in enumerate(saved.shape) if n != rows.shape[i]]
    if len(axes) != 1:
        return None
    axis = axes[0]
    step, n = saved.stride[axis], saved.shape[axis]
    fits = n % n_tokens == 0 and rows.shape[axis] == n // n_tokens * _N_TRIED
    if not fits or rows.stride(axis) != step or step == 0:
        return None
    return step if saved.held.n % (n_tokens * step) == 0 else None


def _without(value: Any, x: Tensor) -> Any:
    """Arguments with a mark in place of the block's input, which is held elsewhere."""
    if value is x:
        return _INPUT
    if isinstance(value, Mapping):
        return {name: _without(item, x) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_without(item, x) for item in value)
    return value


def _rows(value: Any, n_tokens: int, first: int, x: Tensor) -> Any:
    """Arguments for the tokens from the first one on: positions and the like are (B, T, ...)."""
    if value is _INPUT:
        return x
    if isinstance(value, Tensor):
        return value[:, first:] if value.ndim > 1 and value.shape[1] == n_tokens else value
    if isinstance(value, Mapping):
        return {name: _rows(item, n_tokens, first, x) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_rows(item, n_tokens, first, x) for item in value)
    return value


def _share(n_bytes: float, of: int) -> float:
    return min(1.0, max(0.0, n_bytes / of)) if of else 1.0


_INPUT = object()
