"""Does a shopping list survive a long chat in a few slots, and does a newer wish replace an older?

A user of Gemma-3-270M names things to buy, one a turn, then chats on (real dialogues with an AI
companion, MIT) until the model's sliding layers no longer see the list. Then each thing is asked
for. Judged is the nll of the right one among the eight of its kind, in nats; chance is 2.08. All
methods have 128 slots in each full-attention layer.

In other dialogues a wish is changed, and the rest is one long turn. Judged is by how much the older
wish is likelier than the newer, in nats; each pair of wishes is told in both orders, so that what
the model likes by itself cancels.

What must hold: full cache and oracle know the list, random slots do not; with a decay the newer
wish wins, and without one it does not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memwise.bench.data import memorybank
from memwise.bench.engine import Row, paired_interval
from memwise.catalogue import load
from memwise.context.engine.host import bounded, bytes_for
from memwise.context.engine.policy import CachePolicy
from memwise.models import LocalModel, local_model

N_LISTS, N_WISHES, N_SLOTS, CHUNK = 6, 4, 128, 128
_DECAY = 0.7  # the paper's for dialogues
_BEYOND = 520  # tokens between the last thing and the question; sliding layers see 512
_CHANCE = float(np.log(8))
_KNOWN, _UNKNOWN = 1.0, 1.6  # nats: a half of chance, and nearly chance
_KINDS = {
    "fruit": ("apples", "mangoes", "plums", "cherries", "lemons", "figs", "pears", "grapes"),
    "vegetable": ("carrots", "spinach", "onions", "leeks", "peas", "celery", "beets", "kale"),
    "drink": ("coffee", "lemonade", "cider", "milk", "tea", "beer", "wine", "cola"),
    "spice": ("pepper", "cinnamon", "ginger", "saffron", "nutmeg", "cumin", "vanilla", "mint"),
}
_WISHES = (("lasagna", "ramen"), ("sushi", "chili"), ("dumplings", "paella"), ("tacos", "risotto"))


@dataclass(frozen=True)
class Turn:
    """What goes through the model at once, and whether it is of what will be asked."""

    ids: tuple[int, ...]
    asked_for: bool = False


@dataclass(frozen=True)
class Question:
    """A question up to the answer, and what may stand there: the right one first."""

    ids: tuple[int, ...]
    choices: tuple[int, ...]


@dataclass(frozen=True)
class Dialogue:
    """Turns, then questions."""

    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]

    @property
    def wanted(self) -> tuple[int, ...]:
        """Positions of the turns that will be asked for."""
        found, at = list[int](), 0
        for turn in self.turns:
            found += range(at, at + len(turn.ids)) if turn.asked_for else ()
            at += len(turn.ids)
        return tuple(found)


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Nat of things on the list, and of an older wish against a newer."""
    lm = local_model()
    return [_lists(lm, method, data, seed), _wishes(lm, method, data, seed)]


def lists(lm: LocalModel, data: Path | None, n: int, seed: int) -> list[Dialogue]:
    """Dialogues with a shopping list."""
    say, draws, found = _Speaker(lm, data, seed), random.Random(seed), []
    for _ in range(n):
        kinds = draws.sample(sorted(_KINDS), len(_KINDS))
        things = {kind: draws.choice(_KINDS[kind]) for kind in kinds}
        turns = [say.start]
        for kind in kinds:
            turns.append(say.turn(f"Please remember to buy {things[kind]}.", "Noted.", True))
            turns.append(say.chat())
        turns += say.chats(_BEYOND)
        asks = [
            say.question(
                f"Which {kind} should you remember to buy?",
                "You asked me to remember to buy",
                (things[kind], *(other for other in _KINDS[kind] if other != things[kind])),
            )
            for kind in kinds
        ]
        found.append(Dialogue(tuple(turns), tuple(asks)))
    return found


def wishes(lm: LocalModel, data: Path | None, n: int, seed: int) -> list[Dialogue]:
    """Dialogues in which a wish is changed; the newer is the first choice of the question."""
    say, found = _Speaker(lm, data, seed), []
    for i in range(n):
        older, newer = _WISHES[i // 2 % len(_WISHES)][:: 1 if i % 2 else -1]
        told = [
            say.turn(f"For dinner tonight I want {older}.", "Noted.", True),
            say.chat(),
            say.chat(),
            say.turn(f"I changed my mind. For dinner tonight I want {newer}.", "Noted.", True),
        ]
        rest = [token for turn in say.chats(_BEYOND) for token in turn.ids]
        ask = say.question("What do I want for dinner tonight?", "For dinner tonight you want",
                           (newer, older))  # fmt: skip
        found.append(Dialogue((say.start, *told, Turn(tuple(rest))), (ask,)))
    return found


class _Speaker:
    """Words to tokens, and chat of real people who are not at shopping."""

    def __init__(self, lm: LocalModel, data: Path | None, seed: int) -> None:
        self._tokenizer = lm.tokenizer
        self.start = Turn((lm.tokenizer.bos_token_id,))
        self._chats = list[tuple[str, str]]()
        for talk in memorybank(data):
            texts = [turn.text.partition(": ")[2] for turn in talk.turns]
            self._chats += zip(texts[::2], texts[1::2], strict=True)
        random.Random(seed).shuffle(self._chats)
        self._next = 0

    def turn(self, user: str, reply: str, asked_for: bool = False) -> Turn:
        """An exchange."""
        return Turn(self._encode(f"User: {user}\nAssistant: {reply}\n"), asked_for)

    def chat(self) -> Turn:
        """The next real exchange."""
        self._next += 1
        return self.turn(*self._chats[self._next % len(self._chats)])

    def chats(self, n_tokens: int) -> list[Turn]:
        """So many tokens of them, and a few more."""
        found = list[Turn]()
        while sum(len(turn.ids) for turn in found) < n_tokens:
            found.append(self.chat())
        return found

    def question(self, user: str, reply: str, choices: Sequence[str]) -> Question:
        """A question; choices are told apart by their first token."""
        firsts = tuple(self._encode(f" {word}")[0] for word in choices)
        assert len(set(firsts)) == len(firsts), choices
        return Question(self._encode(f"User: {user}\nAssistant: {reply}"), firsts)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)


