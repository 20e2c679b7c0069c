"""Texts that the checks of length, of repeats and of looking ahead are made of."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from memwise.bench.checks import look_ahead  # noqa: E402
from memwise.bench.length import N_BOXES, N_SIGNS, fill, show, since_shown, text  # noqa: E402

LABEL, SIGN = 14, 128


def test_a_box_is_shown_with_the_same_sign_wherever_it_is_shown() -> None:
    ids = torch.full((2, 12), ord("a"))
    box, sign = torch.tensor([0, N_BOXES - 1]), torch.tensor([3, N_SIGNS - 1])
    shown = show(ids, box, sign, (2, 10))
    assert shown[0].tolist() == [97, 97, 14, 131, *[97] * 6, 14, 131]
    assert shown[1, [2, 3, 10, 11]].tolist() == [29, 255, 29, 255]
    assert (ids == ord("a")).all()


def test_a_label_that_comes_again_has_the_sign_that_it_had() -> None:
    row = fill(torch.full((256,), ord("a")), 8, 40, torch.Generator().manual_seed(0))
    at = ((row >= LABEL) & (row < LABEL + N_BOXES)).nonzero().flatten()
    assert len(at) == 40
    pairs = {(int(row[i]), int(row[i + 1])) for i in at}
    assert len(pairs) == len({label for label, _ in pairs}) <= 8
    assert all((sign - SIGN) // N_SIGNS == label - LABEL for label, sign in pairs)


def test_the_time_since_a_sign_was_shown_counts_bytes() -> None:
    row = torch.tensor([97, 200, 97, 97, 200, 130, 200, 97, 130])
    assert since_shown(row).tolist() == [0, 0, 0, 0, 3, 0, 2, 0, 3]


@pytest.mark.data
def test_no_book_holds_a_label_or_a_sign() -> None:
    books = text(None)
    for ids in (books.train, books.valid):
        assert ids.max() < SIGN
        assert not torch.isin(ids, torch.arange(LABEL, LABEL + N_BOXES)).any()


def test_a_symbol_is_labelled_by_whether_it_comes_again_soon() -> None:
    ids, labels = look_ahead.streams(4, np.random.default_rng(0))
    for row, found in zip(ids.tolist(), labels.tolist(), strict=True):
        soon = [row[i] in row[i + 1 : i + 1 + look_ahead.AHEAD] for i in range(len(row))]
        assert found == soon
