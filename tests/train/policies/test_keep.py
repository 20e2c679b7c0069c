"""Keep: plain autograd, counted."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwise.bench.training import ByteLM  # noqa: E402
from memwise.train.engine.activations import compress_activations  # noqa: E402
from memwise.train.measure import saved  # noqa: E402
from memwise.train.policies.keep import Keep  # noqa: E402


def test_it_holds_what_autograd_holds() -> None:
    model, ids = ByteLM(32, 2, 2, 16), torch.arange(4 * 17).view(4, 17)
    want = saved(model, lambda: model(ids)).held_bytes
    with compress_activations(model, Keep()) as tape:
        model(ids).backward()
    assert tape.peak_bytes == want
    assert tape.report().reached_ratio == 0
