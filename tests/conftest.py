"""Settings that must stand before torch and the hub client are imported, and what all tests share."""

import gc
import os

# One thread a process: two with two threads each would spin against each other on two cores.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="Agg")

from pathlib import Path

import pytest

HELPERS = ("processes", "r_diverse_coders", "srpo_trainers", "training_runs", "va_opd_trainers")
pytest.register_assert_rewrite(*HELPERS)  # so that their asserts show values
ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish() -> None:
    """The garbage collection with which each training begins need not visit what the imports made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real benchmark data that lies beside the repository on some machines."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder
