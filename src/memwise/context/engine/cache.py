"""A KV cache inside a byte budget, and one forward pass through it.

Tokens are written into preallocated slots. When the next ones do not fit, the policy says which
slots stay. The cache reports how many tokens it has ever seen, so that positions go on rightly.

Shapes: B batch, H key-value heads, n slots, q tokens of a forward pass, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers.cache_utils import Cache

from memwise.budget import Budget, Ledger
from memwise.context.engine import attention, saved
from memwise.context.engine.layers import BoundedLayer, SlotLayer, WindowLayer
from memwise.context.engine.plan import FULL, Allocator, Plan, plan
from memwise.context.engine.policy import CachePolicy
from memwise.context.engine.report import Report, report
from memwise.context.engine.step import Step
from memwise.context.engine.store import EMPTY
from memwise.errors import InvalidKnob

if TYPE_CHECKING:
    from memwise.context.engine.host import Host

Tensor: TypeAlias = torch.Tensor

_LOGIT_ROWS = 16  # tokens of which logits exist at once


@dataclass
class Forward:
    """One pass of a few tokens through the model.

    Attributes:
        cache: that it writes to.
        ids: tokens (B, q).
        positions: (B, q), as the model turns keys and queries.
        slots_at: the same, `EMPTY` where there is padding.
        is_probe: what it writes is forgotten again.
        new_turn: the first pass of a turn of a dialogue.
        hidden: what the decoder made of the tokens (B, q, width), once it has.
        queries: of the tokens (B, Hq, q, D), turned, by layer, for policies that need inputs.
    """

    cache: BudgetedCache
    ids: Tensor
    positions: Tensor
    slots_at: Tensor
    is_probe: bool = False
    new_turn: bool = False
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    queries: dict[int, Tensor] = field(default_factory=dict)
    _kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def has_padding(self) -> bool:
        """Some of the tokens are padding."""
        return self._once("padding", lambda: bool((self.slots_at == EMPTY).any()))

    def causal(self, n_old: int) -> Tensor:
        """Mask (1, 1, q, n) for so many older slots."""
        n_new, device = self.ids.shape[1], self.ids.device
        return self._once(("causal", n_old), lambda: attention.causal(n_old, n_new, device))

    def within(self, n_old: int, window: int) -> Tensor:
        """The same for a layer that looks back `window` tokens."""
        n_new, device = self.ids.shape[1], self.ids.device
        return self._once(("within", n_old), lambda: attention.within(n_old, n_new, window, device))

    def angles(self, layer_type: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, 1, q, D) of the tokens' positions."""
        cos, sin = self._once(
            layer_type, lambda: self.cache.rotary.table(self.positions, layer_type, like)
        )
        return cos[:, None], sin[:, None]

    @property
    def surprisal(self) -> Tensor:
        """-log p of each token after those before it (B, q), in nats; 0 for the first of a text."""
        return self._once("surprisal", self._surprisal)

    def _surprisal(self) -> Tensor:
        before = torch.cat([self.cache.last_hidden, self.hidden[:, :-1]], 1)
        found = torch.empty(self.ids.shape, device=self.ids.device)
        for first in range(0, before.shape[1], _LOGIT_ROWS):
            rows = slice(first, first + _LOGIT_ROWS)
            logits = self.cache.host.head(before[:, rows]).float()
            chosen = logits.gather(2, self.ids[:, rows, None])[..., 0]
            found[:, rows] = logits.logsumexp(-1) - chosen
        if self.cache.n_seen == 0:
            found[:, 0] = 0.0
        return found

    def done(self) -> Forward:
        """The same without what only its own pass needs."""
        return replace(self, hidden=torch.empty(0), queries={}, _kept={})

    def _once(self, name: Any, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


class BudgetedCache(Cache):
    """A cache for `generate(past_key_values=...)` that stays inside its budget; see `bounded`.

    Attributes:
        host: the model that it belongs to.
        policy: which slots stay.
        budget: bytes that it may take at any moment.
        chunk: most tokens that go through the model at once.
        probe: tokens that the model is shown before slots are chosen.
        n_seen: tokens that it was ever given, padding included.
        turn: number of the turn of a dialogue, from 0; -1 before the first.
        weights: what the policy was trained to know, by name.
        ledger: measured bytes, by kind.
    """

    def __init__(
        self, host: Host, policy: CachePolicy, budget: Budget, chunk: int, probe: tuple[int, ...],
        allocator: Allocator,
    ) -> None:  # fmt: skip
        self.host, self.policy, self.budget = host, policy, budget
        self.chunk, self.probe, self.allocator = chunk, probe, allocator
        self.shape, self.rotary = host.shape, host.rotary
        self.weights = {
            name: tensor.to(host.device) for name, tensor in policy.weights(host.shape).items()
        }
        self.plan = self.planned(1)
        self._forget()
        super().__init__(
            layers=[
                (SlotLayer if kind == FULL else WindowLayer)(self, index)
                for index, kind in enumerate(self.shape.layer_types)
            ]
        )

    def _forget(self) -> None:
        self.n_seen, self.turn, self.batch = 0, -1, 0
        self.forward: Forward | None = None
        self.last_hidden = torch.empty(0)
        self._last: Forward | None = None
        self._was_long = False
        self.ledger = Ledger(self.budget)

    def planned(self, batch: int) -> Plan:
        """How the budget is shared out for a batch.

        Raises:
            BudgetExceeded: it does not fit.
        """
        return plan(
            self.shape, self.policy, self.budget, self.chunk, len(self.probe), batch,
            self.allocator,
        )  # fmt: skip

    @property
    def slot_layers(self) -> list[SlotLayer]:
        """The full-attention layers, whose slots are the policy's."""
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    @property
    def bounded_layers(self) -> list[BoundedLayer]:
        """All layers."""
        return [layer for layer in self.layers if isinstance(layer, BoundedLayer)]

    # --- what users ask

    def compress(self) -> None:
        """Let go of slots now, down to the number that the budget keeps beside room for a chunk.

        Without it slots go when the next tokens do not fit, and not before.
        """
        if self.n_seen:
            self.host.choose(self)

    def report(self) -> Report:
        """What is held, in bytes and tokens; print it."""
        return report(self)

    def reset(self) -> None:
        """Forget all, for another text or another batch."""
        for layer in self.bounded_layers:
            layer.reset()
        self._forget()

    def save(self, path: str | PathLike[str]) -> None:
        """Write all that is held to a file, for `load`."""
        saved.save(self, Path(path))

    def load(self, path: str | PathLike[str]) -> None:
        """Go on where another cache was saved, token for token.

        Raises:
            InvalidKnob: it belongs to another model, policy or budget.
            StoreCorrupt: the file is not one of these.
        """
        saved.load(self, Path(path))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that going on needs: numbers, and tensors by name."""
        assert self._last is not None
        last = self._last
        tensors = {"ids": last.ids, "positions": last.positions, "slots_at": last.slots_at}
        tensors["last_hidden"] = self.last_hidden
        layers = []
        for layer in self.bounded_layers:
            numbers, own = layer.state()
            layers.append(numbers)
            tensors |= {f"{layer.index}.{name}": tensor for name, tensor in own.items()}
        numbers = {"n_seen": self.n_seen, "turn": self.turn, "was_long": self._was_long}
        return {"batch": self.batch, **numbers, "layers": layers}, tensors

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Be what `state` was taken of."""
        self.reset()
        self.open(state["batch"])
        device = self.host.device
        ids, positions, slots_at = (
            tensors[name].to(device) for name in ("ids", "positions", "slots_at")
        )
        self._last = Forward(self, ids, positions, slots_at)
        self.last_hidden = tensors["last_hidden"].to(device)
        for layer, numbers in zip(self.bounded_layers, state["layers"], strict=True):
            own = f"{layer.index}."
            named = {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}
            layer.restore(numbers, {name: tensor.to(device) for name, tensor in named.items()})
        self.n_seen, self.turn = state["n_seen"], state["turn"]
        self._was_long = state["was_long"]
        self.measure()

    # --- one forward pass; called by the host

    def open(self, batch: int) -> None:
        """Share the budget out for a batch, before its first tokens.

        Raises:
            BudgetExceeded: it does not fit.
            InvalidKnob: another batch is inside.
        """
        if self.n_seen == 0:
            self.plan, self.batch = self.planned(batch), batch
        elif batch != self.batch:
            raise InvalidKnob(
                f"this cache holds a batch of {self.batch} and {batch} rows are given: reset() it"
            )

    def begins_turn(self, n_tokens: int) -> bool:
        """Whether so many tokens begin a turn: several at once, after none or single ones."""
        new = n_tokens > 1 and not self._was_long
        self._was_long = n_tokens > 1
        self.turn += new
        return new

    def must_choose(self, n_tokens: int) -> bool:
        """Whether so many tokens more do not fit."""
        return any(
            layer.slots.n + n_tokens > layer.slots.capacity - self.plan.probe
            for layer in self.slot_layers
            if layer.is_initialized
        )

    def next_positions(self, n_tokens: int, device: torch.device) -> Tensor:
        """Positions (B, q) of so many tokens more."""
        new = torch.arange(n_tokens, device=device)
        if self._last is None:
            return new.expand(self.batch, -1)
        return self._last.positions[:, -1:] + 1 + new

    def end(self, forward: Forward, hidden: Tensor) -> None:
        """Let the policy note what has come; hidden states are (B, q, width)."""
        forward.hidden = hidden
        if self.policy.needs_text and self.n_seen == 0:
            self.last_hidden = torch.zeros_like(hidden[:, :1])
        if type(self.policy).observe is not CachePolicy.observe:
            for layer in self.slot_layers:
                self.policy.observe(Step(layer, forward))
        if self.policy.needs_text:
            self.last_hidden = hidden[:, -1:].clone()
        if self.n_seen == 0:
            self.measure()  # nothing is allocated later
        self.n_seen += forward.ids.shape[1]
        self._last = forward.done()

    def choose(self, probed: Forward | None) -> None:
        """Let go of slots until as many are left as the plan says.

        Args:
            probed: the pass of the probe that has just been written, and is forgotten here.
        """
        forward = probed or self._last
        assert forward is not None
        n_probe = probed.ids.shape[1] if probed else 0
        for layer in self.bounded_layers:
            if isinstance(layer, SlotLayer):
                self._choose(layer, Step(layer, forward, n_probe), n_probe)
            else:
                layer.slots.drop_last(n_probe)

    def _choose(self, layer: SlotLayer, step: Step, n_probe: int) -> None:
        kept = None
        if step.n > layer.n_slots:
            score = self.policy.score(step).masked_fill(step.pos == EMPTY, -torch.inf)
            kept = score.topk(layer.n_slots, dim=-1).indices.sort(-1).values
        layer.slots.drop_last(n_probe)
        if n_probe:
            layer.forget_queries()
        if kept is not None:
            self.policy.merge(step.after_probe(), kept)
            layer.slots.keep(kept)
            place = self.policy.place(step.after_probe())
            if place is not None:
                layer.slots.place[:, :, : layer.slots.n] = place

    def measure(self) -> None:
        """Put the bytes of all storages into the ledger."""
        kinds: dict[str, int] = {}
        for layer in self.bounded_layers:
            for name, tensor in layer.tensors().items():
                what = "keys and values" if name.startswith(("keys", "values")) else "notes"
                line = f"{layer.name}: {what}"
                kinds[line] = kinds.get(line, 0) + tensor.untyped_storage().nbytes()
        kinds["last hidden state"] = self.last_hidden.untyped_storage().nbytes()
        kinds["weights of the policy"] = sum(t.nbytes for t in self.weights.values())
        for line, n_bytes in kinds.items():
            self.ledger.set("device", line, n_bytes)
