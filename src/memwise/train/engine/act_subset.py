"""Fewer tokens a block: what is left out takes the residual path, and leaves nothing behind.

Which tokens go through a block is decided before it runs, by a small predictor of how much
attention each of them will receive. It looks at means of neighbouring tokens through two narrow
projections, and learns from attention that was recorded once.

Shapes: B batch, T tokens, K kept tokens, H heads, D width, R rank, P tokens in a group, N groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memwise.budget import Budget
from memwise.errors import InvalidKnob, UnsupportedModel
from memwise.train.engine.act_actions import Planned, Run, Wrap
from memwise.train.engine.act_hooks import Hooks, Spot
from memwise.train.engine.activations import ActivationPolicy, Site
from memwise.train.engine.tokens import TokenGate

Score = Callable[[Tensor], Tensor]  # (B, T, D) -> (B, T)


@dataclass(frozen=True, eq=False)
class TokenSubset(Wrap):
    """Runs a block on the tokens of highest score; all of them where no gradient is recorded.

    Attributes:
        score: says of each token of the block's input how much it matters.
        keep_ratio: share of the tokens that are kept.
    """

    score: Score
    keep_ratio: float

    def __post_init__(self) -> None:
        """Refuses shares that keep nothing or more than there is."""
        if not 0 < self.keep_ratio <= 1:
            raise InvalidKnob(f"keep_ratio={self.keep_ratio!r}: keep a share in (0, 1] of tokens")

    def wrap(self, module: nn.Module, run: Run, spot: Spot, hooks: Hooks) -> Run:
        """The block on fewer tokens, which keep their order and bring their positions along."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = _first(args, kwargs, spot.name)
            n_kept = max(1, round(self.keep_ratio * x.shape[1]))
            if not torch.is_grad_enabled() or n_kept == x.shape[1]:
                return run(*args, **kwargs)
            with torch.no_grad():
                gate = TokenGate.best(self.score(x), n_kept)
            y = run(*_kept(args, gate, x), **_kept(kwargs, gate, x))
            if isinstance(y, tuple):
                return gate.scatter(x, y[0]), *y[1:]
            return gate.scatter(x, y)

        return forward

    def __str__(self) -> str:
        return f"{self.keep_ratio:g} of tokens"


@dataclass(frozen=True)
class Subsets(ActivationPolicy):
    """Blocks that run on fewer tokens, each on a share of its own.

    Attributes:
        of: name of a block -> which tokens, and how many.
    """

    of: Mapping[str, TokenSubset]

    def plan(self, sites: Sequence[Site], budget: Budget | None) -> Mapping[str, Planned]:
        """The same for every batch."""
        return dict(self.of)


