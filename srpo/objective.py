"""The equations of Sample-Routed Policy Optimization (arXiv 2604.02288) as pure functions on tensors.

Nothing here knows a trainer: read it beside the paper, or use it in another framework. Shapes: B rollouts, T response
tokens, V vocabulary, H hidden width, G rollouts of one prompt. The G rollouts of a prompt are consecutive rows, and
rewards are those of all ranks. Masks are 1 on response tokens (the first end-of-sequence token included). Numbers of
equations and sections are the paper's; SDPO is arXiv 2601.20802, on which it builds.
"""

import math
import re
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

ROUTINGS = ("srpo", "grpo", "sdpo", "sdpo_incorrect", "sdpo_correct", "mix")
DEMONSTRATION = "\nCorrect solution:\n\n{demonstration}\n\nCorrectly solve the original question."


class Routing(NamedTuple):
    """Routes of B rollouts, (B,) each."""

    correct: torch.Tensor
    """bool, c: reward at or above the threshold."""
    has_sibling: torch.Tensor
    """bool, m: another rollout of the same prompt is correct."""
    distill: torch.Tensor
    """bool, z^SDPO = (1 - c) m."""
    donor: torch.Tensor
    """int64, row of the first correct sibling; -1 = none."""


def route(rewards: torch.Tensor, num_generations: int, threshold: float = 0.5) -> Routing:
    """Sends failed rollouts that have a correct sibling to self-distillation, all others to GRPO (Section 3.1).

    Args:
        rewards: (B,) of all ranks.
        num_generations: G.
        threshold: a rollout is correct from this reward on.

    Raises `ValueError` for rewards that are not finite or do not divide into groups of G.
    """
    correct = _checked_rewards(rewards, num_generations) >= threshold
    others_PGG = correct[:, None, :] & ~torch.eye(num_generations, dtype=torch.bool, device=rewards.device)
    has_sibling = others_PGG.any(-1)
    first = others_PGG.to(torch.uint8).argmax(-1)  # of equal values the first
    start = torch.arange(len(correct), device=rewards.device)[:, None] * num_generations
    donor = torch.where(has_sibling, first + start, -1)
    return Routing(correct.flatten(), has_sibling.flatten(), (~correct & has_sibling).flatten(), donor.flatten())


def distilled_rows(routing: Routing, kind: str = "srpo") -> torch.Tensor:
    """Rows (B,) bool that get the distillation loss: SRPO's, SDPO's, or those of the masked variants of Fig. 1b."""
    rows = {
        "srpo": routing.distill,
        "grpo": torch.zeros_like(routing.distill),
        "sdpo": routing.has_sibling,
        "sdpo_incorrect": routing.distill,
        "sdpo_correct": routing.correct & routing.has_sibling,
        "mix": routing.has_sibling,
    }
    if kind not in rows:
        raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}; got {kind!r}")
    return rows[kind]


