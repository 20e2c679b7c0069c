"""What every policy of the room owes its engine, whatever it derives or drops."""

import pytest

from memwise import Memory, catalogue
from memwise.recall.engine.plain import Plain
from memwise.recall.engine.records import SOURCES
from memwise.recall.interchange import export_bank

NAMES = ["plain", *(c.name for c in catalogue.cards() if c.room == "recall" and not c.requires)]
DAY = 86_400
START = 1_777_000_000
TALK = [
    ("s1", "Ana", "I live in Porto and I work at the harbour museum."),
    ("s1", "Rui", "Do you like it there?"),
    ("s1", "Ana", "Yes, I like the museum. My sister Rita has a dog called Pingo."),
    ("s2", "Ana", "I moved to Lisbon last week."),
    ("s2", "Rui", "What about the museum?"),
    ("s2", "Ana", "I quit, and I started a job at a bakery in Alfama."),
    ("s3", "Rui", "I bought a red bicycle yesterday."),
    ("s3", "Ana", "I no longer eat fish because I am allergic to it."),
    ("s4", "Ana", "Rita moved to Berlin with Pingo on 3 May 2026."),
    ("s4", "Rui", "Thanks for telling me."),
]
QUESTIONS = ["Where does Ana live?", "Who bought a bicycle?", "What is Rita's dog called?"]


def messages():
    return [
        {
            "role": "user", "content": text, "actor": actor, "session": session,
            "at": START + i * DAY, "meta": {"ref": i},
        }
        for i, (session, actor, text) in enumerate(TALK)
    ]  # fmt: skip


def made(policy, path=":memory:", **options):
    options = {"embedder": "ngrams", "clock": lambda: START + 20 * DAY} | options
    return Memory(path, bank="b", policy=Plain() if policy == "plain" else policy, **options)


def answers(memory):
    return [
        [(hit.id, hit.text, round(hit.score, 4)) for hit in memory.search(question, k=5)]
        for question in QUESTIONS
    ]


@pytest.mark.parametrize("policy", NAMES)
def test_turns_stay_as_they_came_and_hits_rest_on_them(policy):
    with made(policy) as memory:
        memory.add(messages())
        memory.reflect()
        step = memory.view()
        turns = step.scan(*SOURCES)
        assert [(t.session, t.actor, t.text) for t in turns] == TALK
        derived = [i for i in step.scan() if not i.is_source]
        rests_on = step.sources(derived)
        assert all(rests_on[i.row] for i in derived)
        for question in QUESTIONS:
            for hit in memory.search(question, k=5):
                assert hit.sources
                assert all(s.text == TALK[s.meta["ref"]][2] for s in hit.sources)


@pytest.mark.parametrize("policy", NAMES)
def test_one_list_or_one_call_a_turn_is_the_same_memory(policy):
    with made(policy) as batch, made(policy) as single:
        batch.add(messages())
        for message in messages():
            single.add(message)
        assert contents(batch) == contents(single)


def contents(memory):
    """What it holds, without the order in which rows were given out."""
    return sorted(
        (i.kind, i.text, str(i.valid_from), str(i.valid_to)) for i in memory.view().scan()
    )


@pytest.mark.parametrize("policy", NAMES)
def test_a_reopened_memory_gives_the_same_answers(policy, tmp_path):
    with made(policy, tmp_path / "a.db") as memory:
        memory.add(messages())
        living = answers(memory)
        living = answers(memory)  # recalling may leave traces; compare the second round
    with made(None, tmp_path / "a.db") as again:
        assert again.policy.name == memory.policy.name
        assert [[a[:2] for a in one] for one in answers(again)] == [
            [a[:2] for a in one] for one in living
        ]


@pytest.mark.parametrize("policy", NAMES)
def test_the_same_calls_give_the_same_export(policy):
    exports = []
    for _ in range(2):
        with made(policy) as memory:
            memory.add(messages())
            memory.reflect()
            answers(memory)
            exports.append("\n".join(export_bank(memory)))
    assert exports[0] == exports[1]


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("tokens", [1, 8, 30, 90, 400])
def test_a_context_is_never_over_its_tokens(policy, tokens):
    with made(policy, tokenizer=lambda text: len(text.split())) as memory:
        memory.add(messages())
        memory.reflect()
        for question in QUESTIONS:
            packed = memory.context(question, tokens=tokens)
            assert len(packed.text.split()) == packed.tokens <= tokens


@pytest.mark.parametrize("policy", NAMES)
def test_a_budget_holds_and_what_went_is_named(policy, tmp_path):
    path = tmp_path / "small.db"
    with made(policy, path, budget="640KiB") as memory:
        forgotten = []
        for round in range(40):
            receipt = memory.add(
                [
                    {**m, "content": f"{m['content']} ({round})", "at": m["at"] + round * 10 * DAY}
                    for m in messages()
                ]
            )
            forgotten += receipt.forgotten
            used = sum(p.stat().st_size for p in tmp_path.iterdir()) + memory.index_bytes()
            assert used <= 640 * 1024
        assert all(id and why for id, why in forgotten)
        assert memory.stats()


@pytest.mark.parametrize("policy", NAMES)
def test_an_empty_memory_answers_with_nothing(policy):
    with made(policy) as memory:
        assert memory.search("anything") == []
        assert memory.context("anything").parts == ()
        assert memory.reflect().added == 0
