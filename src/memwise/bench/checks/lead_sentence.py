"""Does a long article make its own summary likelier, if attention is moved through it?

Gemma-3-270M reads the sections of a Wikipedia article (900 tokens), without the lead that stands
before them, and then "Summary:". Judged is the nll of the beginning of the true lead, in nats per
token: the lead sums up what follows it, and nobody wrote it for this. Only the pass of the prompt
is edited; the lead is scored with its cache. Thresholds and strength are chosen on other articles.

What must hold: strength 0 is the plain model. Attention that moves to a block at random is shown
beside it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from memwise.bench.data import data_folder
from memwise.bench.engine import Row, paired_interval
from memwise.context.engine.edit import Rows
from memwise.context.engine.editor import edited
from memwise.context.policies.attention_transition import AttentionTransition
from memwise.errors import InvalidKnob
from memwise.models import LocalModel, local_model

N_ARTICLES, N_TUNED, N_TOKENS, N_LEAD = 16, 4, 900, 40
CELLS = ((0.3, 1.0), (0.3, 4.0), (0.5, 1.0), (0.5, 4.0))  # thresholds and strengths that are tried
_ASK = "\n\nSummary:"


@dataclass(frozen=True)
class Article:
    """A prompt and what should follow, as tokens.

    Attributes:
        title: of the article.
        prompt: its sections, and the request.
        lead: the beginning of its true lead.
    """

    title: str
    prompt: tuple[int, ...]
    lead: tuple[int, ...]


@dataclass(frozen=True)
class _AnyBlock(AttentionTransition):
    """Attention moves to a block at random, of as many tokens, before the rows."""

    def target(self, rows: Rows, first: Tensor, size: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Drawn from the layer and the place, so that it is the same each time."""
        draws = [
            random.Random(f"{rows.layer} {int(own)}").random() for own in first
        ]  # not from the tokens
        most = (end - size).clamp_min(1)
        any_first = (torch.tensor(draws) * most).long()
        return any_first, any_first + size


def articles(lm: LocalModel, data: Path | None, part: str, n: int) -> list[Article]:
    """The first articles that are long enough.

    Args:
        lm: whose tokens.
        data: folder of the data sets.
        part: a file of wikitext2, without its ending.
        n: how many.

    Raises:
        InvalidKnob: there are fewer.
    """
    encode = partial(lm.tokenizer, add_special_tokens=False)
    text = (data_folder(data) / "wikitext2" / f"{part}.txt").read_text("utf-8")
    titled = re.split(r"(?m)^ = ([^=\n]+) = *\n", text)[1:]
    found = []
    for title, body in zip(titled[::2], titled[1::2], strict=True):
        lead, *sections = re.split(r"(?m)^ = = [^=\n]+ = = *\n", body)
        rest = encode(_plain(" ".join(sections))).input_ids[:N_TOKENS]
        start = encode(f" {_plain(lead)}").input_ids[:N_LEAD]
        if len(rest) == N_TOKENS and len(start) == N_LEAD:
            prompt = (lm.tokenizer.bos_token_id, *rest, *encode(_ASK).input_ids)
            found.append(Article(title.strip(), prompt, tuple(start)))
    if len(found) < n:
        raise InvalidKnob(f"{part} has {len(found)} articles of enough length; {n} are wanted")
    return found[:n]


def _plain(text: str) -> str:
    """Running text, without the marks of the data set."""
    return " ".join(re.sub(r" @(.)@ ", r"\1", text).split())


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Nat per token of the leads."""
    lm = local_model()
    todo = articles(lm, data, "test_first_half", N_ARTICLES)
    method, tried = _chosen(lm, method, articles(lm, data, "valid", N_TUNED))
    chance_policy = _AnyBlock(**vars(method))
    mine, plain, chance = (nats(lm, policy, todo) for policy in (method, None, chance_policy))
    off = nats(lm, replace(method, strength=0.0), todo[:1])
    change = mine - plain
    order = np.argsort(change)
    told = ", ".join(f"{todo[i].title} {change[i]:+.3f}" for i in (*order[:2], *order[-2:]))
    return [
        Row(
            "nat per token of the lead", float(mine.mean()), float(plain.mean()),
            paired_interval(mine, plain, seed), len(mine), {"random blocks": float(chance.mean())},
            {"strength 0 is the plain model": abs(float(off[0] - plain[0])) < 1e-4},
            data=f"wikitext2, {len(todo)} articles of {N_TOKENS} tokens, {N_LEAD} of each lead",
            note=f"better for {int((change < 0).sum())} of {len(mine)}; {told}; {tried}",
        ),
        Row(
            "nat per token of the lead, beside random blocks", float(mine.mean()),
            float(chance.mean()), paired_interval(mine, chance, seed), len(mine), primary=False,
            note="the baseline here is attention that moves to random blocks",
        ),
    ]  # fmt: skip


def _chosen(lm: LocalModel, method: Any, todo: list[Article]) -> tuple[Any, str]:
    """The method with the knobs of the best cell, and what each cell gave."""
    plain = nats(lm, None, todo).mean()
    cells = {
        (ratio, strength): replace(method, inner=ratio, outer=ratio, strength=strength)
        for ratio, strength in CELLS
    }
    change = {cell: float(nats(lm, own, todo).mean() - plain) for cell, own in cells.items()}
    best = min(change, key=lambda cell: change[cell])
    told = ", ".join(f"{f:g} x {s:g}: {value:+.3f}" for (f, s), value in change.items())
    return cells[best], f"threshold x strength on {len(todo)} other articles, change: {told}"


@torch.no_grad()
def nats(lm: LocalModel, policy: Any, todo: list[Article]) -> NDArray[np.float64]:
    """Mean nll of each lead after its article, whose pass a policy edits."""
    found = []
    for one in todo:
        cache = DynamicCache(config=lm.model.config)
        prompt, lead = torch.tensor([one.prompt]), torch.tensor([one.lead])
        if policy is None:
            hidden = _hidden(lm, prompt, lead, cache)
        else:
            with edited(lm.model, policy):
                hidden = _hidden(lm, prompt, lead, cache)
        logp = lm.model.get_output_embeddings()(hidden).log_softmax(-1)
        found.append(-float(logp.gather(2, lead[..., None]).mean()))
    return np.array(found)


def _hidden(lm: LocalModel, prompt: Tensor, lead: Tensor, cache: DynamicCache) -> Tensor:
    """What the decoder makes of the tokens before each of the lead (1, n, D)."""
    decoder = lm.model.get_decoder()
    first = decoder(prompt, past_key_values=cache).last_hidden_state[:, -1:]
    rest = decoder(lead[:, :-1], past_key_values=cache).last_hidden_state
    return torch.cat([first, rest], 1)
