"""An embedder that remembers: a text is embedded once, however many memories and checks use it."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from memwise.models import cache_folder
from memwise.recall.engine.embed import Embedder, embedder

_BATCH = 500


class Memo:
    """Keep vectors in RAM, and MiniLM's in the cache folder too, by text and role.

    Args:
        inner: the embedder that makes them, or its name.
    """

    def __init__(self, inner: str | Embedder) -> None:
        self._inner = embedder(inner)
        self.dim, self.fingerprint = self._inner.dim, self._inner.fingerprint
        self._kept: dict[tuple[str, str], NDArray[np.float32]] = {}
        self._saves = self.fingerprint.startswith("minilm")
        # MiniLM and n-grams treat a query as a passage, so that one vector serves both.
        self._alike = not self.fingerprint.startswith(("http", "st/", "url"))

    @property
    def encoded(self) -> int:
        """Distinct texts that were asked for."""
        return len(self._kept)

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        """Unit vectors (n, dim), as the inner embedder gives them."""
        role = "passage" if self._alike else role
        new = [text for text in dict.fromkeys(texts) if (role, text) not in self._kept]
        for i in range(0, len(new), _BATCH):
            part = new[i : i + _BATCH]
            for text, vector in zip(part, self._made(part, role), strict=True):
                self._kept[role, text] = vector
        out = np.zeros((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            out[i] = self._kept[role, text]
        return out

    def _made(self, texts: Sequence[str], role: str) -> NDArray[np.float32]:
        if not self._saves:
            return np.asarray(self._inner.encode(texts, role), np.float32)
        keys = [_key(self.fingerprint, role, text) for text in texts]
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(folder / "vectors.db", timeout=30)) as db, db:
            db.execute("CREATE TABLE IF NOT EXISTS vectors(key BLOB PRIMARY KEY, vector BLOB)")
            marks = ",".join("?" * len(keys))
            known = dict(
                db.execute(f"SELECT key, vector FROM vectors WHERE key IN ({marks})", keys)
            )
        missing = [i for i, key in enumerate(keys) if key not in known]
        if missing:
            made = np.asarray(self._inner.encode([texts[i] for i in missing], role), np.float32)
            fresh = [(keys[i], made[j].tobytes()) for j, i in enumerate(missing)]
            with closing(sqlite3.connect(folder / "vectors.db", timeout=30)) as db, db:
                db.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", fresh)
            known |= dict(fresh)
        return np.stack([np.frombuffer(known[key], np.float32) for key in keys])


def _key(fingerprint: str, role: str, text: str) -> bytes:
    return blake2b("\0".join((fingerprint, role, text)).encode(), digest_size=16).digest()