@torch.no_grad()
def ask(
    lm: LocalModel, policy: CachePolicy, talk: Dialogue, n_slots: int
) -> tuple[NDArray[np.float64], int]:
    """Log-probabilities of each question's choices among themselves, and bytes held.

    The last token of a turn comes alone, as replies do, so that the next begins a new one.

    Args:
        lm: Gemma-3-270M.
        policy: whose slots.
        talk: the dialogue.
        n_slots: that stay in each full-attention layer; 0 = all.
    """
    n_tokens = sum(len(turn.ids) for turn in talk.turns)
    n_tokens += sum(len(question.ids) for question in talk.questions)
    slots = n_slots or n_tokens
    budget = bytes_for(lm.model, policy, slots, chunk=CHUNK)
    found = []
    with bounded(lm.model, policy, budget, chunk=CHUNK) as cache:
        for turn in talk.turns:
            for part in (turn.ids[:-1], turn.ids[-1:]):
                if part:
                    lm.model.get_decoder()(torch.tensor([part]), past_key_values=cache)
        cache.compress()
        held = sum(cache.report().held_bytes.values())
        for question in talk.questions:
            out = lm.model(torch.tensor([question.ids]), past_key_values=cache, logits_to_keep=1)
            choices = out.logits[0, -1].double()[list(question.choices)]
            found.append(choices.log_softmax(0).numpy())
            answer = torch.tensor([[question.choices[0]]])
            lm.model.get_decoder()(answer, past_key_values=cache)
    return np.array(found), held


def _lists(lm: LocalModel, method: Any, data: Path | None, seed: int) -> Row:
    talks = lists(lm, data, N_LISTS, seed)
    chance, oracle, baseline = (
        load(f"context/{name}")() for name in ("random", "oracle", method.card.baseline)
    )

    def judged(policy_of: Callable[[Dialogue], CachePolicy], n_slots: int = N_SLOTS) -> _Judged:
        found = [ask(lm, policy_of(talk), talk, n_slots) for talk in talks]
        return _Judged(np.array([logp for logp, _ in found]), found[0][1])

    mine, theirs = judged(lambda _: method), judged(lambda _: baseline)
    others = {
        "full cache": judged(lambda _: baseline, 0),
        "oracle": judged(lambda talk: replace(oracle, positions=talk.wanted)),
        "random": judged(lambda _: chance),
    }
    means = {name: float(one.nats.mean()) for name, one in others.items()}
    known = max(means["full cache"], means["oracle"])
    hits = {name: one.hits for name, one in {method.card.baseline: theirs, **others}.items()}
    return Row(
        "nat of a thing on the list", float(mine.nats.mean()), float(theirs.nats.mean()),
        paired_interval(mine.nats, theirs.nats, seed), len(talks), means,
        {
            "full cache and oracle know the list": known < _KNOWN,
            "random slots do not": means["random"] > _UNKNOWN,
        },
        bytes=mine.held, baseline_bytes=theirs.held,
        data=f"{N_SLOTS} slots a full layer; {len(talks)} dialogues, {len(_KINDS)} things each",
        note=f"likeliest: {mine.hits:.0%} of things; "
        + ", ".join(f"{name} {share:.0%}" for name, share in hits.items())
        + f"; chance is {_CHANCE:.2f} nat and 12 %",
    )  # fmt: skip


@dataclass(frozen=True)
class _Judged:
    """Log-probabilities (dialogues, questions, choices) of a method, and bytes it held."""

    logp: NDArray[np.float64]
    held: int

    @property
    def nats(self) -> NDArray[np.float64]:
        """Of the right choices, mean of each dialogue."""
        nats: NDArray[np.float64] = -self.logp[..., 0].mean(1)
        return nats

    @property
    def hits(self) -> float:
        """Share of questions whose right choice is the likeliest."""
        return float((self.logp.argmax(-1) == 0).mean())


def _wishes(lm: LocalModel, method: Any, data: Path | None, seed: int) -> Row:
    talks = wishes(lm, data, N_WISHES, seed)

    def older(policy: CachePolicy, n_slots: int = N_SLOTS) -> NDArray[np.float64]:
        found = [ask(lm, policy, talk, n_slots)[0][0] for talk in talks]
        return np.array([logp[1] - logp[0] for logp in found])

    fading, lasting = (older(replace(method, decay=decay)) for decay in (_DECAY, 1.0))
    baseline = load(f"context/{method.card.baseline}")()
    theirs = older(baseline)
    means = {"no decay": float(lasting.mean()), "full cache": float(older(baseline, 0).mean())}
    return Row(
        f"nat by which the older wish is likelier, decay {_DECAY}", float(fading.mean()),
        float(theirs.mean()), paired_interval(fading, theirs, seed), len(talks), means,
        {
            "the newer wish wins with decay": fading.mean() < 0,
            "it does not win as clearly without": lasting.mean() > fading.mean(),
        },
        primary=False, data=f"{N_SLOTS} slots a full layer; {len(talks)} dialogues",
    )  # fmt: skip
