"""Codes into arrays and back, in torch: the packings of `codec.spec`, block by block.

Shapes: r rows of w columns in a block, b bits a code.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from memwise.codec.spec import BLOCK, FLOATS, MINIFLOATS, Block, Spec, blocks
from memwise.codec.th_grid import FLOAT_TYPES, levels, pair_table
from memwise.codec.th_pack import (
    Tensor,
    Work,
    deflate,
    inflate,
    join,
    pack,
    pairs,
    rotate,
    unpack,
    unrotate,
)

TORCH_TYPES = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
_DTYPES = {
    "u1": torch.uint8,
    "i1": torch.int8,
    "u2": torch.uint16,
    "f2": torch.float16,
    "f4": torch.float32,
}

_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

Parts = Iterable[tuple[Block, Tensor]]


def scratch(n_rows: int, width: int, device: torch.device) -> Work:
    """Scratch for any block of a matrix (n, d), whose rows count as multiples of eight."""
    return Work.of(min(BLOCK, n_rows * -(-width // 8) * 8), device)


def write(
    spec: Spec, parts: Parts, shape: Sequence[int], device: torch.device
) -> dict[str, Tensor]:
    """The arrays that hold the codes, which come as (r w,) bytes or floats, block by block."""
    match spec.packing.kind:
        case "entropy":
            return _write_entropy(spec, parts, math.prod(shape), device)
        case "bitmap" | "sparse":
            return _write_bitmap(spec, parts, shape, device)
    layout = spec.layout(shape)["codes"]
    codes = torch.empty(layout.shape, dtype=_DTYPES[layout.dtype], device=device)
    for block, part in parts:
        place(spec, part, block, codes)
    return {"codes": codes}


def place(spec: Spec, part: Tensor, block: Block, codes: Tensor) -> None:
    """Writes the codes of one block to their place, dense or a byte each."""
    matrix = part.view(block.n_rows, block.width)
    target = codes[block.rows, _columns(spec, block)]
    if spec.grid.name in FLOATS:
        target.view(matrix.dtype).copy_(matrix)
    else:
        pack(matrix, 8 if spec.packing.kind == "byte" else spec.grid.bits, target.view(torch.uint8))


def read(
    spec: Spec, arrays: Mapping[str, Tensor], shape: Sequence[int], rows: slice
) -> Iterator[tuple[Block, Tensor]]:
    """Blocks that hold a range of rows: codes (r, w), floats, or dense bytes (r, ceil(w b / 8))."""
    match spec.packing.kind:
        case "entropy":
            yield from _read_entropy(spec, arrays, shape, rows)
        case "bitmap" | "sparse":
            yield from _read_bitmap(spec, arrays, shape, rows)
        case _:
            for block in blocks(rows.stop - rows.start, shape[-1], rows.start):
                codes = arrays["codes"][block.rows, _columns(spec, block)]
                yield block, _seen(spec, codes)


def look_up(spec: Spec, table: Tensor, codes: Tensor, block: Block, work: Work) -> Tensor:
    """Levels (r, w) float32, in scratch memory, of what `read` gave."""
    if spec.packing.kind == "dense" and spec.grid.bits < 8:
        index = pairs(codes, spec.grid.bits, block.width, work)  # (r, ceil(w / 2))
        two = work.y.view(torch.int64)[: index.numel()]
        torch.index_select(pair_table(spec, table), 0, index.view(-1), out=two)
        return two.view(torch.float32).view(block.n_rows, -1)[:, : block.width]
    y = work.y[: block.size].view(block.n_rows, block.width)
    if spec.grid.name in TORCH_TYPES:
        return y.copy_(codes.view(TORCH_TYPES[spec.grid.name]))
    index = work.index[: block.size].view_as(y).copy_(codes)
    torch.index_select(table, 0, index.view(-1), out=y.view(-1))
    return y


def _columns(spec: Spec, block: Block) -> slice:
    """Where the columns of a block lie in a row of codes."""
    n_bits = spec.grid.bits if spec.packing.kind == "dense" and spec.grid.bits < 8 else 8
    return slice(block.column * n_bits // 8, -(-block.columns.stop * n_bits // 8))


def _seen(spec: Spec, codes: Tensor) -> Tensor:
    """Stored codes as floats of their grid, or as bytes."""
    return codes.view(FLOAT_TYPES.get(spec.grid.name, torch.uint8))


def _write_entropy(spec: Spec, parts: Parts, total: int, device: torch.device) -> dict[str, Tensor]:
    """Huffman codes of one byte a coordinate; of floats the other bytes as they are."""
    streams, arrays = [], {}
    if spec.grid.name in FLOATS:
        n_rest = spec.grid.bits // 8 - 1
        arrays["rest"] = torch.empty((total, n_rest), dtype=torch.uint8, device=device)
    for block, part in parts:
        symbols = part
        if "rest" in arrays:
            symbols, arrays["rest"][block.flat] = rotate(part)
        streams.append(deflate(symbols))
    codes, ends = join(streams, device)
    return {"codes": codes, "ends": ends, **arrays}


def _read_entropy(
    spec: Spec, arrays: Mapping[str, Tensor], shape: Sequence[int], rows: slice
) -> Iterator[tuple[Block, Tensor]]:
    ends = [0, *arrays["ends"].tolist()]
    for i, block in enumerate(blocks(math.prod(shape[:-1]), shape[-1])):
        if block.rows.stop <= rows.start or block.first >= rows.stop:
            continue
        symbols = inflate(arrays["codes"][ends[i] : ends[i + 1]])
        if "rest" in arrays:
            symbols = unrotate(symbols, arrays["rest"][block.flat])
        yield block, _seen(spec, symbols).view(block.n_rows, block.width)


def _write_bitmap(
    spec: Spec, parts: Parts, shape: Sequence[int], device: torch.device
) -> dict[str, Tensor]:
    """A bit a coordinate, and the codes of those that are not zero."""
    n_rows, width = math.prod(shape[:-1]), shape[-1]
    bitmap = torch.empty((n_rows, -(-width // 8)), dtype=torch.uint8, device=device)
    zero, kept = _zero(spec, device), []
    for block, part in parts:
        present = _magnitudes(spec, part) != zero
        kept.append(part[present])
        columns = slice(block.column // 8, -(-block.columns.stop // 8))
        pack(present.to(torch.uint8).view(block.n_rows, -1), 1, bitmap[block.rows, columns])
    dtype = FLOAT_TYPES.get(spec.grid.name, torch.uint8)
    codes = torch.cat(kept) if kept else torch.empty(0, dtype=dtype, device=device)
    if spec.grid.bits < 8:
        size = -(-len(codes) * spec.grid.bits // 8)
        packed = torch.empty((1, size), dtype=torch.uint8, device=device)
        pack(codes[None], spec.grid.bits, packed)
        codes = packed[0]
    elif spec.grid.name == "bf16":
        codes = codes.view(torch.uint16)
    return {"codes": codes, "bitmap": bitmap}


def _read_bitmap(
    spec: Spec, arrays: Mapping[str, Tensor], shape: Sequence[int], rows: slice
) -> Iterator[tuple[Block, Tensor]]:
    bitmap, at = arrays["bitmap"], 0
    zero = _zero(spec, bitmap.device)
    for block in blocks(rows.stop, shape[-1]):
        columns = slice(block.column // 8, -(-block.columns.stop // 8))
        places = _places(bitmap[block.rows, columns], block.width)
        stop = at + len(places)
        if block.rows.stop > rows.start:
            kept = _seen(spec, _between(arrays["codes"], spec.grid.bits, at, stop))
            codes = kept.new_full((block.n_rows, block.width), zero)
            codes.view(-1).index_copy_(0, places, kept)
            yield block, codes
        at = stop


def _places(bitmap: Tensor, width: int) -> Tensor:
    """Where the bits of (r, ceil(w / 8)) bytes are set among r w, in order."""
    if bitmap.device.type != "cpu":
        return unpack(bitmap, 1, width).reshape(-1).nonzero().view(-1)
    # numpy takes bits apart and searches them several times faster than torch.
    bits = np.unpackbits(bitmap.numpy(), axis=1, count=width, bitorder="little")
    return torch.from_numpy(np.flatnonzero(bits.view(np.bool_)))


def _between(codes: Tensor, n_bits: int, start: int, stop: int) -> Tensor:
    """Codes `start` to `stop` of a dense run."""
    if n_bits >= 8:
        return codes[start:stop]
    first = start // 8 * 8  # codes that begin at a byte
    part = codes[first * n_bits // 8 : -(-stop * n_bits // 8)]
    return unpack(part[None], n_bits, stop - first)[0, start - first :]


def _magnitudes(spec: Spec, part: Tensor) -> Tensor:
    """What differs from the code of zero, except for zeros; -0.0 counts as 0.0, but in `sparse`."""
    if spec.packing.kind == "sparse":
        return part.view(_UNITS[part.element_size()])
    return part & 0x7F if spec.grid.name in MINIFLOATS else part


def _zero(spec: Spec, device: torch.device) -> int:
    """The code of zero."""
    if spec.grid.name in FLOATS:
        return 0
    return int((levels(spec, device).table == 0).nonzero()[0])
