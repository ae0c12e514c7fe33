"""Fixtures of the tests of SRPO: trainers, and runs of seconds on embedded additions."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from training_runs import SMALL

ADDITIONS = {
    **SMALL,
    "dataset": "additions",
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "grpo_steps": 1,
    "max_completion_length": 4,
    "eval_samples": 2,
    "eval_temperature": 1.0,
    "eval_batch_size": 100,
    "eval_limit": 40,
}


@pytest.fixture
def make(tmp_path) -> Callable:
    """`build` in a folder of the test's own."""
    from srpo_trainers import build  # here, so that tests without a trainer start without TRL

    return lambda **overrides: build(overrides.pop("output_dir", tmp_path / "run"), **overrides)


@pytest.fixture
def fixed(monkeypatch) -> None:
    from srpo_trainers import fixed_rollouts

    fixed_rollouts(monkeypatch)


@pytest.fixture
def warned(caplog, monkeypatch) -> Callable[[str], int]:
    """How often a text was in a warning so far."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return lambda text: sum(text in record.getMessage() for record in caplog.records)


@pytest.fixture(scope="session")
def policy(tmp_path_factory) -> str:
    from common.tiny import tiny_qwen3

    folder = tmp_path_factory.mktemp("policy")
    model, tokenizer = tiny_qwen3(hidden=32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tmp_path, policy) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**ADDITIONS, "model": policy, "out": str(tmp_path / "runs")}))
    return path


@pytest.fixture
def easy(monkeypatch):
    """A random policy never adds right: let an even length count as correct, so that all routes are taken."""
    from srpo import evaluate, train

    def reward(completions, answer, **columns):
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [float(len(text) % 2 == 0) for text in texts]

    for module in (train, evaluate):
        monkeypatch.setattr(module, "reward_of", lambda *names: reward)


@pytest.fixture(scope="session")
def evaluated(policy, tmp_path_factory) -> tuple[Path, Path]:
    """Config and folder of an evaluated policy before training."""
    from srpo import evaluate

    folder = tmp_path_factory.mktemp("evaluated")
    config = folder / "small.yaml"
    config.write_text(yaml.safe_dump({**ADDITIONS, "model": policy, "out": str(folder / "runs")}))
    assert evaluate.main(["base", "--config", str(config)]) == 0
    return config, folder / "runs/srpo/small-additions/base"


@pytest.fixture(scope="session")
def other_policy(policy, tmp_path_factory) -> str:
    return shutil.copytree(policy, tmp_path_factory.mktemp("other") / "policy").as_posix()
