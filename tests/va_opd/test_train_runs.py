"""Runs of VA-OPD on embedded digits: the run folder and its records, kills, processes."""

import json
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import yaml
from training_runs import fails, run_until
from transformers import TrainingArguments

from common.runs import exclusive, last_checkpoint, read_jsonl
from va_opd import train


def test_after_a_mistake_the_folder_is_free(config, capsys):
    """A wrong teacher must not leave a folder that refuses the right one."""
    assert "no such folder" in fails(train, capsys, config, "--teacher", "/nowhere")
    assert train.main(["--config", str(config), "--max_steps", "1"]) == 0


def test_a_run_that_another_process_is_at_is_left_alone(config, capsys):
    folder = train.run_path(*train.parse(["--config", str(config)]))
    with exclusive(folder):
        assert "is in use by another process" in fails(train, capsys, config)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_run_is_recorded_done_once_and_not_overwritten_by_another(config, capsys, tmp_path):
    assert train.main(["--config", str(config)]) == 0
    run = tmp_path / "runs/va_opd/small/va_opd-seed0"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["state"] == "done" and set(manifest["data"]) == {"train", "validation"}
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert {"va/mean", "kl/high", "time/degraded_images", "entropy"} <= metrics[0].keys()
    sample = read_jsonl(run / "samples.jsonl")[0]
    assert len(sample["tokens"]) == len(sample["va"]) and sample["prompt"]
    assert (run / "model" / "model.safetensors").exists()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()

    assert train.main(["--config", str(config)]) == 0
    assert "done already" in capsys.readouterr().out
    assert "learning_rate" in fails(train, capsys, config, "--learning_rate", "1e-4")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_records_are_of_the_first_rollouts(tiny_models, tmp_path):
    tokenizer = train.models.load_processor(tiny_models["student"]).tokenizer
    prompts, ids = (tokenizer(texts)["input_ids"] for texts in (["Q1", "Q2", "Q3"], ["ab", "cd", "ef"]))
    rollouts = {
        "prompt_ids": torch.tensor([[tokenizer.pad_token_id, *row] for row in prompts]),
        "completion_ids": torch.tensor([[*row, tokenizer.eos_token_id] for row in ids]),
        "mask": torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1]]),  # the one in the middle is of a tool
        "va": torch.tensor([[0.1234567, 0.0, 1.0], [0.2, 0.3, 0.4], [0.0, 0.0, 0.0]]),
        "weights": torch.tensor([0.75, 0.25, 1.0]),
    }
    end = tokenizer.eos_token
    records = train.rollout_records(rollouts, tokenizer, 2)
    assert records == [
        {"prompt": "Q1", "response": "ab", "tokens": ["a", "b", end], "va": [0.12346, 0.0, 1.0], "weight": 0.75},
        {"prompt": "Q2", "response": "c", "tokens": ["c", end], "va": [0.2, 0.4], "weight": 0.25},
    ]
    assert train.rollout_records(rollouts, tokenizer, 9)[:2] == records
    assert len(train.rollout_records(rollouts, tokenizer, 9)) == 3
    twice = {name: torch.cat([value, value]) for name, value in rollouts.items()}
    args = SimpleNamespace(num_generations=2)
    trainer = SimpleNamespace(last_rollouts=twice, args=args, processing_class=tokenizer)
    assert len(train.VAOPDLog(tmp_path, None, trainer).rollouts()) == 4  # of two prompts


def test_killed_and_started_again_a_run_ends_as_if_nothing_had_been(config):
    fields = ["--max_steps", "10"]
    straight = ["--experiment", "straight", *fields]
    assert run_until(train, config, None, *straight) == 0
    assert run_until(train, config, 4, *fields) == -signal.SIGKILL
    assert run_until(train, config, None, *fields) == 0
    names = ("loss", "grad_norm", "va/mean", "kl/high", "entropy")
    curves = []
    for extra in (straight, fields):
        run = train.run_path(*train.parse(["--config", str(config), *extra]))
        lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
        curves.append([[line["step"], *(line[name] for name in names)] for line in lines])
    assert curves[0] == curves[1] and len(curves[0]) == 10


