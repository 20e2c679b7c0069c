"""Small random models on which identities hold to the rounding of float64."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from memwise.catalogue import cards, load  # noqa: E402

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip


def llama() -> Any:
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=3)
    return _loud(transformers.LlamaForCausalLM(config))


def gemma() -> Any:
    """Two sliding and two full layers, with rotary angles of their own."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3TextConfig(
        **SIZES, num_hidden_layers=4, layer_types=kinds, sliding_window=8, query_pre_attn_scalar=8
    )
    return _loud(transformers.Gemma3ForCausalLM(config))


def _loud(model: Any) -> Any:
    """Weights so large that attention decides what comes out."""
    draws = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        if param.ndim > 1:
            torch.nn.init.normal_(param, std=0.4, generator=draws)
        elif "norm" not in name:
            torch.nn.init.normal_(param, std=0.2, generator=draws)
    return model.double().eval()


MODELS = {"llama": llama, "gemma": gemma}


def methods_of(kind: type) -> list[str]:
    """Names of the room's methods whose knob object is of a kind."""
    made = {entry.name: load(entry.key) for entry in cards() if entry.room == "context"}
    return [name for name, cls in made.items() if isinstance(cls, type) and issubclass(cls, kind)]


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def tokens(n_rows: int, n_tokens: int, seed: int = 0) -> Any:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(2, SIZES["vocab_size"], (n_rows, n_tokens), generator=draws)
