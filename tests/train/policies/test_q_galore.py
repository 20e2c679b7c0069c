"""Q-GaLore: fits grow rare where the subspace stays, everything lies in few bits, runs resume."""

from __future__ import annotations

import io
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.measure import bytes_of  # noqa: E402
from memwise.train.policies.galore import GaLore  # noqa: E402
from memwise.train.policies.q_galore import QGaLore  # noqa: E402


def seeded(seed: int) -> Any:
    return torch.Generator().manual_seed(seed)


def fed(turning: bool, signs: bool = False) -> Any:
    """The state after 80 steps of gradients in one subspace, or in a new one each time."""
    weight = nn.Parameter(torch.zeros(40, 60))
    optimizer = QGaLore(rank=4, gap=2)([weight])
    fixed = torch.linalg.qr(torch.randn(40, 4, generator=seeded(0)))[0]
    for t in range(80):
        new = torch.linalg.qr(torch.randn(40, 4, generator=seeded(50 + t)))[0]
        within = new if turning else fixed
        weight.grad = within @ torch.randn(4, 60, generator=seeded(500 + t))
        if signs and t % 4 < 2:
            weight.grad = -weight.grad
        optimizer.step()
    return optimizer.state[weight]


def test_a_subspace_that_stays_is_found_more_and_more_rarely() -> None:
    """Fits at 1, 3, ..., 11, where five comparisons are there; then after 4, 8, 16, 32 steps."""
    state = fed(turning=False)
    assert (state["n_fits"], state["gap"]) == (10, 64)


def test_a_subspace_that_turns_is_found_at_every_gap() -> None:
    state = fed(turning=True)
    assert (state["n_fits"], state["gap"]) == (40, 2)
    assert abs(sum(state["alike"]) / 5) < 0.2  # chance counts as nothing


def test_signs_of_vectors_change_no_fit() -> None:
    assert fed(turning=False, signs=True)["n_fits"] == fed(turning=False)["n_fits"]


def test_each_matrix_has_its_own_gap() -> None:
    steady, turning = nn.Parameter(torch.zeros(40, 60)), nn.Parameter(torch.zeros(40, 60))
    optimizer = QGaLore(rank=4, gap=1)([steady, turning])
    fixed = torch.linalg.qr(torch.randn(40, 4, generator=seeded(0)))[0]
    for t in range(20):
        steady.grad = fixed @ torch.randn(4, 60, generator=seeded(t))
        turning.grad = torch.randn(40, 60, generator=seeded(t))
        optimizer.step()
    fits = [optimizer.state[param]["n_fits"] for param in (steady, turning)]
    assert fits[0] < 10
    assert fits[1] == 20


def stack(seed: int = 3) -> Any:
    made = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Tanh(), nn.Linear(256, 256))
    for i, param in enumerate(made.parameters()):
        param.data = torch.randn(param.shape, generator=seeded(seed + i)) * 0.06
    return made


def train(net: Any, optimizer: Any, first: int, last: int) -> float:
    for t in range(first, last):
        x = torch.randn(16, 256, generator=seeded(100 + t))
        loss = (net(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def test_weights_states_and_basis_take_under_a_quarter_of_galores() -> None:
    plain, net = stack(), stack()
    theirs, method = GaLore(rank=64)(plain.parameters()), QGaLore(rank=64)
    method.store(net)
    mine = method(net.parameters())
    train(plain, theirs, 0, 2)
    train(net, mine, 0, 2)
    assert bytes_of([net, mine.state]) < 0.25 * bytes_of([plain, theirs.state])


def test_it_learns_as_galore_does() -> None:
    plain, net, method = stack(), stack(), QGaLore(rank=64, gap=10)
    method.store(net)
    first = train(plain, optimizer := GaLore(rank=64, gap=10)(plain.parameters(), lr=0.01), 0, 1)
    theirs = train(plain, optimizer, 1, 40)
    assert theirs < 0.9 * first
    assert train(net, method(net.parameters(), lr=0.01), 0, 40) < 1.01 * theirs


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    method = QGaLore(rank=8, gap=1, patience=2)
    one, two, three = stack(), stack(), stack(9)
    for net in (one, two, three):
        method.store(net)
    straight, before, after = (
        method(n.parameters(), lr=r) for n, r in ((one, 0.01), (two, 0.01), (three, 0.5))
    )
    train(one, straight, 0, 8)
    train(two, before, 0, 5)
    file = io.BytesIO()
    torch.save([two.state_dict(), before.state_dict()], file)
    file.seek(0)
    codes, states = torch.load(file, weights_only=True)
    three.load_state_dict(codes)
    after.load_state_dict(states)
    train(three, after, 5, 8)
    left, right = one.state_dict(), three.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)
    for a, b in zip(straight.state.values(), after.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


@pytest.mark.parametrize("knobs", [{"rank": 0}, {"gap": 0}, {"patience": 0}])
def test_impossible_knobs_are_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(InvalidKnob, match="give at least 1"):
        QGaLore(**knobs)
