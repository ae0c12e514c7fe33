"""Reverse KL over the full vocabulary from hidden states, with its gradient, in one pass over tiles of logits."""

import math

import torch

from ._trl import chunked_divergence
from .lm_head import LMHead

TILE_BYTES = 3 * 2**28  # for logits


def chunked_reverse_kl(
    student: LMHead,
    student_hidden: torch.Tensor,
    teacher: LMHead,
    teacher_hidden: torch.Tensor,
    coefficients: torch.Tensor,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher) (Eq. 1) and the student's entropy, (N,) each in nats.

    No (N, V) tensor exists: at any N the logits take less than 1 GB. They are computed once, and the gradient is made
    in the forward pass, from the logits that are there. So the loss must be the sum of coefficients * KL times a
    factor; the backward pass, of which there can be one only, raises `RuntimeError` for another one.

    Args:
        student, teacher: the heads of both models, of the same V rows.
        student_hidden: (N, H_student), carries the gradient, as does the student's head.
        teacher_hidden: (N, H_teacher).
        coefficients: (N,) float32, at least 0.
        temperature: by which both models' logits are divided.
    """
    # The largest becomes 1: the gradient of a tile is rounded to bfloat16 or float16, with few bits left at 1e-5
    scaled = coefficients / coefficients.max().clamp(min=torch.finfo(torch.float32).tiny)
    return _ReverseKL.apply(
        student_hidden,
        student.weight,
        student.bias,
        student,
        teacher_hidden,
        teacher,
        scaled,
        temperature,
        torch.is_grad_enabled(),
    )


class _ReverseKL(torch.autograd.Function):
    """`chunked_reverse_kl`. Arguments of the forward pass:

    hidden, weight, bias: the student's states (N, H), and its head (V, H) and (V,) or None: what may need a gradient.
    student: the same head with its scale and soft cap; autograd does not see tensors inside a tuple.
    teacher_hidden, teacher: the teacher's states (N, H_teacher) and head.
    coefficients: (N,) float32, the largest of them 1.
    temperature: by which logits are divided.
    training: whether to compute gradients; inside a forward pass autograd does not say so.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, student, teacher_hidden, teacher, coefficients, temperature, training):
        kl, entropy = torch.empty(2, len(hidden), device=hidden.device)
        triton = chunked_divergence._use_triton(hidden.device)
        fold = reverse_kl_by_triton if triton else reverse_kl_in_place
        with student.gathered(), teacher.gathered():
            grads = [
                torch.zeros_like(tensor, dtype=torch.float32) if training and wanted else None
                for tensor, wanted in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
            ]
            grad_hidden, *grads_of_head = grads
            vocab_size, num_buffers = len(student.weight), 2 if triton else 3
            rows = tile_rows(len(hidden), vocab_size, num_buffers + (student.softcap is not None))
            buffers = torch.empty(num_buffers, rows, vocab_size, device=hidden.device)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                tile = buffers[:, : len(hidden[part])]
                student.project(hidden[part], tile[0])
                teacher.project(teacher_hidden[part], tile[1])
                kl[part], entropy[part] = fold(tile, coefficients[part], student, teacher, 1 / temperature)
                if any(grad is not None for grad in grads):
                    into = None if grad_hidden is None else grad_hidden[part]
                    student.pull_back(tile[0], hidden[part], into, *grads_of_head)
        ctx.save_for_backward(coefficients, *grads)
        ctx.mark_non_differentiable(entropy)
        return kl, entropy

    @staticmethod
    def backward(ctx, upstream, _):
        coefficients, *grads = ctx.saved_tensors
        weight_sum = coefficients.sum()
        factor = torch.where(weight_sum > 0, upstream.sum() / weight_sum, 0)
        # Coefficients below 1e-30, to which extreme settings can lead, count as 0
        if not torch.allclose(upstream, factor * coefficients, rtol=1e-3, atol=1e-6 * factor.abs().item() + 1e-30):
            raise RuntimeError(
                "the loss is not the sum of coefficients * KL for which chunked_reverse_kl was called, and there is "
                "no gradient of another one: README.md, 'Another loss', says how to train on it"
            )
        # Autograd rounds them to the dtype of what they are the gradients of
        return *(None if grad is None else grad.mul_(factor) for grad in grads), *(None,) * 6


