"""Settings of VA-OPD's command line: presets, mistakes in one sentence, what is made of them."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from training_runs import fails

from benchmarks import va_opd as report
from common.cli import changed_settings
from common.tiny import tiny_qwen3_vl
from va_opd import loop, train

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "va_opd" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_parsed_and_dry_run(path, capsys):
    assert train.main(["--config", str(path), "--dry_run"]) == 0
    assert loop.main(["--config", str(path), "--dry_run", "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "memory a process" in printed or "memory: unknown" in printed
    assert "-m va_opd.train --config" in printed and "--num_processes 8" in printed


def test_given_responses_are_one_a_prompt(config, capsys):
    """The siblings are of the methods with rollouts."""
    assert train.main(["--config", str(config), "--method", "kd", "--num_generations", "3", "--dry_run"]) == 0
    assert "one update: 8 responses, 1 processes x 8 responses x 1 micro-batches" in capsys.readouterr().out


def test_the_paper_config_is_the_papers():
    args, config = train.parse(["--config", str(ROOT / "va_opd/configs/geo3k.yaml"), "--dry_run"])
    rollouts = 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert (rollouts, config.num_generations, rollouts // config.num_generations) == (64, 4, 16)
    assert (args.model, args.teacher) == ("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-8B-Instruct")
    assert (args.dataset, args.template, args.grpo_beta) == ("geo3k", "{problem}", 0.01)
    assert (config.learning_rate, config.adam_beta1, config.adam_beta2, config.weight_decay) == (1e-6, 0.9, 0.95, 0.1)
    assert (config.lr_scheduler_type, config.warmup_steps, config.num_train_epochs) == ("cosine", 0.05, 5)
    assert (config.temperature, config.top_p, config.max_completion_length) == (0.7, 0.95, 4096)
    assert (config.max_grad_norm, config.seed, config.bf16, config.kl_temperature) == (1.0, 42, True, 1.0)
    assert (config.degradation_ratio, config.weight_temperature, config.va_eps) == (0.1, 1.0, 1e-6)
    assert (config.top_fraction, config.high_weight, config.weighting) == (0.2, 0.5, "va")
    assert (args.validation_size, args.eval_samples, args.eval_temperature, config.save_steps) == (200, 8, 1.0, 50)
    assert (args.min_pixels, args.max_pixels, config.max_prompt_length) == (262_144, 4_194_304, 8192)
    assert (config.pixelate_at, config.random_ties, config.va_floor) == ("model", False, None)
    assert (config.teacher_mode, args.select_checkpoint, args.lora_rank) == ("exact", True, 0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("geo3k_teacher_4b", {"teacher": "Qwen/Qwen3-VL-4B-Instruct"}),
        ("geo3k_teacher_32b", {"teacher": "Qwen/Qwen3-VL-32B-Instruct"}),
        ("virl39k", {"dataset": "virl39k"}),
    ],
)
def test_a_row_of_table_2_is_table_1_with_one_change(name, changes):
    """As in the paper, and under the name by which the report finds it."""
    table_1, row = (yaml.safe_load((ROOT / f"va_opd/configs/{file}.yaml").read_text()) for file in ("geo3k", name))
    assert row == {**table_1, "experiment": name, **changes}
    assert name in report.SCALING


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("experiment: 12", r"experiment must be a text \(in quotes\), got 12"),
        ("benchmarks: [wemath, mmstar]", r"benchmarks must be a text \(in quotes\), got \['wemath', 'mmstar'\]"),
        ("model:", "model must be a text .*, got None"),
        ("limit: true", "limit must be int, got True"),
        ("lora_rank: 2.5", "lora_rank must be int, got 2.5"),
        ("learning_rate: yes", "learning_rate must be float, got True"),
        ("generation_kwargs: [1]", r"generation_kwargs must be a mapping, got \[1\]"),
    ],
)
def test_a_value_in_yaml_of_another_type_is_one_clear_sentence(config, tmp_path, line, message):
    path, settings = tmp_path / "other.yaml", yaml.safe_load(config.read_text())
    path.write_text(yaml.safe_dump(settings | yaml.safe_load(line)))
    with pytest.raises(ValueError, match=f"^{message}"):
        train.parse(["--config", str(path)])
    path.write_text(yaml.safe_dump({**settings, "learning_rate": 1, "limit": None, "generation_kwargs": {"top_k": 5}}))
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
        (["--num_generations", "3", "--dry_run"], "do not divide into groups"),
        (["--model", "nowhere/at/all"], "no such folder"),
        (["--teacher", "/nowhere"], "no such folder"),
        (["--dataset", "digit"], "dataset must be"),
        (["--dataset", "digit", "--dry_run"], "dataset must be"),
        (["--validation_size", "-1"], "validation_size must be at least 1, got -1"),
        (["--dataset", "geo3k", "--data", "/nowhere"], "no local path"),
        (
            ["--data", "/mine", "--dry_run"],
            "dataset=digits is made in code, data '/mine' would not be read: set dataset",
        ),
        (["--validation_data", "/mine"], "data '/mine' would not be read"),
        (["--limit", "1"], "fewer than the 2 of one optimizer step"),
        (["--max_prompt_length", "5"], "above max_prompt_length=5"),
        (["--weighting", "vision"], "weighting"),
        (["--measure_va", "false"], "measure_va=False leaves no VA for weighting='va': set weighting to 'none'"),
        (["--model_init_kwargs", '{"torch_dtype": "float32"}'], "model_init_kwargs has torch_dtype"),
        (["--teacher_model_init_kwargs", '{"torch_dtype": "float32"}'], "teacher_model_init_kwargs has torch_dtype"),
        (["--config_file", "x"], "unknown field"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--eval_samples", "0"], "eval_samples must be at least 1, got 0"),
        (["--eval_temperature", "nan"], "eval_temperature must be at least 0 and finite"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1, and whole, got 0"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, and whole, got 0"),
        (["--learning_rate", "nan"], "learning_rate must be at least 0 and finite"),
        (["--learning_rate", "-1"], "learning_rate must be at least 0 and finite"),
        (["--max_completion_length", "0"], "max_completion_length must be at least 1"),
        (["--output_dir", "x"], "output_dir would be ignored: set out and experiment"),
        (["--resume_from_checkpoint=x"], "resume_from_checkpoint would be ignored: a run goes on from its own last"),
        (["--chat_template_kwargs", "off"], "chat_template_kwargs must be a mapping such as"),
        (["--chat_template_kwargs", "{off"], "chat_template_kwargs must be a mapping such as"),
        (["--chat_template_kwargs", "[1]"], "chat_template_kwargs must be a mapping such as"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_trained(config, capsys, fields, message, tmp_path):
    if fields[0] == "--weighting":  # argparse's own list of choices
        with pytest.raises(SystemExit) as stop:
            train.main(["--config", str(config), *fields])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    else:
        assert message in fails(train, capsys, config, *fields)
    assert not list(tmp_path.glob("runs/**/model"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\nmodel: a\nseed: 2", "the key 'seed' is there twice"),
        ("a: [1", "is no YAML"),
        ("a: \x00", "is no YAML"),
        ("1: 2", "unknown field '1'"),
        ("- 1", "holds no mapping"),
    ],
)
def test_a_broken_config_file_is_one_sentence(tmp_path, capsys, content, message):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    for argv in (["--config", str(path)], [f"--config={path}"]):
        assert train.main(argv) == 2
        assert message in capsys.readouterr().err


def test_a_missing_and_an_odd_config_file(tmp_path, capsys):
    assert "does not exist" in fails(train, capsys, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    assert "no mapping" in fails(train, capsys, tmp_path / "list.yaml")


def test_a_teacher_with_other_tokens_is_refused(config, capsys, tmp_path, tiny_models):
    model, processor = tiny_qwen3_vl(hidden=32)
    processor.tokenizer.add_tokens(["<extra>"])
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    assert "different vocabularies" in fails(train, capsys, config, "--teacher", str(tmp_path / "other"))


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>"])
def test_a_special_token_in_a_problem_stops_the_run_at_its_start(config, capsys, tmp_path, token):
    Image.new("RGB", (64, 48), "white").save(tmp_path / "a.png")
    for split, problem in (("train", "Find <image> x."), ("validation", f"Find {token} x.")):
        rows = [{"problem": problem if i else "Find x.", "images": ["a.png"], "answer": "1"} for i in range(8)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    message = fails(train, capsys, config, "--dataset", "geo3k", "--data", str(tmp_path), "--min_pixels", "16")
    assert f"the prompt of row 1 holds {token}, a special token of the model: put a space" in message


def test_problems_are_held_out_of_the_data_that_are_named_for_it(config, tmp_path):
    for name in ("data", "held_out"):
        rows = "\n".join(json.dumps({"problem": f"{name} {i}?", "images": [], "answer": "1"}) for i in range(8))
        for split in ("train", "validation"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{split}.jsonl").write_text(rows)
    sources = ["--data", str(tmp_path / "data"), "--validation_data", str(tmp_path / "held_out")]
    template = ["--template", "Please: {problem}"]
    pixels = ["--min_pixels", "16", "--max_pixels", "400"]
    args, _ = train.parse(["--config", str(config), "--dataset", "geo3k", *sources, *template, *pixels])
    options = {"min_pixels": 16, "max_pixels": 400, "template": "Please: {problem}", "reward": None}
    assert train.row_options(args) == options
    splits = train.load_splits_of(args)
    for rows, name in (
        (splits["train"], "data"),
        (splits["validation"], "held_out"),
        (train.load_validation_of(args), "held_out"),
    ):
        assert len(rows) == 8
        assert all(f"Please: {name}" in row["prompt"][0]["content"][0]["text"] for row in rows)


def test_the_teacher_is_loaded_as_it_scores(config, monkeypatch):
    loaded = []
    monkeypatch.setattr(train.models, "load_model", lambda name, **options: loaded.append((name, options)))
    args, settings = train.parse(["--config", str(config), "--attn_implementation", "eager"])
    for settings.bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        train.load_teacher(args, settings)
        assert loaded.pop() == (args.teacher, {"dtype": dtype, "attn_implementation": "eager"})


def test_a_truncated_image_stops_the_run_at_its_start(config, capsys, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        Image.new("RGB", (64, 48), "white").save(folder / f"{split}.png")
        rows = [{"problem": f"Find x{i}.", "images": [f"{split}.png"], "answer": "1"} for i in range(8)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (folder / "train.png").open("r+b") as file:
        file.truncate(60)
    assert "unreadable images" in fails(train, capsys, config, "--dataset", "geo3k", "--data", str(folder))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        *((flags, name) for name, flags in loop.VARIANT_FLAGS.items()),
        *(([], "va_opd"), (["--weighting", "none"], "opd")),
    ],
)
def test_a_run_is_named_as_its_row_in_the_report(config, fields, name):
    assert train.run_path(*train.parse(["--config", str(config), *fields])).name == f"{name}-seed0"


def test_plain_opd_needs_no_weighting(config, tmp_path):
    """Method opd has none."""
    _, settings = train.parse(["--config", str(config), "--method=opd", "--measure_va", "false"])
    assert (settings.weighting, settings.measure_va) == ("none", False)
    named = tmp_path / "opd.yaml"
    named.write_text(config.read_text() + "method: opd\nmeasure_va: false\n")
    assert train.parse(["--config", str(named)])[1].weighting == "none"
    assert train.parse(["--config", str(config), "--weighting", "token"])[1].weighting == "token"


def test_the_saved_settings_are_the_same_run_again(config, tmp_path):
    args, settings = train.parse(["--config", str(config), "--method", "opd", "--top_fraction", "0.3"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(changed_settings(args, settings)))
    again_args, again = train.parse(["--config", str(saved), "--out", args.out])
    assert changed_settings(again_args, again) == changed_settings(args, settings)
    assert again.output_dir == settings.output_dir
