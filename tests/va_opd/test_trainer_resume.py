"""`VAOPDTrainer`: a run that is resumed, also after a kill, equals the straight run."""

import signal
from pathlib import Path

import forks
import pytest
import torch
from va_opd_trainers import build, image_rows

from va_opd import VAOPDTrainer

FOLDERS = [str(folder) for folder in Path(__file__).resolve().parents[:3]]  # this one, tests/, the repository


def weights_of(trainer: VAOPDTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def history_of(trainer: VAOPDTrainer) -> list[tuple]:
    """What must be the same in a resumed run: all but times, and the null check, which is made once a process."""
    skipped = ("time", "step_time", "train_", "va/null")
    return [
        {k: v for k, v in log.items() if not k.startswith(skipped)}
        for log in trainer.state.log_history
        if "loss" in log
    ]


@pytest.mark.parametrize("resume_at", [2, 4])
def test_a_resumed_run_equals_the_straight_run(make, tmp_path, resume_at):
    """Six steps of sampled rollouts, three steps an epoch: resumed inside the first and inside the second epoch."""
    settings = {
        "rows": image_rows(6),
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "output_dir": str(tmp_path / "straight"),
    }
    straight = make(**settings)
    straight.train()
    torch.manual_seed(123)  # a new process starts elsewhere
    resumed = make(**{**settings, "output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{resume_at}"))
    assert history_of(resumed) == history_of(straight)
    for name, weight in weights_of(straight).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


KILLED_RUN = """
import os, signal, sys
sys.path[:0] = {folders!r}
from transformers import TrainerCallback
from test_trainer_resume import ten_steps

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

ten_steps({output!r}, Kill()).train()
"""


def ten_steps(output_dir: str, *callbacks) -> VAOPDTrainer:
    settings = {"max_steps": 10, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    return build(output_dir, image_rows(6), callbacks=list(callbacks), **settings, **saving)


def test_kill_9_and_resume_gives_the_straight_runs_metrics(tmp_path):
    script = KILLED_RUN.format(folders=FOLDERS, output=str(tmp_path / "killed"))
    log = tmp_path / "log.txt"
    assert forks.call(["-c", script], log, tmp_path) == -signal.SIGKILL, log.read_text()[-2000:]
    resumed = ten_steps(str(tmp_path / "killed"))
    resumed.train(resume_from_checkpoint=True)
    straight = ten_steps(str(tmp_path / "straight"))
    straight.train()
    assert history_of(resumed) == history_of(straight)
    assert len(history_of(straight)) == 10
    for name, weight in weights_of(straight).items():
        assert torch.equal(weights_of(resumed)[name], weight), name
