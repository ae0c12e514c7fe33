"""All trainers: a checkpoint is read back whole in every family of models, or the run ends; vLLM gets all weights."""

import inspect
from types import SimpleNamespace

import pytest
import srpo_trainers
import torch
import va_opd_trainers
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer
from trl import DistillationTrainer
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from common.lora import lora_config, sync_merged_weights
from common.tiny import tiny_qwen3
from r_diverse import PhaseTrainer, SolverConfig
from srpo import SRPOConfig, SRPOTrainer
from va_opd import VAOPDTrainer
from va_opd._trl import send_names_of_files
from va_opd.baselines import ResumableGRPOTrainer, ResumableSFTTrainer
from va_opd.checkpoints import LoadsWeights

FAMILIES = sorted(va_opd_trainers.FAMILIES)
WITH_OTHER_NAMES = {"gemma3", "internvl", "llava", "qwen2_5_vl"}  # in their files than in the model
TOWERS = {"gemma3", "llava"}  # whose names vLLM does not know as the model has them


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def moved(trainer: Trainer, by: float = 1.0) -> None:
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(by)


def equal(trainer: Trainer, weights: dict[str, torch.Tensor]) -> list[bool]:
    return [torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters()]


def experts(method: str, folder) -> Trainer:
    """A trainer of a mixture of experts, whose files hold each expert alone."""
    torch.manual_seed(0)
    _, tokenizer = tiny_qwen3(hidden=32)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    cls, settings = {"srpo": (SRPOTrainer, SRPOConfig), "r_diverse": (PhaseTrainer, SolverConfig)}[method]
    args = settings(
        str(folder), max_steps=1, per_device_train_batch_size=4, num_generations=4, gradient_accumulation_steps=1,
        max_completion_length=4, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        router_aux_loss_coef=0.0, beta=0.0,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+{i}"}]} for i in range(4)])
    return cls(Qwen3MoeForCausalLM(config), no_reward, args, train_dataset=data, processing_class=tokenizer)


def no_reward(completions, **columns) -> list[float]:
    return [0.0] * len(completions)


def check(trainer: Trainer, folder: str) -> None:
    """Saves the weights of a trainer, and reads them back for a resumed run and as the best model."""
    weights = weights_of(trainer)
    trainer.save_model(folder)
    moved(trainer)
    trainer._load_from_checkpoint(folder)
    assert all(equal(trainer, weights))
    moved(trainer)
    trainer.state.best_model_checkpoint = folder
    trainer._load_best_model()
    assert all(equal(trainer, weights))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_students(tmp_path, family):
    check(va_opd_trainers.build(tmp_path / "run", family=family), str(tmp_path / "saved"))


@pytest.mark.parametrize("method", ["srpo", "r_diverse"])
def test_a_mixture_of_experts(tmp_path, method):
    check(experts(method, tmp_path / "run"), str(tmp_path / "saved"))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_alone_still_loses_weights(tmp_path, family):
    """When this fails, transformers has learnt it (its issue 43701): delete `checkpoints.py` of the methods."""
    trainer = va_opd_trainers.build(tmp_path / "run", family=family)
    weights = weights_of(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    moved(trainer)
    super(LoadsWeights, trainer)._load_from_checkpoint(str(tmp_path / "saved"))
    assert all(equal(trainer, weights)) == (family not in WITH_OTHER_NAMES)


def test_a_resumed_run_of_such_a_family_equals_the_straight_run(tmp_path):
    settings = {"family": "qwen2_5_vl", "save_strategy": "steps", "save_steps": 2}
    straight = va_opd_trainers.build(tmp_path / "straight", max_steps=4, **settings)
    straight.train()
    resumed = va_opd_trainers.build(tmp_path / "resumed", max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert all(equal(resumed, weights_of(straight)))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    trainer = va_opd_trainers.build(tmp_path / "run")
    trainer.save_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.language_model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of the model \(model.language_model.norm.weight\)"):
        trainer._load_from_checkpoint(str(tmp_path))


def with_engine(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Gives a trainer a stand-in for vLLM, which answers with one token; returns the weights that it has."""
    weights: dict[str, torch.Tensor] = {}

    def generate(prompts, **options):
        return prompts, [[20, trainer.eos_token_ids[0]]] * len(prompts), None, None

    trainer.use_vllm, trainer._last_loaded_step = True, -1
    sync = lambda: weights.update(weights_of(trainer))  # noqa: E731
    trainer.vllm_generation = SimpleNamespace(sync_weights=sync, generate=generate)
    return weights


def test_an_engine_gets_the_best_model_and_what_an_earlier_training_left(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    settings |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = va_opd_trainers.build(tmp_path, eval_rows=va_opd_trainers.image_rows(8), **settings)
    sent = with_engine(trainer)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")  # the loss falls
    trainer.evaluate()
    assert all(equal(trainer, sent))
    again = va_opd_trainers.build(tmp_path / "again", max_steps=1, lr_scheduler_type="constant", warmup_steps=0)
    sent = with_engine(again)
    again.train()
    before = weights_of(again)
    again.train()
    assert all(torch.equal(weight, before[name]) for name, weight in sent.items())
    assert not all(equal(again, sent))


@pytest.mark.parametrize("active", ["default", "other"])
def test_all_adapters_are_read_back(tmp_path, active):
    lora = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    trainer = va_opd_trainers.build(tmp_path / "run", peft_config=lora)
    trainer.model.add_adapter("other", lora)
    trainer.model.set_adapter(active)
    trained = [p.requires_grad for p in trainer.model.parameters()]
    weights = weights_of(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.state.best_model_checkpoint = str(tmp_path / "saved")
    for load in (lambda: trainer._load_from_checkpoint(str(tmp_path / "saved")), trainer._load_best_model):
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                p.add_("lora_" in name)
        training = trainer.model.training
        load()
        assert all(equal(trainer, weights))
        assert [p.requires_grad for p in trainer.model.parameters()] == trained
        assert trainer.model.training == training
    (tmp_path / "saved" / "other" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no adapter_model.safetensors of the adapter 'other'"):
        trainer._load_from_checkpoint(str(tmp_path / "saved"))


def test_a_resumed_run_of_an_adapter_with_a_reference_equals_the_straight_run(tmp_path):
    """TRL keeps the start of a given adapter as a second one, named "ref", if beta is above 0."""

    def run(folder, **options):
        model, tokenizer = srpo_trainers.policy()
        torch.manual_seed(3)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        settings = {"routing": "grpo", "beta": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        trainer = srpo_trainers.build(folder, model=(adapted, tokenizer), reward=by_length, **settings)
        trainer.train(**options)
        return trainer

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert all(equal(resumed, weights_of(straight)))


def by_length(completions, **columns) -> list[float]:
    return [float(len(c[0]["content"]) % 2) for c in completions]


def test_what_a_checkpoint_does_not_hold_is_said_when_a_run_is_resumed(tmp_path):
    """Else the optimizer or the KL reference would begin anew, silently."""
    lacking = {"save_only_model": "holds no optimizer.pt, as with save_only_model=True", "sync_ref_model": "has moved"}
    model, tokenizer = srpo_trainers.policy()
    for field, message in lacking.items():
        folder, start = tmp_path / field, str(tmp_path / "start")
        model.save_pretrained(start)
        settings = {"routing": "grpo", "save_strategy": "steps", "save_steps": 1, "max_steps": 1, field: True}
        settings |= {"beta": 0.5} if field == "sync_ref_model" else {}
        parts = type(model).from_pretrained(start, dtype=torch.float32), tokenizer
        trainer = srpo_trainers.build(folder, model=parts, reward=by_length, **settings)
        trainer.train()
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    trainer.is_deepspeed_enabled = True  # then no weights pass through `_load_from_checkpoint`
    with pytest.raises(ValueError, match="has moved"):
        trainer._load_optimizer_and_scheduler(str(folder / "checkpoint-1"))


@pytest.mark.parametrize("name", ["scheduler.pt", "optimizer.pt", "rng_state.pth"])
def test_a_state_that_a_checkpoint_lacks_is_not_begun_anew(tmp_path, name):
    """Without the scheduler's transformers left out the optimizer's, too, and said nothing."""
    settings = {"routing": "grpo", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = srpo_trainers.build(tmp_path / "run", reward=by_length, **settings)
    trainer.train()
    checkpoint = tmp_path / "run/checkpoint-1"
    trainer.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / name).unlink()
    pattern = name.replace("rng_state", r"rng_state\*")
    with pytest.raises(ValueError, match=f"checkpoint-1 holds no {pattern}, .*: put it back, resume from another"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_dtypes_stay(tmp_path):
    trainer = va_opd_trainers.build(tmp_path / "run")
    trainer.model.bfloat16().lm_head.float()
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters()}
    check(trainer, str(tmp_path / "saved"))
    assert {name: p.dtype for name, p in trainer.model.named_parameters()} == dtypes
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_sync_with_vllm_sends_the_names_of_the_files(tmp_path, family, rank):
    model, _ = va_opd_trainers.FAMILIES[family]()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: weight + 1 for name, weight in load_file(file).items()}
    if family in TOWERS:  # on the hub
        weights = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    model, loaded = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"]
    generation = object.__new__(VLLMGeneration)
    generation.model = get_peft_model(model, lora_config(rank)) if rank else model
    generation.accelerator = Accelerator()
    generation._dist = DistributedBackend(generation.accelerator)
    if rank:
        sync_merged_weights(generation)
        for name, weight in generation.model.named_parameters():
            weight.data += 1.0 * ("lora_B" in name)
    send_names_of_files(SimpleNamespace(use_vllm=True, model=generation.model, vllm_generation=generation))
    sent = {name: weight.clone() for name, weight in generation._iter_named_params()}
    assert sent.keys() == weights.keys()
    trained = generation.model.merge_and_unload() if rank else model
    trained.save_pretrained(tmp_path / "trained")
    weights = load_file(tmp_path / "trained" / "model.safetensors")
    for name, weight in sent.items():
        torch.testing.assert_close(weight, weights[name])


@pytest.mark.parametrize(
    "trainer", [VAOPDTrainer, ResumableGRPOTrainer, ResumableSFTTrainer, SRPOTrainer, PhaseTrainer]
)
def test_whose_methods_are_called(trainer):
    for name in ("_load_from_checkpoint", "_load_best_model"):
        assert inspect.getsource(getattr(trainer, name)) == inspect.getsource(getattr(LoadsWeights, name))
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (LoadsWeights, DistillationTrainer))
        assert list(ours.parameters) == list(theirs.parameters)
    for cls in (LoadsWeights, Trainer):
        assert list(inspect.signature(cls._load_optimizer_and_scheduler).parameters) == ["self", "checkpoint"]
