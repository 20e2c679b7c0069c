"""A prefix that is held once: exactness behind it, the store of prefixes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tests.context.conftest import gemma, llama, tokens  # noqa: E402

from memwise.context.engine.partial import attend, merge  # noqa: E402
from memwise.context.engine.prefix import PrefixStore  # noqa: E402
from memwise.context.engine.relay import Prefix, relayed  # noqa: E402
from memwise.context.policies.relay_attention import RelayAttention  # noqa: E402
from memwise.context.policies.replicated_prefix import ReplicatedPrefix  # noqa: E402
from memwise.errors import BudgetExceeded, InvalidKnob, MemwiseError, StoreCorrupt  # noqa: E402

EXACT = 1e-12
LENGTHS = (3, 7, 1, 5)
STEPS = 9  # the sliding layers look back 8 tokens: the prefix leaves their windows


def padded(rows: list[Any]) -> tuple[Any, Any]:
    """Ids and mask (B, n), padding on the left."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    return ids, mask


def requests(lengths: tuple[int, ...] = LENGTHS) -> list[Any]:
    return [tokens(1, n, seed=10 + n)[0] for n in lengths]


@torch.no_grad()
def alone(model: Any, prefix: Any, row: Any) -> tuple[list[int], Any]:
    """Greedy tokens of one request, and all logits, each by a plain pass over the whole text."""
    text, found = torch.cat([prefix, row])[None], []
    for _ in range(STEPS):
        found.append(model(text, use_cache=False).logits[0, -1])
        text = torch.cat([text, found[-1].argmax()[None, None]], 1)
    return text[0, -STEPS:].tolist(), torch.stack(found)


@torch.no_grad()
def generated(model: Any, cache: Any, ids: Any, mask: Any | None = None, **given: Any) -> Any:
    """Greedy tokens (B, STEPS)."""
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=STEPS, do_sample=False,
        **given,
    )[:, -STEPS:].tolist()  # fmt: skip


