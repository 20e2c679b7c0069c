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
    from memwise.train.policies.sgdm import SGDM

__all__ = [
    "SGDM",
    "AdamW",
    "AdamW4bit",
    "CoatStates",
    "GaLore",
    "Lion",
    "OnlineSubspaceDescent",
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
}


def __getattr__(name: str) -> Any:
    return export(__name__, _WHERE, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# exports:end
