"""Training in a projected space: gradients, steps and bytes of it."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from memwise.bench.training import ByteLM  # noqa: E402
from memwise.errors import InvalidKnob, UnsupportedModel  # noqa: E402
from memwise.train.engine.act_space import SpaceOptimizer  # noqa: E402
from memwise.train.engine.activations import compress_activations  # noqa: E402
from memwise.train.measure import bytes_of, measure, peak  # noqa: E402
from memwise.train.policies.adamw4bit import AdamW4bit  # noqa: E402
from memwise.train.policies.compact import CompAct  # noqa: E402

IDS = torch.randint(256, (3, 33), generator=torch.Generator().manual_seed(0))


def tiny(seed: int = 0, dtype: torch.dtype = torch.float64) -> ByteLM:
    return ByteLM(width=32, n_layers=2, context=32, seed=seed).to(dtype)


def backward(model: nn.Module, optimizer: SpaceOptimizer, ids: torch.Tensor = IDS) -> Any:
    with compress_activations(model, optimizer.policy) as tape:
        model(ids).backward()
    return tape.report()


def matrix(optimizer: SpaceOptimizer, weight: torch.Tensor) -> torch.Tensor:
    space = optimizer.policy.space
    plane = space.planes[weight]
    return space.projection(plane).across(torch.eye(plane.matrix.shape[1], dtype=weight.dtype))


def test_gradients_are_the_projected_ones_and_all_others_are_exact() -> None:
    model, plain = tiny(), tiny()
    optimizer = CompAct()(model)
    backward(model, optimizer)
    plain(IDS).backward()
    n_projected = 0
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        plane = optimizer.policy.space.planes.get(mine)
        if plane is None:
            torch.testing.assert_close(mine.grad, other.grad)
            continue
        n_projected += 1
        assert mine.grad is None
        wanted = other.grad @ matrix(optimizer, mine)
        torch.testing.assert_close(plane.coordinates.grad, wanted)
    assert n_projected == 2 * 4 + 1


def test_steps_are_those_of_adam_in_coordinates_carried_back() -> None:
    """Oracle: full gradients, one Adam a weight in plain float64, three projections."""
    model, plain = tiny(), tiny()
    optimizer = CompAct(gap=2, scale=0.5)(model, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    own = list(model.parameters())
    moments = dict.fromkeys(plain.parameters(), (0.0, 0.0))
    for t in range(1, 6):
        backward(model, optimizer)
        plain.zero_grad()
        plain(IDS).backward()
        for mine, other in zip(own, plain.parameters(), strict=True):
            projected = mine in optimizer.policy.space.planes
            p = matrix(optimizer, mine) if projected else None
            grad = other.grad if p is None else other.grad @ p
            m, v = moments[other]
            m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad.square()
            moments[other] = m, v
            step = (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
            with torch.no_grad():
                other.mul_(1 - 1e-2 * 0.1)
                other.sub_(1e-2 * (step if p is None else 0.5 * step @ p.T))
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.policy.space.redrawn == t // 2
    for mine, other in zip(own, plain.parameters(), strict=True):
        # States are float32.
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_what_is_kept_of_linear_inputs_is_their_share() -> None:
    model = ByteLM(width=64, n_layers=2, context=64)
    ids = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(1))
    optimizer = CompAct()(model)
    linear = backward(model, optimizer, ids).by_kind["linear"]
    assert linear.held_bytes == pytest.approx(0.25 * linear.plain_bytes, rel=0.01)


def test_states_and_gradients_of_projected_weights_are_their_share() -> None:
    model = tiny(dtype=torch.float32)
    optimizer = CompAct()(model)
    planes = optimizer.policy.space.planes
    assert bytes_of([plane.coordinates for plane in planes.values()]) == 4 * len(planes)
    backward(model, optimizer)
    optimizer.step()
    full = sum(weight.numel() * 4 for weight in planes)
    grads = [plane.coordinates.grad for plane in planes.values()]
    assert bytes_of(grads) == full // 4
    states = [optimizer.state[plane.coordinates] for plane in planes.values()]
    assert bytes_of(states) == 2 * full // 4
    assert bytes_of([plane.coordinates.data for plane in planes.values()]) == 4 * len(planes)


def test_no_step_makes_a_matrix_of_the_weights_shape() -> None:
    layer = nn.Linear(2048, 1024, bias=False)
    x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(layer)
    optimizer = CompAct(ratio=1 / 32)(model)

    def train() -> None:
        with compress_activations(model, optimizer.policy):
            model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    with measure(model, optimizer) as report:
        train()
    weight = layer.weight.numel() * 4
    assert report.peak.peak_bytes < weight / 2
    plain = torch.optim.AdamW(model.parameters(), fused=True)

    def usual() -> None:
        model(x).square().sum().backward()
        plain.step()
        plain.zero_grad()

    usual()
    assert peak(usual).peak_bytes >= weight


def test_an_input_that_attention_keeps_is_not_kept_twice_and_gives_the_same_gradient() -> None:
    found = []
    for around in ("late", "recomputed"):
        model = ByteLM(width=32, n_layers=2, context=32)
        optimizer = CompAct()(model)
        if around == "recomputed":
            for block in model.blocks:
                run = block.forward
                block.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=False)
        backward(model, optimizer)
        found.append([p.grad for p in optimizer.coordinates()])
    for late, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(late, recomputed)


def test_layers_that_share_an_input_and_a_parent_keep_one_projection() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x).tanh()
            h = h.sin() * 1.0
            return self.b(h).sum() + self.c(h).sum()

    model = Two()
    optimizer = CompAct()(model)
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    with compress_activations(model, optimizer.policy) as tape:
        model(x).backward()
    by_site = tape.report().by_site
    assert by_site["a", "project"].held_bytes == 128 * 16 * 4
    assert by_site["b", "project"].held_bytes == 128 * 16 * 4
    assert by_site["c", "project"].held_bytes == 0


def test_tied_weights_and_accumulated_gradients_add_up() -> None:
    model, plain = tiny(), tiny()
    for one in (model, plain):
        one.blocks[1].qkv.weight = one.blocks[0].qkv.weight
    optimizer = CompAct()(model)
    for part in IDS.split(1):
        backward(model, optimizer, part)
        plain(part).backward()
    weight = model.blocks[0].qkv.weight
    wanted = plain.blocks[0].qkv.weight.grad @ matrix(optimizer, weight)
    torch.testing.assert_close(optimizer.policy.space.planes[weight].coordinates.grad, wanted)


def test_a_resumed_run_equals_one_that_was_not_interrupted() -> None:
    def train(model: nn.Module, optimizer: SpaceOptimizer, n: int) -> None:
        for _ in range(n):
            backward(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()

    policy = CompAct(gap=2)
    whole = tiny()
    train(whole, policy(whole, lr=1e-2), 5)
    first = tiny()
    optimizer = policy(first, lr=1e-2)
    train(first, optimizer, 3)
    second = tiny(seed=1)
    second.load_state_dict(first.state_dict())
    again = policy(second, lr=1.0, seed=9)
    again.load_state_dict(optimizer.state_dict())
    train(second, again, 2)
    for mine, other in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_schedulers_and_coded_states_work_in_the_space() -> None:
    model = ByteLM(width=128, n_layers=1, context=32)
    optimizer = CompAct()(model, lr=1e-2, states=AdamW4bit())
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    losses = []
    for _ in range(3):
        with compress_activations(model, optimizer.policy):
            loss = model(IDS)
            loss.backward()
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert optimizer._inner.param_groups[0]["lr"] == 1e-2 / 8
    planes = optimizer.policy.space.planes.values()
    full = sum(plane.weight.numel() * 4 for plane in planes)
    assert bytes_of([optimizer.state[plane.coordinates] for plane in planes]) < 0.3 * full / 4


def test_a_backward_pass_outside_and_gradients_that_are_not_numbers_are_refused() -> None:
    model = tiny()
    optimizer = CompAct()(model)
    model(IDS).backward()
    with pytest.raises(InvalidKnob, match="compress_activations"):
        optimizer.step()
    model.zero_grad()
    backward(model, optimizer)
    optimizer.coordinates()[0].grad[0, 0] = float("nan")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InvalidKnob, match="NaN"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_knobs_and_models_that_cannot_be_are_refused() -> None:
    for knobs in ({"ratio": 1.0}, {"ratio": 0.0}, {"gap": 0}):
        with pytest.raises(InvalidKnob):
            CompAct(**knobs)
    with pytest.raises(UnsupportedModel):
        CompAct()(nn.Conv2d(3, 3, 3))
    with pytest.raises(InvalidKnob):
        CompAct()(tiny(), momentum=0.9)
