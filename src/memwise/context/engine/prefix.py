"""Prefixes that many texts begin with: computed once, kept inside a byte budget, and on disk.

A prefix is found by its content. It may continue another one, whose keys and values it shares, so
that one system prompt before ten documents is held once. A hit is a whole prefix: in between two
boundaries a sliding layer's tokens are gone, and a hit there would give wrong logits.

Shapes: H key-value heads, n tokens, D width of a head.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from memwise.budget import BudgetLike, Ledger
from memwise.context.engine.relay import Pair, Prefix, RelayCache, RelayHost, RelayLayer
from memwise.context.engine.saved import model_fingerprint
from memwise.errors import InvalidKnob, StoreCorrupt

Tensor: TypeAlias = torch.Tensor

CHUNK = 512  # tokens that go through the model at once
_FORMAT = "memwise.prefixes/1"
_PREFIXES, _PREFILL = "prefixes", "prefix in the making"


class PrefixStore:
    """Prefixes of one model; where they do not fit, the ones that were used longest ago go.

    A prefix that others continue, or that a cache stands behind, stays.

    Args:
        model: as for `bounded`: decoder-only, with rotary positions.
        budget: bytes of all prefixes, the one in the making included; None only counts.
        chunk: most tokens that go through the model at once.

    Attributes:
        ledger: measured bytes.

    Raises:
        UnsupportedModel: a model of another kind.
        InvalidKnob: a chunk below 1.
    """

    def __init__(
        self, model: nn.Module, budget: BudgetLike | None = None, *, chunk: int = CHUNK
    ) -> None:
        if chunk < 1:
            raise InvalidKnob(f"chunk={chunk}: at least one token has to go through the model")
        self._host, self._chunk = RelayHost(model), chunk
        self._model = model_fingerprint(self._host)
        self.ledger = Ledger(budget)
        self._prefixes: dict[str, Prefix] = {}  # the one used longest ago first

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[Prefix]:
        """All of them, the one used longest ago first."""
        return iter(list(self._prefixes.values()))

    def match(self, tokens: Iterable[int]) -> Prefix | None:
        """The longest prefix that these tokens begin with; its `n_tokens` are done."""
        wanted = _plain(tokens)
        fits = [one for one in self if wanted[: one.n_tokens] == one.tokens]
        found = max(fits, key=lambda one: one.n_tokens, default=None)
        if found is not None:
            self._use(found)
        return found

    @torch.no_grad()
    def prefill(self, tokens: Iterable[int]) -> Prefix:
        """The prefix of these tokens, computed where it is not there yet.

        It continues the longest one that is there: prefill a system prompt first, and then the
        prompt with a document, and the documents share the prompt.

        Raises:
            InvalidKnob: no tokens, or the model has been trained since.
            BudgetExceeded: it does not fit; nothing has changed then.
        """
        wanted = _plain(tokens)
        if not wanted:
            raise InvalidKnob("a prefix of no tokens: pass None to `relayed` instead")
        if model_fingerprint(self._host) != self._model:
            raise InvalidKnob(
                "the model's weights have changed since this store was made: make a new one"
            )
        parent = self.match(wanted)
        if parent is not None and parent.n_tokens == len(wanted):
            return parent
        n_new = len(wanted) - (parent.n_tokens if parent else 0)
        cache = RelayCache(self._host, parent, room=n_new)
        with cache.pinned(), self._host.installed():
            self._make_room(self._needed(n_new, len(wanted)))
            try:
                self._fill(cache, wanted[-n_new:])
                pairs = tuple(_at_end(layer, len(wanted)) for layer in cache.relay_layers)
            finally:
                self.ledger.release("device", _PREFILL)
        key = _key(parent.key if parent else self._model, wanted[-n_new:])
        made = Prefix(key, self._model, parent, wanted, pairs)
        self._add(made)
        return made

    def forget(self, prefix: Prefix) -> None:
        """Give the memory of a prefix back.

        Raises:
            InvalidKnob: it is not here, others continue it, or a cache stands behind it.
        """
        if self._prefixes.get(prefix.key) is not prefix:
            raise InvalidKnob(f"a prefix of {prefix.n_tokens} tokens is not in this store")
        if prefix.n_users or any(one.parent is prefix for one in self):
            raise InvalidKnob(
                f"a prefix of {prefix.n_tokens} tokens is in use: forget those that continue it, "
                "and leave `with relayed(...)`, first"
            )
        del self._prefixes[prefix.key]
        self.ledger.release("device", _PREFIXES, prefix.held_bytes)

    def save(self, path: str | PathLike[str]) -> None:
        """Write all prefixes to a file, for `load`; the file appears when it is whole."""
        if not len(self):
            raise InvalidKnob("this store is empty: there is nothing to save")
        path = Path(path)
        about = [
            {"key": one.key, "parent": one.parent.key if one.parent else "", "tokens": _own(one)}
            for one in sorted(self, key=lambda one: one.n_tokens)
        ]
        tensors = {
            f"{one.key}.{i}.{what}": tensor
            for one in self
            for i, pair in enumerate(one.pairs)
            for what, tensor in zip(("keys", "values"), pair, strict=True)
        }
        part = path.with_name(path.name + ".part")
        save_file(
            tensors, part, {"format": _FORMAT, "model": self._model, "about": json.dumps(about)}
        )
        os.replace(part, path)

    def load(self, path: str | PathLike[str]) -> int:
        """Take in the prefixes of a file, and say how many were not here yet.

        Raises:
            InvalidKnob: they are another model's.
            StoreCorrupt: the file is not one of these, or contradicts itself.
            BudgetExceeded: they do not fit; nothing has changed then.
        """
        with _opened(Path(path), self._model) as file:
            about = _checked(file, self._model, len(self._host.shape.layer_types))
            new = [one for one in about if one.key not in self._prefixes]
            here = {one.key for one in about} & set(self._prefixes)
            self._make_room(sum(one.n_numbers for one in new) * self._host.shape.itemsize, here)
            self.ledger.release("device", _PREFILL)
            for one in new:
                pairs = tuple(
                    (self._loaded(file, keys), self._loaded(file, values))
                    for keys, values in one.names
                )
                parent = self._prefixes.get(one.parent)
                self._add(Prefix(one.key, self._model, parent, one.tokens, pairs))
        return len(new)

    def _loaded(self, file: Any, name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        return tensor.to(self._host.device)

    def _fill(self, cache: RelayCache, tokens: Sequence[int]) -> None:
        device = self._host.device
        for first in range(0, len(tokens), self._chunk):
            ids = torch.tensor([tokens[first : first + self._chunk]], device=device)
            self._host.forward(input_ids=ids, past_key_values=cache, use_cache=True)

    def _needed(self, n_new: int, n_tokens: int) -> int:
        """Bytes while a prefix is made: sliding layers hold a chunk, and then its end once more."""
        shape = self._host.shape
        n_full = len(shape.full_layers)
        chunk, window = min(self._chunk, n_new), shape.window
        places = n_full * n_new
        if n_sliding := len(shape.layer_types) - n_full:
            places += n_sliding * (min(n_new, window - 1 + chunk) + min(n_tokens, window - 1))
        return places * shape.pair_bytes

    def _make_room(self, n_bytes: int, needed: Collection[str] = ()) -> None:
        """Evict until so many bytes fit, none of the keys `needed`, or nothing if they never do."""
        left = self.ledger.left("device")
        short = 0 if left is None else n_bytes - left
        going: list[Prefix] = []
        while short > 0 and (one := self._oldest(going, needed)):
            going.append(one)
            short -= one.held_bytes
        if short <= 0:
            for one in going:
                self.forget(one)
        self.ledger.set("device", _PREFILL, n_bytes)

    def _oldest(self, going: Sequence[Prefix], needed: Collection[str]) -> Prefix | None:
        staying = [one for one in self if one not in going]
        tied = {one.parent.key for one in staying if one.parent} | set(needed)
        free = (one for one in staying if not one.n_users and one.key not in tied)
        return next(free, None)

    def _add(self, prefix: Prefix) -> None:
        self.ledger.add("device", _PREFIXES, prefix.held_bytes)
        self._prefixes[prefix.key] = prefix

    def _use(self, prefix: Prefix) -> None:
        for one in prefix.chain:
            self._prefixes[one.key] = self._prefixes.pop(one.key)


def _plain(tokens: Iterable[int]) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens)


def _own(prefix: Prefix) -> tuple[int, ...]:
    """The tokens without the parents'."""
    return prefix.tokens[prefix.parent.n_tokens if prefix.parent else 0 :]


