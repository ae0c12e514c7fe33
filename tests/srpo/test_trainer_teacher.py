"""`SRPOTrainer`: the self-teacher: its average, frozen and current ones, with LoRA, its copy under ZeRO-3."""

import copy
import dataclasses
import math
import os
import sys
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace

import peft
import pytest
import torch
from srpo_trainers import LORA, ROUTED, policy, step
from transformers import TrainerCallback
from trl import GRPOTrainer

from srpo import teacher
from srpo.adapters import check_mergeable, loses_its_start, merged_weights
from srpo.teacher import SelfTeacher

# --- scoring and averaging ----------------------------------------------------------------


@pytest.mark.parametrize("routing", ROUTED)
def test_the_teacher_scores_the_needed_tokens_and_no_others(make, fixed, routing):
    trainer = make(routing=routing, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    backbone = []
    trainer.teacher.model.model.register_forward_hook(lambda m, a, out: backbone.append(len(out.last_hidden_state)))
    step(trainer)
    distilled = int(trainer.last_rollouts["distill"].sum())
    assert distilled > 0
    assert backbone == [2] * (distilled // 2) + [1] * (distilled % 2)  # rows of each forward, as many as the policy's
    assert trainer._metrics["train"]["teacher/scored_over_needed"] == [1.0]


def test_the_average_follows_the_policy_by_hand(make, fixed):
    """theta'_2 = 0.95 (0.95 theta_0 + 0.05 theta_1) + 0.05 theta_2, in float32 also for a bfloat16 policy."""
    history = []
    trainer = make(max_steps=2)

    start = copy.deepcopy(dict(trainer.model.named_parameters()))
    update = trainer.teacher.update
    trainer.teacher.update = lambda model: (
        history.append({n: p.detach().clone() for n, p in model.named_parameters()}),
        update(model),
    )[1]
    trainer.train()
    assert len(history) == 2
    for name, parameter in trainer.teacher.model.named_parameters():
        expected = 0.95 * (0.95 * start[name] + 0.05 * history[0][name]) + 0.05 * history[1][name]
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7)
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
    assert not torch.equal(history[1]["model.norm.weight"], start["model.norm.weight"])


def test_the_average_follows_layers_that_are_trained_in_turn(make):
    """As a callback does it that freezes a layer again."""
    model, _ = policy()
    average = SelfTeacher(model, make().accelerator, rate=0.5)
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    average.update(model)
    model.model.norm.requires_grad_(False)
    average.update(model)
    torch.testing.assert_close(average.average["model.norm.weight"], model.model.norm.weight - 0.25)


def test_the_distance_is_relative_to_the_policy(make):
    model, _ = policy()
    average = SelfTeacher(model, make().accelerator, rate=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert average.update(model) == pytest.approx(0.5)  # of theta and 2 theta
    assert average.update(model) == pytest.approx(0.25)  # of 1.5 theta and 2 theta


def test_the_distance_of_a_lora_run_is_of_the_adapted_weights(make):
    adapted = peft.get_peft_model(policy()[0], peft.LoraConfig(**LORA))
    average = SelfTeacher(adapted, make().accelerator, rate=0.5)
    start = {name: weight.clone() for name, weight in average.average.items()}
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    merged = dict(copy.deepcopy(adapted).merge_and_unload().named_parameters())
    changed = [name for name, weight in merged.items() if not torch.equal(weight, start[name])]
    assert 0 < len(changed) < len(merged)
    gap = sum((merged[name] - start[name]).square().sum() for name in changed)
    size = sum(merged[name].square().sum() for name in changed)
    assert average.update(adapted) == pytest.approx(float((gap / size).sqrt()))


def weights_after_each_step(trainer) -> list[dict[str, torch.Tensor]]:
    """The policy's weights at the start, and (filled by training) after each optimizer step."""
    history = [copy.deepcopy(trainer.model.state_dict())]

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            history.append(copy.deepcopy(trainer.model.state_dict()))

    trainer.add_callback(Record())
    return history


def assert_teacher_is(trainer, history: list[dict[str, torch.Tensor]]) -> None:
    """theta' <- 0.8 theta' + 0.2 theta over the weights after the first ones."""
    for name, got in trainer.teacher.model.state_dict().items():
        expected = history[0][name]
        for weights in history[1:]:
            expected = 0.8 * expected + 0.2 * weights[name]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(history[1]["model.norm.weight"], history[0]["model.norm.weight"])


def test_the_average_moves_once_an_optimizer_step(make, fixed):
    """Not at each of its four micro-batches."""
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make(teacher_update_rate=0.2, max_steps=2, **batch)
    history = weights_after_each_step(trainer)
    trainer.train()
    assert len(history) == 3
    assert_teacher_is(trainer, history)


def test_the_average_stays_where_the_optimizer_step_was_skipped(make, fixed, monkeypatch):
    """As the gradient scaler of float16 skips one whose gradients are not finite: the second of three."""
    trainer = make(teacher_update_rate=0.2, max_steps=3)
    history, skips = weights_after_each_step(trainer), iter([False, True, False])
    update = torch.optim.AdamW.step

    def optimizer_step(optimizer, *args, **kwargs):
        optimizer.was_skipped = next(skips)
        return None if optimizer.was_skipped else update(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", optimizer_step)
    monkeypatch.setattr(
        type(trainer.accelerator),
        "optimizer_step_was_skipped",
        property(lambda accelerator: trainer.optimizer.optimizer.was_skipped),
    )
    trainer.train()
    assert torch.equal(history[2]["model.norm.weight"], history[1]["model.norm.weight"])
    assert_teacher_is(trainer, [history[0], history[1], history[3]])
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert ["teacher/distance" in log for log in logged] == [True, False, True]


@pytest.mark.parametrize("kind", ["ema", "frozen", "current"])
def test_the_self_teacher_has_no_dropout(make, fixed, kind):
    """The policy has, while it trains."""
    entropy = []
    for dropout in (0.0, 0.9):
        model, tokenizer = policy()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout
        trainer = make(model=(model, tokenizer), teacher=kind)
        loss, _ = step(trainer)
        assert trainer.model.training
        entropy.append((trainer._metrics["train"]["teacher/entropy"], loss))
    assert entropy[0][0] == entropy[1][0]
    assert entropy[0][1] != entropy[1][1]


def test_a_bfloat16_policy_has_a_float32_teacher(make, fixed):
    model, tokenizer = policy()
    trainer = make(model=(model.bfloat16(), tokenizer), learning_rate=1e-5, max_steps=3)
    trainer.train()
    assert {p.dtype for p in trainer.teacher.model.parameters()} == {torch.float32}
    frozen = make(model=(model, tokenizer), teacher="frozen").teacher.model  # which has nothing to lose by it
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float32_average_computes_in_bfloat16_also_where_accelerate_casts_nothing(dtype):
    """As under DeepSpeed, which casts the weights that it has, among them a copy in the policy's dtype."""
    accelerator = SimpleNamespace(mixed_precision="bf16", device=torch.device("cpu"), autocast=nullcontext)
    with teacher.autocast(accelerator, dtype):
        assert torch.is_autocast_enabled("cpu") == (dtype == torch.float32)


@pytest.mark.parametrize("kind", ["frozen", "current"])
def test_other_teachers(make, fixed, kind):
    trainer = make(teacher=kind, max_steps=3)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    if kind == "current":
        assert trainer.teacher.model is None
    else:
        assert all(torch.equal(t, start[n]) for n, t in trainer.teacher.model.state_dict().items())
    assert trainer.model.training


def test_a_policy_that_is_its_own_teacher_has_its_mode_back_also_after_an_error(make):
    trainer = make(teacher="current")
    for mode in (True, False):
        trainer.model.train(mode)
        with suppress(KeyError), trainer.teacher.view(trainer.model) as policy:
            assert not policy.training
            raise KeyError
        assert trainer.model.training is mode


def test_the_states_of_a_step_are_gone_when_the_next_rollouts_are_sampled(make, fixed, monkeypatch):
    """Beside the engine and the new states they would take their room again."""
    held, generate = [], GRPOTrainer._generate

    def record(self, prompts):
        held.append(len(self._teacher_hidden))
        return generate(self, prompts)

    monkeypatch.setattr(GRPOTrainer, "_generate", record)
    trainer = make(max_steps=2)
    trainer.train()
    assert held == [0, 0]
    assert trainer._teacher_hidden


# --- LoRA ----------------------------------------------------------------


def test_with_lora_the_average_is_of_the_product(make, fixed):
    """The teacher's weight is the average of W + scale B A, not W + scale (average of B) (average of A). What is
    trained whole beside it, is averaged too."""
    trainer = make(peft_config=peft.LoraConfig(**LORA, modules_to_save=["norm"]), max_steps=2)
    model = trainer.model.get_base_model().model
    layer, norm = model.layers[0].self_attn.q_proj, model.norm.modules_to_save["default"].weight

    def weights():
        merged = layer.get_base_layer().weight + layer.get_delta_weight("default")
        return merged.detach().clone(), norm.detach().clone()

    seen, update = [weights()], trainer.teacher.update
    trainer.teacher.update = lambda model: (seen.append(weights()), update(model))[1]
    trainer.train()
    teacher = trainer.teacher.model.model
    for got, *of_steps in zip((teacher.layers[0].self_attn.q_proj.weight, teacher.norm.weight), *seen, strict=True):
        expected = 0.95 * (0.95 * of_steps[0] + 0.05 * of_steps[1]) + 0.05 * of_steps[2]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(of_steps[2], of_steps[0], atol=1e-4)


def policy_with_biases():
    model, tokenizer = policy()
    config = copy.deepcopy(model.config)
    config.attention_bias = True
    model = type(model)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model, tokenizer


def test_with_lora_biases_are_averaged_as_they_are(make, fixed):
    """Qwen2.5's attention has biases: B A is of the weight beside them."""
    trainer = make(model=policy_with_biases(), peft_config=peft.LoraConfig(**LORA), max_steps=1)
    trainer.train()
    models = trainer.model.get_base_model().model, trainer.teacher.model.model
    layer, of_teacher = (model.layers[0].self_attn.q_proj for model in models)
    torch.testing.assert_close(of_teacher.bias, layer.get_base_layer().bias)
    assert of_teacher.bias.any() and not torch.equal(of_teacher.weight, layer.get_base_layer().weight)


@pytest.mark.parametrize(
    "fields", [{"bias": "all"}, {"modules_to_save": ["mlp"]}], ids=["other layers' biases", "a module with layers"]
)
def test_what_is_trained_whole_is_averaged_wherever_it_is(make, fixed, fields):
    """At rate 1 the average is the policy."""
    adapter = peft.LoraConfig(**{**LORA, "target_modules": ["q_proj"], **fields})
    trainer = make(model=policy_with_biases(), peft_config=adapter, teacher_update_rate=1.0)
    before = logits_of(trainer.model)
    trainer.train()
    assert not torch.allclose(logits_of(trainer.model), before, atol=1e-2)
    assert_teacher_gives(logits_of(trainer.model), trainer)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([[20, 30, 40]])).logits


def assert_teacher_gives(expected: torch.Tensor, trainer) -> None:
    with trainer.teacher.view(trainer.model) as teacher:
        torch.testing.assert_close(logits_of(teacher), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens"]}, {"r": 2}])
def test_the_frozen_teacher_of_a_lora_run_is_the_base_model_without_a_copy(make, fixed, fields):
    trainer = make(peft_config=peft.LoraConfig(**{**LORA, "init_lora_weights": True, **fields}), teacher="frozen")
    assert trainer.teacher.model is None
    assert_teacher_gives(logits_of(policy()[0]), trainer)
    assert math.isfinite(step(trainer)[0])


@pytest.mark.parametrize(
    "fields",
    [{}, {"target_modules": ["embed_tokens"]}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
)
def test_the_frozen_teacher_of_an_adapter_that_does_not_begin_at_zero_is_a_merged_copy(make, fixed, fields):
    """The first two stand for ones that were trained before; the others take out of the model what they hold."""
    trainer = make(peft_config=peft.LoraConfig(**{**LORA, **fields}), teacher="frozen")
    start = logits_of(trainer.model)
    trainer.train()
    assert_teacher_gives(start, trainer)
    with trainer.model.disable_adapter():
        assert not torch.allclose(logits_of(trainer.model), start, atol=1e-2)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_frozen_teacher_keeps_biases_that_are_trained(make, fixed, bias):
    """They stay in the policy without its adapter."""
    adapter = peft.LoraConfig(**{**LORA, "init_lora_weights": True, "bias": bias})
    trainer = make(model=policy_with_biases(), peft_config=adapter, teacher="frozen")
    start = logits_of(trainer.model)
    trainer.train()
    assert_teacher_gives(start, trainer)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_only_biases_that_a_model_has_need_a_copy(make, bias):
    """Qwen3 has none, so that its frozen teacher runs sharded too."""
    adapter, sharded = {**LORA, "init_lora_weights": True, "bias": bias}, SimpleNamespace(is_fsdp2=True)
    models = policy()[0], policy_with_biases()[0]
    without, having = (peft.get_peft_model(model, peft.LoraConfig(**adapter)) for model in models)
    assert SelfTeacher(without, sharded, "frozen").model is None
    elsewhere = {"target_modules": ["up_proj"], "bias": "lora_only"}  # which has none
    for model, fields in ((policy_with_biases()[0], elsewhere), (policy()[0], {"lora_bias": True})):
        adapted = peft.get_peft_model(model, peft.LoraConfig(**{**adapter, **fields}))
        assert SelfTeacher(adapted, sharded, "frozen").model is None
    having.add_adapter("other", peft.LoraConfig(**LORA))  # without: those of one are enough
    with pytest.raises(ValueError, match=r"it trains biases.*sharded weights cannot be made"):
        SelfTeacher(having, sharded, "frozen")


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]])
def test_an_average_of_rate_1_is_the_policy_also_where_embedding_and_head_are_tied(make, fixed, targets):
    """An adapter on the embedding does not change the head, though both have one weight."""
    adapter = peft.LoraConfig(**{**LORA, "target_modules": targets})
    trainer = make(peft_config=adapter, teacher_update_rate=1.0, max_steps=1)
    assert trainer.model.config.tie_word_embeddings
    before = logits_of(trainer.model)
    trainer.train()
    assert not torch.allclose(logits_of(trainer.model), before, atol=1e-2)
    assert_teacher_gives(logits_of(trainer.model), trainer)


def test_the_average_is_of_all_adapters_in_use(make):
    adapted = peft.get_peft_model(policy()[0], peft.LoraConfig(**LORA), "one")
    adapted.add_adapter("two", peft.LoraConfig(**LORA))
    adapted.base_model.set_adapter(["one", "two"])
    average = SelfTeacher(adapted, make().accelerator, rate=1.0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    average.update(adapted)
    with average.view(adapted) as teacher:
        torch.testing.assert_close(logits_of(teacher), logits_of(adapted), rtol=1e-4, atol=1e-4)


def test_merged_weights_of_bfloat16_are_not_rounded_to_it():
    """An adapter's change is small beside its weight: rounded, the average would not see it."""
    model = policy()[0].bfloat16()
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA), autocast_adapter_dtype=False)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    ((_, weight),) = merged_weights(adapted, ["model.layers.0.self_attn.q_proj.weight"])
    product = layer.get_delta_weight("default").float()
    assert torch.equal(weight, layer.get_base_layer().weight.float() + product)
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["norm"]}, {"trainable_token_indices": [20], "ensure_weight_tying": True}]
)
def test_what_else_an_adapter_holds_is_in_the_frozen_teacher(make, settings):
    adapter = peft.LoraConfig(**{**LORA, "init_lora_weights": True, **settings})
    model, tokenizer = policy()
    adapted = peft.get_peft_model(model, adapter)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                weight.add_(1.0)
    trainer = make(model=(adapted, tokenizer), teacher="frozen")
    assert trainer.teacher.model is not None
    assert_teacher_gives(logits_of(trainer.model), trainer)


