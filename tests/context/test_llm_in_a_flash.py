"""Neurons on a disk: places that are used again, exact predictors, windows, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.context.conftest import SIZES, _loud, llama, tokens  # noqa: E402

from memwise.context.engine.neurons import Held  # noqa: E402
from memwise.context.engine.streaming import streamed  # noqa: E402
from memwise.context.engine.weight_store import WeightFile, write  # noqa: E402
from memwise.context.policies.llm_in_a_flash import LLMInAFlash  # noqa: E402
from memwise.errors import BudgetExceeded, InvalidKnob, UnsupportedModel  # noqa: E402
from memwise.train.measure import peak  # noqa: E402

F = 40  # neurons of a layer


def gated() -> Any:
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=3, hidden_act="relu")
    return _loud(transformers.LlamaForCausalLM(config))


def squared() -> Any:
    """Up and down alone, with squared ReLUs."""
    config = transformers.NemotronConfig(
        **SIZES, num_hidden_layers=2, hidden_act="relu2", max_position_embeddings=64
    )
    return _loud(transformers.NemotronForCausalLM(config))


@dataclass(frozen=True)
class Exact(LLMInAFlash):
    def learn(self, x: Any, fires: Any, gate: Any) -> Mapping[str, Any]:
        return {"gate": gate}

    def predict(self, x: Any, known: Mapping[str, Any]) -> Any:
        return x @ known["gate"].T > 0


@dataclass(frozen=True)
class Apart(Exact):
    together = False


def bytes_of(model: Any) -> int:
    return sum(p.nbytes for p in model.model.layers.parameters() if p.ndim == 2)


TEXT = tokens(8, 24, seed=1)


@pytest.mark.parametrize("policy", [Exact(), Exact(keep=0), Apart(keep=3)])
@pytest.mark.parametrize("make", [gated, squared])
def test_with_an_exact_predictor_logits_are_the_plain_models(
    make: Any, policy: Any, tmp_path: Any
) -> None:
    model, ids = make(), tokens(2, 12)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits
        text = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
    for share in (3.0, 1.6):  # the gates of the predictor are resident too
        budget = int(share * bytes_of(model))
        with (
            streamed(model, policy, tmp_path / "w", budget, text=TEXT) as stream,
            torch.no_grad(),
        ):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-9)
            with torch.inference_mode():
                model(ids[:1])
            again = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
            assert torch.equal(again, text)
            assert stream.store.ledger.peak() <= budget
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert "forward" not in vars(model.model.layers[0].mlp)


def test_more_neurons_than_there_is_room_for_are_summed_in_parts(tmp_path: Any) -> None:
    model, ids = gated(), tokens(2, 16)
    with torch.no_grad():
        expected = model(ids).logits
    neuron = 3 * 32 * 8
    fixed = bytes_of(model) - 3 * F * neuron + 3 * F * 32 * 8
    budget = fixed + 3 * (5 * (neuron + 8) + 16 * F + 4 * neuron)
    with (
        streamed(model, Exact(), tmp_path / "w", budget, text=TEXT) as stream,
        torch.no_grad(),
    ):
        assert {sparse.held.capacity for sparse in stream.sparse} == {5}
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-9)


def test_a_window_keeps_exactly_what_fired_for_the_last_tokens(tmp_path: Any) -> None:
    model, ids = gated(), tokens(1, 14)
    fired: list[list[set[int]]] = [[] for _ in range(3)]
    for layer, found in zip(model.model.layers, fired, strict=True):
        layer.mlp.act_fn.register_forward_hook(
            lambda _, __, out, found=found: found.extend(
                {i for i, x in enumerate(row) if x > 0} for row in out[0].tolist()
            )
        )
    with torch.no_grad():
        model(ids)
    hooked = [list(found) for found in fired]
    for layer in model.model.layers:
        layer.mlp.act_fn._forward_hooks.clear()
    cache = transformers.DynamicCache()
    with (
        streamed(model, Exact(keep=3), tmp_path / "w", 1 << 20, text=TEXT) as stream,
        torch.no_grad(),
    ):
        for t in range(ids.shape[1]):
            before = [set(sparse.held.ids().tolist()) for sparse in stream.sparse]
            read = stream.file.counters.copy()
            model(ids[:, t : t + 1], past_key_values=cache)
            n_new = 0
            for sparse, found, held in zip(stream.sparse, hooked, before, strict=True):
                newest = found[max(0, t - 2) : t + 1]
                assert set(sparse.held.ids().tolist()) == set().union(*newest)
                n_new += len(found[t] - held)
            cost = stream.file.counters.since(read)
            assert cost.bytes_read == n_new * 3 * 32 * 8


def test_places_are_used_again_and_rows_stay_with_their_neurons(tmp_path: Any) -> None:
    table = torch.arange(F * 6.0).view(F, 6)
    write(tmp_path / "w", [("rows", table, "")], {})
    file = WeightFile(tmp_path / "w", {})
    held, draws = Held(file, [file.bundles["rows"]], 3, 12), random.Random(0)
    place = held.matrices[0].data_ptr()
    expected: set[int] = set()
    for step in range(300):
        if draws.random() < 0.5 and expected:
            gone = draws.sample(sorted(expected), draws.randint(1, len(expected)))
            held.drop(torch.tensor(gone).numpy())
            expected -= set(gone)
        else:
            wanted = torch.tensor(sorted(draws.sample(range(F), draws.randint(0, 12)))).long()
            held.hold(wanted.numpy())
            held.fired[wanted.numpy()] = step
            assert set(wanted.tolist()) <= set(held.ids().tolist())
            expected |= set(wanted.tolist())
            expected &= set(held.ids().tolist())
        assert set(held.ids().tolist()) == expected
        assert held.n <= 12
        ids = torch.from_numpy(held.ids())
        assert torch.equal(torch.cat(held.parts(), dim=1), table[ids])
    assert held.matrices[0].data_ptr() == place
    file.close()


def test_a_token_allocates_no_more_than_in_the_plain_model(tmp_path: Any) -> None:
    model, ids = gated(), tokens(1, 1)

    def token() -> None:
        with torch.no_grad():
            model(ids)

    token()
    plain = peak(token).peak_bytes
    with streamed(model, Exact(), tmp_path / "w", 1 << 20, text=TEXT):
        token()
        assert peak(token).peak_bytes <= plain + 17 * 3 * 32 * 8  # rows that are moved


def test_bundled_rows_take_fewer_reads_for_the_same_bytes(tmp_path: Any) -> None:
    model, ids = gated(), tokens(1, 10)
    cost = {}
    for policy in (Exact(), Apart()):
        name = type(policy).__name__
        with (
            streamed(model, policy, tmp_path / name, 1 << 20, text=TEXT) as stream,
            torch.no_grad(),
        ):
            before = stream.file.counters.copy()
            model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
            cost[name] = stream.file.counters.since(before)
    assert cost["Exact"].bytes_read == cost["Apart"].bytes_read > 0
    assert 3 * cost["Exact"].reads == cost["Apart"].reads


def test_the_predictor_learns_a_rule_that_is_there() -> None:
    draws = torch.Generator().manual_seed(0)
    gate = torch.randn(30, 4, generator=draws) @ torch.randn(4, 16, generator=draws)
    x = torch.randn(3000, 16, generator=draws)
    fires = x @ gate.T > 2.0
    policy = LLMInAFlash(rank=4)
    known = policy.learn(x[:2000], fires[:2000], gate)
    likely = policy.predict(x[2000:], known)
    recall = (likely & fires[2000:]).sum() / fires[2000:].sum()
    assert recall > 0.95
    assert likely.float().mean() < 2 * fires.float().mean()
    assert known["u"].shape == (16, 4)
    assert known["v"].shape == (4, 30)
    again = policy.learn(x[:2000], fires[:2000], gate)
    assert all(torch.equal(known[name], again[name]) for name in known)


def test_gates_that_are_never_silent_are_refused(tmp_path: Any) -> None:
    with (
        pytest.raises(UnsupportedModel, match="not zero below zero"),
        streamed(llama(), LLMInAFlash(), tmp_path / "w", 1 << 20, text=TEXT),
    ):
        pass
    assert not (tmp_path / "w").exists()


def test_what_cannot_be_learned_or_held_is_refused(tmp_path: Any) -> None:
    model = gated()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with (
        pytest.raises(InvalidKnob, match="give some tokens as text="),
        streamed(model, LLMInAFlash(), tmp_path / "w", 1 << 20),
    ):
        pass
    policy = LLMInAFlash(n_steps=5)
    with pytest.raises(BudgetExceeded), streamed(model, policy, tmp_path / "w", 1000, text=TEXT):
        pass
    with (
        pytest.raises(InvalidKnob, match="another layout"),
        streamed(model, replace(policy, rank=3), tmp_path / "w", 1 << 20),
    ):
        pass
    with (
        streamed(model, replace(policy, keep=2), tmp_path / "w", 1 << 20),
        pytest.raises(InvalidKnob, match="no_grad"),
    ):
        model(tokens(1, 3))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "knobs",
    [{"keep": -1}, {"rank": 0}, {"threshold": 1.0}, {"miss_cost": 0.0}, {"n_steps": 0}, {"lr": 0}],
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(InvalidKnob, match=next(iter(knobs))):
        LLMInAFlash(**knobs)
