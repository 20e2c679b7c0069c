"""More memory for AI models from fewer bytes.

`Memory` is the long-term memory of an agent in one file; `Budget` is a number of bytes; `methods()`
lists every paper that memwise covers and how far its evidence goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memwise.budget import Budget
from memwise.catalogue import methods

if TYPE_CHECKING:
    from memwise.recall.memory import Memory

__version__ = "0.1.0"
__all__ = ["Budget", "Memory", "__version__", "methods"]


def __getattr__(name: str) -> Any:
    # Lazy, because listing methods or reading a budget must not pay for a database and numpy.
    if name == "Memory":
        from memwise.recall.memory import Memory

        return Memory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
