"""Offload: nothing stays, and everything comes back."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwise.bench.training import ByteLM  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.engine.activations import compress_activations  # noqa: E402
from memwise.train.policies.offload import Offload  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_come_back_from_disk_to_the_bit(tmp_path, dtype: torch.dtype) -> None:
    model, ids = ByteLM(64, 2, 2, 64).to(dtype), torch.arange(4 * 65).view(4, 65) % 256
    model(ids).backward()
    exact = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with compress_activations(model, Offload(folder=str(tmp_path))) as tape:
        model(ids).backward()
    assert tape.peak_bytes < 0.05 * tape.report().plain_bytes
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), exact, strict=True))


def test_what_lies_on_the_host_stays_there_and_the_report_says_so() -> None:
    model, ids = ByteLM(64, 1, 2, 64), torch.arange(4 * 65).view(4, 65) % 256
    with compress_activations(model, Offload("host")) as tape:
        model(ids).backward()
    assert tape.report().by_action.keys() == {"keep"}
    assert any(why == "is on the host" for _, why in tape.report().skipped)


def test_an_unknown_store_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="cloud"):
        Offload("cloud")
