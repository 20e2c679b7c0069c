"""Load the data that checks are run on: one shape for chats, paragraphs and evidence.

- a `Conversation` is what a memory is told, in order, and the questions with their evidence
- sets whose licence allows it ship as fixtures; all others are read from `--data` / `MEMWISE_DATA`
- the loaders read dates with fixed formats of their own, because the library's date reader is one
  of the things that are checked with this data
"""

from __future__ import annotations

import datetime as dt
import gzip
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from memwise.errors import InvalidKnob

FIXTURES = Path(__file__).parent / "fixtures"
# Recipes may be tuned on these (the first four of LoCoMo); rows of the others are printed apart.
TUNED = ("conv-26", "conv-30", "conv-41", "conv-42", "longmemeval")

_LOCOMO_CATEGORIES = {
    1: "multi-hop",
    2: "temporal",
    3: "open-domain",
    4: "single-hop",
    5: "adversarial",
}
_SECOND = 1_000_000  # instants are microseconds
_TURN_GAP = 30 * _SECOND  # chats state when a session began; turns follow at this distance


@dataclass(frozen=True, slots=True)
class Turn:
    """One immutable piece of what is told: a chat turn, a paragraph or a sentence.

    Attributes:
        ref: name that evidence cites; unique in its conversation.
        text: as it is stored, the speaker's name in front where there is one.
        at: instant.
        actor: who said it; empty for documents.
        session: turns of one session stand beside each other.
    """

    ref: str
    text: str
    at: int
    actor: str
    session: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the turns that answer it.

    Attributes:
        text: the question.
        gold: refs of the turns that together hold the answer; empty = no evidence is known.
        category: the set's own name of its kind.
        answer: gold answer, empty where the set gives none.
        at: instant at which it is asked, where the set says so.
        audited_wrong: a public audit objects to the gold answer or to the citation.
        audited_gold: evidence after that audit; None where it does not object.
        alternatives: other sets of refs, each as good as `gold`.
        unanswerable: right is to say that it was never told; `gold` then cites what misleads.
    """

    text: str
    gold: frozenset[str]
    category: str
    answer: str = ""
    at: int | None = None
    audited_wrong: bool = False
    audited_gold: frozenset[str] | None = None
    alternatives: tuple[frozenset[str], ...] = ()
    unanswerable: bool = False


@dataclass(frozen=True, slots=True)
class Observation:
    """A fact that ships with the data: an extraction of LLM quality, frozen.

    Attributes:
        text: the fact.
        actor: whom it is about.
        session: session it was drawn from.
        sources: refs of the turns it rests on.
    """

    text: str
    actor: str
    session: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Conversation:
    """What one memory is told, and what it is asked.

    Attributes:
        name: name of the conversation, also its bank.
        turns: in the order of telling.
        questions: all of them, those without evidence included.
        observations: frozen facts, where the set has them.
        summaries: session -> summary, where the set has them.
    """

    name: str
    turns: Sequence[Turn]
    questions: Sequence[Question]
    observations: Sequence[Observation] = ()
    summaries: Mapping[str, str] = field(default_factory=dict)


def data_folder(data: Path | None = None) -> Path:
    """Return the folder of the data sets: the argument, else `MEMWISE_DATA`.

    Raises:
        InvalidKnob: neither is given, or there is no such folder.
    """
    named = data or os.environ.get("MEMWISE_DATA")
    if not named:
        raise InvalidKnob(
            "this needs data that memwise may not ship: give its folder by --data DIR or "
            "MEMWISE_DATA"
        )
    if not Path(named).is_dir():
        raise InvalidKnob(f"the data folder {str(named)!r} does not exist; see --data")
    return Path(named)


def _files(data: Path | None, pattern: str) -> list[Path]:
    found = sorted(data_folder(data).glob(pattern))
    if not found:
        raise InvalidKnob(f"no {pattern} in the data folder {data_folder(data)}; check --data")
    return found


def _epoch(when: dt.datetime) -> int:
    """Instant of a naive UTC time."""
    return int(when.replace(tzinfo=dt.UTC).timestamp()) * _SECOND


# ---------------------------------------------------------------- LoCoMo


def locomo(data: Path | None = None) -> list[Conversation]:
    """Long chats of two friends (CC BY-NC 4.0: never shipped), with evidence by turn.

    Text of a turn is `Speaker: text [shares caption]`, as for the peers it is compared with.
    """
    audit = {
        (wrong["sample_id"], _plain(wrong["question"])): wrong
        for path in _files(data, "locomo/gold_errors.json")
        for wrong in json.loads(path.read_text("utf-8"))
    }
    return [
        _locomo_conversation(raw, audit)
        for path in _files(data, "locomo/locomo_*.json")
        for raw in json.loads(path.read_text("utf-8"))
    ]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _locomo_conversation(
    raw: Mapping[str, Any], audit: Mapping[tuple[str, str], Mapping[str, Any]]
) -> Conversation:
    name, talk = raw["sample_id"], raw["conversation"]
    sessions = sorted((key for key in talk if re.fullmatch(r"session_\d+", key)), key=_number)
    turns = [turn for key in sessions for turn in _locomo_session(talk, key)]
    known = {turn.ref for turn in turns}
    return Conversation(
        name,
        turns,
        [
            _locomo_question(qa, known, audit.get((name, _plain(qa["question"]))))
            for qa in raw["qa"]
        ],
        [
            Observation(text, actor, f"session_{_number(key)}", _refs(refs, known))
            for key in sorted(raw["observation"], key=_number)
            for actor, facts in raw["observation"][key].items()
            for text, refs in facts
        ],
        {f"session_{_number(key)}": text for key, text in raw["session_summary"].items()},
    )


def _number(key: str) -> int:
    """The number in `session_12`, `session_12_observation`."""
    return int(key.split("_")[1])


def _locomo_session(talk: Mapping[str, Any], key: str) -> Iterator[Turn]:
    began = _epoch(dt.datetime.strptime(talk[f"{key}_date_time"], "%I:%M %p on %d %B, %Y"))
    for i, turn in enumerate(talk[key]):
        text = f"{turn['speaker']}: {turn['text']}"
        if turn.get("blip_caption"):
            text += f" [shares {turn['blip_caption']}]"
        yield Turn(turn["dia_id"], text, began + i * _TURN_GAP, turn["speaker"], key)


def _refs(cited: object, known: set[str]) -> tuple[str, ...]:
    """The refs in a citation: a list, or one string with several of them; unknown ones go."""
    entries = cited if isinstance(cited, list) else [cited]
    parts = (part for entry in entries for part in re.split(r"[;, ]+", str(entry)))
    return tuple(part for part in dict.fromkeys(parts) if part in known)


def _locomo_question(
    qa: Mapping[str, Any], known: set[str], wrong: Mapping[str, Any] | None
) -> Question:
    return Question(
        qa["question"],
        frozenset(_refs(qa.get("evidence") or [], known)),
        _LOCOMO_CATEGORIES[qa["category"]],
        str(qa.get("answer", "")),
        audited_wrong=wrong is not None,
        audited_gold=frozenset(_refs(wrong["correct_evidence"], known)) if wrong else None,
        unanswerable=qa["category"] == 5,
    )


# ---------------------------------------------------------------- LongMemEval


def longmemeval(data: Path | None = None) -> Conversation:
    """Evidence turns of all questions (MIT), pooled into one haystack in order of date.

    The published haystacks are not in it, so numbers do not compare with LongMemEval's own.
    """
    entries = [
        json.loads(line)
        for path in _files(data, "longmemeval_evidence/*.jsonl")
        for line in path.read_text("utf-8").splitlines()
    ]
    turns: dict[str, Turn] = {}
    questions = []
    for entry in entries:
        gold = [
            turn
            for n, session in enumerate(entry["evidence_sessions"])
            for turn in _longmemeval_session(session, f"{entry['question_id']}/{n}")
        ]
        turns |= {turn.ref: turn for turn in gold}
        questions.append(_longmemeval_question(entry, frozenset(turn.ref for turn in gold)))
    in_order = sorted(turns.values(), key=lambda turn: (turn.at, turn.ref))
    return Conversation("longmemeval", in_order, questions)


def _longmemeval_session(session: Mapping[str, Any], name: str) -> Iterator[Turn]:
    began = _chat_date(session["date"])
    for i, turn in enumerate(session["turns"]):
        text = f"{turn['role']}: {turn['content']}"
        yield Turn(f"{name}/{i}", text, began + i * _TURN_GAP, turn["role"], name)


def _longmemeval_question(entry: Mapping[str, Any], gold: frozenset[str]) -> Question:
    answer, asked = entry["answer"], entry["question_date"]  # either may be missing
    return Question(
        entry["question"],
        gold,
        entry["question_type"],
        "" if answer is None else str(answer),
        _chat_date(asked) if asked else None,
        unanswerable=entry["abstention"],
    )


def _chat_date(text: str) -> int:
    """`2023/04/10 (Mon) 23:07`, without asking the locale for names of days."""
    return _epoch(dt.datetime.strptime(re.sub(r" \(\w+\)", "", text), "%Y/%m/%d %H:%M"))


# ---------------------------------------------------------------- HotpotQA


@dataclass(frozen=True)
class Hotpot:
    """Questions that need two paragraphs.

    Attributes:
        own: one conversation a question: its two gold paragraphs and eight distractors.
        pooled: the paragraphs of all questions in one.
    """

    own: tuple[Conversation, ...]
    pooled: Conversation


def hotpot(
    data: Path | None = None, unit: Literal["paragraph", "sentence"] = "paragraph"
) -> Hotpot:
    """HotpotQA distractor questions (CC BY-SA 4.0: not shipped), evidence by paragraph or sentence.

    Refs are titles, of sentences `title#i`; the title stands in front of each text, and the
    sentences of a paragraph are one session. Paragraphs lie in order of title, so that where one
    stands says nothing about whether it is gold.
    """
    entries = [
        entry
        for path in _files(data, "hotpotqa/hotpot_dev_distractor_*.json")
        for entry in json.loads(path.read_text("utf-8"))
    ]
    own = []
    pool: dict[str, list[str]] = {}
    for entry in entries:
        paragraphs = {title: sentences for title, sentences, *_ in entry["distractors"]}
        paragraphs |= {entry[f"title_{side}"]: entry[f"para_{side}"] for side in "ab"}
        pool |= paragraphs
        question = _hotpot_question(entry, unit)
        own.append(Conversation(entry["_id"], _hotpot_turns(paragraphs, unit), [question]))
    questions = [question for one in own for question in one.questions]
    return Hotpot(tuple(own), Conversation("hotpot", _hotpot_turns(pool, unit), questions))


def _hotpot_turns(paragraphs: Mapping[str, Sequence[str]], unit: str) -> list[Turn]:
    pieces = []
    for title, sentences in sorted(paragraphs.items()):
        if unit == "paragraph":
            pieces.append((title, "".join(sentences), title))
        else:
            pieces += [(f"{title}#{i}", text.strip(), title) for i, text in enumerate(sentences)]
    return [
        Turn(ref, f"{title}: {text}", i * _TURN_GAP, "", title)
        for i, (ref, text, title) in enumerate(pieces)
    ]


def _hotpot_question(entry: Mapping[str, Any], unit: str) -> Question:
    titles = (entry["title_a"], entry["title_b"])
    if unit == "paragraph":
        gold = frozenset(titles)
    else:
        facts = zip(titles, entry["supporting_facts"], strict=True)
        gold = frozenset(f"{title}#{i}" for title, numbers in facts for i in numbers)
    return Question(entry["question"], gold, "two-hop", str(entry["answer"]))


# ---------------------------------------------------------------- shipped fixtures


def memorybank(data: Path | None = None) -> list[Conversation]:
    """Ten days of chat with an AI companion a user (MIT), from the shipped fixture or from `data`.

    The evidence is marked by hand; the rule stands in the fixture. Each exchange is two turns,
    `Emily/2023-04-29/3/query` and `.../response`.
    """
    if data is None:
        histories = json.loads(_fixture("memorybank.json.gz"))
    else:
        histories = {}
        for path in _files(data, "memorybank/memory_bank_*.json"):
            histories |= compact_memorybank(json.loads(path.read_text("utf-8")))
    gold = json.loads((FIXTURES / "memorybank_gold.json").read_text("utf-8"))["questions"]
    return [
        Conversation(
            user,
            [turn for day in sorted(days) for turn in _memorybank_day(user, day, days[day])],
            [_memorybank_question(mark) for mark in gold if mark["user"] == user],
        )
        for user, days in sorted(histories.items())
    ]


def compact_memorybank(raw: Mapping[str, Any]) -> dict[str, dict[str, list[list[str]]]]:
    """The shipped form of the original file: user -> date -> [[query, response], ...]."""
    return {
        user.strip(): {
            day: [[one["query"], one["response"]] for one in exchanges]
            for day, exchanges in entry["history"].items()
        }
        for user, entry in raw.items()
    }


def _memorybank_day(user: str, day: str, exchanges: Sequence[Sequence[str]]) -> Iterator[Turn]:
    # The set has dates without hours; noon keeps the date in every zone but the farthest.
    noon = _epoch(dt.datetime.fromisoformat(day)) + 12 * 3600 * _SECOND
    for i, exchange in enumerate(exchanges):
        sides = zip(("query", "response"), (user, "assistant"), exchange, strict=True)
        for half, (side, actor, text) in enumerate(sides):
            at = noon + (2 * i + half) * _TURN_GAP
            yield Turn(f"{user}/{day}/{i}/{side}", f"{actor}: {text}", at, actor, day)


def _memorybank_question(mark: Mapping[str, Any]) -> Question:
    def refs(evidence: Sequence[Sequence[object]]) -> frozenset[str]:
        return frozenset(f"{mark['user']}/{day}/{i}/{side}" for day, i, side in evidence)

    return Question(
        mark["question"],
        refs(mark["evidence"]),
        "probe",
        mark.get("answer") or "",
        alternatives=tuple(refs(other) for other in mark.get("alternatives", ())),
        unanswerable=not mark.get("answerable", True),
    )


def books(data: Path | None = None) -> list[tuple[str, str]]:
    """(title, text) of public-domain books: the shipped one, or all in `data` by file name."""
    if data is None:
        return [("alice in wonderland", _fixture("alice_in_wonderland.txt.gz"))]
    return [_book(path.stem, path.read_text("utf-8-sig")) for path in _files(data, "books/*/*.txt")]


def _book(stem: str, text: str) -> tuple[str, str]:
    """Title and body without what Project Gutenberg put around it."""
    start = re.search(r"^\*\*\* ?START OF .*? EBOOK (.*?) ?\*\*\*$", text, re.MULTILINE)
    end = re.search(r"^\*\*\* ?END OF ", text, re.MULTILINE)
    body = text[start.end() if start else 0 : end.start() if end else len(text)]
    return (start[1] if start else stem.replace("_", " ")).lower(), body.strip()


def _fixture(name: str) -> str:
    return gzip.decompress((FIXTURES / name).read_bytes()).decode("utf-8")
