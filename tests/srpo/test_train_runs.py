"""Runs of SRPO on embedded additions: the run folder and its records, kills."""

import json
import signal

import pytest
import torch
import yaml
from training_runs import fails, run_until

from common.runs import exclusive, read_jsonl
from srpo import train


def test_the_steps_of_grpo_are_not_what_another_run_is(config, capsys):
    """They are asked for when GRPO is added to finished runs."""
    assert train.main(["--config", str(config), "--max_steps", "2"]) == 0
    assert train.main(["--config", str(config), "--max_steps", "2", "--grpo_steps", "2"]) == 0
    assert "done already" in capsys.readouterr().out
    grpo = ["--routing", "grpo", "--max_steps", "2", "--grpo_steps", "1"]
    assert train.main(["--config", str(config), *grpo]) == 0
    folder = train.run_path(*train.parse(["--config", str(config), *grpo]))
    assert train.main(["--config", str(folder / "config.yaml"), "--out", str(folder.parents[2])]) == 0


@pytest.mark.parametrize("field", ["engine", "eval_samples", "vllm_gpu_memory_utilization"])
def test_how_to_evaluate_and_what_fits_a_machine_may_change(config, field):
    values = {"engine": ("transformers", "vllm"), "eval_samples": (1, 2), "vllm_gpu_memory_utilization": (0.3, 0.6)}
    for value in values[field]:
        args, settings = train.parse(["--config", str(config), f"--{field}", str(value)])
        with train.open_run(args, settings, train.load_splits_of(args)) as folder:
            assert yaml.safe_load((folder.path / "config.yaml").read_text())[field] == value
            assert field not in json.loads((folder.path / "manifest.json").read_text())["config"]


def test_a_run_that_another_process_is_at_is_left_alone(config, capsys):
    folder = train.run_path(*train.parse(["--config", str(config)]))
    with exclusive(folder):
        assert "is in use by another process" in fails(train, capsys, config)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_run_is_recorded_done_once_and_not_overwritten_by_another(config, capsys, tmp_path, easy):
    assert train.main(["--config", str(config)]) == 0
    run = tmp_path / "runs/srpo/small-additions/srpo-seed0"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["state"] == "done"
    assert set(manifest["data"]) == {"train", "test", "teaching"}
    metrics = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    names = {"route/sdpo", "route/lone_success", "teacher/entropy", "weight_p90", "time/teacher", "time/generation"}
    assert names | {"time/reward", "teacher/scored_over_needed", "train_seconds", "step_time"} <= metrics[0].keys()
    assert {line["teacher/scored_over_needed"] for line in metrics} == {1.0}
    samples = read_jsonl(run / "samples.jsonl")
    assert {"prompt", "response", "reward", "route", "donor", "step"} == samples[0].keys()
    assert {sample["route"] for sample in samples} == {"grpo", "sdpo"}
    assert all((sample["donor"] >= 0) == (sample["route"] == "sdpo") for sample in samples)
    assert not list(run.glob("checkpoint-2/optimizer*")) + list(run.glob("checkpoint-2/self_teacher*"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()

    assert train.main(["--config", str(config)]) == 0
    assert "done already" in capsys.readouterr().out
    assert "learning_rate" in fails(train, capsys, config, "--learning_rate", "1e-4")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_killed_and_started_again_a_run_ends_as_if_nothing_had_been(config, tmp_path):
    fields = ["--max_steps", "10", "--reward_threshold", "-1"]  # all correct: the average still moves by weight decay
    straight = ["--experiment", "straight", *fields]
    assert run_until(train, config, None, *straight) == 0
    assert run_until(train, config, 4, *fields) == -signal.SIGKILL
    assert run_until(train, config, None, *fields) == 0
    curves, names = [], ("loss", "grad_norm", "reward", "completions/mean_length", "teacher/distance")
    for extra in (straight, fields):
        run = train.run_path(*train.parse(["--config", str(config), *extra]))
        lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
        curves.append([[line["step"], *(line[name] for name in names)] for line in lines])
    assert curves[0] == curves[1]
    assert len(curves[0]) == 10


def test_records_are_of_the_first_rollouts():
    rollouts = {
        "prompts": list("pqr"),
        "texts": list("abc"),
        "rewards": torch.tensor([0.1234567, 1.0, 0.0]),
        "distill": [True, False, False],
        "grpo": [True, True, False],
        "donor": torch.tensor([1, -1, -1]),
    }
    records = train.rollout_records(rollouts, 9)
    assert records == [
        {"prompt": "p", "response": "a", "reward": 0.12346, "route": "grpo+sdpo", "donor": 1},
        {"prompt": "q", "response": "b", "reward": 1.0, "route": "grpo", "donor": -1},
        {"prompt": "r", "response": "c", "reward": 0.0, "route": "none", "donor": -1},
    ]
    assert train.rollout_records(rollouts, 2) == records[:2] and train.rollout_records({}, 2) == []


def test_grpo_shows_the_rollouts_of_a_batch_once(config, tmp_path):
    steps = ["--routing", "grpo", "--grpo_steps", "2", "--steps_per_generation", "4", "--max_steps", "4"]
    assert train.main(["--config", str(config), *steps]) == 0
    samples = read_jsonl(tmp_path / "runs/srpo/small-additions/grpo-seed0/samples.jsonl")
    assert [sample["step"] for sample in samples] == [1] * 8 + [3] * 8
