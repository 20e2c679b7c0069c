"""Memory of the running model: KV cache, prefixes, prompts."""

# exports:begin (written by `make sync`)
from typing import TYPE_CHECKING, Any

from memwise.catalogue import export

if TYPE_CHECKING:
    from memwise.context.engine.host import bounded, bytes_for
    from memwise.context.engine.plan import ByLayer, Uniform
    from memwise.context.policies.finch import Finch
    from memwise.context.policies.full_cache import FullCache
    from memwise.context.policies.h2o import H2O
    from memwise.context.policies.infinipot import InfiniPot
    from memwise.context.policies.keydiff import KeyDiff
    from memwise.context.policies.lm_infinite import LMInfinite
    from memwise.context.policies.moviechat import MovieChat
    from memwise.context.policies.newest_frames import NewestFrames
    from memwise.context.policies.oracle import Oracle
    from memwise.context.policies.random import Random
    from memwise.context.policies.random_frames import RandomFrames
    from memwise.context.policies.self_extend import SelfExtend
    from memwise.context.policies.sharp_probe import SharpProbe
    from memwise.context.policies.sliding_window import SlidingWindow
    from memwise.context.policies.snapkv import SnapKV
    from memwise.context.policies.streaming_llm import StreamingLLM
    from memwise.context.policies.surprising_passages import SurprisingPassages
    from memwise.context.policies.tova import TOVA
    from memwise.context.policies.uniform_frames import UniformFrames

__all__ = [
    "H2O",
    "TOVA",
    "ByLayer",
    "Finch",
    "FullCache",
    "InfiniPot",
    "KeyDiff",
    "LMInfinite",
    "MovieChat",
    "NewestFrames",
    "Oracle",
    "Random",
    "RandomFrames",
    "SelfExtend",
    "SharpProbe",
    "SlidingWindow",
    "SnapKV",
    "StreamingLLM",
    "SurprisingPassages",
    "Uniform",
    "UniformFrames",
    "bounded",
    "bytes_for",
]

# Lazy, so that naming one method loads that method's dependencies and no others.
_WHERE: dict[str, tuple[str, ...]] = {
    "H2O": ("memwise.context.policies.h2o", "torch"),
    "TOVA": ("memwise.context.policies.tova", "torch"),
    "ByLayer": ("memwise.context.engine.plan", "torch"),
    "Finch": ("memwise.context.policies.finch", "torch"),
    "FullCache": ("memwise.context.policies.full_cache", "torch"),
    "InfiniPot": ("memwise.context.policies.infinipot", "torch"),
    "KeyDiff": ("memwise.context.policies.keydiff", "torch"),
    "LMInfinite": ("memwise.context.policies.lm_infinite", "torch"),
    "MovieChat": ("memwise.context.policies.moviechat", "torch"),
    "NewestFrames": ("memwise.context.policies.newest_frames", "torch"),
    "Oracle": ("memwise.context.policies.oracle", "torch"),
    "Random": ("memwise.context.policies.random", "torch"),
    "RandomFrames": ("memwise.context.policies.random_frames", "torch"),
    "SelfExtend": ("memwise.context.policies.self_extend", "torch"),
    "SharpProbe": ("memwise.context.policies.sharp_probe", "torch"),
    "SlidingWindow": ("memwise.context.policies.sliding_window", "torch"),
    "SnapKV": ("memwise.context.policies.snapkv", "torch"),
    "StreamingLLM": ("memwise.context.policies.streaming_llm", "torch"),
    "SurprisingPassages": ("memwise.context.policies.surprising_passages", "torch"),
    "Uniform": ("memwise.context.engine.plan", "torch"),
    "UniformFrames": ("memwise.context.policies.uniform_frames", "torch"),
    "bounded": ("memwise.context.engine.host", "torch"),
    "bytes_for": ("memwise.context.engine.host", "torch"),
}


def __getattr__(name: str) -> Any:
    return export(__name__, _WHERE, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# exports:end
