"""Visual-Advantage On-Policy Distillation (arXiv 2605.21924) on TRL's `DistillationTrainer`."""

from .config import VAOPDConfig
from .objective import (
    coefficients,
    grouped_kl_loss,
    pixelate,
    reverse_kl,
    rollout_weights,
    token_coefficients,
    visual_advantage,
)
from .trainer import VAOPDTrainer

__all__ = [
    "VAOPDConfig",
    "VAOPDTrainer",
    "coefficients",
    "grouped_kl_loss",
    "pixelate",
    "reverse_kl",
    "rollout_weights",
    "token_coefficients",
    "visual_advantage",
]
