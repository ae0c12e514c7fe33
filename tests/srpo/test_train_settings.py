"""Settings of SRPO's command line: presets, mistakes in one sentence, what is made of them."""

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from training_runs import fails

from benchmarks import srpo as report
from common.cli import changed_settings
from common.tiny import tiny_qwen3_vl
from srpo import checks, loop, train

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "srpo" / "configs").glob("*.yaml"))


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
    assert (config.max_grad_norm, config.max_steps, config.save_steps, args.grpo_steps) == (1.0, 475, 5, 4)


@pytest.mark.parametrize("name", loop.VARIANT_FLAGS)
def test_a_variant_is_named_as_its_row_in_the_report(name):
    config = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--dry_run"]
    assert train.variant(train.parse([*config, *loop.VARIANT_FLAGS[name]])[1]) == name
    assert name in report.NAMES


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--learning_rat", "1e-3"], "did you mean 'learning_rate'"),
        (["--num_generations", "3"], "do not divide into groups of num_generations=3"),
        (["--model", "nowhere/at/all"], "no such folder"),
        (["--dataset", "subtractions"], "dataset must be one of chemistry"),
        (["--dataset", "subtractions", "--dry_run"], "dataset must be one of chemistry"),
        (["--dataset", "chemistry", "--data", "/nowhere"], "no such folder"),
        (["--data", "/my/sums"], "additions is made in code, data '/my/sums' would not be read: set dataset to"),
        (["--max_prompt_length", "5"], "no prompt fits max_prompt_length=5"),
        (["--policy_dtype", "float8"], "policy_dtype must be"),
        (["--steps_per_generation", "4"], "must equal gradient_accumulation_steps"),
        (["--grpo_steps", "0"], "grpo_steps must be at least 1, got 0"),
        (["--output_dir", "x"], "output_dir would be ignored: set out and experiment"),
        (["--chat_template_kwargs", "off"], "chat_template_kwargs must be a mapping such as"),
        (["--max_completion_length", "none"], "max_completion_length must be at least 1, and whole, got None"),
        (["--auto_find_batch_size"], "auto_find_batch_size must be false: the smaller batches"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(config, capsys, fields, message, tmp_path):
    assert message in fails(train, capsys, config, *fields)
    assert not (tmp_path / "runs").exists()


def test_the_saved_settings_are_the_same_run_again(config, tmp_path):
    changes = ["--routing", "mix", "--entropy_beta", "0.5", "--distillation_topk", "none", "--delta", "none"]
    args, settings = train.parse(["--config", str(config), *changes])
    assert settings.distillation_topk is settings.delta is None
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(changed_settings(args, settings, train.DERIVED)))
    again_args, again = train.parse(["--config", str(saved), "--out", args.out])
    assert changed_settings(again_args, again, train.DERIVED) == changed_settings(args, settings, train.DERIVED)
    assert again.output_dir == settings.output_dir


def test_data_and_model_that_do_not_fit_are_said_before_weights_are_loaded(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.models, "load_model", lambda *_, **__: pytest.fail("loads"))
    assert "no prompt fits max_prompt_length=5" in fails(train, capsys, config, "--max_prompt_length", "5")
    model, processor = tiny_qwen3_vl(hidden=32)
    model.save_pretrained(tmp_path / "vision")
    processor.save_pretrained(tmp_path / "vision")
    message = fails(train, capsys, config, "--model", str(tmp_path / "vision"))
    assert "vision' reads images, and SRPO is for text: choose a text model" in message


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
    assert asked == [("additions", True, None), ("additions", False, None)]


def test_the_policy_is_loaded_and_placed_by_the_settings(config, monkeypatch):
    placed = []
    monkeypatch.setattr(train, "on_one_gpu", lambda settings: placed.append(settings) or settings)
    fields = ["--policy_dtype", "bfloat16", "--attn_implementation", "eager"]
    args, settings = train.parse(["--config", str(config), *fields])
    model = train.build_trainer(args, settings, train.load_splits_of(args)).model
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert placed == [settings]


def test_all_settings_of_the_evaluation_may_change():
    names = {field.name for field in dataclasses.fields(train.ScriptArguments)}
    assert {name for name in names if name.startswith(("eval_", "engine", "drop_"))} == set(train.MAY_CHANGE)


def test_the_seed_is_set_before_the_policy_is_built(config, monkeypatch):
    """An adapter begins with random numbers."""
    drawn = []
    monkeypatch.setattr(train, "train_run", lambda *_, **options: drawn.append(torch.rand(1).item()))
    for seed in "334":
        train.train(*train.parse(["--config", str(config), "--seed", seed]))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_preset_has_teacher_prompts_beyond_the_models_positions(path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    _, settings = train.parse(["--config", str(path), "--dry_run"])
    positions = {"tiny": 512, "small": 8192}.get(path.stem, 40960)  # those of the models' config.json
    text = SimpleNamespace(max_position_embeddings=positions)
    checks.warn_of_positions(settings, SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text)))
    assert not caplog.records
