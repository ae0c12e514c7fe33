"""Divergence between student and teacher from hidden states, with its gradient, and entropy, in tiles of logits."""

import math

import torch

from . import objective
from .lm_head import LMHead

TILE_BYTES = 3 * 2**28  # for logits
AUTOGRAD_TENSORS = 12  # of (R, V) alive at once in autograd, for a divergence over the whole vocabulary


@torch.no_grad()
def chunked_entropy(head: LMHead, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`objective.teacher_entropy` from (N, H) hidden states, (N,) float32 in nats."""
    entropy = torch.empty(len(hidden), device=hidden.device)
    with head.gathered():
        rows = tile_rows(len(hidden), len(head.weight), 2)
        buffers = torch.empty(2, rows, len(head.weight), device=hidden.device)
        for part in _parts(len(hidden), rows):
            logits, probabilities = buffers[:, : len(hidden[part])]
            torch.softmax(head.logits(hidden[part], logits, temperature), 1, out=probabilities)
            entropy[part] = torch.special.entr(probabilities, out=logits).sum(1)
    return entropy


def chunked_divergence(
    student: LMHead,
    student_hidden: torch.Tensor,
    teacher: LMHead,
    teacher_hidden: torch.Tensor,
    coefficients: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = 100,
    alpha: float = 0.5,
    tail: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`objective.jsd_topk_tail` and the student's entropy over the whole vocabulary from hidden states, (N,) each in
    nats.

    No (N, V) tensor exists: at any N the logits take less than 1 GB. They are computed once, and the gradient is made
    in the forward pass, from the logits that are there. So the loss must be the sum of coefficients * divergence times
    a factor; the backward pass, of which there can be one only, raises `RuntimeError` for another one.

    Args:
        student, teacher: the heads of both models, of the same V rows.
        student_hidden: (N, H), carries the gradient, as does the student's head.
        teacher_hidden: (N, H_teacher).
        coefficients: (N,), what each divergence is multiplied by in the loss.
        temperature: by which both models' logits are divided.
        top_k, alpha, tail: as in `objective.jsd_topk_tail`.
    """
    return _ChunkedDivergence.apply(
        student_hidden,
        student.weight,
        student.bias,
        student,
        teacher,
        teacher_hidden,
        _near_one(coefficients.detach().float()),
        temperature,
        alpha,
        top_k,
        tail,
    )


class _ChunkedDivergence(torch.autograd.Function):
    """`chunked_divergence`. `weight` and `bias` are those of the head `student`: autograd does not see them inside a
    tuple. `coefficients` are float32, the largest near 1."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, student, teacher, teacher_hidden, coefficients, temperature, alpha, top_k, tail
    ):
        divergence, entropy = torch.empty(2, len(hidden), device=hidden.device)
        with student.gathered(), teacher.gathered():
            grads = [
                torch.zeros_like(tensor, dtype=torch.float32) if needed else None
                for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
            ]
            grad_hidden, *grads_of_head = grads
            vocab_size = len(student.weight)
            whole = top_k is None or top_k >= vocab_size
            num_buffers = 2 + AUTOGRAD_TENSORS * whole + (student.softcap is not None)
            rows = tile_rows(len(hidden), vocab_size, num_buffers)
            buffers = torch.empty(2, rows, vocab_size, device=hidden.device)
            for part in _parts(len(hidden), rows):
                tile, states = buffers[:, : len(hidden[part])], (hidden[part], teacher_hidden[part])
                given = (tile, student, teacher, *states, coefficients[part], temperature, alpha)
                found = over_vocabulary(*given) if whole else over_support(*given, top_k, tail)
                divergence[part], entropy[part], gradient = found
                into = None if grad_hidden is None else grad_hidden[part]
                student.pull_back(gradient, hidden[part], into, *grads_of_head)
        ctx.save_for_backward(coefficients, *grads)
        ctx.mark_non_differentiable(entropy)
        return divergence, entropy

    @staticmethod
    def backward(ctx, upstream, _):
        coefficients, *grads = ctx.saved_tensors
        squares = coefficients.square().sum()
        factor = torch.where(squares > 0, (upstream * coefficients).sum() / squares, 0)
        # Coefficients below 1e-30, to which extreme settings can lead, count as 0
        if not torch.allclose(upstream, factor * coefficients, rtol=1e-3, atol=1e-6 * factor.abs().item() + 1e-30):
            raise RuntimeError(
                "the loss is not the sum of coefficients * divergence for which chunked_divergence was called, and "
                "there is no gradient of another one: README.md, 'Another loss', says how to train on it"
            )
        # Autograd rounds them to the dtype of what they are the gradients of
        return *(None if grad is None else grad.mul_(factor) for grad in grads), *(None,) * 8


def over_support(
    tile: torch.Tensor,
    student: LMHead,
    teacher: LMHead,
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    coefficients: torch.Tensor,
    temperature: float,
    alpha: float,
    top_k: int,
    tail: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Divergences (R,) over the student's top-k and the tail, the student's entropy (R,) over the whole vocabulary,
    and the gradient (R, V) of the sum of coefficients * divergence with respect to the student's products with its
    head. `tile` is scratch space (2, R, V).

    A divergence depends on K logits and on the logsumexp of all V, whose gradient is the probabilities.
    """
    logits, probabilities = tile
    student.logits(hidden, logits, temperature)
    support = objective.student_support(logits, top_k)
    torch.softmax(logits, 1, out=probabilities)
    chosen = logits.gather(1, support)
    log_sum = chosen[:, :1] - probabilities.gather(1, support[:, :1]).log()  # of the likeliest token: far from 0
    slope = _slope(student, logits, temperature)
    entropy = torch.special.entr(probabilities, out=logits).sum(1)
    teacher.logits(teacher_hidden, logits, temperature)
    target = objective.kept_logps(logits.gather(1, support), _log_sum(logits), tail)
    with torch.enable_grad():
        inputs = chosen.requires_grad_(), log_sum.requires_grad_()
        value = objective.jensen_shannon(objective.kept_logps(*inputs, tail), target, alpha)
    scaled = coefficients * (student.scale / temperature)
    of_chosen, of_sum = torch.autograd.grad(value, inputs, scaled, materialize_grads=True)
    gradient = probabilities.mul_(of_sum).scatter_add_(1, support, of_chosen)
    return value.detach(), entropy, gradient if slope is None else gradient.mul_(slope)


def over_vocabulary(
    tile: torch.Tensor,
    student: LMHead,
    teacher: LMHead,
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    coefficients: torch.Tensor,
    temperature: float,
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`over_support` with the whole vocabulary as support, by autograd."""
    logits = student.logits(hidden, tile[0], temperature)
    target = teacher.logits(teacher_hidden, tile[1], temperature).log_softmax(1)
    probabilities = torch.softmax(logits, 1, out=tile[1])
    entropy = torch.special.entr(probabilities, out=probabilities).sum(1)
    slope = _slope(student, logits, temperature)
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        value = objective.jensen_shannon(logits.log_softmax(1), target, alpha)
    (gradient,) = torch.autograd.grad(value, logits, coefficients * (student.scale / temperature))
    return value.detach(), entropy, gradient if slope is None else gradient.mul_(slope)


def _near_one(coefficients: torch.Tensor) -> torch.Tensor:
    """Coefficients times the power of two that brings the largest near 1, which rounds nothing: the square of 1e-20
    is 0 in float32, and 1e-5 has few bits in float16."""
    exponent = torch.frexp(coefficients.abs().max()).exponent if len(coefficients) else 0
    return torch.ldexp(coefficients, -torch.as_tensor(exponent).clamp(min=-126))


def tile_rows(num_rows: int, vocab_size: int, num_buffers: int) -> int:
    """Rows of a tile: `num_rows` in parts of like size, `num_buffers` tensors of which fit in `TILE_BYTES`."""
    parts = math.ceil(4 * num_rows * vocab_size * num_buffers / TILE_BYTES)
    return max(math.ceil(num_rows / max(parts, 1)), 1)


def _parts(count: int, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, count, rows)]


def _slope(head: LMHead, logits: torch.Tensor, temperature: float) -> torch.Tensor | None:
    """Derivative of soft-capped logits without the factor that uncapped logits have too; None without a cap."""
    if head.softcap is None:
        return None
    return (logits * (temperature / head.softcap)).square_().neg_().add_(1)


def _log_sum(logits: torch.Tensor) -> torch.Tensor:
    """(R, 1) logsumexp of (R, V) logits, which it overwrites: no second (R, V) tensor."""
    top = logits.amax(1, keepdim=True)
    return top + logits.sub_(top).exp_().sum(1, keepdim=True).log()
