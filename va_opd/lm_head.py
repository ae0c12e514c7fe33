"""The output head of a model: its logits from hidden states, their gradient, log-probabilities of sampled tokens."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from . import objective
from ._trl import addmm_fp32, compute_dtype, maybe_gather_lm_head_ctx, project

# Added to the logits of padded vocabulary rows: exp() of it is exactly 0 in float32, and unlike -inf it keeps
# 0 * (difference of two such logits) at 0
PADDED_ROW_LOGIT = -1e4
VOCABULARY_TILE = 32768


class LMHead(NamedTuple):
    """The output projection of a model and what the model does to its logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def project(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the float32 products (N, V) of (N, H) hidden states with the head, multiplied in autocast's dtype."""
        dtype = compute_dtype(hidden)
        hidden = hidden.to(dtype)
        for start, end in self._slices():
            project(out[:, start:end], hidden, self.weight, self.bias, start, end, dtype)

    def whole_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, V) float32 logits of (N, H) hidden states, with gradient: for a loss of one's own."""
        return objective.head_logits(hidden, self.weight, self.bias, self.scale, self.softcap)

    def pull_back(
        self,
        grad_logits: torch.Tensor,
        hidden: torch.Tensor,
        grad_hidden: torch.Tensor | None,
        grad_weight: torch.Tensor | None,
        grad_bias: torch.Tensor | None,
    ) -> None:
        """Backward of `project`: adds the gradients to the given float32 buffers; None is skipped.

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

    def gathered(self):
        """Context in which the weights are whole under ZeRO-3."""
        return maybe_gather_lm_head_ctx(self.weight, self.bias)

    def _slices(self) -> list[tuple[int, int]]:
        """(start, end) pieces of the vocabulary, so that no copy of a whole head is made in another dtype."""
        return list(pairwise([*range(0, len(self.weight), VOCABULARY_TILE), len(self.weight)]))


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


def without_padding(head: LMHead, num_rows: int, vocab_size: int) -> LMHead:
    """The head with no probability on the rows from `vocab_size`, which only pad the vocabulary to `num_rows`.

    Through the bias, because the kernel takes whole weights. Raises `ValueError` for a model that soft-caps its
    logits, where no bias can do that.
    """
    if num_rows == vocab_size:
        return head
    if head.softcap is not None:
        raise ValueError(
            f"the model soft-caps its logits and pads its vocabulary ({num_rows} rows for {vocab_size} tokens): call "
            f"resize_token_embeddings({vocab_size}) on both models first"
        )
    padding = torch.zeros(num_rows, device=head.weight.device)
    padding[vocab_size:] = PADDED_ROW_LOGIT
    bias = padding if head.bias is None else head.bias + padding
    if is_deepspeed_zero3_enabled():  # the kernel's gather asks it of every weight and bias
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        bias.ds_status = ZeroParamStatus.AVAILABLE
    return head._replace(bias=bias)


def logit_scale(config: PretrainedConfig) -> float:
    """What the model multiplies its logits with, under the names that TRL knows."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def sampled_logps(head: LMHead, hidden: torch.Tensor, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """`objective.sampled_logps` of (N,) tokens from (N, H) states through a head, whose rows from `vocab_size` on only
    pad the vocabulary and are cut off: (N,) float32 in nats."""
    with head.gathered():
        bias = None if head.bias is None else head.bias[:vocab_size]
        return objective.sampled_logps(hidden, head.weight[:vocab_size], tokens, bias, head.scale, head.softcap)
