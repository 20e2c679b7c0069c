"""Memory outside the model: what an agent is told."""

# exports:begin (written by `make sync`)
from typing import TYPE_CHECKING, Any

from memwise.catalogue import export

if TYPE_CHECKING:
    from memwise.recall.engine.records import Context, Hit, Receipt
    from memwise.recall.memory import Memory
    from memwise.recall.policies.a_mem import AMem
    from memwise.recall.policies.append_only import AppendOnly
    from memwise.recall.policies.bm25 import BM25
    from memwise.recall.policies.dense import Dense
    from memwise.recall.policies.fifo import Fifo
    from memwise.recall.policies.isolated_memories import IsolatedMemories
    from memwise.recall.policies.keep_me_updated import KeepMeUpdated
    from memwise.recall.policies.last_write_wins import LastWriteWins
    from memwise.recall.policies.lfu import Lfu
    from memwise.recall.policies.lru import Lru
    from memwise.recall.policies.memgpt import MemGPT
    from memwise.recall.policies.memorybank import MemoryBank
    from memwise.recall.policies.most_recent import MostRecent
    from memwise.recall.policies.random_eviction import RandomEviction
    from memwise.recall.policies.random_recall import RandomRecall
    from memwise.recall.policies.readagent import ReadAgent
    from memwise.recall.policies.recursive_summaries import RecursiveSummaries
    from memwise.recall.policies.ret_llm import RETLLM
    from memwise.recall.policies.reversed_retention import ReversedRetention
    from memwise.recall.policies.rrf import RRF
    from memwise.recall.policies.scm import SCM
    from memwise.recall.policies.single_shot import SingleShot
    from memwise.recall.policies.structural_memory import StructuralMemory
    from memwise.recall.policies.theanine import Theanine
    from memwise.recall.policies.think_in_memory import ThinkInMemory
    from memwise.recall.policies.top_pages import TopPages
    from memwise.recall.policies.truncated import Truncated
    from memwise.recall.policies.zep import Zep

__all__ = [
    "BM25",
    "RETLLM",
    "RRF",
    "SCM",
    "AMem",
    "AppendOnly",
    "Context",
    "Dense",
    "Fifo",
    "Hit",
    "IsolatedMemories",
    "KeepMeUpdated",
    "LastWriteWins",
    "Lfu",
    "Lru",
    "MemGPT",
    "Memory",
    "MemoryBank",
    "MostRecent",
    "RandomEviction",
    "RandomRecall",
    "ReadAgent",
    "Receipt",
    "RecursiveSummaries",
    "ReversedRetention",
    "SingleShot",
    "StructuralMemory",
    "Theanine",
    "ThinkInMemory",
    "TopPages",
    "Truncated",
    "Zep",
]

# Lazy, so that naming one method loads that method's dependencies and no others.
_WHERE: dict[str, tuple[str, ...]] = {
    "BM25": ("memwise.recall.policies.bm25",),
    "RETLLM": ("memwise.recall.policies.ret_llm",),
    "RRF": ("memwise.recall.policies.rrf", "embed"),
    "SCM": ("memwise.recall.policies.scm",),
    "AMem": ("memwise.recall.policies.a_mem", "embed"),
    "AppendOnly": ("memwise.recall.policies.append_only",),
    "Context": ("memwise.recall.engine.records",),
    "Dense": ("memwise.recall.policies.dense", "embed"),
    "Fifo": ("memwise.recall.policies.fifo",),
    "Hit": ("memwise.recall.engine.records",),
    "IsolatedMemories": ("memwise.recall.policies.isolated_memories",),
    "KeepMeUpdated": ("memwise.recall.policies.keep_me_updated",),
    "LastWriteWins": ("memwise.recall.policies.last_write_wins",),
    "Lfu": ("memwise.recall.policies.lfu",),
    "Lru": ("memwise.recall.policies.lru",),
    "MemGPT": ("memwise.recall.policies.memgpt",),
    "Memory": ("memwise.recall.memory",),
    "MemoryBank": ("memwise.recall.policies.memorybank",),
    "MostRecent": ("memwise.recall.policies.most_recent",),
    "RandomEviction": ("memwise.recall.policies.random_eviction",),
    "RandomRecall": ("memwise.recall.policies.random_recall",),
    "ReadAgent": ("memwise.recall.policies.readagent",),
    "Receipt": ("memwise.recall.engine.records",),
    "RecursiveSummaries": ("memwise.recall.policies.recursive_summaries",),
    "ReversedRetention": ("memwise.recall.policies.reversed_retention",),
    "SingleShot": ("memwise.recall.policies.single_shot",),
    "StructuralMemory": ("memwise.recall.policies.structural_memory",),
    "Theanine": ("memwise.recall.policies.theanine", "embed"),
    "ThinkInMemory": ("memwise.recall.policies.think_in_memory",),
    "TopPages": ("memwise.recall.policies.top_pages",),
    "Truncated": ("memwise.recall.policies.truncated",),
    "Zep": ("memwise.recall.policies.zep",),
}


def __getattr__(name: str) -> Any:
    return export(__name__, _WHERE, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# exports:end
