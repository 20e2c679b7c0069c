"""Streamlined-Inference: the same numbers in slices, spared steps, and a model left as it was."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.errors import InvalidKnob, UnsupportedModel  # noqa: E402
from memwise.train.engine.sliced import Chain, Reusable  # noqa: E402
from memwise.train.measure import peak  # noqa: E402
from memwise.train.policies.streamlined_inference import StreamlinedInference  # noqa: E402

PLAIN_STEPS = StreamlinedInference(similarity=2.0)


class ByFrame(nn.Module):
    free = (1,)

    def forward(self, x):  # (B, F, C, H, W)
        wide = torch.cat([x, -x, 2 * x, 3 * x], 2).sin()
        return wide.unflatten(2, (4, -1)).sum(2)


class ByPixel(nn.Module):
    free = (3, 4)

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


class Counted(nn.Module):
    """A deep part that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


def net() -> nn.Sequential:
    return nn.Sequential(
        Chain(ByFrame(), ByFrame(), ByPixel()),
        Reusable(Counted()),
        Chain(ByPixel(), ByPixel(), ByFrame()),
    )


def video(n_frames: int = 7):
    draws = torch.Generator().manual_seed(0)
    return torch.randn(1, n_frames, 4, 6, 5, generator=draws, dtype=torch.float64)


@pytest.mark.parametrize("n_slices", [1, 2, 7, 50])
def test_the_output_is_that_of_the_plain_model(n_slices: int) -> None:
    model, x = net(), video()
    want = model(x)
    with StreamlinedInference(n_slices, similarity=2.0)(model):
        torch.testing.assert_close(model(x), want)


def test_the_peak_is_lower() -> None:
    model, x = nn.Sequential(Chain(ByFrame(), ByFrame())), video(56)
    whole = peak(lambda: model(x)).peak_bytes
    with PLAIN_STEPS(model):
        assert peak(lambda: model(x)).peak_bytes < 0.4 * whole


def test_the_model_is_as_before_even_after_an_error() -> None:
    model = net()

    def fails() -> None:
        with StreamlinedInference()(model):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fails()
    assert all(m.n_slices is None for m in model.modules() if isinstance(m, Chain))
    assert model[1].steps is None


def test_after_two_alike_outputs_every_second_step_is_spared() -> None:
    model, x = net(), video()
    with StreamlinedInference()(model) as memory:
        for _ in range(6):
            model(x)
    assert memory.reused == [False, False, True, False, True, False]
    assert model[1].inner.calls == 4


def test_outputs_that_are_not_alike_are_all_computed() -> None:
    model, x = net(), video()
    with StreamlinedInference()(model) as memory:
        for step in range(6):
            model(x if step % 2 else -x)
    assert not any(memory.reused)


def test_a_spared_step_gives_the_output_of_the_step_before() -> None:
    part, x = Reusable(nn.Identity()), video()
    model = nn.Sequential(Chain(ByFrame()), part)
    with StreamlinedInference()(model):
        model(x)
        second = model(x * 1.001)
        assert torch.equal(model(x * 5), second)


def test_models_without_chains_and_bad_knobs_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="0 Chain"), StreamlinedInference()(nn.Identity()):
        pass
    with pytest.raises(InvalidKnob, match="n_slices=0"), StreamlinedInference(n_slices=0)(net()):
        pass
