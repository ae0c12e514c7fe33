"""The overrides of TRL's trainer."""

import inspect
import logging
import math
from collections import defaultdict
from types import SimpleNamespace

import peft
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler, is_async_callable, split_tensor_dict

from common.tiny import tiny_qwen3
from r_diverse import PhaseTrainer, challenger_prompt, doctor
from r_diverse.batches import SortsByLength
from r_diverse.checks import check_data, check_roles
from r_diverse.config import ChallengerConfig, SolverConfig
from r_diverse.trainer import logps_gap
from r_diverse.turns import stop_at_the_end_of_a_turn


def test_what_is_overridden_in_trl():
    assert list(inspect.signature(GRPOTrainer._get_train_sampler).parameters) == ["self", "dataset"]
    parameters = ["data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"]
    assert list(inspect.signature(RepeatSampler.__init__).parameters)[1:] == parameters
    own = [
        {name for name, value in vars(kind).items() if callable(value) and hasattr(GRPOTrainer, name)} - {"__init__"}
        for kind in (PhaseTrainer, SortsByLength)
    ]
    assert own == [
        {"_get_train_sampler", "_generate_and_score_completions"},
        {"_prepare_inputs", "_compute_loss", "_get_per_token_logps_and_entropies"},
    ]
    for function, parameters in (
        (GRPOTrainer._prepare_inputs, "self generation_batch"),
        (GRPOTrainer._compute_loss, "self model inputs"),
        (
            GRPOTrainer._get_per_token_logps_and_entropies,
            "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss "
            "pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes "
            "token_type_ids mm_token_type_ids image_position_ids",
        ),
        (split_tensor_dict, "tensor_dict num_chunks"),
        (is_async_callable, "func"),
    ):
        assert list(inspect.signature(inspect.unwrap(function)).parameters) == parameters.split()
    assert list(inspect.signature(GRPOTrainer._generate_and_score_completions).parameters) == ["self", "inputs"]
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for name in ("old_per_token_logps", "sampling_per_token_logps"):
        assert f'output["{name}"]' in source


def test_data_that_a_phase_cannot_repeat_are_one_clear_sentence(tmp_path):
    config = ChallengerConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    rows = Dataset.from_list([{"prompt": "a"}])
    with pytest.raises(ValueError, match="train_dataset holds the splits train, test: pass one of them"):
        PhaseTrainer("a model", None, config, DatasetDict(train=rows, test=rows))
    with pytest.raises(ValueError, match="needs a map-style Dataset"):
        PhaseTrainer("a model", None, config, rows.to_iterable_dataset())
    with pytest.raises(ValueError, match="train_dataset has the columns question: it needs `prompt`"):
        PhaseTrainer("a model", None, config, rows.rename_column("prompt", "question"))


@pytest.mark.parametrize("prompt", [{"role": "user", "content": "a"}, 5, ["a"], [{"content": "a"}]])
def test_a_prompt_of_another_form_is_refused_with_its_row(prompt):
    with pytest.raises(ValueError, match="the prompt of row 0 of train_dataset is .*: it needs messages with content"):
        check_data(Dataset.from_list([{"prompt": prompt}]))


def test_what_cannot_be_called_rendered_or_padded_is_one_clear_sentence(tmp_path):
    model, tokenizer = tiny_qwen3(hidden=32)
    config = ChallengerConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], beta=0.0)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}]}] * 4)

    def refused(message: str, reward, **options):
        with pytest.raises(ValueError, match=message):
            PhaseTrainer(model, reward, config, rows, processing_class=tokenizer, **options)

    refused("reward function <lambda>: missing a required argument: 'label'", lambda completions, label, **_: [])
    questions = Dataset.from_list([{"question": "a"}])
    refused("^eval_dataset has the columns question: it needs `prompt`", lambda **_: [], eval_dataset=questions)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    refused(r"pad_token '\[PAD\]' is id 103, and the model has 103 rows", lambda **_: [])
    refused(r"pad_token '\[PAD\]'", lambda completions, label, **_: [], rollout_func=print)  # it may make the column
    tokenizer.chat_template = None
    refused("prompts are messages, and processing_class has no chat_template", lambda **_: [])


def test_a_chat_template_that_leaves_out_the_system_message_is_refused(tmp_path):
    model, tokenizer = tiny_qwen3(hidden=32)
    config = ChallengerConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], beta=0.0)
    rows = Dataset.from_list([{"prompt": challenger_prompt()}] * 4)
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template leaves out the prompt's message of the system: leave it"):
        PhaseTrainer(model, lambda **_: [], config, rows, processing_class=tokenizer)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"the chat template refuses the prompt \(System role not supported\)"):
        check_roles(tokenizer, challenger_prompt(), {})
    assert check_roles(tokenizer, [{"role": "tool", "content": "a"}], {}) == ""
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }}{% endfor %}{% if asked %}!{% endif %}"
    assert check_roles(tokenizer, challenger_prompt(), {"asked": True}) == "@message 0@@message 1@!"


