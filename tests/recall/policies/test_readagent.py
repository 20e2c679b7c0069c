from memwise import Memory
from memwise.recall.engine.pages import AROUND, page_end
from memwise.recall.policies.readagent import ReadAgent

GARDEN = "The garden needs water because the roses and the tulips are dry this summer."
ENGINE = "The engine of the old car lost oil, so the mechanic changed a valve."
SMALL = ReadAgent(least_words=40, most_words=120)


def _reader(paragraphs: list[str], policy: ReadAgent = SMALL) -> Memory:
    memory = Memory(":memory:", policy=policy, embedder="none", clock=lambda: "2026-01-01")
    memory.add([f"{text} Number {i}." for i, text in enumerate(paragraphs)])
    return memory


def test_a_page_ends_where_the_topic_changes() -> None:
    texts = [GARDEN] * 5 + [ENGINE] * 8
    assert page_end(texts, 30, 110) == 5


def test_a_page_waits_until_enough_was_read_to_say_where_it_ends() -> None:
    assert page_end([GARDEN] * 3, 30, 110) is None
    assert page_end([], 30, 110) is None


def test_a_paragraph_longer_than_a_page_is_a_page() -> None:
    assert page_end(["word " * 200, *[GARDEN] * AROUND], 30, 110) == 1


def test_pages_do_not_depend_on_how_the_text_comes() -> None:
    paragraphs = [GARDEN] * 9 + [ENGINE] * 14
    with (
        _reader(paragraphs) as at_once,
        Memory(":memory:", policy=SMALL, embedder="none", clock=lambda: "2026-01-01") as slowly,
    ):
        for i, text in enumerate(paragraphs):
            slowly.add(f"{text} Number {i}.")
        cut = [[i.text for i in m.view().scan("gist")] for m in (at_once, slowly)]
    assert cut[0] == cut[1]
    assert len(cut[0]) > 1


def test_a_context_swaps_the_page_asked_for_in_and_never_exceeds_its_tokens() -> None:
    with _reader([GARDEN] * 9 + [ENGINE] * 9 + [GARDEN] * 9) as memory:
        for tokens in (20, 100, 300, 2000):
            context = memory.context("What did the mechanic do with the engine?", tokens=tokens)
            assert context.tokens <= tokens
        asked = (memory.context("What did the mechanic do?", tokens=n) for n in range(150, 500, 10))
        context = next(c for c in asked if {"raw", "gist"} <= set(c.forms))
        raw = [p.text for p, f in zip(context.parts, context.forms, strict=True) if f == "raw"]
        assert sum("engine" in text for text in raw) > len(raw) / 2


def test_without_look_ups_only_gists_are_shown() -> None:
    policy = ReadAgent(least_words=40, most_words=120, lookup_pages=0)
    with _reader([GARDEN] * 9 + [ENGINE] * 9, policy) as memory:
        assert set(memory.context("the engine", tokens=500).forms) == {"gist"}
