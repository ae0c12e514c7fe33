"""Equations of SRPO: routing, advantages, the surrogate; against references written from the definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
from srpo_references import F64, f64, random_logits, ref_grpo, ref_route

from srpo import objective

# --- routing ---


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


def test_a_draw_of_0_is_a_draw(monkeypatch):
    """torch.rand gives 0 once in 17 million."""
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.zeros(shape))
    correct = torch.tensor([False, True, False, False, False, True])
    assert objective.random_donors(correct, 3).tolist() == [1, -1, 1, 5, 5, -1]


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


# --- advantages and the surrogate ---


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


@pytest.mark.parametrize(("ratio", "advantage", "expected"), [(5, -1, 3.0), (5, 1, -1.28), (0.5, -1, 0.8)])
def test_dual_clip_golden(ratio, advantage, expected):
    logps = f64([[math.log(ratio)]])
    got = objective.grpo_token_loss(logps, torch.zeros_like(logps), f64([advantage]), 0.2, 0.28, 3.0)
    assert got.item() == pytest.approx(expected)


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


def test_the_clip_range_is_the_papers_by_default():
    logps = f64([0.5, 1.25, 1.5]).log()[None]
    for advantage, expected in ((1.0, [-0.5, -1.25, -1.28]), (-1.0, [0.8, 1.25, 1.5])):
        loss = objective.grpo_token_loss(logps, torch.zeros_like(logps), f64([advantage]))
        torch.testing.assert_close(loss, f64([expected]))


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
