"""Long prompts in fewer tokens: a text is cut into units, a policy judges them, the best stay.

What stays keeps its order, and every piece of it knows where it stood in the source, so that an
answer can be traced back. Tokens are counted as the target model counts what is left, which is not
what its units had in the source: text that is cut apart falls into more tokens.

Shapes: B rows, q tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn

from memwise.catalogue import Card
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor
Span: TypeAlias = tuple[int, int]
"""First character of a piece of the source, and the one behind its last."""

_ROWS = 16  # tokens of which logits exist at once
# Words that begin a phrase: after one of them content words follow, before one a phrase ends.
_FUNCTION_WORDS = frozenset(
    "a an the this that these those my your his her its our their some any each every no "
    "i you he she it we they me him us them who whom whose which what "
    "about above after against along among around as at before behind below beneath beside between "
    "beyond by despite down during except for from in inside into like near of off on onto out "
    "outside over past since through to toward towards under until up upon with within without "
    "and but or nor so yet because although though while when where if unless than whether "
    "am is are was were be been being have has had do does did will would shall should can could "
    "may might must not".split()
)
_WORD = re.compile(r"\S+\s*")
_SENTENCE = re.compile(r"[^.!?\n]*(?:[.!?]+[\"'”’)\]]*|\n+|$)\s*")


def phrases(text: str) -> list[Span]:
    """Function words and the content words after them, ended by punctuation; they cover the text.

    The units of M. Liberman and K. Church, "Text analysis and word pronunciation in text-to-speech
    synthesis" (1992): close to noun phrases with their prepositions, and no model is needed.
    """
    cuts, in_content = [0], False
    for match in _WORD.finditer(text):
        word = match[0].strip()
        is_function = word.lower().strip("\"'“”‘’()[]") in _FUNCTION_WORDS
        if is_function and in_content:
            cuts.append(match.start())
        in_content = not is_function
        if word[-1] in '.,;:!?)]"”' or "\n" in match[0]:
            cuts.append(match.end())
            in_content = False
    return _between(cuts, len(text))


def sentences(text: str) -> list[Span]:
    """Sentences and lines, which cover the text."""
    return _between([match.start() for match in _SENTENCE.finditer(text)], len(text))


def segments(text: str, reader: Reader, length: int) -> list[Span]:
    """Pieces of so many tokens, the last with what is left; they cover the text."""
    return _between(reader.starts(text)[::length], len(text))


def _between(cuts: Sequence[int], end: int) -> list[Span]:
    edges = sorted({0, end, *cuts})
    return list(pairwise(edges))


@dataclass(frozen=True)
class Excerpt:
    """What is left of a text.

    Attributes:
        text: that is left.
        spans: where its pieces stood in the source, in order; pieces that touched are one.
        n_tokens: of the text, as the target model counts.
        n_source_tokens: of the source.
    """

    text: str
    spans: tuple[Span, ...]
    n_tokens: int
    n_source_tokens: int

    def source(self, at: int) -> int:
        """Where a character of the text stood in the source.

        Raises:
            InvalidKnob: the text has no such character.
        """
        left = at
        for first, last in self.spans:
            if 0 <= left < last - first:
                return first + left
            left -= last - first
        raise InvalidKnob(f"at={at}: the text has {len(self.text)} characters")


class Prompt:
    """A text and its units, with what a model makes of them; costly things are lazy.

    Attributes:
        text: the source.
        question: that comes after it; empty where there is none.
        units: spans that cover the text.
    """

    def __init__(self, reader: Reader, text: str, question: str, units: Sequence[Span]) -> None:
        self.reader, self.text, self.question, self.units = reader, text, question, tuple(units)

    @cached_property
    def information(self) -> tuple[float, ...]:
        """Nats of each unit: -log p of its tokens, each after those before it in its window.

        A token that lies in two units is shared out by its characters.
        """
        found = [0.0] * len(self.units)
        at = 0
        for (first, last), nats in self.reader.surprisal(self.text):
            while at + 1 < len(self.units) and self.units[at][1] <= first:
                at += 1
            unit = at
            while unit < len(self.units) and self.units[unit][0] < last:
                begins, ends = self.units[unit]
                overlap = min(last, ends) - max(first, begins)
                found[unit] += nats * overlap / (last - first)
                unit += 1
        return tuple(found)

    def doubt(self, unit: int | None) -> float:
        """Entropy in nats of what the model would say after a unit and the question.

        Args:
            unit: that stands before the question; None = the question alone.
        """
        before = "" if unit is None else self.text[slice(*self.units[unit])]
        return self.reader.entropy(before, self.question)


class Reader:
    """A language model that judges text.

    Args:
        model: a causal language model of transformers.
        tokenizer: its fast tokenizer.
        window: most tokens that are read at once; each window begins anew.

    Raises:
        InvalidKnob: a tokenizer that does not know where its tokens stood, or a window below 2.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, window: int) -> None:
        if not tokenizer.is_fast:
            raise InvalidKnob(
                f"{type(tokenizer).__name__} does not know where its tokens stood in the text: "
                "load it as a fast tokenizer"
            )
        if window < 2:
            raise InvalidKnob(f"window={window}: a token is judged by those before it, give 2+")
        # Of transformers' own making: what torch knows of a module says too little.
        self._model: Any = model
        self._tokenizer, self._window = tokenizer, window

    def n_tokens(self, text: str) -> int:
        """Tokens of a text, without those that begin or end one."""
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    def starts(self, text: str) -> list[int]:
        """The first character of each token of a text."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [first for first, _ in encoded.offset_mapping]

    def surprisal(self, text: str) -> Iterator[tuple[Span, float]]:
        """Span and nats of each token of a text, in order."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = encoded.input_ids, encoded.offset_mapping
        for first in range(0, len(ids), self._window):
            some = slice(first, first + self._window)
            nats = self._nats(ids[some])
            yield from (
                (place, nat)
                for place, nat in zip(places[some], nats, strict=True)
                if place[1] > place[0]
            )

    @torch.no_grad()
    def entropy(self, before: str, question: str) -> float:
        """Nats of the next token's distribution after a text and a question."""
        parts = (
            self._tokenizer(part, add_special_tokens=False).input_ids for part in (before, question)
        )
        ids = [*self._start(), *(token for part in parts for token in part)]
        hidden = self._hidden(ids)[:, -1:]
        logp = self._logits(hidden)[0, 0].log_softmax(-1)
        return float(-(logp.exp() * logp).sum())

    @torch.no_grad()
    def _nats(self, ids: list[int]) -> list[float]:
        start = self._start()
        hidden = self._hidden([*start, *ids])[:, : len(start) + len(ids) - 1]
        wanted = torch.tensor(ids[1 - len(start) :], device=hidden.device)
        found = []
        for first in range(0, len(wanted), _ROWS):
            logits = self._logits(hidden[:, first : first + _ROWS])[0]
            own = logits.gather(1, wanted[first : first + _ROWS, None])[:, 0]
            found += (logits.logsumexp(-1) - own).tolist()
        return found if start else [0.0, *found]

    def _start(self) -> list[int]:
        token = self._tokenizer.bos_token_id
        return [] if token is None else [token]

    def _hidden(self, ids: list[int]) -> Tensor:
        given = torch.tensor([ids], device=self._model.device)
        hidden: Tensor = self._model.get_decoder()(given, use_cache=False).last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.get_output_embeddings()(hidden)
        return logits.float()


