"""The command lines: settings, bad input, run folders, resuming, the experiment; tiny models, embedded digits."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import trl
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from transformers import TrainingArguments

from benchmarks import va_opd as report
from common import stages
from common.cli import changed_settings
from common.evaluation import BENCHMARKS, Completion, Decoding, engines, load_benchmark, score_responses
from common.runs import atomic_write_json, claim, exclusive, last_checkpoint, read_jsonl, write_jsonl
from common.tiny import tiny_qwen3_vl
from va_opd import baselines, data, evaluate, loop, train
from va_opd.checks import banned_ids
from va_opd.data import digit_rows

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "va_opd" / "configs").glob("*.yaml"))
SMALL = {
    "experiment": "small",
    "dataset": "digits",
    "limit": 64,
    "validation_size": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 8,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "max_completion_length": 6,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "eval_samples": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "doctor_steps": 0,
    "seed": 0,
}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name, hidden, seed in (("student", 32, 0), ("teacher", 64, 1)):
        model, processor = tiny_qwen3_vl(hidden=hidden, seed=seed)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("student", "teacher")}


@pytest.fixture
def config(tmp_path, tiny_models) -> Path:
    settings = {
        **SMALL,
        "model": tiny_models["student"],
        "teacher": tiny_models["teacher"],
        "out": str(tmp_path / "runs"),
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def fails(capsys, config: Path, *fields: str) -> str:
    """The one sentence that a mistake gives, after what libraries may have written of progress."""
    capsys.readouterr()
    assert train.main(["--config", str(config), *fields]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("va_opd.train: ") and "Traceback" not in "".join(lines)
    return lines[-1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_parsed_and_dry_run(path, capsys):
    assert train.main(["--config", str(path), "--dry_run"]) == 0
    assert loop.main(["--config", str(path), "--dry_run", "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "memory a process" in printed or "memory: unknown" in printed
    assert "-m va_opd.train --config" in printed and "--num_processes 8" in printed


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


def test_the_paper_config_is_the_papers():
    args, config = train.parse(["--config", str(ROOT / "va_opd/configs/geo3k.yaml"), "--dry_run"])
    rollouts = 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert (rollouts, config.num_generations, rollouts // config.num_generations) == (64, 4, 16)
    assert (config.learning_rate, config.adam_beta1, config.adam_beta2, config.weight_decay) == (1e-6, 0.9, 0.95, 0.1)
    assert (config.lr_scheduler_type, config.warmup_steps, config.num_train_epochs) == ("cosine", 0.05, 5)
    assert (config.temperature, config.top_p, config.max_completion_length) == (0.7, 0.95, 4096)
    assert (config.max_grad_norm, config.seed, config.bf16, config.kl_temperature) == (1.0, 42, True, 1.0)
    assert (config.degradation_ratio, config.weight_temperature, config.va_eps) == (0.1, 1.0, 1e-6)
    assert (config.top_fraction, config.high_weight, config.weighting) == (0.2, 0.5, "va")
    assert (args.validation_size, args.eval_samples, args.eval_temperature, config.save_steps) == (200, 8, 1.0, 50)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("experiment: 12", r"experiment must be a text \(in quotes\), got 12"),
        ("benchmarks: [wemath, mmstar]", r"benchmarks must be a text \(in quotes\), got \['wemath', 'mmstar'\]"),
        ("model:", "model must be a text .*, got None"),
        ("limit: true", "limit must be int, got True"),
        ("lora_rank: 2.5", "lora_rank must be int, got 2.5"),
        ("learning_rate: yes", "learning_rate must be float, got True"),
    ],
)
def test_a_value_in_yaml_of_another_type_is_one_clear_sentence(config, tmp_path, line, message):
    path = tmp_path / "other.yaml"
    path.write_text(f"{config.read_text()}\n{line}\n")
    with pytest.raises(ValueError, match=f"^{message}"):
        train.parse(["--config", str(path)])
    path.write_text(f"{config.read_text()}\nlearning_rate: 1\nlimit: null\nload_in_4bit: 0\n")
    assert train.parse(["--config", str(path)])[1].learning_rate == 1.0


def test_the_command_line_wins_over_the_file(config):
    _, settings = train.parse(["--config", str(config), "--method", "opd", "--seed", "7"])
    assert (settings.weighting, settings.seed, settings.max_steps) == ("none", 7, 6)
    assert settings.output_dir.endswith("va_opd/small/opd-seed7")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--learning_rat", "1e-3"], "did you mean 'learning_rate'"),
        (["--num_generations", "1"], "num_generations=1"),
        (["--num_generations", "3"], "do not divide into groups"),
        (["--model", "nowhere/at/all"], "no such folder"),
        (["--teacher", "/nowhere"], "no such folder"),
        (["--dataset", "digit"], "dataset must be"),
        (["--dataset", "geo3k", "--data", "/nowhere"], "no local path"),
        (["--limit", "1"], "fewer than the 2 of one optimizer step"),
        (["--max_prompt_length", "5"], "above max_prompt_length=5"),
        (["--weighting", "vision"], "weighting"),
        (["--config_file", "x"], "unknown field"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--eval_samples", "0"], "eval_samples must be at least 1, got 0"),
        (["--eval_temperature", "nan"], "eval_temperature must be at least 0 and finite"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1, and whole, got 0"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, and whole, got 0"),
        (["--learning_rate", "nan"], "learning_rate must be at least 0 and finite"),
        (["--learning_rate", "-1"], "learning_rate must be at least 0 and finite"),
        (["--max_completion_length", "0"], "max_completion_length must be at least 1"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_trained(config, capsys, fields, message, tmp_path):
    if fields[0] == "--weighting":  # argparse's own list of choices
        with pytest.raises(SystemExit) as stop:
            train.main(["--config", str(config), *fields])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    else:
        assert message in fails(capsys, config, *fields)
    assert not list(tmp_path.glob("runs/**/model"))


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [1", "is no YAML"), ("a: \x00", "is no YAML"), ("1: 2", "unknown field '1'"), ("- 1", "holds no mapping")],
)
def test_a_broken_config_file_is_one_sentence(tmp_path, capsys, content, message):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    for argv in (["--config", str(path)], [f"--config={path}"]):
        assert train.main(argv) == 2
        assert message in capsys.readouterr().err


def test_after_a_mistake_the_folder_is_free(config, capsys):
    """A wrong teacher must not leave a folder that refuses the right one."""
    assert "no such folder" in fails(capsys, config, "--teacher", "/nowhere")
    assert train.main(["--config", str(config), "--max_steps", "1"]) == 0


def test_a_missing_and_an_odd_config_file(tmp_path, capsys):
    assert "does not exist" in fails(capsys, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    assert "no mapping" in fails(capsys, tmp_path / "list.yaml")


def test_a_teacher_with_other_tokens_is_refused(config, capsys, tmp_path, tiny_models):
    model, processor = tiny_qwen3_vl(hidden=32)
    processor.tokenizer.add_tokens(["<extra>"])
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    assert "different vocabularies" in fails(capsys, config, "--teacher", str(tmp_path / "other"))


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>"])
def test_a_special_token_in_a_problem_stops_the_run_at_its_start(config, capsys, tmp_path, token):
    Image.new("RGB", (64, 48), "white").save(tmp_path / "a.png")
    for split, problem in (("train", "Find <image> x."), ("validation", f"Find {token} x.")):
        rows = [{"problem": problem if i else "Find x.", "images": ["a.png"], "answer": "1"} for i in range(8)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    message = fails(capsys, config, "--dataset", "geo3k", "--data", str(tmp_path), "--min_pixels", "16")
    assert f"the prompt of row 1 holds {token}, a special token of the model: put a space" in message


def test_a_truncated_image_stops_the_run_at_its_start(config, capsys, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        Image.new("RGB", (64, 48), "white").save(folder / f"{split}.png")
        rows = [{"problem": f"Find x{i}.", "images": [f"{split}.png"], "answer": "1"} for i in range(8)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (folder / "train.png").open("r+b") as file:
        file.truncate(60)
    assert "unreadable images" in fails(capsys, config, "--dataset", "geo3k", "--data", str(folder))


def test_a_run_that_another_process_is_at_is_left_alone(config, capsys):
    folder = train.run_path(*train.parse(["--config", str(config)]))
    with exclusive(folder):
        assert "is in use by another process" in fails(capsys, config)
    assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("flag", ["--dry_run", "--dry_run=true", "--dry-run"])
def test_settings_for_gpus_can_be_looked_at_without_one(flag, capsys):
    assert train.main(["--config", str(ROOT / "va_opd/configs/geo3k.yaml"), flag]) == 0
    assert report.main(["--config", str(ROOT / "va_opd/configs/geo3k.yaml"), "--out", "/nowhere"]) == 2
    assert "bf16" not in capsys.readouterr().err


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
    assert "learning_rate" in fails(capsys, config, "--learning_rate", "1e-4")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_records_are_of_the_first_rollouts(tiny_models):
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


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        *(([], "va_opd"), (["--weighting", "rollout"], "rollout_only"), (["--weighting", "token"], "token_only")),
        *((["--weighting", "none"], "opd"), (["--method", "opd"], "opd"), (["--method", "kd"], "kd")),
    ],
)
def test_a_run_is_named_as_its_row_in_the_report(config, fields, name):
    assert train.run_path(*train.parse(["--config", str(config), *fields])).name == f"{name}-seed0"


def test_the_saved_settings_are_the_same_run_again(config, tmp_path):
    args, settings = train.parse(["--config", str(config), "--method", "opd", "--top_fraction", "0.3"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(changed_settings(args, settings)))
    again_args, again = train.parse(["--config", str(saved), "--out", args.out])
    assert changed_settings(again_args, again) == changed_settings(args, settings)
    assert again.output_dir == settings.output_dir


def run_until(config: Path, step: int | None, *fields: str) -> int:
    """`python -m va_opd.train`, killed with SIGKILL once the checkpoint of `step` is complete."""
    command = [sys.executable, "-m", "va_opd.train", "--config", str(config), *fields]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, cwd=config.parent, stdout=subprocess.DEVNULL)
    run = train.run_path(*train.parse(["--config", str(config), *fields]))
    while step is not None and process.poll() is None:
        found = last_checkpoint(run)
        if found is not None and int(found.name.split("-")[1]) >= step:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    return process.wait()


def test_killed_and_started_again_a_run_ends_as_if_nothing_had_been(config):
    fields = ["--max_steps", "10"]
    straight = ["--experiment", "straight", *fields]
    assert run_until(config, None, *straight) == 0
    assert run_until(config, 4, *fields) == -signal.SIGKILL
    assert run_until(config, None, *fields) == 0
    names = ("loss", "grad_norm", "va/mean", "kl/high", "entropy")
    curves = []
    for extra in (straight, fields):
        run = train.run_path(*train.parse(["--config", str(config), *extra]))
        lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
        curves.append([[line["step"], *(line[name] for name in names)] for line in lines])
    assert curves[0] == curves[1] and len(curves[0]) == 10


@pytest.mark.parametrize("method", ["sft", "kd", "grpo"])
def test_the_baselines_train_from_the_same_entry_point(config, method, tmp_path, monkeypatch):
    # Random models never answer right: let every other response count, so that sft has rows and grpo a signal
    counter = iter(range(10_000))
    monkeypatch.setattr(data, "digits_correct", lambda response, row: next(counter) % 2 == 0)
    monkeypatch.setattr(data, "build_engine", lambda args, model, config: Parrot(model))
    assert train.main(["--config", str(config), "--method", method, "--max_steps", "2"]) == 0
    run = tmp_path / f"runs/va_opd/small/{method}-seed0"
    assert (run / "model" / "model.safetensors").exists()
    assert any("loss" in line for line in read_jsonl(run / "metrics.jsonl"))
    if method == "sft":
        sampled = read_jsonl(tmp_path / "runs/va_opd/small/teacher-seed0/responses.jsonl")
        assert len({record["id"] for record in sampled}) == 64


@pytest.mark.parametrize(("method", "complete"), [("sft", 64), ("kd", 0)])
def test_a_teacher_without_a_usable_response_is_said(config, capsys, monkeypatch, method, complete):
    monkeypatch.setattr(Parrot, "finish_reason", "stop" if complete else "length")
    monkeypatch.setattr(data, "build_engine", lambda args, model, config: Parrot("wrong"))
    said = fails(capsys, config, "--method", method)
    assert f"method {method} has nothing to train on: of the teacher's 64 responses {complete} are complete" in said


def test_truncated_responses_of_the_teacher_teach_nothing(config, monkeypatch):
    class Cut(Parrot):
        def generate(self, prompts, decoding, seeds):
            return [Completion(f"{seed}", 1, "length" if seed % 4 == 0 else "stop") for seed in seeds]

    monkeypatch.setattr(data, "build_engine", lambda args, model, config: Cut("teacher"))
    args, settings = train.parse(["--config", str(config), "--method", "kd"])
    rows = data.teacher_rows(args, settings, train.load_splits_of(args)["train"])
    assert [row[0]["content"] for row in rows["completion"]] == [str(i) for i in range(64) if i % 4]


def test_responses_are_sampled_by_a_process_of_its_own(config, capsys, monkeypatch):
    """Among the processes of a launcher an engine would join their process group, and end it."""
    made, several = [], {"main_process_first": nullcontext, "is_main_process": True}
    monkeypatch.setattr(data, "build_engine", lambda args, model, config: made.append(Parrot(model)) or made[-1])
    with monkeypatch.context() as patch:
        patch.setattr(train, "PartialState", lambda: SimpleNamespace(**several))
        patch.setattr(data, "PartialState", lambda: SimpleNamespace(num_processes=2, **several))
        patch.setattr(train, "train", lambda args, config: data.teacher_rows(args, config, rows))
        rows = train.load_splits_of(train.parse(["--config", str(config)])[0])["train"]
        said = fails(capsys, config, "--method", "kd")
        assert "lacks 64 of 64 responses" in said and "--sample_only true" in said and not made
        patch.setattr(data, "PartialState", lambda: SimpleNamespace(num_processes=1, **several))
        assert train.main(["--config", str(config), "--sample_only", "true"]) == 0
        assert len(made) == 1 and made[0].closed
        patch.setattr(data, "PartialState", lambda: SimpleNamespace(num_processes=2, **several))
        assert train.main(["--config", str(config), "--method", "kd"]) == 0
    assert len(made) == 1
    args, _ = train.parse(["--config", str(config)])
    stages = loop.plan(["--config", str(config)], args, ["opd", "kd", "sft"], ["0", "1"], ["launch"])
    sampled = [command for name, command in stages[1] if name.startswith("teacher-seed")]
    assert [command[command.index("--seed") + 1] for command in sampled] == ["0", "1"]
    assert all("launch" not in command and "--sample_only" in command for command in sampled)
    assert not any("--sample_only" in c for stage in loop.plan([], args, ["opd"], ["0"], []) for _, c in stage)


def test_the_experiment_runs_end_to_end_and_a_second_time_does_nothing(
    config, tmp_path, tiny_models, capsys, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fields = ["--config", str(config), "--max_steps", "2", "--variants", "va_opd"]
    assert loop.main(fields) == 0
    folder = tmp_path / "runs/va_opd/small"
    report = (folder / "report.md").read_text()
    for name in ("Base student", "Standard OPD", "VA-OPD", "Teacher", "| CoT-SFT | 39.7 |  |"):
        assert name in report
    for name in ("accuracy", "training", "va_mass", "va_tokens"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5000
    selection = json.loads((folder / "va_opd-seed0/eval/selection.json").read_text())
    assert selection["best"] == 2 and set(selection["accuracy"]) == {"2"}
    assert "Checkpoint chosen on these problems: VA-OPD." in report
    assert "| accuracy, last checkpoint |" in report
    before = (folder / "va_opd-seed0/eval/digits/samples.jsonl").stat().st_mtime_ns
    assert loop.main(fields) == 0
    assert (folder / "va_opd-seed0/eval/digits/samples.jsonl").stat().st_mtime_ns == before


# --- results belong to their settings ----------------------------------------------------------------


def test_results_of_other_settings_are_refused_without_loading_a_model(config, tiny_models, capsys, monkeypatch):
    fields = ["--config", str(config)]
    assert evaluate.main(["base", *fields]) == 0
    out = train.run_path(*train.parse(fields)).with_name("base-seed0") / "eval"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.delattr(evaluate, "build_engine")
    monkeypatch.delattr(evaluate, "VAOPDTrainer")
    others = {
        "eval_temperature": ("0.5", "1.0"),
        "eval_samples": ("2", "1"),
        "model": (tiny_models["teacher"], repr(tiny_models["student"])),
        "teacher": (tiny_models["student"], repr(tiny_models["teacher"])),
        "degradation_ratio": ("0.5", "0.1"),
        "validation_size": ("4", "8"),
    }
    for name, (other, found) in others.items():
        capsys.readouterr()
        assert evaluate.main(["base", *fields, f"--{name}", other]) == 2
        assert f"{out} holds results of {name}={found}, these settings have" in capsys.readouterr().err
    assert evaluate.main(["base", *fields]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    args, _ = train.parse([*fields, "--eval_temperature", "0.5", "--eval_samples", "2"])
    assert "8 held-out problems, 1 samples each at temperature 1.0;" in report.report(args, 0)  # of the record

    (out / "settings.json").unlink()
    capsys.readouterr()
    assert evaluate.main(["base", *fields]) == 2
    assert "no readable settings.json that says of which settings: move the folder away" in capsys.readouterr().err


def test_a_run_is_evaluated_with_the_models_that_it_was_trained_with(config, tiny_models, capsys):
    fields = ["--config", str(config), "--max_steps", "1"]
    assert train.main(fields) == 0
    for name, other in (("model", "teacher"), ("teacher", "student")):
        capsys.readouterr()
        assert evaluate.main(["run", *fields, f"--{name}", tiny_models[other]]) == 2
        assert f"was trained with {name}=" in capsys.readouterr().err


def test_an_evaluation_that_failed_before_its_first_result_leaves_the_folder_free(config, capsys):
    fields = ["--config", str(config)]
    assert evaluate.main(["base", *fields, "--model", "/nowhere"]) == 2
    args, settings = train.parse(fields)
    rows = train.load_splits_of(args)["validation"]
    out = train.run_path(args, settings).with_name("base-seed0") / "eval"
    assert json.loads((out / "settings.json").read_text())["model"] == "/nowhere"
    claim(out / "settings.json", evaluate.settings_of("base", args, settings, rows), any(out.rglob("*.jsonl")))
    assert json.loads((out / "settings.json").read_text())["model"] == args.model


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_results_that_do_not_say_of_which_settings_are_refused(tmp_path, content):
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="no readable settings.json that says of which settings: move the folder"):
        claim(path, {"seed": 0}, True)


class Parrot:
    """An engine that answers with its name and the seed of the row."""

    finish_reason, closed = "stop", False

    def __init__(self, name: str):
        self.name = name

    def generate(self, prompts, decoding, seeds):
        return [Completion(f"{self.name} {seed}", 1, self.finish_reason) for seed in seeds]

    def close(self):
        self.closed = True


def test_the_teachers_responses_are_not_reused_for_other_settings(config, tmp_path, tiny_models, monkeypatch):
    monkeypatch.setattr(data, "build_engine", lambda args, model, config: Parrot(model))
    cache = tmp_path / "runs/va_opd/small/teacher-seed0/responses.jsonl"

    def sample(*fields: str) -> list:
        args, settings = train.parse(["--config", str(config), "--method", "kd", *fields])
        return read_jsonl(data.sample_teacher(args, settings, train.load_splits_of(args)["train"]))

    sampled = sample()
    cache.write_text("".join(json.dumps(record) + "\n" for record in sampled[:40]))  # interrupted
    assert sample() == sampled and sample("--method", "sft") == sampled and len(sampled) == 64
    for name, other in {
        "teacher": tiny_models["student"],
        "temperature": "0.9",
        "top_p": "0.5",
        "max_completion_length": "5",
        "template": "Please: {problem}",
        "max_pixels": "1000",
        "limit": "32",
    }.items():
        with pytest.raises(ValueError, match=f"teacher-seed0 holds results of {name}=.*move the folder away"):
            sample(f"--{name}", other)
    monkeypatch.setattr(train, "load_splits_of", lambda args: {"train": digit_rows("test", 64, seed=0)})
    with pytest.raises(ValueError, match="teacher-seed0 holds results of data="):
        sample()
    cache.with_name("settings.json").unlink()
    with pytest.raises(ValueError, match="no readable settings.json"):
        sample()


def test_the_report_shows_the_last_checkpoint_beside_the_chosen_one(tmp_path, config):
    args, _ = train.parse(["--config", str(config)])
    scores = {"opd": {4: [1, 0, 0, 0], 12: [0, 0, 0, 1]}, "va_opd": {4: [1, 1, 1, 0], 12: [1, 1, 0, 0]}}
    for name, by_step in scores.items():
        out = tmp_path / f"{name}-seed0" / "eval"
        atomic_write_json(out / "selection.json", {"accuracy": dict.fromkeys(map(str, by_step), 0.5), "best": 4})
        for step, values in by_step.items():
            records = [{"id": str(i), "sample": 0, "score": value} for i, value in enumerate(values)]
            write_jsonl(out / f"checkpoint-{step}" / "digits" / "scored.jsonl", records)
    last = {name: report.last_checkpoint_scores(tmp_path / f"{name}-seed0", args) for name in scores}
    assert last["va_opd"] == [[1], [1], [0], [0]]
    assert report.last_checkpoint_scores(tmp_path, args) is None and report.selection_line({}) == ""
    best = {name: {"true": [[v] for v in by_step[4]]} for name, by_step in scores.items()}
    chosen, plain = report.difference_line(best, last).split("\n\n")
    assert "(checkpoint chosen on these problems): +0.500" in chosen and "last checkpoints: +0.250" in plain
    assert report.difference_line(best, {}).startswith("VA-OPD minus Standard OPD on the same problems: +0.500")


def test_accuracy_over_hours_says_when_va_opd_has_what_opd_ends_with(tmp_path):
    """Steps sort as numbers; a run without a choice of the checkpoint, and one of an older version, have no curve."""
    accuracy = {"opd": {"50": 0.3, "100": 0.4}, "va_opd": {"100": 0.45, "50": 0.41}, "kd": {"50": 0.3}, "sft": None}
    runs = {name: tmp_path / name for name in accuracy}
    for name, values in accuracy.items():
        hours = {"hours": {step: int(step) / 20 for step in values}} if name in ("opd", "va_opd") else {}
        if values:
            atomic_write_json(runs[name] / "eval/selection.json", {"accuracy": values, "best": 50, **hours})
    curves = report.accuracy_by_hours(runs, {"base": {"true": [[0, 0, 0, 1]]}})
    assert {name: [tuple(point.values()) for point in points] for name, points in curves.items()} == {
        "opd": [(0.0, 0.25), (2.5, 0.3), (5.0, 0.4)],
        "va_opd": [(0.0, 0.25), (2.5, 0.41), (5.0, 0.45)],
    }
    said = report.hours_line(curves)
    assert said.startswith("Standard OPD ends at 0.400 after 5 h of training, and VA-OPD has that after 2.5 h. In")
    low = {**curves, "va_opd": curves["va_opd"][:1]}
    assert "and no checkpoint of VA-OPD has that. In" in report.hours_line(low)
    fallen = {**curves, "opd": [{"hours": 5.0, "accuracy": 0.2}]}  # below the base student
    assert "and VA-OPD has that after 2.5 h. In" in report.hours_line(fallen)
    assert report.hours_line({"opd": curves["opd"]}) == "" and report.accuracy_by_hours({}, {}) == {}


# --- the GRPO baseline ----------------------------------------------------------------


def grpo_trainer(config: Path, *fields: str):
    args, settings = train.parse(["--config", str(config), "--method", "grpo", *fields])
    return train.build_trainer(args, settings, train.load_splits_of(args))


def test_grpo_samples_no_image_token_and_loads_the_student_once(config, monkeypatch):
    loaded, load = [], train.models.load_model
    monkeypatch.setattr(train.models, "load_model", lambda name, **given: loaded.append(name) or load(name, **given))
    trainer = grpo_trainer(config, "--attn_implementation", "eager")
    banned = banned_ids(trainer.processing_class, trainer.model.config)
    assert set(trainer.generation_config.suppress_tokens) == banned and trainer.model.config.image_token_id in banned
    assert len(loaded) == 1
    for model in (trainer.model, trainer.ref_model):
        assert model.config._attn_implementation == "eager" and model.dtype == torch.float32


def test_the_grpo_baseline_differs_in_loss_and_reward_only(config):
    """EasyR1's loss and KL weight; optimizer, batch, sampling and seed are those of VA-OPD."""
    fields = ["--temperature", "0.6", "--top_p", "0.9", "--seed", "3", "--grpo_beta", "0.02"]
    own, (_, settings) = grpo_trainer(config, *fields).args, train.parse(["--config", str(config), *fields])
    assert (own.beta, own.epsilon, own.loss_type) == (0.02, 0.2, "grpo")
    for name in ("temperature", "top_p", "seed", "learning_rate", "num_generations", "max_completion_length"):
        assert getattr(own, name) == getattr(settings, name), name


