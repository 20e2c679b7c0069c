"""Text and JSON-lines files as tokens on disk, checked before anything is trained.

Tokens are written once and mapped afterwards, so that a corpus takes no memory. Windows hold
context + 1 tokens; each begins as the model knows it from its tokenizer, else with the last token
of the one before. Some are held out, and a step's batch follows from the seed and its number alone:
a resumed run reads on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memwise.errors import InvalidKnob

LONGEST = 1 << 20  # bytes of a line; a longer one is minified or binary, and no text to learn
_AT_ONCE = 1 << 18  # characters that are tokenized in one call
_JSON = (".jsonl", ".ndjson", ".json")
_HELD_OUT, _MOST_HELD_OUT = 20, 16  # every 20th window, at most so many


def tokenized(source: Path, tokenizer: Any, folder: Path, field: str = "text") -> Path:
    """Write the tokens of a file as int32 into a folder, once; returns the file of tokens.

    Args:
        source: JSON lines where its name says so (.jsonl, .ndjson, .json), else UTF-8 text.
        tokenizer: of the model.
        folder: where the tokens go; what is there of the same file is taken again.
        field: of a JSON line, its text.

    Raises:
        InvalidKnob: the file is missing, empty, binary, has a line that is too long, or a JSON line
            without that field. Nothing has been written then.
    """
    digest = _checked(source, field)
    # Another vocabulary gives other tokens of the same text.
    words = sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    target = folder / f"tokens-{digest[:16]}-{words[:8]}.i32"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    end = tokenizer.eos_token_id
    with part.open("wb") as out:
        for texts in _chunks(_texts(source, field)):
            for ids in tokenizer(texts, add_special_tokens=False).input_ids:
                between = [end] if _is_json(source) and end is not None else []
                np.array([*ids, *between], dtype=np.int32).tofile(out)
    part.replace(target)
    return target


def start_of(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text; Gemma is lost without it."""
    ids = tokenizer("a").input_ids
    return ids[0] if ids[:1] == [tokenizer.bos_token_id] else None


def _is_json(source: Path) -> bool:
    return source.suffix.lower() in _JSON


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line, never more than a little over `LONGEST` in memory."""
    with source.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST + 2):
            number += 1
            if len(line.rstrip(b"\r\n")) > LONGEST:
                raise InvalidKnob(
                    f"{source.name}, line {number}: over {LONGEST:,} bytes without a line break; "
                    "break it into lines, or leave it out: such lines are minified or binary"
                )
            yield number, line


def _checked(source: Path, field: str) -> str:
    """The sha256 of a file in which every line is fit to be learned."""
    if not source.is_file():
        raise InvalidKnob(f"{source} is not a file; give a text or JSON-lines file")
    digest, n_letters = sha256(), 0
    for number, line in _lines(source):
        digest.update(line)
        n_letters += len(_text(source, number, line, field).strip())
    if n_letters == 0:
        raise InvalidKnob(f"{source.name} holds no text; give a file with something to learn")
    return sha256(f"{digest.hexdigest()} {field}".encode()).hexdigest()


def _text(source: Path, number: int, line: bytes, field: str) -> str:
    where = f"{source.name}, line {number}"
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as problem:
        raise InvalidKnob(
            f"{where}: byte {problem.start} is not UTF-8; give text, or convert it to UTF-8"
        ) from problem
    if "\0" in text:
        raise InvalidKnob(f"{where}: a NUL byte; this is a binary file, give text")
    if not _is_json(source) or not text.strip():
        return text
    try:
        record = json.loads(text)
    except ValueError as problem:
        raise InvalidKnob(f"{where}: not JSON ({problem}); write one object a line") from problem
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        there = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise InvalidKnob(
            f"{where}: no text in field {field!r}; there is {there}; choose it with --field"
        )
    return str(record[field])


def _texts(source: Path, field: str) -> Iterator[str]:
    for number, line in _lines(source):
        text = _text(source, number, line, field)
        if text.strip() or not _is_json(source):
            yield text


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    """JSON texts stay apart; lines of text are tokenized together where they are few."""
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= _AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some


@dataclass(frozen=True)
class Windows:
    """Windows of a file of tokens.

    Attributes:
        tokens: (n,), mapped.
        context: tokens a window predicts.
        seed: of the order.
        start: token before each window; None = the last one of the window before.
    """

    tokens: NDArray[np.int32]
    context: int
    seed: int
    start: int | None = None

    @classmethod
    def of(cls, path: Path, context: int, seed: int, start: int | None = None) -> Windows:
        """Those of a file.

        Raises:
            InvalidKnob: fewer than two windows are in it.
        """
        tokens = np.memmap(path, dtype=np.int32, mode="r")
        if len(tokens) < 2 * context + 1:
            raise InvalidKnob(
                f"{len(tokens)} tokens are less than two windows of {context}; give more text, or "
                "a smaller --context"
            )
        return cls(tokens, context, seed, start)

    @property
    def n_windows(self) -> int:
        """All of them."""
        return (len(self.tokens) - (self.start is None)) // self.context

    @property
    def held_out(self) -> list[int]:
        """Windows that are never trained on, spread over the file."""
        n = min(_MOST_HELD_OUT, max(1, self.n_windows // _HELD_OUT))
        return [int((i + 0.5) * self.n_windows / n) for i in range(n)]

    def window(self, number: int) -> Tensor:
        """Tokens (context + 1,) of a window."""
        first = number * self.context + (self.start is None)
        before = self.tokens[first - 1] if self.start is None else self.start
        ids = np.array([before, *self.tokens[first : first + self.context]], dtype=np.int64)
        return torch.from_numpy(ids)

    def batch(self, nth: int, size: int) -> Tensor:
        """Tokens (size, context + 1) of the nth batch; every epoch has an order of its own."""
        known = np.setdiff1d(np.arange(self.n_windows), self.held_out)
        rows = []
        for place in range(nth * size, (nth + 1) * size):
            epoch, at = divmod(place, len(known))
            order = np.random.default_rng((self.seed, epoch)).permutation(known)
            rows.append(self.window(int(order[at])))
        return torch.stack(rows)
