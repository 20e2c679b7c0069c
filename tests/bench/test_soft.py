"""The ground on which compressors are compared."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from memwise.bench.checks.rebuild_text import _ask, _bleu4  # noqa: E402
from memwise.bench.checks.repeat_segments import Blind, _newest  # noqa: E402
from memwise.bench.soft import byte_llama, train  # noqa: E402
from memwise.bench.training import Corpus  # noqa: E402
from memwise.context.policies.loma import LoMA  # noqa: E402


def test_the_answer_stands_in_the_text_under_the_colour_that_is_asked() -> None:
    ids = torch.full((20, 64), ord("."))
    asked = _ask(ids, np.random.default_rng(0))
    for text, line, digits in zip(asked.ids, asked.line, asked.digits, strict=True):
        said, colour = bytes(text.tolist()), bytes(line.tolist())[4:]
        assert said.endswith(bytes(line.tolist()))
        assert b"[" + colour + b"=" + bytes(digits.tolist()) + b"]" in said
        assert said.count(b"=") == 2
    assert (ids == ord(".")).all()


def test_bleu_is_one_of_the_text_itself_and_small_of_another() -> None:
    text = list(b"what is written here")
    assert _bleu4(text, text) == pytest.approx(1.0)
    assert _bleu4(list(b"zzzzzzzzzzzzzzzzzzzz"), text) < 0.05


def test_the_blind_control_repeats_the_same_whatever_came_before() -> None:
    blind = Blind(LoMA(ratio=2, memory=4)(byte_llama(0)))
    ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 3] += 1
    with torch.no_grad():
        mine, changed = blind.repeated(ids), blind.repeated(other)
    assert torch.equal(mine[:, :4], changed[:, :4])
    assert not torch.equal(mine[:, 4], changed[:, 4])
    torch.testing.assert_close(mine[:, 8:], changed[:, 8:], atol=0, rtol=0)


def test_the_newest_slots_keep_their_positions() -> None:
    cache = _newest(LoMA(ratio=2, memory=4)(byte_llama(0)), torch.arange(8)[None], 3)
    assert (cache.n_held, cache.get_seq_length()) == (3, 8)


def test_training_lowers_the_loss_and_repeats_with_its_seed() -> None:
    text = Corpus.of("a simple line of text. " * 50, "another line")
    ended = []
    for _ in range(2):
        compressor = LoMA(ratio=2, memory=2)(byte_llama(0, n_layers=1, width=32))
        ids = text.batch(0, 4, 7, 9)
        before = compressor(ids).item()
        train(compressor, text, 12, 4, 8, 0, 1.0)
        ended.append(compressor(ids).item())
    assert ended[0] == ended[1] < before
