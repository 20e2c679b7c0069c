"""Does the name that a question only hints at help the model to answer, if it is injected?

Prompts of two steps ("The capital of the country where the Eiffel Tower stands is the city of")
are given to Gemma-3-270M with the name of the step between ("France") as memory. Judged is the
probability of the answer's first token. Layer and strength are chosen on the prompts of half of the
countries, and judged on the others, once.

What must hold: names of other prompts and random nouns, injected alike, help less. The name in
front of the prompt, as text, is shown beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memwise.bench.engine import Row, paired_interval
from memwise.context.engine.editor import edited
from memwise.models import LocalModel, local_model

LAYERS, STRENGTHS = (1, 3, 5, 7, 9, 11, 13, 15), (0.5, 1.0, 2.0, 4.0)
_BATCH = 21
_FORMS = (
    "The capital of the country where {} is the city of",
    "The language that most people speak in the country where {} is called",
    "The country where {} lies on the continent of",
)
# Something of a country, the country, its capital, language and continent.
_COUNTRIES = (
    ("the Eiffel Tower stands", "France", "Paris", "French", "Europe"),
    ("sushi was invented", "Japan", "Tokyo", "Japanese", "Asia"),
    ("the Colosseum stands", "Italy", "Rome", "Italian", "Europe"),
    ("the pyramids of Giza stand", "Egypt", "Cairo", "Arabic", "Africa"),
    ("the Sagrada Familia stands", "Spain", "Madrid", "Spanish", "Europe"),
    ("Machu Picchu lies", "Peru", "Lima", "Spanish", "South America"),
    ("the Oktoberfest is held", "Germany", "Berlin", "German", "Europe"),
    ("the Great Wall was built", "China", "Beijing", "Chinese", "Asia"),
    ("the Acropolis stands", "Greece", "Athens", "Greek", "Europe"),
    ("the Angkor Wat temple stands", "Cambodia", "Phnom Penh", "Khmer", "Asia"),
    ("the Bolshoi Theatre stands", "Russia", "Moscow", "Russian", "Europe"),
    ("the samba school parades are held", "Brazil", "Brasilia", "Portuguese", "South America"),
    ("the Little Mermaid statue sits", "Denmark", "Copenhagen", "Danish", "Europe"),
    ("kimchi is the national dish", "South Korea", "Seoul", "Korean", "Asia"),
    ("the Hagia Sophia stands", "Turkey", "Ankara", "Turkish", "Asia"),
    ("Chopin was born", "Poland", "Warsaw", "Polish", "Europe"),
    ("the Moai statues stand", "Chile", "Santiago", "Spanish", "South America"),
    ("Count Dracula's castle stands", "Romania", "Bucharest", "Romanian", "Europe"),
    ("the Taj Mahal stands", "India", "New Delhi", "Hindi", "Asia"),
    ("tulips and windmills are famous", "the Netherlands", "Amsterdam", "Dutch", "Europe"),
    ("the city of Persepolis once stood", "Iran", "Tehran", "Persian", "Asia"),
    ("the Nobel Prize in physics is awarded", "Sweden", "Stockholm", "Swedish", "Europe"),
    ("the CN Tower stands", "Canada", "Ottawa", "English", "North America"),
    ("the city of Casablanca lies", "Morocco", "Rabat", "Arabic", "Africa"),
    ("the composer Sibelius was born", "Finland", "Helsinki", "Finnish", "Europe"),
    ("the tango was born", "Argentina", "Buenos Aires", "Spanish", "South America"),
    ("the Ha Long Bay lies", "Vietnam", "Hanoi", "Vietnamese", "Asia"),
    ("Ibsen wrote his plays", "Norway", "Oslo", "Norwegian", "Europe"),
)
_NOUNS = (
    "table", "river", "button", "garden", "hammer", "letter", "window", "basket", "engine",
    "blanket", "mirror", "pencil", "bottle", "carpet", "ladder", "pillow", "bridge", "candle",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A prompt of two steps.

    Attributes:
        text: up to the answer.
        bridge: what it only hints at.
        answer: of which the first token is judged.
    """

    text: str
    bridge: str
    answer: str


def prompts() -> list[Prompt]:
    """Three a country, a country after the other."""
    return [
        Prompt(form.format(thing), bridge, answer)
        for thing, bridge, *answers in _COUNTRIES
        for form, answer in zip(_FORMS, answers, strict=True)
    ]


