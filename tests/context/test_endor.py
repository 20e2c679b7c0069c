"""Pruned matrices by bitmap: what comes back, how many bytes, and what pruning does."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tests.context.conftest import llama, tokens  # noqa: E402

from memwise.codec.th import codec  # noqa: E402
from memwise.context.engine.pruning import prune  # noqa: E402
from memwise.context.engine.streaming import streamed  # noqa: E402
from memwise.context.policies.endor import Endor  # noqa: E402
from memwise.context.policies.layer_stream import LayerStream  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402


def expanded(packed: Any) -> list[list[int]]:
    """The bits of a matrix from its bitmap and codes, one by one."""
    bitmap, codes = packed.arrays["bitmap"].tolist(), iter(packed.arrays["codes"].view(
        {2: torch.int16, 4: torch.int32}[packed.arrays["codes"].element_size()]
    ).tolist())  # fmt: skip
    return [
        [next(codes) if row[j // 8] >> j % 8 & 1 else 0 for j in range(packed.shape[1])]
        for row in bitmap
    ]


@settings(derandomize=True, deadline=None)
@given(
    st.integers(0, 5), st.integers(0, 40), st.sampled_from(["bf16", "fp16", "fp32"]),
    st.integers(0, 1000),
)  # fmt: skip
def test_every_bit_comes_back_and_the_loop_agrees(
    n_rows: int, width: int, grid: str, seed: int
) -> None:
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[grid]
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows, width, generator=draws).to(kind)
    hard = torch.tensor([0.0, 0.0, 0.0, -0.0, torch.nan, torch.inf, -torch.inf], dtype=kind)
    chosen = torch.randint(0, 14, x.shape, generator=draws)
    x = torch.where(chosen < 7, hard[chosen % 7], x)
    x[: n_rows // 2] = 0.0
    own = codec(f"{grid}/sparse")
    packed = own.encode(x)
    bits = {2: torch.int16, 4: torch.int32}[kind.itemsize]
    assert torch.equal(own.decode(packed).view(bits), x.view(bits))
    assert expanded(packed) == x.view(bits).tolist()
    n_kept = int((x.view(bits) != 0).sum())
    assert packed.nbytes == n_rows * -(-width // 8) + kind.itemsize * n_kept


def test_matrices_of_many_blocks_are_those_of_one() -> None:
    for shape in [(3, 50_000), (5_000, 17)]:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        x[x.abs() < 0.6] = 0.0
        own = codec("bf16/sparse")
        packed = own.encode(x)
        assert torch.equal(own.decode(packed), x)
        assert torch.equal(own.decode(packed, slice(1, 3)), x[1:3])
        assert torch.equal(own.decode(packed, out=torch.empty(shape)), x.float())


def test_only_floats_are_sparse() -> None:
    with pytest.raises(InvalidKnob, match="take 'bitmap'"):
        codec("int8/row/sparse")


@pytest.mark.parametrize("with_text", [False, True])
def test_pruning_leaves_the_most_important_half_of_each_row(with_text: bool) -> None:
    model, text = llama(), tokens(2, 9)
    seen: list[Any] = []
    q = model.model.layers[1].self_attn.q_proj
    hook = q.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(text)
    hook.remove()
    before = q.weight.detach().clone()
    prune(model, 0.5, text if with_text else None)
    norms = seen[0].flatten(0, 1).norm(dim=0) if with_text else torch.ones(before.shape[1])
    for row, was in zip(q.weight, before, strict=True):
        order = (was.abs() * norms).argsort()
        assert not row[order[:16]].any()
        assert not torch.signbit(row[order[:16]]).any()
        assert torch.equal(row[order[16:]], was[order[16:]])


def test_a_pruned_model_streams_in_fewer_bytes_and_equals_itself(model: Any, tmp_path: Any) -> None:
    model.bfloat16().float()
    prune(model, 0.5)
    ids = tokens(2, 10)
    budget = sum(p.nbytes for p in model.model.layers.parameters() if p.ndim == 2)
    with torch.no_grad():
        expected = model(ids).logits
    read = {}
    for policy in (Endor(grid="bf16"), LayerStream(grid="bf16")):
        name = type(policy).__name__
        with streamed(model, policy, tmp_path / name, budget) as stream, torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
            bundles = stream.file.bundles.values()
            read[name] = sum(bundle.n_bytes for bundle in bundles)
    assert 0.5625 <= read["Endor"] / read["LayerStream"] < 0.66  # small matrices, padded


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(InvalidKnob, match="float64"):
        Endor().codec(torch.zeros(2, 2, dtype=torch.float64))
    for cls in (Endor, LayerStream):
        with pytest.raises(InvalidKnob, match="grid='int8'"):
            cls(grid="int8")
    for ratio in (-0.1, 1.0):
        with pytest.raises(InvalidKnob, match="ratio"):
            prune(llama(), ratio)