def random_donors(
    correct: torch.Tensor, num_generations: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Row of a correct sibling drawn at random for each rollout, (B,) int64; -1 = none. `generator` is on the CPU."""
    correct_PG = correct.view(-1, num_generations)
    others_PGG = correct_PG[:, None, :] & ~torch.eye(num_generations, dtype=torch.bool, device=correct.device)
    draws = torch.rand(others_PGG.shape, generator=generator).to(correct.device)
    drawn = draws.masked_fill(~others_PGG, -1).argmax(-1)
    start = torch.arange(len(correct_PG), device=correct.device)[:, None] * num_generations
    return torch.where(others_PGG.any(-1), drawn + start, -1).flatten()


def group_advantages(rewards: torch.Tensor, num_generations: int, scale: bool = False) -> torch.Tensor:
    """Advantage of each rollout over its whole group, before routing (Section 2.1): (B,) rewards -> (B,).

    The text and configuration of the paper do not divide by the standard deviation, its displayed equation does:
    `scale=True` (sample standard deviation, epsilon 1e-6).
    """
    grouped = _checked_rewards(rewards, num_generations)
    advantages = grouped - grouped.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (grouped.std(1, keepdim=True) + 1e-6)
    return advantages.flatten()


def grpo_token_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    delta: float | None = None,
) -> torch.Tensor:
    """Clipped surrogate of each token (Section 2.1), (B, T).

    Args:
        logps, old_logps: (B, T) log-probabilities of the sampled tokens in nats, before and at generation.
        advantages: (B,).
        clip_low, clip_high: asymmetric clip range of the ratio.
        delta: upper bound of the unclipped ratio (dual clip; verl's c = 3), or none.
    """
    advantages = advantages[:, None]
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def teacher_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the teacher in nats over the full vocabulary (Section 3.2): logits (..., V) -> (...), in float32."""
    logps = logits.to(_wide(logits)).log_softmax(-1)
    # A logit of -inf has probability 0 and adds nothing
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)


def entropy_weights(entropy: torch.Tensor, mask: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Weights exp(-beta H) divided by their mean over all routed tokens (Section 3.2): (B, T), mean 1 over `mask`.

    Args:
        entropy: (B, T) teacher entropy in nats.
        mask: (B, T), 1 on the tokens routed to self-distillation, of all ranks and micro-batches of the step.
        beta: 0 gives weight 1 everywhere.

    0 outside the mask. Raises `ValueError` for an entropy that is not finite on a routed token.
    """
    mask = mask.bool()
    if not torch.isfinite(entropy[mask]).all():
        raise ValueError("teacher entropy is not finite on a routed token: check the teacher's weights and dtype")
    raw = torch.where(mask, (-beta * torch.where(mask, entropy, 0)).exp(), 0)
    return raw * mask.sum() / raw.sum() if mask.any() else raw


def jsd_topk_tail(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    top_k: int | None = 100,
    alpha: float = 0.5,
    tail: bool = True,
) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence of each token (SDPO, Section 3): logits (..., V) -> nats (...).

    (1 - alpha) KL(P || M) + alpha KL(Q || M) with M = (1 - alpha) P + alpha Q, P the student, Q the teacher; alpha = 0
    is KL(Q || P), alpha = 1 is KL(P || Q).

    Args:
        top_k: support, the student's most likely tokens; none or V for the whole vocabulary.
        tail: one more category for the mass outside the support, which carries gradient; without it both
            distributions are renormalised over the support.
    """
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"student and teacher logits must have one shape, got {shapes}")
    student, teacher = student_logits.to(_wide(student_logits)), teacher_logits.to(_wide(teacher_logits))
    student_log_z, teacher_log_z = student.logsumexp(-1, keepdim=True), teacher.logsumexp(-1, keepdim=True)
    whole = top_k is None or top_k >= student.size(-1)
    if not whole:
        student, support = student.topk(top_k, dim=-1)
        teacher = teacher.gather(-1, support)
    student, teacher = student - student_log_z, teacher - teacher_log_z
    if not whole:
        student, teacher = (_with_tail(p) if tail else p.log_softmax(-1) for p in (student, teacher))
    return _jensen_shannon(student, teacher, alpha)


def _with_tail(logps: torch.Tensor) -> torch.Tensor:
    """(..., K) log-probabilities and that of the rest; the clamp keeps a rest of 0 finite."""
    kept = logps.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logps, torch.log(-torch.expm1(kept))], dim=-1)


def _jensen_shannon(student: torch.Tensor, teacher: torch.Tensor, alpha: float) -> torch.Tensor:
    if alpha == 0:
        return _kl(teacher, student)
    if alpha == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(student + math.log(1 - alpha), teacher + math.log(alpha))
    return (1 - alpha) * _kl(student, mixture) + alpha * _kl(teacher, mixture)


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.exp() * (first - second)).sum(-1)


def chunked_jsd_topk_tail(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head,
    teacher_head,
    top_k: int | None = 100,
    alpha: float = 0.5,
    tail: bool = True,
    temperature: float = 1.0,
    rows: int = 512,
) -> torch.Tensor:
    """`jsd_topk_tail` from hidden states, (N,), without ever holding (N, V) logits.

    Each chunk of `rows` tokens is computed again in the backward pass, so that the peak is about
    rows * V * 4 bytes times a small number, whatever N.

    Args:
        student_hidden: (N, H), carries the gradient.
        teacher_hidden: (N, H_teacher).
        student_head, teacher_head: called on a (rows, H) chunk, give its (rows, V) logits.
        temperature: divides both logits.
    """

    def divergence(student_chunk: torch.Tensor, teacher_chunk: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_chunk) / temperature
        return jsd_topk_tail(student_head(student_chunk) / temperature, teacher_logits, top_k, alpha, tail)

    parts = [
        checkpoint(divergence, student, teacher, use_reentrant=False)
        for student, teacher in zip(student_hidden.split(rows), teacher_hidden.split(rows), strict=True)
    ]
    return torch.cat(parts)


