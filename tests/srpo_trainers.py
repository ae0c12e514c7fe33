"""For the tests of `SRPOTrainer`: a tiny Qwen3, data, rewards, trainers, steps, the loss in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer
from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

from common.tiny import tiny_qwen3
from srpo import SRPOConfig, SRPOTrainer

ROUTED = ("srpo", "sdpo", "sdpo_incorrect", "sdpo_correct", "mix")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False}


def policy(seed: int = 0, sharp: float = 3.0):
    model, tokenizer = tiny_qwen3(hidden=32, seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharp)  # a random model is all but uniform
    return model, tokenizer


def rows(n: int = 4) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": f"Q{i}" + "?" * (1 + i % 3)}], "answer": i} for i in range(n)]


def mixed_reward(completions, **columns) -> list[float]:
    """Depends on the first letter: about two thirds of the rollouts are correct."""
    return [float(ord(c[0]["content"][0]) % 3 != 0) for c in completions]


def always(value: float):
    def reward(completions, **columns) -> list[float]:
        return [value] * len(completions)

    return reward


def build(output_dir, data=None, reward=mixed_reward, model=None, cls=SRPOTrainer, config=SRPOConfig, **overrides):
    """Two prompts times four rollouts a step."""
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if config is SRPOConfig:
        defaults["doctor_steps"] = 0
    callbacks, peft_config = overrides.pop("callbacks", None), overrides.pop("peft_config", None)
    model, tokenizer = model or policy()
    return cls(
        model,
        reward,
        args=config(**{**defaults, **overrides}),
        train_dataset=Dataset.from_list(data or rows()),
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=peft_config,
    )


def fixed_rollouts(monkeypatch) -> None:
    """Completions that depend on the prompt and the sibling's number only: 1 to 6 letters and an end of sequence."""

    def generate(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        start = len(prompt_ids) * self.accelerator.process_index
        rollouts = []
        for row, ids in enumerate(prompt_ids):
            rng = np.random.default_rng([sum(ids), (start + row) % num_generations])
            rollouts.append([*rng.integers(10, 100, rng.integers(1, 7)).tolist(), self._tokenizer.eos_token_id])
        return rollouts, None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)


def step(trainer, inputs=None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step, without the update."""
    accumulation = trainer.args.gradient_accumulation_steps
    trainer.current_gradient_accumulation_steps = accumulation
    inputs = next(iter(trainer.get_train_dataloader())) if inputs is None else inputs
    trainer.model.train()
    trainer.model.zero_grad()
    loss = sum(trainer.training_step(trainer.model, inputs, None).item() for _ in range(accumulation))
    return loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same_step(a, b, tolerance: float = 1e-6) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5, abs=1e-7)
    assert a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        torch.testing.assert_close(gradient, b[1][name], rtol=1e-4, atol=tolerance)


# --- references ----------------------------------------------------------------


def response_logits(model, prompt_ids: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """(T, V) float64 logits of a response, from the model's public forward on this row alone."""
    ids = torch.tensor([prompt_ids + response], device=model.device)
    return model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].double() / temperature


def reference_loss(
    trainer, routing: str, beta: float, temperature: float = 1.0, masks: list[list[int]] | None = None
) -> torch.Tensor:
    """The equations of the paper row by row, full logits, float64; divergence by TRL's own function, by the settings.

    `masks`: 0 on the tokens of each rollout that the policy has not written.
    """
    kept, args = trainer._rollouts, trainer.args
    rewards, responses = kept["rewards"].tolist(), kept["completion_ids"]
    texts = trainer._tokenizer.batch_decode(responses, skip_special_tokens=True)
    model, teacher, tokenizer = trainer.model, trainer.teacher.model, trainer._tokenizer
    grpo, sdpo, entropies, distilled = [], [], [], []
    for i, response in enumerate(responses):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        donors = [j for j in group if j != i and rewards[j] >= 0.5]
        correct = rewards[i] >= 0.5
        advantage = rewards[i] - sum(rewards[j] for j in group) / 4
        prompt = kept["prompts"][i]
        own = torch.tensor(masks[i] if masks else [1] * len(response), device=model.device).double()
        student = response_logits(
            model,
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"],
            response,
            temperature,
        )
        logps = student.log_softmax(-1).gather(1, torch.tensor(response, device=student.device)[:, None])[:, 0]
        grpo.append(-(logps - logps.detach()).exp() * advantage * own)
        routed = (
            bool(donors and own.any())
            and {
                "srpo": not correct,
                "sdpo": True,
                "sdpo_incorrect": not correct,
                "sdpo_correct": correct,
                "mix": True,
            }[routing]
        )
        distilled.append(routed)
        if not routed:
            sdpo.append(0 * logps)
            continue
        question = prompt[0]["content"]
        text = f"{question}\nCorrect solution:\n\n{texts[donors[0]]}\n\nCorrectly solve the original question."
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)[
            "input_ids"
        ]
        with torch.no_grad():
            scored = response_logits(teacher, ids, response, temperature)
        p = scored.softmax(-1)
        entropies.append((i, -(p * p.log()).sum(-1), own))
        divergence = compute_topk_self_distillation_loss(
            student,
            scored,
            distillation_topk=args.distillation_topk,
            distillation_alpha={"jsd": 0.5, "reverse_kl": 1.0, "forward_kl": 0.0}[args.divergence],
            distillation_add_tail=args.tail,
        )
        sdpo.append(divergence * own)
    raw = {i: (-beta * h).exp() for i, h, _ in entropies}
    mean = torch.cat([raw[i][own.bool()] for i, _, own in entropies]).mean()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for i, routed in enumerate(distilled):
        weighted = raw[i] / mean * sdpo[i] if routed else sdpo[i]
        if routing == "mix":
            total = total + (args.mix_weight * grpo[i] + (1 - args.mix_weight) * weighted).sum()
        elif routed:
            total = total + weighted.sum()
        elif routing == "srpo":
            total = total + grpo[i].sum()
    lengths = [sum(mask) for mask in masks] if masks else [len(response) for response in responses]
    counted = [n for n, d in zip(lengths, distilled, strict=True) if d or routing in ("srpo", "mix")]
    return total / sum(counted)
