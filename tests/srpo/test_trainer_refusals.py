"""`SRPOTrainer`: bad settings, rewards and data are one clear sentence; what is warned of."""

from types import SimpleNamespace

import peft
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from srpo_trainers import LORA, always, mixed_reward, policy, rows, step
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import remove_none_values

from srpo import SRPOConfig, SRPOTrainer
from srpo.checks import check_longest_prompts, check_prompt_lengths, check_support


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("reprompt_template", "{prompt} solve it", "reprompt_template must hold {demonstration} once"),
        ("reprompt_template", "{prompt}{prompt}{demonstration}", "reprompt_template must hold {prompt} once"),
        ("per_device_train_batch_size", 32, "train_dataset has 4 prompts, fewer than the 8 of one generation batch"),
    ],
)
def test_wrong_settings_are_one_clear_sentence(make, field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**{field: value})
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_its_kl_reference_is_refused(make, tmp_path):
    """TRL loads the reference from where the model was first loaded, which may hold other weights."""
    model, tokenizer = policy()
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    make(model=(model, tokenizer), routing="grpo", beta=0.1)
    make(model=(model, tokenizer), routing="grpo", beta=0.1, torch_compile=True)  # the reference has other names then
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"is not this model \(model.norm.weight differs\): save the model"):
        make(model=(model, tokenizer), routing="grpo", beta=0.1)
    make(model=(model, tokenizer), routing="grpo")


def test_another_configuration_and_an_iterable_data_set_are_one_clear_sentence(make, tmp_path):
    model, tokenizer = policy()
    plain = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="args must be an SRPOConfig, got GRPOConfig"):
        SRPOTrainer(model, mixed_reward, plain, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer)
    endless = IterableDataset.from_generator(lambda: iter(rows()))
    with pytest.raises(ValueError, match="must be a map-style Dataset, .* got IterableDataset"):
        SRPOTrainer(model, mixed_reward, make().args, train_dataset=endless, processing_class=tokenizer)
    splits = DatasetDict(train=Dataset.from_list(rows()), test=Dataset.from_list(rows()))
    with pytest.raises(ValueError, match="and one split of a DatasetDict; got DatasetDict"):
        SRPOTrainer(model, mixed_reward, make().args, train_dataset=splits, processing_class=tokenizer)
    with pytest.raises(TypeError, match="must be a `Dataset` or `IterableDataset`, got `str`"):  # TRL's
        SRPOTrainer(model, mixed_reward, make().args, "org/data", processing_class=tokenizer)
    unnamed = Dataset.from_list([{"question": "1+1", "answer": "2"}] * 4)
    for routing in ("srpo", "grpo"):
        with pytest.raises(ValueError, match="train_dataset has the columns question, answer: it needs `prompt`"):
            SRPOTrainer(model, mixed_reward, make(routing=routing).args, unnamed, processing_class=tokenizer)


@pytest.mark.parametrize("prompt", [[{"role": "user", "content": None}], [{"role": "assistant"}], [], None])
def test_a_prompt_that_cannot_be_distilled_is_refused_with_its_row(make, prompt):
    data = [*rows(3), {**rows(1)[0], "prompt": prompt}]
    with pytest.raises(
        ValueError, match="row 3 of train_dataset: the prompt does not end with a user message"
    ) as error:
        make(data=data)
    assert "\n" not in str(error.value)
    make(data=data, routing="grpo")  # which shows no demonstration


@pytest.mark.parametrize("prompt", [{"role": "user", "content": "a"}, 5, ["a"]])
def test_a_prompt_of_another_form_is_refused_with_its_row(make, prompt):
    with pytest.raises(ValueError, match="row 0 of train_dataset: the prompt does not end with a user message"):
        make(data=[{"prompt": prompt}] * 4)


def test_what_cannot_be_called_or_rendered_is_said_before_anything_is_loaded(make, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "__init__", lambda *_, **__: pytest.fail("loads"))
    with pytest.raises(ValueError, match="reward function wants: missing a required argument: 'solution'"):
        make(reward=wants)
    with pytest.raises(ValueError, match="^reward_funcs must be a function, a model or its name, .*, got tuple"):
        make(reward=(mixed_reward,))
    model, tokenizer = policy()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="prompts are messages, and processing_class has no chat_template"):
        make(model=(model, tokenizer))
    questions, good = Dataset.from_list([{"question": "a"}]), Dataset.from_list(rows())
    with pytest.raises(ValueError, match="^eval_dataset has the columns question: it needs `prompt`"):
        SRPOTrainer(model, mixed_reward, SRPOConfig(use_cpu=True, bf16=False), None, eval_dataset=questions)
    with pytest.raises(pytest.fail.Exception, match="loads"):
        SRPOTrainer(model, mixed_reward, SRPOConfig(use_cpu=True, bf16=False), None, eval_dataset=good)
    for makes_columns in ("rollout_func", "environment_factory"):
        options = {"eval_dataset": good, makes_columns: print}
        with pytest.raises(pytest.fail.Exception, match="loads"):
            SRPOTrainer(model, wants, SRPOConfig(use_cpu=True, bf16=False), **options)


