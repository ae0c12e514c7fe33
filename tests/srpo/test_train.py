"""SRPO's command lines: settings, bad input, run folders, resuming, the experiment; on embedded additions."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from peft import get_peft_model

from benchmarks import srpo as report
from common import models, stages
from common.answers import Verdict
from common.cli import changed_settings
from common.evaluation import Completion, engines
from common.lora import lora_config
from common.runs import exclusive, last_checkpoint, read_jsonl
from common.tiny import tiny_qwen3
from srpo import checks, doctor, evaluate, loop, train

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "srpo" / "configs").glob("*.yaml"))
SMALL = {
    "experiment": "small",
    "dataset": "additions",
    "limit": 64,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "grpo_steps": 1,
    "max_steps": 6,
    "learning_rate": 1.0e-3,
    "max_completion_length": 4,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "eval_samples": 2,
    "eval_temperature": 1.0,
    "eval_batch_size": 100,
    "eval_limit": 40,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "doctor_steps": 0,
    "seed": 0,
}


@pytest.fixture(scope="session")
def policy(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    model, tokenizer = tiny_qwen3(hidden=32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tmp_path, policy) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "model": policy, "out": str(tmp_path / "runs")}))
    return path


@pytest.fixture
def easy(monkeypatch):
    """A random policy never adds right: let an even length count as correct, so that all routes are taken."""

    def reward(completions, answer, **columns):
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [float(len(text) % 2 == 0) for text in texts]

    for module in (train, evaluate):
        monkeypatch.setattr(module, "reward_of", lambda dataset, strict=False: reward)


def fails(capsys, config: Path, *fields: str) -> str:
    capsys.readouterr()
    assert train.main(["--config", str(config), *fields]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("srpo.train: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_parsed_and_dry_run(path, capsys):
    assert train.main(["--config", str(path), "--dry_run"]) == 0
    assert loop.main(["--config", str(path), "--dry_run", "--gpus", "8", "--variants", "all"]) == 0
    printed = capsys.readouterr().out
    assert "memory a process" in printed or "memory: unknown" in printed
    assert "-m srpo.train --config" in printed
    assert "--num_processes 8" in printed
    assert "--routing sdpo_correct" in printed


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_the_paper_configs_are_the_papers(size):
    path = str(ROOT / f"srpo/configs/qwen3_{size}.yaml")
    args, config = train.parse(["--config", path, "--dry_run"])
    rollouts = 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert (rollouts, config.num_generations, rollouts // config.num_generations) == (256, 8, 32)
    assert (args.model, config.learning_rate, config.entropy_beta) == (f"Qwen/Qwen3-{size.upper()}", 5e-6, 1.0)
    assert (args.eval_samples, args.eval_temperature, args.eval_top_p) == (16, 0.6, 0.95)
    assert (config.max_completion_length, config.max_prompt_length, config.temperature) == (8192, 2048, 1.0)
    assert config.max_grad_norm == 1.0


def test_the_papers_grpo_takes_four_steps_a_batch(capsys):
    assert loop.main(["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--dry_run", "--variants", "grpo"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "srpo.train" in line]
    flags = (
        "--steps_per_generation 8 --gradient_accumulation_steps 2 --max_steps 1900 --save_steps 20 --warmup_steps 40"
    )
    assert flags in line


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ("--gradient_accumulation_steps 8", "--steps_per_generation 8 --gradient_accumulation_steps 2"),
        ("--gradient_accumulation_steps 1", "--steps_per_generation 4 --per_device_train_batch_size 8"),
        ("--gradient_accumulation_steps 6", "--steps_per_generation 24 --per_device_train_batch_size 8"),
        ("--gradient_accumulation_steps 6 --grpo_steps 3", "--steps_per_generation 6 --gradient_accumulation_steps 2"),
    ],
)
def test_grpo_splits_any_batch_that_divides_and_keeps_it_whole(fields, flags):
    given = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--per_device_train_batch_size", "32", "--use_cpu"]
    args, config = train.parse([*given, *fields.split()])
    steps = loop._split_batch(config, args.grpo_steps)
    assert " ".join(steps[:4]) == flags
    _, split = train.parse([*given, *fields.split(), "--routing", "grpo", *steps])
    assert split.generation_batch_size == config.generation_batch_size
    assert split.max_steps == args.grpo_steps * config.max_steps


def test_a_batch_that_is_split_already_is_not_split_again():
    """As in the config.yaml of a finished GRPO run."""
    given = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--use_cpu", "--routing", "grpo"]
    _, config = train.parse([*given, "--steps_per_generation", "8", "--gradient_accumulation_steps", "2"])
    assert loop._split_batch(config, 4) == []
    with pytest.raises(ValueError, match="takes 4 optimizer steps already, grpo_steps=2: set steps_per_gen"):
        loop._split_batch(config, 2)


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


def test_grpo_never_takes_other_steps_than_it_says(config, capsys):
    assert "grpo_steps=4: python -m srpo.loop" in fails(capsys, config, "--routing", "grpo", "--grpo_steps", "4")
    capsys.readouterr()
    assert loop.main(["--config", str(config), "--variants", "grpo", "--grpo_steps", "3", "--dry_run"]) == 2
    assert "is a multiple of grpo_steps=3" in capsys.readouterr().err
    assert loop.main(["--config", str(config), "--variants", "srpo", "--grpo_steps", "3", "--dry_run"]) == 0


def test_the_memory_estimate_by_hand(capsys):
    """Qwen3-8B on 8 GPUs, in GiB: 2 + 2 + 12 + 6 bytes a parameter over 8 shards; 2 + 2/8 + 12/8 + 4 under ZeRO-2."""
    for sharding, weights, teacher in (("zero3", 2 / 8, 6 / 8), ("zero2", 2, 4)):
        fields = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--gpus", "8", "--sharding", sharding]
        assert loop.main([*fields, "--dry_run"]) == 0
        printed = capsys.readouterr().out
        for name, per_parameter in (
            ("policy weights", weights),
            ("gradients", 2 / 8),
            ("optimizer", 12 / 8),
            ("self-teacher, ema", teacher),
        ):
            (line,) = [line for line in printed.splitlines() if line[10:].strip().startswith(name)]
            assert float(line.split()[0]) == pytest.approx(8e9 * per_parameter / 2**30, abs=0.005)
        total = float(next(line for line in printed.splitlines() if line.endswith("  sum")).split()[0])
        assert (total < 80) == (sharding == "zero3")  # the default fits the 80 GB that the preset names
        assert "95 checkpoints x 14.90" in printed


def test_the_parts_of_every_teacher_by_hand():
    """8B, bytes: GRPO has no teacher, in memory or in a checkpoint, and a frozen one with LoRA is the policy."""

    def sizes(*fields: str) -> tuple[float, float]:
        """Of the teacher in memory, and of what only resuming needs."""
        argv = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--dry_run", *fields]
        args, settings = train.parse(argv)
        parts = train.memory_parts(args, settings, 8e9, 1, "none")
        (teacher,) = (size for name, size in parts.items() if name.startswith("self-teacher"))
        return teacher, train.checkpoint_sizes(args, settings, 8e9, "none")[2]

    average, states = 4 * 8e9, sizes("--teacher", "current")[1]
    assert sizes() == (average, states + average)
    assert sizes("--routing", "grpo") == (0, states)
    assert sizes("--teacher", "frozen") == (4 * 8e9, states)
    assert sizes("--teacher", "current")[0] == sizes("--teacher", "frozen", "--lora_rank", "8")[0] == 0


@pytest.mark.parametrize(
    ("fields", "sharding", "size"),
    [
        ([], "zero2", 4),  # a float32 average has float32 states, autocast or not
        ([], "zero3", 2),  # there it computes in the policy's dtype
        (["--teacher", "frozen", "--policy_dtype", "bfloat16"], "none", 2),
        (["--teacher", "current"], "none", 4),
    ],
)
def test_the_teachers_cached_states_have_its_dtype(capsys, fields, sharding, size):
    gpus = "1" if sharding == "none" else "8"
    fields = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--gpus", gpus, *fields, "--dry_run"]
    assert loop.main([*fields, "--sharding", "zero2" if sharding == "none" else sharding]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cached teacher hidden states" in line]
    _, config = train.parse(["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--dry_run"])
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    expected = size * 4096 * 0.4 * rows * 800
    assert float(line.split()[0]) == pytest.approx(expected / 2**30, abs=0.005)


def test_the_self_teacher_is_cut_under_fsdp_too(capsys):
    fields = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--gpus", "8", "--sharding", "fsdp2", "--dry_run"]
    assert loop.main(fields) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "self-teacher, ema" in line]
    assert float(line.split()[0]) == pytest.approx(8e9 * 4 / 8 / 2**30, abs=0.005)


def choices(folder: Path) -> Path:
    """Questions in the form and number of the biology set."""
    for split, count in (("train", 450), ("test", 50)):
        lines = [
            json.dumps({"prompt": f"{split} {i}?\nA: x\nB: y", "system": None, "answer": "AB"[i % 2], "idx": i})
            for i in range(count)
        ]
        (folder / f"{split}.json").write_text("\n".join(lines))
    return folder


def test_the_shares_of_the_answer_letters_are_logged_and_reported(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = ["--config", str(config), "--dataset", "biology", "--data", str(choices(tmp_path)), "--max_steps", "2"]
    assert train.main([*fields, "--max_completion_length", "1"]) == 0  # one character is a whole answer
    run = tmp_path / "runs/srpo/small-biology/srpo-seed0"
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    for line in lines:
        shares = [line[f"letter/{letter}"] for letter in "ABCD"]
        assert all(0 <= share <= 1 for share in shares)
        assert sum(shares) <= 1 + 1e-9
    table = report.letter_table({("srpo", "0"): run})
    expected = " | ".join(f"{lines[0][f'letter/{x}']:.2f}, {lines[-1][f'letter/{x}']:.2f}" for x in "ABCD")
    assert f"| SRPO | {expected} |" in table


def test_an_answer_that_cannot_be_read_is_told_from_a_wrong_one(config, tmp_path):
    fields = ["--dataset", "biology", "--data", str(choices(tmp_path))]
    benchmark = evaluate.benchmark_of(*train.parse(["--config", str(config), *fields]))
    row = next(row for row in benchmark.rows if row["answer"] == "A")
    said = [benchmark.score(text, row) for text in ("<answer>A</answer>", "<answer>B</answer>", "I do not know.")]
    assert said == [Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE]


def test_steps_are_counted_in_generation_batches(tmp_path):
    """A run of four optimizer steps a batch stands beside the others by batches, and so do its seconds."""
    manifest = {"config": {"steps_per_generation": 8, "gradient_accumulation_steps": 2}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 20, "step_time": 3.0, "reward": 0.5}) + "\n")
    assert report._metrics(tmp_path) == [{"step": 5, "step_time": 12.0, "reward": 0.5}]


def test_seconds_of_a_step_within_the_budgets(tmp_path):
    """By hand: of GRPO, whose batches have four steps, and SRPO on two data sets, one without a line in 1 h."""

    def run(dataset, name, points):
        folder = tmp_path / dataset / name
        folder.mkdir(parents=True)
        lines = [json.dumps({"step": step, "train_seconds": seconds}) for step, seconds in points]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        config = {"steps_per_generation": 4 if name == "grpo" else 1, "gradient_accumulation_steps": 1}
        (folder / "manifest.json").write_text(json.dumps({"config": config}))
        return {(dataset, name, "0"): folder}

    runs = run("physics", "grpo", [(40, 700.0), (400, 9000.0)])
    runs |= run("physics", "srpo", [(10, 800.0), (30, 3600.0), (100, 9000.0)])
    runs |= run("biology", "srpo", [(50, 5000.0), (1000, 40000.0)])
    table = report.seconds_table("qwen3_8b", runs).splitlines()
    assert "| GRPO | 71.0 / 82.4 / 91.5 | 70.0 / 90.0 / 90.0 | 1 |" in table
    assert "| SRPO | 83.4 / 78.3 / 75.8 |  / 95.0 / 95.0 | 2 |" in table
    assert "| GRPO |  | 70.0 / 90.0 / 90.0 | 1 |" in report.seconds_table("mine", runs)
    assert report.seconds_table("mine", {}) == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--learning_rat", "1e-3"], "did you mean 'learning_rate'"),
        (["--num_generations", "3"], "divisible by num_generations"),
        (["--model", "nowhere/at/all"], "no such folder"),
        (["--dataset", "subtractions"], "dataset must be additions"),
        (["--dataset", "chemistry", "--data", "/nowhere"], "no such folder"),
        (["--max_prompt_length", "5"], "no prompt fits max_prompt_length=5"),
        (["--policy_dtype", "float8"], "policy_dtype must be"),
        (["--steps_per_generation", "4"], "must equal gradient_accumulation_steps"),
        (["--grpo_steps", "0"], "grpo_steps must be at least 1, got 0"),
        (["--max_completion_length", "none"], "max_completion_length must be at least 1, and whole, got None"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(config, capsys, fields, message, tmp_path):
    assert message in fails(capsys, config, *fields)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_another_process_is_at_is_left_alone(config, capsys):
    folder = train.run_path(*train.parse(["--config", str(config)]))
    with exclusive(folder):
        assert "is in use by another process" in fails(capsys, config)
    assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("flag", ["--dry_run", "--dry_run=true", "--dry-run"])
def test_settings_for_gpus_can_be_looked_at_without_one(flag, capsys):
    assert train.main(["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), flag]) == 0
    assert report.main(["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--out", "/nowhere"]) == 2
    assert "bf16" not in capsys.readouterr().err


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
    assert "learning_rate" in fails(capsys, config, "--learning_rate", "1e-4")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_the_saved_settings_are_the_same_run_again(config, tmp_path):
    changes = ["--routing", "mix", "--entropy_beta", "0.5", "--distillation_topk", "none", "--delta", "none"]
    args, settings = train.parse(["--config", str(config), *changes])
    assert settings.distillation_topk is settings.delta is None
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(changed_settings(args, settings, train.DERIVED)))
    again_args, again = train.parse(["--config", str(saved), "--out", args.out])
    assert changed_settings(again_args, again, train.DERIVED) == changed_settings(args, settings, train.DERIVED)
    assert again.output_dir == settings.output_dir


def run_until(config: Path, step: int | None, *fields: str) -> int:
    """`python -m srpo.train`, killed with SIGKILL once the checkpoint of `step` is complete."""
    command = [sys.executable, "-m", "srpo.train", "--config", str(config), *fields]
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


def test_killed_and_started_again_a_run_ends_as_if_nothing_had_been(config, tmp_path):
    fields = ["--max_steps", "10", "--reward_threshold", "-1"]  # all correct: the average still moves by weight decay
    straight = ["--experiment", "straight", *fields]
    assert run_until(config, None, *straight) == 0
    assert run_until(config, 4, *fields) == -signal.SIGKILL
    assert run_until(config, None, *fields) == 0
    curves, names = [], ("loss", "grad_norm", "reward", "completions/mean_length", "teacher/distance")
    for extra in (straight, fields):
        run = train.run_path(*train.parse(["--config", str(config), *extra]))
        lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
        curves.append([[line["step"], *(line[name] for name in names)] for line in lines])
    assert curves[0] == curves[1]
    assert len(curves[0]) == 10


def test_evaluation_of_every_checkpoint_and_the_budgets(config, tmp_path, easy):
    assert train.main(["--config", str(config)]) == 0
    assert evaluate.main(["run", "--config", str(config)]) == 0
    folder = tmp_path / "runs/srpo/small-additions/srpo-seed0/eval"
    table = json.loads((folder / "curve.json").read_text())
    assert [point["step"] for point in table["curve"]] == [2, 4, 6]
    accuracy = [point["accuracy"] for point in table["curve"]]
    found = table["1h"]
    assert found.pop("hours") == table["curve"][-1]["hours"]
    assert found == {"best": max(accuracy), "mean": pytest.approx(sum(accuracy) / 3), "last": accuracy[-1]}
    records = read_jsonl(folder / "checkpoint-6/additions/samples.jsonl")
    assert len(records) == 40 * 2
    assert evaluate.main(["nothing"]) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--eval_temperature", "0.6"], "eval_temperature=1.0 and not 0.6"),
        (["--eval_top_p", "0.5"], "eval_top_p=0.95 and not 0.5"),
        (["--eval_samples", "3"], "eval_samples=2 and not 3"),
        (["--eval_limit", "30"], "test problems (data, eval_limit)="),
        (["--max_completion_length", "5"], "max_completion_length=4 and not 5"),
        (["--chat_template_kwargs", '{"enable_thinking": true}'], "chat_template_kwargs={'enable_thinking': False}"),
        (["--strict", "true"], "strict=False and not True"),
        (["--model", "{other}"], "and not"),
    ],
)
def test_a_result_of_other_settings_is_refused(evaluated, other_policy, capsys, monkeypatch, fields, message):
    """Before, `evaluate base` said the old number whatever was asked."""
    config, folder = evaluated
    monkeypatch.setattr(evaluate, "build_engine", lambda *arguments: pytest.fail("a model was loaded"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert evaluate.main(["base", "--config", str(config)]) == 0  # done: nothing is loaded
    capsys.readouterr()
    fields = [field.replace("{other}", other_policy) for field in fields]
    assert evaluate.main(["base", "--config", str(config), *fields]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and f"move the folder {folder / 'eval'} away" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_policy_before_training_is_evaluated_once_for_all_seeds(evaluated, monkeypatch):
    monkeypatch.setattr(evaluate, "build_engine", lambda *arguments: pytest.fail("a model was loaded"))
    assert evaluate.main(["base", "--config", str(evaluated[0]), "--seed", "1"]) == 0


def test_a_run_is_evaluated_with_the_seed_of_its_record(tmp_path):
    with pytest.raises(ValueError, match="seed=0 and not 1"):
        evaluate.check_settings({"seed": 0}, {"model": "m", "seed": 1}, tmp_path / "run/eval/checkpoint-2")


def test_an_adapters_folder_is_its_own_model(evaluated, policy, tmp_path):
    """The record once named its base, and the second call was refused."""
    config, _ = evaluated
    adapter = get_peft_model(models.load_model(policy), lora_config(2))
    adapter.save_pretrained(tmp_path / "adapter")
    models.load_processor(policy).save_pretrained(tmp_path / "adapter")
    fields = ["--config", str(config), "--model", str(tmp_path / "adapter"), "--out", str(tmp_path / "runs")]
    assert [evaluate.main(["base", *fields]) for _ in range(2)] == [0, 0]


@pytest.fixture(scope="module")
def evaluated(policy, tmp_path_factory) -> tuple[Path, Path]:
    """Config and folder of an evaluated policy before training."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = folder / "small.yaml"
    config.write_text(yaml.safe_dump({**SMALL, "model": policy, "out": str(folder / "runs")}))
    assert evaluate.main(["base", "--config", str(config)]) == 0
    return config, folder / "runs/srpo/small-additions/base"


