"""The equations of SRPO against golden values of the specification and references written from the definitions.

The references are plain Python loops in float64 and share no code with `srpo.objective`.
"""

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

from srpo import objective

F64 = torch.float64
STUDENT, TEACHER = [2.0, 1.0, 0.0, -1.0], [0.5, 1.5, 0.0, -2.0]


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def random_logits(seed: int, *shape: int, sharpness: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(sharpness * torch.randn(*shape, generator=generator, dtype=F64) for _ in range(2))


# --- references, straight from the definitions ----------------------------------------------------------------


def ref_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    scores = [math.exp(x - top) for x in logits]
    return [s / math.fsum(scores) for s in scores]


def ref_kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def ref_jsd(student: list[float], teacher: list[float], k: int | None, alpha: float, tail: bool) -> float:
    """SDPO, Section 3, for one token."""
    p, q = ref_softmax(student), ref_softmax(teacher)
    if k is not None and k < len(p):
        support = sorted(range(len(p)), key=lambda v: -student[v])[:k]
        rest = [v for v in range(len(p)) if v not in support]
        p, q = (
            [d[v] for v in support] + [math.fsum(d[v] for v in rest)]
            if tail
            else [d[v] / math.fsum(d[u] for u in support) for v in support]
            for d in (p, q)
        )
    if alpha in (0, 1):
        return ref_kl(p, q) if alpha else ref_kl(q, p)
    m = [(1 - alpha) * a + alpha * b for a, b in zip(p, q, strict=True)]
    return (1 - alpha) * ref_kl(p, m) + alpha * ref_kl(q, m)


def ref_entropy(logits: list[float]) -> float:
    return -math.fsum(p * math.log(p) for p in ref_softmax(logits) if p > 0)


def ref_route(rewards: list[float], group: int, threshold: float = 0.5) -> list[tuple[bool, bool, bool, int]]:
    """(c, m, z, donor) of each rollout (Section 3.1)."""
    rows = []
    for i, reward in enumerate(rewards):
        start = i // group * group
        donors = [j for j in range(start, start + group) if j != i and rewards[j] >= threshold]
        correct = reward >= threshold
        rows.append((correct, bool(donors), not correct and bool(donors), donors[0] if donors else -1))
    return rows


def ref_grpo(logp: float, old: float, advantage: float, low: float, high: float, delta: float | None) -> float:
    """Clipped surrogate as verl writes it, dual clip by a bound on the loss of negative advantages."""
    w = math.exp(logp - old)
    loss = max(-w * advantage, -min(max(w, 1 - low), 1 + high) * advantage)
    return min(loss, -delta * advantage) if delta is not None and advantage < 0 else loss


def ref_weights(entropy: np.ndarray, mask: np.ndarray, beta: float) -> np.ndarray:
    raw = {cell: math.exp(-beta * entropy[cell]) for cell in zip(*mask.nonzero(), strict=True)}
    mean = math.fsum(raw.values()) / max(len(raw), 1)
    weights = np.zeros_like(entropy)
    for cell, value in raw.items():
        weights[cell] = value / mean
    return weights


def ref_loss(routing, grpo, sdpo, weights, distill, mask, mix=0.9) -> float:
    """Section 3.3, and the baselines over the tokens that they train on."""
    terms, tokens = [], 0
    for i, t in np.ndindex(*mask.shape):
        routed = distill[i] and routing != "grpo"
        if not mask[i, t] or (routing.startswith("sdpo") and not routed):
            continue
        distillation = weights[i, t] * sdpo[i, t] if routed else 0.0
        tokens += 1
        if routing == "mix":
            terms.append(mix * grpo[i, t] + (1 - mix) * distillation)
        else:
            terms.append(distillation if routed else grpo[i, t])
    return math.fsum(terms) / max(tokens, 1)


# --- golden values of the specification, token level --------------------------------------------------------------


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


@pytest.mark.parametrize(("ratio", "advantage", "expected"), [(5, -1, 3.0), (5, 1, -1.28), (0.5, -1, 0.8)])
def test_dual_clip_golden(ratio, advantage, expected):
    logps = f64([[math.log(ratio)]])
    got = objective.grpo_token_loss(logps, torch.zeros_like(logps), f64([advantage]), 0.2, 0.28, 3.0)
    assert got.item() == pytest.approx(expected)


# --- golden values of the specification, batch level --------------------------------------------------------------

REWARDS = [1.0, 0, 0, 1, 0, 0, 0, 0]
LENGTHS = [2, 3, 1, 2, 2, 2, 1, 3]


def batch_mask() -> torch.Tensor:
    return (torch.arange(3)[None] < torch.tensor(LENGTHS)[:, None]).long()


def golden_batch(beta: float, scale: bool, dtype=F64):
    """Branch losses, weights, rows and mask of the example; the ratios are all 1."""
    rewards, mask = torch.tensor(REWARDS, dtype=dtype), batch_mask()
    routing = objective.route(rewards, 4)
    entropy, sdpo = (torch.full((8, 3), math.nan, dtype=dtype) for _ in range(2))
    entropy[1], entropy[2, 0] = f64([0.0, 1, 2]), 0.5
    sdpo[1], sdpo[2, 0] = f64([0.1, 0.2, 0.3]), 0.4
    weights = objective.entropy_weights(entropy, mask * routing.distill[:, None], beta)
    zeros = torch.zeros(8, 3, dtype=dtype)
    grpo = objective.grpo_token_loss(zeros, zeros, objective.group_advantages(rewards, 4, scale), delta=3.0)
    return grpo, sdpo, weights, routing.distill, mask


def test_golden_weights():
    _, sdpo, weights, distill, _ = golden_batch(1.0, False)
    assert distill.tolist() == [False, True, True, False, False, False, False, False]
    torch.testing.assert_close(weights[1], f64([1.895963, 0.697486, 0.256591]), rtol=0, atol=5e-7)
    assert weights[2].tolist() == pytest.approx([1.149960, 0, 0], abs=5e-7)
    assert (weights * sdpo).nansum().item() == pytest.approx(0.8660547202, abs=1e-10)


@pytest.mark.parametrize(
    ("beta", "scale", "expected"),
    [(1, False, -0.0708715800), (0, False, -0.0625), (1, True, -0.1623775559), (0, True, -0.1540059760)],
)
def test_golden_loss(beta, scale, expected):
    assert objective.srpo_loss(*golden_batch(beta, scale)).item() == pytest.approx(expected, abs=1e-10)
    assert objective.srpo_loss(*golden_batch(beta, scale, torch.float32)).item() == pytest.approx(expected, abs=1e-7)


def test_golden_sum_of_the_grpo_branch_with_deviation():
    grpo, *_, distill, mask = golden_batch(1.0, True)
    assert grpo[mask.bool() & ~distill[:, None]].sum().item() == pytest.approx(-3.4640956151, abs=1e-10)


# --- routing ----------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_routes_of_every_pattern(group):
    patterns = list(itertools.product([0.0, 1.0], repeat=group))
    rewards = [r for pattern in patterns for r in pattern]
    routing = objective.route(torch.tensor(rewards), group)
    got = list(zip(*(column.tolist() for column in routing), strict=True))
    assert got == ref_route(rewards, group)
    for i, (correct, has_sibling, distill, donor) in enumerate(got):
        assert (donor >= 0) == has_sibling
        assert donor != i
        if donor >= 0:
            assert donor // group == i // group
            assert got[donor][0]
        assert not (distill and correct)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.5, 0.25, 1.0])