@pytest.mark.parametrize("prompt", [[{"role": "user", "content": None}], [{"role": "user"}], [], None])
def test_a_prompt_without_content_is_said_before_anything_is_loaded(tmp_path, prompt):
    config = ChallengerConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": prompt}])
    with pytest.raises(ValueError, match="the prompt of row 1 of train_dataset is .*: it needs messages with content"):
        PhaseTrainer("a model", None, config, rows)


def test_an_empty_text_is_no_prompt():
    with pytest.raises(ValueError, match="the prompt of row 1 of train_dataset is '': it needs messages with content"):
        check_data(Dataset.from_list([{"prompt": "a"}, {"prompt": ""}]))


def test_prompts_that_can_be_rendered_pass(tmp_path):
    """A call of a tool has no content; what a transform makes of a row is not looked at."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}, call]}])
    for data in (rows, Dataset.from_list([{"prompt": "a"}]), None, rows.select([])):
        check_data(data)
    check_data(list(rows))  # which TRL refuses
    made = Dataset.from_list([{"question": "a"}, {"question": "b"}])
    made.set_transform(lambda batch: seen.append(batch) or {"prompt": batch["question"]})
    seen = []
    check_data(made)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (False, "^reward function judge returned '1.0' for rollout 0, of the prompt .*'a'"),
        (True, "^no weight of the model is trained: load an adapter with"),
    ],
)
def test_a_reward_that_is_no_number_and_a_frozen_model_are_one_clear_sentence(tmp_path, frozen, message):
    model, tokenizer = tiny_qwen3(hidden=32)
    model.requires_grad_(not frozen)
    config = SolverConfig(
        str(tmp_path), per_device_train_batch_size=5, max_steps=1, max_completion_length=4, beta=0.0,
        bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}]}] * 8)

    def judge(completions, **columns):
        return ["1.0"] * len(completions)

    trainer = PhaseTrainer(model, judge, config, rows, processing_class=tokenizer)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_rollouts_of_a_base_model_stop_at_the_end_of_a_turn(tmp_path):
    """As Qwen3-4B-Base has it: `<|endoftext|>` is the only end that model and tokenizer declare."""
    model, tokenizer = tiny_qwen3(hidden=32)
    turn_end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    config = SolverConfig(
        str(tmp_path), per_device_train_batch_size=5, max_steps=1, max_completion_length=64, top_p=1.0, beta=0.0,
        bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    seen = []

    def reward(completions, completion_ids, **columns):
        seen.extend(completion_ids)
        return [0.0] * len(completions)

    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+{i}="}]} for i in range(4)])
    trainer = PhaseTrainer(model, reward, config, train_dataset=rows, processing_class=tokenizer)
    assert trainer.eos_token_ids == [tokenizer.eos_token_id, turn_end]
    assert trainer.generation_config.eos_token_id == trainer.eos_token_ids  # TRL only masks what comes behind an end
    trainer.use_vllm, trainer.eos_token_ids = True, [tokenizer.eos_token_id]
    trainer.vllm_generation = SimpleNamespace(generation_kwargs={"stop_token_ids": [77], "min_p": 0.1})
    stop_at_the_end_of_a_turn(trainer)
    assert set(trainer.vllm_generation.generation_kwargs.pop("stop_token_ids")) == {77, *trainer.eos_token_ids}
    assert trainer.vllm_generation.generation_kwargs == {"min_p": 0.1} and turn_end in trainer.eos_token_ids
    trainer.use_vllm = False
    trainer.train()
    assert any(ids[-1] == turn_end for ids in seen)
    assert not any(turn_end in ids[:-1] for ids in seen)
    for asked in (77, [77, 78]):  # in `generation_kwargs`
        trainer.generation_config.eos_token_id, trainer.eos_token_ids = asked, [tokenizer.eos_token_id]
        stop_at_the_end_of_a_turn(trainer)
        assert {77, turn_end} <= set(trainer.generation_config.eos_token_id)


def test_the_order_of_prompts_is_trls_and_another_in_the_next_epoch(tmp_path):
    model, tokenizer = tiny_qwen3(hidden=32)
    config = SolverConfig(
        str(tmp_path), per_device_train_batch_size=5, max_steps=8, num_iterations=2, save_steps=8, seed=5, beta=0.0,
        bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(12)])
    trainer = PhaseTrainer(model, lambda **columns: [], config, train_dataset=rows, processing_class=tokenizer)
    first = list(trainer._get_train_sampler())
    assert first == list(GRPOTrainer._get_train_sampler(trainer))
    assert len(list(trainer._get_train_sampler(range(4)))) == len(first) // 3  # another data set than the trainer's
    trainer.state.epoch = 1.0
    second = list(trainer._get_train_sampler())
    assert first != second and sorted(first) == sorted(second)


def test_trls_own_config_will_do(tmp_path):
    model, tokenizer = tiny_qwen3(hidden=32)
    config = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=1, max_completion_length=4,
        bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "1+1="}])
    trainer = PhaseTrainer(
        model,
        lambda completions, **columns: [0.0, 1.0, 0.0, 1.0],
        config,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 1 and not torch.equal(before, model.lm_head.weight)
    assert not any(isinstance(callback, doctor.DoctorCallback) for callback in trainer.callback_handler.callbacks)
    config.generation_batch_size = 8
    with pytest.raises(ValueError, match="train_dataset has 1 prompts, fewer than the 2 of one generation batch"):
        PhaseTrainer(model, lambda **columns: [], config, train_dataset=rows, processing_class=tokenizer)


def test_a_model_that_is_not_its_kl_reference_is_refused(tmp_path):
    """TRL loads the reference from the folder that the model came from: after training it is another one."""
    model, tokenizer = tiny_qwen3(hidden=32)
    model.save_pretrained(tmp_path)
    rows = Dataset.from_list([{"prompt": "1+1="}])
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "steps_per_generation": 1, "max_steps": 1}
    config = ChallengerConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", save_strategy="no", **options)

    def build(model):
        return PhaseTrainer(model, lambda **columns: [], config, train_dataset=rows, processing_class=tokenizer)

    for dtype in (torch.float32, torch.bfloat16):  # rounded, it is the same model
        build(Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    trained = Qwen3ForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        trained.model.norm.weight[3] += 1e-6
    with pytest.raises(ValueError, match=r"is not this model \(model.norm.weight differs\): save the model and pass"):
        build(trained)
    config.beta = 0.0
    build(trained)


def test_trained_weights_in_half_precision_are_warned_of_when_training_starts(tmp_path, caplog):
    """Adapters on quantized weights, which TRL rounds, are made float32 after the constructor."""
    model, tokenizer = tiny_qwen3(hidden=32)
    config = GRPOConfig(str(tmp_path), per_device_train_batch_size=8, bf16=False, use_cpu=True, report_to="none")
    trainer = PhaseTrainer(
        model,
        lambda completions, **columns: [0.0] * len(completions),
        config,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 4),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"]),
    )
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.bfloat16()
    advice = ("load the model in float32 (policy_dtype)", "p.data = p.data.float()")
    for count, text in enumerate(advice, 1):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == count and "in half precision" in warnings[-1] and text in warnings[-1]
        trainer.model.base_model.model.is_quantized = True  # stands for 4 bits
    for p in trainer.model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert len(caplog.records) == 2


def test_the_gap_of_two_engines_leaves_out_the_nucleus():
    trainer = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert logps_gap(trainer, trainer.masked_fill(mask == 0, 0.0), mask, 0.99) == 0
    assert logps_gap(trainer, trainer - math.log(0.9), mask, 0.9) == pytest.approx(0, abs=1e-6)
    assert logps_gap(trainer, trainer - 0.2, mask, 0.9) == pytest.approx(0.2)
    assert logps_gap(trainer, trainer + torch.tensor([[0.3, math.nan], [0.0, 0.0]]), mask, 1.0) == pytest.approx(0.15)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_gap_is_logged_for_the_nucleus_that_was_sampled_from(monkeypatch, mode):
    old, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2)
    batch = {"old_per_token_logps": old, "sampling_per_token_logps": old - math.log(0.9), "completion_mask": mask}
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda self, inputs: batch)
    trainer = object.__new__(PhaseTrainer)
    nothing = torch.tensor(math.nan)  # the gap of a rank whose rollouts are all masked
    trainer.accelerator, trainer.top_p = SimpleNamespace(gather=lambda gap: torch.stack([gap, nothing])), 0.9
    trainer.model, trainer._metrics = SimpleNamespace(training=mode == "train"), defaultdict(lambda: defaultdict(list))
    trainer._generate_and_score_completions([])
    assert trainer._metrics == {mode: {"sampling/logps_gap": [pytest.approx(0, abs=1e-6)]}}
