from itertools import pairwise

import pytest

from memwise import Memory
from memwise.recall.policies.scm import SCM
from memwise.recall.policies.truncated import Truncated

TURNS = [
    "I bought a telescope in Porto last year. The weather was bad then. We had soup at night.",
    "My sister sold her telescope. She needs money for her studies. It rains here all the time.",
    "The telescope shop closes in May. They sell lenses too. My cat sleeps on the sofa all day.",
    "We talked about bread and butter. The bakery opens at six. It smells good in the morning.",
]


def _chat(policy: SCM | Truncated) -> Memory:
    memory = Memory(":memory:", policy=policy, embedder="none", clock=lambda: "2026-01-01")
    for i, text in enumerate(TURNS):
        memory.add(text, actor="ana", at=f"2025-01-0{i + 1}", session="s")
    return memory


@pytest.mark.parametrize(
    "text",
    ["Where did Ana buy it?", "who sold it", "You said that you moved.", "Remind me of it."],
)
def test_questions_and_references_need_history(text: str) -> None:
    assert SCM().needs_history(text)


@pytest.mark.parametrize("text", ["Wow, that is great!", "Hey Bo! How are you?", "What's up?"])
def test_pleasantries_do_not(text: str) -> None:
    assert not SCM().needs_history(text)


def test_chit_chat_is_answered_from_the_last_turn() -> None:
    with _chat(SCM()) as memory:
        assert [p.text for p in memory.context("Sounds lovely!").parts] == [TURNS[-1]]


def test_a_roomy_budget_keeps_everything_raw_and_a_small_one_sums_up() -> None:
    with _chat(SCM()) as memory:
        assert set(memory.context("Who has a telescope?", tokens=1000).forms) == {"raw"}
        small = memory.context("Who has a telescope?", tokens=70)
        assert "summary" in small.forms
        assert small.tokens <= 70


def test_a_pack_stands_in_the_order_of_time_within_every_budget() -> None:
    with _chat(SCM()) as memory:
        for tokens in range(1, 150, 7):
            context = memory.context("Who has a telescope?", tokens=tokens)
            assert context.tokens <= tokens
            assert all(a.at <= b.at for a, b in pairwise(context.parts))


def test_the_baseline_cuts_its_last_turn_off_and_fills_its_budget() -> None:
    with _chat(Truncated()) as memory:
        context = memory.context("Who has a telescope?", tokens=60)
        assert 58 <= context.tokens <= 60