def test_routes_of_graded_rewards(seed, threshold):
    rewards = np.random.default_rng(seed).integers(0, 9, 6 * 8) / 8  # 0.5 itself among them: it is correct
    routing = objective.route(torch.tensor(rewards), 8, threshold)
    assert list(zip(*(c.tolist() for c in routing), strict=True)) == ref_route(rewards.tolist(), 8, threshold)


def test_failed_rollouts_share_the_first_correct_sibling():
    """Tables 6 and 7 of the paper: the first and the last rollout are both shown the third."""
    routing = objective.route(torch.tensor([0.0, 0, 1, 1, 0, 1, 1, 0]), 8)
    assert routing.donor.tolist() == [2, 2, 3, 2, 2, 2, 2, 2]
    assert routing.distill.tolist() == [True, True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("rewards", "distill", "donor"),
    [([1, 1, 1], [0, 0, 0], [1, 0, 0]), ([0, 0, 0], [0, 0, 0], [-1, -1, -1]), ([0, 1, 0], [1, 0, 1], [1, -1, 1])],
    ids=["all correct", "all wrong", "lone success"],
)
def test_groups_without_contrast_and_a_lone_success(rewards, distill, donor):
    routing = objective.route(torch.tensor(rewards, dtype=torch.float32), 3)
    assert routing.distill.tolist() == [bool(z) for z in distill]
    assert routing.donor.tolist() == donor
    if len(set(rewards)) == 1:
        for scale in (False, True):
            assert (
                objective.group_advantages(torch.tensor(rewards, dtype=torch.float32), 3, scale).tolist() == [0.0] * 3
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_rewards_of_any_dtype(dtype):
    rewards = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1], dtype=dtype)
    assert objective.route(rewards, 4).distill.tolist() == [False, True, True, False, True, True, True, False]
    assert objective.group_advantages(rewards, 4).tolist() == [0.5, -0.5, -0.5, 0.5, -0.25, -0.25, -0.25, 0.75]


