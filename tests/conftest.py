"""What all tests share: one thread each, and reasons for what cannot run here."""

import importlib.util
import os
from pathlib import Path

import pytest

# Before anything loads numpy or torch: two test processes with a thread pool each only fight.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, what needs data or a device that is not here."""
    if item.get_closest_marker("data") and _data_folder() is None:
        pytest.skip("needs the data sets: set MEMWISE_DATA to their folder")
    if item.get_closest_marker("gpu") and not _has_cuda():
        pytest.skip("needs CUDA")


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of the data sets; for tests that are marked `data`."""
    folder = _data_folder()
    assert folder is not None, "mark the test with pytest.mark.data"
    return folder


@pytest.fixture(scope="session")
def byte_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama that reads bytes."""
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    transformers = pytest.importorskip("transformers", reason="needs the torch extra")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "</s>"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(
        folder
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            attention_dropout=0.1, eos_token_id=256, bos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _data_folder() -> Path | None:
    named = os.environ.get("MEMWISE_DATA")
    return Path(named) if named and Path(named).is_dir() else None


def _has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
