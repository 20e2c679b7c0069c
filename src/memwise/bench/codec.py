"""Time of encoding and decoding beside a copy of the same tensor, and beside other libraries.

All rows come from one run, turn by turn, so that a busy machine slows all of them alike:
`python -m memwise.bench.codec`. torchao and bitsandbytes are measured where they are installed.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from memwise.codec.th import codec
from memwise.errors import InvalidKnob

NAMES = (
    "int8/row",
    "int8/group128",
    "int4/group128",
    "uint4/group128",
    "nf4/group64",
    "dyn4/group128",
    "linear4/rank1",
    "linear4/group128",
    "dyn8/group256",
    "e4m3/group128",
    "e4m3/expand128",
    "sign/row",
    "int2/group32",
    "bf16",
    "bf16/stochastic",
    "int8/group128/stochastic",
    "bf16/entropy",
)


@dataclass(frozen=True)
class Speed:
    """Time of one codec.

    Attributes:
        name: codec, or library and function.
        encode_ratio: seconds of encoding over those of a copy of the tensor.
        decode_ratio: seconds of decoding over those of a copy.
        bytes_ratio: stored bytes over those of float32.
    """

    name: str
    encode_ratio: float
    decode_ratio: float
    bytes_ratio: float


def speeds(n_rows: int = 1024, width: int = 1024, rounds: int = 5) -> list[Speed]:
    """Measures every codec on a float32 matrix (n_rows, width) of positive numbers.

    Args:
        n_rows: rows of the matrix.
        width: columns; a multiple of 256, as some libraries need it.
        rounds: turns, of which the fastest counts.

    Raises:
        InvalidKnob: if the width is no multiple of 256.
    """
    if width % 256:
        raise InvalidKnob(f"width {width} is no multiple of 256, which the other libraries need")
    x = torch.rand(n_rows, width, generator=torch.Generator().manual_seed(0))
    runs, sizes = _ours(x)
    for library, add in (("torchao", _torchao), ("bitsandbytes", _bitsandbytes)):
        if importlib.util.find_spec(library) is not None:
            runs |= add(x)
    seconds = {name: float("inf") for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    copy = seconds["copy"]
    return [
        Speed(name, seconds[f"{name} >"] / copy, seconds[f"{name} <"] / copy, sizes.get(name, 0.0))
        for name in [key.removesuffix(" >") for key in runs if key.endswith(" >")]
    ]


def _ours(x: torch.Tensor) -> tuple[dict[str, Callable[[], object]], Mapping[str, float]]:
    """Encoding (>) and decoding (<) of every codec; bytes as a part of float32."""
    out, generator = torch.empty_like(x), torch.Generator().manual_seed(1)
    runs: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(x)}
    sizes = {}
    for name in NAMES:
        own = codec(name)
        packed = own.encode(x, generator)
        sizes[name] = packed.nbytes / x.nbytes
        runs[f"{name} >"] = lambda own=own: own.encode(x, generator)  # type: ignore[misc]
        runs[f"{name} <"] = lambda own=own, packed=packed: own.decode(packed, out=out)  # type: ignore[misc]
    return runs, sizes


def _torchao(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The optimizer states of torchao, without its compiler."""
    optim = importlib.import_module("torchao.optim.subclass_4bit")
    four = optim.OptimState4bit.zeros(x.shape, block_size=128)
    optim = importlib.import_module("torchao.optim.subclass_8bit")
    eight = optim.OptimState8bit.zeros(x.shape, block_size=256)
    return {
        "torchao 4-bit g128 >": lambda: four.copy_(x),
        "torchao 4-bit g128 <": lambda: four.dequantize(),
        "torchao 8-bit g256 >": lambda: eight.copy_(x),
        "torchao 8-bit g256 <": lambda: eight.dequantize(),
    }


def _bitsandbytes(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The block-wise functions of bitsandbytes, compiled for the CPU."""
    functional = importlib.import_module("bitsandbytes.functional")
    eight, eight_state = functional.quantize_blockwise(x, blocksize=256)
    four, four_state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
    return {
        "bitsandbytes dyn8 g256 >": lambda: functional.quantize_blockwise(x, blocksize=256),
        "bitsandbytes dyn8 g256 <": lambda: functional.dequantize_blockwise(eight, eight_state),
        "bitsandbytes nf4 g64 >": lambda: functional.quantize_4bit(
            x, blocksize=64, quant_type="nf4"
        ),
        "bitsandbytes nf4 g64 <": lambda: functional.dequantize_4bit(four, four_state),
    }


def main() -> None:
    """Prints the table."""
    print("codec                      encode/copy  decode/copy  bytes/float32")
    for row in speeds():
        size = f"{row.bytes_ratio:13.4f}" if row.bytes_ratio else " " * 13
        print(f"{row.name:26s} {row.encode_ratio:11.1f} {row.decode_ratio:12.1f} {size}")


if __name__ == "__main__":
    main()
