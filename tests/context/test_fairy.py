"""Fairy: anchors that all frames of a clip attend to."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from memwise.context.engine.anchors import (
    AnchorCache,
    FramePolicy,
    follow,
    followed,
    hold,
    recorded,
)
from memwise.context.policies.fairy import Fairy
from memwise.context.policies.lone_frames import LoneFrames
from memwise.errors import BudgetExceeded, InvalidKnob, UnsupportedModel

N_TOKENS, WIDTH, N_HEADS, N_LAYERS, N_STEPS = 5, 8, 2, 2, 3


class Denoiser(nn.Module):
    """Two transformer layers on tokens (B, T, W)."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(WIDTH, N_HEADS, WIDTH, 0.0, batch_first=True)
                for _ in range(N_LAYERS)
            )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass(frozen=True)
class AllFrames(FramePolicy):
    """Every frame is an anchor."""

    def anchors(self, n_frames: int) -> tuple[int, ...]:
        return tuple(range(n_frames))


def made(n_frames: int = 7) -> tuple[Denoiser, Tensor]:
    draws = torch.Generator().manual_seed(1)
    frames = torch.randn((n_frames, N_TOKENS, WIDTH), generator=draws, dtype=torch.float64)
    return Denoiser().double().eval(), frames


def sampler(net: nn.Module, n_steps: int = N_STEPS):
    def sample(x: Tensor) -> Tensor:
        for _ in range(n_steps):
            x = x - 0.3 * net(x)
        return x

    return sample


def naive_attention(module: nn.MultiheadAttention, x: Tensor, seen: list[Tensor]) -> Tensor:
    """Tokens (T, W) of one frame attend to tokens of frames (T, W), one number after another."""
    weight, bias = module.in_proj_weight, module.in_proj_bias
    width, each = x.shape[-1], x.shape[-1] // module.num_heads
    q = x @ weight[:width].T + bias[:width]
    k = torch.cat([y @ weight[width : 2 * width].T + bias[width : 2 * width] for y in seen])
    v = torch.cat([y @ weight[2 * width :].T + bias[2 * width :] for y in seen])
    out = torch.zeros_like(x)
    for head in range(module.num_heads):
        part = slice(head * each, (head + 1) * each)
        for i in range(len(x)):
            logits = torch.stack([q[i, part] @ k[j, part] for j in range(len(k))]) / each**0.5
            shares = logits.exp() / logits.exp().sum()
            out[i, part] = sum(shares[j] * v[j, part] for j in range(len(k)))
    return out @ module.out_proj.weight.T + module.out_proj.bias


def naive_step(net: Denoiser, anchors: list[Tensor], frames: list[Tensor]) -> list[list[Tensor]]:
    """All anchors and all other frames through the layers, one frame at a time."""
    for layer in net.layers:
        after = []
        for group, is_anchor in ((anchors, True), (frames, False)):
            news = []
            for x in group:
                seen = anchors if is_anchor else [*anchors, x]
                y = layer.norm1(x + naive_attention(layer.self_attn, x, seen))
                news.append(layer.norm2(y + layer.linear2(layer.linear1(y).relu())))
            after.append(news)
        anchors, frames = after
    return [anchors, frames]


@torch.no_grad()
def test_frames_attend_to_the_anchors_of_the_same_layer_and_step_and_to_themselves() -> None:
    net, clip = made()
    places = Fairy().anchors(len(clip))
    others = [i for i in range(len(clip)) if i not in places]
    groups = [[clip[i] for i in places], [clip[i] for i in others]]
    for _ in range(N_STEPS):
        outs = naive_step(net, *groups)
        groups = [
            [x - 0.3 * y for x, y in zip(*pair, strict=True)]
            for pair in zip(groups, outs, strict=True)
        ]
    want = torch.empty_like(clip)
    want[[*places, *others]] = torch.stack([*groups[0], *groups[1]])
    got = Fairy()(net, sampler(net), [clip])
    torch.testing.assert_close(got.frames, want)
    torch.testing.assert_close(Fairy()(net, sampler(net), [clip], n_at_once=3).frames, want)
    assert got.anchors == places


def test_any_split_of_the_other_frames_gives_the_same_bits() -> None:
    net, clip = made()
    net, clip = net.float(), clip.float()
    _, cache = hold(net, sampler(net), [clip[:2]])
    whole = follow(net, cache, sampler(net), [clip[2:]])
    for cut in (3, 5):
        ends = (clip[2:cut], clip[cut:])
        parts = [follow(net, cache, sampler(net), [some]) for some in reversed(ends)]
        assert torch.equal(torch.cat(parts[::-1]), whole)


def test_the_cache_grows_with_the_anchors_and_not_with_the_clip() -> None:
    net, clip = made(12)
    frame = 2 * N_LAYERS * N_STEPS * N_TOKENS * WIDTH * clip.element_size()
    for n_frames in (4, 12):
        assert Fairy()(net, sampler(net), [clip[:n_frames]]).cache.n_bytes == 3 * frame
        every = AllFrames()(net, sampler(net), [clip[:n_frames]])
        assert every.cache.n_bytes == n_frames * frame


