"""The memory table of the dry runs, the formulas of a step, the plan of every config, and the Slurm scripts."""

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPTNeoXConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from benchmarks import cost
from benchmarks import plan as step_plan
from common import models, plan
from common.lora import lora_config
from common.tiny import tiny_qwen3, tiny_qwen3_vl
from srpo import train as srpo_train

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for method in step_plan.PARSERS for path in (ROOT / method).glob("configs/*.yaml"))
SLURM = ROOT / "scripts/slurm"
TINY = plan.Shape(layers=2, width=10, query=8, key=4, mlp=30, vocabulary=100)
GPU = cost.GPU(memory=80, flops=1e15, bandwidth=2e12, link=4e11, network=5e10)
EXACT = cost.Assumed(memory=1, score=1, train=1, link=1, launch=0, longest=1, start=0)


# --- memory and disk ---


@pytest.mark.parametrize("size", [0.6e9, 1.7e9, 4e9, 8e9, 14e9, 32e9])
def test_a_shape_has_the_parameters_of_its_name(size):
    shape = plan.QWEN3[size]
    config = Qwen3Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.query // 128,
        num_key_value_heads=shape.key // 128,
        head_dim=128,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=size < 8e9,
    )
    with torch.device("meta"):
        assert Qwen3ForCausalLM(config).num_parameters() == pytest.approx(size, rel=0.06)


def adapted_parameters(model) -> int:
    with torch.device("meta"):
        return get_peft_model(model, lora_config(3)).num_parameters(only_trainable=True)


