"""The adapter engine: few trained numbers on top of frozen, compactly stored weights.

- a policy says how each linear map is stored and what is trained beside it; calling it on a model
  replaces the maps in place, under their own names, and gives a `Handle`
- only deltas are trained: everything else in the model is frozen until the handle is removed
- a delta is merged only where nothing is lost: into a dense weight that one layer alone uses, or
  into the scales of a packed one

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memwise.budget import readable
from memwise.catalogue import Card
from memwise.codec.th import Packed, codec
from memwise.errors import InvalidKnob
from memwise.train.engine.adapted import (
    AdaptedLinear,
    Target,
    block_numbers,
    replace,
    select,
    users,
)
from memwise.train.engine.bases import Base
from memwise.train.engine.deltas import Delta


@dataclass(frozen=True)
class Site:
    """One linear map, as a policy sees it.

    Attributes:
        name: dotted name in the model.
        layer: number of the block it lies in; None outside of all blocks.
        base: the frozen map, once it is stored as the policy wants it.
        shapes: (O, I) of all maps that are adapted in this call, in order.
        index: place of this one among them.
        seed: of this call; for what all maps share.
        draws: a generator of this map's own, on the CPU.
        common: what the maps of this call share; empty at the first.
    """

    name: str
    layer: int | None
    base: Base
    shapes: Sequence[tuple[int, int]]
    index: int
    seed: int
    draws: torch.Generator
    common: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """Type of trained numbers: float32, or float64 in a model of float64."""
        return torch.promote_types(self.base.dtype, torch.float32)


@dataclass(frozen=True)
class AdapterPolicy:
    """How weights are stored and what is trained beside them; calling it adapts a model.

    Override `delta`, and `codec` where the frozen weights are packed.
    """

    card: ClassVar[Card]

    def delta(self, site: Site) -> Delta | None:
        """The trained numbers of a map; None leaves it without."""
        raise NotImplementedError

    def encode(self, name: str, weight: Tensor) -> Packed | None:
        """The packed form of a frozen weight (O, I); None leaves it dense."""
        return None

    def __call__(
        self, model: nn.Module, target: Target = None, *, seed: int = 0,
        names: Sequence[str] = ("default",),
    ) -> Handle:  # fmt: skip
        """Adapt the linear maps of a model in place, and freeze all else.

        Args:
            model: changed in place until `Handle.remove`.
            target: which maps; by default all in the model's blocks, or all where it has none, and
                never one that shares its weight with an embedding.
            seed: of all that is drawn.
            names: of the deltas; each map gets one of each, and the first is active.

        Raises:
            InvalidKnob: nothing matches, a name is taken, or a match is an embedding's twin.
            UnsupportedModel: a packed map is to be packed again.
        """
        return inject(model, self, target, seed, tuple(names))


def inject(
    model: nn.Module, policy: AdapterPolicy, target: Target, seed: int, names: tuple[str, ...]
) -> Handle:
    """What a policy does when it is called; see there."""
    chosen = select(model, target)
    if not chosen:
        raise InvalidKnob(f"target={target!r} matches no linear map; see model.named_modules()")
    for name, module in chosen.items():
        if isinstance(module, AdaptedLinear) and set(names) & set(module.deltas):
            raise InvalidKnob(f"{name} has deltas {list(module.deltas)}; choose other names")
    layers = block_numbers(model)
    _rehearse(policy, chosen, layers, seed)
    flags = {name: param.requires_grad for name, param in model.named_parameters()}
    used = users(model)

    sites: dict[str, AdaptedLinear] = {}
    packed: dict[int, Packed | None] = {}  # a weight that two maps share is packed once
    for name, module in chosen.items():
        if isinstance(module, AdaptedLinear):
            sites[name] = module
            continue
        weight: Any = module.weight
        if id(weight) not in packed:
            plain = weight if isinstance(module, nn.Linear) else weight.T
            packed[id(weight)] = policy.encode(name, plain.detach())
        adapted = AdaptedLinear(module, packed[id(weight)], used[id(weight)] > 1)
        replace(model, module, adapted)
        sites[name] = adapted
    model.requires_grad_(False)

    shapes = [site.base.shape for site in sites.values()]
    common: dict[str, Any] = {}
    skipped = {}
    for index, (name, module) in enumerate(sites.items()):
        for nth, label in enumerate(names):
            draws = torch.Generator().manual_seed((seed * 1_000_003 + index) * 101 + nth)
            delta = policy.delta(
                Site(name, layers.get(name), module.base, shapes, index, seed, draws, common)
            )
            if delta is None:
                skipped[name] = "the policy leaves it alone"
                continue
            module.deltas[label] = delta.to(module.base.device)
    handle = Handle(model, policy, names, sites, layers, flags, skipped)
    handle.set_active(names[0])
    return handle


def _rehearse(
    policy: AdapterPolicy, chosen: Mapping[str, nn.Module], layers: Mapping[str, int], seed: int
) -> None:
    """Raise what the policy has against a map before the first dense weight is gone.

    Codes, groups and scales are a matter of the inputs: one row of zeros for each width shows it.
    """
    widths: set[int] = set()
    for name, module in chosen.items():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, AdaptedLinear) or weight is None:
            continue
        width = weight.shape[1 if isinstance(module, nn.Linear) else 0]
        if width in widths:
            continue
        widths.add(width)
        row = torch.zeros((1, width), dtype=weight.dtype)
        packed = policy.encode(name, row)
        base = Base(row if packed is None else None, packed, None)
        draws = torch.Generator().manual_seed(seed)
        policy.delta(Site(name, layers.get(name), base, [(1, width)], 0, seed, draws, {}))


@dataclass
class Report:
    """What is stored and what is trained.

    Attributes:
        trained: trained numbers, those of frozen layers included.
        total: numbers of the model before, and of the deltas.
        bytes: storages by kind: "deltas", "packed", "dense" (adapted maps only).
        skipped: maps that matched and got no delta, with the reason.
        unmergeable: maps into which no delta can be merged, with the reason.
    """

    trained: int
    total: int
    bytes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unmergeable: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        held = ", ".join(f"{kind} {readable(n)}" for kind, n in self.bytes.items())
        share = 100 * self.trained / max(self.total, 1)
        lines = [f"{self.trained:,} of {self.total:,} numbers trained ({share:.2f} %); {held}"]
        lines += [f"left out: {name} ({why})" for name, why in self.skipped.items()]
        lines += [f"cannot be merged: {name} ({why})" for name, why in self.unmergeable.items()]
        return "\n".join(lines)


class Handle:
    """The adapters of one call on one model: what is trained, saved, merged and taken off again.

    Attributes:
        model: the adapted model.
        policy: who made it.
        names: of its deltas.
        sites: adapted maps by name.
    """

    def __init__(
        self, model: nn.Module, policy: AdapterPolicy, names: tuple[str, ...],
        sites: Mapping[str, AdaptedLinear], layers: Mapping[str, int],
        flags: Mapping[str, bool], skipped: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.model, self.policy, self.names, self.sites = model, policy, names, dict(sites)
        self._layers, self._flags, self._skipped = layers, flags, dict(skipped)
        self._hooks: list[RemovableHandle] = []

    @property
    def layers(self) -> list[int]:
        """Numbers of the blocks that hold a delta."""
        return sorted({self._layers[n] for n, _ in self._own() if n in self._layers})

    def parameters(self, name: str | None = None) -> Iterator[nn.Parameter]:
        """The trained numbers, each once: of all deltas, or of those with one name."""
        seen: set[int] = set()
        for _, label, delta in self._deltas():
            for param in delta.parameters() if name in (None, label) else ():
                if id(param) not in seen:
                    seen.add(id(param))
                    yield param

    def layer(self, site: str) -> int | None:
        """Number of the block that a map lies in; None outside of all."""
        return self._layers.get(site)

    def of_layer(self, layer: int) -> Iterator[nn.Parameter]:
        """The trained numbers of one block."""
        for site, _, delta in self._deltas():
            if self._layers.get(site) == layer:
                yield from delta.parameters()

    def set_active(self, name: str | None) -> None:
        """Add the deltas of this name from now on; None = the frozen model alone."""
        if name is not None and name not in self.names:
            raise InvalidKnob(f"no deltas are called {name!r}; there are {', '.join(self.names)}")
        for module in self.sites.values():
            known = name is not None and name in module.deltas
            module.active = name if known else None

    def freeze_layers(
        self, layers: Iterable[int], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Train all blocks but these; the optimizer forgets the states of the frozen ones.

        Without the optimizer its states stay, though a parameter without a gradient does not move.
        """
        frozen = set(layers)
        if unknown := sorted(frozen - set(self.layers)):
            raise InvalidKnob(f"layer {unknown[0]} has no delta; those that have: {self.layers}")
        for layer in self.layers:
            for param in self.of_layer(layer):
                param.requires_grad_(layer not in frozen)
                if layer in frozen:
                    param.grad = None
                    if optimizer is not None:
                        optimizer.state.pop(param, None)

    def require_input_grads(self) -> None:
        """Let embeddings give outputs that need a gradient.

        Reentrant gradient checkpointing gives none to the adapters of a block whose input needs
        none, as behind a frozen embedding.
        """

        def mark(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_(True)

        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                self._hooks.append(module.register_forward_hook(mark))

    def state_dict(self) -> dict[str, Any]:
        """The deltas alone; `torch.load(weights_only=True)` reads what is saved of it."""
        deltas = {
            f"{site}.{label}": {k: v.detach().clone() for k, v in delta.state_dict().items()}
            for site, label, delta in self._deltas()
        }
        return {"policy": repr(self.policy), "deltas": deltas}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over saved deltas.

        Raises:
            InvalidKnob: another policy saved them, or for other maps.
        """
        own = {f"{site}.{label}": delta for site, label, delta in self._deltas()}
        if state["policy"] != repr(self.policy) or state["deltas"].keys() != own.keys():
            differ = sorted(state["deltas"].keys() ^ own.keys())[:3]
            raise InvalidKnob(
                f"these deltas were saved by {state['policy']} and do not fit {self.policy!r}"
                + (f"; only one of the two has {', '.join(differ)}" if differ else "")
            )
        for name, delta in own.items():
            delta.load_state_dict(state["deltas"][name])

    @torch.no_grad()
    def merge(self) -> bool:
        """Move the active deltas into the weights and drop them; all of them, or False and none."""
        found = [(m, m.active) for _, m in self._own() if m.active is not None]
        if not found or self._unmergeable():
            return False
        for module, name in found:
            delta: Any = module.deltas[name]
            delta.fold(module.base)
            del module.deltas[name]
            module.active = None
        return True

    def remove(self) -> None:
        """Take the deltas off: dense maps are again the very modules that stood there.

        Packed maps stay packed, since their dense weights are gone.
        """
        for module in self.sites.values():
            for label in self.names:
                if label in module.deltas:
                    del module.deltas[label]
            if module.active in self.names:
                module.active = None
            if module.origin is not None and not module.deltas:
                replace(self.model, module, module.origin)
        for name, param in self.model.named_parameters():
            if name in self._flags:
                param.requires_grad_(self._flags[name])
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def report(self) -> Report:
        """What is stored and what is trained, counted in storages."""
        trained = sum(p.numel() for p in self.parameters())
        bases = {m.base.address: m.base for m in self.sites.values()}
        dense = [base.weight for base in bases.values() if base.weight is not None]
        held = {
            "deltas": _n_bytes(self.parameters()),
            "packed": sum(base.packed.nbytes for base in bases.values() if base.packed),
            "dense": _n_bytes(dense),
        }
        adapted = {weight.data_ptr() for weight in dense}
        rest = [p.numel() for p in self.model.parameters() if p.data_ptr() not in adapted]
        total = sum(rest) + sum(base.shape[0] * base.shape[1] for base in bases.values())
        return Report(trained, total, held, dict(self._skipped), self._unmergeable())

    def _own(self) -> list[tuple[str, AdaptedLinear]]:
        return [(n, m) for n, m in self.sites.items() if set(self.names) & set(m.deltas)]

    def _deltas(self) -> Iterator[tuple[str, str, Any]]:
        for site, module in self._own():
            for label in self.names:
                if label in module.deltas:
                    yield site, label, module.deltas[label]

    def _unmergeable(self) -> dict[str, str]:
        why = {}
        for site, module in self._own():
            kinds: Any = module.deltas.values()
            folds_packed = all(delta.folds_packed for delta in kinds)
            if module.shared:
                why[site] = "another module uses the same weight"
            elif module.codec is not None and not folds_packed:
                why[site] = f"rounding to {module.codec} again would lose the delta"
        return why


def _n_bytes(tensors: Iterable[Any]) -> int:
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def pack(name: str, weight: Tensor) -> Packed:
    """A weight (O, I) encoded with the codec of this name."""
    return codec(name).encode(weight)