def tile_rows(num_rows: int, vocab_size: int, num_buffers: int) -> int:
    """Rows of a tile: `num_rows` in parts of like size, `num_buffers` tensors of which fit in `TILE_BYTES`."""
    parts = math.ceil(4 * num_rows * vocab_size * num_buffers / TILE_BYTES)
    return max(math.ceil(num_rows / max(parts, 1)), 1)


def reverse_kl_by_triton(
    tile: torch.Tensor, coefficients: torch.Tensor, student: LMHead, teacher: LMHead, inv_t: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reverse_kl_in_place` by TRL's kernels, of a tile (2, R, V)."""
    rows, columns = tile.shape[1:]
    settings = {
        "s_scale": student.scale,
        "s_softcap": student.softcap or 1.0,
        "t_scale": teacher.scale,
        "t_softcap": teacher.softcap or 1.0,
        "inv_t": inv_t,
        "S_HAS_SOFTCAP": student.softcap is not None,
        "T_HAS_SOFTCAP": teacher.softcap is not None,
        "BLOCK_SIZE": chunked_divergence._BLOCK_SIZE,
    }
    logits = (tile[0], tile.stride(1), tile[1], tile.stride(1))
    s_max, t_max = tile.new_full((2, rows), -math.inf)
    s_sum, s_x_sum, t_sum, t_gap, s_gap = tile.new_zeros(5, rows)
    sums = (s_max, s_sum, s_x_sum, t_max, t_sum, t_gap, s_gap)
    chunked_divergence._stats_kernel[(rows,)](*logits, *sums, columns, **settings)
    s_log_z, t_log_z = s_max + s_sum.log(), t_max + t_sum.log()
    kl = s_gap / s_sum - s_log_z + t_log_z
    grid = (rows, math.ceil(columns / chunked_divergence._BLOCK_SIZE))
    reverse = {"beta": 1.0, "MODE": 1}
    chunked_divergence._backward_kernel[grid](
        *logits, s_log_z, t_log_z, kl, coefficients, columns, **reverse, **settings
    )
    return kl, s_log_z - s_x_sum / s_sum


def reverse_kl_in_place(
    tile: torch.Tensor, coefficients: torch.Tensor, student: LMHead, teacher: LMHead, inv_t: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher) and the student's entropy, (R,) each, of products with the heads.

    Args:
        tile: (3, R, V), the products of student and teacher, and scratch space. The student's become the gradient of
            the sum of coefficients * KL in them.
        coefficients: (R,).
        student, teacher: whose scale and soft cap make logits of the products.
        inv_t: 1 over the temperature.
    """
    s_logits, t_logits, room = tile
    slope = _to_logits(s_logits, student, inv_t, with_slope=True)
    _to_logits(t_logits, teacher, inv_t)
    t_log_sum = _exp_sum(t_logits, room).log()
    s_sum = _exp_sum(s_logits, room)
    probabilities, shift = room.div_(s_sum), t_log_sum - s_sum.log()
    entropy = s_sum.log().flatten() - _row_dots(probabilities, s_logits)
    gap = s_logits.sub_(t_logits)  # of log-probabilities, but for `shift`
    kl = _row_dots(probabilities, gap) + shift.flatten()
    gap.add_(shift - kl[:, None]).mul_(probabilities.mul_(coefficients[:, None])).mul_(slope)
    return kl, entropy


def _to_logits(products: torch.Tensor, head: LMHead, inv_t: float, with_slope: bool = False) -> float | torch.Tensor:
    """Makes logits of products with a head, in place. Returns d logits / d products, for a soft cap only if asked."""
    if head.softcap is None:
        products.mul_(head.scale * inv_t)
        return head.scale * inv_t
    products.mul_(head.scale / head.softcap).tanh_()
    slope = products.square().neg_().add_(1).mul_(head.scale * inv_t) if with_slope else 0.0
    products.mul_(head.softcap * inv_t)
    return slope


def _exp_sum(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """(R, 1) sums of exp(logits), which are in `out`, after each row of logits (R, V) is shifted to a maximum of 0."""
    logits.sub_(logits.amax(1, keepdim=True))
    return torch.exp(logits, out=out).sum(1, keepdim=True)


def _row_dots(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.dot(*rows) for rows in zip(a, b, strict=True)])  # no (R, V) tensor of products
