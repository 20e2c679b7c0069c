"""Shorter prompts: units cover the text, budgets hold, what is left is traced back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.context.conftest import methods_of  # noqa: E402

from memwise.catalogue import load  # noqa: E402
from memwise.context.engine.excerpt import (  # noqa: E402
    Prompt,
    PromptPolicy,
    Reader,
    phrases,
    segments,
    sentences,
)
from memwise.errors import InvalidKnob  # noqa: E402

TEXT = (
    'The quick fox, who was "old", jumped over the lazy dog near Oslo. It rained in\nMarch! '
    "Nobody had seen number 48213 before; everybody left. Ünïcode 日本語 and more words follow."
)
QUESTION = " Which number?"
each_policy = pytest.mark.parametrize("name", methods_of(PromptPolicy))


@pytest.fixture(scope="module")
def lm(byte_llama: Path) -> Any:
    model = transformers.LlamaForCausalLM.from_pretrained(byte_llama).double().eval()
    return model, transformers.AutoTokenizer.from_pretrained(byte_llama)


@pytest.mark.parametrize("cut", [phrases, sentences])
@pytest.mark.parametrize("text", [TEXT, "", "   ", "one", "\n\n", "a b c.", "...!?"])
def test_units_cover_the_text(cut: Any, text: str) -> None:
    assert "".join(text[a:b] for a, b in cut(text)) == text


def test_a_phrase_is_function_words_and_what_follows() -> None:
    assert [TEXT[a:b].strip() for a, b in phrases(TEXT)][:6] == [
        "The quick fox,", 'who was "old",', "jumped", "over the lazy dog", "near Oslo.",
        "It rained",
    ]  # fmt: skip


def test_sentences_end_with_their_stops() -> None:
    assert [TEXT[a:b].strip() for a, b in sentences(TEXT)] == [
        'The quick fox, who was "old", jumped over the lazy dog near Oslo.', "It rained in",
        "March!", "Nobody had seen number 48213 before; everybody left.",
        "Ünïcode 日本語 and more words follow.",
    ]  # fmt: skip


@pytest.mark.parametrize("window", [512, 32])
def test_information_is_the_models_own_surprisal(lm: Any, window: int) -> None:
    """Against a loop over tokens, each window on its own."""
    model, tokenizer = lm
    units = phrases(TEXT)
    mine = Prompt(Reader(model, tokenizer, window), TEXT, "", units).information
    encoded = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    naive = [0.0] * len(units)
    for i, (token, (first, last)) in enumerate(
        zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ):
        start = i // window * window
        if i == start:
            continue  # this tokenizer begins no text with a token
        with torch.no_grad():
            logits = model(torch.tensor([encoded.input_ids[start:i]])).logits[0, -1]
        nats = -float(logits.log_softmax(-1)[token])
        for at, (a, b) in enumerate(units):
            naive[at] += nats * max(0, min(b, last) - max(a, first)) / (last - first)
    assert mine == pytest.approx(naive, abs=1e-4)


def test_doubt_is_the_entropy_after_the_question(lm: Any) -> None:
    model, tokenizer = lm
    reader = Reader(model, tokenizer, 512)
    prompt = Prompt(reader, TEXT, QUESTION, segments(TEXT, reader, 40))
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids[40:80]
    asked = tokenizer(QUESTION, add_special_tokens=False).input_ids
    with torch.no_grad():
        p = model(torch.tensor([[*ids, *asked]])).logits[0, -1].softmax(-1)
    assert prompt.doubt(1) == pytest.approx(-float((p * p.log()).sum()), abs=1e-4)
    assert prompt.doubt(None) != pytest.approx(prompt.doubt(1), abs=1e-6)


@each_policy
@pytest.mark.parametrize("tokens", [1, 7, 50, 100, 100_000])
def test_a_budget_in_tokens_is_never_exceeded(lm: Any, name: str, tokens: int) -> None:
    model, tokenizer = lm
    excerpt = load(f"context/{name}")()(model, tokenizer).compress(TEXT, tokens, QUESTION)
    assert excerpt.n_tokens == len(tokenizer(excerpt.text).input_ids) <= tokens
    assert excerpt.text == "".join(TEXT[a:b] for a, b in excerpt.spans)
    assert [*excerpt.spans] == sorted(excerpt.spans)
    for at in range(len(excerpt.text)):
        assert TEXT[excerpt.source(at)] == excerpt.text[at]
    with pytest.raises(InvalidKnob, match="characters"):
        excerpt.source(len(excerpt.text))


@each_policy
def test_a_text_that_fits_stays_as_it_is(lm: Any, name: str) -> None:
    compressor = load(f"context/{name}")()(*lm)
    assert compressor.compress(TEXT, 10_000, QUESTION).text == TEXT
    assert compressor.compress("", 5, QUESTION).spans == ()


def test_what_is_left_is_what_surprised_most(lm: Any) -> None:
    policy = load("context/selective_context")()
    model, tokenizer = lm
    excerpt = policy(model, tokenizer).compress(TEXT, 60)
    units = phrases(TEXT)
    worth = Prompt(Reader(model, tokenizer, policy.window), TEXT, "", units).information
    kept = [any(a <= u[0] < b for a, b in excerpt.spans) for u in units]
    least = min(w for w, k in zip(worth, kept, strict=True) if k)
    first_out = sorted((w for w, k in zip(worth, kept, strict=True) if not k), reverse=True)
    assert least >= first_out[0]
    assert any(kept)


def test_the_surest_segments_and_the_head_stay(lm: Any) -> None:
    policy = load("context/xl3m")(length=20)
    model, tokenizer = lm
    excerpt = policy(model, tokenizer).compress(TEXT, 60, QUESTION)
    reader = Reader(model, tokenizer, 512)
    prompt = Prompt(reader, TEXT, QUESTION, segments(TEXT, reader, 20))
    order = sorted(range(1, len(prompt.units)), key=prompt.doubt)
    kept = sorted([0, *order[:2]])
    assert excerpt.text == "".join(TEXT[slice(*prompt.units[i])] for i in kept)


def test_what_cannot_be_done_is_refused(lm: Any) -> None:
    model, tokenizer = lm
    with pytest.raises(InvalidKnob, match="at least one"):
        load("context/selective_context")()(model, tokenizer).compress(TEXT, 0)
    with pytest.raises(InvalidKnob, match="give question="):
        load("context/xl3m")()(model, tokenizer).compress(TEXT, 5)
    for name in ("xl3m", "random_segments"):
        with pytest.raises(InvalidKnob, match="1 token or more"):
            load(f"context/{name}")(length=0)
    with pytest.raises(InvalidKnob, match="window=1"):
        Reader(model, tokenizer, 1)