def wants(completions, solution, **columns):
    return [1.0] * len(completions)


@pytest.mark.parametrize("routing", ["srpo", "grpo"])
def test_a_padding_token_without_a_row_is_one_clear_sentence(make, routing):
    model, tokenizer = policy()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(
        ValueError, match=r"pad_token '\[PAD\]' is id 103, and the model has 103 rows: call model.resize"
    ):
        make(model=(model, tokenizer), routing=routing)
    model.resize_token_embeddings(len(tokenizer))
    step(make(model=(model, tokenizer), routing=routing, reward=always(1.0)))


@pytest.mark.parametrize("routing", ["srpo", "grpo"])
def test_an_end_without_a_row_is_one_clear_sentence(make, routing):
    """Rollouts would never end: TRL gives the tokenizer's to the model."""
    model, tokenizer = policy()
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    with pytest.raises(
        ValueError, match=r"eos_token '\[END\]' is id 103, and the model has 103 rows: call model.resize"
    ):
        make(model=(model, tokenizer), routing=routing)


def test_added_tokens_without_rows_are_warned_of(make, warned):
    model, tokenizer = policy()
    make(model=(model, tokenizer))
    assert not warned("no row for it")
    tokenizer.add_tokens(["<think>"])
    make(model=(model, tokenizer))
    assert warned("the tokenizer has the token <think> and the model no row for it") == 1


@pytest.mark.parametrize("column", ["image", "images"])
def test_images_are_refused(make, column):
    with pytest.raises(ValueError, match=f"train_dataset has the column {column}, .* SRPOTrainer is for text"):
        make(data=[{**row, column: None} for row in rows()])


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_reward_that_is_no_number_is_one_clear_sentence(make, fixed, value):
    def reward(completions, **columns):
        return [value if i == 5 else 1.0 for i in range(len(completions))]

    with pytest.raises(ValueError, match="reward of rollout 5 is") as error:
        step(make(reward=reward))
    assert "\n" not in str(error.value)


def test_rewards_of_the_wrong_number(make, fixed):
    with pytest.raises(ValueError, match="returned 1 rewards, but 8 were expected"):
        step(make(reward=lambda completions, **columns: [1.0]))


@pytest.mark.parametrize("routing", ["srpo", "grpo"])
def test_rewards_that_are_none_name_their_function(make, fixed, routing):
    def judge(completions, **columns):  # forgets to return them
        [1.0 for _ in completions]

    with pytest.raises(ValueError, match="^reward function judge returned None: it must return a list"):
        step(make(reward=judge, routing=routing))


def test_an_infinite_reward_is_refused_before_it_makes_all_weights_nan(make, fixed):
    def logps(completions, **columns):
        return [float("-inf"), *[1.0] * (len(completions) - 1)]

    with pytest.raises(ValueError, match="^reward function logps returned -inf for rollout 0, of the prompt .*'Q"):
        step(make(reward=logps, routing="grpo"))
    _, gradients = step(make(reward=[logps, mixed_reward], routing="grpo", reward_weights=[0.0, 1.0]))
    assert all(gradient.isfinite().all() for gradient in gradients.values())  # of weight 0 it is only logged


def test_a_prompt_over_the_limit_is_refused_when_it_is_drawn(make):
    with pytest.raises(ValueError, match="above max_prompt_length=5: .*; it begins .*'user'"):
        step(make(max_prompt_length=5, routing="grpo"))


def test_a_long_prompt_is_refused_with_its_row_before_any_rollout(make):
    data = rows(20)
    data[7]["prompt"] = [{"role": "user", "content": "?" * 100}]
    message = "^row 7 of train_dataset: a prompt has .* above max_prompt_length=64: "
    with pytest.raises(ValueError, match=message) as error:
        make(data=data, max_prompt_length=64)
    assert "\n" not in str(error.value)
    make(data=data)  # the limit is 2,048


