"""What the commands `python -m METHOD.train` have in common."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRESETS = {"va_opd": "geo3k", "srpo": "qwen3_8b"}


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("flag", ["--dry_run", "--dry_run=true", "--dry-run"])
def test_settings_for_gpus_can_be_looked_at_without_one(method, flag, capsys):
    config = ["--config", str(ROOT / f"{method}/configs/{PRESETS[method]}.yaml")]
    assert importlib.import_module(f"{method}.train").main([*config, flag]) == 0
    assert importlib.import_module(f"benchmarks.{method}").main([*config, "--out", "/nowhere"]) == 2
    assert "bf16" not in capsys.readouterr().err