def test_an_adapter_that_is_not_in_use_is_no_lost_start():
    adapted = peft.get_peft_model(policy()[0], peft.LoraConfig(**{**LORA, "init_lora_weights": True}), "fresh")
    adapted.add_adapter("trained", peft.LoraConfig(**LORA))
    assert not loses_its_start(adapted)
    adapted.set_adapter("trained")
    assert loses_its_start(adapted)


def test_a_shard_beside_a_whole_weight_is_no_lost_start():
    settings = {**LORA, "init_lora_weights": True, "modules_to_save": ["norm"]}
    adapted = peft.get_peft_model(policy()[0], peft.LoraConfig(**settings))
    norm = adapted.get_base_model().model.norm
    norm.original_module.weight.data = torch.empty(0)  # as ZeRO-3 leaves a weight that another rank holds
    assert not loses_its_start(adapted)
    norm.original_module.weight.data = norm.modules_to_save["default"].weight.detach() + 1
    assert loses_its_start(adapted)


@pytest.mark.parametrize("begins_at_zero", [True, False])
def test_under_zero3_the_shards_tell_whether_an_adapter_begins_at_zero(begins_at_zero):
    adapter = peft.LoraConfig(**{**LORA, "init_lora_weights": begins_at_zero})
    adapted = peft.get_peft_model(policy()[0], adapter)
    for parameter in adapted.parameters():
        parameter.ds_tensor, parameter.data = parameter.data, torch.empty(0)
    assert loses_its_start(adapted) != begins_at_zero