@torch.no_grad()
def stepped(model: Any, cache: Any, ids: Any, mask: Any | None = None) -> tuple[Any, Any]:
    """Greedy tokens (B, STEPS), and logits (B, STEPS, V) of one pass a token."""
    mask = torch.ones_like(ids) if mask is None else mask
    texts, found = [], []
    for _ in range(STEPS):
        found.append(model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1])
        ids = found[-1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        texts.append(ids)
    return torch.cat(texts, 1).tolist(), torch.stack(found, 1)


# --- parts of attention


@pytest.mark.parametrize("n_shared", [0, 1, 9])
@pytest.mark.parametrize("n_rows", [1, 4, 256])
def test_merged_parts_are_the_softmax_over_all_slots(n_shared: int, n_rows: int) -> None:
    draws = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Any:
        return torch.randn(shape, generator=draws, dtype=torch.float64)

    query, scale = some(3, 4, 2, 8), 0.3
    shared, own = [some(1, 2, n_shared, 8) for _ in "kv"], [some(3, 2, 5, 8) for _ in "kv"]
    seen = torch.rand(3, 1, 2, 5, generator=draws) < 0.6
    seen[..., 0] = True
    seen_shared = torch.rand(3, 1, 2, n_shared, generator=draws) < 0.6
    seen_shared[0] = False
    parts = [attend(query, *own, seen, scale, n_rows)]
    if n_shared:
        parts.append(attend(query, *shared, seen_shared, scale, n_rows))
    found = merge(parts)

    for b in range(3):
        for head in range(4):
            for i in range(2):
                keys, values = (
                    torch.cat(
                        [s[0, head // 2][seen_shared[b, 0, i]], o[b, head // 2][seen[b, 0, i]]]
                    )
                    for s, o in zip(shared, own, strict=True)
                )
                weights = (keys @ query[b, head, i] * scale).softmax(0)
                torch.testing.assert_close(found[b, head, i], weights @ values, atol=EXACT, rtol=0)


def test_a_row_that_sees_nothing_has_no_weight() -> None:
    query = torch.randn(2, 2, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([False, True])[:, None, None, None].expand(2, 1, 1, 3)
    keys = query.new_ones(2, 2, 3, 4)
    out, weight = attend(query, keys, keys, seen, 1.0)
    other = query + 1, torch.zeros_like(weight)
    torch.testing.assert_close(merge([(out, weight), other])[0], other[0][0], atol=0, rtol=0)
    assert weight[1].exp().isfinite().all()
    assert out.isfinite().all()


def test_narrow_numbers_are_mixed_in_float32() -> None:
    query = torch.ones(1, 1, 1, 4, dtype=torch.bfloat16)
    keys = query.expand(1, 1, 3, 4)
    out, weight = attend(query, keys, keys, None, 1.0)
    assert out.dtype == weight.dtype == torch.float32


# --- behind a prefix


@pytest.mark.parametrize("n_prefix", [1, 5, 20])
def test_each_request_of_a_batch_reads_as_if_it_were_alone(model: Any, n_prefix: int) -> None:
    prefix, rows = tokens(1, n_prefix)[0], requests()
    ids, mask = padded(rows)
    with relayed(model, PrefixStore(model).prefill(prefix)) as cache:
        texts, logits = stepped(model, cache, ids, mask)
        cache.reset()
        by_generate = generated(model, cache, ids, mask)
    for i, row in enumerate(rows):
        text, wanted = alone(model, prefix, row)
        assert texts[i] == by_generate[i] == text
        torch.testing.assert_close(logits[i], wanted, atol=EXACT, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3, 6, 512])
def test_a_prefix_in_parts_is_the_whole_prefix(model: Any, chunk: int) -> None:
    prefix, row = tokens(1, 21)[0], requests((4,))[0]
    store = PrefixStore(model, chunk=chunk)
    parts = [store.prefill(prefix[:n]) for n in (2, 9, 21)]
    assert [one.parent for one in parts] == [None, parts[0], parts[1]]
    with relayed(model, parts[-1]) as cache:
        _, logits = stepped(model, cache, row[None])
    torch.testing.assert_close(logits[0], alone(model, prefix, row)[1], atol=EXACT, rtol=0)


def test_without_a_prefix_it_is_an_ordinary_cache(model: Any) -> None:
    ids, mask = padded(requests())
    with relayed(model, None) as cache:
        texts = generated(model, cache, ids, mask)
    assert texts == [alone(model, row[:0], row)[0] for row in requests()]


def test_several_turns_go_on_rightly(model: Any) -> None:
    prefix, row = tokens(1, 11)[0], tokens(1, 30, seed=3)[0]
    with relayed(model, PrefixStore(model).prefill(prefix)) as cache, torch.no_grad():
        parts = [
            model(part[None], past_key_values=cache).logits for part in row.split([9, 1, 13, 7])
        ]
    with torch.no_grad():
        whole = model(torch.cat([prefix, row])[None]).logits[:, len(prefix) :]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=EXACT, rtol=0)


def test_rows_of_padding_go_on_without_a_mask(model: Any) -> None:
    prefix, rows, more = tokens(1, 11)[0], requests(), tokens(4, 2, seed=8)
    ids, mask = padded(rows)
    with relayed(model, PrefixStore(model).prefill(prefix)) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        found = model(more, past_key_values=cache).logits
        for i, row in enumerate(rows):
            whole = model(torch.cat([prefix, row, more[i]])[None]).logits[0, -2:]
            torch.testing.assert_close(found[i], whole, atol=EXACT, rtol=0)


def test_beams_share_the_prefix(model: Any) -> None:
    prefix, row = tokens(1, 11)[0], requests((4,))[0]
    with relayed(model, PrefixStore(model).prefill(prefix)) as cache:
        mine = generated(model, cache, row[None], num_beams=3)
    whole = torch.cat([prefix, row])[None]
    plain = generated(model, None, whole, num_beams=3)
    assert mine == plain
    assert all(keys.shape[0] == 1 for keys, _ in cache.prefix.pairs)


def test_a_copy_for_each_request_gives_the_same_texts(model: Any) -> None:
    prefix, ids = tokens(1, 11)[0], tokens(4, 6, seed=5)
    store = PrefixStore(model)
    store.prefill(prefix[:4])
    held = store.prefill(prefix)
    with RelayAttention()(model, held) as cache:
        mine = generated(model, cache, ids)
    whole = torch.cat([prefix.expand(4, -1), ids], 1)
    copies = ReplicatedPrefix()(model, held, 4)
    theirs = generated(model, copies, whole)
    assert mine == theirs


def test_other_caches_work_meanwhile(model: Any) -> None:
    ids = tokens(1, 9)
    plain = generated(model, None, ids)
    with relayed(model, PrefixStore(model).prefill(ids[0])):
        assert generated(model, None, ids) == plain
    assert generated(model, None, ids) == plain


def test_reset_leaves_the_prefix(model: Any) -> None:
    prefix, rows = tokens(1, 11)[0], requests()
    with relayed(model, PrefixStore(model).prefill(prefix)) as cache:
        generated(model, cache, *padded(rows))
        with pytest.raises(InvalidKnob, match="batch of 4"):
            model(rows[0][None], past_key_values=cache)
        cache.reset()
        texts = generated(model, cache, rows[0][None])
    assert texts == [alone(model, prefix, rows[0])[0]]


# --- bytes


@pytest.mark.parametrize("n_requests", [1, 8])
def test_the_prefix_is_held_once_whatever_the_batch(model: Any, n_requests: int) -> None:
    prefix, ids = tokens(1, 40)[0], tokens(n_requests, 4, seed=7)
    store = PrefixStore(model)
    held = store.prefill(prefix)
    before = {tensor.data_ptr() for pair in held.pairs for tensor in pair}
    with relayed(model, held) as cache:
        generated(model, cache, ids)
        layers = cache.relay_layers
        shared = {t.data_ptr() for layer in layers for part in layer.parts for t in part}
    assert shared == before
    n_full = len(cache.shape.full_layers)
    n_sliding = len(layers) - n_full
    a_token = cache.shape.pair_bytes
    assert held.held_bytes == (40 * n_full + 7 * n_sliding) * a_token
    assert cache.ledger["device", "shared prefix"] == held.held_bytes == store.ledger.total()
    rows_bytes = n_requests * (4 + STEPS) * len(layers) * a_token
    assert cache.held_bytes() < 1.4 * rows_bytes
    assert cache.ledger.total() == cache.held_bytes()


def test_parts_that_several_prefixes_share_are_held_once() -> None:
    model = llama()
    store = PrefixStore(model)
    system = store.prefill(tokens(1, 30)[0])
    alone_bytes = store.ledger.total()
    for seed in (1, 2):
        store.prefill([*system.tokens, *tokens(1, 10, seed)[0]])
    assert store.ledger.total() == alone_bytes + 2 * alone_bytes // 3


def test_rows_that_do_not_fit_are_refused_and_lose_nothing(model: Any) -> None:
    held = PrefixStore(model).prefill(tokens(1, 11)[0])
    row = tokens(1, 30)
    with relayed(model, held) as free, torch.no_grad():
        whole = model(row, past_key_values=free).logits
        needed = free.held_bytes()
    with relayed(model, held, needed) as cache, torch.no_grad():
        with pytest.raises(BudgetExceeded, match="raise budget="):
            model(row.expand(2, -1), past_key_values=cache)
        assert cache.n_seen == 0
        torch.testing.assert_close(model(row, past_key_values=cache).logits, whole)
        with pytest.raises(BudgetExceeded):
            model(row, past_key_values=cache)
        assert cache.n_seen == 30


# --- the store


def test_a_prefix_is_found_by_its_tokens_and_computed_once(model: Any) -> None:
    store, text = PrefixStore(model), tokens(1, 20)[0].tolist()
    made = store.prefill(text[:8])
    assert store.prefill(torch.tensor(text[:8])) is made
    assert store.match(text) is made
    assert store.match(text[:7]) is None
    assert store.match([text[0] + 1, *text[1:]]) is None
    longer = store.prefill(text)
    assert store.match(text) is longer
    assert len(store) == 2


def test_what_was_used_longest_ago_goes_first_and_parents_stay() -> None:
    model = llama()
    texts = [tokens(1, 10, seed)[0].tolist() for seed in range(4)]
    size = PrefixStore(model).prefill(texts[0]).held_bytes
    store = PrefixStore(model, budget=3 * size)
    first, second, child = (store.prefill(t) for t in (texts[0], texts[1], texts[0] + texts[2]))
    assert store.match(texts[1]) is second
    third = store.prefill(texts[3])
    assert list(store) == [first, second, third], "the child of the first went, as a leaf"
    assert store.ledger.total() == 3 * size == store.ledger.peak()
    with relayed(model, first):
        store.prefill(texts[0] + texts[2])
        assert store.match(texts[0]) is first
        assert store.match(texts[1]) is None
    assert child not in list(store)


def test_a_prefix_that_never_fits_evicts_nothing(model: Any) -> None:
    text = tokens(1, 60)[0].tolist()
    store = PrefixStore(model, budget="20KiB")
    store.prefill(text[:6])
    with pytest.raises(BudgetExceeded, match="prefix in the making"):
        store.prefill(text[1:])
    assert len(store) == 1
    with relayed(model, store.match(text)), pytest.raises(InvalidKnob, match="in use"):
        store.forget(store.match(text))
    store.forget(store.match(text))
    assert len(store) == store.ledger.total() == 0


def test_the_budget_holds_while_a_prefix_is_made(model: Any) -> None:
    store = PrefixStore(model, chunk=4)
    store.prefill(tokens(1, 40)[0])
    peak = store.ledger.peak()
    again = PrefixStore(model, budget=peak, chunk=4)
    again.prefill(tokens(1, 40)[0])
    with pytest.raises(BudgetExceeded):
        PrefixStore(model, budget=peak - 1, chunk=4).prefill(tokens(1, 40)[0])


def test_a_store_comes_back_from_disk_bit_for_bit(model: Any, tmp_path: Path) -> None:
    text, row = tokens(1, 21)[0], requests((4,))[0]
    store = PrefixStore(model)
    store.prefill(text[:9])
    made = store.prefill(text)
    store.save(tmp_path / "prefixes")
    back = PrefixStore(model)
    back.prefill(text[:9])
    assert back.load(tmp_path / "prefixes") == 1
    assert back.load(tmp_path / "prefixes") == 0
    held = back.match(text)
    assert held is not None
    assert held.key == made.key
    assert held.parent is back.match(text[:9])
    assert back.ledger.total() == store.ledger.total()
    outs = []
    for one in (made, held):
        with relayed(model, one) as cache:
            outs.append(stepped(model, cache, row[None])[1])
    assert torch.equal(*outs)


def test_loading_evicts_what_was_used_longest_ago_but_no_parent_of_what_comes(
    tmp_path: Path,
) -> None:
    model, path = llama(), tmp_path / "prefixes"
    text, other = (tokens(1, 20, seed)[0].tolist() for seed in (1, 2))
    store = PrefixStore(model)
    store.prefill(text[:10])
    store.prefill(text)
    store.save(path)
    back = PrefixStore(model, budget=store.ledger.total())
    parent = back.prefill(text[:10])
    back.prefill(other[:10])
    assert back.load(path) == 1
    assert back.match(other) is None
    found = back.match(text)
    assert found is not None
    assert found.parent is parent
    assert back.ledger.total() == back.ledger.peak() == store.ledger.total()


def test_a_file_of_another_model_or_with_other_tokens_is_refused(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "prefixes"
    store = PrefixStore(model)
    with pytest.raises(InvalidKnob, match="empty"):
        store.save(path)
    store.prefill(range(2, 9))
    store.save(path)
    with pytest.raises(InvalidKnob, match="another model"):
        PrefixStore(gemma()).load(path)
    with pytest.raises(BudgetExceeded):
        PrefixStore(model, budget=100).load(path)

    with safe_open(path, "pt") as file:
        meta = file.metadata()
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(held, path, meta | {"about": meta["about"].replace("[2, 3", "[2, 4")})
    with pytest.raises(StoreCorrupt, match="tokens"):
        PrefixStore(model).load(path)
    save_file(dict(list(held.items())[1:]), path, meta)
    with pytest.raises(StoreCorrupt, match="missing"):
        PrefixStore(model).load(path)
    save_file(held, path, {"format": "other"})
    with pytest.raises(StoreCorrupt, match="no saved prefixes"):
        PrefixStore(model).load(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(StoreCorrupt, match="no saved prefixes"):
        PrefixStore(model).load(path)


# --- what is refused


def test_a_prefix_of_other_weights_is_refused(model: Any) -> None:
    store = PrefixStore(model)
    held = store.prefill(range(2, 9))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(InvalidKnob, match="another model"), relayed(model, held):
        pass
    with pytest.raises(InvalidKnob, match="weights have changed"):
        store.prefill(range(2, 12))


def test_padding_between_tokens_is_refused_and_behind_them_is_not(model: Any) -> None:
    prefix, ids = tokens(1, 11)[0], tokens(1, 6)
    with relayed(model, PrefixStore(model).prefill(prefix)) as cache, torch.no_grad():
        for mask in ([1, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1]):
            with pytest.raises(InvalidKnob, match="pad on the left"):
                model(ids, attention_mask=torch.tensor([mask]), past_key_values=cache)
        behind = torch.tensor([[1, 1, 1, 1, 0, 0]])
        found = model(ids, attention_mask=behind, past_key_values=cache).logits[:, :4]
        with pytest.raises(InvalidKnob, match="pad on the left"):
            model(
                ids[:, :1],
                attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0, 1]]),
                past_key_values=cache,
            )
        whole = model(torch.cat([prefix, ids[0, :4]])[None]).logits[:, -4:]
    torch.testing.assert_close(found, whole, atol=EXACT, rtol=0)


def test_a_cache_outside_its_block_is_refused(model: Any) -> None:
    with relayed(model, None) as cache:
        pass
    with pytest.raises(MemwiseError, match="inside `with relayed"):
        model(tokens(1, 3), past_key_values=cache)


def test_texts_beyond_the_length_of_the_model_are_refused() -> None:
    model = llama()
    model.config.max_position_embeddings = 12
    held = PrefixStore(model).prefill(range(2, 12))
    with relayed(model, held) as cache, pytest.raises(InvalidKnob, match="13 tokens"):
        model(tokens(1, 3), past_key_values=cache)


def test_bad_knobs_are_refused() -> None:
    with pytest.raises(InvalidKnob, match="n_rows=0"):
        RelayAttention(n_rows=0)
    with pytest.raises(InvalidKnob, match="chunk=0"):
        PrefixStore(llama(), chunk=0)
    with pytest.raises(InvalidKnob, match="no tokens"):
        PrefixStore(llama()).prefill([])
    with pytest.raises(InvalidKnob, match="not in this store"):
        PrefixStore(llama()).forget(Prefix("", "", None, (1,), ()))