def test_grpo_samples_no_image_token_under_vllm(config, monkeypatch):
    class Fake:
        def __init__(self, model, args, **given):
            self.model, self.args = model, args
            self.vllm_generation = SimpleNamespace(generate=None, sync_weights=None, mode="colocate")

    monkeypatch.setattr(baselines, "ResumableGRPOTrainer", Fake)
    trainer = grpo_trainer(config, "--use_vllm", "true")
    options = trainer.args.generation_kwargs
    assert trainer.args.use_vllm and options["logit_bias"][trainer.model.config.image_token_id] == -100.0
    assert not options.keys() & {"allowed_token_ids", "suppress_tokens"}
    assert not trainer.args.vllm_importance_sampling_correction  # at top-p 0.95 it would punish length


def test_a_resumed_grpo_sees_the_prompts_of_the_uninterrupted_one(config):
    def order(epoch: float | None) -> list[int]:
        trainer = grpo_trainer(config)
        sampler = trainer._get_train_sampler()
        trainer.state.epoch = epoch
        return list(sampler)

    assert order(None) == order(0.5) != order(1.0) == order(1.75)
    own = {name for name, value in vars(baselines.ResumableGRPOTrainer).items() if callable(value)}
    assert own == {"__init__", "_get_train_sampler"} and hasattr(trl.GRPOTrainer, "_get_train_sampler")


