"""Memory of training: optimizers, activations, adapters, ranks."""

# exports:begin (written by `make sync`)
from typing import TYPE_CHECKING, Any

from memwise.catalogue import export

if TYPE_CHECKING:
    from memwise.train.engine.activations import compress_activations
    from memwise.train.engine.peft import from_peft, load_peft, save_peft
    from memwise.train.engine.reversible import ReversibleSequence
    from memwise.train.policies.adafactor import Adafactor
    from memwise.train.policies.adamw import AdamW
    from memwise.train.policies.adamw4bit import AdamW4bit
    from memwise.train.policies.apiq import ApiQ
    from memwise.train.policies.coat_activations import CoatActivations
    from memwise.train.policies.coat_states import CoatStates
    from memwise.train.policies.compact import CompAct
    from memwise.train.policies.dpsgd import DPSGD
    from memwise.train.policies.few_bit_backward import FewBitBackward
    from memwise.train.policies.galore import GaLore
    from memwise.train.policies.ist import IST
    from memwise.train.policies.keep import Keep
    from memwise.train.policies.lazydp import LazyDP
    from memwise.train.policies.lemo import LeMo
    from memwise.train.policies.lion import Lion
    from memwise.train.policies.lora import LoRA
    from memwise.train.policies.lors import LoRS
    from memwise.train.policies.memo_swap import MemoSwap
    from memwise.train.policies.neuzip import NeuZip
    from memwise.train.policies.offload import Offload
    from memwise.train.policies.online_subspace_descent import OnlineSubspaceDescent
    from memwise.train.policies.peqa import PEQA
    from memwise.train.policies.plain_blocks import PlainBlocks
    from memwise.train.policies.q_galore import QGaLore
    from memwise.train.policies.qlora import QLoRA
    from memwise.train.policies.quantized_diffusion_personalization import (
        QuantizedDiffusionPersonalization,
    )
    from memwise.train.policies.randlora import RandLoRA
    from memwise.train.policies.randomized_linear_backward import RandomizedLinearBackward
    from memwise.train.policies.read import READ
    from memwise.train.policies.recompute import Recompute
    from memwise.train.policies.reversible_3d_unet import Reversible3DUNet
    from memwise.train.policies.reversible_darts import ReversibleDARTS
    from memwise.train.policies.selective_differentiation import SelectiveDifferentiation
    from memwise.train.policies.sgdm import SGDM
    from memwise.train.policies.sst import SST
    from memwise.train.policies.streamlined_inference import StreamlinedInference
    from memwise.train.policies.video_first_masking import VideoFirstMasking
    from memwise.train.tune import Settings, tune

__all__ = [
    "DPSGD",
    "IST",
    "PEQA",
    "READ",
    "SGDM",
    "SST",
    "Adafactor",
    "AdamW",
    "AdamW4bit",
    "ApiQ",
    "CoatActivations",
    "CoatStates",
    "CompAct",
    "FewBitBackward",
    "GaLore",
    "Keep",
    "LazyDP",
    "LeMo",
    "Lion",
    "LoRA",
    "LoRS",
    "MemoSwap",
    "NeuZip",
    "Offload",
    "OnlineSubspaceDescent",
    "PlainBlocks",
    "QGaLore",
    "QLoRA",
    "QuantizedDiffusionPersonalization",
    "RandLoRA",
    "RandomizedLinearBackward",
    "Recompute",
    "Reversible3DUNet",
    "ReversibleDARTS",
    "ReversibleSequence",
    "SelectiveDifferentiation",
    "Settings",
    "StreamlinedInference",
    "VideoFirstMasking",
    "compress_activations",
    "from_peft",
    "load_peft",
    "save_peft",
    "tune",
]

# Lazy, so that naming one method loads that method's dependencies and no others.
_WHERE: dict[str, tuple[str, ...]] = {
    "DPSGD": ("memwise.train.policies.dpsgd", "torch"),
    "IST": ("memwise.train.policies.ist", "torch"),
    "PEQA": ("memwise.train.policies.peqa", "torch"),
    "READ": ("memwise.train.policies.read", "torch"),
    "SGDM": ("memwise.train.policies.sgdm", "torch"),
    "SST": ("memwise.train.policies.sst", "torch"),
    "Adafactor": ("memwise.train.policies.adafactor", "torch"),
    "AdamW": ("memwise.train.policies.adamw", "torch"),
    "AdamW4bit": ("memwise.train.policies.adamw4bit", "torch"),
    "ApiQ": ("memwise.train.policies.apiq", "torch"),
    "CoatActivations": ("memwise.train.policies.coat_activations", "torch"),
    "CoatStates": ("memwise.train.policies.coat_states", "torch"),
    "CompAct": ("memwise.train.policies.compact", "torch"),
    "FewBitBackward": ("memwise.train.policies.few_bit_backward", "torch"),
    "GaLore": ("memwise.train.policies.galore", "torch"),
    "Keep": ("memwise.train.policies.keep", "torch"),
    "LazyDP": ("memwise.train.policies.lazydp", "torch"),
    "LeMo": ("memwise.train.policies.lemo", "torch"),
    "Lion": ("memwise.train.policies.lion", "torch"),
    "LoRA": ("memwise.train.policies.lora", "torch"),
    "LoRS": ("memwise.train.policies.lors", "torch"),
    "MemoSwap": ("memwise.train.policies.memo_swap", "torch"),
    "NeuZip": ("memwise.train.policies.neuzip", "torch"),
    "Offload": ("memwise.train.policies.offload", "torch"),
    "OnlineSubspaceDescent": ("memwise.train.policies.online_subspace_descent", "torch"),
    "PlainBlocks": ("memwise.train.policies.plain_blocks", "torch"),
    "QGaLore": ("memwise.train.policies.q_galore", "torch"),
    "QLoRA": ("memwise.train.policies.qlora", "torch"),
    "QuantizedDiffusionPersonalization": (
        "memwise.train.policies.quantized_diffusion_personalization",
        "torch",
    ),
    "RandLoRA": ("memwise.train.policies.randlora", "torch"),
    "RandomizedLinearBackward": ("memwise.train.policies.randomized_linear_backward", "torch"),
    "Recompute": ("memwise.train.policies.recompute", "torch"),
    "Reversible3DUNet": ("memwise.train.policies.reversible_3d_unet", "torch"),
    "ReversibleDARTS": ("memwise.train.policies.reversible_darts", "torch"),
    "ReversibleSequence": ("memwise.train.engine.reversible", "torch"),
    "SelectiveDifferentiation": ("memwise.train.policies.selective_differentiation", "torch"),
    "Settings": ("memwise.train.tune", "torch"),
    "StreamlinedInference": ("memwise.train.policies.streamlined_inference", "torch"),
    "VideoFirstMasking": ("memwise.train.policies.video_first_masking", "torch"),
    "compress_activations": ("memwise.train.engine.activations", "torch"),
    "from_peft": ("memwise.train.engine.peft", "torch"),
    "load_peft": ("memwise.train.engine.peft", "torch"),
    "save_peft": ("memwise.train.engine.peft", "torch"),
    "tune": ("memwise.train.tune", "torch"),
}


def __getattr__(name: str) -> Any:
    return export(__name__, _WHERE, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# exports:end