@pytest.fixture(scope="module")
def other_policy(policy, tmp_path_factory) -> str:
    return shutil.copytree(policy, tmp_path_factory.mktemp("other") / "policy").as_posix()


def test_the_report_says_what_the_records_say(evaluated, tmp_path):
    """Not the settings of its own command line; and that evaluations differ."""
    _, folder = evaluated
    runs = {("base", "-"): folder}
    assert report.decodings(runs, "additions") == "2 samples a problem at temperature 1.0, top-p 0.95."
    other = shutil.copytree(folder, tmp_path / "grpo")
    path = other / "eval/base/additions.json"
    path.write_text(path.read_text().replace('"temperature": 1.0', '"temperature": 0.6'))
    assert report.decodings({**runs, ("grpo", "0"): other}, "additions") == (
        "Evaluated in different ways, so that the rows do not compare: base: 2 samples a problem at temperature 1.0, "
        "top-p 0.95; GRPO seed 0: 2 samples a problem at temperature 0.6, top-p 0.95."
    )


def test_a_run_folder_that_was_moved_keeps_its_results(config, tmp_path, easy, monkeypatch):
    assert train.main(["--config", str(config)]) == evaluate.main(["run", "--config", str(config)]) == 0
    monkeypatch.setattr(evaluate, "build_engine", lambda *arguments: pytest.fail("a model was loaded"))
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    fields = ["--config", str(config), "--out", str(tmp_path / "moved")]
    assert evaluate.main(["run", *fields]) == 0
    assert evaluate.main(["run", *fields, "--eval_samples", "3"]) == 2