@pytest.mark.parametrize(("kind", "weights"), [("quantized", "is_quantized"), ("sharded", "is_fsdp2")])
def test_where_no_merged_copy_can_be_made_such_an_adapter_is_refused(make, kind, weights):
    accelerator = SimpleNamespace(is_fsdp2=weights == "is_fsdp2")
    model, _ = policy()
    model.is_quantized = weights == "is_quantized"
    fresh = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, "init_lora_weights": True}))
    assert SelfTeacher(fresh, accelerator, "frozen").model is None
    adapted = peft.get_peft_model(fresh.unload(), peft.LoraConfig(**LORA))
    with pytest.raises(ValueError, match=f"merged copy of {kind} weights cannot be made: pass the merged") as error:
        SelfTeacher(adapted, accelerator, "frozen")
    assert "\n" not in str(error.value)


def test_the_averaged_head_of_a_quantized_policy_is_not_the_policys(make, fixed):
    model, _ = policy()
    model.is_quantized = True  # stands for a 4-bit policy: its adapter is averaged and no copy is made
    model.lm_head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=True)
    settings = {**LORA, "modules_to_save": ["lm_head"], "ensure_weight_tying": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    teacher = SelfTeacher(adapted, make().accelerator)
    assert set(teacher.average) == {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = {"completion_ids": torch.tensor([[20, 30, 40]]), "prompt_ids": torch.tensor([[11, 12]])}
    batch["completion_mask"] = torch.ones_like(batch["completion_ids"])
    states, head = teacher.hidden_states(adapted, {0: [15, 16]}, batch, batch["completion_mask"], 1, 0)
    with torch.no_grad(), teacher.view(adapted) as average:
        expected = average(input_ids=torch.tensor([[15, 16, 20, 30, 40]])).logits[0, 1:-1]
    torch.testing.assert_close(states[0] @ head.weight.T + head.bias, expected)
    assert not torch.allclose(head.weight, adapted.get_output_embeddings().weight)


def test_the_head_of_a_quantized_policy_that_does_not_train_it_is_not_copied(make):
    model, _ = policy()
    model.is_quantized = True
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    batch = {"completion_ids": torch.tensor([[20]]), "completion_mask": torch.ones(1, 1).long()}
    teacher = SelfTeacher(adapted, make().accelerator)
    _, head = teacher.hidden_states(adapted, {}, batch, batch["completion_mask"], 1, 0)
    assert head.weight is adapted.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("name", "value"), [("use_dora", True), ("trainable_token_indices", [20, 30]), ("lora_bias", True)]
)
def test_an_adapter_that_is_more_than_a_product_is_refused_with_the_average(make, name, value):
    """DoRA's magnitude, trained tokens and biases are no part of B A: the average would lack them without a word."""
    adapter = peft.LoraConfig(**{**LORA, name: value})
    for routing in ("srpo", "sdpo"):
        with pytest.raises(ValueError, match=rf"leave {name}=.* out of peft_config, or set teacher=") as error:
            make(peft_config=adapter, routing=routing)
        assert "\n" not in str(error.value)
    make(peft_config=adapter, routing="grpo")  # which has no teacher
    loss, _ = step(make(peft_config=adapter, teacher="current"))
    assert math.isfinite(loss)


@pytest.mark.parametrize(
    "name",
    ["target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
     "monteclora_config", "velora_config"],
)  # fmt: skip
def test_every_setting_that_changes_more_than_the_product_is_refused_with_the_average(name):
    assert name in {field.name for field in dataclasses.fields(peft.LoraConfig)}
    adapter = peft.LoraConfig(**LORA)
    check_mergeable({"default": adapter})
    setattr(adapter, name, True)
    with pytest.raises(ValueError, match=f"leave {name}=True out of peft_config"):
        check_mergeable({"default": adapter})


def test_another_kind_of_adapter_is_refused_with_the_average(make):
    with pytest.raises(ValueError, match="leave peft_type=IA3 out of peft_config, or set teacher="):
        make(peft_config=peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]))


