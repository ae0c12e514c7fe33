"""Visual-Advantage On-Policy Distillation (arXiv 2605.21924) on TRL's `DistillationTrainer`."""

from importlib import import_module
from typing import Any

_MODULES = {
    "config": ("VAOPDConfig",),
    "objective": (
        "coefficients",
        "grouped_kl_loss",
        "pixelate",
        "reverse_kl",
        "rollout_weights",
        "token_coefficients",
        "visual_advantage",
    ),
    "trainer": ("VAOPDTrainer",),
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
