"""A memory of clips: what is carried on, what is picked, and what a reader gets."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import methods_of  # noqa: E402

from memwise.catalogue import load  # noqa: E402
from memwise.context.engine.clips import ClipMemory, ClipPolicy  # noqa: E402
from memwise.context.policies.lone_clips import LoneClips  # noqa: E402
from memwise.context.policies.uniform_clips import UniformClips  # noqa: E402
from memwise.context.policies.videostreaming import VideoStreaming  # noqa: E402
from memwise.errors import BudgetExceeded, InvalidKnob  # noqa: E402
from memwise.train.measure import bytes_of  # noqa: E402

WIDTH = 16
each_policy = pytest.mark.parametrize("name", methods_of(ClipPolicy))


def vectors(*shape: int, seed: int = 0) -> Any:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


def streamer(policy: Any) -> Any:
    return policy(WIDTH, 2, 4).double().eval().requires_grad_(False)


def watched(built: Any, clips: Any, memory: Any = None) -> Any:
    for clip in clips:
        memory = built(clip, memory)
    return memory


def naive(built: Any, rows: Any) -> Any:
    """One sequence (L, D) through the causal layers, one token and one head at a time."""
    x = list(rows)
    for layer in built.layers:
        normed = [layer.norm1(token) for token in x]
        inner = layer.self_attn
        qkv = [inner.in_proj_weight @ token + inner.in_proj_bias for token in normed]
        after = []
        for i, token in enumerate(x):
            mixed = []
            for head in range(4):
                at = slice(head * 4, head * 4 + 4)
                q = qkv[i][:WIDTH][at]
                keys = torch.stack([qkv[j][WIDTH : 2 * WIDTH][at] for j in range(i + 1)])
                values = torch.stack([qkv[j][2 * WIDTH :][at] for j in range(i + 1)])
                mixed.append(torch.softmax(keys @ q / 2, 0) @ values)
            token = token + inner.out_proj(torch.cat(mixed))
            token = token + layer.linear2(torch.relu(layer.linear1(layer.norm2(token))))
            after.append(token)
        x = after
    return built.norm(torch.stack(x))


def test_a_clip_is_read_with_the_summary_of_the_one_before() -> None:
    built, clips = streamer(VideoStreaming(n_summary=3)), vectors(3, 1, 2, WIDTH)
    memory = watched(built, clips)
    carried = torch.zeros(3, WIDTH, dtype=torch.float64)
    for i, clip in enumerate(clips[:, 0]):
        parts = [
            built.carried + carried,
            clip,
            built.summary,
            (built.indicator + clip.mean(0))[None],
        ]
        states = naive(built, torch.cat(parts))
        carried, indicator = states[-4:-1], states[-1]
        torch.testing.assert_close(memory.summaries[0, i], carried, atol=1e-10, rtol=0)
        torch.testing.assert_close(
            memory.indicators[0, i], indicator / indicator.norm(), atol=1e-10, rtol=0
        )


def test_what_was_shown_first_reaches_the_last_clip_only_if_it_is_carried() -> None:
    clips = vectors(4, 1, 2, WIDTH)
    other = torch.cat([-clips[:1], clips[1:]])
    for policy, reaches in ((VideoStreaming(), True), (LoneClips(), False)):
        built = streamer(policy)
        a, b = watched(built, clips), watched(built, other)
        assert torch.equal(a.summaries[:, -1], b.summaries[:, -1]) is not reaches
        assert torch.equal(a.indicators[:, -1], b.indicators[:, -1]) is not reaches


@each_policy
def test_a_video_goes_on_from_what_is_held(name: str) -> None:
    built, clips = streamer(load(f"context/{name}")()), vectors(5, 2, 3, WIDTH)
    whole = watched(built, clips)
    resumed = watched(built, clips[2:], watched(built, clips[:2]))
    assert torch.equal(whole.summaries, resumed.summaries)
    assert torch.equal(whole.indicators, resumed.indicators)


@each_policy
def test_a_video_in_a_batch_is_as_alone(name: str) -> None:
    built, clips = streamer(load(f"context/{name}")()), vectors(5, 3, 3, WIDTH)
    question = vectors(3, 2, WIDTH, seed=1)
    many = built.ask(question, watched(built, clips))
    one = built.ask(question[:1], watched(built, clips[:, :1]))
    torch.testing.assert_close(many.tokens[:1], one.tokens, atol=1e-12, rtol=0)
    assert torch.equal(many.places[:1], one.places)


@each_policy
@pytest.mark.parametrize("n_clips", [1, 3, 20])
def test_a_reader_gets_the_same_number_of_tokens_in_the_order_of_time(
    name: str, n_clips: int
) -> None:
    built = streamer(load(f"context/{name}")(n_summary=2, n_picked=3))
    memory = watched(built, vectors(n_clips, 2, 3, WIDTH))
    picked = built.ask(vectors(2, 2, WIDTH, seed=1), memory)
    n = min(3, n_clips)
    assert picked.tokens.shape == (2, 2 * n, WIDTH)
    assert (picked.places.diff(dim=1) > 0).all()
    for row in range(2):
        expected = torch.cat([memory.summaries[row, i] for i in picked.places[row]])
        assert torch.equal(picked.tokens[row], expected)


def test_the_clips_most_like_the_question_are_picked() -> None:
    built, clips = streamer(VideoStreaming(n_picked=3)), vectors(8, 2, 3, WIDTH)
    memory, question = watched(built, clips), vectors(2, 2, WIDTH, seed=1)
    picked = built.ask(question, memory)
    for row in range(2):
        parts = [built.carried, question[row], (built.indicator + question[row].mean(0))[None]]
        asked = naive(built, torch.cat(parts))[-1]
        cosines = [float(asked @ memory.indicators[row, i] / asked.norm()) for i in range(8)]
        assert picked.alike[row].tolist() == pytest.approx(cosines, abs=1e-10)
        best = sorted(range(8), key=lambda i: -cosines[i])[:3]
        assert picked.places[row].tolist() == sorted(best)


def test_even_clips_do_not_depend_on_the_question() -> None:
    built, clips = streamer(UniformClips(n_picked=3)), vectors(12, 2, 3, WIDTH)
    places = built.ask(vectors(2, 2, WIDTH), watched(built, clips)).places
    assert places.tolist() == [[2, 6, 10]] * 2


def test_clips_are_drawn_by_their_share_in_training() -> None:
    built = streamer(VideoStreaming(n_picked=1))
    memory = watched(built, vectors(4, 1, 3, WIDTH))
    n = 4000
    many = ClipMemory(memory.summaries.expand(n, -1, -1, -1), memory.indicators.expand(n, -1, -1))
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        built.sharpness.fill_(2.0)
        picked = built.ask(vectors(1, 2, WIDTH, seed=1).expand(n, -1, -1), many, draws)
    shares = (2.0 * picked.alike[0]).softmax(0)
    found = picked.places[:, 0].bincount(minlength=4) / n
    assert (found - shares).abs().max() < 6 * math.sqrt(0.25 / n)


def test_the_answer_teaches_what_to_pick_and_values_are_as_without_training() -> None:
    built = streamer(VideoStreaming(n_picked=4))
    memory = watched(built, vectors(4, 1, 3, WIDTH))
    question = vectors(1, 2, WIDTH, seed=1).requires_grad_()
    trained = built.ask(question, memory, torch.Generator().manual_seed(0))
    torch.testing.assert_close(trained.tokens, built.ask(question, memory).tokens)
    trained.tokens.square().sum().backward()
    assert question.grad is not None
    assert question.grad.abs().sum() > 0


@each_policy
def test_policies_share_their_weights(name: str) -> None:
    mine, other = (policy()(WIDTH, 2, 4, seed=3) for policy in (load(name), VideoStreaming))
    assert {k: v.tolist() for k, v in mine.state_dict().items()} == {
        k: v.tolist() for k, v in other.state_dict().items()
    }


def test_building_draws_no_random_numbers_of_the_process() -> None:
    before = torch.random.get_rng_state()
    VideoStreaming()(WIDTH, 2, 4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_bytes_are_those_of_summaries_and_indicators() -> None:
    memory = watched(streamer(VideoStreaming()), vectors(5, 2, 3, WIDTH))
    held = {"summaries": memory.summaries, "indicators": memory.indicators}
    assert memory.n_clips == 5
    assert memory.n_bytes == bytes_of(held) == 2 * 5 * (4 + 1) * WIDTH * 8


def test_a_memory_of_other_videos_is_refused() -> None:
    clip = vectors(2, 3, WIDTH)
    memory = streamer(VideoStreaming())(clip)
    with pytest.raises(InvalidKnob, match="clip before"):
        streamer(VideoStreaming())(clip[:1], memory)
    with pytest.raises(InvalidKnob, match="clip before"):
        streamer(VideoStreaming(n_summary=3))(clip, memory)


def test_a_clip_that_does_not_fit_is_refused() -> None:
    a_clip = (4 + 1) * WIDTH * 8
    built = VideoStreaming()(WIDTH, 2, 4, budget=5 * a_clip).double()
    memory = watched(built, vectors(3, 1, 3, WIDTH))  # the third while two are held
    with pytest.raises(BudgetExceeded, match="budget"):
        built(vectors(1, 3, WIDTH), memory)


@pytest.mark.parametrize("knob", ["n_summary", "n_picked"])
def test_bad_knobs_are_refused(knob: str) -> None:
    with pytest.raises(InvalidKnob, match=knob):
        VideoStreaming(**{knob: 0})
    with pytest.raises(InvalidKnob, match="multiple"):
        VideoStreaming()(10, 1, 3)