def _key(before: str, tokens: Sequence[int]) -> str:
    """Hash of the parent, or the model where there is none, and the own tokens."""
    return hashlib.sha256(f"{before} {list(tokens)}".encode()).hexdigest()


def _at_end(layer: RelayLayer, n_tokens: int) -> Pair:
    """What a layer keeps of the tokens that it has just taken in, behind its prefix."""
    if layer.window is None:
        return layer.held
    n = min(n_tokens, layer.window - 1)
    ends = zip(*[*layer.parts, layer.held], strict=True)
    keys, values = (torch.cat(parts, 2)[:, :, -n:].clone() for parts in ends)
    return keys, values


@dataclass(frozen=True)
class _Saved:
    """What a file says of a prefix: all its tokens, names of keys and values, numbers in them."""

    key: str
    parent: str
    tokens: tuple[int, ...]
    names: tuple[tuple[str, str], ...]
    n_numbers: int


@contextmanager
def _opened(path: Path, model: str) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != _FORMAT:
                raise StoreCorrupt(f"{path} holds no saved prefixes: it does not say {_FORMAT!r}")
            if meta["model"] != model:
                raise InvalidKnob(
                    f"{path} holds prefixes of another model: {meta['model']} there, {model} here"
                )
            yield file
    except SafetensorError as error:
        raise StoreCorrupt(f"{path} holds no saved prefixes: {error}") from error


def _checked(file: Any, model: str, n_layers: int) -> list[_Saved]:
    """All prefixes of a file, parents first, before any of them is loaded."""
    there = set(file.keys())
    found: dict[str, _Saved] = {}
    for about in json.loads(file.metadata()["about"]):
        parent = found.get(about["parent"])
        key = _key(parent.key if parent else model, about["tokens"])
        if key != about["key"]:
            raise StoreCorrupt(f"the tokens of the saved prefix {about['key'][:16]} were changed")
        names = tuple((f"{key}.{i}.keys", f"{key}.{i}.values") for i in range(n_layers))
        plain = [name for pair in names for name in pair]
        if missing := sorted(set(plain) - there):
            raise StoreCorrupt(f"{missing} are missing in a file of prefixes")
        tokens = (*(parent.tokens if parent else ()), *about["tokens"])
        n_numbers = sum(math.prod(file.get_slice(name).get_shape()) for name in plain)
        found[key] = _Saved(key, about["parent"], tokens, names, n_numbers)
    return list(found.values())
