"""The values of R-Diverse and R-Zero (section 5 of the specification), and what is refused."""

import dataclasses
import inspect
import re

import pytest
from trl import GRPOTrainer

from r_diverse import ChallengerConfig, RDiverseConfig, SolverConfig
from r_diverse.config import LOSSES


@pytest.fixture
def make(tmp_path):
    return lambda cls, **fields: cls(str(tmp_path), use_cpu=True, bf16=False, **fields)


@pytest.mark.parametrize("cls", [ChallengerConfig, SolverConfig])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 0.01),
        ("epsilon", 0.2),
        ("epsilon_high", 0.3),
        ("delta", 3.0),
        ("loss_type", "grpo"),
        ("scale_rewards", "group"),
        ("temperature", 1.0),
        ("top_p", 0.99),
        ("max_completion_length", 4096),
        ("vllm_importance_sampling_correction", False),
        ("learning_rate", 1e-6),
        ("lr_scheduler_type", "constant"),
        ("warmup_steps", 0),
        ("weight_decay", 0.01),
        ("max_grad_norm", 1.0),
        ("adam_beta1", 0.9),
        ("adam_beta2", 0.999),
        ("sync_ref_model", False),
        ("num_iterations", 1),
    ],
)
def test_values_of_both_phases(make, cls, field, value):
    assert getattr(make(cls), field) == value


def test_sizes_of_the_phases(make):
    """5 and 15 generation batches, each of four optimizer steps; 512 x 4 and 512 x 5 rollouts."""
    challenger = make(ChallengerConfig, per_device_train_batch_size=4, gradient_accumulation_steps=128)
    assert (challenger.num_generations, challenger.max_steps) == (4, 20)
    assert challenger.generation_batch_size == 2048
    solver = make(SolverConfig, per_device_train_batch_size=4, gradient_accumulation_steps=160)
    assert (solver.num_generations, solver.max_steps) == (5, 60)
    assert solver.generation_batch_size == 2560
    assert challenger.steps_per_generation == 4 * challenger.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iterations", 5),
        ("penalty", "r_diverse"),
        ("measure", "sam"),
        ("alpha", 1.0),
        ("beta", 1.0),
        ("gamma", 0.5),
        ("tau_max", 0.5),
        ("tau_mean", 0.25),
        ("distance_threshold", 0.5),
        ("bleu_threshold", 0.5),
        ("m_reward", 10),
        ("m_label", 10),
        ("low", 0.3),
        ("high", 0.8),
        ("candidates", 8000),
        ("min_questions", 512),
        ("replay_fraction", 0.3),
        ("gate_samples", 0),
        ("alarm", "off"),
        ("alarm_cluster", 0.9),
        ("boxed_only", True),
        ("chat_template_kwargs", {}),
        ("server_tensor_parallel", 1),
        ("max_model_len", None),
        ("question_temperature", 1.0),
        ("question_top_p", 0.95),
        ("question_tokens", 4096),
        ("coder_chat", True),
        ("r_zero_words", True),
        ("answer_temperature", 1.0),
        ("answer_top_p", 1.0),
        ("answer_top_k", 40),
        ("answer_tokens", 4096),
        ("coder", "Qwen/Qwen2.5-Coder-7B-Instruct"),
        ("encoder", "jinaai/jina-code-embeddings-1.5b"),
    ],
)
def test_values_of_the_run(field, value):
    assert getattr(RDiverseConfig("model"), field) == value