def test_rows_of_each_routing():
    routing = objective.route(torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]), 4)
    correct, sibling = routing.correct, routing.has_sibling
    expected = {
        "srpo": ~correct & sibling,
        "grpo": torch.zeros(12, dtype=torch.bool),
        "sdpo": sibling,
        "sdpo_incorrect": ~correct & sibling,
        "sdpo_correct": correct & sibling,
        "mix": sibling,
    }
    assert expected.keys() == set(objective.ROUTINGS)
    for kind, rows in expected.items():
        assert objective.distilled_rows(routing, kind).equal(rows), kind
    assert (expected["sdpo_correct"] ^ expected["sdpo_incorrect"]).equal(expected["sdpo"])
    with pytest.raises(ValueError, match="routing must be one of srpo, grpo.*'spro'"):
        objective.distilled_rows(routing, "spro")


def test_random_donors_are_uniform_over_the_correct_siblings():
    correct = torch.tensor([True, True, False, True, False, False, True, False])
    draws = torch.stack([objective.random_donors(correct, 4, torch.Generator().manual_seed(i)) for i in range(600)])
    assert [set(column.tolist()) for column in draws.T] == [
        {1, 3},
        {0, 3},
        {0, 1, 3},
        {0, 1},
        {6},
        {6},
        {-1},
        {6},
    ]
    counts = torch.bincount(draws[:, 2])
    assert all(150 < counts[donor] < 250 for donor in (0, 1, 3))
    again = [objective.random_donors(correct, 4, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert again[0].equal(again[1])


def test_rows_with_the_grpo_loss():
    """Every rollout has a loss in SRPO; in Advantage Mix all have GRPO's."""
    routing = objective.route(torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]), 4)
    expected = {"srpo": [True, False, False, True] + [True] * 4, "grpo": [True] * 8, "mix": [True] * 8}
    for kind in objective.ROUTINGS:
        distill = objective.distilled_rows(routing, kind)
        assert objective.grpo_rows(distill, kind).tolist() == expected.get(kind, [False] * 8), kind


@pytest.mark.parametrize("function", [objective.route, objective.group_advantages])
@pytest.mark.parametrize(
    ("rewards", "group", "message"),
    [
        ([1.0, math.nan], 2, "reward of rollout 1 is nan"),
        ([math.inf, 0.0], 2, "reward of rollout 0 is inf"),
        ([1.0, 0.0, 1.0], 2, "3 rewards do not divide into groups of num_generations=2"),
        ([1.0, 0.0], 0, "num_generations=0"),
        ([[1.0, 0.0], [0.0, 1.0]], 2, r"got shape \(2, 2\)"),
        ([], 2, r"got shape \(0,\)"),
    ],
)
def test_bad_rewards_are_one_clear_sentence(function, rewards, group, message):
    with pytest.raises(ValueError, match=message) as error:
        function(torch.tensor(rewards), group)
    assert "\n" not in str(error.value)


# --- advantages and the surrogate ----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [False, True])
def test_advantages_against_the_definition(seed, scale):
    rewards = np.random.default_rng(seed).normal(size=(5, 6))
    expected = rewards - rewards.mean(1, keepdims=True)
    if scale:
        expected = expected / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)
    got = objective.group_advantages(torch.tensor(rewards.ravel()), 6, scale)
    np.testing.assert_allclose(got, expected.ravel(), rtol=1e-12, atol=1e-12)


