"""VA-OPD's experiment: its stages, end to end, what stops it at its start."""

import importlib
import itertools
import json
import re
from pathlib import Path

import forks
import pytest

from common.runs import read_jsonl
from va_opd import loop, train

ROOT = Path(__file__).resolve().parents[2]


def test_every_seed_has_its_base_and_teacher_and_the_report_is_of_one_that_ran():
    """The report of a seed looks for the base and the teacher of that seed."""
    fields = ["--config", str(ROOT / "va_opd/configs/tiny.yaml")]
    stages = loop.plan(fields, train.parse(fields)[0], ["va_opd"], ["1", "2"], ["python", "-m"])
    seeds = {name: words[words.index("--seed") + 1] for stage in stages[1:] for name, words in stage}
    assert seeds == {
        **{f"{kind}-seed{seed}": seed for kind in ("train-va_opd", "evaluate-va_opd") for seed in "12"},
        **{f"evaluate-{kind}-seed{seed}": seed for kind in ("base", "teacher") for seed in "12"},
        "report": "1",
    }


def test_no_reader_is_made_under_the_name_of_another_model():
    fields = ["--config", str(ROOT / "va_opd/configs/tiny.yaml")]
    made = []
    for other in ([], ["--model=org/vl"], ["--model=org/vl", "--teacher=org/teacher"]):
        plan = loop.plan([*fields, *other], train.parse([*fields, *other])[0], ["va_opd"], ["0"], ["python", "-m"])
        made.append([name for stage in plan for name, _ in stage if name.startswith("make-")])
    assert made == [["make-teacher", "make-base"], ["make-teacher"], []]


def test_without_seeds_the_experiment_has_the_one_of_its_config(config, capsys):
    config.write_text(config.read_text().replace("seed: 0", "seed: 7"))
    assert loop.main(["--config", str(config), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "--seed 7 --method va_opd" in printed and printed.count("--seed 7") == printed.count("--seed")


def test_what_several_gpus_need_is_looked_for_before_anything_runs(config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "check_packages", lambda *given: seen.append(given))
    monkeypatch.setattr(loop, "run_stages", lambda stages, *given: seen.append(given) or 0)
    assert loop.main(["--config", str(config), "--engine", "vllm", "--gpus", "2", "--sharding", "zero3"]) == 0
    assert seen == [(True, 2, "zero3", []), (tmp_path / "runs/va_opd/small/logs", 2)]


def in_this_process(stages, *given) -> int:
    """The same commands, without a start of Python for each."""
    for _, (_, _, module, *words) in itertools.chain(*stages):
        assert importlib.import_module(module).main(words) == 0
    return 0


def test_the_experiment_runs_end_to_end_and_a_second_time_does_nothing(
    config, tmp_path, tiny_models, capsys, monkeypatch
):
    monkeypatch.setattr(loop, "run_stages", forks.run_stages)
    fields = ["--config", str(config), "--max_steps", "2", "--variants", "va_opd"]
    assert loop.main(fields) == 0
    folder = tmp_path / "runs/va_opd/small"
    report = (folder / "report.md").read_text()
    for name in ("Base student", "VA-OPD", "Teacher"):
        assert name in report
    assert "Standard OPD" not in report  # which did not run: a row of the paper's table
    for name in ("accuracy", "training", "va_mass", "va_tokens"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5000
    selection = json.loads((folder / "va_opd-seed0/eval/selection.json").read_text())
    assert selection["best"] == 2 and set(selection["accuracy"]) == {"2"}
    assert "Checkpoint chosen on these problems: VA-OPD." in report
    assert "| accuracy, last checkpoint |" in report
    before = (folder / "va_opd-seed0/eval/digits/samples.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(loop, "run_stages", in_this_process)
    assert loop.main(fields) == 0
    assert (folder / "va_opd-seed0/eval/digits/samples.jsonl").stat().st_mtime_ns == before


def test_a_failing_stage_is_the_experiments_exit_code(config, monkeypatch):
    """That it stops the others and shows its log: tests/common/test_stages.py."""
    monkeypatch.setattr(loop, "run_stages", lambda *given: 2)
    assert loop.main(["--config", str(config)]) == 2


def test_an_unknown_variant_stops_the_experiment_at_its_start(config, capsys, monkeypatch):
    monkeypatch.setattr(loop, "run_stages", None)
    assert loop.main(["--config", str(config), "--variants", "opdd"]) == 2
    assert "choose among va_opd, opd" in capsys.readouterr().err


def test_an_unknown_benchmark_stops_the_experiment_at_its_start(config, capsys, tmp_path):
    assert loop.main(["--config", str(config), "--benchmarks", "mmstar,mathvista2"]) == 2
    assert "unknown benchmarks mathvista2; choose among" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("field", ["model", "teacher", "data", "validation_data", "benchmark_data"])
def test_a_path_where_there_is_nothing_is_said_by_the_dry_run_too(field, capsys, monkeypatch):
    monkeypatch.setattr(loop, "run_stages", None)
    words = ["--config", str(ROOT / "va_opd/configs/geo3k.yaml"), "--use_cpu", "true", "--use_vllm", "false"]
    for path in ("/no/such/8B", "no/such/folder"):
        assert loop.main([*words, "--dry_run", f"--{field}", path]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"va_opd.loop: {field} {path!r}: there is no such ") and not said.out


def test_a_model_that_is_nowhere_is_said_once_before_anything_runs(config, capsys, monkeypatch):
    monkeypatch.setattr(loop, "run_stages", None)
    assert loop.main(["--config", str(config), "--teacher", "nope"]) == 2
    assert capsys.readouterr().err.startswith("va_opd.loop: teacher 'nope': it is no local folder, and the hub cannot")
    assert loop.main(["--config", str(config), "--teacher", "nope", "--dry_run"]) == 0  # asks no hub
    assert "memory: unknown, nope: not at hand" in capsys.readouterr().out  # the student is


def test_what_the_tiny_preset_makes_need_not_be_there(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert loop.main(["--config", str(ROOT / "va_opd/configs/tiny.yaml"), "--dry_run"]) == 0
    assert "runs/va_opd/tiny/models/base and runs/va_opd/tiny/models/teacher: not at hand" in capsys.readouterr().out


def test_plain_opd_runs_end_to_end_as_the_readme_says(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "run_stages", in_this_process)
    (words,) = set(re.findall(r"--variants opd [^`]*false", (ROOT / "va_opd/README.md").read_text()))
    assert loop.main(["--config", str(config), *words.split()]) == 0
    experiment = tmp_path / "runs/va_opd/small"
    logged = {name for line in read_jsonl(experiment / "opd-seed0/metrics.jsonl") for name in line}
    assert "loss" in logged and not [name for name in logged if name.startswith(("va/", "kl/"))]
    assert "| Standard OPD |" in (experiment / "report.md").read_text()
