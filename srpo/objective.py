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

ROUTINGS = ("srpo", "grpo", "sdpo", "sdpo_incorrect", "sdpo_correct", "mix")
TEMPLATE = "{prompt}\nCorrect solution:\n\n{demonstration}\n\nCorrectly solve the original question."


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
    correct = (_checked_rewards(rewards, num_generations) >= threshold).flatten()
    siblings = _correct_siblings(correct, num_generations)
    has_sibling = siblings.any(-1).flatten()
    donor = _best_sibling(siblings.to(torch.uint8), siblings)
    return Routing(correct, has_sibling, ~correct & has_sibling, donor)


def distilled_rows(routes: Routing, routing: str = "srpo") -> torch.Tensor:
    """Rows (B,) bool that get the distillation loss: SRPO's, SDPO's, or those of the masked variants of Fig. 1b."""
    rows = {
        "srpo": routes.distill,
        "grpo": torch.zeros_like(routes.distill),
        "sdpo": routes.has_sibling,
        "sdpo_incorrect": routes.distill,
        "sdpo_correct": routes.correct & routes.has_sibling,
        "mix": routes.has_sibling,
    }
    if routing not in rows:
        raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}; got {routing!r}")
    return rows[routing]


def grpo_rows(distill: torch.Tensor, routing: str = "srpo") -> torch.Tensor:
    """Rows (B,) bool that get the GRPO loss, given the distilled ones: SRPO's others, in Advantage Mix and GRPO all,
    in SDPO and its variants none."""
    if routing == "srpo":
        return ~distill
    return torch.full_like(distill, routing in ("grpo", "mix"))


def random_donors(
    correct: torch.Tensor, num_generations: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Row of a correct sibling drawn at random for each rollout, (B,) int64; -1 = none. `generator` is on the CPU."""
    siblings = _correct_siblings(correct, num_generations)
    draws = torch.rand(siblings.shape, generator=generator).to(correct.device)
    return _best_sibling(draws.masked_fill(~siblings, -1), siblings)


def _correct_siblings(correct: torch.Tensor, num_generations: int) -> torch.Tensor:
    """(P, G, G) bool: for each rollout of a prompt, which of the G are correct and not itself."""
    itself = torch.eye(num_generations, dtype=torch.bool, device=correct.device)
    return correct.view(-1, 1, num_generations) & ~itself


def _best_sibling(scores_PGG: torch.Tensor, siblings_PGG: torch.Tensor) -> torch.Tensor:
    """(B,) row of each rollout's sibling with the highest score, of equal ones the first; -1 = none."""
    start = torch.arange(len(scores_PGG), device=scores_PGG.device)[:, None] * scores_PGG.size(-1)
    return torch.where(siblings_PGG.any(-1), scores_PGG.argmax(-1) + start, -1).flatten()


def group_advantages(rewards: torch.Tensor, num_generations: int, scale: bool = False) -> torch.Tensor:
    """Advantages A_i = r_i - mean(r) over the whole group, before routing (Section 2.1): (B,) rewards -> (B,).

    The text and configuration of the paper do not divide by the standard deviation, its displayed equation does:
    `scale=True` (sample standard deviation, epsilon 1e-6). The trainer takes TRL's advantages, which are equal but for
    its epsilon of 1e-4.
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
    """Clipped surrogate of each token (Section 2.1), (B, T), with the ratio w = exp(logps - old_logps):
    -min(min(w, delta) A, clip(w, 1 - clip_low, 1 + clip_high) A).

    Args:
        logps, old_logps: (B, T) log-probabilities of the sampled tokens in nats, of the policy now and at generation.
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
    """Entropy of the teacher in nats over the full vocabulary (Section 3.2): logits (..., V) -> (...).

    In float32 or wider. The reference: the trainer has the same from hidden states (`divergence.chunked_entropy`).
    """
    logps = logits.to(_wide(logits)).log_softmax(-1)
    # A logit of -inf has probability 0 and adds nothing
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)


