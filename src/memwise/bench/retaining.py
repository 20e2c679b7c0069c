"""Retaining heads for Gemma-3-270M, trained in some minutes on short texts with answers.

Half of the lessons are facts planted in books, half real questions with their passages (NQ). The
heads are kept in the cache folder, as the Gemma terms cover them, until code or data change.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

from memwise.bench.data import books, data_folder
from memwise.context.engine import retaining
from memwise.context.engine.retaining import Lesson
from memwise.models import LocalModel, cached

N_LESSONS, N_STEPS, HIDDEN = 160, 480, 256
_LR = 1e-3
_TEXT_TOKENS = 160  # of a lesson
_NQ = "nq_oracle/nq_dev.jsonl.gz"
_FACTS = (
    (" The phone extension of {who} is {number}.", "What is the phone extension of {who}?",
     " The phone extension of {who} is {number}"),
    (" {who} was born in {town}.", "Where was {who} born?", " {who} was born in {town}"),
    (" The train to {town} leaves at {hour} from platform {digit}.",
     "When does the train to {town} leave?", " The train to {town} leaves at {hour}"),
    (" {who} paid {number} dollars for the house.", "How much did {who} pay for the house?",
     " {who} paid {number} dollars"),
    (" The favourite animal of {who} is the {animal}.", "What is the favourite animal of {who}?",
     " The favourite animal of {who} is the {animal}"),
    (" {who} works as a {job} in {town}.", "What is the work of {who}?", " {who} works as a {job}"),
)  # fmt: skip
_WORDS = {
    "who": ("Anna Berg", "Tom Reyes", "Mira Novak", "Paul Okafor", "Ines Duarte", "Karl Lund",
            "Rosa Blum", "Omar Haddad", "Lucy Tran", "Ivan Petrov"),
    "town": ("Lisbon", "Oslo", "Quito", "Bremen", "Nagoya", "Leeds", "Tunis", "Perth", "Turin"),
    "animal": ("otter", "falcon", "badger", "lynx", "heron", "camel", "tortoise", "moth"),
    "job": ("baker", "surgeon", "plumber", "judge", "pilot", "weaver", "geologist", "tailor"),
}  # fmt: skip


def heads(lm: LocalModel, data: Path | None) -> Path:
    """Folder of the trained heads, from the cache where it is there."""
    sources = (Path(__file__), Path(retaining.__file__), data_folder(data) / _NQ)
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]

    def build(folder: Path) -> None:
        found = retaining.train_heads(
            lm.model, lessons(lm, data, N_LESSONS, 0), n_steps=N_STEPS, hidden=HIDDEN, lr=_LR
        )
        retaining.save_heads(found, folder / "heads.safetensors")

    return cached(f"locret-heads-{code}", build)


def lessons(lm: LocalModel, data: Path | None, n: int, seed: int) -> list[Lesson]:
    """Planted facts and real questions in turn.

    Args:
        lm: Gemma-3-270M.
        data: folder of the data sets.
        n: how many.
        seed: of pieces, places and words.
    """
    draws = random.Random(seed)
    texts = [text for _, text in books(data_folder(data))]
    real = _questions(data_folder(data) / _NQ, draws)
    found = list[Lesson]()
    for i in range(n):
        text = draws.choice(texts)
        at = draws.randrange(len(text) - 8 * _TEXT_TOKENS)
        hay = _encode(lm, text[at : at + 8 * _TEXT_TOKENS])
        says, ask, answer = next(real) if i % 2 else _fact(draws)
        hay = hay[: max(40, _TEXT_TOKENS - len(_encode(lm, says)))]
        cut = draws.randrange(len(hay))
        context = [lm.tokenizer.bos_token_id, *hay[:cut], *_encode(lm, says), *hay[cut:]]
        asked = _encode(lm, f"\n\nQuestion: {ask}\nAnswer:")
        answered = _encode(lm, answer)
        found.append(Lesson((*context, *asked, *answered), len(answered)))
    return found


def _fact(draws: random.Random) -> tuple[str, str, str]:
    words = {name: draws.choice(choices) for name, choices in _WORDS.items()}
    words["number"] = str(draws.randrange(10, 10 ** draws.randint(2, 6)))
    words["digit"] = str(draws.randint(1, 9))
    words["hour"] = f"{draws.randint(1, 12)}:{draws.randint(10, 59)}"
    says, ask, answer = draws.choice(_FACTS)
    return says.format(**words), ask.format(**words), answer.format(**words)


def _questions(path: Path, draws: random.Random) -> Iterator[tuple[str, str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    draws.shuffle(entries)
    for entry in entries:
        gold = next(one for one in entry["ctxs"] if one["isgold"])
        text, answer = gold["text"][:500], entry["answers"][0]
        if answer in text:
            yield f" {text}", f"{entry['question']}?", f" {answer}"


def _encode(lm: LocalModel, text: str) -> list[int]:
    found: list[int] = lm.tokenizer(text, add_special_tokens=False).input_ids
    return found
