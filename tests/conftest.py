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


def _data_folder() -> Path | None:
    named = os.environ.get("MEMWISE_DATA")
    return Path(named) if named and Path(named).is_dir() else None


def _has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