def test_grpo_refuses_a_reference_that_would_lack_the_students_adapter(config, tmp_path, tiny_models):
    base = train.models.load_model(tiny_models["student"])
    adapter = tmp_path / "adapter"
    peft.get_peft_model(base, train.lora_config(2)).save_pretrained(adapter)
    train.models.load_processor(tiny_models["student"]).save_pretrained(adapter)
    with pytest.raises(ValueError, match="holds a LoRA adapter, but TRL would load the KL reference"):
        grpo_trainer(config, "--model", str(adapter))


def test_the_reward_is_of_the_answer_that_evaluation_scores():
    args = train.ScriptArguments(model="s", teacher="t", dataset="geo3k")
    rows = [{"id": "0", "prompt": [], "images": [], "answer": "3"}]
    score, reward = evaluate.benchmark_of(args, rows).score, data.reward_of(args)
    boxed = ((r"\boxed{3}. No, \boxed{4}", 1.0), (r"\boxed{4}. No, \boxed{3}", 0.0))
    for text, right in (*boxed, ("none", 0.0), ("x = 3", 1.0), ("4", 0.0), ("3. Answer: 4", 0.0)):
        message = [{"role": "assistant", "content": text}]
        assert reward([text], answer=["3"]) == reward([message], answer=["3"]) == [score(text, rows[0])] == [right]


