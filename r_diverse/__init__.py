"""R-Diverse (arXiv 2602.13103) on TRL's `GRPOTrainer`, with R-Zero (arXiv 2508.05004) as its baseline."""

from importlib import import_module
from typing import Any

_MODULES = {
    "config": ("ChallengerConfig", "RDiverseConfig", "SolverConfig"),
    "memory": ("MemoryBank",),
    "objective": (
        "bleu_repetition_penalty",
        "bleu_similarity",
        "challenger_reward",
        "drop_reason",
        "lowest_valid_reward",
        "memory_penalty",
        "repetition_penalty",
        "replay_count",
        "scatter_penalty",
        "self_consistency",
        "uncertainty",
    ),
    "questions": ("challenger_prompt", "read_challenge", "solver_prompt"),
    "skills": ("SkillEncoder",),
    "reward": ("ChallengerReward",),
    "trainer": ("PhaseTrainer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Imports a name's module when it is first used: the bank and the rewards need neither torch nor TRL."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