def test_in_mixed_groups_the_grpo_branch_has_no_negative_advantage():
    """With 0/1 rewards every failed rollout of a mixed group is distilled; advantages are of the whole group."""
    rewards = torch.tensor([float(r) for pattern in itertools.product([0, 1], repeat=4) for r in pattern])
    routing, advantages = objective.route(rewards, 4), objective.group_advantages(rewards, 4)
    kept = advantages[~routing.distill]
    assert (kept >= 0).all()
    lone = (routing.correct & ~routing.has_sibling).nonzero().flatten()
    assert advantages[lone].tolist() == [0.75] * 4
    assert advantages[routing.distill].max() < 0


@pytest.mark.parametrize("delta", [None, 3.0])
def test_surrogate_against_the_definition(delta):
    generator = torch.Generator().manual_seed(0)
    logps, old = (torch.randn(200, 50, generator=generator, dtype=F64) for _ in range(2))
    advantages = torch.randn(200, generator=generator, dtype=F64)
    got = objective.grpo_token_loss(logps, old, advantages, 0.2, 0.28, delta)
    expected = [
        [ref_grpo(x, y, a, 0.2, 0.28, delta) for x, y in zip(xs, ys, strict=True)]
        for xs, ys, a in zip(logps.tolist(), old.tolist(), advantages.tolist(), strict=True)
    ]
    torch.testing.assert_close(got, f64(expected), rtol=1e-12, atol=1e-12)


def test_surrogate_gradient():
    logps, old = random_logits(3, 4, 5, sharpness=0.4)
    advantages = f64([0.5, -0.5, 1.5, 0.0])
    distance = torch.stack([((logps - old).exp() - edge).abs() for edge in (0.8, 1.28, 3.0)]).min()
    assert distance > 1e-4  # no kink within the finite differences
    assert torch.autograd.gradcheck(
        lambda x: objective.grpo_token_loss(x, old, advantages, delta=3.0), logps.requires_grad_()
    )


def test_on_policy_the_gradient_is_the_policy_gradient():
    logps = random_logits(0, 3, 4)[0].requires_grad_()
    advantages = f64([0.5, -0.5, 0.0])
    objective.grpo_token_loss(logps, logps.detach(), advantages, delta=3.0).sum().backward()
    torch.testing.assert_close(logps.grad, -advantages[:, None].expand(3, 4))


# --- divergence ----------------------------------------------------------------


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


# --- entropy and its weights ----------------------------------------------------------------


def test_entropy_against_the_definition():
    logits = random_logits(0, 3, 4, 29, sharpness=5.0)[0]
    got = objective.teacher_entropy(logits)
    for i, t in np.ndindex(3, 4):
        assert got[i, t].item() == pytest.approx(ref_entropy(logits[i, t].tolist()), rel=1e-10, abs=1e-13)
    torch.testing.assert_close(objective.teacher_entropy(torch.zeros(2, 7)), torch.full((2,), math.log(7)))
    assert objective.teacher_entropy(torch.tensor([500.0, 0.0])).item() == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_weights_against_the_definition(seed, beta):
    rng = np.random.default_rng(seed)
    entropy, mask = rng.exponential(size=(5, 7)), rng.integers(0, 2, size=(5, 7))
    got = objective.entropy_weights(torch.tensor(entropy), torch.tensor(mask), beta)
    np.testing.assert_allclose(got, ref_weights(entropy, mask, beta), rtol=1e-12)
    assert got.sum().item() == pytest.approx(mask.sum())
    if beta == 0:
        assert got.equal(torch.tensor(mask, dtype=F64))


def test_weights_fall_with_entropy_and_do_not_see_a_common_shift():
    entropy, mask = torch.linspace(0, 5, 12, dtype=F64).view(3, 4), torch.ones(3, 4)
    weights = objective.entropy_weights(entropy, mask)
    assert (weights.flatten().diff() < 0).all()
    torch.testing.assert_close(weights, objective.entropy_weights(entropy + 4, mask))


def test_weights_are_normalised_over_all_rows_and_not_by_row():
    entropy, mask = torch.tensor([[0.0, 0.0], [3.0, 3.0]]), torch.ones(2, 2)
    means = objective.entropy_weights(entropy, mask).mean(1)
    assert means[0] > 1.9
    assert means[1] < 0.1


