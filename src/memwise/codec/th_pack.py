"""Bits into bytes and back, in torch; scratch memory for one block.

Shapes: r rows of w coordinates, b bits a code.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

Tensor: TypeAlias = torch.Tensor

# A word of eight codes ends as b bytes; all but three bits have an integer of that size.
_UNITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Work:
    """Scratch for `n` coordinates, so that a block allocates next to nothing.

    Attributes:
        y: (n,) float32, the coordinates on their way.
        other: (n,) float32, factors or lower levels.
        words: (n / 2,) int64, for random bits.
        index: (n,) int32 in the memory of `words`.
        codes: (n,) uint8.
    """

    y: Tensor
    other: Tensor
    words: Tensor
    index: Tensor
    codes: Tensor

    @classmethod
    def of(cls, n: int, device: torch.device) -> "Work":
        """Scratch for up to `n` coordinates, 13 bytes each."""
        n = -(-n // 8) * 8
        y, other = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(2))
        words = torch.empty(n // 2, dtype=torch.int64, device=device)
        codes = torch.empty(n, dtype=torch.uint8, device=device)
        return cls(y, other, words, words.view(torch.int32), codes)

    def cut(self, n: int) -> "Work":
        """The first `n` coordinates."""
        words = self.words[: (n + 1) // 2]
        return Work(self.y[:n], self.other[:n], words, self.index[:n], self.codes[:n])

    def uniform(self, generator: torch.Generator) -> Tensor:
        """(n,) float32 in [0, 1), multiples of 2^-23, in the memory of `words`."""
        self.words.random_(-(2**63), None, generator=generator)
        # The bits of a number in [1, 2): two draws for one call of the generator.
        self.words.bitwise_and_(0x007FFFFF_007FFFFF).bitwise_or_(0x3F800000_3F800000)
        return self.index.view(torch.float32).sub_(1)


def pack(codes: Tensor, n_bits: int, out: Tensor) -> None:
    """Writes codes (r, w) as bytes (r, ceil(w b / 8)), lowest bit first; the codes are used up."""
    if n_bits == 8:
        out.copy_(codes)
        return
    if not codes.numel():
        return
    if n_bits == 4 and codes.is_contiguous() and codes.shape[1] % 2 == 0:
        twos = codes.view(torch.int16)  # little-endian: the first code is the lower byte
        out.copy_(twos.bitwise_or_(twos >> 4))  # of which the lower one is kept
        return
    spare = -codes.shape[1] % 8
    words = (torch.nn.functional.pad(codes, (0, spare)) if spare else codes).view(torch.int64)
    for lanes in (1, 2, 4):
        words.bitwise_or_(words >> (8 - n_bits) * lanes).bitwise_and_(_mask(n_bits, 2 * lanes))
    if n_bits == 3:
        packed = words.view(torch.uint8).view(len(codes), -1, 8)[:, :, :3].reshape(len(codes), -1)
    else:
        unit = words.view(_UNITS[n_bits])[:, :: 8 // n_bits]
        packed = unit.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    out.copy_(packed[:, : out.shape[1]])


def unpack(packed: Tensor, n_bits: int, width: int) -> Tensor:
    """Codes (r, w) of bytes (r, ceil(w b / 8)) that `pack` wrote."""
    if n_bits == 8:
        return packed
    words = _spread(packed, n_bits)
    words.bitwise_or_(words << 8 - n_bits).bitwise_and_(_mask(n_bits, 1))
    return words.view(torch.uint8)[:, :width]


def pairs(packed: Tensor, n_bits: int, width: int, work: Work) -> Tensor:
    """Codes two by two, (r, ceil(w / 2)) of 2 b bits, the first code in the lower ones."""
    if n_bits == 4:
        return work.index[: packed.numel()].view(packed.shape).copy_(packed)
    return _spread(packed, n_bits).view(torch.int16)[:, : -(-width // 2)].to(torch.int32)


def _spread(packed: Tensor, n_bits: int) -> Tensor:
    """Words of eight codes (r, ceil(w / 8)), two codes in every sixteen bits."""
    if not packed.numel():
        return packed.new_empty((len(packed), 0), dtype=torch.int64)
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[1] % n_bits))
    words = packed.new_zeros((len(packed), packed.shape[1] // n_bits), dtype=torch.int64)
    octets = words.view(torch.uint8).view(len(packed), -1, 8)
    octets[:, :, :n_bits] = packed.view(len(packed), -1, n_bits)
    for lanes in (4, 2):
        words.bitwise_or_(words << (8 - n_bits) * lanes).bitwise_and_(_mask(n_bits, lanes))
    return words


def _mask(n_bits: int, lanes: int) -> int:
    """Ones where `lanes` codes lie at the bottom of every `lanes` bytes of a word."""
    return sum(((1 << n_bits * lanes) - 1) << 8 * place for place in range(0, 8, lanes))


def deflate(symbols: Tensor) -> bytes:
    """Huffman codes of bytes (n,), without the search for repeats."""
    stream = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return stream.compress(symbols.cpu().numpy().tobytes()) + stream.flush()


def inflate(stream: Tensor) -> Tensor:
    """The bytes that `deflate` coded, on the device of the stream."""
    raw = zlib.decompress(stream.cpu().numpy().tobytes(), -15)
    return torch.from_numpy(np.frombuffer(bytearray(raw), np.uint8)).to(stream.device)


def join(parts: Sequence[bytes], device: torch.device) -> tuple[Tensor, Tensor]:
    """One byte tensor of all parts, and where each of them ends."""
    joined = np.frombuffer(bytearray(b"".join(parts)), np.uint8)
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return torch.from_numpy(joined).to(device), torch.from_numpy(ends).to(device)


def rotate(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The exponents of float bits (n,) as bytes, and their other bytes (n, 1 or 3)."""
    n_bytes = bits.element_size()
    kind = torch.int16 if n_bytes == 2 else torch.int32
    signed = bits.view(kind)
    top = (signed >> 8 * n_bytes - 1) & 1
    octets = (signed << 1 | top).view(torch.uint8).view(-1, n_bytes)
    return octets[:, -1].contiguous(), octets[:, :-1]


def unrotate(exponents: Tensor, rest: Tensor) -> Tensor:
    """Float bits (n,), as int16 or int32, of what `rotate` took apart."""
    octets = torch.cat([rest, exponents[:, None]], dim=1)
    kind = torch.int16 if octets.shape[1] == 2 else torch.int32
    turned = octets.view(kind).view(-1)
    low = turned & 1
    # A shift to the right drags the sign along; the mask takes it off before the sign is put back.
    n_bits = 8 * octets.shape[1]
    body = turned >> 1 & (1 << n_bits - 1) - 1
    return body | low << n_bits - 1
