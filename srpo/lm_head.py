"""From last hidden states to what SRPO needs: logits of a tile, and log-probabilities of sampled tokens."""

from itertools import pairwise
from typing import NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from ._trl import ChunkedLogProbFunction, addmm_fp32, compute_dtype, maybe_gather_lm_head_ctx, project

VOCABULARY_TILE = 32768


class LMHead(NamedTuple):
    """The output projection of a model and what the model does to its logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: torch.Tensor, out: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Writes the float32 logits (N, V) of (N, H) hidden states, divided by the sampling temperature, to `out`.

        Multiplied in autocast's dtype, where there is one, and without a gradient.
        """
        dtype = compute_dtype(hidden)
        hidden = hidden.to(dtype)
        for start, end in self._slices():
            project(out[:, start:end], hidden, self.weight, self.bias, start, end, dtype)
        if self.softcap is not None:
            return out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / temperature)
        return out if self.scale == temperature else out.mul_(self.scale / temperature)

    def whole_logits(self, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """(N, V) float32 logits of (N, H) hidden states, with gradient: for a loss of one's own."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.scale * torch.nn.functional.linear(hidden.float(), self.weight.float(), bias)
        return (logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)) / temperature

    def pull_back(
        self,
        grad_logits: torch.Tensor,
        hidden: torch.Tensor,
        grad_hidden: torch.Tensor | None,
        grad_weight: torch.Tensor | None,
        grad_bias: torch.Tensor | None,
    ) -> None:
        """Backward of the products with the head, before scale and cap: adds the gradients to the given float32
        buffers; None is skipped.

        Args:
            grad_logits: (N, V) of the products.
            hidden: (N, H) states of which the products were.
            grad_hidden: (N, H) buffer for the gradient of the states.
            grad_weight, grad_bias: (V, H) and (V,) buffers for those of the head.
        """
        dtype = compute_dtype(hidden)
        hidden = hidden.to(dtype)
        for start, end in self._slices():
            tile = grad_logits[:, start:end].to(dtype)
            if grad_hidden is not None:
                addmm_fp32(grad_hidden, tile, self.weight[start:end].to(dtype))
            if grad_weight is not None:
                addmm_fp32(grad_weight[start:end], tile.t(), hidden)
            if grad_bias is not None:
                grad_bias[start:end] += grad_logits[:, start:end].sum(0)

    def _slices(self) -> list[tuple[int, int]]:
        """(start, end) pieces of the vocabulary, so that no copy of the whole head is made in another dtype."""
        return list(pairwise([*range(0, len(self.weight), VOCABULARY_TILE), len(self.weight)]))

    def gathered(self):
        """Context in which the weights are whole under ZeRO-3."""
        return maybe_gather_lm_head_ctx(self.weight, self.bias)


def last_hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, L, H) of (B, L) tokens. The head predicts a token from the states before it."""
    if is_peft_model(model):
        model = model.get_base_model()
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def lm_head(model: PreTrainedModel) -> LMHead:
    """The (V, H) head of a model. Under FSDP2 it is unsharded here: FSDP2 does so only when the head itself is called.

    Raises `ValueError` for a quantized one.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if not head.weight.is_floating_point():
        raise ValueError("lm_head is quantized, but the loss reads its weight: name it in llm_int8_skip_modules")
    if isinstance(head, FSDPModule):
        head.unshard()
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