def run(method: Any, data: Path | None, seed: int) -> list[Row]:
    """Probability of the answers, with the bridge injected."""
    lm = local_model()
    each = prompts()
    n_forms = len(_FORMS)
    dev = [one for i, one in enumerate(each) if i // n_forms % 2 == 0]
    test = [one for i, one in enumerate(each) if i // n_forms % 2 == 1]
    plain = _nats(lm, None, dev, [])
    cells = {
        (layer, strength): float(np.mean(np.exp(_injected(lm, method, dev, layer, strength))))
        for layer in LAYERS
        for strength in STRENGTHS
    }
    best = max(cells, key=lambda cell: cells[cell])
    by_layer = {layer: max(cells[layer, s] for s in STRENGTHS) for layer in LAYERS}
    tried = ", ".join(f"{layer}: {value:.3f}" for layer, value in by_layer.items())
    note = (
        f"layer {best[0]}, strength {best[1]:g}, chosen on {len(dev)} prompts of other countries, "
        f"where plain is {np.exp(plain).mean():.3f} and the best of each layer is {tried}"
    )
    return _judged(lm, method, test, best, seed, note)


def _judged(
    lm: LocalModel, method: Any, test: list[Prompt], cell: tuple[int, float], seed: int, note: str
) -> list[Row]:
    draws = random.Random(seed)
    bridges = [one.bridge for one in test]
    # Moved by whole countries, so that none keeps its own.
    others = bridges[3 * 5 :] + bridges[: 3 * 5]
    nouns = draws.choices(_NOUNS, k=len(test))
    layer, strength = cell
    mine = _injected(lm, method, test, layer, strength)
    base = _nats(lm, None, test, [])
    held = {
        "bridge as text in front": _nats(lm, None, test, [f"{bridge}. " for bridge in bridges]),
        "bridges of other prompts": _injected(lm, method, test, layer, strength, others),
        "random nouns": _injected(lm, method, test, layer, strength, nouns),
    }
    rows = []
    for metric, of in (("probability of the answer", np.exp), ("log-probability, nats", np.array)):
        value, plain = of(mine), of(base)
        controls = {name: float(of(nats).mean()) for name, nats in held.items()}
        behaves = {
            "bridges of other prompts help less": controls["bridges of other prompts"]
            < value.mean(),
            "random nouns help less": controls["random nouns"] < value.mean(),
        }
        primary = of is np.exp
        rows.append(
            Row(
                metric, float(value.mean()), float(plain.mean()),
                paired_interval(value, plain, seed, groups=bridges), len(test), controls,
                behaves if primary else {}, primary=primary,
                data=f"{len(test)} prompts on {len(set(bridges))} countries",
                note=f"{note}; {np.mean(mine > base):.0%} of the answers became likelier"
                if primary else "",
            )
        )  # fmt: skip
    return rows


def _injected(
    lm: LocalModel, method: Any, todo: Sequence[Prompt], layer: int, strength: float,
    memories: Sequence[str] = (),
) -> NDArray[np.float64]:  # fmt: skip
    """Nats of the answers, with each prompt's bridge or other words as memory."""
    words = memories or [one.bridge for one in todo]
    ids = tuple(
        tuple(lm.tokenizer(f" {word}", add_special_tokens=False).input_ids) for word in words
    )
    return _nats(lm, replace(method, memories=ids, layer=layer, strength=strength), todo, [])


@torch.no_grad()
def _nats(
    lm: LocalModel, policy: Any, todo: Sequence[Prompt], before: Sequence[str]
) -> NDArray[np.float64]:
    """Log-probability of each answer's first token, in nats."""
    texts = [b + one.text for b, one in zip(before or [""] * len(todo), todo, strict=True)]
    found = []
    for first in range(0, len(todo), _BATCH):
        some = slice(first, first + _BATCH)
        batch = lm.tokenizer(texts[some], padding=True, padding_side="right", return_tensors="pt")
        if policy is None:
            hidden = _hidden(lm, batch)
        else:
            with edited(lm.model, replace(policy, memories=policy.memories[some])):
                hidden = _hidden(lm, batch)
        logp = lm.model.get_output_embeddings()(hidden).log_softmax(-1)
        answers = [lm.tokenizer(f" {one.answer}", add_special_tokens=False) for one in todo[some]]
        first_tokens = torch.tensor([answer.input_ids[0] for answer in answers])
        found.append(logp.gather(1, first_tokens[:, None])[:, 0])
    return torch.cat(found).double().numpy()


def _hidden(lm: LocalModel, batch: Any) -> torch.Tensor:
    """What the decoder makes of the last token of each row (B, D)."""
    mask = batch.attention_mask
    out = lm.model.get_decoder()(batch.input_ids, attention_mask=mask, use_cache=False)
    hidden: torch.Tensor = out.last_hidden_state[torch.arange(len(mask)), mask.sum(1) - 1]
    return hidden
