"""Two processes on gloo give the loss and gradients of one. This file is also the program that each of them runs."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [folder for folder in (str(TESTS), str(TESTS.parent)) if folder not in sys.path]

import processes  # noqa: E402
import srpo_trainers as tests  # noqa: E402

pytestmark = pytest.mark.distributed


def first_prompt_only(completions, answer, **columns) -> list[float]:
    """Mixed rewards on the first prompt, zeros on the other: with one prompt a rank, one rank has no routed row."""
    rewards = tests.mixed_reward(completions)
    return [r if a == 0 else 0.0 for r, a in zip(rewards, answer, strict=True)]


# `batch` is the per-device batch of two processes; the single process gets twice of it
CASES: dict[str, dict[str, Any]] = {
    "siblings of the only prompt on both ranks": {"batch": 2},
    "three prompts, the second on both ranks, three micro-batches": {
        "rows": 3,
        "batch": 2,
        "gradient_accumulation_steps": 3,
    },
    "no routed row on one rank": {"rows": 2, "batch": 4, "reward": first_prompt_only},
    "no routed row at all": {"batch": 4, "reward": tests.always(1.0)},
    "sdpo": {"batch": 4, "routing": "sdpo"},
    "mix": {"batch": 2, "routing": "mix", "gradient_accumulation_steps": 2},
    "grpo": {"batch": 4, "routing": "grpo"},
    "the policy as its own teacher": {"rows": 2, "batch": 4, "teacher": "current", "reward": first_prompt_only},
    "random demonstrations": {"batch": 4, "demonstration": "random"},
}


class Gradients(TrainerCallback):
    """Keeps what the optimizer is given."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }


def run(case: str, output_dir: Path, processes: int) -> dict[str, Any]:
    """One optimizer step through `Trainer`'s own loop, and the teacher's weights after it."""
    settings = dict(CASES[case])
    rows, batch, callback = settings.pop("rows", 4), settings.pop("batch"), Gradients()
    trainer = tests.build(
        output_dir,
        data=tests.rows(rows),
        callbacks=[callback],
        max_steps=1,
        max_grad_norm=0.0,
        shuffle_dataset=False,
        per_device_train_batch_size=batch * 2 // processes,
        **settings,
    )
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    kept = ("route/", "loss/", "teacher/", "weight", "reward", "entropy")
    return {
        "loss": log["loss"],
        "logs": {k: v for k, v in log.items() if k.startswith(kept) and isinstance(v, float)},
        "gradients": callback.gradients,
        "teacher": trainer.teacher.average if trainer.teacher else {},
    }


def all_cases(folder: Path) -> dict[str, Any]:
    tests.fixed_rollouts(pytest.MonkeyPatch())
    return {case: run(case, folder / "run", processes=2) for case in CASES}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, Any]]:
    """Results of both ranks for all cases, run once."""
    return processes.two_processes(__file__, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two_processes, tmp_path, monkeypatch, case):
    tests.fixed_rollouts(monkeypatch)
    expected = run(case, tmp_path, processes=1)
    for rank in two_processes:
        got = rank[case]
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
        assert got["logs"] == pytest.approx(expected["logs"], rel=1e-4, abs=1e-6, nan_ok=True)
        assert got["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(got["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
        for name, weight in expected["teacher"].items():
            torch.testing.assert_close(got["teacher"][name], weight, rtol=1e-5, atol=3e-5)  # Adam enlarges last bits


if __name__ == "__main__":
    processes.run(all_cases)
