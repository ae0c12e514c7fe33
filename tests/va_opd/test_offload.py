"""`teacher_offload`: the same training, with the teacher's weights elsewhere while it does not score."""

from pathlib import Path

import pytest
import torch
import va_opd_trainers as tests
from accelerate import Accelerator

from va_opd import VAOPDTrainer, train
from va_opd.offload import Offloaded

ROOT = Path(__file__).parents[2]
GIB = 2**30


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
@pytest.mark.parametrize("settings", [{}, {"num_generations": 1, "weighting": "none"}])  # the first shares prompts
def test_the_training_is_the_same(family, settings, tmp_path):
    def run(offload: bool) -> VAOPDTrainer:
        options = {"family": family, "eval_rows": tests.image_rows(4), "max_steps": 3, "doctor_steps": 1, **settings}
        trainer = tests.build(tmp_path / str(offload), tests.mixed_rows(8), teacher_offload=offload, **options)
        trainer.train()
        trainer.evaluate()
        return trainer

    offloaded, plain = run(True), run(False)
    assert plain.teacher.offloaded is None
    names = ("loss", "grad_norm", "va/mean", "va/weight_max", "kl/high", "kl/low", "va/null", "eval_loss")
    lines = ([{name: line.get(name) for name in names} for line in t.state.log_history] for t in (offloaded, plain))
    assert next(lines) == next(lines)
    assert all(map(torch.equal, offloaded.model.parameters(), plain.model.parameters()))


def test_weights_but_for_the_head_are_copied_once_for_both_views(tmp_path, monkeypatch):
    prepare, prepared = Accelerator.prepare_model, []
    monkeypatch.setattr(Accelerator, "prepare_model", lambda self, m, **o: prepared.append(m) or prepare(self, m, **o))
    trainer = tests.build(tmp_path, teacher_offload=True)
    assert trainer.teacher_model not in prepared  # it would be on the device, all of it
    teacher, kept = trainer.teacher_model, trainer.teacher.offloaded
    head = teacher.get_output_embeddings().weight
    waiting = {name: weight.data_ptr() for name, weight in teacher.named_parameters()}
    passes, transfers = [], []
    score, on_device = trainer.teacher.score, kept.on_device

    def scored(*arguments, **options):
        passes.append({name: weight.data_ptr() for name, weight in teacher.named_parameters()})
        return score(*arguments, **options)

    monkeypatch.setattr(trainer.teacher, "score", scored)
    monkeypatch.setattr(kept, "on_device", lambda: transfers.append(len(passes)) or on_device())
    trainer.train()
    assert transfers == [0, 3]  # a step each: two calls that check the shared prompt, and one for both views
    assert len(passes) == 4
    for name, weight in teacher.named_parameters():
        assert weight.data_ptr() == waiting[name]
        assert all((seen[name] == waiting[name]) == (weight is head) for seen in passes), name
    assert "time/teacher_transfer" in trainer.state.log_history[0]


def test_weights_wait_in_host_memory_also_after_an_error():
    model = tests.models()[1]
    offloaded = Offloaded(model, torch.device("cpu"))
    waiting = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), offloaded.on_device():
        raise RuntimeError("inside")
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == waiting


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_only_head_and_buffers_stay_on_the_gpu():
    model = tests.models()[1]
    head = model.get_output_embeddings().weight
    offloaded = Offloaded(model, torch.device("cuda"))
    others = [weight for weight in model.parameters() if weight is not head]
    assert all(tensor.is_cuda for tensor in (head, *model.buffers()))
    assert all(weight.is_pinned() for weight in others)
    with offloaded.on_device():
        assert all(weight.is_cuda for weight in others)
    assert not any(weight.is_cuda for weight in others)


