"""The equations of Visual-Advantage On-Policy Distillation (arXiv 2605.21924) as pure functions on tensors.

Nothing here knows a trainer: read it beside the paper, or use it in another framework. Shapes: B rollouts, T response
tokens, V vocabulary, H hidden width, P prompts, K siblings (rollouts of one prompt), B = P * K. The K siblings of a
prompt are consecutive rows. Masks are 1 on response tokens (the first end-of-sequence token included) and need not be
contiguous. The groups that Eq. 5 calls V and L are the high and low tokens here. Everything but the KL is a constant
of the loss: call it under `torch.no_grad()` or on detached tensors.
"""

import math

import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint

WEIGHTINGS = ("va", "rollout", "token", "none")


# --- Eq. 1: the divergence, and Standard OPD's weights ---


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) over the full vocabulary (Eq. 1): logits (..., V) -> nats (...), in float32 or wider.

    The reference: the trainer computes the same number and its gradient from hidden states, without ever holding
    (B, T, V) logits (`divergence.chunked_reverse_kl`). README.md, "Another loss", says how to train on this one.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student = student_logits.to(wide).log_softmax(-1)
    teacher = teacher_logits.to(wide).log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1)


def uniform_coefficients(mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same coefficient for all tokens of a rollout, as in Standard OPD (Eq. 1): weight / length, (B, T)."""
    return weights[:, None] * mask / _checked_lengths(mask)[:, None]


# --- Section 3.1, Eq. 2: visual advantage ---


def pixelate(image: Image.Image, ratio: float = 0.1) -> Image.Image:
    """Degraded view of an image (Section 3.1): same size and mode, only a grid of `ratio` times each side is left.

    Each side shrinks to the number of its `cells` with PIL's bilinear filter, which averages over the cell, and grows
    back with nearest neighbour. Palette and 1-bit images have no in-between colours, so they are averaged as
    RGBA/RGB/L and converted back. Raises `ValueError` unless 0 < ratio <= 1.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"degradation ratio must be in (0, 1], got {ratio}")
    mode = image.mode
    if mode in ("P", "PA"):
        image = image.convert("RGBA" if mode == "PA" or "transparency" in image.info else "RGB")
    elif mode == "1":
        image = image.convert("L")
    small = cells(image.size, ratio)
    degraded = image.resize(small, Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.NEAREST)
    if mode == "P":  # convert("P") would dither to a standard palette, and even a constant image would change
        return degraded.quantize()
    if mode == "PA":
        colours = degraded.convert("RGB").quantize().convert("PA")
        colours.putalpha(degraded.getchannel("A"))
        return colours
    return degraded if degraded.mode == mode else degraded.convert(mode)


def cells(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Cells that are left of an image of that size, along each side: floor(side * ratio), at least 1."""
    width, height = (max(1, math.floor(side * ratio + 1e-9)) for side in size)  # 90 * 0.7 = 62.99999999999999
    return width, height


def visual_advantage(logps: torch.Tensor, logps_degraded: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Visual advantage of each token (Eq. 2): max(log p(y_t | v) - log p(y_t | v~), 0), and 0 outside the mask.

    Args:
        logps, logps_degraded: (B, T) teacher log-probabilities of the sampled tokens in nats, at temperature 1 and in
            float32, given the true and the degraded image.
        mask: (B, T).

    Raises `ValueError` for a log-probability that is not finite on a response token.
    """
    difference = logps - logps_degraded
    bad = ~torch.isfinite(difference) & mask.bool()
    if bad.any():
        row, token = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"teacher log-probability of rollout {row}, token {token} is not finite (true image: "
            f"{logps[row, token].item()}, degraded: {logps_degraded[row, token].item()}); load the teacher in "
            "bfloat16 or float32 and check its weights"
        )
    return torch.where(mask.bool(), difference, 0).clamp(min=0)


# --- Eqs. 3-4: rollout weights ---


def rollout_weights(
    va: torch.Tensor, mask: torch.Tensor, num_generations: int, temperature: float = 1.0, eps: float = 1e-6
) -> torch.Tensor:
    """Weight of each rollout among its siblings (Eqs. 3-4): softmax of the z-scored mean VA; sums to 1 in each group.

    The standard deviation is the population one (ddof = 0): the paper does not write it, but only this reproduces the
    weights of its Fig. 3.

    Args:
        va, mask: (B, T), siblings in consecutive rows.
        num_generations: K.
        temperature: tau, of the softmax over siblings.
        eps: added to the standard deviation, so that equal siblings get equal weights.

    Returns (B,). Raises `ValueError` if B does not divide into groups of K or a rollout has no response token.
    """
    _check_groups(va, num_generations)
    mean_PK = mean_over_tokens(va, mask).view(-1, num_generations)
    centred = mean_PK - mean_PK.mean(1, keepdim=True)
    sigma = centred.square().mean(1, keepdim=True).sqrt()
    return (centred / (sigma + eps) / temperature).softmax(1).flatten()