class Predictor(nn.Module):
    """Shares of the attention that tokens will receive, from the input of a block.

    Args:
        width: D.
        rank: R.
        pool: P.
        generator: of the initial weights, on the host.
    """

    def __init__(self, width: int, rank: int, pool: int, generator: torch.Generator) -> None:
        super().__init__()
        self.pool = pool
        # With the bias a key can matter whatever asks for it.
        self.query, self.key = nn.Linear(width, rank), nn.Linear(width, rank, bias=False)
        nn.init.zeros_(self.query.bias)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=width**-0.5, generator=generator)

    def groups(self, x: Tensor) -> Tensor:
        """Shares (B, N) of P tokens each; they sum to 1."""
        means = pooled(F.layer_norm(x.float(), x.shape[-1:]), self.pool) / self.pool  # (B, N, D)
        q, k = self.query(means), self.key(means)
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5  # (B, N, N)
        n = scores.shape[-1]
        later = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(later, float("-inf")).softmax(-1).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, T): tokens of a group share theirs."""
        return self.groups(x).repeat_interleave(self.pool, 1)[:, : x.shape[1]]


def pooled(x: Tensor, pool: int) -> Tensor:
    """Sums (B, N, ...) over groups of neighbouring tokens of (B, T, ...); the last may be short."""
    short = -x.shape[1] % pool
    if short:
        x = torch.cat([x, x.new_zeros(x.shape[0], short, *x.shape[2:])], 1)
    return x.unflatten(1, (-1, pool)).sum(2)


# --- what predictors learn from


@dataclass(frozen=True)
class Record:
    """One block in one forward pass.

    Attributes:
        x: (B, T, D), its input.
        received: (B, T), the share of all attention that each token received; sums to 1.
    """

    x: Tensor
    received: Tensor


class _Received(TorchFunctionMode):
    """Adds up the attention that tokens receive, over heads, queries and calls."""

    def __init__(self) -> None:
        super().__init__()
        self.total: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self._add(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _add(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query @ key.transpose(-2, -1)).float() * scale  # (B, H, T, T)
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        received = scores.softmax(-1).sum((1, 2))  # (B, T)
        self.total = received if self.total is None else self.total + received


@torch.no_grad()
def recorded(model: nn.Module, blocks: Sequence[str], batch: Any) -> dict[str, Record]:
    """The attention that tokens receive in each block, for one batch.

    Args:
        model: called on the batch.
        blocks: their names.
        batch: the model's input; a mapping is given as named arguments.

    Raises:
        UnsupportedModel: a block has no `scaled_dot_product_attention`.
    """
    found: dict[str, Record] = {}
    inputs: dict[str, Tensor] = {}
    mode = _Received()

    def begins(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[name], mode.total = _first(args, kwargs, name).detach(), None

        return hook

    def ends(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if mode.total is None:
                raise UnsupportedModel(
                    f"{name} calls no scaled_dot_product_attention: which of its tokens matter "
                    'cannot be seen; load the model with attn_implementation="sdpa"'
                )
            received = mode.total / mode.total.sum(1, keepdim=True)
            found[name] = Record(inputs.pop(name), received)

        return hook

    modules = dict(model.named_modules())
    handles = []
    for name in blocks:
        handles.append(modules[name].register_forward_pre_hook(begins(name), with_kwargs=True))
        handles.append(modules[name].register_forward_hook(ends(name)))
    try:
        with mode:
            _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def learn(predictor: Predictor, records: Sequence[Record], n_steps: int, lr: float = 0.01) -> None:
    """Fit a predictor to recorded shares, by the divergence of its own from them."""
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)
    with torch.enable_grad():
        for step in range(n_steps):
            one = records[step % len(records)]
            wanted = pooled(one.received, predictor.pool)
            guess = predictor.groups(one.x).clamp_min(1e-9).log()
            optimizer.zero_grad()
            F.kl_div(guess, wanted, reduction="batchmean").backward()
            optimizer.step()
    predictor.requires_grad_(False)


def recall(predictor: Predictor, record: Record, keep_ratio: float) -> float:
    """Which part of the groups that receive most attention are among those chosen."""
    wanted = pooled(record.received, predictor.pool)
    k = max(1, round(keep_ratio * wanted.shape[1]))
    best = wanted.topk(k, 1).indices
    mine = predictor.groups(record.x).topk(k, 1).indices
    hits = (best[:, :, None] == mine[:, None]).any(-1)
    return float(hits.float().mean())


# --- how many tokens each block needs


def shares(
    records: Mapping[str, Sequence[Record]], keep_ratio: float, pool: int
) -> dict[str, float]:
    """Shares of groups a block, `keep_ratio` in the mean, that hold as much attention in each.

    Args:
        records: of each block.
        keep_ratio: of all blocks together.
        pool: tokens in a group.
    """
    covered = {name: _covered(found, pool) for name, found in records.items()}

    def needed(mass: float) -> dict[str, float]:
        """Shares of groups with which each block covers this part of its attention."""
        return {
            name: float(torch.searchsorted(by, mass) + 1) / len(by) for name, by in covered.items()
        }

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if sum(needed(middle).values()) <= keep_ratio * len(covered):
            low = middle
        else:
            high = middle
    return {name: min(1.0, share) for name, share in needed(low).items()}


def _covered(records: Sequence[Record], pool: int) -> Tensor:
    """Attention (N,) that the 1, 2, ... N groups of most attention receive, in the mean."""
    sums = torch.cat([pooled(one.received, pool) for one in records])
    return sums.sort(1, descending=True).values.mean(0).cumsum(0)


def _call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _first(args: Any, kwargs: Mapping[str, Any], name: str) -> Tensor:
    x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
    if x is None or x.ndim != 3:
        raise UnsupportedModel(
            f"{name} takes {'no tensor' if x is None else tuple(x.shape)}: tokens can be left out "
            "of blocks whose first input is (batch, tokens, width)"
        )
    return x


def _kept(value: Any, gate: TokenGate, x: Tensor) -> Any:
    """Arguments of the kept tokens: positions (B or 1, T, ...) and masks (..., T, T) too."""
    b, t = x.shape[:2]
    if isinstance(value, Tensor):
        if value.ndim == 4 and value.shape[-2:] == (t, t):
            index = gate.kept[:, None]  # (B, 1, K)
            rows = value.expand(b, -1, -1, -1).gather(
                2, index[..., None].expand(b, value.shape[1], -1, t)
            )
            return rows.gather(3, index[:, :, None].expand(*rows.shape[:3], -1))
        if value.ndim > 1 and value.shape[1] == t and value.shape[0] in (1, b):
            return gate.gather(value.expand(b, *value.shape[1:]))
        return value
    if isinstance(value, Mapping):
        return {name: _kept(item, gate, x) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_kept(item, gate, x) for item in value)
    return value
