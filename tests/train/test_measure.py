import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from memwise.budget import Ledger  # noqa: E402
from memwise.errors import BudgetExceeded, InvalidKnob, MemwiseError  # noqa: E402
from memwise.train import measure as rulers  # noqa: E402
from memwise.train.measure import (  # noqa: E402
    OUTSIDE,
    Peak,
    bytes_of,
    measure,
    peak,
    persistent,
    saved,
)

HERE = Path(__file__).parent
MIB = 1 << 20
WORKLOADS = (
    "transformer",
    "checkpointed",
    "custom Function",
    "int8",
    "convnet",
    "LM head",
    "conv3d",
    "sort",
    "optimizer step",
    "whole step",
)


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> Iterator[None]:
    # Each measurement collects garbage first: leave the imported libraries out of that.
    gc.freeze()
    yield
    gc.unfreeze()


def block(n_mib: int) -> Tensor:
    return torch.empty(n_mib * MIB, dtype=torch.uint8)


# --- against the heap itself


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Bytes of each workload by the heap and by memwise, warmed up, in one other process."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux" or not _is_glibc():
        pytest.skip("needs a C compiler (cc) and glibc to stand before malloc")
    library = tmp_path_factory.mktemp("heap") / "malloc_peak.so"
    source = HERE / "malloc_peak.c"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    done = subprocess.run(
        [sys.executable, "-W", "error", HERE / "heap_truth.py", library],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _is_glibc() -> bool:
    return "CS_GNU_LIBC_VERSION" in os.confstr_names


@pytest.mark.parametrize("ruler", ["peak", "measure"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_peak_is_the_peak_of_the_heap(
    truth: dict[str, dict[str, int]], workload: str, ruler: str
) -> None:
    row = truth[workload]
    assert row[ruler] == pytest.approx(row["heap"], rel=0.02)


def test_the_workspace_of_lapack_is_missed(truth: dict[str, dict[str, int]]) -> None:
    assert truth["svd"]["peak"] < 0.75 * truth["svd"]["heap"]


# --- the highest moment


def test_a_peak_is_the_highest_moment_and_not_the_sum() -> None:
    def work() -> None:
        a = block(4)
        b = block(8)
        del a
        block(2)
        del b

    assert peak(work) == Peak(12 * MIB, 0, 8 * MIB)


def test_what_the_work_returns_is_kept() -> None:
    assert peak(lambda: block(3)) == Peak(3 * MIB, 3 * MIB, 3 * MIB)


def test_older_memory_that_is_freed_lowers_the_level() -> None:
    older = [block(8)]

    def work() -> Tensor:
        older.clear()
        return block(5)

    assert peak(work) == Peak(0, -3 * MIB, 5 * MIB)


def test_older_memory_of_an_earlier_measurement_is_freed_once() -> None:
    older: list[Tensor] = []
    peak(lambda: older.append(block(8)))
    assert peak(older.clear) == Peak(0, -8 * MIB, 0)


def test_a_gradient_that_python_never_saw_is_freed_too() -> None:
    layer = nn.Linear(512, 512, bias=False)
    layer(torch.ones(1, 512)).sum().backward()
    assert peak(layer.zero_grad) == Peak(0, -MIB, 0)


def test_a_measurement_inside_another_is_refused_and_the_outer_one_goes_on() -> None:
    def work() -> None:
        with pytest.raises(MemwiseError, match="already running"):
            peak(lambda: None)
        block(2)

    assert peak(work).peak_bytes == 2 * MIB


def test_a_profiler_around_or_inside_is_refused() -> None:
    def profiler() -> Any:
        return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    with profiler(), pytest.raises(MemwiseError, match="already running"):
        peak(lambda: None)
    with pytest.raises(MemwiseError, match="took its events"):
        peak(lambda: profiler().__enter__().__exit__(None, None, None))
    assert peak(lambda: block(1)).peak_bytes == MIB


def test_after_an_error_one_can_measure_again() -> None:
    def broken() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        peak(broken)
    with pytest.raises(ValueError, match="broken"), measure(nn.Identity()):
        broken()
    assert peak(lambda: block(1)).peak_bytes == MIB


def test_a_device_that_cannot_be_measured_is_named() -> None:
    with pytest.raises(InvalidKnob, match="'meta' cannot be measured"):
        peak(lambda: None, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidKnob, match="'cuda' is not here"):
            peak(lambda: None, device="cuda")


def test_the_counters_of_cuda_are_read_and_reset_at_each_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    level, top = [100], [100]

    def holds(change: int) -> None:
        level[0] += change
        top[0] = max(top[0], level[0])

    def reset(device: object) -> None:
        top[0] = level[0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: level[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: top[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)

    holds(900)
    holds(-900)  # before the measurement: not part of it
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with measure(model, optimizer, device="cuda") as report:
        holds(50)
        holds(-20)
        optimizer.register_step_pre_hook(lambda *_: holds(15))
        optimizer.step()
        holds(-40)
    assert report.peak == Peak(50, 5, None)
    assert report.optimizer_peak == Peak(15, 15, None)


@pytest.mark.gpu
def test_a_peak_on_cuda_is_that_of_its_allocator() -> None:
    def work() -> Tensor:
        a = torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
        torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
        return a

    assert peak(work, device="cuda") == Peak(12 * MIB, 4 * MIB, None)


# --- what is held for the backward pass


class Attention(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.up, self.act, self.down = nn.Linear(width, 256), nn.GELU(), nn.Linear(256, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + (q @ k.mT).softmax(-1) @ v
        return x + self.down(self.act(self.up(x)))


def transformer() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(Attention(), Attention())
    x = torch.ones(4, 32, 64)
    return model, lambda: model(x).sum()


def test_saved_bytes_are_what_the_forward_pass_leaves_behind() -> None:
    model, forward = transformer()
    kept = peak(forward).kept_bytes - 4  # the loss, which the sum does not save
    batch = 4 * 32 * 64 * 4  # held by the caller before, so not above the start
    assert saved(model, forward).held_bytes == pytest.approx(kept + batch, rel=0.01)


def test_counting_saved_tensors_without_their_storages_counts_too_much() -> None:
    model, forward = transformer()
    naive = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal naive
        naive += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    assert naive > 1.25 * saved(model, forward).held_bytes


def test_sites_name_the_module_and_the_operation() -> None:
    model, forward = transformer()
    rows = {(site.module, site.op): site for site in saved(model, forward).sites}
    assert rows["0.act", "gelu"].held_bytes == 4 * 32 * 256 * 4
    assert rows["0.down", "linear"].held_bytes == 4 * 32 * 256 * 4
    assert rows["1", "softmax"].held_bytes == 4 * 32 * 32 * 4
    assert rows["1", "matmul"].shared_bytes >= 4 * 32 * 32 * 4  # softmax holds the weights

    found = saved(model, forward)
    assert sum(found.by_op().values()) == sum(found.by_module().values()) == found.held_bytes
    assert "0.act" in str(found)


def test_saved_bytes_are_those_before_the_backward_pass_releases_them() -> None:
    model, forward = transformer()
    assert saved(model, lambda: forward().backward()) == saved(model, forward)


def test_several_forward_passes_count_at_their_highest_moment() -> None:
    model, forward = transformer()

    def accumulate() -> None:
        for _ in range(3):
            forward().backward()

    assert saved(model, accumulate) == saved(model, forward)


def test_views_of_parameters_are_not_counted() -> None:
    layer = nn.Linear(64, 64, bias=False)
    x = torch.ones(2, 64, requires_grad=True)
    assert saved(layer, lambda: x @ layer.weight.t()).held_bytes == x.nbytes


class Hiding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.hidden = x * 2
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.hidden


def test_a_tensor_on_the_context_is_seen_only_by_the_level() -> None:
    x = torch.ones(MIB, requires_grad=True)
    found = saved(nn.Identity(), lambda: Hiding.apply(x))
    assert [(site.module, site.op) for site in found.sites] == [(OUTSIDE, "Hiding")]
    assert found.held_bytes == x.nbytes
    assert peak(lambda: Hiding.apply(x)).kept_bytes == x.nbytes + 4


def test_recomputation_is_seen_to_save_its_input_alone() -> None:
    model, _ = transformer()
    x = torch.ones(4, 32, 64, requires_grad=True)

    def forward() -> Tensor:
        return checkpoint(model, x, use_reentrant=False).sum()

    assert saved(model, forward).held_bytes == x.nbytes
    assert saved(model, lambda: forward().backward()).held_bytes == x.nbytes


def test_watching_leaves_hooks_and_results_as_they_were() -> None:
    model, forward = transformer()
    before = forward()
    assert torch.equal(saved_result(model, forward), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def saved_result(model: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    results: list[Tensor] = []
    saved(model, lambda: results.append(forward()))
    return results[0]


# --- what stays


def trained(optimizer: str = "AdamW") -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64, affine=False))
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3)
    model(torch.eye(64)).square().sum().backward()
    optim.step()
    return model, optim


def rows(ledger: Ledger) -> dict[str, int]:
    return {f"{tier} {kind}": now for tier, kind, now, _ in ledger if now}


def test_what_stays_is_counted_by_kind() -> None:
    weight = 64 * 64 * 4
    assert rows(persistent(*trained())) == {
        "device parameters": weight,
        "device buffers": 2 * 64 * 4 + 8,
        "device gradients": weight,
        "device optimizer states": 2 * weight + 4,
    }


def test_states_are_found_however_they_nest() -> None:
    model, optim = trained()
    before = persistent(model, optim)["device", "optimizer states"]

    @dataclass(frozen=True, slots=True)
    class Factors:
        left: Tensor
        rest: list[dict[str, object]]

    weight = next(model.parameters())
    arrays = [{"right": torch.ones(20), "codes": np.zeros(7, np.int8), "packed": b"12345"}]
    optim.state[weight]["low_rank"] = Factors(torch.ones(10), [*arrays, {"again": weight}])
    after = persistent(model, optim)["device", "optimizer states"]
    assert after - before == 40 + 80 + 7 + 5


class Halves(Tensor):
    """A tensor of no storage of its own, as quantized states are."""

    @staticmethod
    def __new__(cls, low: Tensor, high: Tensor) -> "Halves":
        made: Halves = Tensor._make_wrapper_subclass(cls, (4 * len(low),), dtype=torch.float32)
        made.low, made.high = low, high
        return made

    low: Tensor
    high: Tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["low", "high"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def test_a_tensor_subclass_counts_with_its_inner_tensors() -> None:
    halves = Halves(torch.ones(8, dtype=torch.uint8), torch.ones(3))
    assert bytes_of(halves) == 8 + 12
    assert bytes_of([halves, halves.high[1:]]) == 8 + 12


def test_sparse_gradients_count_with_their_indices() -> None:
    table = nn.Embedding(100, 8, sparse=True)
    table(torch.tensor([1, 5])).sum().backward()
    assert persistent(table)["device", "gradients"] == 2 * 8 * 4 + 2 * 8


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert rows(persistent(model)) == {"device parameters": 256}


def test_what_a_module_keeps_beside_its_parameters_is_listed() -> None:
    model = nn.Linear(4, 4, bias=False)
    model.packed = [torch.ones(10), bytes(6)]
    assert rows(persistent(model)) == {"device parameters": 64, "device attributes": 46}


def test_files_and_other_devices_have_tiers_of_their_own(tmp_path: Path) -> None:
    mapped = torch.from_file(str(tmp_path / "a"), shared=True, size=4)
    array = np.memmap(tmp_path / "b", dtype=np.int8, mode="w+", shape=(5,))
    model = nn.Linear(4, 4, bias=False)
    model.kept = [mapped, array[1:], torch.ones(2), torch.empty(9, device="meta")]
    assert rows(persistent(model, device="cuda")) == {
        "host parameters": 64,
        "host attributes": 8,
        "disk attributes": 16 + 5,
    }


# --- all of it


def test_a_report_holds_the_whole_step() -> None:
    model, optim = trained("SGD")
    weight = 64 * 64 * 4

    def step() -> None:
        optim.zero_grad()
        model(torch.eye(64)).square().sum().backward()
        optim.step()

    with measure(model, optim) as report:
        step()
    assert report.peak == peak(step)
    assert report.optimizer_peak == peak(optim.step)
    assert report.peak.kept_bytes == 0
    assert report.saved.by_op()["linear"] == weight  # the batch
    assert report.ledger["device", "gradients"] == weight

    stays = persistent(model, optim).total()
    assert report.ledger.total() == stays
    assert report.ledger.peak("device") == stays + report.peak.peak_bytes
    for words in ("optimizer step", "linear", "transient", "parameters"):
        assert words in str(report)


def test_gradients_that_are_gone_at_the_end_are_in_the_ledger() -> None:
    model, optim = trained("SGD")
    with measure(model, optim) as report:
        model(torch.eye(64)).square().sum().backward()
        optim.step()
        optim.zero_grad()
    lines = {kind: (now, top) for _, kind, now, top in report.ledger}
    assert lines["gradients"] == (0, 64 * 64 * 4)


def test_lazy_states_are_seen_as_what_the_first_step_leaves() -> None:
    model = nn.Linear(64, 64, bias=False)
    optim = torch.optim.AdamW(model.parameters())
    model(torch.eye(64)).sum().backward()
    with measure(model, optim) as report:
        optim.step()
    assert report.optimizer_peak is not None
    assert report.optimizer_peak.kept_bytes == 2 * 64 * 64 * 4 + 4
    assert report.ledger["device", "optimizer states"] == 2 * 64 * 64 * 4 + 4


def test_a_report_cannot_be_read_before_its_end() -> None:
    with measure(nn.Identity()) as report:
        with pytest.raises(AttributeError, match="after the `with` block"):
            report.peak  # noqa: B018
        with pytest.raises(AttributeError, match="no attribute 'peek'"):
            report.peek  # noqa: B018
    assert report.peak.peak_bytes == 0
    assert report.optimizer_peak is None


def test_a_step_over_the_budget_of_its_ledger_is_refused() -> None:
    ledger = Ledger("1MiB")
    with (
        pytest.raises(BudgetExceeded, match="device/transient"),
        measure(nn.Linear(4, 4), ledger=ledger),
    ):
        block(2)


def test_watching_does_not_raise_the_peak() -> None:
    model, forward = transformer()
    forward().backward()
    with measure(model) as report:
        forward().backward()
    assert report.peak == peak(lambda: forward().backward())


def test_every_public_function_says_what_it_is_blind_to() -> None:
    for ruler in (peak, saved, persistent):
        assert "Blind" in (ruler.__doc__ or "")
    assert rulers.__doc__
