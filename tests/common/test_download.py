"""What runs without network need is fetched before, all of it, and what cannot be had is said."""

from pathlib import Path

import pytest

import r_diverse.loop
import srpo.loop
import va_opd.loop
from common import download

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(monkeypatch) -> list[str]:
    """Names of the models that were asked for; "org/missing" is on no hub."""
    asked = []

    def fetch(name, ignore_patterns):
        asked.append(name)
        if name == "org/missing":
            raise RuntimeError("no such\nrepository")

    monkeypatch.setattr(download, "snapshot_download", fetch)
    return asked


def test_all_is_fetched_and_what_is_missing_is_said(hub, tmp_path, capsys):
    loaded = []

    def broken():
        raise ValueError("has no column")

    data = [("broken", broken), ("whole", lambda: loaded.append("whole"))]
    models = ["org/missing", "org/a", "org/a", str(tmp_path)]
    assert download.download(models, data) == 2
    assert (hub, loaded) == (["org/missing", "org/a"], ["whole"])
    said = capsys.readouterr()
    assert said.err.splitlines() == ["org/missing: no such repository", "broken: has no column"]
    assert said.out.splitlines()[-1] == "missing: 2"
    assert download.download(["org/a"], []) == 0
    assert "HF_HUB_OFFLINE=1" in capsys.readouterr().out


def test_an_experiment_names_all_that_it_needs(hub, monkeypatch):
    loaded = []
    monkeypatch.setattr(va_opd.loop, "load_splits_of", lambda args: loaded.append(args.dataset))
    monkeypatch.setattr(va_opd.loop, "paper_benchmark", lambda args, name: loaded.append(name))
    assert va_opd.loop.main(["--config", str(ROOT / "va_opd/configs/geo3k.yaml"), "--download"]) == 0
    assert hub == ["Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"]
    assert loaded == [
        "geo3k",
        *["wemath", "mathvista", "mathverse", "hallusionbench", "ai2d", "mmmu", "mmstar", "ocrbench"],
    ]

    hub.clear(), loaded.clear()
    monkeypatch.setattr(srpo.loop, "load_splits_of", lambda args: loaded.append(args.dataset))
    config = str(ROOT / "srpo/configs/qwen3_8b.yaml")
    assert srpo.loop.main(["--config", config, "--datasets", "all", "--download"]) == 0
    assert (hub, loaded) == (["Qwen/Qwen3-8B"], list(srpo.loop.DATASETS))

    hub.clear(), loaded.clear()
    monkeypatch.setattr(r_diverse.loop, "load_benchmark", lambda name, data: loaded.append(name))
    assert r_diverse.loop.main(["--config", str(ROOT / "r_diverse/configs/qwen3_4b.yaml"), "--download"]) == 0
    assert hub[:2] == ["Qwen/Qwen3-4B-Base", "Qwen/Qwen2.5-Coder-7B-Instruct"] and len(hub) == 3
    assert len(loaded) == 10 and {"math500", "bbeh"} < set(loaded)