def test_another_answer_than_a_gold_that_cannot_be_read_is_wrong_as_in_evaluation():
    """And not left out of its group, which would have one reward, 1, and no gradient."""
    args = train.ScriptArguments(model="s", teacher="t", dataset="geo3k")
    row = {"id": "0", "prompt": [], "images": [], "answer": "Na^+"}
    score, responses = evaluate.benchmark_of(args, [row]).score, [r"\boxed{Na^+}", r"\boxed{7}", "Na^+", "none"]
    rewards = data.reward_of(args)(responses, answer=[row["answer"]] * 4)
    assert rewards == [score(response, row) for response in responses] == [1.0, 0.0, 1.0, 0.0]


def test_a_failing_stage_stops_the_experiment(config, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert loop.main(["--config", str(config), "--max_prompt_length", "5"]) == 2
    assert "above max_prompt_length=5" in capfd.readouterr().out
    assert loop.main(["--config", str(config), "--variants", "opdd"]) == 2


# --- the paper's benchmarks ----------------------------------------------------------------


@pytest.fixture
def vision_data(tmp_path, monkeypatch) -> str:
    """A folder with eight questions each of HallusionBench and MMStar, registered with so many rows."""
    image = Image.new("RGB", (40, 32), "red")
    shared = {"question": "Is it red?", "image": image, "answer": "A", "category": "VS", "subcategory": "map"}
    rows = [
        {**shared, "set_id": str(i // 4), "figure_id": str(i // 2), "question_id": str(i % 2), "gt_answer": str(i % 2)}
        for i in range(8)
    ]
    features = Features({name: ImageColumn() if name == "image" else Value("string") for name in rows[0]})
    for name in ("hallusionbench", "mmstar"):
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "vision" / f"{name}.parquet")
        small = dataclasses.replace(BENCHMARKS[name], rows=8, decoding=Decoding(1.0, 1.0, 4))
        monkeypatch.setitem(BENCHMARKS, name, small)
    return str(tmp_path / "vision")


def test_a_model_is_evaluated_on_the_benchmarks_of_the_config(config, vision_data, tmp_path, capsys):
    fields = ["--config", str(config), "--benchmarks", "mmstar,hallusionbench", "--benchmark_data", vision_data]
    assert evaluate.main(["base", *fields, "--eval_limit", "4"]) == 0
    folder = tmp_path / "runs/va_opd/small/base-seed0/eval"
    metrics = json.loads((folder / "hallusionbench.json").read_text())
    assert metrics["questions"] == 4 and {"aAcc", "fAcc", "qAcc", "score"} <= metrics["metric"].keys()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert evaluate.main(["base", *fields, "--eval_limit", "4"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert evaluate.main(["base", *fields]) == 2  # the records of four questions are not those of all
    assert "mmstar.json is of 4 questions, this evaluation has eval_limit for 8" in capsys.readouterr().err
    text = report.report(*_seeded(fields))
    assert "n=4 |" in text and "| CoT-SFT | 39.7 |  | 64.4 |  |" in text


def _seeded(fields: list[str]):
    args, config = train.parse(fields)
    return args, config.seed


def test_of_equal_checkpoints_the_earlier_is_chosen(config, tmp_path):
    args, settings = train.parse(["--config", str(config)])
    rows, run, accuracy = train.load_splits_of(args)["validation"], tmp_path / "run", {4: 0.5, 8: 0.75, 12: 0.75}
    for step, value in accuracy.items():
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / "model.safetensors").touch()
        atomic_write_json(run / "eval" / f"checkpoint-{step}" / "digits.json", {"avg@k": value})
    (run / "checkpoint-16").mkdir()  # killed before its weights
    for step, seconds in ((8, 5400), (12, 9000.0)):  # the first is of an older version, which did not say
        (run / f"checkpoint-{step}" / "train_seconds.json").write_text(str(seconds))
    assert evaluate.best_checkpoint(run, args, settings, rows) == run / "checkpoint-8"
    assert json.loads((run / "eval/selection.json").read_text()) == {
        "accuracy": {str(step): value for step, value in accuracy.items()},
        "hours": {"8": 1.5, "12": 2.5},
        "best": 8,
    }


@pytest.mark.parametrize(("dataset", "length"), [("digits", 24), ("geo3k", 4096)])
def test_held_out_problems_are_sampled_as_the_config_says(config, dataset, length):
    args, _ = train.parse(["--config", str(config), "--eval_temperature", "0.5"])
    rows = train.load_splits_of(args)["validation"]
    args.dataset = dataset
    true, pixelated = evaluate.benchmark_of(args, rows), evaluate.benchmark_of(args, rows, 0.1)
    assert true.decoding == pixelated.decoding == Decoding(temperature=0.5, top_p=1.0, max_new_tokens=length)
    assert true.rows[0]["images"] == rows[0]["images"] != pixelated.rows[0]["images"]
    assert pixelated.rows[0]["images"][0].tobytes() == evaluate.pixelate(rows[0]["images"][0], 0.1).tobytes()


def test_benchmarks_are_sampled_at_the_temperature_of_the_config(config, vision_data):
    fields = ["--benchmark_data", vision_data, "--eval_temperature", "0.5", "--eval_limit", "4"]
    args, _ = train.parse(["--config", str(config), *fields])
    benchmark = evaluate.paper_benchmark(args, "mmstar")
    assert benchmark.decoding == dataclasses.replace(BENCHMARKS["mmstar"].decoding, temperature=0.5)
    assert len(benchmark.rows) == 4


def test_va_is_of_one_rollout_a_problem_and_0_where_images_are_as_they_were(config, tmp_path):
    args, settings = train.parse(["--config", str(config), "--degradation_ratio", "1.0"])
    rows, out = train.load_splits_of(args)["validation"], tmp_path / "eval"
    out.mkdir()
    (out / "va_tokens.jsonl").write_text('{"id": "of a process that was killed", "va": [1.0]}\n')
    evaluate.score_visual_advantage(args.model, args, settings, rows, out)
    records = read_jsonl(out / "va_tokens.jsonl")
    assert [record["id"] for record in records] == rows["id"]
    tokens = sum(len(record["tokens"]) for record in records)
    assert json.loads((out / "va.json").read_text()) == {"mean": 0.0, "positive_share": 0.0, "tokens": tokens}


@pytest.mark.parametrize(
    ("what", "dataset", "scored"), [("base", "geo3k", True), ("teacher", "geo3k", False), ("teacher", "digits", True)]
)
def test_va_is_scored_of_all_but_a_papers_teacher(config, tmp_path, monkeypatch, what, dataset, scored):
    """Which is too large to be student and teacher at once. Answers are sampled by the seed of the run."""
    seen, answers = [], []
    monkeypatch.setattr(evaluate, "build_engine", lambda args, model, config: Parrot(model))
    monkeypatch.setattr(evaluate, "score_visual_advantage", lambda model, *_: seen.append(model))
    for seed in ("3", "4"):
        args, settings = train.parse(["--config", str(config), "--seed", seed])
        rows = train.load_splits_of(args)["validation"]
        monkeypatch.setattr(evaluate, "load_validation_of", lambda args, rows=rows: rows)
        args.dataset = dataset
        evaluate.evaluate_model(what, args, settings)
        out = tmp_path / f"runs/va_opd/small/{what}-seed{seed}/eval" / evaluate.benchmark_name(args)
        answers.append({record["response"] for record in read_jsonl(out / "samples.jsonl")})
    assert seen == [args.model if what == "base" else args.teacher] * 2 * scored
    assert len(answers[0]) == len(rows) and answers[0].isdisjoint(answers[1])


def test_an_unknown_benchmark_stops_the_experiment_at_its_start(config, capsys, tmp_path):
    assert loop.main(["--config", str(config), "--benchmarks", "mmstar,mathvista2"]) == 2
    assert "unknown benchmarks mathvista2; choose among" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


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
    ],
)
def test_how_to_evaluate_and_what_fits_a_machine_may_change(config, capsys, fields):
    command = ["--config", str(config), "--max_steps", "1", "--save_strategy", "no"]
    assert train.main(command) == 0
    run = train.run_path(*train.parse(command))
    manifest = json.loads((run / "manifest.json").read_text())
    name = fields[0].removeprefix("--")
    atomic_write_json(run / "manifest.json", manifest | {"config": manifest["config"] | {name: "of an older version"}})
    capsys.readouterr()
    assert train.main([*command, *fields]) == 0
    assert "done already" in capsys.readouterr().out
    assert str(yaml.safe_load((run / "config.yaml").read_text())[name]) == fields[1]


def test_evaluation_is_one_process_whatever_the_training_was(config, capsys):
    """A training on 8 GPUs may have one rollout a process; the evaluation after it has no other processes."""
    command = ["--config", str(config), "--max_steps", "1", "--save_strategy", "no"]
    assert train.main(command) == 0
    batch = ["--per_device_train_batch_size", "1"]
    args, settings = train.parse([*command, *batch])
    rows = train.load_splits_of(args)["validation"]
    run = train.run_path(args, settings)
    evaluate.score_visual_advantage(str(run / "model"), args, settings, rows, run / "eval")
    assert json.loads((run / "eval/va.json").read_text())["tokens"] > 0


def test_a_teacher_that_only_a_server_can_hold_is_loaded_nowhere(config, monkeypatch):
    served = ["--teacher_server", "http://127.0.0.1:9", "--teacher_mode", "sampled_token"]
    args, settings = train.parse(["--config", str(config), *served, "--teacher_parity", "false"])
    monkeypatch.setattr(evaluate, "load_teacher", lambda *_: pytest.fail("the teacher is loaded"))
    seen = {}

    def trainer(**parts):
        seen.update(parts)
        raise InterruptedError

    monkeypatch.setattr(evaluate, "VAOPDTrainer", trainer)
    with pytest.raises(InterruptedError):
        evaluate.score_visual_advantage(args.model, args, settings, [], Path(args.out))
    assert seen["teacher_model"] is None and seen["args"].teacher_server == served[1]
    args.dataset = "geo3k"
    args.benchmarks = "mmstar"
    for local in (True, False):
        stages = loop.plan([], args, ["opd"], ["0"], [], local)
        assert local is any("teacher" in words for stage in stages for _, words in stage)


def test_a_local_teacher_needs_no_server_in_evaluation(config):
    served = ["--teacher_server", "http://127.0.0.1:9", "--teacher_mode", "sampled_token"]
    args, settings = train.parse(["--config", str(config), *served])
    rows = train.load_splits_of(args)["validation"]
    out = Path(args.out) / "eval"
    evaluate.score_visual_advantage(args.model, args, settings, rows, out)
    assert json.loads((out / "va.json").read_text())["tokens"] > 0
    assert settings.teacher_server == served[1]


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


def test_the_engine_is_where_the_trainer_would_be(config, monkeypatch):
    args, settings = train.parse(["--config", str(config), "--eval_batch_size", "3"])
    monkeypatch.setattr(type(settings), "device", torch.device("meta"), raising=False)
    engine = data.build_engine(args, args.model, settings)
    assert engine.model.device.type == "meta" and engine.batch_size == 3


def test_the_paper_presets_evaluate_student_and_teacher_on_the_eight(capsys):
    for path in CONFIGS:
        args, _ = train.parse(["--config", str(path), "--dry_run"])
        names = evaluate.benchmark_names(args)
        assert names == ([] if path.stem == "tiny" else [*report.MATH, *report.VISUAL])
    assert loop.main(["--config", str(ROOT / "va_opd/configs/geo3k.yaml"), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    for what in ("run", "base", "teacher"):
        assert f"va_opd.evaluate {what} --config" in printed


def test_tables_of_the_benchmarks_stand_beside_the_papers(vision_data, tmp_path):
    """Scores by hand: of 8 questions OPD has 4 right and VA-OPD 6 on MMStar; HallusionBench 1/3 and 1."""
    folder = tmp_path / "geo3k"
    right = {"opd": ([1, 1, 1, 1, 0, 0, 0, 0], ["yes"] * 8), "va_opd": ([1, 1, 1, 1, 1, 1, 0, 0], ["no", "yes"] * 4)}
    for name, (letters, words) in right.items():
        texts = {"mmstar": ["A" if one else "B" for one in letters], "hallusionbench": words}
        for benchmark, answers in texts.items():
            lines = [json.dumps({"id": i, "sample": 0, "response": text}) + "\n" for i, text in enumerate(answers)]
            path = tmp_path / f"{name}-{benchmark}.jsonl"
            path.write_text("".join(lines))
            score_responses(load_benchmark(benchmark, vision_data), path, folder / f"{name}-seed0" / "eval")
    results = report.vision_results(folder, 0)
    assert results["va_opd"].keys() == {"mmstar", "hallusionbench"}
    value, low, high = report.mean_score(results["va_opd"], ("mmstar",))
    assert (value, 100 * results["va_opd"]["mmstar"]["interval"][0]) == (75.0, pytest.approx(low)) and high > 75
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in report.paper_table(results).splitlines()}
    assert len(lines["VA-OPD"]) == 21 and lines["VA-OPD"][16].startswith("75.0 (+15.1) [")
    assert lines["Standard OPD"][10].startswith("33.3 (-18.7) [") and lines["GRPO"][16] == ""
    table = report.vision_differences(folder, 0, results)
    assert "| MMStar | +0.2 | +25.0 | [" in table and "| HallusB | +2.5 | +66.7 | [" in table
    assert "| MMMU | +0.6 |  |  |  |" in table and "| Visual | +1.5 |  |  |  |" in table
    value, low, high = report.mean_score(results["va_opd"], ("hallusionbench", "mmstar"))
    assert value == pytest.approx((75 + 100) / 2) and low < value <= high
    assert "| 8B -> 2B, Geometry3K | 45.4 -> 48.3 (+2.9) |  | 64.6 -> 66.1 (+1.5) |  |" in report.scaling_table(
        tmp_path, 0
    )


def test_options_of_the_engine_reach_it(config, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(engines, "VLLMEngine", lambda *names, **options: made.append(options))
    fields = ["--config", str(config), "--engine", "vllm", "--engine_options"]
    args, settings = train.parse([*fields, '{"tensor_parallel_size": 2}'])
    data.build_engine(args, args.model, settings)
    assert made[0].items() >= {"tensor_parallel_size": 2}.items()
    assert not any(isinstance(stage, stages.OneGPUEach) for stage in loop.plan(fields, args, ["opd"], ["0"], []))
    assert train.main([*fields, "2", "--dry_run", "true"]) == 2
    assert 'engine_options must be JSON such as {"tensor_parallel_size": 2}, got 2' in capsys.readouterr().err
