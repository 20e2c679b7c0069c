"""The open banks of a served file: at most so many, the least recently used one is closed first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memwise.errors import InvalidKnob
from memwise.recall.api import bank_names
from memwise.recall.engine.embed import Embedder, embedder
from memwise.recall.engine.store import SQLite
from memwise.recall.memory import Memory


class UnknownBank(InvalidKnob):
    """The file has no such bank, and the request does not make one."""


@dataclass(frozen=True)
class Options:
    """How every bank of the file is opened; as in `Memory`."""

    policy: str | None = None
    embedder: str | Embedder = "auto"
    llm: str | None = None
    budget: str | int | None = None


@dataclass
class _Open:
    memory: Memory
    users: int = 0


class Pool:
    """Banks of one file, opened when they are asked for.

    Args:
        path: the file.
        options: how banks are opened.
        most: banks kept open at the same time; banks in use are never closed.

    Raises:
        InvalidKnob: the path stands for no file that several banks could share.
    """

    def __init__(self, path: str | Path, options: Options | None = None, most: int = 32) -> None:
        if str(path) == ":memory:":
            raise InvalidKnob("a server needs a file; ':memory:' would be another for each bank")
        if most < 1:
            raise InvalidKnob(f"most={most}: keep at least 1 bank open")
        self.path = str(path)
        self.options = options or Options()
        self._most = most
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._embedder: Embedder | None = None  # one for all banks: a model takes its megabytes
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The banks of the file; none before the file is made."""
        return bank_names(self.path) if Path(self.path).is_file() else []

    @contextmanager
    def borrow(self, bank: str, *, make: bool = False) -> Iterator[Memory]:
        """A bank's memory, which stays open at least as long as it is borrowed.

        Raises:
            UnknownBank: there is no such bank; with `make` it is made.
        """
        with self._lock:
            held = self._open.get(bank)
            if held is None:
                if not make and bank not in self.names():
                    raise UnknownBank(f"there is no bank {bank!r}; adding something to it makes it")
                held = self._open[bank] = _Open(self._memory(bank))
            self._open.move_to_end(bank)
            held.users += 1
            self._shrink()
        try:
            yield held.memory
        finally:
            with self._lock:
                held.users -= 1
                self._shrink()

    def close(self) -> None:
        """Close all banks."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].memory.close()

    def _memory(self, bank: str) -> Memory:
        if self._embedder is None:
            self._embedder = embedder(self._recorded() or self.options.embedder)
        options = self.options
        return Memory(
            self.path, bank, options.policy, embedder=self._embedder, llm=options.llm,
            budget=options.budget,
        )  # fmt: skip

    def _recorded(self) -> str | None:
        """What the file says about its embedder, if nothing else was asked for."""
        if self.options.embedder != "auto" or not Path(self.path).is_file():
            return None
        store = SQLite(self.path)
        try:
            with store.guard():
                return str(store.meta("embedder spec") or "") or None
        finally:
            store.close()

    def _shrink(self) -> None:
        idle = [bank for bank, held in self._open.items() if not held.users]
        for bank in idle[: max(0, len(self._open) - self._most)]:
            self._open.pop(bank).memory.close()
