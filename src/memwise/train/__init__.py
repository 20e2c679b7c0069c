"""Memory of training: optimizers, activations, adapters, ranks."""

# exports:begin (written by `make sync`)
from typing import TYPE_CHECKING, Any

from memwise.catalogue import export

if TYPE_CHECKING:
    from memwise.train.policies.adamw import AdamW
    from memwise.train.policies.adamw4bit import AdamW4bit
    from memwise.train.policies.coat_states import CoatStates
    from memwise.train.policies.galore import GaLore
    from memwise.train.policies.lion import Lion
    from memwise.train.policies.online_subspace_descent import OnlineSubspaceDescent
    from memwise.train.policies.plain_blocks import PlainBlocks
    from memwise.train.policies.reversible_3d_unet import Reversible3DUNet
    from memwise.train.policies.reversible_darts import ReversibleDARTS
    from memwise.train.policies.sgdm import SGDM
    from memwise.train.policies.streamlined_inference import StreamlinedInference
    from memwise.train.policies.video_first_masking import VideoFirstMasking

__all__ = [
    "SGDM",
    "AdamW",
    "AdamW4bit",
    "CoatStates",
    "GaLore",
    "Lion",
    "OnlineSubspaceDescent",
    "PlainBlocks",
    "Reversible3DUNet",
    "ReversibleDARTS",
    "StreamlinedInference",
    "VideoFirstMasking",
]

# Lazy, so that naming one method loads that method's dependencies and no others.
_WHERE: dict[str, tuple[str, ...]] = {
    "SGDM": ("memwise.train.policies.sgdm", "torch"),
    "AdamW": ("memwise.train.policies.adamw", "torch"),
    "AdamW4bit": ("memwise.train.policies.adamw4bit", "torch"),
    "CoatStates": ("memwise.train.policies.coat_states", "torch"),
    "GaLore": ("memwise.train.policies.galore", "torch"),
    "Lion": ("memwise.train.policies.lion", "torch"),
    "OnlineSubspaceDescent": ("memwise.train.policies.online_subspace_descent", "torch"),
    "PlainBlocks": ("memwise.train.policies.plain_blocks", "torch"),
    "Reversible3DUNet": ("memwise.train.policies.reversible_3d_unet", "torch"),
    "ReversibleDARTS": ("memwise.train.policies.reversible_darts", "torch"),
    "StreamlinedInference": ("memwise.train.policies.streamlined_inference", "torch"),
    "VideoFirstMasking": ("memwise.train.policies.video_first_masking", "torch"),
}


def __getattr__(name: str) -> Any:
    return export(__name__, _WHERE, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# exports:end
