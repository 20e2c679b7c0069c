"""Locality-sensitive hashing of unit vectors: near ones share a bucket, and only it is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from memwise.recall.engine.index import Floats, Index, Ints


@dataclass(frozen=True)
class CrossPolytope:
    """F(x) = argmax([xR; -xR]): the signed random axis that lies nearest to x.

    Attributes:
        dim: width d of the vectors.
        n_buckets: b, even; R is d x b/2 with normal entries.
        seed: of R.
    """

    dim: int
    n_buckets: int = 16
    seed: int = 0

    def axes(self) -> Floats:
        """R, (d, b/2)."""
        rng = np.random.default_rng(self.seed)
        return rng.standard_normal((self.dim, self.n_buckets // 2)).astype(np.float32)

    def closeness(self, vectors: Floats, axes: Floats) -> Floats:
        """How near each vector lies to each bucket's axis, (n, b)."""
        along = vectors @ axes
        return np.concatenate([along, -along], axis=1)


class Buckets:
    """The rows of an index's derived items by bucket; it follows the index as that grows.

    Rows that are gone may still be listed: whoever reads a bucket looks the items up anyway.
    """

    def __init__(self, hashing: CrossPolytope):
        self._hashing, self._axes = hashing, hashing.axes()
        self._rows: list[list[int]] = [[] for _ in range(hashing.n_buckets)]
        self._bucket: dict[int, int] = {}
        self._last = -1

    @classmethod
    def of(cls, index: Index, n_buckets: int, seed: int) -> Buckets:
        """The buckets that hang on an index, up to date."""
        hashing = CrossPolytope(index.dim, n_buckets, seed)
        found = index.attached(hashing, lambda: cls(hashing))
        found.follow(index.derived.rows, index.vectors)
        return found

    def follow(self, rows: Ints, vectors: Callable[[Sequence[int]], Floats]) -> None:
        """File rows, ascending, that came since the last call; vectors are read for them alone."""
        new = rows[np.searchsorted(rows, self._last, side="right") :].tolist()
        if new:
            near = self._hashing.closeness(vectors(new), self._axes).argmax(axis=1)
            for row, bucket in zip(new, near.tolist(), strict=True):
                self._rows[bucket].append(row)
                self._bucket[row] = bucket
            self._last = new[-1]

    def __getitem__(self, row: int) -> int:
        """The bucket of a row."""
        return self._bucket[row]

    def rows(self, bucket: int) -> list[int]:
        """The rows of a bucket, ascending."""
        return self._rows[bucket]

    def probed(self, vector: Floats) -> Iterator[list[int]]:
        """The rows of each bucket, the vector's own first, then by the distance of its axis."""
        order = np.argsort(-self._hashing.closeness(vector[None], self._axes)[0], kind="stable")
        return (self._rows[bucket] for bucket in order.tolist())

    @property
    def nbytes(self) -> int:
        """RAM of the axes and of two references a row."""
        return self._axes.nbytes + 16 * len(self._bucket)
