"""Matrices in a file: budgets, plans, what is refused, and models that run from it."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tests.context.conftest import llama, tokens  # noqa: E402

from memwise.budget import Budget  # noqa: E402
from memwise.context.engine.host import bounded, bytes_for  # noqa: E402
from memwise.context.engine.streaming import streamed  # noqa: E402
from memwise.context.engine.weight_plan import Rates, planned  # noqa: E402
from memwise.context.engine.weight_store import (  # noqa: E402
    PAGE,
    WeightFile,
    WeightStore,
    write,
)
from memwise.context.policies.endor import Endor  # noqa: E402
from memwise.context.policies.layer_stream import LayerStream  # noqa: E402
from memwise.context.policies.streaming_llm import StreamingLLM  # noqa: E402
from memwise.errors import (  # noqa: E402
    BudgetExceeded,
    InvalidKnob,
    StoreCorrupt,
    UnsupportedModel,
)
from memwise.train.measure import peak  # noqa: E402

MARK = {"model": "a", "layout": "b"}
N, SHAPE = 6, (24, 40)
SIZE = 24 * 40 * 4
WORK = 4 * SIZE  # of a decoder, which plain matrices do not need


def matrices(n: int = N, shape: tuple[int, int] = SHAPE) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(0)
    found = {f"m{i}": torch.randn(*shape, generator=draws) for i in range(n)}
    for matrix in found.values():
        matrix[matrix.abs() < 0.7] = 0.0
    return found


def made(path: Any, codec: str = "", n: int = N) -> dict[str, Any]:
    found = matrices(n)
    write(path, ((name, matrix, codec) for name, matrix in found.items()), MARK)
    return found


def holding(file: Any, n: float, n_ring: int = 2) -> WeightStore:
    """A store for so many matrices, the one that is read among them."""
    work = WORK if file.bundles["m0"].codec else 0
    return WeightStore(file, int(n * SIZE) + work, n_ring=n_ring)


@pytest.fixture(params=["", "fp32/sparse"])
def stored(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    found = made(tmp_path / "w", request.param)
    file = WeightFile(tmp_path / "w", MARK)
    yield file, found
    file.close()


# --- the store


@pytest.mark.parametrize("n_held", [2.2, 3.2, 4.4, 20])
@pytest.mark.parametrize("n_ring", [1, 2, 3])
def test_what_is_fetched_is_what_was_written(stored: Any, n_held: float, n_ring: int) -> None:
    file, found = stored
    store = holding(file, n_held + 1, n_ring)
    order = [*found, *found, "m4", "m1", "m1", "m0", *reversed(found)]
    assert all(torch.equal(store.fetch(name), found[name]) for name in order)
    assert store.ledger.peak() <= store.budget
    store.close()


def test_a_pass_in_order_reads_every_streamed_matrix_once(stored: Any) -> None:
    file, found = stored
    store = holding(file, 5)
    before = store.counters.copy()
    for name in itertools.chain(*[found] * 4):
        store.fetch(name)
    cost = store.counters.since(before)
    n_streamed = len(store.plan.streamed)
    assert 0 < n_streamed < N
    store.close()  # waits for what is read ahead
    assert 4 * n_streamed <= cost.reads <= 4 * n_streamed + 1
    assert cost.bytes_read >= 4 * store.plan.read_bytes
    assert cost.decoded_bytes in (0, cost.reads * SIZE)
    assert "reads" in str(cost)


def test_where_all_fits_nothing_is_read_twice(stored: Any) -> None:
    file, found = stored
    store = holding(file, 50)
    for name in itertools.chain(*[found] * 3):
        store.fetch(name)
    assert store.plan.streamed == ()
    assert store.plan.n_ring == 0
    assert store.counters.reads == N
    store.close()


def test_the_order_that_was_seen_is_the_one_that_is_read_ahead(stored: Any) -> None:
    file, _found = stored
    store = holding(file, 4.2)
    order = list(reversed(store.plan.streamed))
    for name in itertools.chain(*[order] * 2):
        store.fetch(name)
    before = store.counters.copy()
    for name in itertools.chain(*[order] * 3):
        store.fetch(name)
    assert store.counters.since(before).reads <= 3 * len(order) + 1
    store.close()


def test_bytes_are_measured_from_storages(stored: Any) -> None:
    file, _ = stored
    store = holding(file, 5)
    held = [t.untyped_storage().nbytes() for t in store.resident.values()]
    held += [slot.place.nbytes for slot in store._slots]
    assert store.ledger["host", "resident"] + store.ledger["host", "ring"] == sum(held)
    store.close()
    assert store.ledger.total() == 0


def test_no_moment_takes_more_than_the_budget(tmp_path: Any) -> None:
    shape = (256, 512)
    found = matrices(5, shape)
    write(tmp_path / "w", ((k, m, "fp32/sparse") for k, m in found.items()), MARK)
    file, budget = WeightFile(tmp_path / "w", MARK), Budget("3MiB")

    def run() -> None:
        store = WeightStore(file, budget)
        for name in itertools.chain(*[found] * 2):
            store.fetch(name)
        store.close()

    assert peak(run).peak_bytes <= budget
    file.close()


def test_rows_come_in_as_few_reads_as_there_are_runs(tmp_path: Any) -> None:
    found = made(tmp_path / "w")
    for keep_pages in (True, False):
        file = WeightFile(tmp_path / "w", MARK, keep_pages)
        rows = torch.tensor([0, 1, 2, 7, 9, 10, 23]).numpy()
        out = torch.empty(len(rows), SHAPE[1])
        file.read_rows(file.bundles["m3"], rows, out)
        assert torch.equal(out, found["m3"][torch.from_numpy(rows)])
        assert file.counters.reads == 4
        assert file.counters.bytes_read == out.nbytes
        file.read_rows(file.bundles["m3"], rows[:0], out[:0])
        assert file.counters.reads == 4
        file.drop_pages()
        file.close()


def test_bundles_are_aligned_and_the_formula_holds(tmp_path: Any) -> None:
    found = made(tmp_path / "w", "fp32/sparse")
    file = WeightFile(tmp_path / "w", MARK)
    for name, bundle in file.bundles.items():
        wanted = SHAPE[0] * SHAPE[1] // 8 + 4 * int(found[name].count_nonzero())
        assert bundle.offset % PAGE == 0
        assert wanted <= bundle.n_bytes < wanted + 128
        assert bundle.plain_bytes == bundle.decoded_bytes == SIZE
    file.close()


# --- the plan


@dataclass(frozen=True)
class Known:
    name: str
    codec: str
    n_bytes: int
    decoded_bytes: int
    plain_bytes: int
    work_bytes: int = 0


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(0, 8000),
    st.integers(1, 4), st.booleans(), st.integers(0, 3),
)  # fmt: skip
def test_a_plan_never_holds_more_than_the_budget(
    sizes: list[int], budget: int, n_ring: int, coded: bool, n_pinned: int
) -> None:
    codec = "fp32/sparse" if coded else ""
    some = [Known(str(i), codec, size, size, size) for i, size in enumerate(sizes)]
    pinned = frozenset(m.name for m in some[:n_pinned])
    try:
        plan = planned(some, Budget(budget), pinned, n_ring)
    except BudgetExceeded:
        rest = [m.decoded_bytes for m in some if m.name not in pinned]
        assert budget < sum(sizes) + plan_scratch(some)
        assert budget < sum(sizes[:n_pinned]) + max(rest, default=0) + plan_scratch(some)
        return
    assert plan.total_bytes <= budget
    assert sorted(plan.resident + plan.streamed) == sorted(m.name for m in some)
    assert pinned <= set(plan.resident)
    assert plan.read_bytes == sum(m.n_bytes for m in some if m.name in plan.streamed)


def plan_scratch(some: list[Known]) -> int:
    return planned(some, Budget(1 << 40)).scratch_bytes


def test_more_budget_never_reads_more() -> None:
    some = [Known(str(i), "", 100, 100, 100) for i in range(20)]
    reads = [planned(some, Budget(100 * n)).read_bytes for n in range(1, 25)]
    assert reads == sorted(reads, reverse=True)
    assert reads[-1] == 0
    assert reads[2] == 1900


def test_a_plan_says_whether_a_codec_pays() -> None:
    some = [Known(str(i), "bf16/sparse", 56, 200, 100) for i in range(9)]
    plan = planned(some, Budget(10_000 // 9))
    fast, slow = Rates(1e9, 1e9), Rates(1e6, 1e9)
    assert plan.seconds(slow) < plan.plain_seconds(slow)
    assert plan.pays(slow)
    assert not plan.pays(fast)
    assert "does not pay" in plan.verdict(fast)
    assert "the codec pays" in plan.verdict(slow)
    edge = plan.break_even(fast)
    assert plan.pays(Rates(edge * 0.99, 1e9))
    assert not plan.pays(Rates(edge * 1.01, 1e9))
    assert "no codec" in planned([Known("a", "", 1, 1, 1)], Budget(9)).verdict(fast)


def test_speeds_are_measured(stored: Any) -> None:
    file, found = stored
    store = holding(file, 4.5)
    rates = store.measure()
    assert 0 < rates.read_bytes_s < float("inf")
    assert rates.decode_bytes_s > 0
    assert (rates.decode_bytes_s == float("inf")) == (not file.bundles["m0"].codec)
    assert all(torch.equal(store.fetch(name), found[name]) for name in found)
    store.close()


# --- what is refused


def test_a_budget_below_one_matrix_says_what_is_needed(stored: Any) -> None:
    with pytest.raises(BudgetExceeded, match="raise budget= to at least"):
        WeightStore(stored[0], SIZE - 1)


def test_a_file_of_something_else_is_refused(tmp_path: Any) -> None:
    made(tmp_path / "w")
    with pytest.raises(InvalidKnob, match="another layout: b there, c here"):
        WeightFile(tmp_path / "w", {**MARK, "layout": "c"})
    with pytest.raises(InvalidKnob, match="is no file"):
        WeightFile(tmp_path / "none", MARK)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(StoreCorrupt, match="no file of weights"):
        WeightFile(tmp_path / "text", MARK)


def test_a_cut_or_altered_file_is_refused(tmp_path: Any) -> None:
    made(tmp_path / "w")
    whole = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(whole[:-1])
    with pytest.raises(StoreCorrupt, match="was written with"):
        WeightFile(tmp_path / "w", MARK)
    head = whole.index(b'"layout"')
    (tmp_path / "w").write_bytes(whole[:head] + b"X" + whole[head + 1 :])
    with pytest.raises(StoreCorrupt, match="header was altered"):
        WeightFile(tmp_path / "w", MARK)
    (tmp_path / "w").write_bytes(whole[: PAGE + 5] + b"X" + whole[PAGE + 6 :])
    file = WeightFile(tmp_path / "w", MARK)
    with pytest.raises(StoreCorrupt, match="'m0' are not those"):
        file.check()
    file.close()


def test_a_file_that_is_cut_meanwhile_is_noticed(tmp_path: Any) -> None:
    made(tmp_path / "w")
    file = WeightFile(tmp_path / "w", MARK)
    store = WeightStore(file, int(2.2 * SIZE))
    os.truncate(tmp_path / "w", PAGE + 10)
    with pytest.raises(StoreCorrupt, match="it was cut meanwhile"):
        [store.fetch(name) for name in file.bundles]
    store.close()
    file.close()


def test_a_write_that_fails_leaves_nothing(tmp_path: Any) -> None:
    def some() -> Any:
        yield "a", torch.zeros(2, 2), ""
        raise KeyError("stop")

    with pytest.raises(KeyError):
        write(tmp_path / "w", some(), MARK)
    assert list(tmp_path.iterdir()) == []


def test_a_ring_without_places_is_refused(stored: Any) -> None:
    with pytest.raises(InvalidKnob, match="n_ring=0"):
        WeightStore(stored[0], 9 * SIZE, n_ring=0)


# --- models


def matrix_bytes(model: Any) -> int:
    return sum(p.nbytes for p in model.model.layers.parameters() if p.ndim == 2)


@torch.no_grad()
def generated(model: Any, ids: Any) -> Any:
    return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("share", [0.4, 2.0])
@pytest.mark.parametrize(
    ("policy", "dtype"),
    [(LayerStream(), "float64"), (LayerStream(), "float32"), (Endor(), "float32")],
)
def test_a_streamed_model_is_the_resident_one_to_the_bit(
    model: Any, policy: Any, dtype: str, share: float, tmp_path: Any
) -> None:
    model.to(getattr(torch, dtype))
    ids, before = tokens(2, 12), {k: v.clone() for k, v in model.state_dict().items()}
    work = 32 * 40 * 16 if isinstance(policy, Endor) else 0
    budget = int(share * matrix_bytes(model)) + work
    with torch.no_grad():
        expected, text = model(ids).logits, generated(model, ids)
    for _ in range(2):  # the second time from the file that is there
        with streamed(model, policy, tmp_path / "w", budget) as stream, torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
            assert torch.equal(generated(model, ids), text)
            assert stream.store.ledger.peak() <= budget
            held = sum(p.untyped_storage().nbytes() for p in model.model.layers.parameters())
            assert share > 1 or held < budget + 3000  # norms
            assert "resident" in str(stream)
            assert "a pass reads" in stream.verdict()
            assert torch.equal(model(ids).logits, expected)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert "forward" not in vars(model.model.layers[0].mlp)


def test_weights_come_back_when_something_goes_wrong(tmp_path: Any) -> None:
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for budget in (100, matrix_bytes(model) // 2):
        with (
            pytest.raises((BudgetExceeded, ZeroDivisionError)),
            streamed(model, LayerStream(), tmp_path / "w", budget),
        ):
            raise ZeroDivisionError
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_gradients_are_refused_instead_of_wrong(tmp_path: Any) -> None:
    model = llama()
    with (
        streamed(model, LayerStream(), tmp_path / "w", matrix_bytes(model) // 2),
        pytest.raises(InvalidKnob, match="no_grad"),
    ):
        model(tokens(1, 4))


def test_it_goes_with_a_bounded_cache(model: Any, tmp_path: Any) -> None:
    ids, policy = tokens(1, 40), StreamingLLM()
    budget = bytes_for(model, policy, 16, chunk=8)

    def scored() -> Any:
        with bounded(model, policy, budget, chunk=8) as cache, torch.no_grad():
            return model(ids, past_key_values=cache).logits

    expected = scored()
    with streamed(model, LayerStream(), tmp_path / "w", matrix_bytes(model) // 2):
        assert torch.equal(scored(), expected)


def test_inference_mode_works_as_well(tmp_path: Any) -> None:
    model, ids = llama(), tokens(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
    with streamed(model, LayerStream(), tmp_path / "w", matrix_bytes(model) // 2):
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, expected)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    model(ids).logits.sum().backward()  # and it is a model that can be trained again


def test_another_model_or_format_does_not_take_the_file(tmp_path: Any) -> None:
    model = llama().float()
    with streamed(model, LayerStream(), tmp_path / "w", 1 << 20):
        pass
    with (
        pytest.raises(InvalidKnob, match="another layout"),
        streamed(model, Endor(), tmp_path / "w", 1 << 20),
    ):
        pass
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
    with (
        pytest.raises(InvalidKnob, match="another model"),
        streamed(model, LayerStream(), tmp_path / "w", 1 << 20),
    ):
        pass


def test_models_that_cannot_be_streamed_are_refused(tmp_path: Any) -> None:
    for wrong, what in ((torch.nn.Linear(2, 2), "decoder-only"), (shared(), "share a matrix")):
        with (
            pytest.raises(UnsupportedModel, match=what),
            streamed(wrong, LayerStream(), tmp_path / "w", 1 << 20),
        ):
            pass
    with (
        pytest.raises(UnsupportedModel, match="meta"),
        streamed(llama().to("meta"), LayerStream(), tmp_path / "w", 1 << 20),
    ):
        pass


def shared() -> Any:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model