@dataclass(frozen=True)
class PromptPolicy:
    """Which units of a prompt stay. A policy holds knobs, and its call builds a compressor.

    Attributes:
        window: most tokens that the model reads at once when it judges, in tokens.
    """

    card: ClassVar[Card]

    window: ClassVar[int] = 512

    def units(self, text: str, question: str, reader: Reader) -> list[Span]:
        """Spans that cover the text."""
        return phrases(text)

    def score(self, prompt: Prompt) -> Sequence[float]:
        """What each unit is worth; the highest stay."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, tokenizer: Any) -> PromptCompressor:
        """A compressor that judges with this model, for readers with this tokenizer.

        Args:
            model: a causal language model of transformers.
            tokenizer: its fast tokenizer.
        """
        return PromptCompressor(self, Reader(model, tokenizer, self.window))


class PromptCompressor:
    """Shortens texts to a number of tokens."""

    def __init__(self, policy: PromptPolicy, reader: Reader) -> None:
        self.policy, self.reader = policy, reader

    def compress(self, text: str, tokens: int, question: str = "") -> Excerpt:
        """What is left of a text in so many tokens, never more.

        Args:
            text: the source.
            tokens: most tokens that stay, as the tokenizer counts them.
            question: that will come after the text, for policies that look at it.

        Raises:
            InvalidKnob: no tokens are allowed, or the policy wants a question and has none.
        """
        if tokens < 1:
            raise InvalidKnob(f"tokens={tokens}: at least one has to stay")
        n_source = self.reader.n_tokens(text)
        if n_source <= tokens:
            return Excerpt(text, ((0, len(text)),) if text else (), n_source, n_source)
        units = self.policy.units(text, question, self.reader)
        worth = self.policy.score(Prompt(self.reader, text, question, units))
        # Of equal units the earlier stays.
        order = sorted(range(len(units)), key=lambda i: (-worth[i], i))
        return self._most(text, units, order, tokens, n_source)

    def _most(
        self, text: str, units: Sequence[Span], order: Sequence[int], tokens: int, n_source: int
    ) -> Excerpt:
        """The best units that fit: more units are more tokens, but for single ones at the seams."""
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._of(text, units, order[:middle], n_source).n_tokens <= tokens
            low, high = (middle, high) if fits else (low, middle)
        return self._of(text, units, order[:low], n_source)

    def _of(self, text: str, units: Sequence[Span], kept: Sequence[int], n_source: int) -> Excerpt:
        spans: list[Span] = []
        for first, last in (units[i] for i in sorted(kept)):
            if spans and spans[-1][1] == first:
                spans[-1] = (spans[-1][0], last)
            else:
                spans.append((first, last))
        left = "".join(text[first:last] for first, last in spans)
        return Excerpt(left, tuple(spans), self.reader.n_tokens(left), n_source)
