"""Reverse KL from hidden states beside its definition in float64; what it counts and refuses."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from va_opd import divergence, lm_head, objective
from va_opd._trl import chunked_divergence
from va_opd.divergence import chunked_reverse_kl, reverse_kl_by_triton, reverse_kl_in_place
from va_opd.lm_head import PADDED_ROW_LOGIT, LMHead, sampled_logps, without_padding

N, VOCAB = 29, 41


@pytest.fixture(params=[None, 10], ids=["one tile", "tiles of ten rows"])
def tiles(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(divergence, "tile_rows", lambda *arguments: request.param)
        monkeypatch.setattr(lm_head, "VOCABULARY_TILE", 16)  # real vocabularies are several pieces


@pytest.mark.parametrize("padded", [0, 13])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("biases", [False, True])
def test_against_float64(tiles, padded, temperature, biases):
    """Different widths; padded vocabulary rows, whose weights would win every softmax, must have no effect."""
    torch.manual_seed(0)
    n, vocab = N, VOCAB
    s_hidden, t_hidden = torch.randn(n, 12, requires_grad=True), torch.randn(n, 20)
    s_weight, t_weight = torch.randn(vocab + padded, 12), torch.randn(vocab + padded, 20)
    with torch.no_grad():
        s_weight[vocab:] *= 10
        t_weight[vocab:] *= 10
    s_weight.requires_grad_()
    bias = torch.randn(2, vocab + padded).requires_grad_() if biases else None
    padding = torch.zeros(vocab + padded)
    padding[vocab:] = PADDED_ROW_LOGIT
    heads = [
        LMHead(w, (padding if bias is None else bias[i] + padding) if padded or biases else None, 1.0, None)
        for i, w in enumerate((s_weight, t_weight))
    ]
    upstream = torch.rand(n)
    kl, entropy = chunked_reverse_kl(heads[0], s_hidden, heads[1], t_hidden, upstream, temperature)
    leaves = (s_hidden, s_weight) if bias is None else (s_hidden, s_weight, bias)
    got = torch.autograd.grad((kl * upstream).sum(), leaves)

    h, w, *b = (x.detach().double().requires_grad_() for x in leaves)
    s = h @ w[:vocab].T + (b[0][0, :vocab] if b else 0)
    t = t_hidden.double() @ t_weight[:vocab].double().T + (0 if bias is None else bias[1, :vocab].double())
    s, t = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    expected = (s.exp() * (s - t)).sum(-1)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(s.exp() * s).sum(-1), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got, torch.autograd.grad((expected * upstream).sum(), (h, w, *b)), strict=True):
        torch.testing.assert_close(ours[: len(theirs)].double(), theirs, rtol=1e-4, atol=6e-5)
    assert not got[1][vocab:].any()  # padded rows get no gradient


def heads(softcap: float | None = None, scale: float = 1.0):
    """Hidden states and head of student and teacher; the student's want gradients."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, 12).requires_grad_(), torch.randn(VOCAB, 12).requires_grad_()
    teacher_hidden, teacher = torch.randn(N, 20), LMHead(torch.randn(VOCAB, 20), None, scale, softcap)
    return hidden, LMHead(weight, None, scale, softcap), teacher_hidden, teacher


@pytest.mark.parametrize(("softcap", "scale"), [(None, 0.3), (2.0, 1.0), (3.0, 0.5)])
@pytest.mark.parametrize("of_teacher", [None, (None, 0.8), (4.0, 0.8)])
def test_scaled_and_capped_logits(tiles, softcap, scale, of_teacher):
    """The sizes of a family, such as Granite's, differ in the scale of their logits."""
    hidden, student, teacher_hidden, teacher = heads(softcap, scale)
    if of_teacher:
        teacher = teacher._replace(softcap=of_teacher[0], scale=of_teacher[1])
    coefficients = torch.rand(N)
    kl, entropy = chunked_reverse_kl(student, hidden, teacher, teacher_hidden, coefficients, 0.7)
    got = torch.autograd.grad((kl * coefficients).sum() / 5, (hidden, student.weight))

    def logits(hidden, head):
        products, cap = hidden @ head.weight.T * head.scale, head.softcap
        return (products if cap is None else cap * torch.tanh(products / cap)) / 0.7

    s, t = logits(hidden, student), logits(teacher_hidden, teacher)
    expected = objective.reverse_kl(s, t)
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(s.softmax(-1) * s.log_softmax(-1)).sum(-1), rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad((expected * coefficients).sum() / 5, (hidden, student.weight))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_a_head_keeps_its_bias_without_its_padding():
    torch.manual_seed(0)
    head, hidden, tokens = LMHead(torch.randn(9, 4), torch.randn(9), 0.5, None), torch.randn(7, 4), torch.arange(7)
    assert without_padding(head, 9, 9) is head
    bias = without_padding(head, 9, 7).bias
    torch.testing.assert_close(bias, head.bias + torch.tensor([0.0] * 7 + [PADDED_ROW_LOGIT] * 2))
    logps = sampled_logps(head, hidden, tokens, 7)
    expected = (0.5 * (hidden @ head.weight[:7].T + head.bias[:7])).log_softmax(-1)[tokens, tokens]
    torch.testing.assert_close(logps, expected)
    with pytest.raises(ValueError, match="^the model soft-caps its logits and pads its vocabulary"):
        without_padding(head._replace(softcap=30.0), 9, 7)


