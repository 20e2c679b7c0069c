"""MEMO: exact gradients from blocks that are swapped and made again by tokens, and an arena."""

from __future__ import annotations

import sys
from itertools import permutations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from memwise.bench.training import Block, ByteLM  # noqa: E402
from memwise.errors import (  # noqa: E402
    BudgetExceeded,
    InvalidKnob,
    MissingExtra,
    UnsupportedModel,
)
from memwise.train.engine.act_swap import Traffic  # noqa: E402
from memwise.train.engine.activations import compress_activations  # noqa: E402
from memwise.train.engine.arena import (  # noqa: E402
    Request,
    arranged,
    first_fit,
    in_two_levels,
    live_bytes,
    planned,
)
from memwise.train.policies.keep import Keep  # noqa: E402
from memwise.train.policies.memo_swap import MemoSwap  # noqa: E402

SHARES = [0.0, 0.3, 0.5, 1.0, None]


def model_and_ids(n_layers: int = 4):
    return ByteLM(64, n_layers, 2, 64), torch.arange(4 * 65).view(4, 65) % 256


def gradients(model, ids, policy=None, budget=None):
    model.zero_grad()
    if policy is None:
        model(ids).sum().backward()
        tape = None
    else:
        with compress_activations(model, policy, budget) as tape:
            model(ids).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], tape


def equal(mine, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("alpha", SHARES)
def test_gradients_are_those_of_plain_autograd_to_the_bit(alpha: float | None) -> None:
    model, ids = model_and_ids()
    exact, _ = gradients(model, ids)
    mine, _ = gradients(model, ids, MemoSwap(alpha))
    assert equal(mine, exact)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_a_backward_pass_after_the_exit_gives_the_same(alpha: float) -> None:
    model, ids = model_and_ids()
    exact, _ = gradients(model, ids)
    model.zero_grad()
    with compress_activations(model, MemoSwap(alpha)):
        loss = model(ids)
    loss.backward()
    assert equal([p.grad for p in model.parameters()], exact)


def test_bytes_in_the_store_and_tokens_made_again_follow_the_share() -> None:
    model, ids = model_and_ids()
    moved, again = [], []
    for alpha in (0.0, 0.5, 1.0):
        policy = MemoSwap(alpha)
        _, tape = gradients(model, ids, policy)
        traffic: Traffic = tape.state("blocks.0")
        moved.append(traffic.moved_bytes)
        again.append(traffic.again_rows)
    assert moved[1] == (moved[0] + moved[2]) / 2
    assert moved[0] == 3 * 2 * ids[:, 1:].numel() * 64 * 4  # input and attention, last block stays
    assert again == [3 * 64, 3 * 32, 0]


def test_no_more_than_two_blocks_are_held() -> None:
    peaks = [gradients(*model_and_ids(n), MemoSwap(0.5))[1].peak_bytes for n in (3, 12)]
    assert peaks[1] < 1.05 * peaks[0]  # norms keep two numbers a token


def test_a_budget_of_what_is_held_is_kept_and_half_of_it_is_refused() -> None:
    model, ids = model_and_ids()
    exact, tape = gradients(model, ids)[0], gradients(model, ids, MemoSwap(0.5))[1]
    mine, within = gradients(model, ids, MemoSwap(0.5), tape.peak_bytes)
    assert equal(mine, exact)
    assert within.peak_bytes <= tape.peak_bytes
    with pytest.raises(BudgetExceeded):
        gradients(model, ids, MemoSwap(0.5), tape.peak_bytes // 2)


def test_the_room_of_the_store_is_kept() -> None:
    model, ids = model_and_ids()
    exact, _ = gradients(model, ids)
    mine, tape = gradients(model, ids, MemoSwap(1.0, room="1500KiB"))
    traffic: Traffic = tape.state("blocks.0")
    assert 0 < traffic.moved_bytes <= 1500 * 1024
    assert traffic.again_rows > 0
    assert equal(mine, exact)


def test_the_files_are_gone_afterwards(tmp_path) -> None:
    model, ids = model_and_ids()
    _, tape = gradients(model, ids, MemoSwap(0.5, folder=str(tmp_path)))
    assert not list(tmp_path.rglob("*.raw"))
    del tape


def test_frozen_weights_and_autocast_are_followed() -> None:
    model, ids = model_and_ids()
    for name, param in model.named_parameters():
        param.requires_grad_("qkv" in name)
    with torch.autocast("cpu", torch.bfloat16):
        exact, _ = gradients(model, ids)
        mine, _ = gradients(model, ids, MemoSwap(0.5))
    assert len(exact) == 4
    assert equal(mine, exact)


def gemma():
    """A tiny one: rotary positions, one head of keys for two of queries, a sliding window."""
    hub = pytest.importorskip("transformers")
    config = hub.Gemma3TextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=3, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=16, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    return hub.Gemma3ForCausalLM(config)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_decoder_layers_of_transformers_are_swapped(alpha: float) -> None:
    model, ids = gemma(), torch.arange(2 * 64).view(2, 64) % 99

    def found(policy):
        model.zero_grad()
        with compress_activations(model, policy) as tape:
            model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()], tape

    mine, tape = found(MemoSwap(alpha))
    assert equal(mine, found(Keep())[0])
    assert tape.state("model.layers.0").again_rows == 2 * round((1 - alpha) * 64)


class Mixing(nn.Module):
    """A block that mixes tokens without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x):
        return x + F.gelu(self.inner(x - x.mean(1, keepdim=True)))


class Dropping(nn.Module):
    """A block that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(64, 64), nn.Dropout(0.5)

    def forward(self, x):
        return x + F.gelu(self.drop(self.inner(x)))


@pytest.mark.parametrize("kind", [Mixing, Dropping])
def test_blocks_that_cannot_be_made_again_by_tokens_are_refused_but_swapped_whole(kind) -> None:
    body = nn.Sequential(kind(), kind(), kind())
    x = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0))

    def grads(policy):
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(3)
            return gradients(body, x, policy)[0]

    with pytest.raises(UnsupportedModel, match="alpha=1"):
        grads(MemoSwap(0.5))
    assert equal(grads(MemoSwap(1.0)), grads(None))


