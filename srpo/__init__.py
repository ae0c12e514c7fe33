"""Sample-Routed Policy Optimization (arXiv 2604.02288) on TRL's `GRPOTrainer`."""

from importlib import import_module
from typing import Any

_MODULES = {
    "config": ("SRPOConfig",),
    "objective": (
        "Routing",
        "entropy_weights",
        "group_advantages",
        "grpo_token_loss",
        "jsd_topk_tail",
        "route",
        "srpo_loss",
        "teacher_entropy",
        "teacher_prompt",
    ),
    "trainer": ("SRPOTrainer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Imports a name's module when it is first used: the equations need neither TRL nor transformers."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
