"""Equations of SRPO: the divergence on the student's top k, and the teacher's entropy."""

import math

import numpy as np
import pytest
import torch
from srpo_references import F64, STUDENT, TEACHER, f64, random_logits, ref_entropy, ref_jsd
from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

from srpo import objective

# --- golden values of the specification ---


@pytest.mark.parametrize(
    ("alpha", "k", "tail", "expected"),
    [
        (0.5, None, True, 0.0995802517),
        (0.5, 2, True, 0.0970702111),
        (0.5, 2, False, 0.1109440717),
        (1.0, None, True, 0.4224698096),
        (0.0, None, True, 0.4064289695),
        (1.0, 2, True, 0.4126227251),
        (0.0, 2, True, 0.3959392113),
    ],
)
def test_divergence_golden(alpha, k, tail, expected):
    got = objective.jsd_topk_tail(f64(STUDENT), f64(TEACHER), k, alpha, tail)
    assert got.item() == pytest.approx(expected, abs=1e-10)


def test_entropy_golden():
    entropy = objective.teacher_entropy(f64(TEACHER))
    assert entropy.item() == pytest.approx(0.9817288079, abs=1e-10)
    assert math.exp(-entropy) == pytest.approx(0.3746628186, abs=1e-10)


def test_entropy_over_the_support_and_tail_is_lower_by_at_most_the_bound():
    support = objective.student_support(f64(STUDENT), 2)
    assert support.tolist() == [0, 1]
    logps = objective.topk_tail_logps(f64(TEACHER), support)
    bucketed = -(logps.exp() * logps).sum().item()
    assert bucketed == pytest.approx(0.9246422489, abs=1e-10)
    gap, bound = objective.teacher_entropy(f64(TEACHER)).item() - bucketed, logps[-1].exp().item() * math.log(2)
    assert gap == pytest.approx(0.0570865590, abs=1e-10)
    assert bound == pytest.approx(0.1083102122, abs=1e-10)


# --- divergence ---


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("k", "tail"), [(None, True), (1, True), (5, True), (5, False), (23, True), (100, True)])
def test_divergence_against_the_definition(seed, alpha, k, tail):
    student, teacher = random_logits(seed, 2, 3, 23)
    got = objective.jsd_topk_tail(student, teacher, k, alpha, tail)
    assert got.shape == (2, 3)
    for i, t in np.ndindex(2, 3):
        expected = ref_jsd(student[i, t].tolist(), teacher[i, t].tolist(), k, alpha, tail)
        assert got[i, t].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [True, False])
def test_divergence_is_trls(alpha, tail):
    student, teacher = random_logits(7, 4, 300)
    student.requires_grad_()
    ours = objective.jsd_topk_tail(student, teacher, 100, alpha, tail)
    theirs = compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=100, distillation_alpha=alpha, distillation_add_tail=tail
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("k", "tail"), [(None, True), (3, True), (3, False)])
def test_divergence_gradient(alpha, k, tail):
    student, teacher = random_logits(1, 3, 8, sharpness=1.0)
    assert torch.autograd.gradcheck(
        lambda x: objective.jsd_topk_tail(x, teacher, k, alpha, tail), student.requires_grad_()
    )


def test_the_gradient_is_a_policy_gradient_on_logits():
    """SDPO, Proposition 2.1, for KL(P || Q): p_v (log p_v - log q_v - KL) on logit v."""
    student, teacher = random_logits(2, 11)
    student.requires_grad_()
    kl = objective.jsd_topk_tail(student, teacher, None, alpha=1.0)
    kl.backward()
    gap = (student.log_softmax(-1) - teacher.log_softmax(-1)).detach()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) * (gap - kl.detach()))


def test_a_tail_of_little_mass_is_kept():
    """Of a real model the support holds nearly everything."""
    student, teacher = (torch.tensor([0.0, 0.0, tail, tail], dtype=torch.float64) for tail in (-12.0, -9.0))
    expected = objective.jsd_topk_tail(student, teacher, None)
    assert objective.jsd_topk_tail(student, teacher, 2).item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_tail_carries_gradient_to_tokens_outside_the_support():
    student, teacher = random_logits(4, 20)
    outside = student.argsort(descending=True)[5:]
    gradients = {}
    for tail in (True, False):
        leaf = student.clone().requires_grad_()
        objective.jsd_topk_tail(leaf, teacher, 5, tail=tail).backward()
        gradients[tail] = leaf.grad[outside]
    assert gradients[True].all()
    assert not gradients[False].any()


