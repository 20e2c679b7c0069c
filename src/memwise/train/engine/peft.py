"""To and from PEFT (huggingface/peft): LoRA is read and written in its own format.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, and PEFT itself is not needed
for it. Only deltas travel: what the frozen weights are stored in is each side's own affair. What
the format can say and memwise cannot (DoRA, ranks that differ between maps, trained biases) is
refused, and so is what memwise has and the format has not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memwise.errors import InvalidKnob
from memwise.train.engine.adapters import AdapterPolicy, Handle
from memwise.train.engine.deltas import LowRank

_PREFIX = "base_model.model."
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_DOES_MORE = (
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias",
    "trainable_token_indices", "target_parameters", "layer_replication", "megatron_config",
)  # fmt: skip


def save_peft(handle: Handle, folder: str | Path, *, name: str | None = None) -> None:
    """Write one set of LoRA's deltas so that `peft.PeftModel.from_pretrained` reads it.

    Args:
        handle: of LoRA, or of a policy that ends in LoRA (QLoRA, IST, ApiQ).
        folder: made if it is not there.
        name: of the set; None = the first.

    Raises:
        InvalidKnob: the deltas are of another kind, or there is no such set.
    """
    from safetensors.torch import save_file

    label = handle.names[0] if name is None else name
    deltas: dict[str, Any] = {
        site: module.deltas[label]
        for site, module in handle.sites.items()
        if label in module.deltas
    }
    if not deltas:
        raise InvalidKnob(f"no deltas are called {label!r}; there are {', '.join(handle.names)}")
    if other := {type(d).__name__ for d in deltas.values() if type(d) is not LowRank}:
        raise InvalidKnob(
            f"PEFT's format holds plain LoRA, not the {other.pop()} of "
            f"{type(handle.policy).__name__}; save handle.state_dict() instead"
        )
    any_delta: LowRank = next(iter(deltas.values()))
    rank = any_delta.A.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": any_delta.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(handle.sites[site].transposed for site in deltas),
        "target_modules": sorted(deltas),
        "inference_mode": True,
    }
    tensors = {}
    for site, delta in deltas.items():
        tensors[f"{_PREFIX}{site}.lora_A.weight"] = delta.A.detach().contiguous()
        tensors[f"{_PREFIX}{site}.lora_B.weight"] = delta.B.detach().contiguous()
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    save_file(tensors, where / _TENSORS)
    (where / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def load_peft(model: nn.Module, folder: str | Path, policy: type[AdapterPolicy]) -> Handle:
    """Adapt a model as a PEFT folder says, and take its numbers over.

    Args:
        model: changed in place, as by calling the policy.
        folder: as PEFT or `save_peft` wrote it.
        policy: LoRA, or QLoRA to pack the frozen weights too; made with the folder's rank.

    Raises:
        InvalidKnob: the folder is not there, holds something other than plain LoRA, or other maps.
    """
    from safetensors.torch import load_file

    where = Path(folder)
    if not (where / _CONFIG).is_file() or not (where / _TENSORS).is_file():
        raise InvalidKnob(f"{where} does not hold {_CONFIG} and {_TENSORS}; save the adapter there")
    config = json.loads((where / _CONFIG).read_text("utf-8"))
    return _adopt(model, config, load_file(where / _TENSORS), policy)


def from_peft(wrapped: Any, policy: type[AdapterPolicy]) -> Handle:
    """Take over the active LoRA of a live PEFT model; `handle.model` is the bare model.

    Args:
        wrapped: a `peft.PeftModel`; its wrappers are taken off.
        policy: LoRA, QLoRA or IST; made with the adapter's rank.

    Raises:
        InvalidKnob: what is active is something other than plain LoRA.
    """
    peft = import_module("peft")
    config = wrapped.peft_config[wrapped.active_adapter].to_dict()
    tensors = peft.get_peft_model_state_dict(wrapped, adapter_name=wrapped.active_adapter)
    _require_plain(config)
    return _adopt(wrapped.unload(), config, tensors, policy)


def _require_plain(config: Mapping[str, Any]) -> None:
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    more = [key for key in _DOES_MORE if config.get(key)]
    if kind != "LORA" or more or config.get("bias", "none") != "none":
        what = kind if kind != "LORA" else (more or ["bias"])[0]
        raise InvalidKnob(f"this PEFT adapter uses {what}; memwise takes over plain LoRA alone")


def _adopt(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor],
    policy: type[AdapterPolicy],
) -> Handle:  # fmt: skip
    _require_plain(config)
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)  # its scale is alpha / sqrt(rank)
    numbers = {
        name.removeprefix(_PREFIX).replace(".default.", "."): value
        for name, value in tensors.items()
    }
    sites = {name.removesuffix(".lora_A.weight") for name in numbers if "lora_A" in name}
    known = dict(model.named_modules())
    if missing := sorted(sites - known.keys()):
        raise InvalidKnob(
            f"the adapter has numbers for {missing[0]}, and {type(model).__name__} has no such "
            "module; load it into the model that it was trained on"
        )
    knobs: dict[str, Any] = {"rank": rank, "alpha": alpha}
    target = "|".join(f"^{re.escape(site)}$" for site in sorted(sites))
    handle = policy(**knobs)(model, target)
    for site in sites:
        delta: Any = handle.sites[site].delta
        for part in ("A", "B"):
            own, given = getattr(delta, part), numbers[f"{site}.lora_{part}.weight"]
            if own.shape != given.shape:
                handle.remove()
                raise InvalidKnob(
                    f"{site} takes {part} of {tuple(own.shape)}, and the adapter holds "
                    f"{tuple(given.shape)}; load it into the model that it was trained on"
                )
            own.data.copy_(given)
    return handle
