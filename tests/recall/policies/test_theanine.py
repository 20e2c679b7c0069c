from dataclasses import replace

from memwise import Memory
from memwise.recall.engine.extract import Fact, Given
from memwise.recall.engine.policy import Step
from memwise.recall.engine.rank import Query
from memwise.recall.policies.theanine import Theanine

YEARS = {
    "2019-01-01": "Ora lives in Bergen.",
    "2021-01-01": "Ora lives in Tartu.",
    "2023-01-01": "Ora lives in Kotor.",
}


def memory(order: list[str]) -> Memory:
    extraction = {
        text: [Fact("Ora", "live in", text.split()[-1].strip("."), text, 0, None, None, True)]
        for text in YEARS.values()
    }
    made = Memory(
        ":memory:", policy=Theanine(), embedder="none", llm=Given(extraction),
        clock=lambda: "2026-01-01",
    )  # fmt: skip
    for day in order:
        made.add(YEARS[day], at=day)
    return made


def neighbours(step: Step) -> dict[str, list[str]]:
    """What stands beside each memory on its line."""
    return {
        item.text: [other.text for other in Theanine()._line(step, item.row)]
        for item in step.scan("fact")
    }


def test_a_line_is_the_same_in_whatever_order_it_is_told() -> None:
    days = list(YEARS)
    lines = [
        neighbours(memory(order).view())
        for order in (days, days[::-1], [days[0], days[2], days[1]])
    ]
    assert lines[0] == lines[1] == lines[2]
    bergen, tartu, kotor = YEARS.values()
    assert lines[0][tartu] == [bergen, kotor]


def test_nothing_is_let_go_when_a_value_changes() -> None:
    step = memory(list(YEARS)).view()
    assert {item.text for item in step.scan("fact")} == set(YEARS.values())


def test_a_pack_tells_a_line_from_old_to_new() -> None:
    days = list(YEARS)
    text = memory([days[1], days[2], days[0]]).context("Ora Kotor", tokens=200).text
    places = [text.index(said) for said in YEARS.values()]
    assert places == sorted(places)


def test_a_pack_keeps_its_budget() -> None:
    packed = memory(list(YEARS)).context("Ora Kotor", tokens=25)
    assert packed.parts
    assert packed.tokens <= 25


def test_what_stands_beside_an_anchor_follows_it() -> None:
    made = memory(list(YEARS))
    step = replace(made.view(), query=Query("Kotor", k=2))
    found = made.policy.rank(step)
    assert [step.get([row])[row].text for row in found.rows] == [
        YEARS["2023-01-01"],
        YEARS["2021-01-01"],
    ]
