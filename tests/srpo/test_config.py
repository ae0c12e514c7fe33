"""`SRPOConfig`: the paper's values (Table 3), what it refuses, documentation, command line."""

import dataclasses
import inspect
import math
import re

import pytest
from transformers import HfArgumentParser
from trl import GRPOConfig

from srpo import SRPOConfig, objective

OWN = [name for name in SRPOConfig.__annotations__ if name not in {f.name for f in dataclasses.fields(GRPOConfig)}]


@pytest.fixture
def make(tmp_path):
    return lambda **fields: SRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **fields)


# --- the paper's values ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("routing", "learning_rate", "beta"),
    [
        ("srpo", 5e-6, 1.0),
        ("grpo", 1e-6, 0.0),
        ("sdpo", 1e-5, 0.0),
        ("sdpo_incorrect", 1e-5, 0.0),
        ("sdpo_correct", 1e-5, 0.0),
        ("mix", 5e-6, 0.0),
    ],
)
def test_values_that_depend_on_the_method(make, routing, learning_rate, beta):
    config = make(routing=routing)
    assert (config.learning_rate, config.entropy_beta) == (learning_rate, beta)
    chosen = make(routing=routing, learning_rate=3e-6, entropy_beta=0.5)
    assert (chosen.learning_rate, chosen.entropy_beta) == (3e-6, 0.5)


@pytest.mark.parametrize("routing", objective.ROUTINGS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_generations", 8),
        ("max_prompt_length", 2048),
        ("max_completion_length", 8192),
        ("max_reprompt_length", 10240),
        ("temperature", 1.0),
        ("top_p", 1.0),
        ("top_k", 0),
        ("min_p", None),
        ("repetition_penalty", 1.0),
        ("epsilon", 0.2),
        ("epsilon_high", 0.28),
        ("delta", 3.0),
        ("beta", 0.0),
        ("loss_type", "dapo"),
        ("scale_rewards", "none"),
        ("num_iterations", 1),
        ("vllm_importance_sampling_correction", True),
        ("vllm_importance_sampling_mode", "token_truncate"),
        ("vllm_importance_sampling_clip_max", 2.0),
        ("vllm_importance_sampling_clip_min", None),
        ("adam_beta1", 0.9),
        ("adam_beta2", 0.999),
        ("weight_decay", 0.01),
        ("max_grad_norm", 1.0),
        ("warmup_steps", 10),
        ("lr_scheduler_type", "constant_with_warmup"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("mask_truncated_completions", False),
        ("reward_threshold", 0.5),
        ("demonstration", "first"),
        ("teacher", "ema"),
        ("teacher_update_rate", 0.05),
        ("divergence", "jsd"),
        ("distillation_topk", 100),
        ("tail", True),
        ("mix_weight", 0.9),
        ("advantage_scale", False),
    ],
)
def test_values_of_every_method(make, routing, field, value):
    assert getattr(make(routing=routing), field) == value


def test_advantage_scale_is_trls_group_scaling(make):
    assert make(advantage_scale=True).scale_rewards == "group"
    assert make(advantage_scale=True, scale_rewards="group").scale_rewards == "group"
    with pytest.raises(ValueError, match="advantage_scale=True.*scale_rewards='batch'"):
        make(advantage_scale=True, scale_rewards="batch")


def test_thinking_can_be_turned_on(make):
    assert make(chat_template_kwargs={"enable_thinking": True}).chat_template_kwargs == {"enable_thinking": True}


@pytest.mark.parametrize("given", [{"custom": 1}, '{"custom": 1}'], ids=["dict", "json"])
def test_thinking_stays_off_beside_other_options_of_the_template(make, given):
    assert make(chat_template_kwargs=given).chat_template_kwargs == {"enable_thinking": False, "custom": 1}
    assert make(chat_template_kwargs={}).chat_template_kwargs == {"enable_thinking": False}