def test_lora_on_the_head_is_refused(make):
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make(peft_config=peft.LoraConfig(target_modules=["lm_head"]))


@pytest.mark.parametrize("teacher", ["ema", "frozen"])
def test_a_prompt_that_is_learned_is_refused(make, teacher):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="^peft_config makes a learned prompt, .*: use LoRA$"):
        make(peft_config=config, teacher=teacher)


@pytest.mark.parametrize(
    ("sharded", "rank", "files"),
    [(False, 1, []), (False, 0, ["average.safetensors"]), (True, 1, ["average-00001.safetensors"])],
)
def test_an_average_is_written_once_and_its_shards_by_every_rank(tmp_path, monkeypatch, sharded, rank, files):
    synced = []
    monkeypatch.setattr(teacher.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    owner = object.__new__(SelfTeacher)
    owner.kind, owner.sharded, owner.average = "ema", sharded, {"weight": torch.ones(2)}
    owner.accelerator = SimpleNamespace(is_main_process=rank == 0, process_index=rank)
    owner.save(tmp_path)
    assert [path.name for path in tmp_path.glob("self_teacher/*")] == files
    assert synced == [path.stat().st_ino for path in tmp_path.glob("self_teacher/*")]  # before they have their names


# --- loading, and ZeRO-3 ----------------------------------------------------------------


def test_the_options_of_loading_reach_the_teacher(make, monkeypatch):
    given = []
    monkeypatch.setattr("srpo.trainer.SelfTeacher", lambda *arguments: given.append(arguments[-1]))
    make(model_init_kwargs={"revision": "v2"}, trust_remote_code=True)
    make()
    assert given == [{"revision": "v2", "trust_remote_code": True}, {"trust_remote_code": False}]


def in_shards(weight: torch.Tensor, partitioned: bool = True) -> torch.nn.Linear:
    """A layer of 2 x 3 as under ZeRO-3: its weight is empty, but inside `gathered`."""
    layer = torch.nn.Linear(3, 2, bias=False, dtype=weight.dtype)
    layer.weight.data = weight.new_empty(0) if partitioned else weight
    layer.weight.whole = weight
    return layer


@contextmanager
def gathered(weights: list[torch.nn.Parameter]):
    """In place of DeepSpeed's, which needs several processes (`test_sharding.py` has them)."""
    held = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.whole
    yield
    for weight, data in zip(weights, held, strict=True):
        weight.data = data


def zero3_copy(monkeypatch, policy: torch.nn.Linear, loaded: torch.nn.Linear, **loading):
    """`_zero3_copy` of a policy, and the options with which its name was loaded."""
    seen = {}
    monkeypatch.setattr(teacher, "create_model_from_path", lambda name, **options: seen.update(options) or loaded)
    monkeypatch.setattr(teacher, "prepare_deepspeed", lambda model, accelerator: model)
    zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    policy.config = SimpleNamespace(_name_or_path="m", _attn_implementation="flash_attention_2")
    policy.dtype = torch.bfloat16
    owner = object.__new__(SelfTeacher)
    owner.accelerator, owner.loading = None, loading
    return owner._zero3_copy(policy), seen


def test_a_copy_under_zero3_is_loaded_as_the_policy_was_and_placed_by_deepspeed(monkeypatch):
    weight = torch.randn(2, 3).bfloat16()
    loading = {"revision": "v2", "trust_remote_code": True, "dtype": "auto", "device_map": "auto"}
    loading |= {"attn_implementation": "eager", "quantization_config": {}}
    copy, seen = zero3_copy(monkeypatch, in_shards(weight), in_shards(weight), **loading)
    assert not any(weight.requires_grad for weight in copy.parameters())
    own = {"dtype": torch.bfloat16, "device_map": None, "attn_implementation": "flash_attention_2"}
    assert seen == {"revision": "v2", "trust_remote_code": True, **own}


@pytest.mark.parametrize("partitioned", [True, False])
def test_another_models_weights_under_the_policys_name_are_refused(monkeypatch, partitioned):
    """Such as those of a base model whose adapter was merged into the policy, which keeps its name."""
    weight = torch.randn(2, 3)
    zero3_copy(monkeypatch, in_shards(weight, partitioned), in_shards(weight))
    zero3_copy(monkeypatch, in_shards(weight, partitioned), in_shards(weight.bfloat16()))  # rounded, as by DeepSpeed
    for other in (weight + torch.tensor([0, 0, 1e-6]), weight.T):
        with pytest.raises(ValueError, match="loaded from the policy's name, 'm', and its weights are not") as error:
            zero3_copy(monkeypatch, in_shards(weight, partitioned), in_shards(other))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("rank", "kept"), [(0, [0, 1, 2, 3]), (1, [0, 1])])
def test_what_fills_up_a_share_under_zero3_is_not_averaged(rank, kept):
    teacher = SimpleNamespace(zero3=True, accelerator=SimpleNamespace(process_index=rank))
    share = torch.tensor([0.0, 1.0, 2.0 if rank == 0 else math.nan, 3.0 if rank == 0 else math.nan])
    parameter = SimpleNamespace(ds_tensor=share, ds_numel=6)
    assert SelfTeacher._shard(teacher, parameter).tolist() == kept
