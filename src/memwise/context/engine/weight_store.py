"""Matrices in one file, read into a ring of fixed size while the model computes.

A file is a page that points to the header, then the bundles: each one matrix, in a codec, aligned
so that large reads go from the disk to their place. It is written once, whole or not at all. What a
byte budget allows stays resident; the rest goes through the ring, the next matrix being read and
decoded by a thread meanwhile.

Shapes: n rows of w numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from memwise.budget import Budget, BudgetLike, Ledger, readable
from memwise.codec.spec import BLOCK, FLOATS, parse
from memwise.codec.th import Packed, codec
from memwise.context.engine.weight_plan import Plan, Rates, planned
from memwise.errors import InvalidKnob, StoreCorrupt

Tensor: TypeAlias = torch.Tensor

PAGE = 4096  # bundles begin at multiples of it, as direct reads would want
ALIGN = 64  # arrays inside of a bundle
_WORK = 16  # bytes of a coordinate while a block of a codec is decoded
_MAGIC = b"memwise.weights1"
_CHUNK = 1 << 20  # bytes at once while a file is checked
_N_READERS = 4  # threads for scattered rows: one queue of a disk is not full with one


@dataclass(frozen=True)
class Part:
    """One stored array of a bundle.

    Attributes:
        name: as the codec calls it.
        dtype: torch's name.
        shape: elements along each axis.
        start: first byte within the bundle.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def of(self, raw: Tensor) -> Tensor:
        """The array in the bytes (n_bytes,) of its bundle, a view."""
        dtype = _dtype(self.dtype)
        n_bytes = int(np.prod(self.shape)) * dtype.itemsize
        return raw[self.start : self.start + n_bytes].view(dtype).view(self.shape)


