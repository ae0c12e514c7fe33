"""The figures that show a silent failure: routes, teacher entropy, lengths; one line now and then, and in words."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from transformers import TrainerCallback

from .objective import Routing

LENGTH = "completions/mean_length"
FIGURES = (
    ("reward", "reward {:.3f}"),
    ("reward_std", "spread {:.2f}"),
    ("route/correct", "correct {:.0%}"),
    ("route/sdpo", "to SDPO {:.0%}"),
    ("route/teacher_available", "teacher available {:.0%}"),
    ("route/all_wrong_groups", "groups all wrong {:.0%}"),
    ("route/all_correct_groups", "all correct {:.0%}"),
    ("teacher/entropy", "teacher entropy {:.3f}"),
    ("teacher/distance", "teacher-policy distance {:.2g}"),
    ("loss/sdpo", "divergence {:.4f}"),
    ("entropy", "entropy {:.3f}"),
    (LENGTH, "length {:.0f}"),
    ("completions/clipped_ratio", "truncated {:.0%}"),
    ("sampling/sampling_logp_difference/mean", "train/rollout logps gap {:.2g}"),
)


def routing_figures(
    routes: Routing, distill: torch.Tensor, grpo: torch.Tensor, lengths: torch.Tensor, num_generations: int
) -> dict[str, float]:
    """The `route/` metrics (Fig. 5) and lengths of a generation batch over all ranks, from (B,) tensors.

    `distill` and `grpo` are the rows with the distillation and the GRPO loss, `lengths` those of the rollouts as
    they were generated.
    """
    correct = routes.correct
    solved = correct.view(-1, num_generations).float().mean(1)
    figures = {
        "route/correct": correct,
        "route/sdpo": distill,
        "route/grpo": grpo,
        "route/teacher_available": routes.has_sibling,
        "route/lone_success": correct & ~routes.has_sibling,
        "route/all_wrong_groups": solved == 0,
        "route/all_correct_groups": solved == 1,
    }
    figures = {name: value.float().mean().item() for name, value in figures.items()}
    lengths = lengths.float()
    for name, rows in (("correct", correct), ("wrong", ~correct)):
        if rows.any():
            figures[f"length/{name}"] = lengths[rows].mean().item()
    return figures


def weight_figures(entropy: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """Quantiles of teacher entropy (nats) and entropy weights over the routed tokens; none without such tokens."""
    mask = mask.bool()
    if not mask.any():
        return {}
    figures = {"teacher/entropy": entropy[mask].mean().item()}
    for name, values in (("teacher/entropy", entropy[mask]), ("weight", weights[mask])):
        # numpy's: torch.quantile takes no more than 16 million values
        for level, value in zip((10, 50, 90), np.percentile(values.cpu().numpy(), (10, 50, 90)), strict=True):
            figures[f"{name}_p{level}"] = float(value)
    return figures


def diagnose(logs: Mapping[str, float], first_length: float = 0.0) -> list[str]:
    """Warnings in words for logged metrics, given the mean length at the first log; empty when all looks well."""
    logs = {name: value for name, value in logs.items() if value is not None}  # TRL's mean of nothing
    checks = (
        (
            logs.get("route/all_wrong_groups", 0.0) > 0.8,
            "more than 80 % of the groups hold no correct rollout: nothing in them is distilled, and GRPO learns only "
            "from rewards that differ; use easier prompts, a stronger policy, or check the reward",
        ),
        (
            logs.get("route/all_correct_groups", 0.0) > 0.9,
            "more than 90 % of the groups are all correct: the data is solved, nothing is left to learn",
        ),
        (
            logs.get("completions/clipped_ratio", 0.0) > 0.5,
            "most rollouts are truncated: raise max_completion_length or check the prompt template",
        ),
        (
            logs.get(LENGTH, math.inf) < 0.2 * first_length,
            "rollouts are five times shorter than at the start: where the task asks for reasoning, it has collapsed",
        ),
        (logs.get("entropy", 1.0) < 0.01, "the policy's entropy has collapsed: lower learning_rate"),
        (
            logs.get("sampling/sampling_logp_difference/mean", 0.0) > 0.1,
            "trainer and generation engine disagree on the rollouts' log-probabilities: check the weight sync and, on "
            "a vLLM server, --logprobs-mode processed_logprobs",
        ),
    )
    return [message for failed, message in checks if failed]


class DoctorCallback(TrainerCallback):
    """Prints the doctor line at the first log and then about every `every` steps; a warning in words as soon as it is
    due, once a line."""

    def __init__(self, every: int):
        self.every, self.next_step = every, 0
        self.said: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "route/sdpo" not in (logs or {}):
            return
        if state.global_step >= self.next_step:
            self.next_step, self.said = state.global_step + self.every, set()
            figures = [text.format(logs[name]) for name, text in FIGURES if logs.get(name) is not None]
            print(f"[doctor] step {state.global_step}: " + "; ".join(figures), flush=True)
        # A resumed run has the logs from before
        first_length = next((log[LENGTH] for log in state.log_history if log.get(LENGTH)), 0.0)
        for message in diagnose(logs, first_length):
            if message not in self.said:
                print(f"[doctor] WARNING: {message} (step {state.global_step})", flush=True)
                self.said.add(message)
