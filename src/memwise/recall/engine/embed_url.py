"""Sentence vectors from a server that speaks OpenAI's /embeddings; standard library only."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.parse import urldefrag, urlsplit

import numpy as np
from numpy.typing import NDArray

from memwise.errors import EmbedderUnavailable, InvalidKnob
from memwise.recall.engine.windows import encodable, normalized, pooled, windows

PREPROCESSING = 1
KEYS = ("MEMWISE_API_KEY", "OPENAI_API_KEY")
BATCH_TEXTS = 64
WINDOW_CHARACTERS = 8000
OVERLAP_CHARACTERS = 800
TRIES = 4
LONGEST_WAIT_S = 30.0
RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})


class Remote:
    """Vectors of a model behind a URL; opening asks the server once, to learn the dimension.

    Busy servers and broken connections are retried with growing pauses. Long text is sent in
    windows and max-pooled. The key comes from `MEMWISE_API_KEY`, else `OPENAI_API_KEY`.

    Args:
        spec: base URL with the model's name, `http://127.0.0.1:8080/v1#all-minilm`.
        timeout_s: seconds to wait for one answer.
        sleep: how to pause between tries.

    Raises:
        InvalidKnob: if the URL has no model name, or the server refuses the request as wrong.
        EmbedderUnavailable: if the server cannot be reached or answers nonsense.

    Note:
        The weights cannot be hashed from here: the fingerprint trusts the model's name.
    """

    def __init__(
        self, spec: str, timeout_s: float = 60.0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        base, self._model = urldefrag(spec)
        if urlsplit(base).scheme not in ("http", "https") or not self._model:
            raise InvalidKnob(
                f"embedder {spec!r} must be a URL with a model, such as "
                "'http://127.0.0.1:8080/v1#all-minilm'"
            )
        base = base.rstrip("/")
        self.spec = spec
        self._url = base if base.endswith("/embeddings") else f"{base}/embeddings"
        self._timeout_s, self._sleep = timeout_s, sleep
        # A redirect would carry the key to wherever the server points.
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.dim = self._ask(["dimension"]).shape[1]
        self.fingerprint = f"url:{self._model}/{self.dim}/{PREPROCESSING}"

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        """Unit vectors (n, dim) of the texts; a zero row for a text without a word.

        Args:
            texts: any length each.
            role: passage or query; the protocol has no word for it, so both are sent alike.
        """
        parts: list[str] = []
        owners: list[int] = []
        for i, text in enumerate(map(encodable, texts)):
            length = len(text) if text.strip() else 0
            for start, stop in windows(length, WINDOW_CHARACTERS, OVERLAP_CHARACTERS):
                parts.append(text[start:stop])
                owners.append(i)
        vectors = np.zeros((len(parts), self.dim), np.float32)
        for start in range(0, len(parts), BATCH_TEXTS):
            some = self._ask(parts[start : start + BATCH_TEXTS])
            if some.shape[1] != self.dim:
                raise EmbedderUnavailable(
                    f"{self._url} answered {some.shape[1]} dimensions, before {self.dim}; was the "
                    f"model {self._model!r} exchanged? Open the memory again"
                )
            vectors[start : start + BATCH_TEXTS] = some
        return pooled(vectors, owners, len(texts))

    def _ask(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One request; retried while that can help."""
        body = json.dumps({"model": self._model, "input": texts, "encoding_format": "float"})
        headers = {"Content-Type": "application/json"}
        key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, body.encode(), headers)
        for i in range(TRIES):
            try:
                with self._opener.open(request, timeout=self._timeout_s) as answer:
                    return _vectors(answer.read(), len(texts), self._url)
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(500).decode("utf-8", "replace").strip()
                why = f"answered {error.code} {error.reason}: {said}"
                if error.code not in RETRIED:
                    raise InvalidKnob(
                        f"{self._url} {why}; check the URL, the model {self._model!r} and the key "
                        f"in {' or '.join(KEYS)}"
                    ) from error
                pause = _pause(i, error.headers.get("Retry-After"))
            except (OSError, HTTPException) as error:
                why, pause = f"cannot be reached: {error}", _pause(i, None)
            if i + 1 < TRIES:
                self._sleep(pause)
        raise EmbedderUnavailable(
            f"{self._url} {why} ({TRIES} tries); start the server or try later, then call again"
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str,
        headers: HTTPMessage, newurl: str,
    ) -> None:  # fmt: skip
        return None


def _pause(tries: int, retry_after: str | None) -> float:
    """Seconds to wait: what the server asks for, else half a second, doubled each time."""
    asked = float(retry_after) if retry_after and retry_after.isdigit() else 0.5 * 2**tries
    return min(asked, LONGEST_WAIT_S)


def _vectors(answer: bytes, n: int, url: str) -> NDArray[np.float32]:
    """The vectors (n, dim) of an answer, in the order of the texts, at norm 1."""
    try:
        rows: list[dict[str, Any]] = sorted(json.loads(answer)["data"], key=lambda r: r["index"])
        vectors = np.array([row["embedding"] for row in rows], np.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise EmbedderUnavailable(
            f"{url} did not answer as OpenAI's /embeddings does ({error!r}): {answer[:200]!r}"
        ) from error
    if vectors.ndim != 2 or len(vectors) != n or not vectors.size or not np.isfinite(vectors).all():
        raise EmbedderUnavailable(
            f"{url} answered an array of shape {vectors.shape} for {n} texts, or not all of it "
            "finite; is it an embedding model?"
        )
    return normalized(vectors)
