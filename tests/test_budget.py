import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwise.budget import Budget, Ledger, readable
from memwise.errors import BudgetExceeded, InvalidKnob

TIERS = st.sampled_from(["device", "host", "disk"])
KINDS = st.sampled_from(["text", "codes", "index"])
SIZES = st.integers(0, 1000)


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [
        ("64MiB", 64 << 20),
        ("64 MiB", 64 << 20),
        ("64mib", 64 << 20),
        ("64MB", 64_000_000),
        ("1.5GiB", 3 << 29),
        ("0.1kB", 100),
        ("2TiB", 2 << 40),
        ("512", 512),
        ("1_000 B", 1000),
        ("0", 0),
        (1 << 20, 1 << 20),
        (64e6, 64_000_000),
        (Budget("1KiB"), 1024),
    ],
)
def test_a_size_is_read_as_its_bytes(size: str | int | float, n_bytes: int) -> None:
    assert Budget(size) == n_bytes
    assert Budget(size).bytes == n_bytes


@pytest.mark.parametrize(
    "size", ["", "64M", "64 MBit", "-1", "MiB", "1e6", "1,5MiB", "inf", -1, 1.5, float("nan"), True]
)
def test_a_size_that_is_none_is_refused_with_its_value(size: str | int | float) -> None:
    with pytest.raises(InvalidKnob, match=r"^budget ") as problem:
        Budget(size)
    assert repr(size) in str(problem.value)


def test_a_budget_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="None"):
        Budget(None)  # type: ignore[arg-type]


def test_a_budget_acts_as_its_number_of_bytes() -> None:
    budget = Budget("64MiB")
    assert budget - 1 == (64 << 20) - 1
    assert json.dumps({"budget": budget}) == '{"budget": 67108864}'
    assert {budget: "a"}[64 << 20] == "a"
    assert f"{budget} {budget:,}" == "64 MiB 67,108,864"
    assert pickle.loads(pickle.dumps(budget)) == budget


@given(st.integers(0, 1 << 45))
@settings(derandomize=True, deadline=None)
def test_the_repr_of_a_budget_builds_it_again(n_bytes: int) -> None:
    again = eval(repr(Budget(n_bytes)))
    assert again == n_bytes
    assert type(again) is Budget


def test_sizes_read_well() -> None:
    assert [readable(n) for n in (0, 1023, 1024, 1536, 64 << 20)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 KiB",
        "64 MiB",
    ]


def test_a_ledger_keeps_lines_totals_and_peaks() -> None:
    ledger = Ledger()
    ledger.add("disk", "text", 100)
    ledger.add("disk", "text", 50)
    ledger.add("host", "codes", 30)
    ledger.release("disk", "text", 120)
    ledger.set("host", "codes", 10)

    assert ledger["disk", "text"] == 30
    assert ledger.total() == 40
    assert ledger.total("host") == 10
    assert ledger.peak() == 180
    assert ledger.peak("host") == 30
    assert list(ledger) == [("disk", "text", 30, 150), ("host", "codes", 10, 30)]


def test_a_change_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    ledger = Ledger("1KiB", knob="pool")
    ledger.add("disk", "text", 1000)
    with pytest.raises(BudgetExceeded) as problem:
        ledger.add("host", "codes", 25)

    message = str(problem.value)
    assert "25 B more for host/codes" in message
    assert "1 KiB" in message
    assert "1000 B are in use" in message
    assert "pool= to at least 1025 bytes" in message
    assert ledger.total() == ledger.peak() == 1000
    ledger.add("host", "codes", 24)
    assert ledger.left("disk") == 0


def test_tiers_may_have_budgets_of_their_own() -> None:
    ledger = Ledger({"device": 100, "disk": 1000})
    ledger.add("disk", "text", 900)
    ledger.add("host", "codes", 10**9)
    with pytest.raises(BudgetExceeded, match="tier 'device'"):
        ledger.add("device", "cache", 101)
    assert ledger.left("device") == 100
    assert ledger.left("host") is None


def test_kinds_outside_the_budget_are_listed_but_not_charged() -> None:
    ledger = Ledger(100, outside=["weights"])
    ledger.add("device", "weights", 10**6)
    ledger.add("device", "cache", 100)
    assert ledger.total() == 100
    assert ledger["device", "weights"] == 10**6
    assert "weights (not charged)" in str(ledger)


def test_shrinking_is_always_allowed() -> None:
    ledger = Ledger(100)
    ledger.add("disk", "text", 100)
    ledger.set("disk", "text", 99)
    ledger.release("disk", "text")
    assert ledger.total() == 0


def test_more_than_was_added_cannot_be_released() -> None:
    ledger = Ledger()
    ledger.add("disk", "text", 10)
    with pytest.raises(InvalidKnob, match="disk/text would hold -1 bytes"):
        ledger.release("disk", "text", 11)
    assert ledger["disk", "text"] == 10


def test_a_ledger_prints_as_an_aligned_table() -> None:
    ledger = Ledger("64MiB")
    ledger.add("disk", "text", 3 << 20)
    ledger.add("host", "codes", 48)
    assert str(ledger).splitlines() == [
        "tier  kind       now   peak",
        "disk  text     3 MiB  3 MiB",
        "host  codes     48 B   48 B",
        "all            3 MiB  3 MiB",
        "all   budget  64 MiB",
    ]


@given(st.lists(st.tuples(TIERS, KINDS, SIZES)), st.integers(0, 2000))
@settings(derandomize=True, deadline=None)
def test_no_sequence_of_changes_leaves_the_budget(
    changes: list[tuple[str, str, int]], budget: int
) -> None:
    ledger = Ledger(budget)
    highest = 0
    for tier, kind, n_bytes in changes:
        try:
            ledger.set(tier, kind, n_bytes)
        except BudgetExceeded:
            assert ledger.total() - ledger[tier, kind] + n_bytes > budget
        highest = max(highest, ledger.total())
    assert ledger.peak() == highest <= budget