@pytest.mark.parametrize("penalty", ["r_zero", "none"])
def test_the_baselines_have_no_replay(penalty):
    assert RDiverseConfig("model", penalty=penalty).replay_fraction == 0
    assert RDiverseConfig("model", penalty=penalty, replay_fraction=0.0).replay_fraction == 0
    with pytest.raises(ValueError, match=rf"replay_fraction=0.2 needs penalty='r_diverse', got penalty='{penalty}'"):
        RDiverseConfig("model", penalty=penalty, replay_fraction=0.2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"penalty": "bleu"}, "penalty must be one of r_diverse, r_zero, none, got 'bleu'"),
        ({"measure": "text"}, "measure must be one of"),
        ({"measure": "question", "penalty": "r_zero"}, "measure='question' needs penalty='r_diverse'"),
        ({"alarm": "loud"}, "alarm must be one of"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"m_reward": 1}, "m_reward must be at least 2"),
        ({"m_label": 1}, "m_label must be at least 2"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"max_rounds": 0}, "max_rounds must be at least 1"),
        ({"engine": "vllm", "max_model_len": 4096}, "is for prompt and answer together"),
        ({"low": 0.9}, r"low must be in \[0, high\]"),
        ({"high": 0.2}, r"low must be in \[0, high\], with high=0.2, got 0.3"),
        ({"high": 1.1}, "high must be at most 1"),
        ({"high": "0.8"}, "high must be at most 1, got '0.8'"),
        ({"boxed_only": "false"}, "boxed_only must be true or false, got 'false'"),
        ({"r_zero_words": None}, "r_zero_words must be true or false"),
        ({"coder_chat": "no"}, "coder_chat must be true or false"),
        ({"replay_fraction": 1.0}, r"replay_fraction must be in \[0, 1\)"),
        ({"alpha": -1.0}, "alpha must be at least 0"),
        ({"beta": float("nan")}, "beta must be at least 0"),
        ({"alpha": float("inf")}, "alpha must be at least 0 and finite"),
        ({"alpha": "1"}, "alpha must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"candidates": 10.5}, "candidates must be at least 1, and whole"),
        ({"m_reward": 2.5}, "m_reward must be at least 2"),
        ({"engine_batch": 0}, "engine_batch must be at least 1"),
        ({"answer_tokens": 0}, "answer_tokens must be at least 1"),
        ({"eval_samples": -1}, "eval_samples must be at least 1"),
        ({"question_temperature": float("nan")}, "question_temperature must be at least 0 and finite"),
        ({"answer_temperature": -1.0}, "answer_temperature must be at least 0"),
        ({"question_top_p": -1.0}, r"question_top_p must be in \(0, 1\]"),
        ({"answer_top_k": -1}, "answer_top_k must be at least 0"),
        ({"answer_top_k": 1.5}, "answer_top_k must be at least 0, which is off, and whole, got 1.5"),
        ({"gpus": 1.5}, "gpus must be at least 0, and whole, got 1.5"),
        ({"gate_samples": 0.5}, "gate_samples must be at least 0, and whole"),
        ({"eval_limit": 0}, "eval_limit must be at least 1, and whole, or none, got 0"),
        ({"engine_memory": 1.5}, r"engine_memory must be in \(0, 1\], got 1.5"),
        ({"reward_memory": 0.0}, r"reward_memory must be in \(0, 1\], got 0.0"),
        ({"alarm_duplicates": float("nan")}, r"alarm_duplicates must be in \[0, 1\], got nan"),
        ({"alarm_cluster": -1.0}, r"alarm_cluster must be in \[0, 1\]"),
        ({"alarm_yield": 2.0}, r"alarm_yield must be in \[0, 1\]"),
        ({"alarm_labels": 50}, r"alarm_labels must be in \[0, 1\], got 50"),
        ({"alarm_entropy": -0.1}, "alarm_entropy must be at least 0"),
        ({"model": None}, "model must name a model or its folder, got None"),
        ({"model": ""}, "model must name a model or its folder, got ''"),
        ({"solver_system": None}, "solver_system must be a text, got None"),
        ({"challenger_user": ["Write."]}, r"challenger_user must be a text, got \['Write.'\]"),
        ({"benchmarks": None}, "benchmarks must be a text, got None"),
        ({"chat_template_kwargs": "thinking"}, "chat_template_kwargs must be a mapping such as .* got 'thinking'"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be a mapping"),
        ({"max_model_len": 0}, "max_model_len must be at least 1, and whole, or none"),
        ({"server_tensor_parallel": 0}, "server_tensor_parallel must be at least 1"),
        (
            {"server_tensor_parallel": 8, "gpus": 8, "engine": "vllm"},
            "server_tensor_parallel=8 does not divide 4, the GPUs that serve in one of the stages with gpus=8",
        ),
        ({"server_tensor_parallel": 2, "gpus": 1, "engine": "vllm"}, "server_tensor_parallel=2 does not divide 1"),
        ({"gamma": 1.5}, "gamma=1.5 is outside"),
        ({"tau_max": 2.0}, "tau_max=2.0 is outside"),
        ({"distance_threshold": 0.0}, "distance_threshold must be in"),
        ({"bleu_threshold": 1.1}, r"bleu_threshold must be in \(0, 1\], the range of 1 - BLEU, got 1.1"),
    ],
)
def test_bad_values_are_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        RDiverseConfig(**{"model": "model", **fields})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be false: .*, got True"),
        ({"num_generations": 2.5}, "num_generations must be at least 2, and whole"),
        ({"max_steps": -1}, "max_steps must be at least 1"),
        ({"num_generations": 0}, "num_generations must be at least 2"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"max_completion_length": None}, "max_completion_length must be at least 1, and whole, got None"),
        ({"steps_per_generation": -1}, "steps_per_generation must be at least 1, and whole, or none"),
        ({"generation_batch_size": 0}, "generation_batch_size must be at least 1, and whole, or none"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0 and finite"),
        ({"beta": -0.01}, "beta must be at least 0 and finite, got -0.01"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"save_steps": float("inf")}, "save_steps must be at least 0 and finite"),
        ({"delta": 0.5}, "delta must be above 1, or none"),
        ({"loss_type": "grop"}, "loss_type must be one of grpo, bnpo, .*, got 'grop'"),
        ({"scale_rewards": "False"}, "scale_rewards must be one of group, batch, none, True, False, got 'False'"),
        ({"importance_sampling_level": "Token"}, "importance_sampling_level must be one of token, sequence"),
        ({"num_iterations": 2}, "save_steps=4 must be a multiple of the 8 optimizer steps"),
        ({"num_generations": 3}, "16 rollouts of a generation batch .* num_generations=3: set .* a multiple of 3"),
        ({"model_init_kwargs": {"torch_dtype": "float32"}}, "model_init_kwargs has torch_dtype"),
        ({"save_steps": 6}, "save_steps=6 must be a multiple of the 4 optimizer steps"),
        (
            {"use_vllm": True, "vllm_max_model_length": 4096},
            "vllm_max_model_length=4096 is for prompt and rollout together, and max_completion_length alone is 4096",
        ),
    ],
)
def test_bad_phases(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(ChallengerConfig, **fields)


def test_the_losses_are_trls(make):
    source = inspect.getsource(GRPOTrainer._compute_loss)
    tests = re.findall(r"self\.loss_type (?:==|in) (.*?):\n", source)
    assert {name for test in tests for name in re.findall(r'"(\w+)"', test)} == set(LOSSES)
    for name in LOSSES:
        assert make(SolverConfig, loss_type=name).loss_type == name
    assert make(SolverConfig, scale_rewards=False).scale_rewards == "none"


def test_a_context_of_vllm_that_holds_a_rollout_or_is_not_used(make):
    for context, fields in ((4097, {"use_vllm": True}), (10, {"use_vllm": True, "vllm_mode": "server"}), (10, {})):
        make(ChallengerConfig, vllm_max_model_length=context, **fields)


def test_every_field_of_the_run_is_described():
    fields = dataclasses.fields(RDiverseConfig)
    lines = inspect.getdoc(RDiverseConfig).splitlines()
    heads = [line for line in lines if line.endswith(":") and line.startswith(" " * 4)]
    described = {word.strip() for head in heads for word in head.partition("(")[0].strip(" :").split(",")}
    assert {field.name for field in fields} <= described


def test_the_gpus_that_train_beside_servers():
    for gpus, engine, expected in ((8, "vllm", 4), (5, "vllm", 2), (1, "vllm", 1), (8, "transformers", 8)):
        assert RDiverseConfig("model", gpus=gpus, engine=engine).trainer_gpus == expected
    RDiverseConfig("model", gpus=8, engine="vllm", server_tensor_parallel=4)