def test_what_cannot_be_offloaded_is_one_clear_sentence(tmp_path, monkeypatch):
    student, teacher, processor = tests.models()
    with pytest.raises(ValueError, match="^teacher_offload=True has nothing to do with teacher_server"):
        tests.build(tmp_path, teacher_offload=True, teacher_server="http://node:8000", teacher_mode="teacher_topk")
    teacher.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^teacher_offload=True needs a loaded teacher, got the name .*dtype"):
        tests.build(tmp_path, parts=(student, str(tmp_path / "model"), processor), teacher_offload=True)
    monkeypatch.setattr("va_opd.checks.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"under ZeRO-3, which shards the teacher: .*offload_param_device: cpu"):
        tests.build(tmp_path, teacher_offload=True)


def test_the_memory_estimate_by_hand():
    """32B -> 2B in GiB: an offloaded teacher leaves its head; a whole one is cut by ZeRO-3 and not by FSDP."""
    argv = ["--config", str(ROOT / "va_opd/configs/geo3k_teacher_32b.yaml"), "--dry_run"]
    text = train.dry_run(*train.parse([*argv, "--teacher_offload", "true"]))
    (head,) = [line for line in text.splitlines() if "teacher's output head" in line]
    assert float(head.split()[0]) == pytest.approx(2 * 151_936 * 5120 / GIB, abs=0.005)
    assert "while the teacher scores: its 59.60 GiB in place of" in text
    assert "teacher weights" not in text
    assert "GiB (not sharded;" in text  # one process
    no_teacher = train.dry_run(*train.parse([*argv, "--teacher_offload", "true", "--method", "grpo"]))
    assert "while the teacher scores" not in no_teacher
    for sharding, pieces in (("zero2", 1), ("zero3", 8), ("fsdp2", 1)):
        parts = train.memory_parts(*train.parse(argv), 2e9, 32e9, 8, sharding)
        assert parts["teacher weights, 2 bytes each"] == 2 * 32e9 / pieces


def test_the_parts_of_every_method_by_hand():
    """2B from 8B, bytes: what a method does not have is in no estimate, nor is a teacher on a server."""
    argv = ["--config", str(ROOT / "va_opd/configs/geo3k.yaml"), "--dry_run"]

    def parts(*fields: str) -> dict[str, float]:
        return train.memory_parts(*train.parse([*argv, *fields]), 2e9, 8e9, 1, "none")

    states = (
        8 * 2 * 4096 * train.plan.shape_of(train.parse(argv)[0].teacher, 8e9).width
    )  # of all rollouts of an update
    assert parts("--gradient_accumulation_steps", "2")["cached teacher hidden states"] == 2 * states
    names = {method: parts("--method", method).keys() for method in train.METHODS}
    generated = names["grpo"] - names["sft"] - {"KL reference"}
    assert generated and generated < names["va_opd"]  # cache and logits of the rollouts
    assert names["sft"] == names["kd"] < names["grpo"] and names["opd"] == names["va_opd"]
    assert "KL reference" in names["grpo"]
    for fields in (["--grpo_beta", "0"], ["--lora_rank", "8"]):  # with LoRA it is the student without its adapter
        assert "KL reference" not in parts("--method", "grpo", *fields)
    server = ["--teacher_server", "http://node:8000", "--teacher_mode", "teacher_topk"]
    served = parts(*server, "--teacher_parity", "false")
    assert not any(name.startswith(("teacher", "cached teacher")) for name in served)
    shape = train.plan.shape_of(train.parse(argv)[0].model, 2e9)
    logits = 4 * shape.vocabulary * (3 * 1024 + shape.width)
    assert served["logits of 1,024 places and the head in float32"] == logits


def test_updates_of_a_run_by_hand():
    """16 prompts an update on 8 processes; a copy of the data has its own number of rows, known when it is loaded."""
    argv = ["--config", str(ROOT / "va_opd/configs/geo3k.yaml"), "--dry_run"]
    for fields, expected in (
        ([], 5 * 131),  # of 2,101 rows
        (["--limit", "168"], 5 * 10),
        (["--num_train_epochs", "0.5"], 66),  # transformers rounds up
        (["--method", "sft"], 5 * 33),  # 64 responses, one a prompt
        (["--data", "/a/copy"], None),
        (["--max_steps", "7"], 7),
    ):
        assert train.steps_of(*train.parse([*argv, *fields]), 8) == expected
