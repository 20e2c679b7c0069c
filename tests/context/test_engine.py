"""The engine of bounded caches: exactness, padding, batches, turns, and what stays inside."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import MODELS, llama, tokens  # noqa: E402

from memwise.context.engine.host import bounded, bytes_for  # noqa: E402
from memwise.context.engine.policy import CachePolicy  # noqa: E402
from memwise.context.engine.step import Step  # noqa: E402
from memwise.errors import BudgetExceeded, InvalidKnob, MemwiseError, UnsupportedModel  # noqa: E402

EXACT = 1e-12


@dataclass(frozen=True)
class Newest(CachePolicy):
    """The newest tokens stay."""

    def score(self, step: Step) -> Any:
        return step.pos.float()


@dataclass(frozen=True)
class Even(CachePolicy):
    """Tokens at even positions stay, of them the newest."""

    def score(self, step: Step) -> Any:
        return step.pos.float() - 1000 * (step.pos % 2)


@dataclass(frozen=True)
class ByHead(CachePolicy):
    """Heads keep different tokens."""

    def score(self, step: Step) -> Any:
        return step.at_random(3)


@dataclass(frozen=True)
class Bare(Even):
    """The same with keys that are held bare of positions."""

    raw_keys = True


def room(model: Any, policy: CachePolicy, n_slots: int, **sizes: Any) -> int:
    return bytes_for(model, policy, n_slots, **sizes)


def run(model: Any, ids: Any, policy: CachePolicy, n_slots: int, chunk: int, **given: Any) -> Any:
    """Logits of all tokens, and the cache."""
    budget = room(model, policy, n_slots, chunk=chunk, batch=len(ids))
    with torch.no_grad(), bounded(model, policy, budget, chunk=chunk) as cache:
        return model(ids, past_key_values=cache, **given).logits, cache


@pytest.mark.parametrize("chunk", [1, 3, 7, 40])
@pytest.mark.parametrize("policy", [Newest(), Bare()])
def test_a_budget_for_all_tokens_changes_nothing(
    model: Any, chunk: int, policy: CachePolicy
) -> None:
    ids = tokens(2, 29)
    with torch.no_grad():
        plain = model(ids).logits
    mine, _ = run(model, ids, policy, 30, chunk)
    assert plain.std() > 0.1
    torch.testing.assert_close(mine, plain, atol=EXACT, rtol=0)


def evicted_oracle(model: Any, ids: Any, kept_at: Any) -> Any:
    """Logits of a forward pass without a cache, under 4-D masks that hide what is gone.

    kept_at: for each query its visible old positions, (T, T) bool, of all full layers.
    """
    n = ids.shape[1]
    at = torch.arange(n)
    causal = at[:, None] >= at[None, :]
    full = causal & kept_at
    config = model.config
    masks = {"full_attention": full[None, None]}
    if getattr(config, "layer_types", None) and "sliding_attention" in config.layer_types:
        near = causal & (at[:, None] - at[None, :] < config.sliding_window)
        masks["sliding_attention"] = near[None, None]
    mask = {kind: _additive(m) for kind, m in masks.items()}
    given = mask if len(mask) > 1 else mask["full_attention"]
    with torch.no_grad():
        return model(ids, attention_mask=given, use_cache=False).logits


def _additive(seen: Any) -> Any:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(
        ~seen, torch.finfo(torch.float64).min
    )


def visible(n: int, n_slots: int, chunk: int, prefer: Any) -> Any:
    """(T, T): what each token sees when slots are chosen by `prefer` as soon as a chunk needs room.

    A naive loop over chunks with a list of positions, as definition of what the engine does.
    """
    seen = torch.zeros(n, n, dtype=torch.bool)
    held: list[int] = []
    for first in range(0, n, chunk):
        new = list(range(first, min(n, first + chunk)))
        if len(held) + len(new) > n_slots + chunk:
            held = sorted(sorted(held, key=prefer)[-n_slots:])
        held += new
        for token in new:
            seen[token, held] = True
    return seen


@pytest.mark.parametrize("chunk", [1, 4, 9])
@pytest.mark.parametrize("policy", [Newest(), Even(), Bare()])
def test_what_is_evicted_is_hidden_and_nothing_else_changes(
    model: Any, chunk: int, policy: CachePolicy
) -> None:
    ids = tokens(1, 50)
    prefer = (lambda p: p) if isinstance(policy, Newest) else (lambda p: p - 1000 * (p % 2))
    expected = evicted_oracle(model, ids, visible(50, 12, chunk, prefer))
    mine, _ = run(model, ids, policy, 12, chunk)
    with torch.no_grad():
        plain = model(ids).logits
    assert (mine - plain).abs().max() > 1e-3
    torch.testing.assert_close(mine, expected, atol=EXACT, rtol=0)


def test_generating_goes_on_as_the_oracle_does(model: Any) -> None:
    ids, chunk, n_slots = tokens(1, 30), 5, 10
    budget = room(model, Newest(), n_slots, chunk=chunk)
    with bounded(model, Newest(), budget, chunk=chunk) as cache:
        got = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
    # Single tokens go on filling the room of a chunk, then slots are chosen.
    held: list[int] = []
    seen = torch.zeros(42, 42, dtype=torch.bool)
    for new in [list(range(f, min(30, f + chunk))) for f in range(0, 30, chunk)] + [
        [t] for t in range(30, 42)
    ]:
        if len(held) + len(new) > n_slots + chunk:
            held = held[-n_slots:]
        held += new
        for token in new:
            seen[token, held] = True
    logits = evicted_oracle(model, got, seen)
    assert got[0, 30:].tolist() == logits[0, 29:-1].argmax(-1).tolist()


@pytest.mark.parametrize("policy", [Newest(), ByHead(), Bare()])
def test_a_padded_batch_is_its_rows(model: Any, policy: CachePolicy) -> None:
    long, short = tokens(1, 33, seed=1), tokens(1, 21, seed=2)
    pad = torch.zeros(1, 12, dtype=torch.long)
    both = torch.cat([long, torch.cat([pad, short], 1)])
    mask = (both != 0).long()
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    mine, _ = run(model, both, policy, 40, 4, attention_mask=mask, position_ids=at)
    alone, _ = run(model, long, policy, 40, 4)
    short_alone, _ = run(model, short, policy, 40, 4)
    torch.testing.assert_close(mine[:1], alone, atol=EXACT, rtol=0)
    torch.testing.assert_close(mine[1:, 12:], short_alone, atol=EXACT, rtol=0)


@pytest.mark.parametrize("policy", [Newest(), ByHead()])
def test_padding_goes_first_when_slots_are_chosen(model: Any, policy: CachePolicy) -> None:
    ids = tokens(1, 20)
    padded = torch.cat([torch.zeros(1, 10, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    _, cache = run(model, padded, policy, 16, 2, attention_mask=mask, position_ids=at)
    for layer in cache.slot_layers:
        assert (layer.slots.pos[:, :, : layer.slots.n] >= 0).all()


def test_rows_of_a_batch_do_not_see_each_other(model: Any) -> None:
    ids = tokens(3, 40)
    together, _ = run(model, ids, ByHead(), 10, 4)
    for row in range(3):
        alone, _ = run(model, ids[row : row + 1], ByHead(), 10, 4)
        torch.testing.assert_close(together[row : row + 1], alone, atol=EXACT, rtol=0)


def test_beams_take_their_slots_with_them(model: Any) -> None:
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    given = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "attention_mask": mask}
    plain = model.generate(ids, **given)
    budget = room(model, Newest(), 40, chunk=4, batch=6)
    with bounded(model, Newest(), budget, chunk=4) as cache:
        assert model.generate(ids, past_key_values=cache, **given).tolist() == plain.tolist()


def test_turns_go_on_where_the_last_one_ended(model: Any) -> None:
    ids = tokens(1, 60)
    budget = room(model, Even(), 14, chunk=4)
    with torch.no_grad(), bounded(model, Even(), budget, chunk=4) as cache:
        parts = [
            model(ids[:, a:b], past_key_values=cache) for a, b in ((0, 24), (24, 25), (25, 60))
        ]
        mine = torch.cat([part.logits for part in parts], 1)
        assert cache.turn == 1
    seen, held = torch.zeros(60, 60, dtype=torch.bool), []
    chunks = [(f, f + 4) for f in range(0, 24, 4)] + [(24, 25)]
    chunks += [(f, min(60, f + 4)) for f in range(25, 60, 4)]
    for a, b in chunks:
        if len(held) + b - a > 18:
            held = sorted(sorted(held, key=lambda p: p - 1000 * (p % 2))[-14:])
        held += range(a, b)
        seen[a:b, held] = True
    torch.testing.assert_close(mine, evicted_oracle(model, ids, seen), atol=EXACT, rtol=0)


def test_a_saved_cache_goes_on_to_the_bit(model: Any, tmp_path: Any) -> None:
    ids, more = tokens(2, 40), tokens(2, 9, seed=5)
    budget = room(model, ByHead(), 10, chunk=4, batch=2)
    with torch.no_grad(), bounded(model, ByHead(), budget, chunk=4) as cache:
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "kv")
        straight = model(more, past_key_values=cache).logits
    with torch.no_grad(), bounded(model, ByHead(), budget, chunk=4) as cache:
        cache.load(tmp_path / "kv")
        assert torch.equal(model(more, past_key_values=cache).logits, straight)


def test_a_cache_of_another_model_is_refused(model: Any, tmp_path: Any) -> None:
    budget = room(model, Newest(), 10, chunk=4)
    with torch.no_grad(), bounded(model, Newest(), budget, chunk=4) as cache:
        model(tokens(1, 20), past_key_values=cache)
        cache.save(tmp_path / "kv")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.01)
    refused = pytest.raises(InvalidKnob, match="another model")
    with bounded(other, Newest(), budget, chunk=4) as cache, refused:
        cache.load(tmp_path / "kv")
    assert cache.n_seen == 0
    refused = pytest.raises(InvalidKnob, match="another policy")
    with bounded(model, Even(), budget, chunk=4) as cache, refused:
        cache.load(tmp_path / "kv")


def test_other_caches_and_none_work_as_always_meanwhile(model: Any) -> None:
    ids = tokens(1, 25)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        logits = model(ids).logits
    with bounded(model, Newest(), "1MiB"), torch.no_grad():
        assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == plain.tolist()
        torch.testing.assert_close(model(ids).logits, logits, atol=EXACT, rtol=0)


def test_the_model_is_as_it_was_afterwards_whatever_happened(model: Any) -> None:
    before, decoder = model.config._attn_implementation, model.get_decoder()
    refused = pytest.raises(InvalidKnob, match="wants attention_mask of shape")
    with torch.no_grad(), refused, bounded(model, Newest(), "1MiB") as cache:
        model(tokens(1, 3), attention_mask=torch.ones(1, 1, 3, 3), past_key_values=cache)
    assert model.config._attn_implementation == before
    assert "forward" not in vars(decoder)


def test_outside_of_its_context_a_cache_refuses_to_work(model: Any) -> None:
    ids = tokens(1, 9)
    with torch.no_grad(), bounded(model, Newest(), "1MiB") as cache:
        model(ids, past_key_values=cache)
    with torch.no_grad(), pytest.raises(MemwiseError, match="inside `with bounded"):
        model(ids, past_key_values=cache)


def test_a_budget_below_the_least_names_the_bytes_that_are_needed(model: Any) -> None:
    with (
        pytest.raises(BudgetExceeded, match=r"needs at least \d+ bytes"),
        bounded(model, Newest(), 1000),
    ):
        pass


def test_a_batch_that_is_too_large_is_refused_before_it_begins(model: Any) -> None:
    ids, refused = tokens(50, 4), pytest.raises(BudgetExceeded, match="a batch of 50")
    with torch.no_grad(), bounded(model, Newest(), room(model, Newest(), 4)) as cache, refused:
        model(ids, past_key_values=cache)
    assert cache.n_seen == 0


def test_another_batch_wants_a_reset() -> None:
    model = llama()
    with torch.no_grad(), bounded(model, Newest(), "1MiB") as cache:
        model(tokens(2, 5), past_key_values=cache)
        with pytest.raises(InvalidKnob, match="holds a batch of 2"):
            model(tokens(1, 5), past_key_values=cache)
        cache.reset()
        model(tokens(1, 5), past_key_values=cache)
        assert cache.n_seen == 5


def test_models_of_other_kinds_are_refused() -> None:
    refused = pytest.raises(UnsupportedModel, match="no decoder-only")
    with refused, bounded(torch.nn.Linear(2, 2), Newest(), "1MiB"):
        pass


def test_compress_leaves_what_the_plan_says(model: Any) -> None:
    ids = tokens(1, 30)
    _, cache = run(model, ids, Newest(), 10, 8)
    assert all(layer.slots.n > 10 for layer in cache.slot_layers)
    with bounded(model, Newest(), room(model, Newest(), 10, chunk=8), chunk=8) as cache:
        with torch.no_grad():
            model(ids, past_key_values=cache)
        cache.compress()
        assert [layer.slots.n for layer in cache.slot_layers] == [10] * len(cache.slot_layers)
        assert cache.report().kept[cache.slot_layers[0].index] == list(range(20, 30))


def test_the_report_tells_where_a_token_is_held(model: Any) -> None:
    _, cache = run(model, tokens(1, 40), Newest(), 10, 4)
    report = cache.report()
    assert "dropped in all" in report.explain(3)
    assert "is held in the layers" in report.explain(39)
    assert "never seen" in report.explain(40)
    assert "tokens seen: 40" in str(report)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_surprisal_is_that_of_the_model(name: str) -> None:
    model, found = MODELS[name](), []

    @dataclass(frozen=True)
    class Listens(Newest):
        needs_text = True

        def observe(self, step: Step) -> None:
            if step.layer == 1:
                found.append(step.surprisal)

    ids = tokens(2, 23)
    run(model, ids, Listens(), 30, 5)
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)
    expected = -logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    mine = torch.cat(found, 1)
    assert (mine[:, 0] == 0).all()
    torch.testing.assert_close(mine[:, 1:], expected.float(), atol=1e-5, rtol=0)