def test_logits_whose_exponential_overflows():
    hidden, student, teacher_hidden, teacher = heads()
    kl, entropy = chunked_reverse_kl(student, 50 * hidden, teacher, 50 * teacher_hidden, torch.ones(N))
    s, t = 50 * hidden.double() @ student.weight.double().T, 50 * teacher_hidden.double() @ teacher.weight.double().T
    torch.testing.assert_close(kl.double(), objective.reverse_kl(s, t), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(entropy.double(), torch.special.entr(s.softmax(-1)).sum(-1), rtol=1e-3, atol=1e-3)
    kl.sum().backward()
    assert hidden.grad.isfinite().all()


def test_the_loss_must_be_the_one_that_was_announced():
    hidden, student, teacher_hidden, teacher = heads()
    coefficients = torch.rand(N)
    kl, entropy = chunked_reverse_kl(student, hidden, teacher, teacher_hidden, coefficients)
    assert not entropy.requires_grad
    with pytest.raises(RuntimeError, match="^the loss is not the sum of coefficients"):
        kl.mean().backward()
    kl, _ = chunked_reverse_kl(student, hidden, teacher, teacher_hidden, torch.ones(N))
    with pytest.raises(RuntimeError, match="^the loss is not the sum of coefficients"):
        (kl * torch.linspace(1, 1.02, N)).sum().backward()
    kl, _ = chunked_reverse_kl(student, hidden, teacher, teacher_hidden, torch.zeros(N))
    (kl * 0).sum().backward()
    assert not hidden.grad.any() and not student.weight.grad.any()


@pytest.mark.parametrize(("softcap", "expected"), [(None, 3), (3.0, 4)])
def test_tiles_have_room_for_all_that_is_alive_at_once(monkeypatch, softcap, expected):
    asked, (hidden, student, teacher_hidden, teacher) = [], heads(softcap)
    monkeypatch.setattr(divergence, "tile_rows", lambda rows, size, buffers: asked.append(buffers) or rows)
    chunked_reverse_kl(student, hidden, teacher, teacher_hidden, torch.ones(N))
    assert asked == [expected]


@pytest.mark.parametrize("size", [1e-17, 1e-28, 1e-42, 1e-43, 0.0])
def test_tiny_coefficients_are_no_error(size):
    """As a micro-batch has them whose rollouts lost against a sibling, with a small rollout temperature."""
    hidden, student, teacher_hidden, teacher = heads()
    coefficients = size * torch.rand(N)
    kl, _ = chunked_reverse_kl(student, hidden, teacher, teacher_hidden, coefficients)
    (kl * coefficients / 64).sum().backward()  # by the prompts of the step
    assert hidden.grad.isfinite().all()
    if size > 1e-30:
        plain = hidden.detach().requires_grad_()
        kl, _ = chunked_reverse_kl(student, plain, teacher, teacher_hidden, coefficients / size)
        (kl * coefficients / size).sum().backward()
        torch.testing.assert_close(64 * hidden.grad / size, plain.grad, rtol=1e-4, atol=1e-6)


def test_an_evaluation_makes_no_gradient(monkeypatch):
    def fail(*arguments):
        raise AssertionError("a gradient was made")

    hidden, student, teacher_hidden, teacher = heads()
    given = (student, hidden, teacher, teacher_hidden, torch.ones(N))
    expected = chunked_reverse_kl(*given)
    monkeypatch.setattr(LMHead, "pull_back", fail)
    with torch.no_grad():
        assert all(map(torch.equal, chunked_reverse_kl(*given), expected))


def test_logits_are_computed_once_and_only_for_what_is_needed():
    hidden, student, teacher_hidden, teacher = heads()
    in_place = {torch.ops.aten.addmm_: lambda into, a, b, **_: 2 * a[0] * a[1] * b[1]}
    for trained in ("hidden and head", "hidden"):
        student = student._replace(weight=student.weight.detach().requires_grad_(trained != "hidden"))
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            kl, _ = chunked_reverse_kl(student, hidden, teacher, teacher_hidden, torch.ones(N))
            kl.sum().backward()
        products = 12 + 20 + 12 * (2 if trained != "hidden" else 1)
        assert counter.get_total_flops() == 2 * N * VOCAB * products, trained


def test_both_ways_of_a_tile_agree(monkeypatch):
    """TRL's torch versions of its kernels take the same arguments, so they stand in where Triton has no device."""

    class Launched:
        def __init__(self, function):
            self.function = function

        def __getitem__(self, grid):
            return self.function

    for kernel, in_torch in (("_stats_kernel", "_stats_tile"), ("_backward_kernel", "_backward_tile")):
        monkeypatch.setattr(chunked_divergence, kernel, Launched(getattr(chunked_divergence, in_torch)))
    torch.manual_seed(0)
    products, coefficients = torch.randn(2, 7, 300), torch.rand(7)
    for scale, cap, inv_t in itertools.product((1.0, 0.5), (None, 2.0), (1.0, 2.0)):
        ours, theirs = torch.cat([products, torch.empty(1, 7, 300)]), products.clone()
        heads = LMHead(None, None, scale, cap), LMHead(None, None, 0.8, None)
        got = reverse_kl_in_place(ours, coefficients, *heads, inv_t)
        expected = reverse_kl_by_triton(theirs, coefficients, *heads, inv_t)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)


