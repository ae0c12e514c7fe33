"""From last hidden states to what SRPO needs, without ever holding (B, T, V) logits."""

from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ._trl import ChunkedLogProbFunction, maybe_gather_lm_head_ctx

VOCABULARY_TILE = 32768


class LMHead(NamedTuple):
    """The output projection of a model and what the model does to its logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, V) float32 logits of a chunk of (N, H) hidden states."""
        logits = torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype), self.bias).float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def detach(self) -> "LMHead":
        """Without gradient to the weights."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(weight=self.weight.detach(), bias=bias)

    def gathered(self):
        """Context in which the weights are whole under ZeRO-3."""
        return maybe_gather_lm_head_ctx(self.weight, self.bias)


def lm_head(model: PreTrainedModel) -> LMHead:
    """The (V, H) head of a model."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    return LMHead(
        head.weight, getattr(head, "bias", None), logit_scale(config), getattr(config, "final_logit_softcapping", None)
    )


def logit_scale(config: PretrainedConfig) -> float:
    """What the model multiplies its logits with, under the names that TRL knows."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def sampled_logps(
    head: LMHead, hidden: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `tokens` (N,) and entropies, (N,) each in nats, from `hidden` (N, H), by TRL's kernel.

    The same kernel as in `GRPOTrainer`, so that `routing="grpo"` and the GRPO branch of SRPO agree to the bit.
    """
    with head.gathered():
        logps, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden,
            head.weight,
            head.bias,
            tokens,
            temperature,
            VOCABULARY_TILE,
            head.softcap,
            head.scale,
            ("log_probs", "entropy"),
        )
    return logps, entropy
