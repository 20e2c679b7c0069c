"""Compressed weights: the same numbers to the bit, and no decoded weight that stays."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.bench.training import ByteLM  # noqa: E402
from memwise.errors import InvalidKnob, UnsupportedModel  # noqa: E402
from memwise.train.engine.activations import compress_activations  # noqa: E402
from memwise.train.engine.compressed import Compressed, Weight  # noqa: E402
from memwise.train.measure import bytes_of, peak, persistent, saved  # noqa: E402
from memwise.train.policies.adamw import AdamW  # noqa: E402
from memwise.train.policies.few_bit_backward import FewBitBackward  # noqa: E402
from memwise.train.policies.neuzip import NeuZip  # noqa: E402

KINDS = [torch.bfloat16, torch.float16, torch.float32]
DRAWS = torch.Generator()
IDS = torch.randint(256, (3, 33), generator=DRAWS.manual_seed(0))


def tiny(kind: torch.dtype = torch.bfloat16, seed: int = 0) -> ByteLM:
    return ByteLM(width=64, n_layers=2, context=32, seed=seed).to(kind)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit, NaN included."""
    bits = [x.detach().reshape(-1).view(torch.uint8) for x in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_float_there_is_comes_back_to_the_bit(kind: torch.dtype) -> None:
    if kind == torch.float32:
        every = torch.randint(-(2**31), 2**31, (64, 1024), generator=DRAWS.manual_seed(1))
        x = every.int().view(kind)
        x[0, :4] = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0])
    else:  # infinities, NaN with all payloads and denormals are among them
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(kind).view(64, 1024)
    weight = Weight(None)
    weight.store(x)
    assert same(weight.dense(), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Linear(64, 96), torch.randn(2, 5, 64)),
        lambda: (nn.Linear(64, 96, bias=False), torch.randn(5, 64)),
        lambda: (nn.Linear(64, 96), torch.randn(64)),
        lambda: (nn.Conv1d(32, 64, 3, stride=2, padding=1), torch.randn(2, 32, 9)),
        lambda: (nn.Conv2d(32, 64, 3, dilation=2, groups=2), torch.randn(2, 32, 9, 9)),
        lambda: (nn.Conv2d(32, 64, 3, bias=False), torch.randn(32, 5, 5)),
        lambda: (nn.Conv3d(16, 32, 3), torch.randn(2, 16, 4, 4, 4)),
    ],
)
def test_operations_and_gradients_are_torchs_to_the_bit(make: object, kind: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        layer, x = make()  # type: ignore[operator]
    plain, mine, x = layer.to(kind), copy.deepcopy(layer).to(kind), x.to(kind)
    compressed = Compressed(nn.Sequential(mine))
    found = []
    for one in (plain, mine):
        own = x.clone().requires_grad_()
        y = one(own)
        y.square().sum().backward()
        found.append((y, own.grad, one.weight.grad, *(p.grad for p in [one.bias] if p is not None)))
    for a, b in zip(*found, strict=True):
        assert same(a.detach(), b.detach())
    compressed.restore()
    assert same(mine.weight.data, plain.weight.data)


def test_embeddings_with_padding_and_counts_are_torchs_to_the_bit() -> None:
    layer = nn.Embedding(100, 64, padding_idx=3, scale_grad_by_freq=True)
    mine = copy.deepcopy(layer)
    Compressed(nn.Sequential(mine))
    ids = torch.tensor([[1, 3, 5], [5, 5, 99]])
    for one in (layer, mine):
        one(ids).square().sum().backward()
    assert same(layer(ids).detach(), mine(ids).detach())
    assert same(layer.weight.grad, mine.weight.grad)


@pytest.mark.parametrize("kind", KINDS[::2])
@pytest.mark.parametrize("tied", [False, True])
def test_training_is_the_plain_run_to_the_bit(kind: torch.dtype, tied: bool) -> None:
    plain, mine = tiny(kind), tiny(kind)
    if tied:
        for model in (plain, mine):
            model.head.weight = model.tok.weight
    other = AdamW()(plain.parameters(), lr=1e-2)
    compressed = NeuZip()(mine)
    optimizer = compressed.optimizer(AdamW(), lr=1e-2)
    for step in range(6):
        ids = torch.randint(256, (3, 33), generator=DRAWS.manual_seed(step))
        losses = []
        for model, each in ((plain, other), (mine, optimizer)):
            loss = model(ids)
            loss.backward()
            each.step()
            each.zero_grad()
            losses.append(loss.detach())
        assert same(*losses)
    assert all(map(same, mine.state_dict().values(), plain.state_dict().values()))
    compressed.restore()
    for a, b in zip(mine.parameters(), plain.parameters(), strict=True):
        assert same(a.data, b.data)
    assert not {"forward", "compressed_weight"} & vars(mine.head).keys()
    mine(IDS).backward()
    assert mine.head.weight.grad is not None


def test_nothing_decoded_is_kept_and_weights_cost_two_thirds() -> None:
    model = ByteLM(width=128, n_layers=3, context=32).bfloat16()
    plain_saved = saved(model, lambda: model(IDS)).held_bytes
    n_plain = bytes_of(list(model.parameters()))
    compressed = Compressed(model)
    assert saved(model, lambda: model(IDS)).held_bytes <= plain_saved
    n_now = bytes_of([list(model.parameters()), list(compressed.weights.values())])
    assert n_now < 0.7 * n_plain
    assert persistent(model).total() == n_now
    assert compressed.n_bytes < 0.7 * compressed.plain_bytes


def test_one_weight_is_decoded_at_a_time() -> None:
    layers = [nn.Linear(1024, 1024, bias=False) for _ in range(4)]
    model = nn.Sequential(*layers).bfloat16()
    x = torch.ones(1, 1024, dtype=torch.bfloat16)
    one = 1024 * 1024 * 2
    compressed = Compressed(model)
    scratch = 512 << 10
    with torch.no_grad():
        assert one <= peak(lambda: model(x)).peak_bytes < one + scratch
    taken = peak(lambda: model(x))
    assert taken.peak_bytes < one + scratch
    assert taken.kept_bytes < scratch
    # Backward: a decoded weight or two, its gradient, and the optimizer's blocks; never all.
    optimizer = compressed.optimizer(AdamW(), lr=1e-3)
    for _ in range(2):
        loss = model(x).square().sum()
        found = peak(loss.backward)
    assert found.peak_bytes < 2 * one + 3 * scratch
    assert all(p.grad is None for p in model.parameters())
    assert len(optimizer.state) == 4


def test_states_are_saved_and_loaded_decoded() -> None:
    first, second, plain = tiny(), tiny(seed=1), tiny()
    Compressed(first)
    compressed = Compressed(second)
    second.load_state_dict(first.state_dict())
    plain.load_state_dict(second.state_dict())
    assert same(plain(IDS).detach(), second(IDS).detach())
    assert same(plain(IDS).detach(), tiny()(IDS).detach())
    assert all(p.untyped_storage().nbytes() == 2 for p in compressed.weights)


def test_a_resumed_run_equals_one_that_was_not_interrupted() -> None:
    def train(model: nn.Module, n: int) -> None:
        for _ in range(n):
            model(IDS).backward()

    whole = tiny()
    Compressed(whole).optimizer(AdamW(), lr=1e-2)
    train(whole, 4)
    first, second = tiny(), tiny(seed=1)
    optimizer = Compressed(first).optimizer(AdamW(), lr=1e-2)
    train(first, 2)
    again = Compressed(second).optimizer(AdamW(), lr=1.0)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, 2)
    assert all(map(same, second.state_dict().values(), whole.state_dict().values()))


