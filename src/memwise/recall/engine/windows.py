"""Text longer than a model's input: overlapping windows, and one vector out of theirs."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def windows(length: int, size: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `size` that cover `length`; the last is moved back so that it is full."""
    for start in range(0, max(length - overlap, min(length, 1)), size - overlap):
        first = max(0, min(start, length - size))
        yield first, min(first + size, length)


def encodable(text: str) -> str:
    """The text with a question mark for every lone surrogate: no tokenizer takes those."""
    return text.encode("utf-8", "replace").decode()


def pooled(vectors: NDArray[np.float32], owners: Sequence[int], n: int) -> NDArray[np.float32]:
    """One unit vector a text (n, D): the largest value of each coordinate over its windows.

    Args:
        vectors: one row a window, of any norm, in the order of the texts.
        owners: number of the text that each window belongs to, ascending.
        n: texts; one without windows gets a row of zeros.
    """
    out = np.zeros((n, vectors.shape[1]), np.float32)
    if len(owners):
        texts, first = np.unique(owners, return_index=True)
        out[texts] = np.maximum.reduceat(normalized(vectors), first, axis=0)
    return normalized(out)


def normalized(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows at norm 1; rows of zeros stay as they are."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32, copy=False)
