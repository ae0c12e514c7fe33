"""Two processes on gloo give the loss and gradients of one. This file is also the program that each of them runs."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
sys.path[:0] = [folder for folder in (str(TESTS), str(TESTS.parent)) if folder not in sys.path]

import processes  # noqa: E402
import va_opd_trainers as tests  # noqa: E402

from va_opd.doctor import DoctorCallback  # noqa: E402


def _neighbour(name: str):
    """The neighbouring file by its path: another folder has a file of the same name."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"va_opd_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


test_served = _neighbour("test_served")
pytestmark = pytest.mark.distributed

# `batch` is the per-device batch of two processes; the single process gets twice of it
CASES: dict[str, dict[str, Any]] = {
    "siblings of the only prompt on both ranks": {"rows": 4, "batch": 2},
    "three prompts, the second on both ranks, three micro-batches": {
        "rows": 3,
        "batch": 2,
        "gradient_accumulation_steps": 3,
    },
    "no prompt on both ranks": {"rows": 4, "batch": 4, "weighting": "token"},
    "Standard OPD": {"rows": 4, "batch": 2, "weighting": "none"},
    "random ties": {"rows": 4, "batch": 2, "gradient_accumulation_steps": 2, "random_ties": True},
    "one rank has text only": {"rows": 2, "batch": 2, "num_generations": 2, "mixed": True},
    "mixed rows in micro-batches of one": {
        "rows": 4,
        "batch": 1,
        "num_generations": 2,
        "gradient_accumulation_steps": 4,
        "mixed": True,
    },
    "no image_grid_thw": {"rows": 4, "batch": 2, "family": "llava"},
    "served teacher, siblings of the only prompt on both ranks": {
        "rows": 4,
        "batch": 2,
        "doctor_steps": 1,
        "teacher_mode": "teacher_topk",
    },
    "served teacher, one rank has text only": {
        "rows": 2,
        "batch": 2,
        "num_generations": 2,
        "mixed": True,
        "teacher_mode": "sampled_token",
    },
    "offloaded teacher": {"rows": 4, "batch": 4, "teacher_offload": True},
}


class Gradients(DoctorCallback):
    """Keeps what the optimizer is given."""

    def __init__(self):
        super().__init__(1)
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }


def run(case: str, output_dir: Path, processes: int) -> dict[str, Any]:
    """One optimizer step and one evaluation through `Trainer`'s own loops."""
    settings = dict(CASES[case])
    rows, batch, mixed = settings.pop("rows"), settings.pop("batch"), settings.pop("mixed", False)
    callback, parts = Gradients(), tests.models(settings.pop("family", "qwen3_vl"))
    with contextlib.ExitStack() as stack:
        if "teacher_mode" in settings:
            settings["teacher_server"] = stack.enter_context(test_served.serving(test_served.Served(*parts[1:])))
        trainer = tests.build(
            output_dir,
            tests.mixed_rows(rows) if mixed else tests.image_rows(rows),
            parts=parts,
            callbacks=[callback],
            eval_rows=tests.image_rows(4),
            max_steps=1,
            max_grad_norm=0.0,
            shuffle_dataset=False,
            per_device_train_batch_size=batch * 2 // processes,
            per_device_eval_batch_size=4 // processes,
            **settings,
        )
        trainer.train()
        eval_loss = trainer.evaluate()["eval_loss"]
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    return {
        "loss": log["loss"],
        "logs": {k: v for k, v in log.items() if k.startswith(("va/", "kl/", "completions/")) and k != "va/cells"},
        "parity": log["teacher/parity_max"] if "teacher_mode" in settings else 0.0,
        "gradients": callback.gradients,
        "width": trainer.last_rollouts["mask"].size(1),
        "eval_loss": eval_loss,
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
        # gradients that are None in one process may be zeros in the other, where a rank has no image
        for name in expected["gradients"].keys() | got["gradients"].keys():
            ours, theirs = (g["gradients"].get(name, torch.zeros(())) for g in (got, expected))
            torch.testing.assert_close(*torch.broadcast_tensors(ours, theirs), rtol=1e-4, atol=1e-6, msg=name)
        assert got["parity"] < 1e-4
        assert got["eval_loss"] == pytest.approx(expected["eval_loss"], rel=5e-6, abs=1e-6)
    got = two_processes[0][case]
    assert got["loss"] == pytest.approx(expected["loss"], rel=5e-6, abs=1e-6)
    assert got["logs"].keys() == expected["logs"].keys()
    for name, value in expected["logs"].items():
        assert got["logs"][name] == pytest.approx(value, abs=1e-5), name


def test_some_rollouts_were_longer_on_one_rank(two_processes):
    widths = [[result["width"] for result in rank.values()] for rank in two_processes]
    assert widths[0] != widths[1]


if __name__ == "__main__":
    processes.run(all_cases)
