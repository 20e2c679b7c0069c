"""LeMo: tokens that are left out leave no bytes; kept ones keep their order and their places."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from memwise.bench.training import ByteLM  # noqa: E402
from memwise.errors import InvalidKnob, UnsupportedModel  # noqa: E402
from memwise.train.engine.act_subset import (  # noqa: E402
    Predictor,
    Record,
    Subsets,
    TokenSubset,
    learn,
    pooled,
    recall,
    recorded,
    shares,
)
from memwise.train.engine.activations import compress_activations  # noqa: E402
from memwise.train.policies.keep import Keep  # noqa: E402
from memwise.train.policies.lemo import LeMo  # noqa: E402


def model_and_ids(n_tokens: int = 64):
    draws = torch.Generator().manual_seed(0)
    return ByteLM(64, 3, 2, n_tokens), torch.randint(0, 256, (4, n_tokens + 1), generator=draws)


def by(scores):
    """The same score of each place, whatever stands there."""
    return lambda x: scores.expand(x.shape[:2])


def with_score(scores, keep_ratio: float, blocks=("blocks.0", "blocks.1", "blocks.2")) -> Subsets:
    return Subsets({name: TokenSubset(by(scores), keep_ratio) for name in blocks})


def test_left_out_tokens_take_the_residual_path_and_others_see_only_kept_ones() -> None:
    model, ids = model_and_ids()
    x = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(1))
    block = model.blocks[0]
    body = nn.Sequential(block, nn.Identity())
    kept = torch.arange(0, 64, 2)
    scores = torch.zeros(64).index_fill(0, kept, 1.0)
    with compress_activations(body, Subsets({"0": TokenSubset(by(scores), 0.5)})):
        y = body(x)
    want = x.clone()
    want[:, kept] = block(x[:, kept])
    torch.testing.assert_close(y, want)
    del ids


def test_gradients_are_those_of_the_shorter_sequence() -> None:
    model, _ = model_and_ids()
    block, x = model.blocks[0].double(), torch.randn(2, 10, 64, dtype=torch.float64)
    body = nn.Sequential(block, nn.Identity())
    kept = torch.tensor([1, 2, 5, 9])
    scores = torch.zeros(10).index_fill(0, kept, 1.0)
    with compress_activations(body, Subsets({"0": TokenSubset(by(scores), 0.4)})):
        body(x).square().sum().backward()
    mine = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    block(x[:, kept]).square().sum().backward()
    for a, b in zip(mine, (p.grad for p in block.parameters()), strict=True):
        torch.testing.assert_close(a, b)


class Placed(nn.Module):
    """A block that takes positions and a mask, as those of transformers do, and gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, attention_mask=None, places=None):
        mixed = F.scaled_dot_product_attention(
            x[:, None], x[:, None], x[:, None], attn_mask=attention_mask
        )[:, 0]
        return x + self.inner(mixed) * places[0][..., None], "more"


def test_positions_and_masks_are_cut_alike() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 8, generator=draws)
    mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(1, 1, 6, 6)
    places = (torch.arange(6.0)[None],)
    kept = torch.tensor([0, 3, 5])
    body, scores = Placed(), torch.zeros(6).index_fill(0, kept, 1.0)
    with compress_activations(body, Subsets({"": TokenSubset(by(scores), 0.5)})):
        y, more = body(x, attention_mask=mask, places=places)
    want = x.clone()
    cut = mask[:, :, kept][..., kept]
    want[:, kept] = body(x[:, kept], cut, (places[0][:, kept],))[0]
    torch.testing.assert_close(y, want)
    assert more == "more"


def test_decoder_layers_of_transformers_run_on_fewer_tokens() -> None:
    hub = pytest.importorskip("transformers")
    config = hub.Gemma3TextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=16, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    model, ids = hub.Gemma3ForCausalLM(config), torch.arange(2 * 64).view(2, 64) % 99
    batch = {"input_ids": ids, "labels": ids}
    chosen = LeMo(n_steps=5)(model, [batch])
    held = []
    for policy in (chosen, Keep()):
        with compress_activations(model, policy) as tape:
            model(**batch).loss.backward()
        held.append(tape.peak_bytes)
    assert held[0] < 0.65 * held[1]


