"""Fixtures of the tests of SRPO's trainer."""

import logging
from collections.abc import Callable

import pytest


@pytest.fixture
def make(tmp_path) -> Callable:
    """`build` in a folder of the test's own."""
    from srpo_trainers import build  # here, so that tests without a trainer start without TRL

    return lambda **overrides: build(overrides.pop("output_dir", tmp_path / "run"), **overrides)


@pytest.fixture
def fixed(monkeypatch) -> None:
    from srpo_trainers import fixed_rollouts

    fixed_rollouts(monkeypatch)


@pytest.fixture
def warned(caplog, monkeypatch) -> Callable[[str], int]:
    """How often a text was in a warning so far."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return lambda text: sum(text in record.getMessage() for record in caplog.records)
