"""The measured tables say what the result files say, and the kill harness sees a difference."""

import json

import pytest

from benchmarks import kill_test, tables
from benchmarks.machine import machine


def test_the_readme_is_made_of_the_results():
    assert tables.main(["--check"]) == 0


def test_every_results_file_is_in_a_table_or_in_the_text():
    readme = (tables.FOLDER / "README.md").read_text()
    for path in (tables.FOLDER / "results").glob("*.json"):
        assert path.stem.removesuffix("_gpu") in tables.ROWS or f"benchmarks.{path.stem}" in readme, path.name


def test_growth_is_the_exponent_of_ours_and_the_peers():
    assert tables.growth([1, 2, 4], [3, 6, 12], [1, 4, 16]) == "1.00 / 2.00"


def test_a_machine_names_absent_packages():
    found = machine("numpy", "no-such-package")
    assert found["packages"]["no-such-package"] is None
    assert found["packages"]["numpy"]
    assert "cores" in found["processor"] or found["processor"]


@pytest.fixture
def finished(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    lines = [{"step": 1, "loss": 0.5, "step_time": 1.0, "samples_per_second": 3.0}, {"step": 1, "train_loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/model.safetensors").write_bytes(b"older")
    return tmp_path


def test_runs_are_compared_without_times_and_checkpoints(finished):
    before = kill_test.content(finished)
    assert sorted(before) == ["metrics.jsonl", "model/model.safetensors"]
    metrics = finished / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("1.0", "2.0").replace('"train_loss": 0.5', '"train_loss": 0.1'))
    assert kill_test.content(finished) == before
    metrics.write_text(metrics.read_text().replace('"loss": 0.5', '"loss": 0.5000001'))
    assert kill_test.content(finished) != before


def test_a_changed_weight_is_a_difference(finished):
    before = kill_test.content(finished)
    (finished / "model/model.safetensors").write_bytes(b"weightz")
    assert kill_test.content(finished)["metrics.jsonl"] == before["metrics.jsonl"]
    assert kill_test.content(finished) != before


def test_an_unknown_method_is_one_sentence(capsys):
    assert kill_test.main(["--methods", "ppo"]) == 2
    assert "unknown methods ['ppo']; choose among va_opd, srpo, r_diverse" in capsys.readouterr().err
