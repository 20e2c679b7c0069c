"""A model whose matrices come from a file while it runs, inside a byte budget.

For the time of `with streamed(...)` the linear layers of the decoder have no weights of their own:
before one is called, its matrix is fetched from the store, and the next ones are read meanwhile.
Embeddings, norms and biases stay where they are, and are not charged.

Shapes: N tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from memwise.budget import Budget, BudgetLike, readable
from memwise.context.engine import neurons
from memwise.context.engine.host import decoder_of
from memwise.context.engine.neurons import Held, SparseFFN
from memwise.context.engine.weight_policy import NeuronPolicy, WeightPolicy
from memwise.context.engine.weight_store import WeightFile, WeightStore, write
from memwise.errors import BudgetExceeded, InvalidKnob, UnsupportedModel

Tensor: TypeAlias = torch.Tensor

_SAMPLES = 64  # numbers of each matrix that enter the fingerprint
_AT_ONCE = 8  # rows of text


@contextmanager
def streamed(
    model: nn.Module, policy: WeightPolicy, path: str | PathLike[str], budget: BudgetLike, *,
    text: Tensor | None = None, n_ring: int = 2, keep_pages: bool = True,
) -> Iterator[Stream]:  # fmt: skip
    """Run a Hugging Face model with so many bytes for the matrices of its layers, at any moment.

    Inference only, on the CPU. Afterwards the model has its weights again, from the file: they are
    the same to the bit where the policy's codec loses nothing.

    Args:
        model: decoder-only, with all of its weights.
        policy: how matrices are stored and which are read, e.g. `Endor()`.
        path: of the file of weights; it is made where there is none, and checked where there is.
        budget: bytes of matrices, of the ring they go through, and of what the policy holds.
        text: tokens (B, T) that the policy learns from when the file is made, if it has to.
        n_ring: matrices in the ring; more read further ahead.
        keep_pages: as for `WeightFile`: False reads from the disk each time.

    Yields:
        What is resident and what was read; `print` it.

    Raises:
        UnsupportedModel: a model of another kind, or not on the CPU.
        BudgetExceeded: the budget is too small for a single matrix.
        InvalidKnob: the file belongs to another model or policy, or the policy needs a text.
        StoreCorrupt: the file is damaged.
    """
    stream = Stream(model, policy, Path(path), Budget(budget), text, n_ring, keep_pages)
    try:
        yield stream
    finally:
        stream.close()


class Stream:
    """A model while it is streamed.

    Args:
        model: as for `streamed`, like all others.
        policy: of the store.
        path: of the file.
        budget: in bytes.
        text: to learn from.
        n_ring: matrices in the ring.
        keep_pages: whether the system may.
    """

    def __init__(
        self, model: nn.Module, policy: WeightPolicy, path: Path, budget: Budget,
        text: Tensor | None, n_ring: int, keep_pages: bool,
    ) -> None:  # fmt: skip
        self.model, self.policy = model, policy
        self._layers = list(decoder_of(model).layers)  # type: ignore[arg-type]
        self._modules = _linears(self._layers)
        self._own = self._own_names()
        self.mark = {"model": _fingerprint(self._modules), "layout": policy.layout}
        is_new = not path.exists()
        if is_new:
            write(path, self._matrices(text), self.mark)
        self.file = WeightFile(path, self.mark, keep_pages)
        self._undo: list[Any] = []
        self.sparse: list[SparseFFN] = []
        try:
            if not is_new:
                self.file.check()
            self._release()
            self.store = self._opened(budget, n_ring)
            self._install()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the model its weights again."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        if hasattr(self, "store"):
            self.store.close()
        self.file.close()

    def verdict(self) -> str:
        """Whether the codec makes a pass faster on this machine, which is measured now."""
        return self.store.plan.verdict(self.store.measure())

    def __str__(self) -> str:
        return f"{self.store}\n{self.file.counters}"

    # --- making a file

    def _matrices(self, text: Tensor | None) -> Iterator[tuple[str, Tensor, str]]:
        for name in self._own:
            weight = self._modules[name].weight
            yield name, weight, self.policy.codec(weight)
        if not isinstance(self.policy, NeuronPolicy):
            return
        needs = type(self.policy).learn is not NeuronPolicy.learn
        if needs and text is None:
            raise InvalidKnob(
                f"{type(self.policy).__name__} learns which neurons fire: give some tokens as text="
            )
        for i, mlp in enumerate(self._mlps()):
            rows = neurons.rows_of(mlp)
            if self.policy.together:
                yield f"{i}.neurons", torch.cat(rows, dim=1), ""
            else:
                for k, matrix in enumerate(rows):
                    yield f"{i}.neurons.{k}", matrix.contiguous(), ""
            if needs and text is not None:
                x = _inputs(self.model, mlp, text)
                learned = self.policy.learn(x, neurons.fires(mlp, x), rows[0].detach())
                for key, known in learned.items():
                    yield f"{i}.known.{key}", known.detach().contiguous(), ""

    def _mlps(self) -> list[nn.Module]:
        found = [getattr(layer, "mlp", None) for layer in self._layers]
        missing = [i for i, mlp in enumerate(found) if mlp is None]
        if missing:
            raise UnsupportedModel(f"layers {missing} have no feed-forward part called mlp")
        return [mlp for mlp in found if mlp is not None]

    def _own_names(self) -> list[str]:
        """Matrices that are stored whole."""
        if not isinstance(self.policy, NeuronPolicy):
            return list(self._modules)
        within = {id(m) for mlp in self._mlps() for m in neurons.matrices_of(mlp).values()}
        return [name for name, module in self._modules.items() if id(module) not in within]

    # --- running from it

    def _release(self) -> None:
        """Take the weights from the model; they come back when it is closed."""
        by_neurons = isinstance(self.policy, NeuronPolicy)
        for i, mlp in enumerate(self._mlps() if by_neurons else ()):
            matrices = neurons.matrices_of(mlp)
            for module in matrices.values():
                _empty(module)
            self._undo.append(lambda i=i, m=matrices: self._give_rows(i, list(m.values())))
        for name in self._own:
            module = self._modules[name]
            _empty(module)
            self._undo.append(lambda name=name, module=module: self._give(name, module))

    def _opened(self, budget: Budget, n_ring: int) -> WeightStore:
        known = [name for name in self.file.bundles if ".known." in name]
        stays = [*self._own, *known] if isinstance(self.policy, NeuronPolicy) else []
        return WeightStore(self.file, budget, self._own, stays, n_ring)

    def _install(self) -> None:
        for name in self._own:
            module = self._modules[name]
            if name in self.store.resident:
                module.weight.data = self.store.resident[name]
                continue
            hook = module.register_forward_pre_hook(self._fetcher(name))
            self._undo.append(hook.remove)
            hook = module.register_forward_hook(lambda module, _, __: _empty(module))
            self._undo.append(hook.remove)
        if isinstance(self.policy, NeuronPolicy):
            self._install_neurons(self.policy)

    def _install_neurons(self, policy: NeuronPolicy) -> None:
        left = self.store.ledger.left("host") or 0
        mlps = self._mlps()
        for i, mlp in enumerate(mlps):
            bundles = [
                b for name, b in self.file.bundles.items() if name.startswith(f"{i}.neurons")
            ]
            n_parts = len(neurons.matrices_of(mlp))
            capacity = Held.room(left // len(mlps), bundles, n_parts)
            if not capacity:
                raise BudgetExceeded(
                    f"{readable(left)} are left for the neurons of {len(mlps)} layers beside what "
                    "stays resident, and not one fits in each: raise budget="
                )
            prefix = f"{i}.known."
            known = {
                name.removeprefix(prefix): tensor
                for name, tensor in self.store.resident.items()
                if name.startswith(prefix)
            }
            held = Held(self.file, bundles, n_parts, capacity)
            self.store.ledger.add("host", "neurons", held.n_bytes)
            sparse = SparseFFN(mlp, policy, known, held)
            self.sparse.append(sparse)
            mlp.forward = sparse.forward
            self._undo.append(lambda mlp=mlp: mlp.__dict__.pop("forward"))

    def _fetcher(self, name: str) -> Any:
        def fetch(module: nn.Linear, _: Any) -> None:
            if torch.is_grad_enabled():
                raise InvalidKnob(
                    "streamed weights have no gradients: call the model inside torch.no_grad()"
                )
            module.weight.data = self.store.fetch(name)

        return fetch

    def _give(self, name: str, module: nn.Linear) -> None:
        module.weight.data = self._read(name)

    def _give_rows(self, i: int, modules: list[nn.Linear]) -> None:
        names = [name for name in self.file.bundles if name.startswith(f"{i}.neurons")]
        whole = torch.cat([self._read(name) for name in names], dim=1)
        *inputs, down = whole.chunk(len(modules), dim=1)
        for module, rows in zip(modules, [*inputs, down.T], strict=True):
            module.weight.data = rows.contiguous()

    def _read(self, name: str) -> Tensor:
        bundle = self.file.bundles[name]
        raw = torch.empty(bundle.n_bytes, dtype=torch.uint8)
        self.file.read(bundle, raw)
        if not bundle.codec:
            return bundle.view(raw).clone()
        place = torch.empty(bundle.decoded_bytes, dtype=torch.uint8)
        bundle.decode(raw, bundle.view(place))
        return bundle.view(place)


def _linears(layers: list[nn.Module]) -> dict[str, nn.Linear]:
    """The linear layers of a decoder, by name."""
    found = {
        f"{i}.{name}": module
        for i, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    weights = [module.weight for module in found.values()]
    if not weights:
        raise UnsupportedModel("the layers of this model hold no linear layers")
    if wrong := {str(weight.device) for weight in weights} - {"cpu"}:
        raise UnsupportedModel(f"the weights lie on {sorted(wrong)}; they are streamed to the CPU")
    if len({id(weight) for weight in weights}) < len(weights):
        raise UnsupportedModel("some of the layers share a matrix, which would be read many times")
    return found


def _empty(module: nn.Linear) -> None:
    module.weight.data = module.weight.data.new_empty(0)


def _fingerprint(modules: Mapping[str, nn.Linear]) -> str:
    digest = hashlib.sha256()
    for name, module in modules.items():
        flat = module.weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].double().numpy()
        shape = tuple(module.weight.shape)
        digest.update(f"{name}{shape}{module.weight.dtype}".encode() + some.tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _inputs(model: nn.Module, mlp: nn.Module, text: Tensor) -> Tensor:
    """What a feed-forward layer is given (N, D) while the model reads tokens (B, T)."""
    found: list[Tensor] = []
    hook = mlp.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    try:
        for rows in torch.split(text, _AT_ONCE):
            model(input_ids=rows, use_cache=False)
    finally:
        hook.remove()
    return torch.cat(found)
