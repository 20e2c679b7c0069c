"""Guesses of the next tokens, verified many at once: fewer passes, and the same greedy text.

A pass holds the current token, a tree of guesses of what follows it, and behind each of them a
chain of prompts: trained embeddings in the place of tokens, whose outputs guess what comes after
the next token. Each token sees its ancestors only. The longest path that the model would have
chosen itself is accepted, the rows of all else leave the cache, and the chain behind the last
accepted token has the next guesses.

Shapes: n nodes of the tree, m prompts of a chain, q = n + n m tokens of a pass, E embedding width.
"""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import nn

from memwise.context.engine.relay import Pass, Prefix, RelayCache, RelayHost
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class DraftTree:
    """Which guesses are tried together: a node is a rank among the guesses of its depth.

    Attributes:
        parents: of each node, all before it; -1 for the first, which is the current token.
        ranks: of each node among the guesses of its depth, from 0; of no meaning for the first.
    """

    parents: tuple[int, ...] = (-1,)
    ranks: tuple[int, ...] = (0,)

    @classmethod
    def best(cls, hits: Tensor, n_nodes: int) -> DraftTree:
        """The tree of so many nodes that is expected to have the most accepted.

        Args:
            hits: (m, k), how often the guess of a rank is right at each depth after the first.
            n_nodes: the current token included.
        """
        table: list[list[float]] = hits.tolist()
        parents, ranks, depths = [-1], [0], [0]
        # The likeliest path first; its next sibling and its first child come after it.
        waiting = [(-table[0][0], 0, 0)] if table and table[0] else []
        while waiting and len(parents) < n_nodes:
            negative, parent, rank = heapq.heappop(waiting)
            node, depth = len(parents), depths[parent] + 1
            parents.append(parent)
            ranks.append(rank)
            depths.append(depth)
            row = table[depth - 1]
            if rank + 1 < len(row) and row[rank] > 0:
                sibling = negative / row[rank] * row[rank + 1]
                heapq.heappush(waiting, (sibling, parent, rank + 1))
            if depth < len(table):
                heapq.heappush(waiting, (negative * table[depth][0], node, 0))
        return cls(tuple(parents), tuple(ranks))

    def expected(self, hits: Tensor) -> float:
        """Tokens of a pass that are accepted, the model's own next one included."""
        reached = [1.0]
        for node in range(1, len(self.parents)):
            own = float(hits[self.depths[node] - 1, self.ranks[node]])
            reached.append(reached[self.parents[node]] * own)
        return sum(reached)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Tokens between the current one and each node, that one included."""
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent < 0 else found[parent] + 1)
        return tuple(found)

    def layout(self, n_prompts: int) -> tuple[Tensor, Tensor]:
        """Distances (q,) from the current token, and who sees whom (q, q); nodes come first."""
        n = len(self.parents)
        q = n + n * n_prompts
        at, sees = torch.zeros(q, dtype=torch.long), torch.eye(q, dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            at[node] = self.depths[node]
            if parent >= 0:
                sees[node] |= sees[parent]
            before = node
            for i in range(n_prompts):
                own = n + node * n_prompts + i
                at[own] = at[before] + 1
                sees[own] |= sees[before]
                before = own
        return at, sees

    def accepted(self, tokens: Sequence[int], chosen: Sequence[int]) -> list[int]:
        """The nodes from the first on whose tokens the model would have chosen itself.

        Args:
            tokens: of each node.
            chosen: what the model says after each node.
        """
        path = [0]
        for node in range(1, len(self.parents)):
            if self.parents[node] == path[-1] and tokens[node] == chosen[path[-1]]:
                path.append(node)
        return path


@dataclass(frozen=True)
class Drafted:
    """A greedy text and what it took.

    Attributes:
        tokens: new ones.
        accepted: of each pass after the first, how many tokens it gave.
    """

    tokens: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def per_pass(self) -> float:
        """Tokens of a pass; ordinary decoding has 1."""
        return statistics.fmean(self.accepted) if self.accepted else 1.0


class Drafter:
    """Greedy decoding with guesses; the text is that of ordinary decoding, token for token.

    Args:
        model: as for `bounded`: decoder-only, with rotary positions.
        prompts: (m, E), trained embeddings.
        tree: which guesses are tried together.

    Raises:
        UnsupportedModel: a model of another kind.
        InvalidKnob: the tree is deeper than there are prompts, or prompts are of another width.
    """

    def __init__(self, model: nn.Module, prompts: Tensor, tree: DraftTree | None = None) -> None:
        self.host = RelayHost(model)
        self.tree = tree or DraftTree()
        weight = self.host.model.get_input_embeddings().weight
        if prompts.shape[1:] != weight.shape[1:]:
            raise InvalidKnob(
                f"prompts of shape {tuple(prompts.shape)}: this model's are {weight.shape[1]} wide"
            )
        if max(self.tree.depths) > len(prompts):
            raise InvalidKnob(
                f"a tree of depth {max(self.tree.depths)} needs as many prompts, and there are "
                f"{len(prompts)}"
            )
        self.prompts = prompts.detach().to(weight)
        at, sees = self.tree.layout(len(prompts) if len(self.tree.parents) > 1 else 0)
        self._at, self._sees = at.to(weight.device), sees.to(weight.device)

    @torch.no_grad()
    def generate(
        self, ids: Sequence[int], max_tokens: int, stop: Collection[int] = (),
        prefix: Prefix | None = None,
    ) -> Drafted:  # fmt: skip
        """Continue tokens greedily.

        Args:
            ids: at least one token.
            max_tokens: upper bound on new tokens.
            stop: tokens that end the text and are its last.
            prefix: what the tokens stand behind.
        """
        if not len(ids):
            raise InvalidKnob("there is no token to go on from")
        cache = RelayCache(self.host, prefix)
        with self.host.installed(), cache.pinned():
            token, guesses = self._begin(cache, ids)
            out, accepted = [token], []
            while len(out) < max_tokens and out[-1] not in stop:
                new, guesses = self._pass(cache, out[-1], guesses)
                end = next((i + 1 for i, token in enumerate(new) if token in stop), len(new))
                new = new[: min(end, max_tokens - len(out))]
                accepted.append(len(new))
                out += new
        return Drafted(tuple(out[:max_tokens]), tuple(accepted))

    @torch.no_grad()
    def seconds(self, ids: Sequence[int], n_passes: int = 7) -> float:
        """Median time of a pass behind these tokens, whatever is accepted."""
        cache = RelayCache(self.host, None)
        taken = []
        with self.host.installed():
            token, guesses = self._begin(cache, ids)
            for _ in range(n_passes + 1):
                began = time.perf_counter()
                new, guesses = self._pass(cache, token, guesses)
                taken.append(time.perf_counter() - began)
                token = new[-1]
        return statistics.median(taken[1:])

    def _begin(self, cache: RelayCache, ids: Sequence[int]) -> tuple[int, list[list[int]]]:
        """Take the text in, with a chain of prompts behind it."""
        n = len(ids)
        n_prompts = len(self.prompts) if len(self.tree.parents) > 1 else 0
        at = torch.arange(n + n_prompts, device=self.host.device)
        hidden = self._run(cache, list(ids), self.prompts[:n_prompts], at, None)
        cache.keep(at[:n], n + n_prompts)
        chosen = int(self.host.head(hidden[:, n - 1]).argmax(-1))
        return chosen, self._guesses(hidden[0, n:])

    def _pass(
        self, cache: RelayCache, token: int, guesses: list[list[int]]
    ) -> tuple[list[int], list[list[int]]]:
        """Tokens that are accepted and the one after them, and the next guesses."""
        tree, n = self.tree, len(self.tree.parents)
        nodes = zip(tree.depths[1:], tree.ranks[1:], strict=True)
        tokens = [token, *(guesses[depth - 1][rank] for depth, rank in nodes)]
        chains = self.prompts.repeat(n, 1) if n > 1 else self.prompts[:0]
        hidden = self._run(cache, tokens, chains, self._at + cache.n_seen, self._sees)
        chosen: list[int] = self.host.head(hidden[:, :n])[0].argmax(-1).tolist()
        path = tree.accepted(tokens, chosen)
        cache.keep(torch.tensor(path, device=self.host.device), len(self._at))
        # Only what was accepted needs its guesses, so the others never see the output layer.
        m = len(chains) // n
        first = n + path[-1] * m
        new = [*(tokens[node] for node in path[1:]), chosen[path[-1]]]
        return new, self._guesses(hidden[0, first : first + m])

    def _run(
        self, cache: RelayCache, tokens: list[int], prompts: Tensor, at: Tensor, sees: Tensor | None
    ) -> Tensor:
        """Hidden states (1, q, E) of tokens and prompts at places (q,) behind the prefix."""
        # Guesses may lie beyond the model's length: they are not part of the text yet.
        self.host.check_reach(cache.n_prefix + int(at[0]) + (len(tokens) if sees is None else 1))
        ids = torch.tensor([tokens], device=self.host.device)
        embeds = torch.cat([self.host.model.get_input_embeddings()(ids), prompts[None]], 1)
        positions = (cache.n_prefix + at)[None]
        part = Pass(cache, positions, positions, sees)
        out: Any = self.host.run(part, input_ids=None, inputs_embeds=embeds, use_cache=True)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _guesses(self, hidden: Tensor) -> list[list[int]]:
        """The likeliest tokens of each depth, as many as the tree asks for."""
        if not len(hidden):
            return []
        most = max(self.tree.ranks) + 1
        guesses: list[list[int]] = self.host.head(hidden).topk(most, -1).indices.tolist()
        return guesses


def fastest(seconds: Mapping[int, float], accepted: Mapping[int, float]) -> int:
    """The size of a tree, from 1 = no guesses, that gives the most tokens a second.

    Args:
        seconds: of a pass, by the size of its tree.
        accepted: tokens of a pass, by the same.
    """
    return max(seconds, key=lambda size: (accepted[size] / seconds[size], -size))
