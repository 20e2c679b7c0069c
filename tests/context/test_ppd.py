"""Guesses that are verified as a tree: the same text in fewer passes, and prompts that learn."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.context.conftest import gemma, llama, tokens  # noqa: E402

from memwise.context.engine import prompts as chains  # noqa: E402
from memwise.context.engine.draft import Drafter, DraftTree, fastest  # noqa: E402
from memwise.context.engine.prefix import PrefixStore  # noqa: E402
from memwise.context.engine.relay import RelayHost  # noqa: E402
from memwise.context.policies.plain_decoding import PlainDecoding  # noqa: E402
from memwise.context.policies.ppd import PPD  # noqa: E402
from memwise.errors import InvalidKnob  # noqa: E402

EXACT = 1e-12
HITS = torch.tensor([[0.5, 0.2, 0.1], [0.4, 0.1, 0.0], [0.3, 0.2, 0.1]])
SMALL = PPD(n_nodes=4, n_ranks=3, n_steps=3, n_places=4)


@torch.no_grad()
def ordinary(model: Any, ids: list[int], n_tokens: int) -> list[int]:
    """Greedy tokens, each by a plain pass over the whole text."""
    text = torch.tensor([ids])
    for _ in range(n_tokens):
        chosen = model(text, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, chosen], 1)
    return text[0, len(ids) :].tolist()


def prompts_for(model: Any, n_prompts: int = 3) -> Any:
    return chains.untrained(RelayHost(model), n_prompts, seed=0)


class Knowing(Drafter):
    """Guesses some of the tokens that will come, at ranks that change."""

    def know(self, text: list[int], n_before: int) -> Knowing:
        self.text, self.n_before, self.passes = text, n_before, 0
        return self

    def _pass(self, cache: Any, token: int, guesses: Any) -> Any:
        at = cache.n_seen - self.n_before  # of the current token in the text
        assert self.text[at] == token
        wanted = [
            [0, 0, 0] if at + depth >= len(self.text) else [0, 0, self.text[at + depth]]
            for depth in (1, 2, 3)
        ]
        for depth, guess in enumerate(wanted):
            if (self.passes + depth) % 4 != 3:  # every now and then none is right
                guess[(self.passes * (depth + 1)) % 3] = guess[2]
        self.passes += 1
        return super()._pass(cache, token, wanted)


# --- the tree


def test_the_best_tree_is_the_best_of_all_trees() -> None:
    paths = {
        ranks: float(torch.tensor([HITS[depth, rank] for depth, rank in enumerate(ranks)]).prod())
        for n in (1, 2, 3)
        for ranks in product(range(3), repeat=n)
    }
    for n_nodes in (1, 2, 5, 9, 16):
        tree = DraftTree.best(HITS, n_nodes)
        best = sum(sorted(paths.values(), reverse=True)[: n_nodes - 1])
        assert len(tree.parents) == n_nodes
        assert tree.expected(HITS) == pytest.approx(1 + best, abs=1e-6)


def test_a_tree_has_no_node_twice_and_none_without_its_parent() -> None:
    tree = DraftTree.best(HITS, 30)
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert len(set(zip(tree.parents, tree.ranks, strict=True))) == len(tree.parents)


def test_each_token_of_a_pass_sees_its_ancestors_and_no_other() -> None:
    tree = DraftTree((-1, 0, 0, 1), (0, 0, 1, 0))
    at, sees = tree.layout(2)
    assert at.tolist() == [0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4]
    seen = [row.nonzero().flatten().tolist() for row in sees]
    assert seen[:4] == [[0], [0, 1], [0, 2], [0, 1, 3]]
    assert seen[4:8] == [[0, 4], [0, 4, 5], [0, 1, 6], [0, 1, 6, 7]]
    assert seen[10:] == [[0, 1, 3, 10], [0, 1, 3, 10, 11]]


def test_the_longest_path_of_the_models_own_choices_is_accepted() -> None:
    tree = DraftTree((-1, 0, 0, 2, 3, 1), (0, 0, 1, 0, 0, 0))
    guessed = [9, 1, 2, 3, 4, 5]
    assert tree.accepted(guessed, [2, 0, 3, 4, 7, 0]) == [0, 2, 3, 4]
    assert tree.accepted(guessed, [2, 0, 8, 4, 7, 0]) == [0, 2]
    assert tree.accepted(guessed, [6, 0, 3, 4, 7, 0]) == [0]


def test_the_fastest_size_has_the_most_tokens_a_second() -> None:
    assert fastest({1: 1.0, 2: 1.1, 4: 2.0}, {1: 1.0, 2: 1.4, 4: 2.1}) == 2
    assert fastest({1: 1.0, 2: 2.0}, {1: 1.0, 2: 1.9}) == 1


# --- decoding


@pytest.mark.parametrize("n_nodes", [1, 2, 9])
def test_the_text_is_that_of_ordinary_decoding(model: Any, n_nodes: int) -> None:
    ids = tokens(1, 11)[0].tolist()
    wanted = ordinary(model, ids, 40)
    drafter = Drafter(model, prompts_for(model), DraftTree.best(HITS, n_nodes))
    found = drafter.generate(ids, 40)
    assert list(found.tokens) == wanted
    assert sum(found.accepted) == 39


def test_right_guesses_save_passes_and_leave_the_text_as_it_is(model: Any) -> None:
    ids = tokens(1, 11)[0].tolist()
    wanted = ordinary(model, ids, 60)
    tree = DraftTree.best(torch.full((3, 3), 0.3), 30)
    drafter = Knowing(model, prompts_for(model), tree).know(wanted, len(ids))
    found = drafter.generate(ids, 60)
    assert list(found.tokens) == wanted
    assert len(set(found.accepted)) > 2
    assert found.per_pass > 1.8


def test_it_goes_on_behind_a_prefix(model: Any) -> None:
    ids = tokens(1, 20)[0].tolist()
    wanted = ordinary(model, ids, 30)
    held = PrefixStore(model).prefill(ids[:15])
    drafter = Knowing(model, prompts_for(model), DraftTree.best(HITS, 9)).know(wanted, 5)
    found = drafter.generate(ids[15:], 30, prefix=held)
    assert list(found.tokens) == wanted
    assert found.per_pass > 1.2


def test_a_stop_token_ends_the_text_also_within_a_pass(model: Any) -> None:
    ids = tokens(1, 11)[0].tolist()
    wanted = ordinary(model, ids, 30)
    for stop in set(wanted):
        tree = DraftTree.best(torch.full((3, 3), 0.3), 30)
        drafter = Knowing(model, prompts_for(model), tree).know(wanted, len(ids))
        found = drafter.generate(ids, 30, stop={stop})
        assert list(found.tokens) == wanted[: wanted.index(stop) + 1]


def test_plain_decoding_is_one_token_a_pass(model: Any) -> None:
    ids = tokens(1, 11)[0].tolist()
    found = PlainDecoding()(model).generate(ids, 20)
    assert list(found.tokens) == ordinary(model, ids, 20)
    assert set(found.accepted) == {1}


# --- prompts


def test_outputs_of_prompts_are_those_of_a_plain_pass_with_them_behind_the_text(
    model: Any,
) -> None:
    host, ids = RelayHost(model), tokens(1, 20)[0].tolist()
    prompts = prompts_for(model)
    text = chains.read(host, ids)
    found = chains.outputs(host, text, torch.tensor([3, 17, 9]), prompts)
    embed = model.get_input_embeddings()
    for place, own in zip([3, 17, 9], found, strict=True):
        embeds = torch.cat([embed(torch.tensor([ids[: place + 1]])), prompts[None]], 1)
        with torch.no_grad():
            whole = host.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        torch.testing.assert_close(own, whole[0, -3:], atol=EXACT, rtol=0)


def test_a_tree_pass_guesses_what_training_sees(model: Any) -> None:
    ids = tokens(1, 12)[0].tolist()
    drafter = Drafter(model, prompts_for(model), DraftTree.best(HITS, 9))
    host = drafter.host
    new = list(drafter.generate(ids, 2).tokens)
    text = chains.read(host, [*ids, *new])
    hidden = chains.outputs(host, text, torch.tensor([len(ids)]), drafter.prompts)
    with torch.no_grad():
        wanted = host.head(hidden[0]).topk(3, -1).indices.tolist()
    seen: list[Any] = []

    class Watched(Drafter):
        def _guesses(self, hidden: Any) -> Any:
            seen.append(super()._guesses(hidden))
            return seen[-1]

    Watched(model, drafter.prompts, drafter.tree).generate(ids, 2)
    assert seen[1] == wanted


def test_training_draws_prompts_to_what_the_model_says_later_and_leaves_the_model(
    model: Any,
) -> None:
    host = RelayHost(model)
    texts = [tokens(1, 24, seed)[0].tolist() for seed in range(4)]
    before = [param.detach().clone() for param in model.parameters()]
    losses: list[float] = []

    def told(what: str, share: float) -> None:
        losses.append(float(what.rpartition(" ")[2]))

    start = prompts_for(model)
    found = chains.trained(
        host, texts, start, n_steps=60, n_places=20, lr=0.1, decay=0.8, seed=0, progress=told
    )
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert not torch.equal(found, start)
    for param, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, was)
        assert param.grad is None


def test_ranks_and_hits_agree_with_a_naive_count(model: Any) -> None:
    host, prompts = RelayHost(model), prompts_for(model, 2)
    text = chains.read(host, [5, 9, 17, *ordinary(model, [5, 9, 17], 20)])
    places = torch.arange(4, 15)
    found = chains.ranks(host, text, places, prompts)
    for place, own in zip(places.tolist(), found, strict=True):
        hidden = chains.outputs(host, text, torch.tensor([place]), prompts)[0]
        for i in range(2):
            with torch.no_grad():
                wanted = int(host.head(text.hidden[place + 1 + i]).argmax())
                order = host.head(hidden[i]).argsort(descending=True).tolist()
            assert order.index(wanted) == own[i]
    # In its own greedy text every place counts, so all ranks together are all places.
    table = chains.hits(host, [text], prompts, 61, 11)
    torch.testing.assert_close(table.sum(1), torch.ones(2))


def test_the_method_trains_measures_and_decodes(model: Any) -> None:
    texts = [tokens(1, 16, seed)[0].tolist() for seed in range(5)]
    drafter = SMALL(model, texts)
    assert len(drafter.tree.parents) in SMALL.sizes == [1, 2, 4]
    ids = texts[0]
    assert list(drafter.generate(ids, 12).tokens) == ordinary(model, ids, 12)


# --- what is refused


def test_bad_knobs_are_refused() -> None:
    with pytest.raises(InvalidKnob, match="n_prompts=0"):
        PPD(n_prompts=0)
    with pytest.raises(InvalidKnob, match="lr=0"):
        PPD(lr=0)
    with pytest.raises(InvalidKnob, match="decay=2"):
        PPD(decay=2)


def test_texts_beyond_the_length_of_the_model_are_refused() -> None:
    model = llama()
    model.config.max_position_embeddings = 12
    drafter = Drafter(model, prompts_for(model), DraftTree.best(HITS, 9))
    assert len(drafter.generate(range(2, 12), 3).tokens) == 3
    with pytest.raises(InvalidKnob, match="13 tokens"):
        drafter.generate(range(2, 12), 4)


def test_what_cannot_work_is_refused() -> None:
    model = llama()
    with pytest.raises(InvalidKnob, match="32 wide"):
        Drafter(model, torch.zeros(2, 5))
    with pytest.raises(InvalidKnob, match="as many prompts"):
        Drafter(model, torch.zeros(1, 32), DraftTree((-1, 0, 1), (0, 0, 0)))
    with pytest.raises(InvalidKnob, match="no token"):
        PlainDecoding()(model).generate([], 3)
    with pytest.raises(InvalidKnob, match="1 texts"):
        SMALL(gemma(), [[2, 3, 4, 5, 6, 7]])
    with pytest.raises(InvalidKnob, match="more than 4 tokens"):
        SMALL(model, [[2, 3, 4], [2, 3, 4]])
