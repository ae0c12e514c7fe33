"""`teacher_offload`: the same training, with the self-teacher's weights elsewhere between its passes."""

import pytest
import srpo_trainers as tests
import torch
from peft import LoraConfig

from srpo import teacher as teacher_module
from srpo.offload import Offloaded


@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_the_training_is_the_same(kind, tmp_path):
    def losses(offload: bool) -> list[dict]:
        trainer = tests.build(tmp_path / str(offload), teacher=kind, teacher_offload=offload, max_steps=3)
        trainer.train()
        names = ("loss", "grad_norm", "loss/sdpo", "teacher/entropy", "teacher/distance")
        return [{name: line.get(name) for name in names} for line in trainer.state.log_history if "loss" in line]

    assert losses(True) == losses(False)


def test_weights_but_for_the_head_are_copied_for_the_passes_only(tmp_path, monkeypatch):
    trainer = tests.build(tmp_path, teacher_offload=True)
    teacher = trainer.teacher.model
    head = teacher.get_output_embeddings().weight
    waiting = {name: weight.data_ptr() for name, weight in teacher.named_parameters()}
    during = []

    def forward(model, *inputs):
        during.append({name: weight.data_ptr() for name, weight in teacher.named_parameters()})
        return original(model, *inputs)

    original = teacher_module.last_hidden_states
    monkeypatch.setattr(teacher_module, "last_hidden_states", forward)
    trainer.train()
    assert during
    for name, weight in teacher.named_parameters():
        assert weight.data_ptr() == waiting[name]  # the average is taken in place, where the weights wait
        assert all((seen[name] == waiting[name]) == (weight is head) for seen in during), name


def test_weights_wait_in_host_memory_also_after_an_error():
    model = tests.policy()[0]
    offloaded = Offloaded(model, torch.device("cpu"))
    waiting = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), offloaded.on_device():
        raise RuntimeError("inside")
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == waiting


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_only_the_head_stays_on_the_gpu():
    model = tests.policy()[0].cuda()
    head = model.get_output_embeddings().weight
    offloaded = Offloaded(model, torch.device("cuda"))
    others = [weight for weight in model.parameters() if weight is not head]
    assert head.is_cuda
    assert all(weight.is_pinned() for weight in others)
    with offloaded.on_device():
        assert all(weight.is_cuda for weight in others)
    assert not any(weight.is_cuda for weight in others)


@pytest.mark.parametrize(
    "settings", [{"teacher": "current"}, {"teacher": "frozen", "peft_config": LoraConfig(target_modules="all-linear")}]
)
def test_a_teacher_that_is_the_policy_stays_where_it_is(settings, tmp_path):
    trainer = tests.build(tmp_path, teacher_offload=True, **settings)
    assert trainer.teacher.model is trainer.teacher.offloaded is None
