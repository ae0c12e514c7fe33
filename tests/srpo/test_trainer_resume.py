"""`SRPOTrainer`: checkpoints with the self-teacher, and the run that is resumed from one."""

from pathlib import Path

import pytest
import torch

from common.tiny import tiny_qwen3
from srpo.teacher import SelfTeacher


@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_resuming_gives_the_uninterrupted_run_teacher_included(make, tmp_path, kind):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "temperature": 1.0, "teacher": kind}
    straight = make(output_dir=tmp_path / "straight", **settings)
    straight.train()
    resumed = make(output_dir=tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    for a, b in ((straight.model, resumed.model), (straight.teacher.model, resumed.teacher.model)):
        other = dict(b.named_parameters())
        for name, parameter in a.named_parameters():
            assert torch.equal(parameter, other[name]), name
    keys = ("loss", "reward", "route/sdpo", *["teacher/distance"] * (kind == "ema"))
    assert [straight.state.log_history[5][k] for k in keys] == [resumed.state.log_history[5][k] for k in keys]


def test_without_a_checkpoint_nothing_is_loaded(make):
    trainer = make()
    trainer._load_optimizer_and_scheduler(None)
    assert all(torch.equal(p, trainer.teacher.average[name]) for name, p in trainer.model.named_parameters())


def test_a_checkpoint_without_its_teacher_is_refused(make, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(**settings).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "self_teacher/average.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no self_teacher/average.safetensors: .*teacher='ema'"):
        make(**settings).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_is_read_as_the_policy_by_what_loads_all_weights_of_a_folder(make, tmp_path):
    """As vLLM does, file after file: the teacher's weights have the policy's names."""
    make(max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert [path.name for path in checkpoint.glob("*.safetensors")] == ["model.safetensors"]
    assert (checkpoint / "self_teacher/average.safetensors").exists()


def test_the_teacher_of_another_model_is_refused(make, tmp_path):
    trainer = make()
    trainer.teacher.save(tmp_path)
    model, _ = tiny_qwen3(hidden=64)
    with pytest.raises(ValueError, match="belongs to another model: its parameters differ in name or shape"):
        SelfTeacher(model, trainer.accelerator).load(tmp_path)


def test_the_teacher_is_written_before_the_file_that_makes_a_checkpoint_complete(make, tmp_path, monkeypatch):
    trainer = make(max_steps=1, save_strategy="steps", save_steps=1)
    save = type(trainer.state).save_to_json

    def checked(self, path):
        assert (Path(path).parent / "self_teacher/average.safetensors").exists()
        save(self, path)

    monkeypatch.setattr(type(trainer.state), "save_to_json", checked)
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").exists()