def mean_over_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (B, T) values over the response tokens of each rollout, (B,); the mean VA of Eq. 3."""
    return torch.where(mask.bool(), values, 0).sum(1) / _checked_lengths(mask)


# --- Eqs. 5-6: token groups and the loss ---


def high_tokens(
    va: torch.Tensor, mask: torch.Tensor, top_fraction: float = 0.2, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The high tokens (Eq. 5): the ceil(top_fraction * length) response tokens of highest VA in each row, (B, T) bool.

    Ties, which are common because many tokens have VA 0, go to the earlier token; with a CPU `generator` they are
    drawn at random instead.
    """
    valid = mask.bool()
    ranked = va.masked_fill(~valid, -math.inf)
    if generator is None:
        order = ranked.sort(dim=1, descending=True, stable=True).indices
    else:
        shuffle = torch.rand(va.shape, generator=generator).argsort(1).to(va.device)
        order = shuffle.gather(1, ranked.gather(1, shuffle).sort(dim=1, descending=True, stable=True).indices)
    # Exact on the CPU in float64; the small term keeps 0.07 * 100 = 7.000000000000001 from rounding up to 8
    counts = (_checked_lengths(mask).cpu().double() * top_fraction - 1e-9).ceil().clamp(min=1).long().to(va.device)
    rank = order.argsort(1)
    return (rank < counts[:, None]) & valid


def token_coefficients(
    va: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    top_fraction: float = 0.2,
    high_weight: float = 0.5,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Coefficient of each token's KL (Eqs. 5-6): weight * (lambda / |high| on high, (1 - lambda) / |low| on low).

    Where a rollout has no low token, the high ones carry its whole weight, so each row sums to `weights`.

    Args:
        va, mask: (B, T).
        weights: (B,) rollout weights.
        top_fraction: p_v, the share of tokens in the high-VA group.
        high_weight: lambda, the share of the rollout's weight that this group carries.
        generator: draws ties at random, see `high_tokens`.

    Returns (B, T). Raises `ValueError` for a rollout without a response token.
    """
    high = high_tokens(va, mask, top_fraction, generator)
    low = mask.bool() & ~high
    has_low = low.any(1, keepdim=True)
    low_share = has_low.to(weights) * (1 - high_weight)  # torch.where would give float32 for float64 `weights`
    high_share = 1 - low_share
    per_token = high * high_share / high.sum(1, keepdim=True) + low * low_share / low.sum(1, keepdim=True).clamp(min=1)
    return weights[:, None] * per_token


def coefficients(
    va: torch.Tensor,
    mask: torch.Tensor,
    num_generations: int,
    weighting: str = "va",
    weight_temperature: float = 1.0,
    eps: float = 1e-6,
    top_fraction: float = 0.2,
    high_weight: float = 0.5,
    ungrouped: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rollout weights (B,) and token coefficients (B, T) of one of the paper's objectives.

    `weighting`: "va" is VA-OPD, "rollout" and "token" keep one of its two parts (Fig. 4a), "none" is Standard OPD.
    `ungrouped`: (B,) bool, rollouts whose tokens are all weighted alike because VA says nothing about them: rows
    without an image, and rows under an optional floor on mean VA.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}; got {weighting!r}")
    if weighting in ("va", "rollout"):
        weights = rollout_weights(va, mask, num_generations, weight_temperature, eps)
    else:
        _check_groups(va, num_generations)
        weights = torch.full_like(va[:, 0], 1 / num_generations)
    uniform = uniform_coefficients(mask, weights)
    if weighting in ("rollout", "none"):
        return weights, uniform
    grouped = token_coefficients(va, mask, weights, top_fraction, high_weight, generator)
    return weights, grouped if ungrouped is None else torch.where(ungrouped[:, None], uniform, grouped)


def grouped_kl_loss(kl: torch.Tensor, coefficients: torch.Tensor, num_prompts: int | torch.Tensor) -> torch.Tensor:
    """Batch loss: mean over prompts of sum_k sum_t c_t KL_t (Eq. 6), a scalar.

    Args:
        kl: (B, T) per-token reverse KL with gradient to the student. What stands outside the mask has no effect.
        coefficients: (B, T), zero outside the mask.
        num_prompts: P of the whole optimizer step, whatever part of it these rows are.
    """
    return (torch.where(coefficients > 0, kl, 0) * coefficients).sum() / num_prompts


# --- log-probabilities through an LM head ---


@torch.no_grad()
def sampled_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    rows: int = 256,
) -> torch.Tensor:
    """Log-probabilities in nats of given tokens from hidden states, scored in float32 at temperature 1.

    A difference of two bfloat16 log-probabilities is mostly rounding (most are exactly 0, errors reach 0.1), so the
    product with the LM head accumulates and stays in float32. `rows` bounds the memory to rows * V * 4 bytes.

    Args:
        hidden: (N, H) last hidden states, one a token.
        weight, bias: (V, H) and (V,) of the LM head; rows past the tokenizer's vocabulary cut off.
        tokens: (N,) ids below V.
        logit_scale, softcap: what the model does to its logits, as in TRL.

    Returns (N,) float32, without gradient.
    """
    if not _wide_product(hidden, weight):
        weight = weight.float()
    logps = [
        head_logits(hidden[i : i + rows], weight, bias, logit_scale, softcap)
        .log_softmax(-1)
        .gather(1, tokens[i : i + rows, None])
        for i in range(0, len(hidden), rows)
    ]
    return torch.cat(logps).squeeze(1) if logps else hidden.new_zeros(0, dtype=torch.float32)


def token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    rows: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `sampled_logps`, with gradient and for several tokens at a place: (N, K) float32, and (N,) entropy without.

    `tokens` is (N, K). The logits of `rows` places exist at a time; the backward computes them again.
    """

    def part(hidden, tokens, weight, bias):
        logps = head_logits(hidden, weight, bias, logit_scale, softcap).log_softmax(-1)
        constant = logps.detach()
        return logps.gather(1, tokens), -(constant.exp() * constant).sum(-1)

    weight = weight.float()
    parts = [
        checkpoint(part, hidden[i : i + rows], tokens[i : i + rows], weight, bias, use_reentrant=False)
        for i in range(0, len(hidden), rows)
    ]
    logps, entropy = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropy)


