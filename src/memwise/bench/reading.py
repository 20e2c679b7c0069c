"""What checks of packed contexts share: telling a conversation, and what can be read of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from memwise.bench.data import Conversation
from memwise.recall.engine.dates import iso
from memwise.recall.engine.embed import Embedder
from memwise.recall.engine.policy import Policy
from memwise.recall.engine.records import Context
from memwise.recall.engine.text import unspoken
from memwise.recall.memory import Memory

SPAN_WORDS = 4
"""Fewest words in a row that count as read: shorter runs are found anywhere."""


class Once:
    """An embedder that encodes every text once, for several memories of the same turns."""

    def __init__(self, inner: Embedder) -> None:
        self._inner, self._known = inner, dict[str, NDArray[np.float32]]()
        self.dim, self.fingerprint = inner.dim, inner.fingerprint

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        """Unit vectors (n, dim)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known |= dict(zip(new, self._inner.encode(new, role), strict=True))
        return np.array([self._known[t] for t in texts], np.float32).reshape(-1, self.dim)


def told(
    conversation: Conversation, policy: Policy, embedder: str | Embedder, *, at_once: bool = True
) -> Memory:
    """A memory in RAM that was told a conversation; its clock stands at the last turn.

    Args:
        conversation: what to tell.
        policy: the memory's policy.
        embedder: the memory's embedder.
        at_once: all turns in one call; else one call a turn.
    """
    end = iso(conversation.turns[-1].at)
    memory = Memory(":memory:", policy=policy, embedder=embedder, clock=lambda: end)
    messages = [
        {
            "content": unspoken(turn.actor, turn.text), "actor": turn.actor, "at": iso(turn.at),
            "session": turn.session, "meta": {"ref": turn.ref},
        }
        for turn in conversation.turns
    ]  # fmt: skip
    for part in [messages] if at_once else [[message] for message in messages]:
        memory.add(part)
    return memory


def readable(context: Context, gold: Collection[str], texts: Mapping[str, str]) -> float:
    """Mean share of the gold turns' words that stand in a context, in runs of a few words."""
    read = _runs(" \n ".join(part.text for part in context.parts))
    return float(np.mean([_share(texts[ref], read) for ref in sorted(gold)]))


def whole(context: Context, gold: Collection[str], texts: Mapping[str, str]) -> float:
    """Share of the gold turns that stand in a context word for word."""
    read = " ".join(" ".join(part.text.split()) for part in context.parts)
    return float(np.mean([" ".join(texts[ref].split()) in read for ref in sorted(gold)]))


def spoken_texts(conversation: Conversation) -> dict[str, str]:
    """Ref -> what was said, without the speaker."""
    return {turn.ref: unspoken(turn.actor, turn.text) for turn in conversation.turns}


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + SPAN_WORDS]) for i in range(len(words) - SPAN_WORDS + 1)}


def _share(text: str, read: set[tuple[str, ...]]) -> float:
    words = text.split()
    if len(words) < SPAN_WORDS:
        return 0.0
    seen = np.zeros(len(words), bool)
    for i in range(len(words) - SPAN_WORDS + 1):
        if tuple(words[i : i + SPAN_WORDS]) in read:
            seen[i : i + SPAN_WORDS] = True
    return float(seen.mean())