def test_activations_are_compressed_beside_the_weights() -> None:
    model, plain = tiny(torch.float32), tiny(torch.float32)
    Compressed(model)
    reports = []
    for one in (plain, model):
        with compress_activations(one, FewBitBackward()) as tape:
            one(IDS).backward()
        reports.append(tape.report().by_kind["act"].held_bytes)
    assert reports[0] == reports[1]
    assert same(model.head.weight.grad, plain.head.weight.grad)


def test_under_autocast_weights_keep_their_type() -> None:
    layer = nn.Linear(64, 96)
    Compressed(nn.Sequential(layer))
    x = torch.randn(3, 64, generator=DRAWS.manual_seed(0)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32


def test_rounded_weights_are_close_and_refuse_to_be_trained() -> None:
    plain = tiny()
    losses = []
    for bits in (None, 7, 3, 0):
        model = tiny()
        compressed = NeuZip(bits)(model)
        losses.append(float((model(IDS) - plain(IDS)).detach().abs()))
        if bits is not None:
            with pytest.raises(InvalidKnob, match="inference"):
                compressed.optimizer(AdamW())
    assert losses[0] == 0
    assert losses[2] < 0.02


def test_what_cannot_be_compressed_is_left_or_refused() -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(nn.Linear(64, 64), Own(64, 64), nn.Conv1d(64, 64, 3, padding="same"))
    compressed = Compressed(model)
    assert compressed.left == ["1.weight", "2.weight"]
    with pytest.raises(UnsupportedModel):
        Compressed(nn.Linear(3, 3))
    with pytest.raises(InvalidKnob):
        NeuZip(4)
    broken = nn.Linear(64, 64)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidKnob, match="NaN"):
        NeuZip(3)(nn.Sequential(broken))


def test_a_weight_that_the_model_reads_by_itself_is_seen_at_once_and_can_be_kept() -> None:
    model, plain = (ByteLM(width=64, n_layers=1, context=64).bfloat16() for _ in range(2))
    compressed = Compressed(model)
    assert model(IDS).isnan()
    compressed.restore()
    compressed = NeuZip()(model, keep=("pos.weight",))
    assert compressed.left == ["pos.weight"]
    assert same(model(IDS), plain(IDS))
    with pytest.raises(InvalidKnob, match="no parameter"):
        NeuZip()(plain, keep=("pos",))
