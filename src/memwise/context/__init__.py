"""Memory of the running model: KV cache, prefixes, prompts."""

# exports:begin (written by `make sync`)
from typing import TYPE_CHECKING, Any

from memwise.catalogue import export

if TYPE_CHECKING:
    from memwise.context.engine.anchors import AnchorCache, follow, hold
    from memwise.context.engine.consolidate import consolidate
    from memwise.context.engine.editor import edited
    from memwise.context.engine.features import FeatureMemory
    from memwise.context.engine.host import bounded, bytes_for
    from memwise.context.engine.plan import ByLayer, Uniform
    from memwise.context.engine.prefix import PrefixStore
    from memwise.context.engine.pruning import prune
    from memwise.context.engine.relay import relayed
    from memwise.context.engine.retaining import load_heads, save_heads, train_heads
    from memwise.context.engine.streaming import streamed
    from memwise.context.policies.attendre_layer import AttendreLayer
    from memwise.context.policies.attendre_often import AttendreOften
    from memwise.context.policies.attendre_recent import AttendreRecent
    from memwise.context.policies.attention_transition import AttentionTransition
    from memwise.context.policies.camelot import CAMELoT
    from memwise.context.policies.contextual_memory_reweaving import ContextualMemoryReweaving
    from memwise.context.policies.dam4sam import DAM4SAM, Masks
    from memwise.context.policies.endor import Endor
    from memwise.context.policies.fairy import Fairy
    from memwise.context.policies.finch import Finch
    from memwise.context.policies.full_cache import FullCache
    from memwise.context.policies.h2o import H2O
    from memwise.context.policies.infinipot import InfiniPot
    from memwise.context.policies.keydiff import KeyDiff
    from memwise.context.policies.last_layer_vectors import LastLayerVectors
    from memwise.context.policies.layer_stream import LayerStream
    from memwise.context.policies.llm_in_a_flash import LLMInAFlash
    from memwise.context.policies.lm_infinite import LMInfinite
    from memwise.context.policies.locret import Locret
    from memwise.context.policies.loma import LoMA
    from memwise.context.policies.lone_clips import LoneClips
    from memwise.context.policies.lone_frames import LoneFrames
    from memwise.context.policies.lone_segments import LoneSegments
    from memwise.context.policies.mc_vit import MCViT
    from memwise.context.policies.mean_pooled import MeanPooled
    from memwise.context.policies.memory_injections import MemoryInjections
    from memwise.context.policies.moviechat import MovieChat
    from memwise.context.policies.newest_frames import NewestFrames
    from memwise.context.policies.oracle import Oracle
    from memwise.context.policies.plain_decoding import PlainDecoding
    from memwise.context.policies.ppd import PPD
    from memwise.context.policies.random import Random
    from memwise.context.policies.random_frames import RandomFrames
    from memwise.context.policies.random_phrases import RandomPhrases
    from memwise.context.policies.random_segments import RandomSegments
    from memwise.context.policies.rcc import RCC
    from memwise.context.policies.relay_attention import RelayAttention
    from memwise.context.policies.replicated_prefix import ReplicatedPrefix
    from memwise.context.policies.s3 import S3
    from memwise.context.policies.selective_context import SelectiveContext
    from memwise.context.policies.self_extend import SelfExtend
    from memwise.context.policies.sharp_probe import SharpProbe
    from memwise.context.policies.sirllm import SirLLM
    from memwise.context.policies.sliding_window import SlidingWindow
    from memwise.context.policies.snapkv import SnapKV
    from memwise.context.policies.streaming_llm import StreamingLLM
    from memwise.context.policies.surprising_passages import SurprisingPassages
    from memwise.context.policies.tova import TOVA
    from memwise.context.policies.uniform_clips import UniformClips
    from memwise.context.policies.uniform_frames import UniformFrames
    from memwise.context.policies.videostreaming import VideoStreaming
    from memwise.context.policies.whole_segments import WholeSegments
    from memwise.context.policies.worst_case_reservation import WorstCaseReservation
    from memwise.context.policies.xl3m import XL3M

__all__ = [
    "DAM4SAM",
    "H2O",
    "PPD",
    "RCC",
    "S3",
    "TOVA",
    "XL3M",
    "AnchorCache",
    "AttendreLayer",
    "AttendreOften",
    "AttendreRecent",
    "AttentionTransition",
    "ByLayer",
    "CAMELoT",
    "ContextualMemoryReweaving",
    "Endor",
    "Fairy",
    "FeatureMemory",
    "Finch",
    "FullCache",
    "InfiniPot",
    "KeyDiff",
    "LLMInAFlash",
    "LMInfinite",
    "LastLayerVectors",
    "LayerStream",
    "LoMA",
    "Locret",
    "LoneClips",
    "LoneFrames",
    "LoneSegments",
    "MCViT",
    "Masks",
    "MeanPooled",
    "MemoryInjections",
    "MovieChat",
    "NewestFrames",
    "Oracle",
    "PlainDecoding",
    "PrefixStore",
    "Random",
    "RandomFrames",
    "RandomPhrases",
    "RandomSegments",
    "RelayAttention",
    "ReplicatedPrefix",
    "SelectiveContext",
    "SelfExtend",
    "SharpProbe",
    "SirLLM",
    "SlidingWindow",
    "SnapKV",
    "StreamingLLM",
    "SurprisingPassages",
    "Uniform",
    "UniformClips",
    "UniformFrames",
    "VideoStreaming",
    "WholeSegments",
    "WorstCaseReservation",
    "bounded",
    "bytes_for",
    "consolidate",
    "edited",
    "follow",
    "hold",
    "load_heads",
    "prune",
    "relayed",
    "save_heads",
    "streamed",
    "train_heads",
]