def test_a_point_of_the_curve_is_of_its_checkpoint(config, tmp_path, monkeypatch):
    args, settings = train.parse(["--config", str(config)])
    for step, seconds in ((10, 9000.0), (2, 1800.0)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "train_seconds.json").write_text(str(seconds))
    monkeypatch.setattr(evaluate, "is_done", lambda run: True)
    monkeypatch.setattr(evaluate, "score", lambda model, args, config, out: {"model": model, "out": out})
    assert evaluate.evaluate_run(tmp_path, args, settings) == [
        {"step": step, "hours": hours, "model": str(tmp_path / name), "out": tmp_path / "eval" / name}
        for step, hours, name in ((2, 0.5, "checkpoint-2"), (10, 2.5, "checkpoint-10"))
    ]


def test_answers_are_sampled_by_the_seed_of_the_run(config, tmp_path, monkeypatch):
    asked = {}

    def generate(prompts, decoding, seeds):
        asked[settings.seed] = set(seeds)
        return [Completion("1", 1, "length" if i else "stop") for i in range(len(seeds))]

    engine = SimpleNamespace(name="policy", generate=generate, close=lambda: None)
    monkeypatch.setattr(evaluate, "build_engine", lambda *arguments: engine)
    for seed in ("3", "4"):
        args, settings = train.parse(["--config", str(config), "--seed", seed, "--eval_samples", "1"])
        figures = evaluate.score("policy", args, settings, tmp_path / seed / "eval" / "base")
    assert len(asked[3]) == len(asked[4]) == 40 and asked[3].isdisjoint(asked[4])
    assert figures["mean_tokens"] == 1 and figures["truncated"] == 39 / 40
    low, high = figures["interval"]
    assert low <= figures["accuracy"] <= high