INTERPRETED = """
import itertools, torch
from va_opd.divergence import reverse_kl_by_triton, reverse_kl_in_place
from va_opd.lm_head import LMHead
torch.manual_seed(0)
products, coefficients = 3 * torch.randn(2, 5, 2500), torch.rand(5)  # columns of two blocks and a half
for scale, cap, inv_t in itertools.product((1.0, 0.5), (None, 2.0), (1.0, 2.0)):
    ours, theirs = torch.cat([products, torch.empty(1, 5, 2500)]), products.clone()
    heads = LMHead(None, None, scale, cap), LMHead(None, None, 0.8, None)
    got = reverse_kl_in_place(ours, coefficients, *heads, inv_t)
    torch.testing.assert_close(got, reverse_kl_by_triton(theirs, coefficients, *heads, inv_t), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=2e-5)
"""


def test_tiles_by_the_interpreted_kernels():
    """TRL's kernels themselves and how they are launched, by Triton's interpreter, which needs no GPU."""
    pytest.importorskip("triton", reason="needs Triton: make test-vllm")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when a kernel is defined
    subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, check=True)


def test_small_coefficients_keep_their_bits_in_half_precision():
    """As with fp16, a long rollout and the small probabilities of a large vocabulary: the factor of the gradient
    scaler comes after the gradient is made."""
    hidden, student, teacher_hidden, teacher = heads()
    coefficients = torch.full((N,), 1e-7)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            kl, _ = chunked_reverse_kl(student, hidden, teacher, teacher_hidden, coefficients)
        gradients.append(torch.autograd.grad((kl * coefficients).sum() * 65536, (hidden, student.weight)))
    for exact, half in zip(*gradients, strict=True):
        assert (half - exact).norm() < 1e-2 * exact.norm()
        assert (half.abs().sum(1) > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_as_on_the_cpu(tiles, dtype, softcap):
    """More columns than a block and than a slice of the vocabulary have; without a cap, some of them padding."""
    torch.manual_seed(0)
    padding = torch.zeros(33_000)
    padding[-20:] = PADDED_ROW_LOGIT
    inputs = torch.randn(N, 64), 0.3 * torch.randn(33_000, 64), torch.randn(N, 96), 0.3 * torch.randn(33_000, 96)
    coefficients = torch.rand(N)

    def run(device):
        s_hidden, s_weight, t_hidden, t_weight = (tensor.to(device, dtype) for tensor in inputs)
        s_hidden, s_weight = s_hidden.requires_grad_(), s_weight.requires_grad_()
        bias = None if softcap else padding.to(device)
        made = [LMHead(weight, bias, 1.0, softcap) for weight in (s_weight, t_weight)]
        kl, entropy = chunked_reverse_kl(made[0], s_hidden, made[1], t_hidden, coefficients.to(device), 0.7)
        gradients = torch.autograd.grad((kl * coefficients.to(device)).sum(), (s_hidden, s_weight))
        return [tensor.detach().float().cpu() for tensor in (kl, entropy, *gradients)]

    for got, expected in zip(run("cuda"), run("cpu"), strict=True):
        assert (got - expected).norm() < (1e-4 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_tiles_are_of_like_size_and_bounded():
    for count, vocab_size in ((1, 10), (4096, 151936), (5000, 151936), (700, 40000), (3, 10**9)):
        rows = divergence.tile_rows(count, vocab_size, 3)
        assert rows == 1 or 4 * 3 * rows * vocab_size <= divergence.TILE_BYTES
        assert -(-count // rows) * rows - count < rows
    assert divergence.tile_rows(4096, 151936, 3) == 410
