"""Memory of the running model: KV cache, prefixes, prompts."""

# exports:begin (written by `make sync`)
from typing import TYPE_CHECKING, Any

from memwise.catalogue import export

if TYPE_CHECKING:
    from memwise.context.engine.host import bounded, bytes_for
    from memwise.context.engine.plan import ByLayer, Uniform
    from memwise.context.policies.finch import Finch
    from memwise.context.policies.h2o import H2O
    from memwise.context.policies.keydiff import KeyDiff
    from memwise.context.policies.oracle import Oracle
    from memwise.context.policies.random import Random
    from memwise.context.policies.sharp_probe import SharpProbe
    from memwise.context.policies.sliding_window import SlidingWindow
    from memwise.context.policies.snapkv import SnapKV
    from memwise.context.policies.streaming_llm import StreamingLLM
    from memwise.context.policies.tova import TOVA

__all__ = [
    "H2O",
    "TOVA",
    "ByLayer",
    "Finch",
    "KeyDiff",
    "Oracle",
    "Random",
    "SharpProbe",
    "SlidingWindow",
    "SnapKV",
    "StreamingLLM",
    "Uniform",
    "bounded",
    "bytes_for",
]

# Lazy, so that naming one method loads that method's dependencies and no others.
_WHERE: dict[str, tuple[str, ...]] = {
    "H2O": ("memwise.context.policies.h2o", "torch"),
    "TOVA": ("memwise.context.policies.tova", "torch"),
    "ByLayer": ("memwise.context.engine.plan", "torch"),
    "Finch": ("memwise.context.policies.finch", "torch"),
    "KeyDiff": ("memwise.context.policies.keydiff", "torch"),
    "Oracle": ("memwise.context.policies.oracle", "torch"),
    "Random": ("memwise.context.policies.random", "torch"),
    "SharpProbe": ("memwise.context.policies.sharp_probe", "torch"),
    "SlidingWindow": ("memwise.context.policies.sliding_window", "torch"),
    "SnapKV": ("memwise.context.policies.snapkv", "torch"),
    "StreamingLLM": ("memwise.context.policies.streaming_llm", "torch"),
    "Uniform": ("memwise.context.engine.plan", "torch"),
    "bounded": ("memwise.context.engine.host", "torch"),
    "bytes_for": ("memwise.context.engine.host", "torch"),
}


def __getattr__(name: str) -> Any:
    return export(__name__, _WHERE, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# exports:end