@torch.no_grad()
def chunked_entropy(hidden: torch.Tensor, head, temperature: float = 1.0, rows: int = 512) -> torch.Tensor:
    """`teacher_entropy` from (N, H) hidden states, (N,) float32; `head` gives the logits of a chunk of rows."""
    parts = [teacher_entropy(head(part) / temperature) for part in hidden.split(rows)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def srpo_loss(
    grpo: torch.Tensor,
    sdpo: torch.Tensor,
    weights: torch.Tensor,
    distill: torch.Tensor,
    mask: torch.Tensor,
    num_tokens: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Both branches under one denominator (Section 3.3), a scalar.

    Args:
        grpo, sdpo: (B, T) token losses with gradient. Each counts on its own rows only.
        weights: (B, T) entropy weights.
        distill: (B,) bool, rows of the self-distillation branch.
        mask: (B, T) response tokens.
        num_tokens: all response tokens of the optimizer step, whatever part of them these rows are; by default
            those of `mask`.
    """
    token_loss = torch.where(distill[:, None], weights * sdpo, grpo)
    return _masked_sum(token_loss, mask) / (mask.sum().clamp(min=1) if num_tokens is None else num_tokens)


def routed_loss(
    routing: str,
    grpo: torch.Tensor,
    sdpo: torch.Tensor,
    weights: torch.Tensor,
    distill: torch.Tensor,
    mask: torch.Tensor,
    num_tokens: int | torch.Tensor,
    mix_weight: float = 0.9,
) -> torch.Tensor:
    """The loss of SRPO or of one of its baselines; arguments as in `srpo_loss`.

    SDPO and its masked variants leave out the rows that are not distilled, and `num_tokens` counts the distilled ones.
    Advantage Mix (SDPO, Eq. 3) is mix_weight * GRPO + (1 - mix_weight) * SDPO on every token, the second term on rows
    with a teacher only.
    """
    if routing in ("srpo", "grpo"):
        return srpo_loss(grpo, sdpo, weights, distill, mask, num_tokens)
    sdpo = torch.where(distill[:, None], weights * sdpo, 0)
    if routing == "mix":
        return _masked_sum(mix_weight * grpo + (1 - mix_weight) * sdpo, mask) / num_tokens
    return (_masked_sum(sdpo, mask) + 0 * _masked_sum(grpo, mask)) / num_tokens  # attached also without such a row


def _masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.bool(), values, 0).sum()


def teacher_prompt(prompt: str | list[dict[str, Any]], demonstration: str) -> str | list[dict[str, Any]]:
    """The self-teacher's prompt (SDPO's release): the last user message followed by a correct solution.

    `prompt` is text or messages that end with a user turn; what comes before, such as a system message, stays.
    Raises `ValueError` for messages without one.
    """
    addition = DEMONSTRATION.replace("{demonstration}", demonstration)
    if isinstance(prompt, str):
        return prompt + addition
    if not prompt or prompt[-1].get("role") != "user":
        raise ValueError("the prompt does not end with a user message, to which the demonstration could be added")
    content = prompt[-1]["content"]
    content = content + addition if isinstance(content, str) else [*content, {"type": "text", "text": addition}]
    return [*prompt[:-1], {**prompt[-1], "content": content}]


def strip_thinking(text: str) -> str:
    """A response without its closed `<think>...</think>` blocks and the space behind them."""
    return re.sub(r"<think>.*?</think>\s*", "", text, flags=re.DOTALL)


def _checked_rewards(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """(P, G) rewards."""
    if num_generations < 1 or len(rewards) % num_generations:
        raise ValueError(f"{len(rewards)} rewards do not divide into groups of num_generations={num_generations}")
    bad = ~torch.isfinite(rewards)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"the reward of rollout {row} is {rewards[row].item()}: every rollout needs a finite reward to be routed "
            "(None is read as nan); give failed checks 0.0"
        )
    return rewards.view(-1, num_generations)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
