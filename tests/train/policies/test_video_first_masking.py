"""Video-First-Masking: what is dropped is never computed, what is kept keeps its place."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.measure import saved  # noqa: E402
from memwise.train.policies.video_first_masking import VideoFirstMasking  # noqa: E402


class Encoder(nn.Module):
    """Keeps what it was given; its embedding is a mean after two layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.seen = self.places = torch.zeros(0)

    def tubelets(self, video):
        return video.flatten(2)

    def encode(self, tubelets, places):
        self.seen, self.places = tubelets, places
        return self.inner(tubelets).mean(1)


def video(n_tubelets: int = 12, width: int = 8):
    """Tubelets whose first pixel is their place."""
    x = torch.randn(3, n_tubelets, width, generator=torch.Generator().manual_seed(0))
    x[..., 0] = torch.arange(n_tubelets)
    return x


@pytest.mark.parametrize(("ratio", "n_kept"), [(0.25, 9), (0.5, 6), (0.75, 3), (0.99, 1)])
def test_the_stated_part_is_left_out(ratio: float, n_kept: int) -> None:
    encoder = Encoder()
    VideoFirstMasking(ratio)(encoder).train()(video())
    assert encoder.seen.shape == (3, n_kept, 8)


def test_kept_tubelets_come_with_their_places_in_order() -> None:
    encoder = Encoder()
    VideoFirstMasking(0.5)(encoder).train()(video())
    assert torch.equal(encoder.seen[..., 0].long(), encoder.places)
    assert (encoder.places.diff(dim=1) > 0).all()


def test_each_clip_and_each_step_has_draws_of_its_own_and_a_seed_repeats_them() -> None:
    def drawn(seed: int) -> list[list[list[int]]]:
        encoder = Encoder()
        masked = VideoFirstMasking(0.5)(encoder, seed).train()
        return [(masked(video()), encoder.places.tolist())[1] for _ in range(2)]

    first, second = drawn(0)
    assert first != second
    assert len({tuple(row) for row in first}) == 3
    assert drawn(0) == [first, second] != drawn(1)


def test_eval_and_a_ratio_of_zero_see_all_tubelets() -> None:
    encoder, x = Encoder(), video()
    masked = VideoFirstMasking()(encoder)
    want = encoder.encode(encoder.tubelets(x), None)
    assert torch.equal(masked.eval()(x), want)
    masked.train().mask_ratio = 0.0
    assert torch.equal(masked(x), want)


def test_a_quarter_of_the_tubelets_keeps_a_quarter_of_the_bytes() -> None:
    encoder, x = Encoder(64), video(256, 64)

    def held(ratio: float) -> int:
        masked = VideoFirstMasking(ratio)(encoder).train()
        return saved(masked, lambda: masked(x)).held_bytes

    assert held(0.75) < 0.3 * held(0.0)


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_ratios_outside_of_their_range_are_refused(ratio: float) -> None:
    with pytest.raises(InvalidKnob, match="mask_ratio"):
        VideoFirstMasking(ratio)(Encoder())