def test_the_shape_of_a_local_model_and_its_adapters(tmp_path):
    config = Qwen3Config(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=24, vocab_size=50,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert plan.shape_of(str(tmp_path), 1e3) == plan.Shape(2, width=16, query=32, key=16, mlp=24, vocabulary=50)
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    assert plan.trained_parameters(str(tmp_path), 1e3, 3) == adapted_parameters(model)
    assert plan.trained_parameters(str(tmp_path), 1e3, 0) == 1e3
    assert plan.in_4_bits(str(tmp_path), 1e6, True) == linear > 0
    assert plan.in_4_bits(str(tmp_path), 1e6, False) == 0
    assert plan.in_4_bits("Some/Model-0.1B", 1e8, True) == 1e8  # no more than it has
    assert plan.shape_of("Some/Model-7B", 7e9) == plan.QWEN3[8e9]
    assert plan.shape_of("Some/Model-1.1B", 1.1e9) == plan.QWEN3[1.7e9]  # the nearest by ratio


@pytest.mark.parametrize(
    ("name", "text", "tower"),
    [
        ("Qwen/Qwen3-1.7B", (28, 2048, 16, 6144), None),
        ("Qwen/Qwen3-VL-2B-Instruct", (28, 2048, 16, 6144), (24, 1024, 4096, [5, 11, 17])),
        ("Qwen/Qwen3-VL-8B-Instruct", (36, 4096, 32, 12288), (27, 1152, 4304, [8, 16, 24])),
    ],
)
def test_adapters_and_weights_in_4_bits_of_a_hub_id_are_of_the_vision_tower_too(name, text, tower):
    """Against models of the published configurations."""
    layers, width, heads, mlp = text
    text = {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": mlp, "vocab_size": 151_936,
    }  # fmt: skip
    with torch.device("meta"):
        if tower is None:
            model = Qwen3ForCausalLM(Qwen3Config(**text))
        else:
            names = ("depth", "hidden_size", "intermediate_size", "deepstack_visual_indexes")
            vision = {**dict(zip(names, tower, strict=True)), "out_hidden_size": width}
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    size = models.guess_parameters(name)
    assert plan.in_4_bits(name, size, True) == linear
    assert plan.trained_parameters(name, size, 3) == adapted_parameters(model)


def test_adapters_of_a_local_model_are_of_the_vision_tower_too(tmp_path):
    model, _ = tiny_qwen3_vl(hidden=32)
    model.save_pretrained(tmp_path)
    assert plan.trained_parameters(str(tmp_path), 1e3, 3) == adapted_parameters(model)


@pytest.mark.parametrize(("make", "key"), [(Qwen2Config, 16), (GPTNeoXConfig, 32)])
def test_configs_without_a_size_or_a_number_of_their_key_heads(make, key, tmp_path):
    config = make(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=24, vocab_size=50)
    if make is Qwen2Config:
        config.num_key_value_heads = 2
    config.save_pretrained(tmp_path)
    assert plan.shape_of(str(tmp_path), 1e3) == (2, 32, 32, key, 24, 50)


def test_what_each_sharding_cuts():
    assert plan.split("none", 8) == plan.split("multi_gpu", 8) == (1, 1, 1)
    assert plan.split("zero1", 8) == (1, 1, 8)
    assert plan.split("zero2", 8) == (1, 8, 8)
    assert plan.split("zero3", 8) == plan.split("fsdp2", 8) == (8, 8, 8)
    with pytest.raises(ValueError, match="sharding 'zero4' is unknown; choose among none, "):
        plan.split("zero4", 8)


def test_16_bytes_a_parameter():
    """fp32 with AdamW, DeepSpeed in bf16 and FSDP in bf16 all hold 16; weights in bf16 alone 8."""
    assert plan.bytes_each("none", bf16=True) == (4, 4, 8, 2)
    assert plan.bytes_each("none", bf16=False) == (4, 4, 8, 0)
    assert plan.bytes_each("zero2", bf16=True) == (2, 2, 12, 0)
    assert plan.bytes_each("zero2", bf16=False) == (4, 4, 8, 0)
    assert plan.bytes_each("fsdp2", bf16=True, dtype="bfloat16") == (4, 4, 8, 0)
    assert plan.bytes_each("none", bf16=True, dtype="bfloat16") == (2, 2, 4, 0)
    parts = plan.model_bytes("policy", 8e9, 8e9, plan.Bytes(2, 2, 12), plan.Split(1, 8, 8))
    assert list(parts.values()) == [16e9, 2e9, 12e9]
    parts = plan.model_bytes("policy", 8e9, 1e8, plan.Bytes(4, 4, 8, 2), plan.Split(1, 1, 1))
    assert list(parts.values()) == [32e9, 4e8, 8e8, 2e8]  # of frozen weights no copy stays


def test_autocast_keeps_its_copies_of_trained_weights_until_the_forward_ends():
    layer, hidden, casts = torch.nn.Linear(4, 4, bias=False), torch.ones(2, 4).bfloat16(), []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            casts.extend([function] * (function is torch.ops.aten._to_copy.default))
            return function(*args, **(kwargs or {}))

    for trained, count in ((True, 1), (False, 3)):
        layer.requires_grad_(trained)
        casts.clear()
        with Casts(), torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                layer(hidden)
        assert len(casts) == count


@pytest.mark.parametrize(("dtype", "autocast", "size"), [("float32", True, 4), ("bfloat16", False, 2)])
def test_the_cache_of_generate(dtype, autocast, size):
    model, _ = tiny_qwen3(hidden=32)
    model.to(getattr(torch, dtype))
    config = model.config
    settings = {"use_vllm": False, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    settings = SimpleNamespace(**settings, max_prompt_length=5, max_completion_length=4)
    shape = TINY._replace(layers=config.num_hidden_layers, key=config.num_key_value_heads * config.head_dim)
    ((name, planned),) = plan.generation_bytes(settings, shape, size).items()
    assert name == "KV cache of generate, 6 rollouts of 9 tokens"
    ids, kept = torch.full((6, 5), 10), {"return_dict_in_generate": True, "eos_token_id": None, "max_new_tokens": 5}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # the last token is not read
        layers = model.generate(ids, attention_mask=torch.ones_like(ids), **kept).past_key_values.layers
    assert planned == sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    del settings.max_prompt_length
    settings.steps_per_generation = 8
    ((name, planned),) = plan.generation_bytes(settings, TINY, 2).items()
    assert name == "KV cache of generate, 24 rollouts of 4 tokens, prompts come on top"
    assert planned == 24 * 4 * 2 * 2 * 2 * 4


def test_the_engines_share_is_of_the_gpu_that_is_here(monkeypatch):
    config = SimpleNamespace(use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.5)
    config.vllm_enable_sleep_mode = True
    monkeypatch.delenv("GPU_GIB", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    away = "rollout engine, 50% of 80 GiB, no GPU being here and no GPU_GIB, asleep while training"
    assert plan.generation_bytes(config, TINY, 4) == plan.engine_bytes(config) == {away: 40 * plan.GIB}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(total_memory=139.8 * plan.GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    here = {"rollout engine, 50% of 139.8 GiB, this GPU, asleep while training": 69.9 * plan.GIB}
    assert plan.engine_bytes(config) == pytest.approx(here)
    config.vllm_enable_sleep_mode = False
    assert list(plan.engine_bytes(config)) == ["rollout engine, 50% of 139.8 GiB, this GPU"]
    monkeypatch.setenv("GPU_GIB", "24")  # for another machine
    assert plan.engine_bytes(config) == {"rollout engine, 50% of 24 GiB": 12 * plan.GIB}
    assert plan.engine_bytes(config, 40) == {"rollout engine, 50% of 40 GiB": 20 * plan.GIB}
    for text in ("24GB", "0", "nan", "inf"):
        monkeypatch.setenv("GPU_GIB", text)
        with pytest.raises(ValueError, match=f"GPU_GIB must be the memory of a GPU in GiB, such as 24, got '{text}'"):
            plan.engine_bytes(config)
    monkeypatch.setenv("GPU_GIB", "")
    config.vllm_mode = "server"
    assert plan.generation_bytes(config, TINY, 4) == {}


def test_weights_in_4_bits():
    """QLoRA holds a weight in 4.127 bits (arXiv 2305.14314, Section 3); embeddings, head and adapters stay."""
    parts = plan.model_bytes("policy", 8e9, 1e8, plan.Bytes(4, 4, 8), plan.Split(1, 1, 1), quantized=6e9)
    assert list(parts.values()) == pytest.approx([2e9 * 4 + 6e9 * 4.127 / 8, 4e8, 8e8])
    flags = ["--config", "srpo/configs/single_gpu.yaml", "--use_cpu", "true", "--use_vllm", "false"]
    flags += ["--lora_rank", "16"]
    whole, small = (srpo_train.parse([*flags, *more]) for more in ([], ["--load_in_4bit", "true"]))
    whole, small = (sum(srpo_train.memory_parts(*s, 8e9, 1, "none").values()) for s in (whole, small))
    assert whole - small > 8e9 * 4 + 6e9 * 3  # no copy for the average, and the linear layers


def test_what_the_launcher_says(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    assert plan.launched() == (1, "none")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert plan.launched() == (8, "zero3")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert plan.launched() == (8, "zero3")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert plan.launched() == (8, "fsdp1")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert plan.launched() == (8, "fsdp2")


def test_number_of_checkpoints():
    assert plan.checkpoint_count(655, 50) == 14  # one at the end
    assert plan.checkpoint_count(475, 5) == 95
    assert plan.checkpoint_count(100, 1) == 100  # a number of steps, not a share
    assert plan.checkpoint_count(100, 0.25) == 4
    assert plan.checkpoint_count(5, 0.3) == 3  # every 2 steps, as transformers rounds
    assert plan.checkpoint_count(655, 0) == 1
    assert plan.checkpoint_count(None, 50) is None
    assert "GiB: number of checkpoints x 2.00, and 2 x 1.00 to resume" in plan.disk_line(
        None, "checkpoints", 2 * plan.GIB, plan.GIB
    )


def test_the_lines_of_a_dry_run():
    chosen = {"seed": 0, "use_vllm": False, "delta": None, "use_cpu": True, "model": "x"}
    lines = plan.settings_lines(Path("runs/a"), chosen)
    assert lines[0] == "run folder: runs/a"
    assert lines[2:] == ["  seed: 0", "  use_vllm: False", "  model: x"]
    config = SimpleNamespace(per_device_train_batch_size=4, gradient_accumulation_steps=6, num_generations=8)
    line = plan.update_line(config, 3)
    assert line == "one update: 9 prompts x 8 rollouts, 3 processes x 4 rollouts x 6 micro-batches"
    line = plan.update_line(config, 3, rollouts=False)
    assert line == "one update: 72 responses, 3 processes x 4 responses x 6 micro-batches"
    for sharding, how in (("zero2", "zero2 over 8 processes"), ("multi_gpu", "not sharded")):
        head, *rows = plan.memory_lines({"a": 2 * plan.GIB, "b": plan.GIB}, sharding, 8)
        assert head == f"memory a process, GiB ({how}; activations come on top):"
        assert [row.split() for row in rows] == [["2.00", "a"], ["1.00", "b"], ["3.00", "sum"]]


# --- formulas, by hand ---


def test_bytes_and_flops():
    assert cost.kv_bytes(plan.QWEN3[8e9]) == 144 * 1024  # Qwen3-8B; 112 KiB for 1.7B, 256 KiB for 32B
    assert cost.kv_bytes(plan.QWEN3[1.7e9]) == 112 * 1024
    assert cost.kv_bytes(plan.QWEN3[32e9]) == 256 * 1024
    assert cost.forward_flops(1000, TINY, tokens=5, context=100) == 5 * (2000 + 2 * 2 * 8 * 100)
    assert cost.train_flops(10, checkpointing=False, lora=False) == 30  # 6 a parameter and token
    assert cost.train_flops(10, checkpointing=True, lora=False) == 40  # 8
    assert cost.train_flops(10, checkpointing=True, lora=True) == 30
    assert cost.activation_bytes(TINY, 3, checkpointing=False) == 3 * 10 * 2 * 34
    assert cost.activation_bytes(TINY, 3, checkpointing=True) == 3 * 10 * (2 * 2 + 34)
    assert cost.optimizer_seconds(1e9, GPU, EXACT) == 28e9 / 2e12


def test_decoding_reads_weights_once_a_step_and_each_cache():
    shape = plan.QWEN3[8e9]
    read = 1000 * 16e9 + 64 * 1000 * (500 + 500) * 147_456
    assert cost.decode_seconds(8e9, shape, 64, 500, 1000, 256, GPU, EXACT) == pytest.approx(read / 2e12)
    slow = cost.Assumed(memory=0.5, score=1, train=1, link=1, launch=0.01, longest=2, start=0)
    read += 1000 * 16e9  # twice the steps
    expected = read / 1e12 + 2000 * 0.01
    assert cost.decode_seconds(8e9, shape, 64, 500, 1000, 256, GPU, slow) == pytest.approx(expected)
    queue = cost.decode_seconds(8e9, shape, 64, 500, 1000, 16, GPU, EXACT)  # four waves of 16
    assert queue == pytest.approx((4000 * 16e9 + 64 * 1000 * 1000 * 147_456) / 2e12)
    weak = GPU._replace(flops=1e13)
    assert cost.decode_seconds(8e9, shape, 64, 500, 1000, 256, weak, EXACT) == pytest.approx(64 * 1000 * 16e9 / 1e13)


def test_decoding_stays_below_the_published_bound():
    """Tokens/s of one H100 with Qwen3-8B at context 1,500: 202 alone, 7.0k with 64 rollouts, 11.7k with 256."""
    for rollouts, bound in ((1, 202), (64, 7000), (256, 11_700)):
        seconds = cost.decode_seconds(8.2e9, plan.QWEN3[8e9], rollouts, 1499.5, 1, 256, cost.GPUS["h100"], EXACT)
        assert rollouts / seconds == pytest.approx(bound, rel=0.03)


def test_slots():
    shape = plan.QWEN3[8e9]
    assert cost.cache_slots(8e9, shape, 16e9 + 10 * 1000 * 147_456, 1000) == pytest.approx(10)
    assert cost.cache_slots(8e9, shape, 80e9, 1000) == 256
    with pytest.raises(ValueError, match="raise its share of memory"):
        cost.cache_slots(8e9, shape, 16e9, 1000)


def test_bytes_sent_in_an_update():
    """8 processes send 7/8; weights and gradients of 16 bytes, 4 micro-batches."""
    sent = {s: cost.update_bytes(s, 16, 16, 4, 8) for s in ("none", "zero1", "zero2", "zero3", "fsdp2")}
    assert sent == {"none": 28, "zero1": 28, "zero2": 70, "zero3": 168, "fsdp2": 168}
    assert cost.update_bytes("zero3", 16, 0.16, 1, 8) == pytest.approx(7 / 8 * 32.16)  # LoRA still gathers all weights
    assert cost.update_bytes("zero2", 16, 16, 4, 1) == 0


def test_a_step_by_hand():
    job = cost.Job(1e9, TINY, 16, 4, 100, 300, 400, 2, (cost.Pass("teacher", 2e9, TINY, 0.5, 100),), updates=2)
    seconds = cost.step_seconds(job, cost.Place(GPU, 8, "none"), EXACT)
    assert seconds["teacher"] == pytest.approx(0.5 * 2 * 500 * (4e9 + 2 * 2 * 8 * 500) / 1e15)
    assert seconds["student: forward and backward"] == pytest.approx(4 * 2 * 400 * (2e9 + 2 * 2 * 8 * 400) / 1e15)
    assert seconds["optimizer"] == pytest.approx(2 * 28e9 / 2e12)
    assert seconds["communication"] == pytest.approx(2 * 7 / 8 * 4e9 / 4e11)
    assert seconds["generation: prefill"] == pytest.approx(0.5 * 100 * (2e9 + 2 * 2 * 8 * 100) / 1e15)
    assert seconds["weight sync"] == pytest.approx(4e9 / 2e12)
    padded = cost.step_seconds(job, cost.Place(GPU, 8, "none"), cost.replace(EXACT, longest=2))
    assert padded["student: forward and backward"] == pytest.approx(4 * 2 * 500 * (2e9 + 2 * 2 * 8 * 500) / 1e15)
    packed = cost.step_seconds(job, cost.Place(GPU, 8, "none", packed=True), cost.replace(EXACT, longest=2))
    assert packed["student: forward and backward"] == seconds["student: forward and backward"]
    far = cost.step_seconds(job, cost.Place(GPU, 16, "zero3"), EXACT)  # over the network, the teacher's weights too
    assert far["communication"] == pytest.approx((2 * 15 / 16 * 2 * 6e9 + 2 * 2e9 * 2 * 2) / 5e10)


# --- plans ---


def run(capsys, *words: str) -> str:
    assert step_plan.main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_the_plan_of_every_config_is_finite_and_its_parts_sum(config, capsys):
    models = ["--student", "4e8", *(["--teacher", "8e8"] if "va_opd" in config.parts else [])]
    text = run(capsys, "--config", str(config), "--gpus", "4", *(models if config.stem in ("tiny", "small") else []))
    rows = [line.split()[:2] for line in text.split("fast and slow end:")[1].splitlines() if line.startswith("    ")]
    fast, slow = zip(*((float(a), float(b)) for a, b in rows), strict=True)
    assert all(math.isfinite(value) and value >= 0 for value in fast + slow)
    assert all(a <= b for a, b in zip(fast, slow, strict=True))
    assert sum(fast[:-1]) == pytest.approx(fast[-1], abs=1)
    assert sum(slow[:-1]) == pytest.approx(slow[-1], abs=1)
    assert "the most at one time, of 80: fits" in text or "DOES NOT FIT" in text


@pytest.mark.parametrize("generated", [[], ["--use_vllm", "false"]])
def test_the_plan_has_the_parts_of_the_dry_run(generated, capsys):
    from srpo import loop

    config = str(ROOT / "srpo/configs/qwen3_8b.yaml")
    assert loop.main(["--config", config, "--gpus", "8", "--sharding", "zero3", "--dry_run", *generated]) == 0
    printed = re.sub(", (this GPU|no GPU being here and no GPU_GIB)", "", capsys.readouterr().out)
    dry = printed.split("memory a process")[1].splitlines()
    parts = [line.split() for line in dry if line.startswith("   ") and not line.endswith("sum")]
    planned = [
        line.split() for line in run(capsys, "--config", config, "--sharding", "zero3", *generated).splitlines()
    ]
    assert len(parts) == 7
    assert all(part in planned for part in parts)


def test_programs_are_planned_where_a_coder_writes_them(capsys):
    config = ["--config", str(ROOT / "r_diverse/configs/single_gpu.yaml"), "--gpus", "1"]
    texts = [run(capsys, *config, "--measure", name) for name in ("sam", "program_text", "question", "question_text")]
    assert ["reward: programs" in text for text in texts] == [True, True, False, False]


def test_what_is_scored_and_moved_is_of_the_settings():
    job = step_plan.va_opd_job(step_plan.paper_case("va_opd", 99_999, teacher_offload="true"), 8)
    assert job.response == job.limit == 4096  # no rollout is longer, whatever the mean that is asked for
    assert job.moved == 2 * 8e9  # bytes of its bfloat16 teacher
    assert step_plan.va_opd_job(step_plan.paper_case("va_opd"), 8).moved == 0
    for beta, names in (("0", ["policy: old logps"]), ("0.01", ["policy: old logps", "KL reference"])):
        case = step_plan.paper_case("r_diverse", **{"challenger.beta": beta})
        assert [scored.name for scored in step_plan.phase_job(case, "challenger", 4).passes] == names


def test_the_bottleneck_takes_most_of_both_ends_together():
    slow, fast = {"a": 5.0, "b": 4.0}, {"a": 1.0, "b": 3.0}
    assert step_plan.bottleneck(slow, fast) == "b, 44% to 75%"


def test_sizes_in_place_of_models(capsys):
    words = ["--method", "va_opd", "--student", "2e9", "--teacher", "32e9", "--sharding", "zero2"]
    local = run(capsys, *words)
    assert "59.60  teacher weights" in local
    assert "DOES NOT FIT" not in run(capsys, *words, "--gpu", "h200")
    offloaded, served = (run(capsys, *words, "--placement", placement) for placement in ("offloaded", "served"))
    assert "teacher weights" not in offloaded + served
    assert "teacher: to the GPU" in offloaded
    assert "1.45  teacher's output head" in offloaded and "59.60  whole teacher, while it scores" in offloaded
    fit = "of 40: DOES NOT FIT", "of 40: fits"
    assert [
        run(capsys, *words, "--placement", placement, "--gpu", "a100-40g").count(text)
        for placement, text in zip(("offloaded", "served"), fit, strict=True)
    ] == [1, 1]
    for mode in ([], ["--vllm_mode", "server"]):
        assert "rollout engine" not in run(capsys, *words, *mode, "--server_gpus", "8")
    assert "rollout engine" in local


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "x.yaml"], "is in no method's folder"),
        (["--config", "old/srpo.yaml"], "is in no method's folder"),
        (["--method", "srpo", "--model", "nowhere"], "set --student 8e9"),
        ([], "neither --config nor --method is set"),
        (["--method", "srpo", "--train", "2,a"], "--train takes one or two numbers above 0, slow,fast, got '2,a'"),
        (["--method", "srpo", "--train", "nan"], "--train takes one or two numbers above 0"),
        (["--method", "srpo", "--gpus", "0"], "--gpus must be a number from 1 on, got 0"),
        (["--method", "srpo", "--gpus", "-3"], "--gpus must be a number from 1 on, got -3"),
        (["--method", "va_opd", "--placement", "served", "--teacher_gpus", "0"], "--teacher_gpus must be"),
        (["--method", "srpo", "--server_gpus", "-1"], "--server_gpus must be a number from 0 on, got -1"),
        (["--method", "srpo", "--response", "0"], "--response must be a number from 1 on, got 0"),
        (["--method", "srpo", "--prompt", "nan"], "--prompt must be a number from 1 on, got nan"),
        (["--method", "srpo", "--student", "0"], "--student must be a number of parameters such as 2e9, got '0'"),
        (["--method", "srpo", "--train", "0"], "--train takes one or two numbers above 0"),
        (["--method", "srpo", "--student", "70e9"], "raise its share of memory"),
        (["--method", "srpo", "--max_step", "3"], "did you mean 'max_steps'"),
    ],
)
def test_mistakes_give_one_sentence(words, message, capsys):
    assert step_plan.main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("benchmarks.plan: ")
    assert message in lines[-1]


@pytest.mark.parametrize("flag", ["--check", "--table"])
def test_the_tables_of_the_documentation_are_the_commands(flag, capsys):
    assert run(capsys, flag).strip() in (ROOT / "docs/many_nodes.md").read_text()


def test_the_plan_of_a_gpu_without_vllm(capsys):
    """An 8B: `generate` holds keys and values of 16 rollouts of 2,048 + 1,024 tokens in float32."""
    words = ["--method", "srpo", "--student", "8e9", "--gpus", "1", "--use_vllm", "false"]
    words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"]
    text = run(capsys, *words, "--max_completion_length", "1024", "--max_prompt_length", "2048")
    assert "13.50  KV cache of generate, 16 rollouts of 3,072 tokens" in text
    assert "14.90  bfloat16 copies of autocast" in text
    assert "rollout engine" not in text


def test_the_fullest_of_three_times():
    held = {"student weights": 100, "optimizer": 10, "cached": 3}
    training = {"gradients": 20, "activations": 5, "bfloat16 copies": 7}
    assert step_plan.peak(held | training | {"rollout engine, asleep": 1}) == 145
    assert step_plan.peak(held | training | {"rollout engine, asleep": 90}) == 200
    assert step_plan.peak(held | training | {"rollout engine": 1}) == 146
    assert step_plan.peak(held | training | {"KV cache": 50}) == 167
    teacher = {"teacher's output head": 2, "whole teacher": 60}
    assert step_plan.peak(held | training | teacher | {"rollout engine, asleep": 1}) == 173


# --- Slurm scripts ---


def bash(script: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = ["bash", str(SLURM / script)]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("script", ["train.sbatch", "r_diverse.sbatch"])
def test_the_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", str(SLURM / script)], capture_output=True).returncode == 0


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """Commands of Slurm that run everything here: a node is a rank, and a server only says that it was started."""
    (tmp_path / "srun").write_text(
        "#!/bin/bash\ncount=1\nwhile [[ $1 == --* ]]; do\n  case $1 in --nodes) count=$2 ;; esac\n"
        "  case $1 in *=*) shift ;; *) shift 2 ;; esac\ndone\n"
        'if [[ $1 == env ]]; then echo "server: $*" >>"$(dirname "$0")/log"; exec sleep 100; fi\n'
        'for ((i = 0; i < count; i++)); do SLURM_NODEID=$i "$@" & done\nwait\n'
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\ntr "," "\\n" <<<"$3"\n')
    (tmp_path / "curl").write_text("#!/bin/bash\nsleep 0.5\n")
    for name in ("srun", "scontrol", "curl"):
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_GPUS_ON_NODE": "1"}


@pytest.mark.parametrize(
    ("script", "environment", "message"),
    [
        ("train.sbatch", {}, "COMMAND is not set: set it to"),
        ("train.sbatch", {"COMMAND": "va_opd.train"}, "start this script with sbatch"),
        ("train.sbatch", {"COMMAND": "x", "SLURM_JOB_NODELIST": "a", "SERVE": "m"}, "1 models for 1 nodes"),
        ("train.sbatch", {"COMMAND": "x", "SLURM_JOB_NODELIST": "a", "SHARDING": "zero9"}, "SHARDING=zero9 is no"),
        ("r_diverse.sbatch", {}, "CONFIG is not set"),
        ("r_diverse.sbatch", {"CONFIG": "x"}, "start this script with sbatch --array"),
        ("r_diverse.sbatch", {"CONFIG": "x", "SLURM_ARRAY_TASK_ID": "1"}, "VARIANTS only 1 names"),
    ],
)
def test_a_missing_variable_gives_one_sentence(script, environment, message, cluster):
    done = bash(script, **{**cluster, **environment})
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"{script}: ")
    assert message in line


@pytest.mark.distributed
def test_two_nodes_meet_beside_two_servers(cluster, tmp_path):
    """accelerate's own launcher on both ranks, which meet here; the servers are only named."""
    (tmp_path / "seen.py").write_text(
        "import os, sys, torch.distributed as d\nd.init_process_group('gloo')\n"
        "with open(f'{os.environ[\"PYTHONPATH\"]}/rank{d.get_rank()}', 'w') as file:\n"
        "    print(d.get_world_size(), os.environ['LOCAL_RANK'], *sys.argv[1:], file=file)\n"
    )
    from r_diverse.servers import free_port

    done = bash(
        "train.sbatch",
        **cluster,
        COMMAND="seen --seed 7 --solver_url http://SERVER_1:8000/v1\n --coder_url http://SERVER_2:8000/v1",
        SERVE="the/solver the/coder",
        SHARDING="multi_gpu",
        SLURM_JOB_NODELIST="127.0.0.1,node2,node3,node4",
        PYTHONPATH=str(tmp_path),
        PORT=str(free_port()),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    words = "2 0 --seed 7 --solver_url http://node3:8000/v1 --coder_url http://node4:8000/v1\n"
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [words, words]
    log = (tmp_path / "log").read_text()
    assert "serve the/solver" in log and "serve the/coder" in log and "VLLM_SERVER_DEV_MODE=1" in log
    assert log.count("--seed 7\n") == 2  # else servers would sample alike for all seeds of training


@pytest.mark.parametrize("path", ["docs/many_nodes.md", "scripts/slurm/train.sbatch"])
def test_the_commands_of_many_nodes_keep_the_batch_of_the_config(path):
    text = re.sub(r"\n#", "\n", (ROOT / path).read_text())
    found = re.findall(r"COMMAND='((?:va_opd|srpo)\.train [^']*)'((?:\\\n|[^\n])*?)--nodes (\d)", text)
    assert {(words.split()[0], "SERVE" in rest) for words, rest, _ in found} == {
        ("va_opd.train", False), ("srpo.train", False), ("srpo.train", True)
    }  # fmt: skip
    for words, rest, nodes in found:
        module, *fields = words.split()
        assert fields[0] == "--config"
        parse = importlib.import_module(module).parse
        batch, of_config = (
            config.per_device_train_batch_size * config.gradient_accumulation_steps
            for _, config in (parse([*words, "--dry_run"]) for words in (fields, fields[:2]))
        )
        assert batch * (int(nodes) - ("SERVE" in rest)) == of_config, words
        assert module == "va_opd.train" or "SHARDING=zero3" in rest, words  # else 8B does not fit


def test_the_server_has_the_flags_of_trl():
    """Those that TRL's own command imposes, which its trainers need."""
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    script = (SLURM / "train.sbatch").read_text()
    needed = build_command(ScriptArguments(model="m"))
    needed = needed[needed.index("--weight-transfer-config") :]
    words = " ".join(f"'{word}'" if word.startswith("{") else word for word in needed)
    assert words in script
    assert "--enable-scale-out" in script  # TRL adds it from vLLM 0.30 on
    assert "--generation-config vllm" in script and "--generation-config vllm" in (ROOT / "docs/vllm.md").read_text()


def test_a_self_play_run_is_the_loops_command(cluster, tmp_path):
    echo = tmp_path / "echo"
    echo.write_text('#!/bin/bash\necho "$*"\n')
    echo.chmod(0o755)
    words = {"CONFIG": "r_diverse/configs/qwen3_4b.yaml", "VARIANTS": "r_diverse r_zero", "ARGS": "--seed 1"}
    done = bash("r_diverse.sbatch", **{**cluster, **words, "SLURM_ARRAY_TASK_ID": "1", "PYTHON": str(echo)})
    expected = "-m r_diverse.loop --config r_diverse/configs/qwen3_4b.yaml --gpus 1 --variants r_zero --seed 1"
    assert done.stdout.strip() == expected
