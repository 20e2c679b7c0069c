"""Hashed n-grams: vectors from words and their pieces, with numpy and no model at all."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b, sha256
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memwise.errors import InvalidKnob
from memwise.recall.engine.stem import stem
from memwise.recall.engine.text import STOP, words
from memwise.recall.engine.windows import normalized
from memwise.recall.engine.wordpieces import vocabulary

# To be raised with anything that changes a vector and that the probe does not show.
PREPROCESSING = 1
PROBE = "The travellers' 3 studies of Zürich, quickly running 東京"

# Set on the first four conversations of LoCoMo dev.
PIECES_WEIGHT = 0.7
N_COMMON = 1000
FIRST_WORD = 1996
BALLAST = 8.0
BALLAST_DIMS = 64
CACHED_WORDS = 1 << 14
CHUNK_TEXTS = 1024


class _Stem(NamedTuple):
    """What a stem adds to a text's vector: signed weights at hashed places, itself first."""

    places: NDArray[np.int64]
    values: NDArray[np.float64]


class Ngrams:
    """Signed hashing of stems and their character 3-5-grams, with sublinear counts.

    A passage also carries ballast: coordinates that no query has and that two texts share only by
    chance. They damp the advantage that short passages have under cosine, as the pivot of BM25's
    length normalisation does. Two texts that are compared as equals are both encoded as queries.

    Args:
        dim: width of the vectors, at least 128.

    Note:
        On the four conversations of LoCoMo that set the weights, ballast lifts evidence recall@10
        from .40 to .55; pairs of neighbouring words were tried and add nothing.
    """

    spec = "ngrams"

    def __init__(self, dim: int = 512) -> None:
        if dim < 2 * BALLAST_DIMS:
            raise InvalidKnob(f"dim {dim} leaves no room to hash into; use 256 to 1024")
        self.dim = dim
        self._n_places = dim - BALLAST_DIMS
        # BERT's whole words stand in order of frequency: a word's place is its rank.
        common = vocabulary()[FIRST_WORD : FIRST_WORD + N_COMMON]
        self._rank: dict[str, int] = {}
        for rank, word in enumerate(common, 1):
            self._rank.setdefault(stem(word), rank)
        self._root = lru_cache(CACHED_WORDS)(_root)
        self._stem = lru_cache(CACHED_WORDS)(self._look_up)
        self.fingerprint = f"ngrams/{dim}/{self._probe()}/{PREPROCESSING}"

    def encode(self, texts: Sequence[str], role: str = "passage") -> NDArray[np.float32]:
        """Unit vectors (n, dim) of the texts; a zero row for one of stop words alone.

        Args:
            texts: any length each.
            role: passage or query.
        """
        out = np.zeros((len(texts), self.dim), np.float32)
        for start in range(0, len(texts), CHUNK_TEXTS):
            some = out[start : start + CHUNK_TEXTS]
            roots = [self._roots(text) for text in texts[start : start + CHUNK_TEXTS]]
            some[:, : self._n_places] = self._sums(roots)
            if role == "passage":
                some[:, self._n_places :] = _ballast(roots)
        return normalized(out)

    def _roots(self, text: str) -> list[str]:
        return [root for root in map(self._root, words(text)) if root]

    def _sums(self, texts: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """Weighted counts of all features, hashed: (n, n_places)."""
        number: dict[str, int] = {}
        tokens = [number.setdefault(root, len(number)) for text in texts for root in text]
        sums = np.zeros((len(texts), self._n_places))
        if not tokens:
            return sums

        rows = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        pairs, counts = np.unique(rows * len(number) + tokens, return_counts=True)
        rows, stems = np.divmod(pairs, len(number))
        known = [self._stem(root) for root in number]

        # Features of all stems lie end to end; every (text, stem) takes its stem's stretch.
        lengths = np.array([len(stem.places) for stem in known])
        starts = np.cumsum(lengths) - lengths
        taken = lengths[stems]
        within = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
        features = np.repeat(starts[stems], taken) + within
        places = np.concatenate([stem.places for stem in known])[features]
        values = np.concatenate([stem.values for stem in known])[features]
        places += np.repeat(rows * self._n_places, taken)
        values *= np.repeat(1 + np.log(counts), taken)
        sums += np.bincount(places, values, sums.size).reshape(sums.shape)
        return sums

    def _look_up(self, root: str) -> _Stem:
        framed = f"<{root}>"
        # A word of a script without spaces is a phrase, whose single characters matter.
        sizes = (3, 4, 5) if root.isascii() else (1, 2, 3)
        pieces = [framed[i : i + n] for n in sizes for i in range(len(framed) - n + 1)]
        codes = np.array([_code(f"w{root}"), *(_code(f"c{piece}") for piece in pieces)], np.uint64)
        # 1, less for the commonest words of English.
        rarity = math.log1p(self._rank.get(root, N_COMMON)) / math.log1p(N_COMMON)
        weights = np.full(len(codes), rarity * PIECES_WEIGHT / math.sqrt(len(pieces)))
        weights[0] = rarity
        # The highest bit is the sign; places come from the lower ones.
        signs = np.where(codes >> np.uint64(63), 1.0, -1.0)
        return _Stem((codes % np.uint64(self._n_places)).astype(np.int64), signs * weights)

    def _probe(self) -> str:
        """Hash of where a sentence's features fall: a changed rule for words shows here."""
        total = sha256()
        for root in self._roots(PROBE):
            places, values = self._stem(root)
            total.update(places.astype("<i8").tobytes() + np.sign(values).astype("<f8").tobytes())
        return total.hexdigest()[:12]


def _root(word: str) -> str:
    """The stem that a word is counted as; empty for stop words."""
    return "" if word in STOP else stem(word)


def _code(feature: str) -> int:
    """A 64-bit hash that is the same in every process."""
    return int.from_bytes(blake2b(feature.encode(), digest_size=8).digest(), "little")


def _ballast(texts: Iterable[Sequence[str]]) -> NDArray[np.float64]:
    """A vector of norm `BALLAST` a text (n, BALLAST_DIMS), its signs drawn by the words."""
    size = BALLAST_DIMS // 8
    digests = [blake2b(" ".join(text).encode(), digest_size=size).digest() for text in texts]
    bits = np.unpackbits(np.frombuffer(b"".join(digests), np.uint8)).reshape(-1, BALLAST_DIMS)
    wordless = np.array([not text for text in texts])
    signs = np.where(wordless[:, None], 0.0, bits * 2.0 - 1)
    return signs * (BALLAST / math.sqrt(BALLAST_DIMS))
