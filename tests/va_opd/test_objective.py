"""The equations of VA-OPD against golden values of the paper and against references written from the definitions.

The references are plain Python loops in float64 and share no code with `va_opd.objective`.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from va_opd import objective

F64 = torch.float64

# --- references, straight from the definitions ---


def ref_rollout_weights(means: list[float], tau: float = 1.0, eps: float = 1e-6) -> list[float]:
    """Eqs. 3-4 for the siblings of one prompt, population standard deviation."""
    mu = math.fsum(means) / len(means)
    sigma = math.sqrt(math.fsum((m - mu) ** 2 for m in means) / len(means))
    scores = [math.exp((m - mu) / (sigma + eps) / tau) for m in means]
    return [s / math.fsum(scores) for s in scores]


def ref_token_coefficients(va: list[float], mask: list[int], w: float, p: Fraction, lam: float) -> list[float]:
    """Eqs. 5-6 for one rollout; ties go to the earlier token."""
    valid = [t for t, m in enumerate(mask) if m]
    size = max(1, math.ceil(p * len(valid)))
    high = set(sorted(valid, key=lambda t: (-va[t], t))[:size])
    low = [t for t in valid if t not in high]
    share_high, share_low = (lam, 1 - lam) if low else (1.0, 0.0)
    return [
        0.0 if not m else w * share_high / len(high) if t in high else w * share_low / len(low)
        for t, m in enumerate(mask)
    ]


def random_batch(seed: int, prompts: int, k: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """VA with many zeros and equal values (as in practice), masks with holes and at least one valid token."""
    rng = np.random.default_rng(seed)
    va = np.maximum(rng.normal(size=(prompts * k, length)), 0) * rng.integers(0, 2, size=(prompts * k, length))
    va = np.round(va, 1)
    mask = rng.integers(0, 2, size=(prompts * k, length))
    mask[np.arange(prompts * k), rng.integers(0, length, prompts * k)] = 1
    return torch.tensor(va, dtype=F64), torch.tensor(mask)


# --- golden values of the specification ---

PAPER_MEANS = [0.045, 0.030, 0.020, 0.010]  # Fig. 3


def weights_of(means: list[float], **kwargs) -> torch.Tensor:
    va = torch.tensor(means, dtype=F64)[:, None]
    return objective.rollout_weights(va, torch.ones_like(va), len(means), **kwargs)


def test_rollout_weights_of_the_papers_figure_3():
    got = weights_of(PAPER_MEANS).tolist()
    assert [round(w, 4) for w in got] == [0.6558, 0.2056, 0.0949, 0.0438]
    # the sample standard deviation would give (0.606, 0.222, 0.114, 0.058)
    assert abs(got[0] - 0.606) > 0.04


@pytest.mark.parametrize(
    ("means", "index", "expected"),
    [
        ([1.0, 0.0], 0, 0.8808),
        ([1.0] + [0.0] * 3, 0, 0.7704),
        ([1.0] + [0.0] * 7, 0, 0.7461),
        ([0.0] + [1.0] * 3, 0, 0.0320),
        ([0.1 + 1e-4, 0.1, 0.1, 0.1], 0, 0.7611),
        ([0.1 + 1e-5, 0.1, 0.1, 0.1], 0, 0.6851),
        ([0.1 + 1e-6, 0.1, 0.1, 0.1], 0, 0.4011),
        ([0.1 + 1e-7, 0.1, 0.1, 0.1], 0, 0.2684),
        ([0.1] * 4, 0, 0.25),
        ([0.0] * 4, 3, 0.25),
        ([0.3], 0, 1.0),
    ],
)
def test_rollout_weight_bounds_and_near_ties(means, index, expected):
    assert round(weights_of(means)[index].item(), 4) == expected


@pytest.mark.parametrize(
    ("va", "mask", "high_weight", "expected"),
    [
        ([9, 1, 1, 1, 1], [1] * 5, 0.5, [0.5, 0.125, 0.125, 0.125, 0.125]),
        ([0, 5, 7, 0, 0, 0], [1] * 6, 0.5, [0.125, 0.25, 0.25, 0.125, 0.125, 0.125]),
        ([8, 1, 9, 3, 2], [0, 1, 0, 1, 1], 0.5, [0, 0.25, 0, 0.5, 0.25]),
        ([0.0], [1], 0.5, [1.0]),
        ([3, 0, 0], [0, 0, 1], 0.5, [0, 0, 1.0]),
        ([9, 1, 1, 1, 1], [1] * 5, 0.2, [0.2] * 5),
        ([0, 0, 0, 0, 0], [1] * 5, 0.5, [0.5, 0.125, 0.125, 0.125, 0.125]),  # all tied: token order
        ([9, 1, 1, 1, 1], [1] * 5, 0.0, [0, 0.25, 0.25, 0.25, 0.25]),
        ([9, 1, 1, 1, 1], [1] * 5, 1.0, [1, 0, 0, 0, 0]),
    ],
)
def test_token_coefficients_of_the_specification(va, mask, high_weight, expected):
    va, mask = torch.tensor([va], dtype=F64), torch.tensor([mask])
    got = objective.token_coefficients(va, mask, torch.ones(1, dtype=F64), high_weight=high_weight)
    assert got[0].tolist() == pytest.approx(expected, abs=1e-15)


def test_two_prompt_batch_of_the_specification():
    """Prompt A has two siblings of 5 tokens with equal mean VA, prompt B one rollout of one token (two here, equal,
    since every prompt has K siblings: its loss is the same)."""
    va = torch.tensor([[5.0, 0, 0, 0, 0], [0, 5.0, 0, 0, 0], [1.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0]], dtype=F64)
    mask = torch.tensor([[1] * 5, [1] * 5, [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    kl = torch.tensor([[10.0, 2, 2, 2, 2], [2, 20, 2, 2, 2], [3, 9, 9, 9, 9], [3, 9, 9, 9, 9]], dtype=F64)
    kl.requires_grad_()
    _, c = objective.coefficients(va, mask, num_generations=2)
    loss = objective.grouped_kl_loss(kl, c, num_prompts=2)
    loss.backward()
    assert loss.item() == pytest.approx(5.75, abs=1e-12)
    assert objective.grouped_kl_loss(kl[:2], c[:2], 1).item() == pytest.approx(8.5, abs=1e-12)
    assert objective.grouped_kl_loss(kl[2:], c[2:], 1).item() == pytest.approx(3.0, abs=1e-12)
    assert kl.grad[0].tolist() == pytest.approx([0.125] + [0.03125] * 4, abs=1e-15)
    assert kl.grad[1].tolist() == pytest.approx([0.03125, 0.125] + [0.03125] * 3, abs=1e-15)
    assert kl.grad[2:].sum(0).tolist() == pytest.approx([0.5, 0, 0, 0, 0], abs=1e-15)


def test_two_prompt_batch_without_weighting():
    """Plain OPD on the same three rollouts: 4.066667 as a mean over responses (K = 1 each), 3.8 over prompts."""
    kl = torch.tensor([[10.0, 2, 2, 2, 2], [2, 20, 2, 2, 2], [3, 9, 9, 9, 9]], dtype=F64)
    mask = torch.tensor([[1] * 5, [1] * 5, [1, 0, 0, 0, 0]])
    _, c = objective.coefficients(torch.rand(3, 5, dtype=F64), mask, num_generations=1, weighting="none")
    assert objective.grouped_kl_loss(kl, c, 3).item() == pytest.approx(4.066667, abs=1e-6)
    kl, mask = kl[[0, 1, 2, 2]], mask[[0, 1, 2, 2]]
    _, c = objective.coefficients(torch.rand(4, 5, dtype=F64), mask, num_generations=2, weighting="none")
    assert objective.grouped_kl_loss(kl, c, 2).item() == pytest.approx(3.8, abs=1e-12)


def test_size_of_the_high_group_is_exact_for_every_length_up_to_8192():
    lengths = torch.arange(1, 8193)
    for part in lengths.split(256):  # (256, T) at a time
        mask = (torch.arange(int(part[-1]))[None] < part[:, None]).long()
        got = objective.high_tokens(torch.zeros(mask.shape), mask).sum(1)
        assert got.tolist() == [(n + 4) // 5 for n in part.tolist()]


@pytest.mark.parametrize("fraction", ["0.05", "0.07", "0.1", "0.15", "0.3", "0.55", "0.99", "1"])
def test_size_of_the_high_group_is_exact_for_other_fractions(fraction):
    lengths = torch.tensor([*range(1, 401), 1000, 2000, 4096, 8192])
    mask = (torch.arange(8192)[None] < lengths[:, None]).long()
    got = objective.high_tokens(torch.zeros(mask.shape), mask, float(fraction)).sum(1)
    assert got.tolist() == [math.ceil(Fraction(fraction) * n) for n in lengths.tolist()]


# --- against the references on random shapes ---


@pytest.mark.parametrize(
    ("seed", "prompts", "k", "length"), [(0, 1, 1, 1), (1, 3, 4, 17), (2, 5, 2, 40), (3, 2, 8, 7)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 2e-4)])
def test_coefficients_against_the_reference(seed, prompts, k, length, dtype, tolerance):
    va, mask = random_batch(seed, prompts, k, length)
    weights, got = objective.coefficients(
        va.to(dtype), mask, k, weight_temperature=0.7, top_fraction=0.3, high_weight=0.6
    )
    assert weights.dtype == got.dtype == dtype
    for prompt in range(prompts):
        rows = range(prompt * k, (prompt + 1) * k)
        means = [math.fsum((va[r] * mask[r]).tolist()) / int(mask[r].sum()) for r in rows]
        expected = ref_rollout_weights(means, tau=0.7)
        assert weights[list(rows)].tolist() == pytest.approx(expected, abs=tolerance)
        for row, w in zip(rows, expected, strict=True):
            c = ref_token_coefficients(va[row].tolist(), mask[row].tolist(), w, Fraction(3, 10), 0.6)
            assert got[row].tolist() == pytest.approx(c, abs=tolerance)


@pytest.mark.parametrize("weighting", objective.WEIGHTINGS)
def test_every_weighting_against_its_definition(weighting):
    k = 4
    va, mask = random_batch(7, 3, k, 23)
    weights, got = objective.coefficients(va, mask, k, weighting)
    means = [math.fsum((va[r] * mask[r]).tolist()) / int(mask[r].sum()) for r in range(len(va))]
    for row in range(len(va)):
        group = row // k * k
        w = ref_rollout_weights(means[group : group + k])[row - group] if weighting in ("va", "rollout") else 1 / k
        n = int(mask[row].sum())
        if weighting in ("va", "token"):
            c = ref_token_coefficients(va[row].tolist(), mask[row].tolist(), w, Fraction(1, 5), 0.5)
        else:
            c = [w * m / n for m in mask[row].tolist()]
        assert weights[row].item() == pytest.approx(w, abs=1e-12)
        assert got[row].tolist() == pytest.approx(c, abs=1e-12)


def test_visual_advantage_against_the_definition():
    rng = np.random.default_rng(0)
    logps, degraded = -rng.exponential(size=(2, 6, 9))
    mask = rng.integers(0, 2, size=(6, 9))
    got = objective.visual_advantage(torch.tensor(logps), torch.tensor(degraded), torch.tensor(mask))
    np.testing.assert_array_equal(got.numpy(), np.where(mask == 1, np.maximum(logps - degraded, 0), 0))


def test_visual_advantage_ignores_what_is_not_finite_outside_the_mask():
    logps = torch.tensor([[float("nan"), -1.0, float("inf")]])
    got = objective.visual_advantage(logps, torch.full((1, 3), -3.0), torch.tensor([[0, 1, 0]]))
    assert got.tolist() == [[0.0, 2.0, 0.0]]


@pytest.mark.parametrize("shape", [(5,), (2, 3, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_reverse_kl_against_the_definition(shape, dtype):
    rng = np.random.default_rng(1)
    s, t = (torch.tensor(3 * rng.normal(size=shape)).to(dtype) for _ in range(2))
    got = objective.reverse_kl(s, t)
    s, t = s.double().numpy(), t.double().numpy()
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    q = np.exp(t) / np.exp(t).sum(-1, keepdims=True)
    np.testing.assert_allclose(got.double().numpy(), (p * np.log(p / q)).sum(-1), rtol=1e-5, atol=1e-6)
    assert got.dtype == (F64 if dtype == F64 else torch.float32)


def test_mean_over_tokens_does_not_read_outside_the_mask():
    values = torch.tensor([[1.0, float("nan"), 3.0], [float("inf"), 5.0, -1e30]])
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    assert objective.mean_over_tokens(values, mask).tolist() == [2.0, 5.0]


# --- invariants ---


@pytest.mark.parametrize("weighting", objective.WEIGHTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_coefficients_of_a_prompt_sum_to_one_and_constant_kl_is_the_loss(weighting, seed):
    k, prompts = 4, 5
    va, mask = random_batch(seed, prompts, k, 31)
    _, c = objective.coefficients(va, mask, k, weighting)
    torch.testing.assert_close(c.view(prompts, -1).sum(1), torch.ones(prompts, dtype=F64), rtol=0, atol=1e-12)
    loss = objective.grouped_kl_loss(torch.full_like(va, 1.7), c, prompts)
    assert loss.item() == pytest.approx(1.7, abs=1e-12)


def test_uniform_weights_and_matching_high_weight_are_standard_opd():
    """lambda = |V| / T for every rollout: same loss and gradient as the sequence mean of plain OPD (not at other
    lambda: the groups still split the weight 50/50 then)."""
    k, prompts, length = 4, 3, 20
    rng = np.random.default_rng(5)
    va = torch.tensor(np.repeat(rng.random((prompts, 1, length)), k, 1).reshape(prompts * k, length))
    mask = torch.ones(prompts * k, length)
    kl = torch.tensor(rng.random((prompts * k, length)), requires_grad=True)
    _, c = objective.coefficients(va, mask, k, "va", top_fraction=0.25, high_weight=5 / 20)
    loss = objective.grouped_kl_loss(kl, c, prompts)
    (grad,) = torch.autograd.grad(loss, kl)
    opd = kl.mean(1).mean()
    (expected,) = torch.autograd.grad(opd, kl)
    torch.testing.assert_close(loss, opd, rtol=0, atol=1e-14)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-16)
    _, half = objective.coefficients(va, mask, k, "va", top_fraction=0.25, high_weight=0.5)
    assert abs(objective.grouped_kl_loss(kl, half, prompts) - opd) > 1e-4


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 3.0), (40.0, 0.0), (0.3, 1.1)])
def test_rollout_weights_do_not_depend_on_an_affine_scale_of_va(scale, shift):
    torch.manual_seed(0)
    va, mask = torch.rand(8, 12, dtype=F64), torch.ones(8, 12)
    before = objective.rollout_weights(va, mask, 4, eps=1e-12)
    after = objective.rollout_weights(scale * va + shift, mask, 4, eps=1e-12)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("weighting", objective.WEIGHTINGS)
def test_loss_does_not_depend_on_the_order_of_siblings_or_prompts(weighting):
    k, prompts = 4, 3
    va, mask = random_batch(11, prompts, k, 19)
    kl = torch.rand(va.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    _, c = objective.coefficients(va, mask, k, weighting)
    loss = objective.grouped_kl_loss(kl, c, prompts)
    rng = np.random.default_rng(0)
    for _ in range(3):
        order = np.concatenate([p * k + rng.permutation(k) for p in rng.permutation(prompts)])
        _, permuted = objective.coefficients(va[order], mask[order], k, weighting)
        torch.testing.assert_close(permuted, c[order], rtol=0, atol=1e-13)
        torch.testing.assert_close(objective.grouped_kl_loss(kl[order], permuted, prompts), loss)


@pytest.mark.parametrize("weighting", objective.WEIGHTINGS)
def test_masked_positions_have_no_effect(weighting):
    k = 2
    va, mask = random_batch(13, 3, k, 15)
    kl = torch.rand(va.shape, dtype=F64)
    _, c = objective.coefficients(va, mask, k, weighting)
    loss = objective.grouped_kl_loss(kl, c, 3)
    poisoned_va = torch.where(mask.bool(), va, 1e9)
    poisoned_kl = torch.where(mask.bool(), kl, float("nan")).requires_grad_()
    _, got = objective.coefficients(poisoned_va, mask, k, weighting)
    assert torch.equal(got, c)
    assert not got[mask == 0].any()
    poisoned = objective.grouped_kl_loss(poisoned_kl, got, 3)
    poisoned.backward()
    assert torch.equal(poisoned, loss)
    assert torch.isfinite(poisoned_kl.grad).all()
    # the same rollouts in a longer tensor, as when another rank has a longer one
    wider = torch.nn.functional.pad
    _, padded = objective.coefficients(wider(va, (0, 6)), wider(mask, (0, 6)), k, weighting)
    assert torch.equal(padded[:, :15], c)
    assert not padded[:, 15:].any()


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_masks_of_any_type(mask_dtype):
    va, mask = random_batch(17, 2, 2, 9)
    _, expected = objective.coefficients(va, mask, 2)
    _, got = objective.coefficients(va, mask.to(mask_dtype), 2)
    assert torch.equal(got, expected)


def test_equal_va_gives_uniform_weights_but_still_two_groups():
    va, mask = torch.zeros(4, 10, dtype=F64), torch.ones(4, 10)
    weights, c = objective.coefficients(va, mask, 4)
    assert weights.tolist() == [0.25] * 4
    assert c[0].tolist() == pytest.approx([0.0625] * 2 + [0.25 * 0.5 / 8] * 8)


@pytest.mark.parametrize("weighting", objective.WEIGHTINGS)
def test_rollouts_of_one_token(weighting):
    _, c = objective.coefficients(torch.zeros(4, 1), torch.ones(4, 1), 2, weighting)
    assert c.tolist() == [[0.5]] * 4


def test_the_token_masks_of_fig_2b_are_settings():
    """Each takes a tenth of the tokens out of the loss and weighs the others alike."""
    va, mask = torch.rand(50, 20, generator=torch.Generator().manual_seed(0)), torch.ones(50, 20)
    weights, none = torch.full((50,), 0.25), torch.zeros(50, 20)

    def kept(va, top_fraction, high_weight, generator=None):
        coefficients = objective.token_coefficients(va, mask, weights, top_fraction, high_weight, generator)
        assert torch.allclose(coefficients[coefficients > 0], torch.tensor(0.25 / 18))
        assert (coefficients > 0).sum(1).tolist() == [18] * 50
        return coefficients > 0

    assert (va.masked_fill(~kept(va, 0.1, 0.0), 2).amin(1) == va.amin(1)).all()  # the highest are out
    assert va.masked_fill(kept(va, 0.1, 0.0), 2).amin(1).ge(va.masked_fill(~kept(va, 0.1, 0.0), -1).amax(1)).all()
    assert va.masked_fill(kept(va, 0.9, 1.0), -1).amax(1).le(va.masked_fill(~kept(va, 0.9, 1.0), 2).amin(1)).all()
    drawn = kept(none, 0.1, 0.0, torch.Generator().manual_seed(0))  # VA is 0 where the degraded view is the true one
    assert (~drawn).sum(0).min() >= 1  # no place is safe, 5 hits are expected


def test_ungrouped_rollouts_have_uniform_tokens():
    va, mask = random_batch(19, 2, 2, 9)
    ungrouped = torch.tensor([True, False, False, True])
    weights, got = objective.coefficients(va, mask, 2, ungrouped=ungrouped)
    _, grouped = objective.coefficients(va, mask, 2)
    for row in range(4):
        uniform = weights[row] * mask[row] / mask[row].sum()
        assert torch.equal(got[row], uniform if ungrouped[row] else grouped[row])


def test_random_ties_are_reproducible_unbiased_and_leave_clear_ranks_alone():
    length, draws = 10, 4000
    mask = torch.ones(draws, length)
    va = torch.zeros(draws, length)
    va[:, 4] = 1.0  # |V| = 2: this one, and one of the nine tied others

    def draw(seed: int) -> torch.Tensor:
        return objective.high_tokens(va, mask, 0.2, torch.Generator().manual_seed(seed))

    high = draw(0)
    assert torch.equal(high, draw(0))
    assert not torch.equal(high, draw(1))
    assert high[:, 4].all()
    assert (high.sum(1) == 2).all()
    others = torch.cat([high[:, :4], high[:, 5:]], 1).double().mean(0)
    # nine equal shares of 1/9; five standard deviations of a share of 4000 draws are 0.025
    assert others.tolist() == pytest.approx([1 / 9] * 9, abs=0.025)
    assert not objective.high_tokens(va, mask, 0.2)[:, 5:].any()  # stable order: the earlier token


def test_random_ties_never_choose_a_masked_token():
    mask = torch.tensor([[0, 1, 0, 1, 1, 0]] * 50)
    high = objective.high_tokens(torch.zeros(50, 6), mask, 0.5, torch.Generator().manual_seed(0))
    assert (high.sum(1) == 2).all()
    assert not high[mask == 0].any()


# --- errors ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: objective.rollout_weights(torch.rand(6, 3), torch.ones(6, 3), 4), "do not divide into groups"),
        (lambda: objective.rollout_weights(torch.rand(6, 3), torch.ones(6, 3), 0), "do not divide into groups"),
        (lambda: objective.coefficients(torch.rand(5, 3), torch.ones(5, 3), 2, "none"), "do not divide into groups"),
        (lambda: objective.coefficients(torch.rand(2, 3), torch.ones(2, 3), 2, "vaopd"), "weighting must be one of"),
        (
            lambda: objective.rollout_weights(torch.rand(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), 2),
            "rollout 1 has",
        ),
        (
            lambda: objective.token_coefficients(torch.rand(1, 3), torch.zeros(1, 3), torch.ones(1)),
            "rollout 0 has no valid token",
        ),
        (lambda: objective.coefficients(torch.rand(2, 3), torch.zeros(2, 3), 2, "none"), "has no valid token"),
        (
            lambda: objective.visual_advantage(
                torch.tensor([[-1.0, float("nan")]]), torch.zeros(1, 2), torch.ones(1, 2)
            ),
            "rollout 0, token 1 is not finite",
        ),
        (
            lambda: objective.visual_advantage(torch.zeros(1, 2), torch.full((1, 2), float("-inf")), torch.ones(1, 2)),
            "rollout 0, token 0 is not finite",
        ),
        (lambda: objective.pixelate(Image.new("L", (4, 4)), 0.0), "degradation ratio"),
        (lambda: objective.pixelate(Image.new("L", (4, 4)), 1.5), "degradation ratio"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