def test_budgets_leave_out_what_came_later():
    curve = [{"hours": hours, "accuracy": value} for hours, value in ((0.5, 0.2), (0.9, 0.6), (4.0, 0.4), (11.0, 0.9))]
    table = evaluate.within_budgets(curve)
    assert table["1h"] == {"best": 0.6, "mean": pytest.approx(0.4), "last": 0.6, "hours": 1}
    assert table["5h"]["last"] == table["10h"]["last"] == 0.4
    assert table["all"]["best"] == 0.9
    assert "1h" not in evaluate.within_budgets(curve[2:])
    assert (table["10h"]["hours"], table["all"]["hours"]) == (10, 11.0)
    assert evaluate.within_budgets(curve[:3])["10h"] == {**evaluate.within_budgets(curve[:3])["all"], "hours": 4.0}


def test_the_experiment_runs_end_to_end_and_a_second_time_does_nothing(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fields = ["--config", str(config), "--max_steps", "2"]
    assert loop.main([*fields, "--variants", "grpo,srpo"]) == 0
    report = (tmp_path / "runs/srpo/small/report.md").read_text()
    for text in (
        "| GRPO | 1 |",
        "| SRPO | 1 |",
        "SRPO minus GRPO, seed 0",
        "| base | 41.1 |  |",
        "66.5 / 74.8 / 75.6",
    ):
        assert text in report
    for name in ("accuracy", "hours", "training", "last"):
        assert (tmp_path / f"runs/srpo/small/figures/additions_{name}.png").stat().st_size > 5000
    samples = tmp_path / "runs/srpo/small-additions/srpo-seed0/eval/checkpoint-2/additions/samples.jsonl"
    before = samples.stat().st_mtime_ns
    assert train.main(fields) == evaluate.main(["run", *fields]) == 0
    assert "done already" in capsys.readouterr().out
    assert samples.stat().st_mtime_ns == before


def test_the_configs_own_dataset_may_be_named(config, capsys):
    assert loop.main(["--config", str(config), "--datasets", "additions", "--dry_run"]) == 0
    assert loop.main(["--config", str(config), "--datasets", "all", "--dry_run"]) == 0
    assert loop.main(["--config", str(config), "--datasets", "chemistrie", "--dry_run"]) == 2


def test_prompts_are_counted_as_the_policy_reads_them(config, capsys):
    """With the options of the chat template; one of just `max_prompt_length` tokens stays."""

    def apply_chat_template(prompt, add_generation_prompt, enable_thinking):
        return {"input_ids": [0] * (len(prompt[0]["content"]) + 3 * add_generation_prompt + 10 * enable_thinking)}

    options = ["--chat_template_kwargs", '{"enable_thinking": true}', "--max_prompt_length", "20"]
    _, settings = train.parse(["--config", str(config), *options])
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "x" * n}]} for n in range(5, 10)])
    kept = train.short_prompts(rows, SimpleNamespace(apply_chat_template=apply_chat_template), settings)
    assert kept["prompt"] == rows["prompt"][:3]
    assert capsys.readouterr().out == "2 of 5 prompts exceed 20 tokens: left out\n"


