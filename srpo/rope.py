"""The frequencies of RoPE in models that were loaded under ZeRO-3."""

from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def exact_frequencies(*models: nn.Module | None) -> None:
    """Under ZeRO-3, computes the frequencies of the models' rotary embeddings anew, in float32.

    While a model is loaded there in bf16, DeepSpeed rounds all new tensors to bfloat16, the frequencies too: by up to
    0.4 %, which is radians at a thousand tokens. Training would be of another function than sampling and evaluation.
    """
    if is_deepspeed_zero3_enabled():
        for module in (module for model in models if model is not None for module in model.modules()):
            if "RotaryEmbedding" in type(module).__name__ and hasattr(module, "config"):
                for name, exact in type(module)(module.config).named_buffers():
                    setattr(module, name, exact.to(getattr(module, name).device))
