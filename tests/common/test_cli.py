"""What the command lines share: exit codes, sentences, `env:` of a config, models that are made once.

Signals and full disks: test_preemption.py. Fields and their mistakes: test_train_settings.py of each method.
"""

import os
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from common.cli import make_model_main, parse_fields, read_config, run_main


@dataclass
class Fields:
    """Of a command."""

    steps: int = 1
    dry_run: bool = False
    use_cpu: bool = False
    limit: int | None = None
    eval_temperature: float = 1.0
    eval_top_p: float = 1.0


def failing(error: BaseException):
    def command(_):
        raise error

    return command


@pytest.mark.parametrize(("said", "code"), [(None, 0), (0, 0), (7, 7)])
def test_the_exit_code_is_the_commands(said, code):
    assert run_main("x.y", lambda _: said, []) == code


def test_ctrl_c_is_not_sigterm(capsys):
    assert run_main("x.y", failing(KeyboardInterrupt()), []) == 130
    assert "x.y: stopped; the same command goes on from here" in capsys.readouterr().err


def test_traceback_1_shows_where(capsys, monkeypatch):
    assert run_main("x.y", failing(ValueError("two\nlines")), []) == 2
    assert capsys.readouterr().err == "x.y: two lines (TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="two"):
        run_main("x.y", failing(ValueError("two\nlines")), [])


def test_a_rollout_server_that_is_gone_is_one_sentence_with_the_remedy(capsys):
    kind = type("ConnectionError", (OSError,), {"__module__": "requests.exceptions"})  # of a package of GPU machines
    assert run_main("x.y", failing(kind("refused")), []) == 2
    assert "x.y: the rollout server does not answer; start it, then the same command" in capsys.readouterr().err


def test_a_config_may_set_variables_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("X_OF_A_CONFIG", "before")
    (tmp_path / "x.yaml").write_text("env:\n  X_OF_A_CONFIG: set\nsteps: 3\n")
    (fields,) = parse_fields(["--config", str(tmp_path / "x.yaml")], (Fields,), "configs/")
    assert (fields.steps, os.environ["X_OF_A_CONFIG"]) == (3, "set")


def test_a_key_may_override_a_merged_one_but_not_stand_twice(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1, y: 1}\nb: &b\n  <<: *a\n  x: 2\n<<: *b\n")
    merged = {"x": 2, "y": 1}
    assert read_config(str(path), "configs/") == {"a": {"x": 1, "y": 1}, "b": merged, **merged}
    path.write_text("a:\n  x: 1\n  x: 2\n")
    with pytest.raises(ValueError, match="the key 'x' is there twice: leave out one"):
        read_config(str(path), "configs/")


@pytest.mark.parametrize(
    ("words", "dry"),
    [
        (["--dry_run"], True),
        (["--dry-run=true"], True),
        (["--dry_run", "--steps", "2"], True),
        (["--dry_run=false"], False),
        (["--dry_run", "False"], False),
        (["--dry_run", "n"], False),
        (["--dry_run=f"], False),
    ],
)
def test_only_a_dry_run_is_taken_to_the_cpu(monkeypatch, words, dry):
    """A training whose record says `use_cpu` would be refused by the same command on a GPU machine."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (fields,) = parse_fields(words, (Fields,), "configs/")
    assert (fields.dry_run, fields.use_cpu) == (dry, dry)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_half_precision_without_a_gpu_names_the_field_and_the_remedy():
    with pytest.raises(ValueError, match="bf16 is true, but there is no GPU: .* set use_cpu to true .* --dry_run"):
        parse_fields(["--output_dir", "x", "--bf16", "true"], (TrainingArguments,), "configs/")


def test_a_wrong_type_is_said_without_a_list_of_all_fields(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="srpo.train"), raising=False)
    with pytest.raises(SystemExit):
        parse_fields(["--steps", "five"], (Fields,), "configs/")
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: python -m srpo.train [--config")
    assert error == "python -m srpo.train: error: argument --steps: invalid int value: 'five'"


@pytest.mark.parametrize(
    ("name", "good", "bad", "rule"),
    [
        ("limit", "1", ["0", "-1"], "must be at least 1"),
        ("eval_temperature", "0", ["-0.1", "inf", "nan"], "must be at least 0 and finite"),
        ("eval_top_p", "1", ["0", "1.01", "nan"], r"must be in \(0, 1\]"),
    ],
)
def test_a_number_that_would_fail_after_the_training_is_refused_before(name, good, bad, rule):
    assert getattr(parse_fields([f"--{name}", good], (Fields,), "configs/")[0], name) == float(good)
    for value in bad:
        with pytest.raises(ValueError, match=f"{name} {rule}, got"):
            parse_fields([f"--{name}={value}"], (Fields,), "configs/")


def test_a_model_that_a_kill_has_left_unmade_is_made(tmp_path, capsys):
    def make(out, seed):
        (out / "config.json").write_text(str(seed))
        return "made"

    assert make_model_main("x.data", {"base": make}, ["base", str(tmp_path), "--seed", "5"]) == 0  # a folder is there
    assert (tmp_path / "config.json").read_text() == "5"
    assert make_model_main("x.data", {"base": make}, ["base", str(tmp_path), "--seed", "6"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}: done already"
    assert (tmp_path / "config.json").read_text() == "5"


@dataclass
class Chosen:
    engine: str = field(default="vllm", metadata={"choices": ["transformers", "vllm"]})


def test_a_choice_is_checked_in_a_file_as_in_a_flag(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("engine: transformers\n")
    assert parse_fields(["--config", str(config)], (Chosen,), "configs/")[0].engine == "transformers"
    config.write_text("engine: tgi\n")
    with pytest.raises(ValueError, match="engine must be one of transformers, vllm, got 'tgi'"):
        parse_fields(["--config", str(config)], (Chosen,), "configs/")