def test_the_strict_scorer_is_that_of_the_training(config, monkeypatch):
    asked, reward_of = [], train.reward_of
    monkeypatch.setattr(train, "reward_of", lambda *given: asked.append(given) or reward_of(*given))
    for strict in (True, False):
        args, settings = train.parse(["--config", str(config), "--strict", str(strict)])
        train.build_trainer(args, settings, train.load_splits_of(args))
    assert asked == [("additions", True), ("additions", False)]


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


def test_data_that_is_missing_is_said_before_the_first_training(config, capsys, tmp_path, monkeypatch):
    paper = ["--config", str(config), "--datasets", "all"]
    assert loop.main(paper) == 2
    assert "tooluse is on no hub" in capsys.readouterr().err
    assert loop.main([*paper, "--dry_run"]) == 0
    assert "missing: tooluse is on no hub" in capsys.readouterr().out
    monkeypatch.setattr(loop, "run_stages", lambda *_: pytest.fail("a training has begun"))
    (tmp_path / "data/chemistry").mkdir(parents=True)
    assert loop.main([*paper, "--data", str(tmp_path / "data")]) == 2
    assert "holds no test.json" in capsys.readouterr().err


def test_unknown_variants_are_one_sentence(config, capsys):
    assert loop.main(["--config", str(config), "--variants", "ppo"]) == 2
    assert "choose among srpo, grpo, sdpo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ({"route/all_wrong_groups": 0.9}, "no correct rollout"),
        ({"route/all_correct_groups": 0.95}, "nothing is left to learn"),
        ({"completions/clipped_ratio": 0.6}, "truncated"),
        ({"completions/mean_length": 10.0}, "five times shorter"),
        ({"entropy": 0.001}, "entropy has collapsed"),
        ({"teacher/scored_over_needed": 1.5}, "does not use"),
        ({"sampling/sampling_logp_difference/mean": 0.2}, "disagree"),
    ],
)
def test_the_doctor_warns_in_words(logs, message):
    (warning,) = doctor.diagnose(logs, first_length=100.0)
    assert message in warning
    assert doctor.diagnose(dict.fromkeys(logs), first_length=100.0) == []