@pytest.mark.parametrize("seed", range(3))
def test_divergence_properties(seed):
    student, teacher = random_logits(seed, 50, 30, sharpness=4.0)
    whole = objective.jsd_topk_tail(student, teacher, None)
    assert (whole > 0).all()
    assert (whole <= math.log(2)).all()
    torch.testing.assert_close(whole, objective.jsd_topk_tail(teacher, student, None))  # equal shares are symmetric
    torch.testing.assert_close(whole, objective.jsd_topk_tail(student + 3, teacher - 9, None))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    kept = objective.jsd_topk_tail(student, teacher, 10)
    torch.testing.assert_close(kept, objective.jsd_topk_tail(student[:, order], teacher[:, order], 10))
    assert (kept <= whole + 1e-12).all()  # merging categories loses information
    assert objective.jsd_topk_tail(student, teacher, 30).equal(whole)


@pytest.mark.parametrize("k", [None, 4])
def test_equal_models_have_no_divergence_and_no_gradient(k):
    student = random_logits(0, 6, 12)[0].requires_grad_()
    value = objective.jsd_topk_tail(student, student.detach(), k)
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(6, dtype=F64), rtol=0, atol=1e-14)
    torch.testing.assert_close(student.grad, torch.zeros(6, 12, dtype=F64), rtol=0, atol=1e-14)


def test_half_precision_logits_are_scored_in_float32():
    student, teacher = (x.bfloat16() for x in random_logits(5, 40, 500))
    exact = objective.jsd_topk_tail(student.double(), teacher.double(), 100)
    got = objective.jsd_topk_tail(student, teacher, 100)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-6)
    entropy = objective.teacher_entropy(teacher)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy.double(), objective.teacher_entropy(teacher.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 0.0])
@pytest.mark.parametrize(("k", "tail"), [(None, True), (2, True), (2, False)])
def test_extreme_logits_stay_finite_in_float32(alpha, k, tail):
    """A student that is all but certain: nothing is left for the tail in float32."""
    student = torch.tensor([[60.0, 0, -1, -2], [0.0, 0, 0, 0], [1e4, 9.9e3, -1e4, 0]]).requires_grad_()
    teacher = torch.tensor([[60.0, 1, 0, -1], [-50.0, 50, 0, 0], [1e4, -1e4, 0, 0]])
    value = objective.jsd_topk_tail(student, teacher, k, alpha, tail)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(("k", "tail"), [(None, True), (2, True), (2, False)])
def test_tokens_that_a_model_rules_out_have_probability_zero(k, tail):
    """-inf from a model that masks its logits counts as the limit of a very low logit."""
    student = torch.tensor([2.0, 1.0, -math.inf, 0.0], requires_grad=True)
    teacher = torch.tensor([1.0, -math.inf, 0.0, -math.inf])
    value = objective.jsd_topk_tail(student, teacher, k, tail=tail)
    value.backward()
    limit = [x.detach().double().clamp(min=-500) for x in (student, teacher)]
    assert value.item() == pytest.approx(objective.jsd_topk_tail(*limit, k, tail=tail).item(), rel=1e-5)
    assert torch.isfinite(student.grad).all()
    assert objective.teacher_entropy(teacher).item() == pytest.approx(ref_entropy([1.0, 0.0]), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"), ({"top_k": 0}, "top_k must be at least 1.*got 0")],
)
def test_bad_settings_of_the_divergence(settings, message):
    with pytest.raises(ValueError, match=message):
        objective.jsd_topk_tail(f64(STUDENT), f64(TEACHER), **settings)


def test_logits_of_different_vocabularies_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(4,\) and \(5,\)"):
        objective.jsd_topk_tail(f64(STUDENT), f64([*TEACHER, 0.0]))


# --- entropy ---


def test_entropy_against_the_definition():
    logits = random_logits(0, 3, 4, 29, sharpness=5.0)[0]
    got = objective.teacher_entropy(logits)
    for i, t in np.ndindex(3, 4):
        assert got[i, t].item() == pytest.approx(ref_entropy(logits[i, t].tolist()), rel=1e-10, abs=1e-13)
    torch.testing.assert_close(objective.teacher_entropy(torch.zeros(2, 7)), torch.full((2,), math.log(7)))
    assert objective.teacher_entropy(torch.tensor([500.0, 0.0])).item() == 0
