"""From last hidden states to what VA-OPD needs: log-probabilities of sampled tokens, and reverse KL."""

from typing import NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from . import objective
from ._trl import DivergenceInSmallTiles, maybe_gather_lm_head_ctx

# Added to the logits of padded vocabulary rows: exp() of it is exactly 0 in float32, and unlike -inf it keeps
# 0 * (difference of two such logits) at 0
PADDED_ROW_LOGIT = -1e4


class LMHead(NamedTuple):
    """The output projection of a model and what the model does to its logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None


def lm_head(model: PreTrainedModel) -> LMHead:
    """The (V, H) head of a model; gathered under FSDP2, which would do so in a forward of the head only.

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


def sampled_logps(
    head: LMHead, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Float32 log-probabilities (B, T) in nats of `tokens` (B, T) from `hidden` (B, T, H); 0 outside `mask`."""
    mask = mask.bool()
    with maybe_gather_lm_head_ctx(head.weight, head.bias):
        bias = None if head.bias is None else head.bias[:vocab_size]
        logps = objective.sampled_logps(
            hidden[mask], head.weight[:vocab_size], tokens[mask], bias, head.scale, head.softcap
        )
    return torch.zeros_like(mask, dtype=torch.float32).masked_scatter(mask, logps)


def chunked_reverse_kl(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student: LMHead,
    teacher: LMHead,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher) (Eq. 1) and the student's entropy, (N,) each in nats, by TRL's tiled kernel.

    `student_hidden` is (N, H_student) and carries the gradient, `teacher_hidden` (N, H_teacher); no (N, V) tensor
    exists, and at any N the logits take less than 1 GB. This is the one place that calls the kernel: its arguments are
    positional and not a public API.
    """
    return DivergenceInSmallTiles.apply(
        student_hidden,
        student.weight,
        student.bias,
        teacher_hidden,
        teacher.weight,
        teacher.bias,
        1.0,  # beta: reverse KL
        temperature,
        student.scale,
        student.softcap,
        teacher.scale,
        teacher.softcap,
    )
