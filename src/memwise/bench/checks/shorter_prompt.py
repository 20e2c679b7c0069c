"""The last sentence of a passage, foretold from what is left of the sentences before it.

Passages of Wikipedia lose a share of their tokens; Gemma-3-270M judges what stays, and reads it.
The method and any phrases keep as many tokens, as the model counts them; judged is the nll of the
last sentence, whose passage decides what it says.

What must hold: the method is better than any phrases at each share, and the whole passage is better
than no passage. Beside it: phrases with the rarest words, the first phrases, and the last, which
stand right before what is foretold.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memwise.bench.data import data_folder
from memwise.bench.engine import Row, paired_interval
from memwise.catalogue import load
from memwise.context.engine.excerpt import Prompt, PromptPolicy, sentences
from memwise.errors import InvalidKnob
from memwise.models import local_model

N_PASSAGES = 20
_REDUCED = (0.5, 0.2, 0.35, 0.65)  # the first is judged
_LETTERS = (900, 1500)
_LEAST = 60  # letters of a last sentence


@dataclass(frozen=True)
class _Scored(PromptPolicy):
    """Phrases by a plain score of their place and words."""

    of: Callable[[int, str], float]

    def score(self, prompt: Prompt) -> Sequence[float]:
        """The score of each phrase."""
        return [self.of(i, prompt.text[slice(*span)]) for i, span in enumerate(prompt.units)]


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Nat a token of the last sentence, at each share."""
    lm = local_model()
    text = (data_folder(data) / "wikitext2" / "test_first_half.txt").read_text("utf-8")
    passages = _passages(text)
    counts = Counter(re.findall(r"\w+", text.lower()))
    policies: dict[str, Any] = {
        "mine": method,
        "baseline": load(f"context/{method.card.baseline}")(),
        "rarest words": _Scored(lambda i, phrase: _rarity(phrase, counts)),
        "first phrases": _Scored(lambda i, phrase: -i),
        "last phrases": _Scored(lambda i, phrase: i),
    }
    made = {name: policy(lm.model, lm.tokenizer) for name, policy in policies.items()}
    whole = np.array([lm.nll(before, last) for before, last in passages])
    none = np.array([lm.nll("", last) for _, last in passages])
    rows = []
    for reduced in _REDUCED:
        nll: dict[str, list[float]] = {name: [] for name in made}
        left = []
        for before, last in passages:
            budget = round((1 - reduced) * len(lm.tokenizer(before).input_ids))
            for name, compressor in made.items():
                excerpt = compressor.compress(before, budget)
                nll[name].append(lm.nll(excerpt.text, last))
                if name == "mine":
                    left.append(excerpt.n_tokens / excerpt.n_source_tokens)
        mine, base = np.array(nll.pop("mine")), np.array(nll.pop("baseline"))
        controls = {name: float(np.mean(values)) for name, values in nll.items()}
        controls |= {"whole passage": float(whole.mean()), "nothing before": float(none.mean())}
        rows.append(
            Row(
                f"nat a token, {reduced:.0%} fewer tokens", float(mine.mean()), float(base.mean()),
                paired_interval(mine, base, seed), len(mine),
                controls | {"share of tokens left": float(np.mean(left))},
                {
                    "better than any phrases": bool(mine.mean() < base.mean()),
                    "the passage helps": bool(whole.mean() < none.mean()),
                },
                primary=reduced == _REDUCED[0], data=f"WikiText-2, {len(mine)} passages",
                note="the model that judges is the one that reads",
            )
        )  # fmt: skip
    return rows


def _passages(text: str) -> list[tuple[str, str]]:
    """What stands before the last sentence of a passage, and that sentence."""
    found = []
    for line in text.splitlines():
        passage = _plain(line)
        spans = sentences(passage)
        if _LETTERS[0] <= len(passage) <= _LETTERS[1] and len(spans) > 3:
            first = spans[-1][0]
            if len(passage) - first >= _LEAST:
                found.append((passage[:first].rstrip(), " " + passage[first:].strip()))
    if len(found) < N_PASSAGES:
        raise InvalidKnob(f"wikitext2 has {len(found)} passages of a fitting length")
    return found[:: len(found) // N_PASSAGES][:N_PASSAGES]


def _plain(line: str) -> str:
    """A line of WikiText as people write: words and punctuation stand apart there."""
    line = re.sub(r" @(.)@ ", r"\1", line.strip())
    line = re.sub(r" ([,.;:!?)%]|'s|n't)", r"\1", line)
    return re.sub(r"([(]) ", r"\1", line)


def _rarity(phrase: str, counts: Counter[str]) -> float:
    words = re.findall(r"\w+", phrase.lower())
    return float(np.mean([-np.log(counts[word] + 1) for word in words])) if words else -np.inf