def entropy_weights(entropy: torch.Tensor, mask: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Weights exp(-beta H), divided by their mean over all routed tokens (Section 3.2): (B, T), 0 outside the mask.

    Args:
        entropy: (B, T) teacher entropy in nats.
        mask: (B, T), 1 on the tokens routed to self-distillation, of all ranks and micro-batches of the step.
        beta: 0 gives weight 1 everywhere.

    Raises `ValueError` for an entropy that is not finite on a routed token.
    """
    mask = mask.bool()
    if not torch.isfinite(entropy[mask]).all():
        raise ValueError("teacher entropy is not finite on a routed token: check the teacher's weights and dtype")
    if not mask.any():
        return torch.zeros_like(entropy)
    lowest = entropy[mask].min()  # cancels in the quotient, and keeps a large beta from making every weight 0
    raw = torch.where(mask, (-beta * (entropy - lowest)).exp(), 0)
    return raw * mask.sum() / raw.sum()


def jsd_topk_tail(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    top_k: int | None = 100,
    alpha: float = 0.5,
    tail: bool = True,
) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence of each token (SDPO, Section 3): logits (..., V) -> nats (...).

    (1 - alpha) KL(P || M) + alpha KL(Q || M) with M = (1 - alpha) P + alpha Q, P the student, Q the teacher. At alpha
    0 and 1 that formula is 0; what is returned there, as in SDPO's release and TRL, is KL(Q || P) at 0 (the limit of
    the divergence / alpha) and KL(P || Q) at 1 (the limit of the divergence / (1 - alpha)).

    The reference: the trainer computes the same number and its gradient from hidden states, without ever holding
    (B, T, V) logits (`divergence.chunked_divergence`). README.md, "Another loss", says how to train on this one.

    Args:
        top_k: support, the student's most likely tokens; none or V for the whole vocabulary.
        tail: one more category for the mass outside the support, which carries gradient; without it both
            distributions are renormalised over the support.

    Raises `ValueError` for logits of different shapes, top_k below 1 and alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or none for the whole vocabulary; got {top_k}")
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"student and teacher logits must have one shape, got {shapes}")
    support = student_support(student_logits, top_k)
    student, teacher = (topk_tail_logps(logits, support, tail) for logits in (student_logits, teacher_logits))
    return jensen_shannon(student, teacher, alpha)


def student_support(student_logits: torch.Tensor, top_k: int | None = 100) -> torch.Tensor | None:
    """Ids (..., K) of the student's most likely tokens; none where the whole vocabulary is the support."""
    if top_k is None or top_k >= student_logits.size(-1):
        return None
    return student_logits.topk(top_k, dim=-1).indices


def topk_tail_logps(logits: torch.Tensor, support: torch.Tensor | None, tail: bool = True) -> torch.Tensor:
    """Log-probabilities (..., K + 1) of the ids in `support` and of all others together, from (..., V) logits.

    Without `tail` (..., K), renormalised; without a support the (..., V) log-probabilities.
    """
    logits = logits.to(_wide(logits))
    if support is None:
        return logits.log_softmax(-1)
    return kept_logps(logits.gather(-1, support), logits.logsumexp(-1, keepdim=True), tail)


def kept_logps(chosen: torch.Tensor, log_sum: torch.Tensor, tail: bool = True) -> torch.Tensor:
    """`topk_tail_logps` from the logits (..., K) of the support and the logsumexp (..., 1) of all."""
    if not tail:
        return chosen.log_softmax(-1)
    logps = chosen - log_sum
    kept = logps.logsumexp(-1, keepdim=True).clamp(max=-1e-7)  # keeps a rest of 0 finite
    return torch.cat([logps, torch.log(-torch.expm1(kept))], dim=-1)


def jensen_shannon(student: torch.Tensor, teacher: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """(1 - alpha) KL(P || M) + alpha KL(Q || M), log-probabilities (..., K) -> nats (...); see `jsd_topk_tail`."""
    # A token that one model rules out (-inf) has probability 0; infinity minus infinity would be nan
    student, teacher = (p.clamp(min=torch.finfo(p.dtype).min) for p in (student, teacher))
    if alpha == 0:
        return _kl(teacher, student)
    if alpha == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(student + math.log(1 - alpha), teacher + math.log(alpha))
    return (1 - alpha) * _kl(student, mixture) + alpha * _kl(teacher, mixture)


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.exp() * (first - second)).sum(-1)


def srpo_loss(
    grpo: torch.Tensor,
    sdpo: torch.Tensor,
    weights: torch.Tensor,
    distill: torch.Tensor,
    mask: torch.Tensor,
    num_tokens: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Both branches under one denominator (Section 3.3), a scalar: sum of z w sdpo + (1 - z) grpo / number of tokens.

    Args:
        grpo, sdpo: (B, T) token losses with gradient. Each counts on its own rows only.
        weights: (B, T) entropy weights.
        distill: (B,) bool, z, rows of the self-distillation branch.
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
    coefficients = distillation_coefficients(routing, weights, distill, mask, mix_weight)
    sdpo = torch.where(distill[:, None], coefficients * sdpo, 0)
    if routing == "mix":
        return _masked_sum(mix_weight * grpo + sdpo, mask) / num_tokens
    return (_masked_sum(sdpo, mask) + 0 * _masked_sum(grpo, mask)) / num_tokens  # attached also without such a row


def distillation_coefficients(
    routing: str, weights: torch.Tensor, distill: torch.Tensor, mask: torch.Tensor, mix_weight: float = 0.9
) -> torch.Tensor:
    """Factor of each token's `sdpo` in `routed_loss`, before it divides by num_tokens: (B, T), 0 if not distilled."""
    share = 1 - mix_weight if routing == "mix" else 1
    return torch.where(mask.bool() & distill[:, None], share * weights, 0)


def _masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.bool(), values, 0).sum()


def teacher_prompt(
    prompt: str | list[dict[str, Any]], demonstration: str, template: str = TEMPLATE
) -> str | list[dict[str, Any]]:
    """The self-teacher's prompt (SDPO's release): the last user message followed by a correct solution.

    `prompt` is text or messages that end with a user turn; what comes before, such as a system message, stays.
    Raises `ValueError` for messages without one, and for a template without `{prompt}` and `{demonstration}`.
    """
    check_template(template)
    before, after = (part.replace("{demonstration}", demonstration) for part in template.split("{prompt}"))
    if isinstance(prompt, str):
        return before + prompt + after
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    if not isinstance(last, dict) or last.get("role") != "user" or last.get("content") is None:
        raise ValueError(
            "the prompt does not end with a user message that has content, to which the demonstration could be added"
        )
    content = last["content"]
    if isinstance(content, str):
        content = before + content + after
    else:
        content = [*_text_parts(before), *content, *_text_parts(after)]
    return [*prompt[:-1], {**last, "content": content}]


def check_template(template: str) -> None:
    """Raises `ValueError` unless a template of the teacher's prompt has each of its fields once."""
    for name in ("{prompt}", "{demonstration}"):
        if template.count(name) != 1:
            raise ValueError(f"reprompt_template must hold {name} once, got {template!r}")


def _text_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}] if text else []


def strip_thinking(text: str) -> str:
    """A response without its closed `<think>...</think>` blocks and the space behind them. A `</think>` alone, whose
    start is in the prompt, ends such a block too."""
    thinking, end, answer = text.rpartition("</think>")
    if not end:
        return text
    # Not searched in the answer, where no block ends: each <think> there would be followed to the end of the text
    thinking = re.sub(r"<think>.*?</think>\s*", "", thinking + end, flags=re.DOTALL)
    return re.sub(r"^.*</think>\s*", "", thinking + answer.lstrip(), flags=re.DOTALL)


def _checked_rewards(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """(P, G) rewards in float32 or wider."""
    if rewards.dim() != 1 or not len(rewards):
        raise ValueError(f"rewards must be one number for each rollout, (B,), got shape {tuple(rewards.shape)}")
    if num_generations < 1 or len(rewards) % num_generations:
        raise ValueError(f"{len(rewards)} rewards do not divide into groups of num_generations={num_generations}")
    bad = ~torch.isfinite(rewards)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"the reward of rollout {row} is {rewards[row].item()}: every rollout needs a finite reward to be routed "
            "(None is read as nan); give failed checks 0.0"
        )
    return rewards.to(_wide(rewards)).view(-1, num_generations)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