def test_a_resumed_run_remembers_its_first_length(capsys):
    before = [{"loss": 0.1}, {"eval_completions/mean_length": 9.0}, {"completions/mean_length": 400.0}]
    now = {"route/sdpo": 0.5, "completions/mean_length": 50.0}
    state = SimpleNamespace(is_world_process_zero=True, global_step=300, log_history=[*before, now])
    doctor.DoctorCallback(every=20).on_log(None, state, None, now)
    assert "five times shorter than at the start" in capsys.readouterr().out
    state.log_history = [{"completions/mean_length": 60.0}, now]
    doctor.DoctorCallback(every=20).on_log(None, state, None, now)
    assert "shorter" not in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_preset_has_teacher_prompts_beyond_the_models_positions(path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    _, settings = train.parse(["--config", str(path), "--dry_run"])
    positions = {"tiny": 512, "small": 8192}.get(path.stem, 40960)  # those of the models' config.json
    text = SimpleNamespace(max_position_embeddings=positions)
    checks.warn_of_positions(settings, SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text)))
    assert not caplog.records


def test_options_of_the_engine_reach_it(config, monkeypatch, capsys):
    args, settings = train.parse(["--config", str(config)])
    assert evaluate.build_engine(args.model, args, settings).batch_size == 100
    made = []
    monkeypatch.setattr(engines, "VLLMEngine", lambda *names, **options: made.append(options))
    fields = ["--config", str(config), "--engine", "vllm", "--engine_options"]
    args, settings = train.parse([*fields, '{"tensor_parallel_size": 2}'])
    evaluate.build_engine(args.model, args, settings)
    assert made[0].items() >= {"tensor_parallel_size": 2}.items()
    plan = loop.plan(fields, args, settings, ["srpo"], ["additions"], ["0"], [])
    assert not any(isinstance(stage, stages.OneGPUEach) for stage in plan)
    assert train.main([*fields, "2", "--dry_run", "true"]) == 2
    assert 'engine_options must be JSON such as {"tensor_parallel_size": 2}, got 2' in capsys.readouterr().err
