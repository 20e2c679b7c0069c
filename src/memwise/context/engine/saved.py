"""A bounded cache in a file, which goes on with the model, policy and budget of its making only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from memwise.errors import InvalidKnob, StoreCorrupt

if TYPE_CHECKING:
    from torch import Tensor

    from memwise.context.engine.cache import BudgetedCache
    from memwise.context.engine.host import Host

_FORMAT = "memwise.context/1"
_SAMPLES = 64  # numbers of each parameter that enter the fingerprint


def save(cache: BudgetedCache, path: Path) -> None:
    """Write all that is held; the file appears when it is whole."""
    if not cache.n_seen:
        raise InvalidKnob("this cache is empty: there is nothing to save")
    state, tensors = cache.state()
    meta = {"format": _FORMAT, "state": json.dumps(state), **_fingerprint(cache, cache.batch)}
    part = path.with_name(path.name + ".part")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, part, meta)
    os.replace(part, path)


def load(cache: BudgetedCache, path: Path) -> None:
    """Fill a cache from a file; nothing has changed where it raises."""
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StoreCorrupt(f"{path} is no saved cache: {error}") from error
    if meta.get("format") != _FORMAT:
        raise StoreCorrupt(f"{path} is no saved cache: it does not say {_FORMAT!r}")
    state = json.loads(meta["state"])
    for what, own in _fingerprint(cache, state["batch"]).items():
        if meta[what] != own:
            raise InvalidKnob(
                f"{path} was saved with another {what}: {meta[what]} there, {own} here"
            )
    cache.restore(state, tensors)


def model_fingerprint(host: Host) -> str:
    """Hash of a model's weights, layers and rotary angles: keys and values are of no other."""
    digest = hashlib.sha256(repr(replace(host.shape, codec=None)).encode())
    for kind in sorted(set(host.shape.layer_types)):
        like = torch.zeros(1, device=host.device)
        for table in host.rotary.table(torch.tensor([[1, 999]], device=host.device), kind, like):
            digest.update(table.double().cpu().numpy().tobytes())
    for name, param in host.model.named_parameters():
        flat = param.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].double().cpu().numpy()
        digest.update(f"{name}{tuple(param.shape)}{param.dtype}".encode() + some.tobytes())
    return digest.hexdigest()[:16]


def _fingerprint(cache: BudgetedCache, batch: int) -> dict[str, str]:
    """What has to be the same for a cache to go on, by name."""
    plan = cache.planned(batch)
    return {
        "model": model_fingerprint(cache.host),
        "policy": repr(cache.policy) + _digest(cache.weights),
        "plan": f"slots {list(plan.n_slots.values())}, chunks of {plan.chunk}",
        "probe": str(list(cache.probe)),
        "codec": str(cache.shape.codec),
    }


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Of what a policy was trained to know; nothing where there is none."""
    if not weights:
        return ""
    digest = hashlib.sha256()
    for name in sorted(weights):
        flat = weights[name].cpu().contiguous().view(torch.uint8)
        digest.update(name.encode() + flat.numpy().tobytes())
    return f" with weights {digest.hexdigest()[:16]}"
