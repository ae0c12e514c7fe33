"""One GPU: a step of each trainer beside its reference in float32, and training as the configs for GPUs have it."""

import math
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [folder for folder in (str(TESTS), str(TESTS.parent)) if folder not in sys.path]

import srpo_trainers as srpo  # noqa: E402
import va_opd_trainers as va_opd  # noqa: E402

from common.tiny import tiny_qwen3  # noqa: E402
from r_diverse import ChallengerConfig, PhaseTrainer  # noqa: E402

pytestmark = pytest.mark.gpu
BFLOAT16 = {"use_cpu": False, "bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}


def assert_trained(trainer) -> None:
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


@pytest.mark.parametrize("offload", [False, True])
def test_va_opd_is_the_full_vocabulary_kl(tmp_path, monkeypatch, offload):
    va_opd.fixed_rollouts(monkeypatch)
    trainer = va_opd.build(tmp_path, weighting="va", use_cpu=False, teacher_offload=offload)
    loss, gradients, (batch,) = va_opd.step(trainer)
    trainer.teacher_model.cuda()
    kl = va_opd.reference_kl(trainer.model, trainer.teacher_model, batch, trainer.vocab_size)
    expected = (batch["coefficients"] * kl).sum() / 2
    wanted = va_opd.gradients_of(expected, trainer.model)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4)


def test_va_opd_trains_in_bfloat16(tmp_path):
    assert_trained(va_opd.build(tmp_path, **BFLOAT16, per_device_train_batch_size=4, doctor_steps=1))


def test_srpo_routing_grpo_is_trls_trainer(tmp_path, monkeypatch):
    srpo.fixed_rollouts(monkeypatch)
    ours = srpo.step(srpo.build(tmp_path, routing="grpo", use_cpu=False))
    plain = {"loss_type": "dapo", "scale_rewards": "none", "epsilon_high": 0.28, "delta": 3.0, "temperature": 1.0}
    trl = {"cls": GRPOTrainer, "config": GRPOConfig}
    theirs = srpo.step(srpo.build(tmp_path, **trl, **plain, use_cpu=False))
    assert ours[0] != 0
    srpo.assert_same_step(ours, theirs, 1e-5)


@pytest.mark.parametrize("offload", [False, True])
def test_srpo_is_the_papers_loss_on_whole_logits(tmp_path, monkeypatch, offload):
    srpo.fixed_rollouts(monkeypatch)
    trainer = srpo.build(tmp_path, entropy_beta=1.0, use_cpu=False, teacher_offload=offload)
    loss, gradients = srpo.step(trainer)
    trainer.teacher.model.cuda()
    expected = srpo.reference_loss(trainer, "srpo", 1.0)
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    names, parameters = zip(*trainer.model.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradients[name], gradient.float(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("offload", [False, True])
def test_srpo_trains_in_bfloat16(tmp_path, offload):
    options = {**BFLOAT16, "per_device_train_batch_size": 4, "teacher_offload": offload, "doctor_steps": 1}
    assert_trained(srpo.build(tmp_path, **options))


def test_a_phase_of_r_diverse_trains_in_bfloat16(tmp_path):
    model, tokenizer = tiny_qwen3(hidden=32)
    model.save_pretrained(tmp_path / "model")  # the reference of the KL term is loaded from there
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Q{i}"}]} for i in range(8)])
    fields = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
    fields |= {"learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "save_strategy": "no"}
    args = ChallengerConfig(str(tmp_path / "run"), **{**BFLOAT16, **fields})
    assert_trained(
        PhaseTrainer(str(tmp_path / "model"), srpo.mixed_reward, args, train_dataset=rows, processing_class=tokenizer)
    )