def test_a_run_that_died_of_a_long_prompt_goes_on_with_a_higher_limit(config, capsys, tmp_path):
    """To the end that it would have had with it: the limit only refuses."""
    rows = [{"problem": f"Find {i}." + " Now" * 9 * (i == 10), "images": [], "answer": "1"} for i in range(12)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = ["--dataset", "geo3k", "--data", str(tmp_path), "--save_steps", "1", "--weighting", "none"]
    straight = ["--experiment", "straight", *fields]
    assert train.main(["--config", str(config), *straight]) == 0
    said = fails(train, capsys, config, *fields, "--max_prompt_length", "50")
    assert "the prompt of the row with id '10' has 63 tokens, above max_prompt_length=50: raise the limit" in said
    run = train.run_path(*train.parse(["--config", str(config), *fields]))
    assert last_checkpoint(run).name == "checkpoint-3"
    assert train.main(["--config", str(config), *fields, "--max_prompt_length", "63"]) == 0
    other, curves = train.run_path(*train.parse(["--config", str(config), *straight])), []
    for folder in (run, other):
        lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
        curves.append([(line["step"], line["loss"], line["grad_norm"]) for line in lines])
    assert curves[0] == curves[1] and len(curves[0]) == 6


def test_benchmarks_may_be_added_to_a_finished_run(config, tmp_path, capsys):
    assert train.main(["--config", str(config), "--max_steps", "1"]) == 0
    capsys.readouterr()
    assert train.main(["--config", str(config), "--max_steps", "1", "--benchmarks", "mmstar"]) == 0
    assert "done already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields",
    [
        *(["--engine", "vllm"], ["--eval_batch_size", "3"], ["--eval_samples", "2"], ["--eval_temperature", "0.5"]),
        *(["--vllm_gpu_memory_utilization", "0.4"], ["--teacher_offload", "True"], ["--run_name", "again"]),
        *(["--max_prompt_length", "300"], ["--teacher_parity", "False"], ["--teacher_parity_limit", "0.1"]),
    ],
)
def test_how_to_evaluate_and_what_fits_a_machine_may_change(config, capsys, fields):
    command = ["--config", str(config), "--max_steps", "1", "--save_strategy", "no"]
    assert train.main(command) == 0
    run, name = train.run_path(*train.parse(command)), fields[0].removeprefix("--")
    capsys.readouterr()
    assert train.main([*command, *fields]) == 0
    assert "done already" in capsys.readouterr().out
    assert str(yaml.safe_load((run / "config.yaml").read_text())[name]) == fields[1]


@pytest.mark.parametrize("method", ["va_opd", "grpo"])
def test_a_process_without_a_launcher_trains_on_one_gpu_of_eight(config, monkeypatch, method):
    args, settings = train.parse(["--config", str(config), "--method", method])
    settings._n_gpu = 0  # not looked at yet, or, as here, on a CPU
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self._n_gpu or 8))
    trainer = train.build_trainer(args, settings, train.load_splits_of(args))
    assert trainer.args.n_gpu == 1
    if method == "grpo":
        assert trainer.args.model_init_kwargs == {"device_map": None}  # else the KL reference is spread over all eight
    assert trainer.args.train_batch_size == settings.per_device_train_batch_size
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)


@pytest.mark.parametrize("main", [True, False])
def test_the_first_of_several_processes_makes_the_caches_and_checks_the_images(config, monkeypatch, main):
    order = []

    @contextmanager
    def first():
        order.append("first")
        yield
        order.append("then")

    state = SimpleNamespace(is_main_process=main, main_process_first=first)
    monkeypatch.setattr(train, "PartialState", lambda: state)
    monkeypatch.setattr(train, "load_splits", lambda *_, check_images, **options: order.append(check_images))
    train.load_splits_of(train.parse(["--config", str(config)])[0])
    assert order == ["first", main, "then"]
