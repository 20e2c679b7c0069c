"""The room `context` side by side: who stands in which column, and what is kept of a sweep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from memwise.bench import engine, needle  # noqa: E402
from memwise.bench.context import policies  # noqa: E402
from memwise.context.policies.random import Random  # noqa: E402
from memwise.context.policies.streaming_llm import StreamingLLM  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

ITEM = needle.Item((1, 2, 3), range(1, 2), (4,), (5,), (6, 7, 8, 9, 10), (11,))
READ = needle.Reading((0.1, 0.2, 0.3, 0.4, 0.5), 1.0, 10, 20)


def test_methods_stand_in_the_columns_and_controls_apart() -> None:
    found = policies()
    assert {"streaming_llm", "keydiff", "finch", "sharp_probe"} <= set(found)
    assert not {"random", "oracle"} & set(found)
    assert {name for name, policy in found.items() if policy.window} >= {"finch", "snapkv"}


def test_a_room_that_counts_no_items_says_so() -> None:
    with pytest.raises(InvalidKnob, match="leave --items out"):
        engine.bench("train", n_items=8)
    with pytest.raises(InvalidKnob, match="2 at least"):
        engine.bench("context", n_items=1)


def test_an_item_is_read_once_for_each_policy_budget_and_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMWISE_CACHE", str(tmp_path))
    seen: list[Any] = []

    def read(lm: Any, policy: Any, item: Any, n_slots: int, known: bool, asked: str) -> Any:
        seen.append((policy, item, n_slots, known, asked))
        return READ

    monkeypatch.setattr(needle, "_read", read)
    lm: Any = None
    other = replace(ITEM, digits=(6, 7, 8, 9, 11))
    asked = [
        (StreamingLLM(), ITEM, 64, True, "ask"), (StreamingLLM(sinks=2), ITEM, 64, True, "ask"),
        (Random(), ITEM, 64, True, "ask"), (StreamingLLM(), other, 64, True, "ask"),
        (StreamingLLM(), ITEM, 65, True, "ask"), (StreamingLLM(), ITEM, 64, False, "ask"),
        (StreamingLLM(), ITEM, 64, True, "wrong"),
    ]  # fmt: skip
    for _ in range(2):
        for policy, item, n_slots, known, which in asked:
            found = needle.readings(
                lm, lambda _, policy=policy: policy, [item], n_slots, known, which
            )
            assert found == [READ]
    assert seen == asked


def test_other_code_is_read_again() -> None:
    assert needle._code(StreamingLLM()) != needle._code(Random())
    names = [b"class BudgetedCache", b"class Slots", b"def attend(", b"class Step"]
    assert all(any(name in source for source in needle._engine()) for name in names)


def test_what_is_read_in_full_is_judged_digit_by_digit() -> None:
    assert READ.is_read
    assert READ.mean == pytest.approx(0.3)
    assert not replace(READ, nll=(0.1, 0.1, 0.1, 0.1, 0.7)).is_read


@pytest.mark.model
@pytest.mark.data
def test_the_needle_stands_where_the_window_of_the_model_does_not_reach(data: Path) -> None:
    from memwise.models import local_model

    tokenizer = local_model().tokenizer
    for decoys in (False, True):
        for item in needle.items(tokenizer, data, 6, decoys):
            said = tokenizer.decode(list(item.context[item.needle.start : item.needle.stop]))
            assert tokenizer.decode(list(item.digits)) in said
            assert len(item.context) == needle.N_TOKENS
            assert len(item.context) - item.needle.stop > 512
            text = tokenizer.decode(list(item.context))
            assert ("visitors were counted" in text) == decoys