# Lazy, so that naming one method loads that method's dependencies and no others.
_WHERE: dict[str, tuple[str, ...]] = {
    "DAM4SAM": ("memwise.context.policies.dam4sam", "torch"),
    "H2O": ("memwise.context.policies.h2o", "torch"),
    "PPD": ("memwise.context.policies.ppd", "torch"),
    "RCC": ("memwise.context.policies.rcc", "torch"),
    "S3": ("memwise.context.policies.s3",),
    "TOVA": ("memwise.context.policies.tova", "torch"),
    "XL3M": ("memwise.context.policies.xl3m", "torch"),
    "AnchorCache": ("memwise.context.engine.anchors", "torch"),
    "AttendreLayer": ("memwise.context.policies.attendre_layer", "torch"),
    "AttendreOften": ("memwise.context.policies.attendre_often", "torch"),
    "AttendreRecent": ("memwise.context.policies.attendre_recent", "torch"),
    "AttentionTransition": ("memwise.context.policies.attention_transition", "torch"),
    "ByLayer": ("memwise.context.engine.plan", "torch"),
    "CAMELoT": ("memwise.context.policies.camelot", "torch"),
    "ContextualMemoryReweaving": ("memwise.context.policies.contextual_memory_reweaving", "torch"),
    "Endor": ("memwise.context.policies.endor", "torch"),
    "Fairy": ("memwise.context.policies.fairy", "torch"),
    "FeatureMemory": ("memwise.context.engine.features", "torch"),
    "Finch": ("memwise.context.policies.finch", "torch"),
    "FullCache": ("memwise.context.policies.full_cache", "torch"),
    "InfiniPot": ("memwise.context.policies.infinipot", "torch"),
    "KeyDiff": ("memwise.context.policies.keydiff", "torch"),
    "LLMInAFlash": ("memwise.context.policies.llm_in_a_flash", "torch"),
    "LMInfinite": ("memwise.context.policies.lm_infinite", "torch"),
    "LastLayerVectors": ("memwise.context.policies.last_layer_vectors", "torch"),
    "LayerStream": ("memwise.context.policies.layer_stream", "torch"),
    "LoMA": ("memwise.context.policies.loma", "torch"),
    "Locret": ("memwise.context.policies.locret", "torch"),
    "LoneClips": ("memwise.context.policies.lone_clips", "torch"),
    "LoneFrames": ("memwise.context.policies.lone_frames", "torch"),
    "LoneSegments": ("memwise.context.policies.lone_segments", "torch"),
    "MCViT": ("memwise.context.policies.mc_vit", "torch"),
    "Masks": ("memwise.context.policies.dam4sam", "torch"),
    "MeanPooled": ("memwise.context.policies.mean_pooled", "torch"),
    "MemoryInjections": ("memwise.context.policies.memory_injections", "torch"),
    "MovieChat": ("memwise.context.policies.moviechat", "torch"),
    "NewestFrames": ("memwise.context.policies.newest_frames", "torch"),
    "Oracle": ("memwise.context.policies.oracle", "torch"),
    "PlainDecoding": ("memwise.context.policies.plain_decoding", "torch"),
    "PrefixStore": ("memwise.context.engine.prefix", "torch"),
    "Random": ("memwise.context.policies.random", "torch"),
    "RandomFrames": ("memwise.context.policies.random_frames", "torch"),
    "RandomPhrases": ("memwise.context.policies.random_phrases", "torch"),
    "RandomSegments": ("memwise.context.policies.random_segments", "torch"),
    "RelayAttention": ("memwise.context.policies.relay_attention", "torch"),
    "ReplicatedPrefix": ("memwise.context.policies.replicated_prefix", "torch"),
    "SelectiveContext": ("memwise.context.policies.selective_context", "torch"),
    "SelfExtend": ("memwise.context.policies.self_extend", "torch"),
    "SharpProbe": ("memwise.context.policies.sharp_probe", "torch"),
    "SirLLM": ("memwise.context.policies.sirllm", "torch"),
    "SlidingWindow": ("memwise.context.policies.sliding_window", "torch"),
    "SnapKV": ("memwise.context.policies.snapkv", "torch"),
    "StreamingLLM": ("memwise.context.policies.streaming_llm", "torch"),
    "SurprisingPassages": ("memwise.context.policies.surprising_passages", "torch"),
    "Uniform": ("memwise.context.engine.plan", "torch"),
    "UniformClips": ("memwise.context.policies.uniform_clips", "torch"),
    "UniformFrames": ("memwise.context.policies.uniform_frames", "torch"),
    "VideoStreaming": ("memwise.context.policies.videostreaming", "torch"),
    "WholeSegments": ("memwise.context.policies.whole_segments", "torch"),
    "WorstCaseReservation": ("memwise.context.policies.worst_case_reservation",),
    "bounded": ("memwise.context.engine.host", "torch"),
    "bytes_for": ("memwise.context.engine.host", "torch"),
    "consolidate": ("memwise.context.engine.consolidate", "torch"),
    "edited": ("memwise.context.engine.editor", "torch"),
    "follow": ("memwise.context.engine.anchors", "torch"),
    "hold": ("memwise.context.engine.anchors", "torch"),
    "load_heads": ("memwise.context.engine.retaining", "torch"),
    "prune": ("memwise.context.engine.pruning", "torch"),
    "relayed": ("memwise.context.engine.relay", "torch"),
    "save_heads": ("memwise.context.engine.retaining", "torch"),
    "streamed": ("memwise.context.engine.streaming", "torch"),
    "train_heads": ("memwise.context.engine.retaining", "torch"),
}


def __getattr__(name: str) -> Any:
    return export(__name__, _WHERE, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# exports:end