def test_prompts_that_are_made_of_the_data_are_not_measured_by_them(make):
    trainer = make()
    trainer.train_dataset = Dataset.from_list([{"prompt": "?" * 3000}])
    with pytest.raises(ValueError, match="^row 0 of train_dataset: a prompt has 3"):
        check_longest_prompts(trainer)
    trainer.train_dataset.set_transform(lambda batch: {"prompt": [text[:50] for text in batch["prompt"]]})
    check_longest_prompts(trainer)
    trainer.train_dataset.reset_format()
    trainer.rollout_func = print
    check_longest_prompts(trainer)


def test_a_context_of_vllm_that_cuts_rollouts_is_warned_of(make, monkeypatch):
    said, args = [], make().args  # max_completion_length=6
    monkeypatch.setattr("srpo.checks.logger.warning_once", said.append)
    for use_vllm, mode, context in ((False, "colocate", 10), (True, "server", 10), (True, "colocate", None)):
        args.use_vllm, args.vllm_mode, args.vllm_max_model_length = use_vllm, mode, context
        check_prompt_lengths([[1] * 20], ["Q"], args)
    args.vllm_max_model_length = 26
    check_prompt_lengths([[1] * 20], ["Q"], args)
    assert not said
    check_prompt_lengths([[1] * 20, [1] * 21], ["Q", "R"], args)
    assert "vllm_max_model_length=26 is for a prompt and its rollout" in said[0]


def test_environments_are_refused():
    trainer = SimpleNamespace(model=policy()[0], _is_vlm=False, environment_factories={None: object})
    with pytest.raises(ValueError, match="^SRPOTrainer has no environment_factory"):
        check_support(trainer)


@pytest.mark.parametrize("routing", ["srpo", "grpo"])
def test_an_adapter_that_was_loaded_for_inference_is_refused_before_it_learns_nothing(make, tmp_path, routing):
    """With gradient checkpointing, TRL's default, torch only warns."""
    model, tokenizer = policy()
    peft.get_peft_model(model, peft.LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(policy()[0], tmp_path / "adapter")
    trainer = make(model=(model, tokenizer), routing=routing, gradient_checkpointing=True)
    with pytest.raises(
        ValueError, match="^no weight of the model is trained: load an adapter with .*is_trainable=True"
    ):
        trainer.train()
    model = peft.PeftModel.from_pretrained(policy()[0], tmp_path / "adapter", is_trainable=True)
    begin(make(model=(model, tokenizer), routing=routing, gradient_checkpointing=True))


def begin(trainer) -> None:
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_trained_weights_in_half_precision_are_warned_of(make, warned, dtype):
    model, tokenizer = policy()
    begin(make(model=(model.to(dtype), tokenizer)))
    assert warned('load the model with dtype="float32"') == (dtype == torch.bfloat16)


def test_adapters_that_are_made_float32_after_the_constructor_are_not_warned_of(make, warned):
    """As `srpo.train` does with those on quantized weights, which TRL rounds."""
    trainer = make(peft_config=peft.LoraConfig(**LORA))
    trainer.model.base_model.model.is_quantized = True  # stands for 4 bits
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.bfloat16()
    begin(trainer)
    assert warned("p.data = p.data.float()") == warned("in half precision") == 1
    for p in trainer.model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    begin(trainer)
    assert warned("in half precision") == 1


def test_arguments_that_arrow_adds_to_calls_of_tools_are_refused(make):
    """Where another call has a city, the prompt of this one would read {"unit": "C", "city": null}."""

    def row(arguments):
        calls = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
        turns = [{"role": "user", "content": "Warm?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        return {"prompt": [*turns, {"role": "tool", "content": "9"}, {"role": "user", "content": "And?"}]}

    model, tokenizer = policy()
    data, alike = [row({"city": "Rome"}), row({"unit": "C"})] * 2, [row({"city": "Rome"})] * 4
    with pytest.raises(ValueError, match="of weather in row 0 of train_dataset has unit=None, which Arrow adds"):
        make(data=data)
    with pytest.raises(ValueError, match="row 4 of train_dataset: the prompt does not end with a user message"):
        make(data=[*alike, {"prompt": None}])
    for good in (Dataset.from_list(data, on_mixed_types="use_json"), Dataset.from_list(alike)):
        SRPOTrainer(model, mixed_reward, make().args, train_dataset=good, processing_class=tokenizer)
    without = Dataset.from_list(data).with_transform(remove_none_values)
    SRPOTrainer(model, mixed_reward, make().args, train_dataset=without, processing_class=tokenizer)
