"""Equations of SRPO: entropy weights and the loss, against golden values and the definitions."""

import math

import numpy as np
import pytest
import torch
from srpo_references import F64, f64, ref_loss, ref_weights

from srpo import objective

# --- golden values of the specification ---

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


# --- entropy and its weights ---


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
    weights = objective.entropy_weights(torch.tensor([[9.0, 9.0, 10.0]]), torch.ones(1, 3), beta=1000.0)
    assert weights.tolist() == [[1.5, 1.5, 0.0]]  # nor infinite


def test_weights_outside_the_mask():
    entropy, mask = torch.tensor([[1.0, math.nan], [math.inf, 2.0]]), torch.tensor([[1, 0], [0, 1]])
    weights = objective.entropy_weights(entropy, mask)
    assert weights[0, 1] == weights[1, 0] == 0
    assert weights.sum().item() == pytest.approx(2)
    assert objective.entropy_weights(entropy, torch.zeros(2, 2)).equal(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="teacher entropy is not finite on a routed token"):
        objective.entropy_weights(entropy, torch.ones(2, 2))


# --- the loss ---


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
