"""The doctor line: the figures that show a silent failure, in one line and in words."""

from collections.abc import Mapping

import torch
from transformers import TrainerCallback

from .objective import mean_over_tokens

FIGURES = (
    ("va/mean", "VA mean {:.4f}"),
    ("va/positive_share", "tokens with VA > 0: {:.0%}"),
    ("va/top10_mass", "top 10 % of tokens hold {:.0%} of VA"),
    ("va/group_sigma", "VA sigma among siblings {:.2g}"),
    ("va/weight_max", "largest rollout weight {:.2f}"),
    ("va/zero_in_high", "zero-VA tokens in the high group {:.0%}"),
    ("kl/high", "KL high {:.4f}"),
    ("kl/low", "KL low {:.4f}"),
    ("entropy", "entropy {:.3f}"),
    ("completions/mean_length", "rollout length {:.0f}"),
    ("completions/clipped_ratio", "truncated {:.0%}"),
    ("va/null", "VA between equal images {:.2g}"),
    ("va/cells", "cells of the degraded image {:.0f}"),
    ("sampling/logps_gap", "student/vLLM logps gap {:.2g}"),
)


def diagnose(logs: Mapping[str, float]) -> list[str]:
    """Warnings in words for a mapping of logged metrics; empty when nothing looks wrong."""
    logs = {name: value for name, value in logs.items() if value is not None}  # TRL's mean of nothing
    checks = (
        (
            logs.get("va/positive_share", 1.0) == 0,
            "VA is 0 on every token: the teacher ignores the image, or the degraded view equals the true one",
        ),
        (
            logs.get("va/zero_in_high", 0.0) > 0.5,
            "most tokens of the high-VA group have VA 0: rollouts hold fewer visual tokens than top_fraction selects",
        ),
        (
            logs.get("completions/clipped_ratio", 0.0) > 0.5,
            "most rollouts are truncated: raise max_completion_length or check the prompt template",
        ),
        (logs.get("entropy", 1.0) < 0.01, "the student's entropy has collapsed: lower learning_rate"),
        (
            logs.get("va/null", 0.0) > 1e-3,
            "the teacher's log-probabilities differ between two passes over equal images: VA measures that noise too",
        ),
        (
            0 < logs.get("va/cells", 4.0) < 4,
            "the degraded image has fewer than 4 cells: images are too small for degradation_ratio",
        ),
        (
            logs.get("sampling/logps_gap", 0.0) > 0.1,  # rounding to bfloat16 makes about 0.01
            "student and vLLM disagree on the rollouts' log-probabilities: check the weight sync and, on a vLLM "
            "server, --logprobs-mode processed_logprobs",
        ),
    )
    return [message for failed, message in checks if failed]


def va_figures(
    va: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    high: torch.Tensor,
    has_va: torch.Tensor,
    num_generations: int,
) -> dict[str, float]:
    """The `va/` metrics of an optimizer step, of rows with a VA; `va/zero_in_high` only where some rollout has a
    high-VA group.

    Args:
        va, mask, high: (B, T) VA, response tokens, high-VA groups (empty in a row without one).
        weights, has_va: (B,) rollout weights, and bool, which rows have a VA, those with an image: some of them.
        num_generations: K; siblings are consecutive rows.
    """
    tokens, means = va[mask.bool() & has_va[:, None]], mean_over_tokens(va, mask)[has_va]
    sorted_va = tokens.sort(descending=True).values
    top = sorted_va[: max(1, round(0.1 * len(sorted_va)))].sum() / sorted_va.sum().clamp(min=1e-12)
    figures = {
        "va/mean": tokens.mean(),
        "va/positive_share": (tokens > 0).float().mean(),
        "va/top10_mass": top,
        "va/weight_min": weights[has_va].min(),
        "va/weight_max": weights[has_va].max(),
        "va/group_sigma": means.view(-1, num_generations).std(1, correction=0).mean(),
    }
    if high.any():
        figures["va/zero_in_high"] = (va[high] == 0).float().mean()
    return {name: value.item() for name, value in figures.items()}


class DoctorCallback(TrainerCallback):
    """Prints the doctor line at the first log and then about every `every` steps; a warning in words as soon as it is
    due, once a line."""

    def __init__(self, every: int):
        self.every, self.next_step = every, 0
        self.said: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        if state.global_step >= self.next_step:
            self.next_step, self.said = state.global_step + self.every, set()
            figures = [text.format(logs[name]) for name, text in FIGURES if logs.get(name) is not None]
            print(f"[doctor] step {state.global_step}: " + "; ".join(figures), flush=True)
        for message in diagnose(logs):
            if message not in self.said:
                print(f"[doctor] WARNING: {message} (step {state.global_step})", flush=True)
                self.said.add(message)