@dataclass(frozen=True)
class Bundle:
    """One matrix in the file.

    Attributes:
        name: of the matrix.
        codec: that it is stored in; "" for its own bytes.
        dtype: torch's name of the type that it is decoded to.
        shape: of the matrix.
        offset: first byte in the file.
        n_bytes: stored bytes.
        crc: CRC-32 of them.
        parts: the arrays of the codec.
    """

    name: str
    codec: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    crc: int
    parts: tuple[Part, ...]

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the matrix in memory."""
        return int(np.prod(self.shape)) * _dtype(self.dtype).itemsize

    @property
    def plain_bytes(self) -> int:
        """Bytes that the same numbers would take in the file, each for itself."""
        if not self.codec or (spec := parse(self.codec)).grid.name not in FLOATS:
            return self.decoded_bytes
        return int(np.prod(self.shape)) * spec.grid.bits // 8

    @property
    def work_bytes(self) -> int:
        """Bytes that its decoder needs beside what it reads and writes."""
        return _WORK * min(BLOCK, int(np.prod(self.shape))) if self.codec else 0

    def decode(self, raw: Tensor, out: Tensor) -> None:
        """Write the matrix that the bytes `raw` stand for to `out`."""
        arrays = {part.name: part.of(raw) for part in self.parts}
        packed = Packed(self.codec, self.shape, _dtype(self.dtype), arrays)
        codec(self.codec).decode(packed, out=out)

    def view(self, place: Tensor) -> Tensor:
        """The matrix in bytes that hold it decoded."""
        return place[: self.decoded_bytes].view(_dtype(self.dtype)).view(self.shape)


@dataclass
class Counters:
    """What reading has cost so far.

    Attributes:
        bytes_read: bytes that came from the file.
        reads: calls that brought them.
        read_s: seconds in these calls, of all threads together.
        decoded_bytes: bytes of matrices that were decoded.
        decode_s: seconds of decoding.
        wait_s: seconds that the model waited for matrices.
    """

    bytes_read: int = 0
    reads: int = 0
    read_s: float = 0.0
    decoded_bytes: int = 0
    decode_s: float = 0.0
    wait_s: float = 0.0

    def since(self, before: Counters) -> Counters:
        """What came on top of an earlier copy."""
        return Counters(
            *(a - b for a, b in zip(vars(self).values(), vars(before).values(), strict=True))
        )

    def __str__(self) -> str:
        return (
            f"{readable(self.bytes_read)} in {self.reads} reads, {self.read_s:.2f} s reading, "
            f"{self.decode_s:.2f} s decoding, {self.wait_s:.2f} s waiting"
        )

    def copy(self) -> Counters:
        """As it stands now."""
        return Counters(**vars(self))


# --- the file


def write(
    path: str | PathLike[str],
    matrices: Iterable[tuple[str, Tensor, str]],
    fingerprint: Mapping[str, str],
) -> None:
    """Write a file of bundles; it appears under its name when it is whole.

    Args:
        path: of the file.
        matrices: names, contiguous matrices and their codecs ("" for the bytes as they are).
        fingerprint: what a reader has to expect.
    """
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(bytes(PAGE))
            bundles = [_append(file, *matrix) for matrix in matrices]
            head = {"fingerprint": dict(fingerprint), "bundles": [asdict(b) for b in bundles]}
            text = json.dumps(head).encode()
            begin = file.tell()
            file.write(text)
            file.seek(0)
            sizes = begin.to_bytes(8, "little") + len(text).to_bytes(8, "little")
            file.write(_MAGIC + sizes + hashlib.sha256(sizes + text).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _append(file: Any, name: str, matrix: Tensor, how: str) -> Bundle:
    arrays = {"": matrix.detach()}
    if how:
        arrays = dict(codec(how).encode(matrix.detach()).arrays)
    offset, at, crc, parts = file.tell(), 0, 0, []
    for key, array in arrays.items():
        dtype = str(array.dtype).removeprefix("torch.")
        parts.append(Part(key, dtype, tuple(array.shape), at))
        flat = array.contiguous().reshape(-1).view(torch.uint8)
        raw = flat.numpy().tobytes() + bytes(-flat.numel() % ALIGN)
        crc = zlib.crc32(raw, crc)
        at += file.write(raw)
    file.write(bytes(-file.tell() % PAGE))
    dtype = str(matrix.dtype).removeprefix("torch.")
    return Bundle(name, how, dtype, tuple(matrix.shape), offset, at, crc, tuple(parts))


class WeightFile:
    """A file of bundles, opened for reading.

    Args:
        path: that `write` made.
        fingerprint: what it has to have been made of.
        keep_pages: let the system keep what was read in memory of its own while there is some to
            spare; otherwise it is told to drop it, and each read is one from the disk.

    Raises:
        InvalidKnob: there is no such file, or it was made of something else.
        StoreCorrupt: it is no such file, or it was cut or altered.
    """

    def __init__(
        self, path: str | PathLike[str], fingerprint: Mapping[str, str], keep_pages: bool = True
    ) -> None:
        self.path, self.keep_pages = Path(path), keep_pages
        self.counters = Counters()
        if not self.path.is_file():
            raise InvalidKnob(f"{self.path} is no file; write one first")
        self._fd = os.open(self.path, os.O_RDONLY)
        try:
            self.bundles = self._opened(fingerprint)
        except BaseException:
            os.close(self._fd)
            raise
        self._scattered = os.open(self.path, os.O_RDONLY)
        if self.can_drop:
            # Advice of its own: reading ahead makes whole matrices faster, and rows slower.
            os.posix_fadvise(self._scattered, 0, 0, os.POSIX_FADV_RANDOM)
        self._readers = ThreadPoolExecutor(_N_READERS, "memwise-rows")

    @property
    def can_drop(self) -> bool:
        """Whether the platform drops pages when it is told to."""
        return hasattr(os, "posix_fadvise")

    def close(self) -> None:
        """Give the file back."""
        self._readers.shutdown()
        os.close(self._scattered)
        os.close(self._fd)

    def drop_pages(self) -> None:
        """Have the system forget what it holds of the file, so that the next reads are cold."""
        if self.can_drop:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def check(self) -> None:
        """Read all bundles once.

        Raises:
            StoreCorrupt: the bytes of one are not those that were written.
        """
        buffer = torch.empty(_CHUNK, dtype=torch.uint8)
        for bundle in self.bundles.values():
            crc, at = 0, 0
            while at < bundle.n_bytes:
                some = buffer[: min(_CHUNK, bundle.n_bytes - at)]
                self._into(some, bundle.offset + at)
                crc, at = zlib.crc32(some.numpy(), crc), at + len(some)
            if crc != bundle.crc:
                raise StoreCorrupt(
                    f"{self.path}: the bytes of {bundle.name!r} are not those that were written; "
                    "delete the file and make it again"
                )

    def read(self, bundle: Bundle, place: Tensor) -> None:
        """Read a whole bundle into the first bytes of `place`."""
        self.counters.read_s += self._into(place[: bundle.n_bytes], bundle.offset)
        self._count(bundle.n_bytes, 1)

    def read_rows(self, bundle: Bundle, rows: NDArray[np.int64], out: Tensor) -> None:
        """Read some rows of a plain matrix, neighbours at once.

        Args:
            bundle: without a codec.
            rows: (r,), rising.
            out: (r, w), contiguous.
        """
        if not len(rows):
            return
        width = out.shape[1] * out.element_size()
        flat = out.view(torch.uint8).view(-1)
        starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
        ends = np.append(starts[1:], len(rows))

        def run(first: int, last: int) -> float:
            place = flat[first * width : last * width]
            return self._into(place, bundle.offset + int(rows[first]) * width, self._scattered)

        if len(starts) == 1:
            seconds = run(0, len(rows))
        else:
            seconds = sum(self._readers.map(run, starts.tolist(), ends.tolist()))
        self.counters.read_s += seconds
        self._count(len(flat), len(starts))

    def _into(self, place: Tensor, offset: int, fd: int | None = None) -> float:
        """Fill bytes from the file; the seconds that it took."""
        source = self._fd if fd is None else fd
        start, view, at = time.perf_counter(), memoryview(place.numpy()), 0
        while at < len(view):
            got = os.preadv(source, [view[at:]], offset + at)
            if not got:
                raise StoreCorrupt(f"{self.path} ends at byte {offset + at}: it was cut meanwhile")
            at += got
        if not self.keep_pages and self.can_drop:
            first = offset - offset % PAGE  # only whole pages are dropped
            last = offset + at + -(offset + at) % PAGE
            os.posix_fadvise(self._fd, first, last - first, os.POSIX_FADV_DONTNEED)
        return time.perf_counter() - start

    def _count(self, n_bytes: int, n_reads: int) -> None:
        self.counters.bytes_read += n_bytes
        self.counters.reads += n_reads

    def _opened(self, fingerprint: Mapping[str, str]) -> dict[str, Bundle]:
        first = os.pread(self._fd, 64, 0)
        if first[:16] != _MAGIC:
            raise StoreCorrupt(f"{self.path} is no file of weights: it does not begin like one")
        sizes, digest = first[16:32], first[32:]
        begin, length = int.from_bytes(sizes[:8], "little"), int.from_bytes(sizes[8:], "little")
        size = os.fstat(self._fd).st_size
        if size != begin + length:
            raise StoreCorrupt(
                f"{self.path} has {size} bytes and was written with {begin + length}; make it again"
            )
        text = os.pread(self._fd, length, begin)
        if hashlib.sha256(sizes + text).digest() != digest:
            raise StoreCorrupt(f"{self.path}: its header was altered; make it again")
        head = json.loads(text)
        for what in {**head["fingerprint"], **fingerprint}:
            there, own = head["fingerprint"].get(what), fingerprint.get(what)
            if there != own:
                raise InvalidKnob(
                    f"{self.path} was made of another {what}: {there} there, {own} here; delete it "
                    "or give another path"
                )
        return {entry["name"]: _bundle(entry) for entry in head["bundles"]}


def _bundle(entry: Mapping[str, Any]) -> Bundle:
    parts = tuple(Part(**{**part, "shape": tuple(part["shape"])}) for part in entry["parts"])
    return Bundle(**{**entry, "shape": tuple(entry["shape"]), "parts": parts})


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


# --- the ring


@dataclass(eq=False)
class _Slot:
    """A place of the ring, what it holds, and when that is there."""

    place: Tensor
    name: str = ""
    ready: Future[None] = field(default_factory=Future)


class WeightStore:
    """Matrices within so many bytes: some resident, the others through a ring.

    Args:
        file: where they are.
        budget: bytes of resident matrices, ring and scratch, at every moment.
        names: the matrices that `fetch` will be asked for, in order; the first prefetches follow
            it, later ones what was really asked. All, if not given.
        pinned: names that have to be resident; they come first.
        n_ring: matrices that the ring holds; 2 read one while another is in use.

    Raises:
        BudgetExceeded: not even one matrix at a time fits.
    """

    def __init__(
        self, file: WeightFile, budget: BudgetLike, names: Sequence[str] | None = None,
        pinned: Sequence[str] = (), n_ring: int = 2,
    ) -> None:  # fmt: skip
        if n_ring < 1:
            raise InvalidKnob(f"n_ring={n_ring}: the ring holds one matrix at least")
        self.file, self.budget = file, Budget(budget)
        self.ledger = Ledger(self.budget)
        names = list(file.bundles) if names is None else list(names)
        bundles = [file.bundles[name] for name in dict.fromkeys([*pinned, *names])]
        self.plan: Plan = planned(bundles, self.budget, frozenset(pinned), n_ring)
        self._thread = ThreadPoolExecutor(1, "memwise-weights")
        self._after = dict(zip(self.plan.streamed, _turned(self.plan.streamed), strict=True))
        self._last = ""
        self.ledger.add("host", "decoder", self.plan.work_bytes)
        self._scratch = self._buffer("scratch", self.plan.scratch_bytes)
        self.resident = dict(self._loaded())
        self._slots = [
            _Slot(self._buffer("ring", self.plan.slot_bytes)) for _ in range(self.plan.n_ring)
        ]

    @property
    def counters(self) -> Counters:
        """What reading has cost."""
        return self.file.counters

    def close(self) -> None:
        """Stop reading ahead, and give all memory back."""
        self._thread.shutdown(cancel_futures=True)
        self.resident.clear()
        self._slots.clear()
        self._scratch = self._scratch.new_empty(0)
        for kind in ("resident", "ring", "scratch", "decoder"):
            self.ledger.release("host", kind)

    def fetch(self, name: str) -> Tensor:
        """A matrix; of one that is not resident, the memory is used again after the next call.

        Raises:
            StoreCorrupt: the file was cut meanwhile.
        """
        if name in self.resident:
            return self.resident[name]
        if self._last:
            self._after[self._last] = name
        self._last = name
        slot = next((slot for slot in self._slots if slot.name == name), None)
        if slot is None:
            slot = self._begin(name, self._slots[0])
        self._slots.remove(slot)
        self._slots.append(slot)  # the one in use is the last to be used again
        start = time.perf_counter()
        slot.ready.result()
        self.counters.wait_s += time.perf_counter() - start
        self._read_ahead(name)
        return self.file.bundles[name].view(slot.place)

    def measure(self, n: int = 8) -> Rates:
        """Speeds of the disk and of decoding, from some matrices, read cold where that can be."""
        self.file.drop_pages()
        self._forget()
        before = self.counters.copy()
        for name in self.plan.streamed[:n]:
            self._thread.submit(self._load, name, self._slots[0].place).result()
        cost = self.counters.since(before)
        self._forget()
        return Rates.of(cost.bytes_read, cost.read_s, cost.decoded_bytes, cost.decode_s)

    def _forget(self) -> None:
        """Let nothing that was read ahead count as there."""
        for slot in self._slots:
            if slot.name:
                slot.ready.result()
            slot.name = ""

    def _read_ahead(self, name: str) -> None:
        wanted = []
        for _ in self._slots[1:]:
            name = self._after[name]
            wanted.append(name)
        free = [slot for slot in self._slots[:-1] if slot.name not in wanted]
        held = {slot.name for slot in self._slots}
        for name in dict.fromkeys(wanted):
            if name not in held:
                self._begin(name, free.pop(0))

    def _begin(self, name: str, slot: _Slot) -> _Slot:
        slot.name = name
        slot.ready = self._thread.submit(self._load, name, slot.place)
        return slot

    def _load(self, name: str, place: Tensor) -> None:
        bundle = self.file.bundles[name]
        if not bundle.codec:
            self.file.read(bundle, place)
            return
        self.file.read(bundle, self._scratch)
        start = time.perf_counter()
        bundle.decode(self._scratch, bundle.view(place))
        self.counters.decode_s += time.perf_counter() - start
        self.counters.decoded_bytes += bundle.decoded_bytes

    def _loaded(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.plan.resident:
            bundle = self.file.bundles[name]
            place = self._buffer("resident", max(bundle.decoded_bytes, _padded(bundle)))
            self._load(name, place)
            yield name, bundle.view(place)

    def _buffer(self, kind: str, n_bytes: int) -> Tensor:
        self.ledger.add("host", kind, n_bytes)
        return torch.empty(n_bytes, dtype=torch.uint8)

    def __str__(self) -> str:
        return f"{self.plan}\n{self.ledger}"


def _padded(bundle: Bundle) -> int:
    """Bytes that are read to where the matrix will be."""
    return 0 if bundle.codec else bundle.n_bytes


def _turned(names: Sequence[str]) -> list[str]:
    return [*names[1:], *names[:1]]