def test_other_shapes_are_refused() -> None:
    body = nn.Sequential(Mixing(), Mixing())
    with pytest.raises(UnsupportedModel, match="tokens"):
        gradients(body, torch.ones(4, 64), MemoSwap())


def test_a_tensor_changed_in_place_is_noticed() -> None:
    model, x = Block(64, 2), torch.randn(4, 64, 64)
    body = nn.Sequential(model, Block(64, 2))
    with compress_activations(body, MemoSwap(1.0)):
        middle = body[0](x)
        loss = body[1](middle).sum()
        middle.detach().zero_()
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()


def test_host_memory_is_no_place_for_a_model_that_lies_there() -> None:
    model, ids = model_and_ids()
    exact, _ = gradients(model, ids)
    mine, tape = gradients(model, ids, MemoSwap(store="host"))
    assert equal(mine, exact)
    assert any(why == "is on the host" for _, why in tape.report().skipped)


@pytest.mark.gpu
def test_gradients_are_exact_over_pinned_memory_too() -> None:
    model, ids = model_and_ids()
    model, ids = model.cuda(), ids.cuda()
    exact, _ = gradients(model, ids)
    for alpha in (0.5, 1.0):
        mine, _ = gradients(model, ids, MemoSwap(alpha, "host"))
        for a, b in zip(mine, exact, strict=True):
            torch.testing.assert_close(a, b)


def test_knobs_out_of_range_are_refused() -> None:
    for bad in ({"alpha": 1.5}, {"store": "cloud"}):
        with pytest.raises(InvalidKnob):
            MemoSwap(**bad)


# --- the arena


def lives(seed: int, n: int = 7) -> list[Request]:
    draws = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 9, (n, 3), generator=draws).tolist()
    return [Request(64 * size, start, start + length) for size, start, length in numbers]


def smallest(requests: list[Request]) -> int:
    """Over all orders, each request as low as those before it let it."""
    best = sum(one.n_bytes for one in requests)
    for order in permutations(range(len(requests))):
        offsets: dict[int, int] = {}
        for i in order:
            offsets[i] = max(
                (offsets[j] + requests[j].n_bytes for j in offsets
                 if requests[i].meets(requests[j])), default=0,
            )  # fmt: skip
        best = min(best, max(offsets[i] + requests[i].n_bytes for i in offsets))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_the_program_finds_the_smallest_arena_of_all(seed: int) -> None:
    pytest.importorskip("scipy")
    requests = lives(seed, 6)
    arena = arranged(requests)
    assert arena.proven
    assert arena.peak_bytes == smallest(requests)
    assert not arena.overlaps()


def test_the_program_beats_greedy_placement_where_that_fails() -> None:
    pytest.importorskip("scipy")
    gains = []
    for seed in range(60):
        requests = lives(seed, 9)
        greedy = min(first_fit(requests).peak_bytes, first_fit(requests, by_size=True).peak_bytes)
        arena = arranged(requests)
        assert live_bytes(requests) <= arena.peak_bytes <= greedy
        gains.append(greedy - arena.peak_bytes)
    assert max(gains) > 0


def test_two_levels_lie_on_nothing_else() -> None:
    pytest.importorskip("scipy")
    requests = [*lives(1, 8), *(Request(r.n_bytes, r.birth + 20, r.death + 20) for r in lives(1))]
    requests.append(Request(640, 5, 30))
    for arena in (
        in_two_levels(requests, [(0, 20), (20, 40)]), planned(requests, [(0, 20), (20, 40)])
    ):  # fmt: skip
        assert not arena.overlaps()
        assert arena.peak_bytes >= arena.live_bytes


def test_a_step_is_arranged_in_no_more_than_what_lives() -> None:
    pytest.importorskip("scipy")
    model, ids = model_and_ids(2)
    gradients(model, ids)
    arena = MemoSwap().arrange(model, lambda: gradients(model, ids, MemoSwap(0.5)))
    assert len(arena.requests) > 30
    assert arena.peak_bytes <= 1.02 * arena.live_bytes
    assert not arena.overlaps()


def test_without_scipy_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtra, match=r"memwise\[plan\]"):
        arranged(lives(0))