def test_a_large_beta_does_not_make_every_weight_zero():
    weights = objective.entropy_weights(torch.tensor([[9.0, 9.0, 10.0]]), torch.ones(1, 3), beta=100.0)
    assert weights.tolist() == [pytest.approx([1.5, 1.5, 0.0])]


def test_weights_outside_the_mask():
    entropy, mask = torch.tensor([[1.0, math.nan], [math.inf, 2.0]]), torch.tensor([[1, 0], [0, 1]])
    weights = objective.entropy_weights(entropy, mask)
    assert weights[0, 1] == weights[1, 0] == 0
    assert weights.sum().item() == pytest.approx(2)
    assert objective.entropy_weights(entropy, torch.zeros(2, 2)).equal(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="teacher entropy is not finite on a routed token"):
        objective.entropy_weights(entropy, torch.ones(2, 2))


# --- the loss ----------------------------------------------------------------


def random_batch(seed: int, rows: int = 12, length: int = 9):
    """Token losses, weights, distilled rows and mask; responses of length 0 to `length`."""
    generator = torch.Generator().manual_seed(seed)
    grpo, sdpo = (torch.randn(rows, length, generator=generator, dtype=F64) for _ in range(2))
    weights = torch.rand(rows, length, generator=generator, dtype=F64)
    distill = torch.rand(rows, generator=generator) < 0.4
    lengths = torch.randint(0, length + 1, (rows, 1), generator=generator)
    return grpo, sdpo, weights, distill, (torch.arange(length)[None] < lengths).long()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("routing", objective.ROUTINGS)
def test_loss_against_the_definition(seed, routing):
    grpo, sdpo, weights, distill, mask = random_batch(seed)
    if routing == "grpo":
        distill = torch.zeros_like(distill)
    counted = mask * distill[:, None] if routing.startswith("sdpo") else mask
    got = objective.routed_loss(routing, grpo, sdpo, weights, distill, mask, counted.sum())
    expected = ref_loss(routing, *(x.numpy() for x in (grpo, sdpo, weights, distill, mask)))
    assert got.item() == pytest.approx(expected, rel=1e-12)
    if routing == "srpo":
        assert objective.srpo_loss(grpo, sdpo, weights, distill, mask).item() == got.item()