def test_a_cache_of_one_head_and_one_anchor_holds_no_more_than_its_own_bytes() -> None:
    cache = AnchorCache()
    joined = torch.randn(1, 4, 3 * WIDTH)
    keys, values = joined[:, None, :, :WIDTH], joined[:, None, :, WIDTH : 2 * WIDTH]
    cache.append(0, keys, values)
    assert cache.n_bytes == 2 * 4 * WIDTH * joined.element_size()


def test_the_budget_is_kept_to_the_byte() -> None:
    net, clip = made()
    need = Fairy()(net, sampler(net), [clip]).cache.n_bytes
    assert Fairy()(net, sampler(net), [clip], budget=need).cache.n_bytes == need
    with pytest.raises(BudgetExceeded):
        Fairy()(net, sampler(net), [clip], budget=need - 1)


def test_a_frame_that_is_the_only_anchor_is_edited_as_if_alone() -> None:
    net, clip = made(1)
    one, alone = Fairy()(net, sampler(net), [clip]), LoneFrames()(net, sampler(net), [clip])
    torch.testing.assert_close(one.frames, alone.frames)


@torch.no_grad()
def test_lone_frames_are_the_model_as_it_is() -> None:
    net, clip = made()
    edited = LoneFrames()(net, sampler(net), [clip])
    torch.testing.assert_close(edited.frames, sampler(net)(clip))
    assert (edited.anchors, edited.cache.n_bytes) == ((), 0)


@torch.no_grad()
def test_the_model_is_as_before_after_an_edit_and_after_an_error() -> None:
    net, clip = made()
    before = net(clip)
    Fairy()(net, sampler(net), [clip])
    with pytest.raises(BudgetExceeded):
        Fairy()(net, sampler(net), [clip], budget=1)
    assert torch.equal(net(clip), before)
    for module in net.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks


@torch.no_grad()
def test_attention_to_something_else_than_the_frame_is_left_as_it_is() -> None:
    module = nn.MultiheadAttention(WIDTH, N_HEADS, batch_first=True).eval()
    x, words = torch.randn(2, N_TOKENS, WIDTH), torch.randn(2, 3, WIDTH)
    want = module(x, words, words)[0]
    cache = AnchorCache()
    with recorded(module, cache):
        assert torch.equal(module(x, words, words)[0], want)
    assert cache.n_layers == 0


def test_anchors_lie_evenly() -> None:
    assert Fairy().anchors(12) == (2, 6, 10)
    assert Fairy().anchors(2) == (0, 1)
    for n_frames in range(1, 30):
        for n in range(1, 6):
            places = Fairy(n).anchors(n_frames)
            assert list(places) == sorted(set(places))
            assert len(places) == min(n, n_frames)
            assert places[-1] < n_frames


@pytest.mark.parametrize("n_steps", [N_STEPS - 1, N_STEPS + 1])
def test_frames_run_as_many_steps_as_the_anchors(n_steps: int) -> None:
    net, clip = made()
    _, cache = hold(net, sampler(net), [clip[:2]])
    with pytest.raises(InvalidKnob, match="steps"):
        follow(net, cache, sampler(net, n_steps), [clip[2:]])


def test_what_cannot_work_is_said() -> None:
    net, clip = made()
    with pytest.raises(InvalidKnob, match="n_anchors=0"):
        Fairy(0)
    for policy in (Fairy(), LoneFrames()):
        with pytest.raises(InvalidKnob, match="0 frames"):
            policy(net, sampler(net), [clip[:0]])
    with pytest.raises(InvalidKnob, match="n_at_once=0"):
        LoneFrames()(net, sampler(net), [clip], n_at_once=0)
    _, cache = hold(net, sampler(net), [clip[:2]])
    with pytest.raises(InvalidKnob, match="a new one"), recorded(net, cache):
        pass
    with pytest.raises(UnsupportedModel, match="frames could share"):
        hold(nn.Linear(2, 2), sampler(net), [clip])


def test_attentions_that_frames_cannot_share_are_refused() -> None:
    for module in (
        nn.MultiheadAttention(WIDTH, N_HEADS),
        nn.MultiheadAttention(WIDTH, N_HEADS, batch_first=True, kdim=3),
        nn.MultiheadAttention(WIDTH, N_HEADS, batch_first=True, add_zero_attn=True),
        nn.MultiheadAttention(WIDTH, N_HEADS, batch_first=True, dropout=0.1),
    ):
        with pytest.raises(UnsupportedModel, match="cannot share"), recorded(module, AnchorCache()):
            pass
    module, x = nn.MultiheadAttention(WIDTH, N_HEADS, batch_first=True), torch.randn(1, 2, WIDTH)
    mask = torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(UnsupportedModel, match="mask"), recorded(module, AnchorCache()):
        module(x, x, x, attn_mask=mask)
    with pytest.raises(InvalidKnob, match="0 steps"), followed(module, AnchorCache()):
        module(x, x, x)
