from pathlib import Path

import pytest

from memwise.bench import data as sets
from memwise.errors import InvalidKnob


def test_a_missing_data_folder_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEMWISE_DATA", raising=False)
    with pytest.raises(InvalidKnob, match="MEMWISE_DATA"):
        sets.locomo()
    with pytest.raises(InvalidKnob, match="does not exist"):
        sets.locomo(tmp_path / "none")
    with pytest.raises(InvalidKnob, match="locomo/"):
        sets.locomo(tmp_path)


def test_the_environment_names_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMWISE_DATA", str(tmp_path))
    assert sets.data_folder() == tmp_path
    assert sets.data_folder(tmp_path / "..") == tmp_path / ".."


def test_the_shipped_chats_have_evidence_for_their_questions() -> None:
    chats = {chat.name: chat for chat in sets.memorybank()}
    assert len(chats) == 10
    assert sum(len(chat.questions) for chat in chats.values()) == 42
    for chat in chats.values():
        refs = [turn.ref for turn in chat.turns]
        assert len(refs) == len(set(refs))
        assert [turn.at for turn in chat.turns] == sorted(turn.at for turn in chat.turns)
        for question in chat.questions:
            assert question.gold.union(*question.alternatives) <= set(refs)
            assert question.gold or question.unanswerable
    (movie,) = (q for q in chats["Emily"].questions if "science fiction movie" in q.text)
    assert movie.gold == {"Emily/2023-04-30/3/query"}


def test_the_shipped_book_is_whole_and_bare() -> None:
    ((title, text),) = sets.books()
    assert title == "alice in wonderland"
    assert text.startswith("CHAPTER I.")
    assert text.endswith("THE END")
    assert "Gutenberg" not in text


def test_what_gutenberg_puts_round_a_book_goes() -> None:
    raw = "x\n*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\nText.\n*** END OF THE PROJECT\n"
    assert sets._book("69087-0", raw) == ("emma", "Text.")


@pytest.mark.parametrize(
    ("cited", "refs"),
    [
        (["D1:3", "D2:1"], ("D1:3", "D2:1")),
        (["D1:3; D2:1"], ("D1:3", "D2:1")),
        ("D2:1, D1:3", ("D2:1", "D1:3")),
        (["D9:9", "D1:3", "D1:3"], ("D1:3",)),
        ([], ()),
    ],
)
def test_citations_are_read_in_all_their_spellings(cited: object, refs: tuple[str, ...]) -> None:
    assert sets._refs(cited, {"D1:3", "D2:1"}) == refs


@pytest.mark.data
def test_locomo_loads_as_the_peers_read_it(data: Path) -> None:
    chats = {chat.name: chat for chat in sets.locomo(data)}
    questions = [question for chat in chats.values() for question in chat.questions]
    assert [name for name in chats if name in sets.TUNED] == list(chats)[:4]
    assert sum(len(chat.turns) for chat in chats.values()) == 4124
    assert sum(bool(question.gold) for question in questions) == 1345
    categories = {"multi-hop", "temporal", "open-domain", "single-hop", "adversarial"}
    assert {question.category for question in questions} == categories
    first = chats["conv-26"].turns[0]
    assert (first.ref, first.actor, first.session) == ("D1:1", "Caroline", "session_1")
    assert first.at == 1_683_554_160_000_000  # 1:56 pm on 8 May, 2023
    assert chats["conv-26"].turns[1].at - first.at == 30_000_000


@pytest.mark.data
def test_every_objection_of_the_audit_finds_its_question(data: Path) -> None:
    chats = sets.locomo(data)
    questions = [question for chat in chats for question in chat.questions]
    assert sum(question.audited_wrong for question in questions) == 110
    (painted,) = (q for q in chats[0].questions if q.text == "When did Melanie paint a sunrise?")
    assert (painted.gold, painted.audited_gold) == ({"D1:12"}, {"D1:14"})


@pytest.mark.data
def test_frozen_observations_rest_on_turns_that_exist(data: Path) -> None:
    for chat in sets.locomo(data):
        refs = {turn.ref for turn in chat.turns}
        sessions = {turn.session for turn in chat.turns}
        assert sessions <= set(chat.summaries)
        assert all(set(seen.sources) <= refs for seen in chat.observations)
        assert sum(bool(seen.sources) for seen in chat.observations) > 100


@pytest.mark.data
def test_longmemeval_is_one_haystack_in_order_of_date(data: Path) -> None:
    pool = sets.longmemeval(data)
    refs = {turn.ref for turn in pool.turns}
    assert pool.name in sets.TUNED
    assert len(refs) == len(pool.turns) == 444
    assert [turn.at for turn in pool.turns] == sorted(turn.at for turn in pool.turns)
    assert len(pool.questions) == 247
    assert sum(question.unanswerable for question in pool.questions) == 16
    assert all(question.gold <= refs for question in pool.questions)
    assert all(question.gold or question.unanswerable for question in pool.questions)


@pytest.mark.data
@pytest.mark.parametrize("unit", ["paragraph", "sentence"])
def test_hotpot_holds_its_evidence_alone_and_pooled(data: Path, unit: str) -> None:
    found = sets.hotpot(data, unit)
    pooled = {turn.ref for turn in found.pooled.turns}
    assert len(found.own) == len(found.pooled.questions) == 70
    for one in found.own:
        (question,) = one.questions
        assert question.gold
        assert question.gold <= {turn.ref for turn in one.turns} <= pooled
        assert [turn.session for turn in one.turns] == sorted(turn.session for turn in one.turns)


@pytest.mark.data
def test_the_shipped_chats_equal_the_originals(data: Path) -> None:
    assert sets.memorybank() == sets.memorybank(data)


@pytest.mark.data
def test_books_come_with_titles_and_without_wrapping(data: Path) -> None:
    shelf = dict(sets.books(data))
    assert len(shelf) == 10
    assert "the murder of roger ackroyd" in shelf
    assert shelf["alice in wonderland"] == sets.books()[0][1]
    assert not any("*** START" in text for text in shelf.values())
