"""From last hidden states to what SRPO needs, without ever holding (B, T, V) logits."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from . import objective
from ._trl import ChunkedLogProbFunction, maybe_gather_lm_head_ctx

VOCABULARY_TILE = 32768
ROWS = 256  # tokens whose logits are there at once: 0.16 GB a tensor at a vocabulary of 151,936


class LMHead(NamedTuple):
    """The output projection of a model and what the model does to its logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, V) float32 products of (N, H) hidden states with the head, in their dtype and without a gradient."""
        products = torch.empty(len(hidden), len(self.weight), device=hidden.device)
        for part in self._slices():
            bias = None if self.bias is None else self.bias[part].to(hidden.dtype)
            products[:, part] = torch.nn.functional.linear(hidden, self.weight[part].to(hidden.dtype), bias)
        return products

    def logits(self, products: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """What the model makes of `project`, divided by the sampling temperature."""
        if self.softcap is not None:
            return self.softcap / temperature * torch.tanh(products * (self.scale / self.softcap))
        return products if self.scale == temperature else products * (self.scale / temperature)

    def pull_back(
        self, gradient: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Gradient (N, H) of `hidden` from that of `project`; adds those of the head to the float32 sums `weight` and
        `bias`, where wanted."""
        into = torch.zeros_like(hidden, dtype=torch.float32)
        for part in self._slices():
            tile = gradient[:, part].to(hidden.dtype)
            into += tile @ self.weight[part].to(hidden.dtype)
            if weight is not None:
                weight[part] += tile.T @ hidden
            if bias is not None:
                bias[part] += tile.sum(0)
        return into.to(hidden.dtype)

    def _slices(self) -> list[slice]:
        """Of the vocabulary, so that no copy of the whole head is made in another dtype."""
        return _parts(len(self.weight), VOCABULARY_TILE)

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
def chunked_entropy(head: LMHead, hidden: torch.Tensor, temperature: float = 1.0, rows: int = ROWS) -> torch.Tensor:
    """`objective.teacher_entropy` from (N, H) hidden states, (N,) float32 in nats."""
    entropy = torch.empty(len(hidden), device=hidden.device)
    with head.gathered():
        for part in _parts(len(hidden), rows):
            entropy[part] = objective.teacher_entropy(head.logits(head.project(hidden[part]), temperature))
    return entropy


def chunked_divergence(
    student: LMHead,
    student_hidden: torch.Tensor,
    teacher: LMHead,
    teacher_hidden: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = 100,
    alpha: float = 0.5,
    tail: bool = True,
    rows: int = ROWS,
) -> torch.Tensor:
    """`objective.jsd_topk_tail` of each token from hidden states, (N,) in nats, without ever holding (N, V) logits.

    The peak is a small multiple of rows * V * 4 bytes, whatever N. Each token is projected once by the teacher's head
    (twice without `top_k`) and, because the backward pass computes its logits again, twice by the student's.

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
    """What is kept of each token is made before the first tile: small tensors between the large ones split memory."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, student, teacher, teacher_hidden, settings):
        temperature, top_k, alpha, tail, rows = settings
        count, device = len(hidden), hidden.device
        divergence, supports, targets = torch.empty(count, device=device), None, None
        with student.gathered(), teacher.gathered():
            if top_k is not None and top_k < len(student.weight):
                supports = torch.empty(count, top_k, dtype=torch.long, device=device)
                targets = torch.empty(count, top_k + tail, device=device)
            for part in _parts(count, rows):
                logits = student.logits(student.project(hidden[part]), temperature)
                support = objective.student_support(logits, top_k)
                logps = objective.topk_tail_logps(logits, support, tail)
                del logits
                target = _target(teacher, teacher_hidden[part], support, settings)
                divergence[part] = objective.jensen_shannon(logps, target, alpha)
                if support is not None:
                    supports[part], targets[part] = support, target
        ctx.save_for_backward(hidden, teacher_hidden, supports, targets)
        ctx.student, ctx.teacher, ctx.settings = student, teacher, settings
        return divergence

    @staticmethod
    def backward(ctx, upstream):
        hidden, teacher_hidden, supports, targets = ctx.saved_tensors
        temperature, _, alpha, tail, rows = ctx.settings
        student, teacher, whole = ctx.student, ctx.teacher, supports is None
        hidden_gradient = torch.empty_like(hidden)
        with student.gathered(), teacher.gathered() if whole else nullcontext():
            sums = [
                torch.zeros_like(tensor, dtype=torch.float32) if wanted else None
                for tensor, wanted in zip(student[:2], ctx.needs_input_grad[1:3], strict=True)
            ]
            for part in _parts(len(hidden), rows):
                support = None if whole else supports[part]
                target = _target(teacher, teacher_hidden[part], None, ctx.settings) if whole else targets[part]
                products = student.project(hidden[part]).requires_grad_()
                with torch.enable_grad():
                    logps = objective.topk_tail_logps(student.logits(products, temperature), support, tail)
                    value = objective.jensen_shannon(logps, target, alpha)
                (gradient,) = torch.autograd.grad(value, products, upstream[part])
                del products, logps, value
                hidden_gradient[part] = student.pull_back(gradient, hidden[part], *sums)
        heads = [None if total is None else total.to(t.dtype) for total, t in zip(sums, student[:2], strict=True)]
        return hidden_gradient, *heads, None, None, None, None


def _parts(count: int, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, count, rows)]


def _target(teacher: LMHead, hidden: torch.Tensor, support: torch.Tensor | None, settings: tuple) -> torch.Tensor:
    temperature, _, _, tail, _ = settings
    return objective.topk_tail_logps(teacher.logits(teacher.project(hidden), temperature), support, tail)
