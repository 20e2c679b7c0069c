"""AdamW4bit and CoatStates: which state lies in which codes, how many bytes that is, and why."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from memwise.codec.th import codec  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.measure import bytes_of, peak  # noqa: E402
from memwise.train.policies.adamw import AdamW  # noqa: E402
from memwise.train.policies.adamw4bit import AdamW4bit  # noqa: E402
from memwise.train.policies.coat_states import CoatStates  # noqa: E402


def stepped(policy: Any, *shapes: tuple[int, ...]) -> Any:
    draws = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=draws).requires_grad_() for shape in shapes]
    optimizer = policy(params, lr=0.01)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=draws)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("policy", "share"), [(AdamW4bit(), 0.135), (CoatStates(), 0.29)])
def test_states_take_their_share_of_the_bytes(policy: Any, share: float) -> None:
    shapes = ((512, 256), (256, 512), (8192,))
    mine, exact = stepped(policy, *shapes), stepped(AdamW(), *shapes)
    assert bytes_of(mine.state) <= share * bytes_of(exact.state)


@pytest.mark.parametrize("policy", [AdamW4bit(), CoatStates()])
def test_small_parameters_move_as_by_adamw(policy: Any) -> None:
    mine, exact = stepped(policy, (63, 64), (64,)), stepped(AdamW(), (63, 64), (64,))
    for group, other in zip(mine.param_groups, exact.param_groups, strict=True):
        assert all(map(torch.equal, group["params"], other["params"]))


def test_a_step_in_four_bits_takes_at_most_half_a_mebibyte_extra() -> None:
    optimizer = stepped(AdamW4bit(), (1024, 256), (256, 1024), (640, 1000), (1 << 18,), (1000,))
    assert peak(optimizer.step).peak_bytes <= 1 << 19


def test_no_second_moment_is_rounded_to_zero() -> None:
    optimizer = stepped(AdamW4bit(), (64, 128))
    (param,) = optimizer.param_groups[0]["params"]
    grad = torch.zeros(64, 128)
    grad[0, 0], grad[1:, 1:] = 100.0, 1e-3
    for _ in range(2):
        param.grad = grad.clone()
        optimizer.step()
    before = param.detach().clone()
    param.grad = grad.clone()
    optimizer.step()
    assert float((param.detach() - before).abs().max()) < 0.1


def test_expansion_uses_codes_that_plain_eight_bit_floats_leave_unused() -> None:
    """On second moments, whose range is narrow within a group, ten times less squared error."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, 32, generator=draws).square().mean(-1)
    wrong = [
        (codec(name).fake(x) - x).square().mean() for name in ("e4m3/expand128", "e4m3/group128")
    ]
    assert wrong[0] < wrong[1] / 4


@pytest.mark.parametrize("make", [AdamW4bit, CoatStates])
def test_impossible_knobs_are_refused(make: Any) -> None:
    with pytest.raises(InvalidKnob, match="group=0"):
        make(group=0)
