"""Four operations between what is remembered and what was said: pass, replace, append, delete."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memwise.catalogue import Card
from memwise.recall.engine.extract import Extractor
from memwise.recall.engine.policy import Policy, Step
from memwise.recall.engine.rank import Recipe
from memwise.recall.engine.records import Add, Connect, Expire, Item, Op, Replace
from memwise.recall.engine.text import terms

OPERATIONS = ("PASS", "REPLACE", "APPEND", "DELETE")
_ENDED = re.compile(
    r"\b(?:no longer|not any ?more|any ?more|stopped|quit|gave up|gave away|finished|completed"
    r"|cancell?ed|broke up|split up|sold|lost|passed away|died|left|over|recovered|healed|ended"
    r"|moved out|came back|came home|returned|graduated|dropped out|done with|got rid|rid of"
    r"|threw away|retired|resigned|un\w{4,}ed|closed|deleted|fell apart|called off)\b",
    re.IGNORECASE,
)
_RENEWED = re.compile(
    r"\b(?:now|new|switched|moved|changed|instead|turned|became|replaced|got promoted|these days"
    r"|transferred|upgraded|started)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class KeepMeUpdated(Policy):
    """Keep short sentences about each speaker; after a session each new one is held against them.

    PASS: memory says it already, the new one goes. REPLACE: the new one is the newer state, the old
    one goes. APPEND: both stay. DELETE: the old one is void and the new one only says so, both go.
    What goes stays visible as of earlier times.

    Note:
        The summary of a session is what the extractor finds in it. The paper finetunes T5 on pairs;
        here softmax regression judges by fifteen features, fitted once on template pairs by the
        check. The cues of an ending are a list of English phrases.
    """

    card = Card(
        paper=145,
        claim="memory F1 after five sessions above append-only; pairs judged better than by NLI",
        check="memory_state",
        baseline="append_only",
        better="higher",
        margin=0.1,
    )
    recipe = Recipe(kinds=("note",))

    def on_session_end(self, step: Step) -> Sequence[Op]:
        live: list[Item | Add] = [*step.scan("note")]
        ops: list[Op] = []
        for note in map(_note, step.facts(_unread(step))):
            verdicts = [
                (held, operation(step.extract, held, note))
                for held in live
                if held.actor == note.actor
            ]
            void = [held for held, verdict in verdicts if verdict == "DELETE"]
            old = [held for held, verdict in verdicts if verdict == "REPLACE"]
            same = [held for held, verdict in verdicts if verdict == "PASS"]
            if void:
                ops += [note, *(Expire(held, "void") for held in (*void, note))]
            elif same:
                ops += [Connect(same[0], "derived_from", turn) for turn in note.sources]
            elif old:
                ops.append(Replace(old[0], note, "outdated"))
                ops += [Expire(held, "outdated") for held in old[1:]]
            else:
                ops.append(note)
            gone = void or ([] if same else old)
            live = [held for held in live if held not in gone]
            live += [] if void or same else [note]
        return ops


def _unread(step: Step) -> list[Item]:
    """Turns of the session that left no note yet: a session may end, go on and end again."""
    links = step.links(step.turns, "derived_from", incoming=True)
    notes = step.get({link.src for link in links})
    read = {
        link.dst
        for link in links
        if notes[link.src].kind == "note" and notes[link.src].policy == step.policy
    }
    return [turn for turn in step.turns if turn.row not in read]


def _note(fact: Add) -> Add:
    """A sentence of the session's summary; it belongs to whoever said it."""
    turn = fact.sources[0]
    actor = turn.actor if isinstance(turn, Item) else fact.actor
    return replace(fact, kind="note", actor=actor, vector=True)


def operation(extract: Extractor, held: Item | Add, said: Item | Add) -> str:
    """Which of the four operations the sentence `said` asks for on the sentence `held`."""
    scores = _WEIGHTS @ features(extract, held, said)
    return OPERATIONS[int(np.argmax(scores))]


def features(extract: Extractor, held: Item | Add, said: Item | Add) -> NDArray[np.float64]:
    """What the judgement rests on, (15,): relation, shared words, cues, numbers and slots."""
    label = extract.relation(held.text, said.text)
    old, new = set(terms(held.text)), set(terms(said.text))
    shared = len(old & new)
    of_new, of_old = shared / max(1, len(new)), shared / max(1, len(old))
    ended = _ENDED.search(said.text) is not None and _ENDED.search(held.text) is None
    renewed = _RENEWED.search(said.text) is not None
    numbers = _NUMBER.findall(held.text), _NUMBER.findall(said.text)
    relation = _slot(held.data, "relation") == _slot(said.data, "relation")
    value = _slot(held.data, "object") == _slot(said.data, "object")
    one = bool(said.data["functional"])
    return np.array(
        [
            1, label == "entails", label == "updates", label == "ends", label == "compatible",
            of_new, of_old, ended and shared > 0, ended and of_old >= 0.5,
            renewed and shared > 0, renewed and of_old >= 0.5,
            all(numbers) and numbers[0] != numbers[1], relation and value,
            relation and not value, relation and not value and one,
        ],
        np.float64,
    )  # fmt: skip


def _slot(data: Mapping[str, Any], name: str) -> str:
    return str(data[name]).casefold()


# One row an operation, one column a feature; fitted by `bench.checks.memory_state.fit`.
_WEIGHTS = np.array(
    [
        [-0.6, 2.0, -1.5, -0.7, -0.6, 3.4, 3.3, -2.3, -0.7, -0.9, -0.1, 0.0, 0.4, -2.6, -0.4],
        [0.0, -0.3, 1.2, -0.5, 0.0, -2.6, -2.6, -0.8, -0.1, 3.0, 0.9, 1.0, -0.1, 1.4, 1.9],
        [2.7, -1.5, 0.6, -1.0, 0.7, -1.6, -1.5, -0.1, -1.0, -1.9, -0.8, -0.9, -0.5, 1.5, -1.3],
        [-2.2, -0.3, -0.3, 2.2, -0.1, 0.8, 0.7, 3.2, 1.8, -0.2, -0.1, 0.0, 0.2, -0.4, -0.2],
    ]
)  # fmt: skip