# --- what it refuses ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("routing", ["spro", "", "SRPO"]),
        ("teacher", ["mean"]),
        ("demonstration", ["last"]),
        ("divergence", ["kl"]),
        ("mix_weight", [-0.1, 1.1, math.nan, None]),
        ("teacher_update_rate", [0.0, 1.5, math.nan]),
        ("entropy_beta", [-1.0, math.nan, math.inf]),
        ("reward_threshold", [math.nan, math.inf, None]),
        ("max_prompt_length", [0]),
        ("max_reprompt_length", [-1]),
        ("doctor_steps", [-1]),
        ("num_generations", [0, 1, 2.5, math.nan, None]),
        ("distillation_topk", [0, 1.5]),
        ("reprompt_template", [None]),
        ("temperature", [0.0, math.nan]),
        ("top_p", [2.0]),
        ("epsilon", [-0.1]),
        ("epsilon_high", [math.nan]),
        ("delta", [0.5]),
        ("vllm_importance_sampling_clip_max", [math.nan, 0.0]),
        ("num_train_epochs", [math.nan, 0.0]),
        ("adam_beta2", [2, math.nan]),
        ("weight_decay", [math.nan]),
    ],
)
def test_a_bad_value_is_one_sentence_with_field_rule_and_value(make, field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{field} must be .*, got {re.escape(repr(value))}$"):
            make(**{field: value})


def test_a_group_that_does_not_fit_is_said_in_the_fields_that_mend_it(make):
    given = {"num_generations": 6, "per_device_train_batch_size": 8}
    with pytest.raises(ValueError, match=r"^per_device_.* = 8 rollouts .*num_generations=6: set .* a multiple of 3$"):
        make(**given, gradient_accumulation_steps=1)
    make(**given, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="divisible by the global batch size"):  # TRL's other errors
        make(generation_batch_size=9, gradient_accumulation_steps=1, per_device_train_batch_size=8)


def test_the_old_name_of_dtype_is_refused(make):
    for given in ({"torch_dtype": "bfloat16"}, '{"torch_dtype": "bfloat16"}'):
        with pytest.raises(ValueError, match="model_init_kwargs has torch_dtype, which would be ignored: write dtype"):
            make(model_init_kwargs=given)


ONLY_GRPO = [
    ("loss_type", "dr_grpo"),
    ("beta", 0.04),
    ("num_iterations", 2),
    ("importance_sampling_level", "sequence"),
    ("top_entropy_quantile", 0.2),
    ("off_policy_mask_threshold", 0.5),
    ("entropy_coef", 0.01),
    ("cast_lm_head_to_fp32", True),
    ("multi_objective_aggregation", "normalize_then_sum"),
    ("steps_per_generation", 4),
]


@pytest.mark.parametrize("routing", [r for r in objective.ROUTINGS if r != "grpo"])
@pytest.mark.parametrize(("field", "value"), ONLY_GRPO)
def test_what_routing_cannot_be_combined_with(make, routing, field, value):
    with pytest.raises(ValueError, match=rf"^{field}\b.*must .*routing='{routing}'"):
        make(routing=routing, **{field: value})


@pytest.mark.parametrize(("field", "value"), ONLY_GRPO)
def test_grpo_takes_all_that_trl_takes(make, field, value):
    assert getattr(make(routing="grpo", **{field: value}), field) == value


# --- documentation and command line ----------------------------------------------------------------


def test_every_field_is_documented_with_its_default_and_has_a_help_text():
    text, fields = inspect.getdoc(SRPOConfig), {f.name: f for f in dataclasses.fields(SRPOConfig)}
    for name in OWN:
        field = fields[name]
        assert field.metadata["help"]
        entry = re.search(rf"^ +{name} \((.*)\):$", text, re.M)
        assert entry, name
        default = repr(field.default).replace("'", '"')
        assert field.default is None or f"defaults to `{default}`" in entry[1], name


def test_fields_come_from_the_command_line():
    fields = {
        "output_dir": "out",
        "use_cpu": "true",
        "bf16": "false",
        "routing": "sdpo",
        "tail": "false",
        "entropy_beta": "0.5",
        "teacher": "frozen",
        "divergence": "reverse_kl",
    }
    arguments = [f"--{name}={value}" for name, value in fields.items()]
    (config,) = HfArgumentParser(SRPOConfig).parse_args_into_dataclasses(arguments)
    assert (config.routing, config.tail, config.entropy_beta) == ("sdpo", False, 0.5)
    assert (config.teacher, config.divergence, config.learning_rate) == ("frozen", "reverse_kl", 1e-5)
