"""SST: the parametrisation changes no output, draws follow the sizes, and a run resumes exactly."""

from __future__ import annotations

import copy
import io
import math
from itertools import permutations
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.errors import InvalidKnob, UnsupportedModel  # noqa: E402
from memwise.train.engine.spectral import SpectralLinear  # noqa: E402
from memwise.train.measure import bytes_of  # noqa: E402
from memwise.train.policies.sst import SST  # noqa: E402

SHAPES = [(24, 10), (10, 24), (16, 16)]


def seeded(seed: int) -> Any:
    return torch.Generator().manual_seed(seed)


def linear(n_out: int, n_in: int, seed: int = 0, dtype: Any = torch.float32) -> nn.Linear:
    made = nn.utils.skip_init(nn.Linear, n_in, n_out, dtype=dtype)
    for param in made.parameters():
        param.data = torch.randn(param.shape, generator=seeded(seed), dtype=dtype) / 4
    return made


class Stack(nn.Module):
    """Blocks of two maps with a norm, between an embedding and its own head."""

    def __init__(self, width: int = 12, dtype: Any = torch.float32) -> None:
        super().__init__()
        self.tok = nn.Embedding(20, width, dtype=dtype)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, dtype=dtype), linear(2 * width, width, i, dtype), nn.Tanh(),
                linear(width, 2 * width, i + 9, dtype),
            )
            for i in range(2)
        )  # fmt: skip
        self.head = linear(20, width, 5, dtype)
        self.tok.weight.data = torch.randn(20, width, generator=seeded(3), dtype=dtype)

    def forward(self, ids: Any) -> Any:
        x = self.tok(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def train(model: Any, optimizer: Any, n_steps: int, first: int = 0) -> None:
    for step in range(first, first + n_steps):
        ids = torch.randint(20, (4, 6), generator=seeded(step))
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def worst_angle(matrix: Any) -> float:
    gram = matrix.T @ matrix
    return float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_give_the_outputs_of_the_weight(shape: Any) -> None:
    origin = linear(*shape)
    x = torch.randn(3, 5, shape[1], generator=seeded(1))
    torch.testing.assert_close(SpectralLinear(origin, 3)(x), origin(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_a_naive_loop(shape: Any) -> None:
    """Sizes get the exact gradient; a direction that of a size of 1 with the sign of its own."""
    origin = linear(*shape, dtype=torch.float64)
    module = SpectralLinear(origin, 3)
    with torch.no_grad():
        module.sizes[4] *= -1
    module.select(torch.tensor([7, 0, 4]))
    x = torch.randn(6, shape[1], generator=seeded(1), dtype=torch.float64, requires_grad=True)
    y = module(x)
    pull = torch.randn(y.shape, generator=seeded(2), dtype=torch.float64)
    (y * pull).sum().backward()

    of_weight = torch.zeros(shape, dtype=torch.float64)
    for b in range(len(x)):
        for o in range(shape[0]):
            for i in range(shape[1]):
                of_weight[o, i] += pull[b, o] * x[b, i].detach()
    for m, size in enumerate(module.sizes.tolist()):
        expected = module.left[:, m] @ of_weight @ module.right[:, m]
        torch.testing.assert_close(module.sizes.grad[m], expected)
        if m in (7, 0, 4):
            at, sign = [7, 0, 4].index(m), math.copysign(1.0, size)
            left, right = (
                sign * of_weight @ module.right[:, m],
                sign * module.left[:, m] @ of_weight,
            )
            torch.testing.assert_close(module.left_trained.grad[:, at], left)
            torch.testing.assert_close(module.right_trained.grad[:, at], right)
    torch.testing.assert_close(x.grad, pull @ module.weight())


def test_a_step_is_that_of_a_naive_loop() -> None:
    """Adam on sizes and columns, with a warm-up of the columns, then columns of length 1."""
    origin = linear(6, 5, dtype=torch.float64)
    model = nn.Sequential(copy.deepcopy(origin))
    optimizer = SST(rank=2, every=100, n_warmup=4)(model, lr=0.1, seed=3)
    module: Any = model[0]
    active = module.active.tolist()
    left, sizes, right = (t.detach().clone() for t in (module.left, module.sizes, module.right))
    moments = {name: [0.0, 0.0] for name in ("sizes", "left", "right")}
    for t in range(1, 4):
        x = torch.randn(7, 5, generator=seeded(t), dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        y = x @ (left * sizes @ right.T).T + origin.bias.detach()
        if t > 1:
            y = x @ (left * sizes @ right.T).T + module.bias.detach()
        of_weight = (2 * y).T @ x
        grads = {
            "sizes": torch.stack([left[:, m] @ of_weight @ right[:, m] for m in range(5)]),
            "left": of_weight @ right[:, active], "right": of_weight.T @ left[:, active],
        }  # fmt: skip
        moved = {}
        for name, grad in grads.items():
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            moments[name] = [m, v]
            rate = 0.1 * (1.0 if name == "sizes" else t / 4)
            moved[name] = -rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        optimizer.step()
        sizes += moved["sizes"]
        for whole, name in ((left, "left"), (right, "right")):
            columns = whole[:, active] + moved[name]
            whole[:, active] = columns / columns.norm(dim=0)
        for mine, naive in ((module.left, left), (module.sizes, sizes), (module.right, right)):
            torch.testing.assert_close(mine.detach(), naive, atol=1e-5, rtol=1e-5)


def test_columns_that_are_not_drawn_stay_bit_for_bit() -> None:
    model = Stack()
    optimizer = SST(rank=3, every=50)(model, lr=1e-2)
    before = {name: (m.left.clone(), m.right.clone()) for name, m in optimizer.maps.items()}
    train(model, optimizer, 5)
    for name, module in optimizer.maps.items():
        rest = [m for m in range(len(module.sizes)) if m not in module.active.tolist()]
        for old, new in zip(before[name], (module.left, module.right), strict=True):
            assert torch.equal(old[:, rest], new[:, rest])
            assert not torch.equal(old[:, module.active], new[:, module.active])


def test_trained_columns_have_length_1() -> None:
    model = Stack()
    optimizer = SST(rank=3, every=4)(model, lr=0.05)
    train(model, optimizer, 10)
    for module in optimizer.maps.values():
        for whole in (module.left, module.right):
            torch.testing.assert_close(whole.norm(dim=0), torch.ones(len(module.sizes)))


def test_new_factors_change_no_output_and_are_orthogonal_again() -> None:
    model = Stack()
    optimizer = SST(rank=3, every=100)(model, lr=0.05)
    train(model, optimizer, 12)
    x = torch.randn(4, 12, generator=seeded(1))
    for module in optimizer.maps.values():
        assert max(worst_angle(module.left), worst_angle(module.right)) > 0.01
    for module in (m for m in optimizer.maps.values() if len(m.right) == 12):
        before = module(x)
        module.refactor()
        torch.testing.assert_close(module(x), before, atol=1e-4, rtol=0)
        assert max(worst_angle(module.left), worst_angle(module.right)) < 1e-5
        assert (module.sizes.diff() <= 0).all()
        assert (module.sizes >= 0).all()


def test_factors_are_found_anew_once_as_many_columns_were_drawn_as_there_are() -> None:
    """12 directions, 5 at a time: after three iterations of 2 steps each."""
    found = []
    model = Stack()
    optimizer = SST(rank=5, every=2)(model, lr=0.05)
    for step in range(13):
        train(model, optimizer, 1, step)
        module = optimizer.maps["blocks.0.1"]
        found.append(max(worst_angle(module.left), worst_angle(module.right)) < 1e-5)
    assert [step + 1 for step, anew in enumerate(found) if anew] == [6, 12]


def test_chances_are_half_even_and_half_by_size() -> None:
    sizes, draws = torch.tensor([6.0, 3.0, 1.0, 0.0]), seeded(0)
    chance = torch.tensor([0.425, 0.275, 0.175, 0.125])
    counts = torch.zeros(4)
    for _ in range(20_000):
        counts[SST(rank=1).draw(sizes, draws)] += 1
    torch.testing.assert_close(counts / 20_000, chance, atol=0.01, rtol=0)


def test_several_columns_are_drawn_without_replacement() -> None:
    sizes, draws = torch.tensor([6.0, 3.0, 1.0, 0.0]), seeded(1)
    chance = [0.425, 0.275, 0.175, 0.125]
    expected = torch.zeros(4)
    for first, second in permutations(range(4), 2):
        both = chance[first] * chance[second] / (1 - chance[first])
        expected[[first, second]] += both
    counts = torch.zeros(4)
    for _ in range(20_000):
        drawn = SST(rank=2).draw(sizes, draws)
        assert len(set(drawn.tolist())) == 2
        counts[drawn] += 1
    torch.testing.assert_close(counts / 20_000, expected, atol=0.015, rtol=0)


def test_a_weight_of_zeros_is_drawn_from_evenly() -> None:
    assert SST(rank=3).draw(torch.zeros(5), seeded(0)).unique().numel() == 3


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    """Stopped within an iteration, once after and once before new factors."""
    method = SST(rank=5, every=4, n_warmup=3)
    for stop in (6, 14):
        model = Stack()
        optimizer = method(model, lr=0.02, seed=7, weight_decay=0.1)
        train(model, optimizer, stop)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        train(model, optimizer, 12, stop)

        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other = Stack()
        resumed = method(other, lr=0.02, seed=7, weight_decay=0.1)
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        train(other, resumed, 12, stop)
        for name, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_states_and_gradients_exist_for_drawn_columns_alone() -> None:
    model = Stack()
    optimizer = SST(rank=3, every=100)(model)
    train(model, optimizer, 2)
    for module in optimizer.maps.values():
        n_out, n_in = len(module.left), len(module.right)
        numbers = 3 * (n_out + n_in) + len(module.sizes)
        trained = (module.sizes, module.left_trained, module.right_trained)
        assert sum(p.grad.numel() for p in trained) == numbers
        assert sum(bytes_of(optimizer.state[p]) for p in trained) == 2 * 4 * numbers


def test_states_of_columns_are_new_at_each_draw_and_those_of_sizes_only_with_the_factors() -> None:
    model = Stack()
    optimizer = SST(rank=5, every=4)(model)
    module = optimizer.maps["blocks.0.1"]
    train(model, optimizer, 4)
    assert module.left_trained not in optimizer.state
    assert optimizer.state[module.sizes]["step"] == 4
    train(model, optimizer, 8, 4)
    assert module.sizes not in optimizer.state


def test_steps_in_the_backward_pass_are_the_same() -> None:
    one, two = Stack(), Stack()
    method = SST(rank=5, every=3, n_warmup=2)
    plain, fused = method(one, lr=0.02), method(two, lr=0.02)
    train(one, plain, 7)
    with fused.step_in_backward():
        train(two, fused, 7)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_plain_maps_come_back_with_the_trained_weights() -> None:
    model = Stack()
    method = SST(rank=3, every=4)
    optimizer = method(model, lr=0.02)
    train(model, optimizer, 6)
    ids = torch.arange(20)[None]
    before = model(ids)
    method.restore(model)
    assert not any(isinstance(m, SpectralLinear) for m in model.modules())
    assert set(model.state_dict()) == set(Stack().state_dict())
    torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=0)


def test_all_else_of_the_model_is_trained_and_what_was_frozen_stays() -> None:
    model = Stack()
    model.blocks[0][1].weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = SST(rank=3)(model, lr=0.02)
    assert "blocks.0.1" not in optimizer.maps
    train(model, optimizer, 2)
    moved = {n for n, v in model.state_dict().items() if n in before and not v.equal(before[n])}
    assert {"tok.weight", "head.weight", "blocks.0.0.weight", "blocks.1.1.bias"} <= moved
    assert not moved & {"blocks.0.1.weight", "head.bias"}


def test_bf16_weights_are_trained() -> None:
    model = Stack(dtype=torch.bfloat16)
    optimizer = SST(rank=5, every=4)(model, lr=0.02)
    train(model, optimizer, 14)
    for module in optimizer.maps.values():
        assert module.left.dtype == torch.bfloat16
        assert module.left.isfinite().all()


def test_a_gradient_that_is_no_number_is_refused_before_anything_moves() -> None:
    model = Stack()
    optimizer = SST(rank=3)(model)
    train(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    optimizer.maps["blocks.0.1"].sizes.grad[0] = math.nan
    with pytest.raises(InvalidKnob, match="NaN or infinite"):
        optimizer.step()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"every": 0}, {"n_warmup": 0}])
def test_knobs_below_1_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidKnob, match="at least 1"):
        SST(**wrong)


def test_what_cannot_be_factored_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="more than rank=12"):
        SST(rank=12)(Stack())
    with pytest.raises(InvalidKnob, match="matches no trained map"):
        SST(rank=3)(Stack(), target="nothing")
    model = Stack()
    SST(rank=3)(model)
    with pytest.raises(UnsupportedModel, match="in factors already"):
        SST(rank=3)(model)
    shared = Stack()
    shared.blocks[1][1].weight = shared.blocks[0][1].weight
    with pytest.raises(UnsupportedModel, match="shares its weight"):
        SST(rank=3)(shared)
