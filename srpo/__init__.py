"""Sample-Routed Policy Optimization (arXiv 2604.02288) on TRL's `GRPOTrainer`."""

from .config import SRPOConfig
from .objective import (
    Routing,
    entropy_weights,
    group_advantages,
    grpo_token_loss,
    jsd_topk_tail,
    route,
    srpo_loss,
    teacher_entropy,
    teacher_prompt,
)
from .trainer import SRPOTrainer

__all__ = [
    "Routing",
    "SRPOConfig",
    "SRPOTrainer",
    "entropy_weights",
    "group_advantages",
    "grpo_token_loss",
    "jsd_topk_tail",
    "route",
    "srpo_loss",
    "teacher_entropy",
    "teacher_prompt",
]