def test_half_of_the_tokens_hold_about_half_of_the_bytes() -> None:
    model, ids = model_and_ids(256)
    held = []
    for keep_ratio in (0.5, 1.0):
        with compress_activations(model, with_score(torch.arange(256.0), keep_ratio)) as tape:
            model(ids).backward()
        held.append(tape.peak_bytes)
    assert held[0] < 0.6 * held[1]


def test_without_gradients_all_tokens_go_everywhere_and_on_exit_too() -> None:
    model, ids = model_and_ids()
    want = model(ids)
    with compress_activations(model, with_score(torch.arange(64.0), 0.25)), torch.no_grad():
        assert torch.equal(model(ids), want)
    assert torch.equal(model(ids), want)


def test_a_share_of_one_changes_nothing() -> None:
    model, ids = model_and_ids()
    want = model(ids)
    with compress_activations(model, LeMo(keep_ratio=1.0, n_steps=1)(model, [ids])):
        assert torch.equal(model(ids), want)


def test_recorded_attention_is_what_each_token_receives() -> None:
    model, ids = model_and_ids(16)
    found = recorded(model, ["blocks.1"], ids)["blocks.1"]
    block = model.blocks[1]
    b, t, d = found.x.shape
    heads = block.qkv(block.norm1(found.x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
    want = torch.zeros(b, t)
    for i in range(t):  # each query in turn
        scores = torch.einsum("bhd,bhsd->bhs", heads[0][:, :, i], heads[1][:, :, : i + 1])
        want[:, : i + 1] += (scores / (d // 2) ** 0.5).softmax(-1).sum(1)
    torch.testing.assert_close(found.received, want / (2 * t))


def test_a_predictor_finds_tokens_that_are_marked() -> None:
    draws = torch.Generator().manual_seed(0)
    records = []
    for _ in range(6):
        x = torch.randn(4, 96, 16, generator=draws)
        marked = torch.rand(4, 12, generator=draws).argsort(1) < 4
        loud = marked.repeat_interleave(8, 1)
        x[..., 0] += 4 * loud
        later = torch.ones(96, 96, dtype=torch.bool).triu(1)
        scores = (4.0 * loud)[:, None].expand(4, 96, 96).masked_fill(later, float("-inf"))
        received = scores.softmax(-1).sum(1)
        records.append(Record(x, received / received.sum(1, keepdim=True)))
    predictor = Predictor(16, 4, 8, draws)
    before = recall(predictor, records[-1], 1 / 3)
    learn(predictor, records[:-1], 150)
    assert recall(predictor, records[-1], 1 / 3) > max(0.85, before)


def test_blocks_with_wide_attention_keep_more_tokens() -> None:
    x = torch.zeros(1, 64, 4)
    wide, narrow = torch.ones(1, 64), torch.ones(1, 64)
    narrow[:, :8] = 100
    records = {n: [Record(x, r / r.sum())] for n, r in {"wide": wide, "narrow": narrow}.items()}
    found = shares(records, 0.5, pool=4)
    assert found["wide"] > 0.7
    assert found["narrow"] < 0.3
    assert 0.4 <= sum(found.values()) / 2 <= 0.5
    assert shares(records, 1.0, pool=4) == {"wide": 1.0, "narrow": 1.0}


def test_a_short_last_group_counts_its_own_tokens() -> None:
    x = torch.arange(10.0)[None]
    assert pooled(x, 4).tolist() == [[6.0, 22.0, 17.0]]
    predictor = Predictor(5, 2, 4, torch.Generator().manual_seed(0))
    assert predictor(torch.ones(2, 10, 5)).shape == (2, 10)


def test_models_whose_attention_cannot_be_seen_are_refused() -> None:
    plain = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(2)))
    with pytest.raises(UnsupportedModel, match="scaled_dot_product_attention"):
        LeMo()(plain, [torch.ones(2, 4, 8)])
    with pytest.raises(UnsupportedModel, match="no list of blocks"):
        LeMo()(nn.Linear(8, 8), [torch.ones(2, 4, 8)])


def test_knobs_out_of_range_and_no_batches_are_refused() -> None:
    for bad in ({"keep_ratio": 0.0}, {"keep_ratio": 1.5}, {"pool": 0}, {"rank": 0}, {"n_steps": 0}):
        with pytest.raises(InvalidKnob):
            LeMo(**bad)
    with pytest.raises(InvalidKnob, match="batches"):
        LeMo()(model_and_ids()[0], [])
