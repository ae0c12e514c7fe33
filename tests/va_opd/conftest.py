"""Fixtures of the tests of VA-OPD's trainer."""

from collections.abc import Callable

import pytest


@pytest.fixture
def make(tmp_path) -> Callable:
    """`build` in a folder of the test's own."""
    from va_opd_trainers import build  # here, so that tests without a trainer start without TRL

    return lambda rows=None, **overrides: build(overrides.pop("output_dir", tmp_path / "run"), rows, **overrides)
