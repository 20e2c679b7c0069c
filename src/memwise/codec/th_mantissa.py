"""Floats with few mantissa bits, whose exponents are Huffman-coded.

A group of coordinates is divided by the mantissa of its largest magnitude, in [1, 2), which then
loses nothing; the others are rounded to the nearest, ties to even, with a carry into the exponent.

Shapes: N coordinates, in blocks of at most `spec.BLOCK`, in groups of `GROUP`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memwise.codec.spec import BLOCK
from memwise.codec.th_pack import deflate, inflate, join, pack, unpack
from memwise.errors import InvalidKnob

GROUP = 512
BITS = (0, 1, 2, 3, 7)

_ONE = 127 << 23  # the bits of 1.0


@dataclass(frozen=True)
class Shortened:
    """A tensor with few mantissa bits.

    Attributes:
        shape: of the tensor.
        dtype: its type, in which it is decoded.
        n_bits: of a mantissa.
        codes: exponents, one deflate stream a block.
        ends: where each stream ends.
        rest: sign and mantissa, dense.
        tops: mantissas of the groups' largest magnitudes, 7 bits each.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    n_bits: int
    codes: Tensor
    ends: Tensor
    rest: Tensor
    tops: Tensor


def shorten(x: Tensor, n_bits: int) -> Shortened:
    """Round to mantissas of `n_bits` and code the exponents.

    Raises:
        InvalidKnob: no such number of bits, or x holds NaN or infinity.
    """
    if n_bits not in BITS:
        raise InvalidKnob(f"mantissas of {n_bits!r} bits: use one of {', '.join(map(str, BITS))}")
    if not bool(x.isfinite().all()):
        raise InvalidKnob("NaN or infinity has no short mantissa; store it without loss")
    flat = x.detach().reshape(-1)
    width, streams, tops = n_bits + 1, [], []
    n = flat.numel()
    rest = torch.empty(_start(n, width), dtype=torch.uint8, device=x.device)
    for first in range(0, n, BLOCK):
        part = flat[first : first + BLOCK].float()
        top = _tops(part)
        bits = _rounded(part / _factors(top, len(part)), n_bits)
        streams.append(deflate((bits >> 23 & 0xFF).to(torch.uint8)))
        codes = (bits >> 23 - n_bits & (1 << n_bits) - 1) | (bits < 0).int() << n_bits
        place = rest[_start(first, width) : _start(min(n, first + BLOCK), width)]
        pack(codes.to(torch.uint8)[None], width, place[None])
        tops.append(top)
    stream, ends = join(streams, x.device)
    tops_ = torch.cat(tops) if tops else rest.new_empty(0)
    return Shortened(tuple(x.shape), x.dtype, n_bits, stream, ends, rest, tops_)


def lengthen(short: Shortened) -> Tensor:
    """The rounded tensor."""
    n, width = math.prod(short.shape), short.n_bits + 1
    out = torch.empty(n, dtype=short.dtype, device=short.codes.device)
    ends = [0, *short.ends.tolist()]
    for i, first in enumerate(range(0, n, BLOCK)):
        size = min(BLOCK, n - first)
        exponents = inflate(short.codes[ends[i] : ends[i + 1]]).int()
        place = short.rest[_start(first, width) : _start(first + size, width)]
        codes = unpack(place[None], width, size)[0].int()
        mantissas = (codes & (1 << short.n_bits) - 1) << 23 - short.n_bits
        bits = exponents << 23 | mantissas | codes >> short.n_bits << 31
        top = short.tops[first // GROUP : -(-(first + size) // GROUP)]
        out[first : first + size] = bits.view(torch.float32) * _factors(top, size)
    return out.view(short.shape)


def _rounded(y: Tensor, n_bits: int) -> Tensor:
    """Bits (n,) int32 of float32, of which the mantissa's last ones are 0."""
    bits, drop = y.view(torch.int32), 23 - n_bits
    odd = bits >> drop & 1
    return bits + ((1 << drop - 1) - 1) + odd >> drop << drop


def _tops(part: Tensor) -> Tensor:
    """Seven bits of the mantissa of the largest magnitude of each group."""
    spare = -len(part) % GROUP
    padded = torch.nn.functional.pad(part.abs(), (0, spare)) if spare else part.abs()
    largest = padded.view(-1, GROUP).amax(1)
    return (largest.view(torch.int32) >> 16 & 0x7F).to(torch.uint8)


def _factors(tops: Tensor, n: int) -> Tensor:
    """The mantissas of the groups as float32 in [1, 2), one for each of n coordinates."""
    factors = (tops.int() << 16 | _ONE).view(torch.float32)
    return factors.repeat_interleave(GROUP)[:n]


def _start(n: int, width: int) -> int:
    return -(-n * width // 8)
