"""`--lora_rank` of the three train commands: what trains, what is saved, resuming, loading, refusals."""

import copy
import importlib
import math
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl.distributed import DistributedBackend
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from common import lora, models, tiny
from common.runs import read_jsonl
from srpo._trl import reshard_before_syncs

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
IDS = torch.tensor([[20, 30, 40, 50]])
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
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=IDS).logits
        got, base = (models.load_model(str(name))(input_ids=IDS).logits for name in (checkpoint, fields["model"]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, base, atol=1e-2)
    assert type(models.load_processor(str(checkpoint))) is type(models.load_processor(fields["model"]))


@pytest.mark.qlora
@pytest.mark.parametrize(
    "flags", [[], ["--bf16", "true", "--gradient_checkpointing", "true"]], ids=["plain", "as on GPUs"]
)
def test_on_weights_in_4_bits_the_same(prepared, flags):
    """The adapter is saved, resumes and loads, onto the plain weights; the head, which the loss reads, stays plain."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    train, build, fields = prepared
    trainer, resumed = (build("--load_in_4bit", "true", *flags) for _ in range(2))
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in trained.items())
    base = trainer.model.get_base_model()
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in base.modules()) >= 14
    head = train_module(train, "lm_head").lm_head(base)
    assert head.weight.dtype == torch.float32
    assert head.weight.shape == (base.config.get_text_config().vocab_size, base.config.get_text_config().hidden_size)
    trainer.train()
    with torch.no_grad():
        hidden = base.eval().base_model(input_ids=IDS).last_hidden_state
        expected = trainer.model.eval()(input_ids=IDS).logits  # with bf16 in autocast, which `base` alone is not
        torch.testing.assert_close(hidden @ head.weight.T, expected, rtol=0, atol=1e-2 if flags else 1e-5)

    checkpoint = Path(trainer.args.output_dir) / "checkpoint-4"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    resumed.train(resume_from_checkpoint=str(checkpoint.with_name("checkpoint-2")))
    assert losses(resumed) == losses(trainer)
    assert len(set(losses(trainer))) > 1

    merged, plain = (dict(models.load_model(str(name)).named_parameters()) for name in (checkpoint, fields["model"]))
    assert_merged(merged, plain, adapter)


@pytest.mark.gpu
@pytest.mark.qlora
def test_on_weights_in_4_bits_of_a_gpu(prepared):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    _, build, _ = prepared
    flags = ("--load_in_4bit", "--bf16", "--gradient_checkpointing")
    trainer = build(*(word for flag in flags for word in (flag, "true")), "--use_cpu", "false")
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    quantized = [module for module in trainer.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert quantized and all(module.weight.is_cuda for module in quantized)
    assert len(set(losses(trainer))) > 1 and all(map(math.isfinite, losses(trainer)))
    changed = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all("lora_" in name for name in changed)


def train_module(train, name: str):
    return importlib.import_module(f"{train.__package__}.{name}")


def assert_merged(merged: dict, plain: dict, adapter: dict) -> None:
    """`merged` is the plain weights and twice B A of the adapter, alpha being twice the rank."""
    factors = {name.removesuffix("lora_A.weight").removeprefix("base_model.model."): name for name in adapter}
    changed = 0
    for layer, name in factors.items():
        if name.endswith("lora_A.weight"):
            a, b = adapter[name].float(), adapter[name.replace("lora_A", "lora_B")].float()
            torch.testing.assert_close(merged[f"{layer}weight"], plain[f"{layer}weight"] + 2 * b @ a)
            changed += bool((b @ a).abs().max() > 1e-3)
    assert changed


@pytest.mark.qlora
@pytest.mark.parametrize("prepared", ["srpo"], indirect=True)
def test_the_self_teacher_of_weights_in_4_bits_has_the_average_adapter(prepared):
    pytest.importorskip("bitsandbytes")
    trainer = prepared[1]("--load_in_4bit", "true")
    own = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    policies, scored = [copies(own)], []
    update, forward = trainer.teacher.update, trainer.teacher._forward
    trainer.teacher.update = lambda policy: (policies.append(copies(own)), update(policy))[1]
    trainer.teacher._forward = lambda *inputs: (scored.append((len(policies) - 1, copies(own))), forward(*inputs))[1]
    trainer.train()
    averages = policies[:1]
    for policy in policies[1:]:
        averages.append({name: 0.95 * averages[-1][name] + 0.05 * policy[name] for name in policy})
    assert {step for step, _ in scored} >= {1, 2, 3}
    for step, adapter in scored:
        torch.testing.assert_close(adapter, averages[step])
    torch.testing.assert_close(copies(own), policies[-1])
    assert all((policies[-1][name] - averages[-1][name]).abs().max() > 1e-3 for name in own)


@pytest.mark.qlora
@pytest.mark.parametrize("teacher", ["frozen", "current"])
@pytest.mark.parametrize("prepared", ["srpo"], indirect=True)
def test_the_other_self_teachers_of_weights_in_4_bits(prepared, teacher):
    pytest.importorskip("bitsandbytes")
    trainer = prepared[1]("--load_in_4bit", "true", "--teacher", teacher)
    start = trainer.model.eval()(input_ids=IDS).logits
    trainer.train()
    now = trainer.model.eval()(input_ids=IDS).logits
    with trainer.teacher.view(trainer.model) as model:
        torch.testing.assert_close(model(input_ids=IDS).logits, start if teacher == "frozen" else now)
    assert (now - start).abs().max() > 1e-2


def copies(weights: dict) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.mark.qlora
def test_gradients_flow_through_weights_in_4_bits_after_generation(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = models.load_model(save(*tiny.tiny_qwen3(hidden=64), tmp_path / "model"), load_in_4bit=True)
    model = get_peft_model(model, lora.lora_config(4))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if "lora_B" in name}

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    torch.testing.assert_close(gradients(), before)
    assert all(gradient.abs().max() > 0 for gradient in before.values())


def test_wrong_settings_of_lora_are_one_sentence(prepared, monkeypatch):
    train, build, _ = prepared
    with pytest.raises(ValueError, match="^load_in_4bit trains an adapter on frozen weights: set lora_rank too"):
        build("--lora_rank", "0", "--load_in_4bit", "true")
    with pytest.raises(ValueError, match="^lora_rank must be at least 0, got -1$"):
        build("--lora_rank", "-1")
    with monkeypatch.context() as patch:
        patch.setattr(lora.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="^load_in_4bit needs the package bitsandbytes: pip install"):
            build("--load_in_4bit", "true")
    monkeypatch.setattr(train, "lora_config", lambda rank: LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="lm_head"):
        build()


def test_wrong_settings_of_lora_end_a_self_play_run_before_it_starts():
    from r_diverse.train import parse

    words = ["--model", "x", "--load_in_4bit", "true", "--solver.bf16", "false", "--challenger.bf16", "false"]
    with pytest.raises(ValueError, match="^load_in_4bit trains an adapter on frozen weights"):
        parse(words)
    assert parse([*words, "--lora_rank", "4"]).run.load_in_4bit


@pytest.mark.parametrize("load_in_4bit", [False, pytest.param(True, marks=pytest.mark.qlora)])
@pytest.mark.parametrize("make", [tiny.tiny_qwen3, tiny.tiny_qwen3_vl])
def test_a_weight_sync_sends_the_trained_model_and_leaves_its_weights(make, load_in_4bit, tmp_path):
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    source = save(*make(hidden=64), tmp_path / "model")
    model = models.load_model(source, torch.bfloat16, load_in_4bit=load_in_4bit)
    model = get_peft_model(model, lora.lora_config(4)).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    before = copies(dict(model.named_parameters()))
    generation = weight_sync(model)
    lora.sync_merged_weights(generation)
    for _ in range(2):
        sent = dict(generation._iter_named_params())
        assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert model.merge_adapter.__func__ is type(model.base_model).merge_adapter

    engine = models.load_model(source)
    with torch.no_grad():
        base = engine(input_ids=IDS).logits
        assert sent.keys() == dict(engine.named_parameters()).keys()
        engine.load_state_dict(sent, strict=False)
        got, expected = engine(input_ids=IDS).logits, model(input_ids=IDS).logits.float()
    assert (got - expected).norm() < 0.02 * (got - base).norm()


def test_a_sync_after_an_evaluation_merges_adapters_into_shards():
    """Under FSDP2, of a trainer built without `with_adapters`. A forward leaves whole what is in no block of its own,
    such as a vision tower: merged there, the adapter was not sent, and taking it out changed the frozen weights."""
    model = get_peft_model(tiny.tiny_qwen3(hidden=32)[0], LoraConfig(init_lora_weights=False))
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model.base_model.model.model.layers[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        generation, sent = weight_sync(model), {}
        generation._dist = SimpleNamespace(is_fsdp=True, fsdp_version=2, gather_params=lambda _: nullcontext())
        generation.sync_weights = lambda: sent.update({n: w.clone() for n, w in generation._iter_named_params()})
        reshard_before_syncs(SimpleNamespace(use_vllm=True, vllm_generation=generation))
        with torch.no_grad():
            model(input_ids=IDS)
        assert not all(isinstance(weight, DTensor) for weight in model.parameters())
        generation.sync_weights()
        after = {name: weight.full_tensor() for name, weight in model.named_parameters()}
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(sent, {name: merged[name] for name in sent})
    torch.testing.assert_close(after, before)


def test_an_adapter_in_host_memory_is_added_on_the_device_of_the_weight():
    """As with `fsdp_offload_params`, where TRL brings the frozen weight alone to the device."""
    generation = weight_sync(get_peft_model(tiny.tiny_qwen3(hidden=32)[0], lora.lora_config(4)))
    iterate = generation._iter_named_params
    generation._iter_named_params = lambda: ((name, weight.to("meta")) for name, weight in iterate())
    lora.sync_merged_weights(generation)
    assert {weight.device.type for _, weight in generation._iter_named_params()} == {"meta"}


def test_trained_weights_of_a_bfloat16_model_are_made_float32_and_no_others():
    model = get_peft_model(tiny.tiny_qwen3(hidden=32)[0], lora.lora_config(4)).bfloat16()
    lora.float32_adapters(model)
    for name, weight in model.named_parameters():
        assert weight.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


def test_a_trainer_with_adapters_sends_merged_weights():
    model = get_peft_model(tiny.tiny_qwen3(hidden=32)[0], lora.lora_config(4))
    for rank in (0, 4):
        generation = weight_sync(model)
        found = lora.with_adapters(lambda: SimpleNamespace(vllm_generation=generation), rank, False)  # noqa: B023
        assert ("_iter_named_params" in vars(found.vllm_generation)) == bool(rank)


def test_trl_is_told_of_no_bitsandbytes_only_while_a_trainer_is_built(monkeypatch):
    monkeypatch.setattr(vllm_generation, "is_bitsandbytes_available", lambda: True)
    seen = []

    def build():
        seen.append(vllm_generation.is_bitsandbytes_available())
        raise ValueError("no such field")

    for load_in_4bit in (True, False):
        with pytest.raises(ValueError, match="no such field"):
            lora.with_adapters(build, 4, load_in_4bit)
        assert vllm_generation.is_bitsandbytes_available()
    assert seen == [False, True]


@pytest.mark.qlora
def test_a_colocated_engine_of_weights_in_4_bits_is_in_full(monkeypatch, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    asked = []
    monkeypatch.setattr(vllm_generation, "LLM", lambda **options: asked.append(options["quantization"]), raising=False)
    model = models.load_model(save(*tiny.tiny_qwen3(hidden=64), tmp_path / "model"), load_in_4bit=True)
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
    build = partial(VLLMGeneration, model, Accelerator(cpu=True), None)
    lora.with_adapters(lambda: SimpleNamespace(model=model, engine=build()), 0, True)
    build()  # as TRL has it
    assert asked == [None, "bitsandbytes"]


def weight_sync(model):
    """TRL's walk over the weights at a sync, without an engine."""
    generation = object.__new__(VLLMGeneration)
    accelerator = Accelerator()
    generation.model, generation.accelerator, generation._dist = model, accelerator, DistributedBackend(accelerator)
    return generation


def test_why_a_weight_sync_must_not_merge(tmp_path):
    """Without that drift `lora.sync_merged_weights` could go."""
    model = get_peft_model(tiny.tiny_qwen3(hidden=64)[0].bfloat16(), lora.lora_config(4))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    before = layer.weight.detach().clone()
    generation = weight_sync(model)
    for _ in range(20):
        layer.lora_B["default"].weight.data += 1e-3 * torch.randn_like(layer.lora_B["default"].weight)
        list(generation._iter_named_params())
    adapter = layer.get_delta_weight("default")
    assert (layer.weight - before).norm() > 0.02 * adapter.norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_head_is_one_sentence(method):
    model = tiny.tiny_qwen3(hidden=32)[0]
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="^lm_head is quantized, but the loss reads its weight"):
        importlib.import_module(f"{method}.lm_head").lm_head(model)


@pytest.mark.parametrize("load_in_4bit", [False, pytest.param(True, marks=pytest.mark.qlora)])
def test_a_phase_of_r_diverse_leaves_whole_weights(tmp_path, load_in_4bit):
    """And goes on after a kill; the next phase starts from the plain weights with the adapter merged in."""
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    from datasets import Dataset

    from r_diverse import ChallengerConfig, RDiverseConfig
    from r_diverse.train import train_phase

    model = save(*tiny.tiny_qwen3(hidden=32), tmp_path / "model")
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Q{i}"}]} for i in range(8)])

    def reward(completions, **columns) -> list[float]:
        return [float(len(c[0]["content"]) % 2) for c in completions]

    def phase(folder: Path) -> None:
        config = ChallengerConfig(str(folder), **{**QUIET, "max_steps": 8, "save_steps": 4, "save_total_limit": 2})
        train_phase(config, model, reward, rows, RDiverseConfig(model, lora_rank=4, load_in_4bit=load_in_4bit))

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
    assert_merged(whole, base, load_file(tmp_path / "straight/adapter/adapter_model.safetensors"))
    assert torch.equal(whole["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    resumed = load_file(tmp_path / "resumed/model/model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