@pytest.mark.parametrize("routing", objective.ROUTINGS)
def test_micro_batches_row_order_and_padding_do_not_matter(routing):
    batch = random_batch(11)
    tokens = batch[-1].sum()
    whole = objective.routed_loss(routing, *batch, tokens)
    for size in (1, 5):
        parts = zip(*(x.split(size) for x in batch), strict=True)
        total = sum(objective.routed_loss(routing, *part, tokens) for part in parts)
        assert total.item() == pytest.approx(whole.item(), rel=1e-12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert objective.routed_loss(routing, *(x[order] for x in batch), tokens).item() == pytest.approx(whole.item())
    padded = [x if x.dim() == 1 else torch.cat([x, torch.zeros(12, 3, dtype=x.dtype)], dim=1) for x in batch]
    assert objective.routed_loss(routing, *padded, tokens).item() == pytest.approx(whole.item())


@pytest.mark.parametrize("routing", objective.ROUTINGS)
def test_coefficients_are_the_gradient_of_the_loss(routing):
    grpo, sdpo, weights, distill, mask = random_batch(4)
    objective.routed_loss(routing, grpo, sdpo.requires_grad_(), weights, distill, mask, 7, mix_weight=0.8).backward()
    coefficients = objective.distillation_coefficients(routing, weights, distill, mask, mix_weight=0.8)
    torch.testing.assert_close(coefficients / 7, sdpo.grad)


@pytest.mark.parametrize("routing", objective.ROUTINGS)
def test_loss_gradient(routing):
    grpo, sdpo, weights, distill, mask = random_batch(2, rows=4, length=3)
    assert torch.autograd.gradcheck(
        lambda g, s: objective.routed_loss(routing, g, s, weights, distill, mask, mask.sum()),
        (grpo.requires_grad_(), sdpo.requires_grad_()),
    )


def test_each_branch_reaches_its_own_valid_tokens_only():
    grpo, sdpo, weights, distill, mask = random_batch(5)
    routed, policy = mask.bool() & distill[:, None], mask.bool() & ~distill[:, None]
    grpo, sdpo = grpo.masked_fill(~policy, math.nan), sdpo.masked_fill(~routed, math.nan)
    loss = objective.srpo_loss(grpo.requires_grad_(), sdpo.requires_grad_(), weights, distill, mask)
    loss.backward()
    assert torch.isfinite(loss)
    torch.testing.assert_close(grpo.grad, policy / mask.sum().double())
    torch.testing.assert_close(sdpo.grad, torch.where(routed, weights, 0) / mask.sum())


@pytest.mark.parametrize("routing", objective.ROUTINGS)
def test_a_batch_without_a_token_is_an_attached_zero(routing):
    grpo, sdpo, weights, distill, mask = random_batch(6)
    grpo.requires_grad_()
    loss = objective.routed_loss(routing, grpo, sdpo.requires_grad_(), weights, distill, torch.zeros_like(mask), 1)
    loss.backward()
    assert loss.item() == 0
    assert not grpo.grad.any()
    assert objective.srpo_loss(grpo, sdpo, weights, distill, torch.zeros_like(mask)).item() == 0


# --- the teacher's prompt ----------------------------------------------------------------


def test_teacher_prompt_is_the_released_string_byte_for_byte():
    prompt = "Q {demonstration} {x}\n"
    expected = prompt + "\nCorrect solution:\n\nA {prompt} \\1\n\nCorrectly solve the original question."
    assert objective.teacher_prompt(prompt, "A {prompt} \\1") == expected


def test_teacher_prompt_keeps_what_comes_before_the_last_user_message():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": [{"type": "text", "text": "Q2"}], "name": "n"},
    ]
    original = [dict(m) for m in messages]
    got = objective.teacher_prompt(messages, "D")
    assert got[:-1] == messages[:-1]
    assert got[-1]["name"] == "n"
    assert got[-1]["content"][0] == {"type": "text", "text": "Q2"}
    assert got[-1]["content"][1]["text"] == "\nCorrect solution:\n\nD\n\nCorrectly solve the original question."
    assert messages == original


@pytest.mark.parametrize("prompt", [[], [{"role": "system", "content": "S"}], [{"role": "assistant", "content": "A"}]])
def test_a_prompt_without_a_user_turn_is_one_clear_sentence(prompt):
    with pytest.raises(ValueError, match="does not end with a user message") as error:
        objective.teacher_prompt(prompt, "D")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think>\n\nAnswer: <b>", "Answer: <b>"),
        ("<think>a</think>x<think>b</think> y", "xy"),
        ("<think></think>x", "x"),
        ("<think>never closed", "<think>never closed"),
        ("no thinking ", "no thinking "),
    ],
)
def test_thinking_is_stripped(text, expected):
    assert objective.strip_thinking(text) == expected


def by_searching_the_whole_text(text: str) -> str:
    text = re.sub(r"<think>.*?</think>\s*", "", text, flags=re.DOTALL)
    return re.sub(r"^.*</think>\s*", "", text, flags=re.DOTALL)


def test_thinking_is_stripped_as_by_searching_the_whole_text():
    """Of all texts of up to six pieces, some of which are a tag only when what is between them is gone."""
    pieces = ("<think>", "</think>", " \n", "a", "</thi", "nk>")
    for count in range(7):
        for text in map("".join, itertools.product(pieces, repeat=count)):
            assert objective.strip_thinking(text) == by_searching_the_whole_text(text), text


@pytest.mark.parametrize("start", ["", "a</think>", "<think>a</think> b"])
def test_thinking_that_does_not_end_is_not_searched_for_its_end(start, monkeypatch):
    """From each `<think>` the search would read to the end of the text."""
    searched = []

    def sub(pattern, new, text, flags):
        searched.append((pattern[:7], text))
        return re.sub(pattern, new, text, flags=flags)

    monkeypatch.setattr(objective, "re", SimpleNamespace(sub=sub, DOTALL=re.DOTALL))
    text = start + "<think>a" * 100
    assert objective.strip_thinking(text) == by_searching_the_whole_text(text)
    assert all(text.endswith("</think>") for pattern, text in searched if pattern == "<think>")
    assert len(searched) == 2 * bool(start)
