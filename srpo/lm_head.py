"""From last hidden states to what SRPO needs, without ever holding (B, T, V) logits."""

from typing import NamedTuple

import torch
from accelerate.utils import is_peft_model
from transformers import PretrainedConfig, PreTrainedModel

from . import objective
from ._trl import ChunkedLogProbFunction, maybe_gather_lm_head_ctx

VOCABULARY_TILE = 32768


class LMHead(NamedTuple):
    """The output projection of a model and what the model does to its logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """(N, V) float32 logits of (N, H) hidden states, divided by the sampling temperature."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float() * self.scale
        return (logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)) / temperature

    def to(self, dtype: torch.dtype) -> "LMHead":
        """Detached copy in `dtype`; under ZeRO-3 only inside `gathered`."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return self._replace(weight=self.weight.detach().to(dtype), bias=bias)

    def gathered(self):
        """Context in which the weights are whole under ZeRO-3."""
        return maybe_gather_lm_head_ctx(self.weight, self.bias)


def response_hidden_states(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states (B, T, H) from which the response tokens are predicted.

    `inputs`: `prompt_ids` and `prompt_mask` (B, P), padded on the left; `completion_ids` and `completion_mask` (B, T).
    """
    if is_peft_model(model):
        model = model.get_base_model()
    outputs = model.base_model(
        input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        use_cache=False,
    )
    return outputs.last_hidden_state[:, -inputs["completion_ids"].size(1) - 1 : -1]


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


@torch.no_grad()
def chunked_entropy(head: LMHead, hidden: torch.Tensor, temperature: float = 1.0, rows: int = 512) -> torch.Tensor:
    """`objective.teacher_entropy` from (N, H) hidden states, (N,) float32 in nats."""
    with head.gathered():
        whole = head.to(hidden.dtype)
        parts = [objective.teacher_entropy(whole.logits(part, temperature)) for part in hidden.split(rows)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def chunked_divergence(
    student: LMHead,
    student_hidden: torch.Tensor,
    teacher: LMHead,
    teacher_hidden: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = 100,
    alpha: float = 0.5,
    tail: bool = True,
    rows: int = 512,
) -> torch.Tensor:
    """`objective.jsd_topk_tail` of each token from hidden states, (N,) in nats, without ever holding (N, V) logits.

    The peak is a small multiple of rows * V * 4 bytes, whatever N. Each token is projected once by the teacher's head
    and, because the backward pass computes its logits again, twice by the student's.

    Args:
        student_hidden: (N, H), carries the gradient, as does the student's head.
        teacher_hidden: (N, H_teacher).
    """
    settings = (temperature, top_k, alpha, tail, rows)
    return _ChunkedDivergence.apply(
        student_hidden,
        student.weight,
        student.bias,
        student,
        teacher,
        teacher_hidden,
        settings,
    )


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, student, teacher, teacher_hidden, settings):
        temperature, top_k, alpha, tail, rows = settings
        divergences, supports, targets = [], [], []
        with student.gathered(), teacher.gathered():
            head, teacher_head = student.to(hidden.dtype), teacher.to(teacher_hidden.dtype)
            for part, teacher_part in zip(hidden.split(rows), teacher_hidden.split(rows), strict=True):
                logits = head.logits(part, temperature)
                supports.append(objective.student_support(logits, top_k))
                targets.append(
                    objective.topk_tail_logps(teacher_head.logits(teacher_part, temperature), supports[-1], tail)
                )
                logps = objective.topk_tail_logps(logits, supports[-1], tail)
                divergences.append(objective.jensen_shannon(logps, targets[-1], alpha))
        ctx.save_for_backward(hidden)
        ctx.student, ctx.supports, ctx.targets, ctx.settings = student, supports, targets, settings
        return torch.cat(divergences)

    @staticmethod
    def backward(ctx, upstream):
        (hidden,) = ctx.saved_tensors
        temperature, _, alpha, tail, rows = ctx.settings
        student, hidden_gradients = ctx.student, []
        with student.gathered(), torch.enable_grad():
            head = student.to(hidden.dtype)
            # The head's weights that want a gradient, and sums of theirs in float32
            leaves = [t.requires_grad_() for t, n in zip(head[:2], ctx.needs_input_grad[1:3], strict=True) if n]
            sums = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
            for part, support, target, scale in zip(
                hidden.detach().split(rows), ctx.supports, ctx.targets, upstream.split(rows), strict=True
            ):
                part.requires_grad_()
                logps = objective.topk_tail_logps(head.logits(part, temperature), support, tail)
                value = objective.jensen_shannon(logps, target, alpha)
                gradient, *others = torch.autograd.grad(value, [part, *leaves], scale)
                hidden_gradients.append(gradient)
                for total, other in zip(sums, others, strict=True):
                    total += other
        given = iter(sums)
        weights = [
            next(given).to(t.dtype) if n else None for t, n in zip(student[:2], ctx.needs_input_grad[1:3], strict=True)
        ]
        return torch.cat(hidden_gradients), *weights, None, None, None, None
