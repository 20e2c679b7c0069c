"""Where tensors lie: offsets in one arena, so that their lives do not tear holes into it.

An allocator that takes requests as they come puts each where it fits just then, and is left with
gaps. Training repeats itself, so all requests of a step are known beforehand, and offsets with a
low peak can be planned: largest first, which often is the lowest peak there can be, or by a
mixed-integer program. That is solved in two levels: first the requests that are born and die within
one block's pass, once for all blocks that ask alike; then the whole step, in which each pass is a
single request of the size found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd
from typing import Any

import numpy as np
from torch.profiler import ProfilerActivity, profile, record_function

from memwise.catalogue import need

_MARK = "memwise.arena: "


@dataclass(frozen=True)
class Request:
    """One allocation.

    Attributes:
        n_bytes: its size.
        birth: moment from which on it lies somewhere.
        death: first moment at which it does not.
    """

    n_bytes: int
    birth: int
    death: int

    def meets(self, other: Request) -> bool:
        """Whether both live at some moment."""
        return self.birth < other.death and other.birth < self.death


@dataclass(frozen=True)
class Arena:
    """Requests and where they lie.

    Attributes:
        requests: in the order they were given.
        offsets: in bytes, one a request.
        solver: "milp" where the program moved something, else "first fit".
        proven: whether no arrangement has a lower peak.
        seconds: spent.
    """

    requests: tuple[Request, ...]
    offsets: tuple[int, ...]
    solver: str
    proven: bool
    seconds: float = 0.0

    @property
    def peak_bytes(self) -> int:
        """Size of the arena."""
        ends = (at + one.n_bytes for at, one in zip(self.offsets, self.requests, strict=True))
        return max(ends, default=0)

    @property
    def live_bytes(self) -> int:
        """Most bytes that live at one moment: no arena is smaller."""
        return live_bytes(self.requests)

    def overlaps(self) -> bool:
        """Whether two requests lie on each other: never."""
        spans = [(at, at + r.n_bytes, r) for at, r in zip(self.offsets, self.requests, strict=True)]
        return any(
            a[2].meets(b[2]) and a[0] < b[1] and b[0] < a[1]
            for i, a in enumerate(spans)
            for b in spans[:i]
        )


def live_bytes(requests: Iterable[Request]) -> int:
    """Most bytes that live at one moment."""
    changes: dict[int, int] = {}
    for one in requests:
        changes[one.birth] = changes.get(one.birth, 0) + one.n_bytes
        changes[one.death] = changes.get(one.death, 0) - one.n_bytes
    return int(max(np.cumsum([changes[t] for t in sorted(changes)]), default=0))


def first_fit(requests: Sequence[Request], *, by_size: bool = False) -> Arena:
    """Each request at the lowest offset that is free for its life.

    Args:
        requests: any.
        by_size: the largest first, which needs to know all of them; else as they are born, which is
            what an allocator can do.
    """
    began = time.perf_counter()

    def rank(i: int) -> tuple[int, int]:
        return (-requests[i].n_bytes if by_size else 0, requests[i].birth)

    offsets = _dropped(requests, sorted(range(len(requests)), key=rank), lowest=True)
    found = Arena(tuple(requests), tuple(offsets), "first fit", False)
    proven = found.peak_bytes == found.live_bytes
    return replace(found, proven=proven, seconds=time.perf_counter() - began)


def arranged(requests: Sequence[Request], seconds: float = 10.0) -> Arena:
    """Offsets of the lowest peak, by a mixed-integer program.

    Args:
        requests: any.
        seconds: after which the best arrangement so far is returned; `proven` then says so.

    Raises:
        MissingExtra: scipy is not installed.
    """
    began = time.perf_counter()
    milp = _milp()
    best = min(
        first_fit(requests), first_fit(requests, by_size=True), key=lambda arena: arena.peak_bytes
    )
    if not best.proven:
        found = _solved(requests, best, seconds, milp)
        if found is not None and (found.proven or found.peak_bytes < best.peak_bytes):
            best = found if found.peak_bytes <= best.peak_bytes else replace(best, proven=True)
    return replace(best, seconds=time.perf_counter() - began)


def planned(
    requests: Sequence[Request], passes: Sequence[tuple[int, int]], seconds: float = 10.0
) -> Arena:
    """Offsets for a step: largest first where no peak is lower, else the best of all ways.

    Args:
        requests: of a whole step.
        passes: first and last moment of each pass of a block.
        seconds: for each mixed-integer program.

    Raises:
        MissingExtra: scipy is not installed.
    """
    began = time.perf_counter()
    _milp()
    best = first_fit(requests, by_size=True)
    if not best.proven:
        others = (first_fit(requests), in_two_levels(requests, passes, seconds))
        best = min((best, *others), key=lambda arena: arena.peak_bytes)
    return replace(best, seconds=time.perf_counter() - began)


def in_two_levels(
    requests: Sequence[Request], passes: Sequence[tuple[int, int]], seconds: float = 10.0
) -> Arena:
    """Offsets for a step, block by block and then for all of it.

    Args:
        requests: of a whole step.
        passes: first and last moment of each pass of a block, forward or backward.
        seconds: for each of the programs.

    Raises:
        MissingExtra: scipy is not installed.
    """
    began = time.perf_counter()
    inside: dict[int, list[int]] = {}
    alone: list[int] = []
    for i, one in enumerate(requests):
        home = [n for n, (t, end) in enumerate(passes) if t <= one.birth and one.death <= end]
        if home:
            inside.setdefault(home[0], []).append(i)
        else:
            alone.append(i)

    known: dict[Any, Arena] = {}
    inner: dict[int, Arena] = {}
    for n, members in inside.items():
        moments = sorted({t for i in members for t in (requests[i].birth, requests[i].death)})
        when = {t: k for k, t in enumerate(moments)}
        alike = tuple(
            Request(requests[i].n_bytes, when[requests[i].birth], when[requests[i].death])
            for i in members
        )
        if alike not in known:
            known[alike] = arranged(alike, seconds)
        inner[n] = known[alike]

    blocks = [
        Request(
            inner[n].peak_bytes,
            min(requests[i].birth for i in members),
            max(requests[i].death for i in members),
        )
        for n, members in inside.items()
    ]
    outer = arranged([*(requests[i] for i in alone), *blocks], seconds)
    offsets = [0] * len(requests)
    for i, at in zip(alone, outer.offsets, strict=False):
        offsets[i] = at
    for (n, members), base in zip(inside.items(), outer.offsets[len(alone) :], strict=True):
        for i, at in zip(members, inner[n].offsets, strict=True):
            offsets[i] = base + at
    solvers = {outer.solver, *(arena.solver for arena in known.values())}
    found = Arena(tuple(requests), tuple(offsets), max(solvers), False)
    proven = found.peak_bytes == found.live_bytes
    return replace(found, proven=proven, seconds=time.perf_counter() - began)


def _dropped(requests: Sequence[Request], order: Sequence[int], *, lowest: bool) -> list[int]:
    """Offsets when requests fall in this order: into the lowest gap, or onto those before."""
    offsets = [0] * len(requests)
    done: list[int] = []
    for i in order:
        taken = sorted(
            (offsets[j], offsets[j] + requests[j].n_bytes)
            for j in done
            if requests[i].meets(requests[j])
        )
        at = 0
        for start, end in taken:
            if lowest and start - at >= requests[i].n_bytes:
                break
            at = max(at, end)
        offsets[i] = at
        done.append(i)
    return offsets


def _milp() -> Any:
    need("plan", what="planning where tensors lie")
    from scipy import optimize  # an extra, and only for those who plan

    return optimize


def _solved(
    requests: Sequence[Request], known: Arena, seconds: float, optimize: Any
) -> Arena | None:
    """The program: the lowest peak such that of two that meet, one lies above the other."""
    from scipy.sparse import csr_array

    n, unit = len(requests), reduce(gcd, (one.n_bytes for one in requests))
    sizes = np.array([one.n_bytes // unit for one in requests], float)
    high = known.peak_bytes / unit
    pairs = [(i, j) for i in range(n) for j in range(i) if requests[i].meets(requests[j])]
    # Variables: offsets of n requests, a choice for each pair (1: i lies below j), the peak.
    peak = n + len(pairs)
    entries: list[tuple[int, int, float]] = []
    above: list[float] = []
    for k, (i, j) in enumerate(pairs):
        # o_i + s_i <= o_j + high (1 - z),  o_j + s_j <= o_i + high z
        row = len(above)
        entries += [(row, i, 1.0), (row, j, -1.0), (row, n + k, high)]
        entries += [(row + 1, j, 1.0), (row + 1, i, -1.0), (row + 1, n + k, -high)]
        above += [high - sizes[i], -sizes[j]]
    for i in range(n):
        row = len(above)
        entries += [(row, i, 1.0), (row, peak, -1.0)]
        above.append(-sizes[i])
    rows, columns, values = zip(*entries, strict=True)
    matrix = csr_array((values, (rows, columns)), shape=(len(above), peak + 1))
    low_peak = live_bytes(requests) / unit
    upper = np.concatenate([high - sizes, np.ones(len(pairs)), [high]])
    lower = np.concatenate([np.zeros(peak), [low_peak]])
    goal = np.zeros(peak + 1)
    goal[peak] = 1
    found = optimize.milp(
        goal,
        constraints=optimize.LinearConstraint(matrix, -np.inf, np.array(above)),
        bounds=optimize.Bounds(lower, upper),
        integrality=np.concatenate([np.zeros(n), np.ones(len(pairs)), [0]]),
        options={"time_limit": seconds},
    )
    if found.x is None:
        return None
    # Its offsets are floats: let requests fall in their order, which gives whole bytes.
    order = sorted(range(n), key=lambda i: (found.x[i], requests[i].birth))
    offsets = _dropped(requests, order, lowest=False)
    return Arena(tuple(requests), tuple(offsets), "milp", found.status == 0)


# --- the requests of a step


@dataclass(frozen=True)
class Trace:
    """What a piece of work asked the allocator for.

    Attributes:
        requests: born and freed meanwhile, large enough to matter.
        passes: first and last moment of each named span, in order.
    """

    requests: tuple[Request, ...]
    passes: tuple[tuple[int, int], ...]


def traced(
    fn: Callable[[], object], model: Any = None, blocks: Sequence[str] = (), floor: int = 1024
) -> Trace:
    """The requests of a piece of work on the host, by the profiler's memory events.

    Args:
        fn: such as a forward and backward pass; run it once before, so that gradients exist.
        model: whose blocks' passes are to be marked.
        blocks: their names.
        floor: bytes below which a request is left out.
    """
    handles = [handle for name in blocks for handle in _marked(dict(model.named_modules())[name])]
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            fn()
    finally:
        for handle in handles:
            handle.remove()
    found: Any = prof.profiler
    waiting = found.kineto_results.experimental_event_tree()[::-1]
    events = []
    while waiting:
        event = waiting.pop()
        events.append(event)
        waiting.extend(reversed(event.children))
    events.sort(key=lambda event: event.start_time_ns)
    return _requests(events, floor)


def _requests(events: Sequence[Any], floor: int) -> Trace:
    alive: dict[int, tuple[int, int]] = {}
    requests: list[Request] = []
    begun: list[int] = []
    passes: list[tuple[int, int]] = []
    for moment, event in enumerate(events):
        if event.name == _MARK + "begin":
            begun.append(moment)
        elif event.name == _MARK + "end" and begun:
            passes.append((begun.pop(), moment))
        elif event.name == "[memory]" and event.extra_fields.device.type == "cpu":
            address, n_bytes = event.extra_fields.ptr, event.extra_fields.alloc_size
            if n_bytes > 0:
                alive[address] = n_bytes, moment
            elif address in alive:
                size, birth = alive.pop(address)
                if size >= floor:
                    requests.append(Request(size, birth, moment))
    requests.sort(key=lambda one: one.birth)
    return Trace(tuple(requests), tuple(passes))


def _marked(module: Any) -> list[Any]:
    def mark(word: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            with record_function(_MARK + word):
                pass

        return hook

    return [
        module.register_forward_pre_hook(mark("begin")),
        module.register_forward_hook(mark("end")),
        module.register_full_backward_pre_hook(mark("begin")),
        module.register_full_backward_hook(mark("end")),
    ]
