"""`SRPOTrainer` and TRL: the signatures it relies on; learning, a golden trajectory."""

import inspect

import numpy as np
import pytest
import torch
from datasets import Dataset
from srpo_trainers import mixed_reward, policy, rows, step
from transformers import Trainer
from trl import GRPOTrainer
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils as trl_utils

from srpo import SRPOTrainer, _trl

# --- the contact with TRL ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (GRPOTrainer._get_train_sampler, "self dataset"),
        (GRPOTrainer._tokenize_prompts, "self prompts"),
        (GRPOTrainer._generate, "self prompts"),
        (
            GRPOTrainer._generate_single_turn,
            "self prompt_ids images multimodal_fields num_generations has_tool_images",
        ),
        (GRPOTrainer._calculate_rewards, "self inputs prompts completions completion_ids_list"),
        (GRPOTrainer._generate_and_score_completions, "self inputs"),
        (GRPOTrainer._prepare_inputs, "self generation_batch"),
        (GRPOTrainer._compute_loss, "self model inputs"),
        (Trainer._save_optimizer_and_scheduler, "self output_dir"),
        (GRPOTrainer._load_optimizer_and_scheduler, "self checkpoint"),
        (
            ChunkedLogProbFunction.forward,
            "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs",
        ),
        (_trl.compute_dtype, "hidden"),
        (_trl.project, "tile hidden_chunk weight bias start end dtype"),
        (_trl.addmm_fp32, "acc a b"),
        (trl_utils.is_async_callable, "func"),
        (trl_utils.maybe_gather_lm_head_ctx, "params"),
        (trl_utils.split_tensor_dict, "tensor_dict num_chunks"),
        (trl_utils.RepeatSampler.__init__, "self data_source mini_repeat_count batch_size repeat_count shuffle seed"),
    ],
)
def test_private_names_of_trl_have_the_signature_that_the_trainer_expects(function, parameters):
    assert list(inspect.signature(inspect.unwrap(function)).parameters) == parameters.split()


def test_every_override_has_trls_parameters():
    for name, function in vars(SRPOTrainer).items():
        upstream = getattr(GRPOTrainer, name, None)
        if not inspect.isfunction(function) or upstream is None or name == "__init__":
            continue
        ours, theirs = (inspect.signature(inspect.unwrap(f)).parameters for f in (function, upstream))
        assert list(ours) == list(theirs), name


def test_the_data_set_is_taken_where_trls_trainer_takes_it(make):
    model, tokenizer = policy()
    arguments = (model, mixed_reward, make().args, Dataset.from_list(rows()))
    assert len(SRPOTrainer(*arguments, processing_class=tokenizer).train_dataset) == 4
    with pytest.raises(ValueError, match="train_dataset has 1 prompts, fewer than the 2"):
        SRPOTrainer(*arguments[:3], Dataset.from_list(rows(1)), processing_class=tokenizer)


def test_rollouts_of_a_base_model_end_with_their_turn(make):
    """As Qwen3-4B-Base has it: `<|endoftext|>` is the only end that model and tokenizer declare. What follows would be
    rewarded, and shown to the self-teacher."""
    model, tokenizer = policy()
    turn_end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    trainer = make(model=(model, tokenizer), max_completion_length=64)
    step(trainer)
    rollouts = trainer._rollouts["completion_ids"]
    assert trainer.eos_token_ids == [tokenizer.eos_token_id, turn_end]
    assert any(ids[-1] == turn_end for ids in rollouts)
    assert not any(turn_end in ids[:-1] for ids in rollouts)


# --- learning ----------------------------------------------------------------


LEARNING = {"lr_scheduler_type": "constant", "weight_decay": 0.0}


@pytest.mark.parametrize("routing", ["srpo", "mix"])
def test_the_policy_learns_from_its_rewards(make, routing):
    """Half of its rollouts start with a letter of even code, then nearly all."""

    def reward(completions, **columns) -> list[float]:
        return [float(bool(text := c[0]["content"]) and ord(text[0]) % 2 == 0) for c in completions]

    settings = {"max_steps": 40, "learning_rate": 2e-2, "per_device_train_batch_size": 32, "num_generations": 8}
    trainer = make(data=rows(8), routing=routing, reward=reward, max_completion_length=2, **LEARNING | settings)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "loss" in log]
    assert sum(rewards[:3]) / 3 < 0.7, rewards
    assert sum(rewards[-5:]) / 5 > 0.85, rewards


def test_the_policy_learns_the_self_teacher(make, fixed):
    """SDPO alone, towards a teacher of other weights that stays as it is, on fixed rollouts."""
    trainer = make(routing="sdpo", teacher="frozen", max_steps=40, learning_rate=3e-3, **LEARNING)
    other = policy(seed=1)[0].state_dict()
    trainer.teacher.model.load_state_dict(other)
    trainer.train()
    losses = [log["loss/sdpo"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3]), losses


# (loss, grad_norm) with torch 2.13.0 on one CPU thread, transformers 5.17.0, trl 1.16.0, Python 3.11, x86-64 AVX-512
GOLDEN = [
    (-0.1292381, 2.2138846),
    (-0.1696981, 1.9126748),
    (-0.1653481, 1.4746188),
    (-0.1270850, 1.3141891),
    (-0.1406267, 1.0512645),
    (-0.1573659, 1.3189962),
    (-0.1408734, 0.7780223),
    (-0.1624491, 1.2805436),
    (-0.1666552, 1.1565793),
    (-0.1406377, 0.7415963),
]


def set_weights(model: torch.nn.Module, seed: int, scale: float) -> None:
    """Fixed weights of every matrix, whatever the library's initialization draws."""
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
            if parameter.ndim > 1:
                values = np.random.default_rng([seed, i]).standard_normal(tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(scale * values))


def test_golden_trajectory(make, fixed):
    """Ten steps on fixed rollouts. A change here is a change of the method, of TRL or of the tiny model."""
    model, tokenizer = policy()
    set_weights(model, 1, 0.3)
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make(model=(model, tokenizer), max_steps=10, learning_rate=3e-3, **LEARNING, **batch)
    trainer.train()
    got = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    assert np.array(got) == pytest.approx(np.array(GOLDEN), rel=1e-3), got
