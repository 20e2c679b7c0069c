"""A language model on a long text inside a byte budget: what `memwise run` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from memwise import catalogue
from memwise.budget import BudgetLike
from memwise.context.engine.host import CHUNK, bounded
from memwise.context.engine.policy import CachePolicy
from memwise.context.engine.report import Report
from memwise.errors import InvalidKnob
from memwise.models import LocalModel

KNOWN, UNKNOWN = "sharp_probe", "snapkv"  # policies with and without a question
_PIECES = 16  # chunks between two reports of progress


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a text.

    Attributes:
        text: that it wrote.
        n_tokens: of the text and the question.
        report: bytes by kind, and the tokens that are left.
        policy: that chose them.
    """

    text: str
    n_tokens: int
    report: Report
    policy: CachePolicy


def answer(
    lm: LocalModel, text: str, budget: BudgetLike, *, question: str = "", policy: str | None = None,
    n_tokens: int = 64, chunk: int = CHUNK, codec: str | None = None,
    read: Callable[[int, int], None] = lambda done, of: None,
    told: Callable[[str], None] = lambda piece: None,
) -> Answer:  # fmt: skip
    """Read a text into a KV cache of so many bytes, then write on, greedily.

    Args:
        lm: the model.
        text: that is read, of any length that the model was made for.
        budget: bytes of the cache, at any moment.
        question: that comes after the text; slots are chosen in its light.
        policy: name of a cache policy; by default one that suits a question, or none.
        n_tokens: most tokens that are written.
        chunk: most tokens that go through the model at once.
        codec: of keys and values, as for `bounded`.
        read: told how many tokens of how many are read.
        told: given what is written, piece by piece.

    Raises:
        InvalidKnob: there is no text, or the policy is none of caches.
        BudgetExceeded: not even the least fits.
        UnsupportedModel: a model of another kind.
    """
    chosen = _policy(policy or (KNOWN if question else UNKNOWN))
    asked = lm.tokenizer(f"\n\n{question}", add_special_tokens=False).input_ids if question else []
    ids = [*lm.tokenizer(text).input_ids, *asked]
    if not text.strip():
        raise InvalidKnob("the text is empty: give a file with something in it")
    if n_tokens < 1:
        raise InvalidKnob(f"tokens={n_tokens}: at least one has to be written")
    written = _Pieces(lm.tokenizer, told)
    with (
        torch.no_grad(),
        bounded(lm.model, chosen, budget, chunk=chunk, question=asked, codec=codec) as cache,
    ):
        given = torch.tensor([ids], device=lm.model.device)
        for first in range(0, len(ids) - 1, chunk * _PIECES):
            last = min(first + chunk * _PIECES, len(ids) - 1)
            lm.model.get_decoder()(given[:, first:last], past_key_values=cache)
            read(last, len(ids))
        lm.model.generate(
            given, past_key_values=cache, attention_mask=torch.ones_like(given), do_sample=False,
            max_new_tokens=n_tokens, streamer=written,
        )  # fmt: skip
        return Answer("".join(written.pieces), len(ids), cache.report(), chosen)


def _policy(name: str) -> CachePolicy:
    made = catalogue.load(name if "/" in name else f"context/{name}")
    if not (isinstance(made, type) and issubclass(made, CachePolicy)):
        raise InvalidKnob(f"{name} chooses no slots of a KV cache; see `memwise methods context`")
    return made()


class _Pieces(TextStreamer):
    """Hands on what is written as soon as it is a word."""

    def __init__(self, tokenizer: Any, told: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []
        self._told = told

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Keep a piece, and tell."""
        self.pieces.append(text)
        self._told(text)