def head_logits(hidden, weight, bias, logit_scale, softcap) -> torch.Tensor:
    """(R, V) float32 logits of (R, H) states, scaled and then capped; with gradient, at R * V * 4 bytes."""
    with torch.autocast(hidden.device.type, enabled=False):
        if _wide_product(hidden, weight):
            logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        else:
            logits = hidden.float() @ weight.float().T
        if bias is not None:
            logits += bias.float()
        logits *= logit_scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _wide_product(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the device multiplies these half-precision tensors into float32, without a float32 copy of the head."""
    return hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32


# --- a served teacher: approximations of Eq. 1, not in the paper ---


def sampled_token_kl(student_logps: torch.Tensor, teacher_logps: torch.Tensor) -> torch.Tensor:
    """Estimate of `reverse_kl` from the sampled token y alone: (...) log-probabilities of y in nats -> nats (...).

    The value is k1 = log p_S(y) - log p_T(y). The gradient is that of the policy-gradient form with k1 as the cost,
    stopgrad(k1) * grad log p_S(y); that of the value itself would lose the teacher, as E[grad log p_S(y)] = 0.

    For y drawn from p_S(. | state) itself, the expectations of value and gradient are exactly those of `reverse_kl` at
    the state. Two things break this in training, though both gradients stay 0 where student and teacher agree:
    rollouts at a temperature under 1 or within a nucleus (the paper: 0.7, top-p 0.95) are drawn from a sharper
    distribution than the p_S at temperature 1 that is scored here, and no importance weight makes up for it; and
    VA coefficients depend on y, so only Standard OPD's coefficients keep the expectation.
    """
    k1 = (student_logps - teacher_logps).detach()
    return k1 * (1 + student_logps - student_logps.detach())


def partition_kl(student_logps: torch.Tensor, teacher_logps: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) in nats after the vocabulary is partitioned: K tokens each for itself, the rest as one.

    Merging tokens loses information, so this is at most `reverse_kl` (data processing inequality), does not fall when
    a token is split from the rest, and is equal with all tokens split off. Inside the rest there is no gradient from
    one token to another.

    Args:
        student_logps, teacher_logps: (..., K) log-probabilities of K different tokens under the whole vocabulary.
        kept: (..., K) bool, the places that hold a token; what stands at the others is ignored.

    Returns (...), finite also where nothing is left for the rest.
    """
    student, teacher = student_logps.masked_fill(~kept, 0), teacher_logps.masked_fill(~kept, 0)
    rest_student, rest_teacher = _log_rest(student, kept), _log_rest(teacher, kept)
    tokens = (kept * student.exp() * (student - teacher)).sum(-1)
    return tokens + rest_student.exp() * (rest_student - rest_teacher)


def _log_rest(logps: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of probabilities), with at least the rounding error of 1 left as the rest."""
    total = logps.masked_fill(~kept, -math.inf).logsumexp(-1)
    return (-torch.expm1(total.clamp(max=-torch.finfo(total.dtype).eps))).log()


# --- checks ---


def _checked_lengths(mask: torch.Tensor) -> torch.Tensor:
    lengths = mask.sum(1)
    if (lengths == 0).any():
        raise ValueError(
            f"rollout {int((lengths == 0).nonzero()[0])} has no valid token: every rollout needs at least its "
            "end-of-sequence token; check max_completion_length and the generation engine"
        )
    return lengths


def _check_groups(va: torch.Tensor, num_generations: int) -> None:
    if num_generations < 1 or va.shape[0] % num_generations:
        raise ValueError(f"{va.shape[0]} rollouts do not divide into groups of num_generations={num_generations}")
