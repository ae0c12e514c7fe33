"""`--lora_rank` of the three train commands: what trains, what is saved, resuming, loading, refusals."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file

from common import models, tiny
from common.runs import read_jsonl

QUIET = {
    "max_steps": 4,
    "learning_rate": 1e-2,
    "max_completion_length": 4,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
}
METHODS = {
    "va_opd": {"dataset": "digits", "limit": 64, "validation_size": 20},
    "srpo": {"dataset": "additions", "limit": 64, "reward_threshold": 0.5},
}


def save(model, processor, folder: Path) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=METHODS)
def prepared(request, tmp_path, monkeypatch):
    """Module of a train command and a function that builds its trainer."""
    train = importlib.import_module(f"{request.param}.train")
    fields = {**QUIET, **METHODS[request.param], "doctor_steps": 0, "out": str(tmp_path / "runs"), "lora_rank": 4}
    if request.param == "va_opd":
        for name, hidden in (("model", 32), ("teacher", 64)):
            fields[name] = save(*tiny.tiny_qwen3_vl(hidden=hidden), tmp_path / name)
    else:
        fields["model"] = save(*tiny.tiny_qwen3(hidden=32), tmp_path / "model")
        reward = lambda completions, **columns: [float(len(c[0]["content"]) % 2) for c in completions]  # noqa: E731
        monkeypatch.setattr(train, "reward_of", lambda *arguments: reward)
    config = tmp_path / "lora.yaml"
    config.write_text(yaml.safe_dump(fields))

    def build(*more: str):
        args, settings = train.parse(["--config", str(config), *more])
        return train.build_trainer(args, settings, train.load_splits_of(args))

    return train, build, fields


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_only_the_adapter_trains_is_saved_resumes_and_loads(prepared):
    _, build, fields = prepared
    trainer = build()
    assert all("lora_" in name for name, weight in trainer.model.named_parameters() if weight.requires_grad)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-4"
    assert all("lora_" in name for name in load_file(checkpoint / "adapter_model.safetensors"))
    assert not (checkpoint / "model.safetensors").exists()
    resumed = build()
    resumed.train(resume_from_checkpoint=str(checkpoint.with_name("checkpoint-2")))
    assert losses(resumed) == losses(trainer)
    ids = torch.tensor([[20, 30, 40, 50]])
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        got, base = (models.load_model(str(name))(input_ids=ids).logits for name in (checkpoint, fields["model"]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, base, atol=1e-2)
    assert type(models.load_processor(str(checkpoint))) is type(models.load_processor(fields["model"]))


def test_wrong_settings_of_lora_are_one_sentence(prepared, monkeypatch):
    _, build, _ = prepared
    with pytest.raises(ValueError, match="^load_in_4bit trains an adapter on frozen weights: set lora_rank too"):
        build("--lora_rank", "0", "--load_in_4bit", "true")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="^load_in_4bit needs a CUDA GPU and the package bitsandbytes"):
            build("--load_in_4bit", "true")
    monkeypatch.setattr(models, "lora_config", lambda rank: LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="lm_head"):
        build()


def test_a_phase_of_r_diverse_leaves_whole_weights(tmp_path):
    """And goes on after a kill; the next phase starts from the merged model."""
    from datasets import Dataset

    from r_diverse import ChallengerConfig, RDiverseConfig
    from r_diverse.train import train_phase

    model = save(*tiny.tiny_qwen3(hidden=32), tmp_path / "model")
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Q{i}"}]} for i in range(8)])

    def reward(completions, **columns) -> list[float]:
        return [float(len(c[0]["content"]) % 2) for c in completions]

    def phase(folder: Path) -> None:
        config = ChallengerConfig(str(folder), **{**QUIET, "max_steps": 8, "save_steps": 4, "save_total_limit": 2})
        train_phase(config, model, reward, rows, RDiverseConfig(model, lora_rank=4))

    phase(tmp_path / "straight")
    shutil.copytree(tmp_path / "straight/checkpoint-4", tmp_path / "resumed/checkpoint-4")
    phase(tmp_path / "resumed")
    curves = [
        {line["step"]: line["loss"] for line in read_jsonl(tmp_path / run / "metrics.jsonl") if "loss" in line}
        for run in ("straight", "resumed")
    ]
    assert {step: curves[0][step] for step in range(5, 9)} == curves[1]
    whole, base = (load_file(tmp_path / run / "model.safetensors") for run in ("straight/model", "model"))
    assert whole.keys() == base.keys()
    assert not torch.equal(whole["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(whole["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    resumed = load_file(tmp_path / "resumed/model/model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
