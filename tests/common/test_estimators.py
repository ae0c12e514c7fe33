"""Estimators against exact values: enumeration, simulation, invariants."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from common.estimators import (
    avg_at_k,
    interval,
    maj_at_k,
    mean_of_independent,
    over_seeds,
    paired_difference,
    pass_at_k,
)


def test_avg_at_k_weighs_problems_the_same():
    assert avg_at_k([[1, 0], [1, 1]]) == 0.75
    assert avg_at_k([[1], [0, 0, 0, 0]]) == 0.5
    assert avg_at_k(np.array([[0.25, 0.75]])) == 0.5


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for correct in range(n + 1):
        row = [1] * correct + [0] * (n - correct)
        for k in range(1, n + 1):
            subsets = [max(subset) for subset in itertools.combinations(row, k)]
            assert pass_at_k([row], k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_of_rows_of_unequal_length():
    assert pass_at_k([[1, 0], [0, 0, 1, 1]], 2) == pytest.approx((1 + 5 / 6) / 2)
    assert pass_at_k([[1, 0, 1]], 1) == pytest.approx(avg_at_k([[1, 0, 1]]))


@pytest.mark.parametrize(
    ("answers", "gold", "expected"),
    [
        (["1", "2", "2"], "2", 1),
        (["1", "2"], "1", 1),  # a tie goes to the first
        (["2", "1"], "1", 0),
        ([None, None, "1"], "1", 1),
        ([None, None], None, 0),
        ([None], "1", 0),
        (["3", "1", "1", "3"], "1", 0),
    ],
)
def test_maj_at_k(answers, gold, expected):
    assert maj_at_k([answers], [gold]) == expected


def test_maj_at_k_with_the_callers_equality():
    same = lambda a, b: float(a) == float(b)  # noqa: E731
    assert maj_at_k([["0.5", "1", ".50"], ["1", "2", "2"]], ["0.5", "1"], same) == 0.5


@pytest.mark.parametrize("answers", [["a+b=42", "42", "7"], ["42", "a+b=42", "7"], ["7", "42", "a+b=42"]])
def test_maj_at_k_does_not_depend_on_the_order_where_equality_has_a_direction(answers):
    assert maj_at_k([answers], ["42"], lambda answer, gold: answer == gold or answer == f"a+b={gold}") == 1.0


@pytest.mark.parametrize("n", range(1, 6))
def test_maj_at_k_of_every_order_is_that_of_a_plain_count(n):
    for row in itertools.product(["a", "b", None], repeat=n):
        votes = {answer: row.count(answer) for answer in "ab"}
        first = next((answer for answer in row if answer), None)
        best = max("ab", key=votes.get) if votes["a"] != votes["b"] else first
        assert maj_at_k([row], ["a"]) == float(best == "a")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: avg_at_k([]), "no problems"),
        (lambda: avg_at_k([[1], []]), "problem 1 has no samples"),
        (lambda: avg_at_k([1, 0]), r"the table is not \(problems, samples\)"),
        (lambda: avg_at_k([[[1, 0]]]), r"the table is not \(problems, samples\)"),
        (lambda: avg_at_k([[1.5]]), r"outside \[0, 1\]"),
        (lambda: avg_at_k([[float("nan")]]), r"outside \[0, 1\]"),
        (lambda: avg_at_k([[1, None]]), r"outside \[0, 1\]"),
        (lambda: pass_at_k([[1, 0], [1]], 2), "k must be between 1 and the 1 samples"),
        (lambda: pass_at_k([[1, 0]], 0), "k must be between"),
        (lambda: pass_at_k([[0.5]], 1), "0 or 1"),
        (lambda: maj_at_k([], []), "one gold for each problem"),
        (lambda: maj_at_k([["1"]], []), "one gold for each problem"),
        (lambda: interval([]), "no problems"),
        (lambda: paired_difference([[1]], [[1], [0]]), "same problems"),
        (lambda: interval([[1]], level=95), r"level must be in \(0, 1\), such as 0.95, got 95"),
        (lambda: paired_difference([[1]], [[0]], level=0), "level must be in"),
        (lambda: over_seeds([1.0, 2.0], level=1), "level must be in"),
        (lambda: over_seeds([]), "one for each seed"),
        (lambda: over_seeds([0.5, float("nan")]), "one for each seed"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("difference", [1, 0.5, -0.25])
def test_a_difference_without_spread_has_an_interval_as_wide_as_that_of_its_problems(difference):
    for problems in (2, 3, 30):
        found, low, high, _ = paired_difference(
            [[0.5 + difference / 2]] * problems, [[0.5 - difference / 2]] * problems
        )
        assert found == pytest.approx(difference)
        assert high - low > 1 / (2 * problems)
        assert -1 <= low <= found <= high <= 1


def test_a_spread_of_rounding_alone_is_none():
    a, b = [[0.8], [0.7], [0.6]], [[0.5], [0.4], [0.3]]  # 0.30000000000000004, 0.29999999999999993, 0.3
    same = paired_difference([[0.65]] * 3, [[0.35]] * 3, 0.8)
    assert paired_difference(a, b, 0.8) == pytest.approx(same)
    wider = paired_difference(a, b, 0.95)
    assert wider[1] < same[1] < same[2] < wider[2]


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("problems", [1, 2, 3, 18, 30])  # at 3 and 18 the end is 1e-16 off before it is put right
@pytest.mark.parametrize("samples", [1, 16])
def test_the_interval_is_never_empty_at_the_ends(value, problems, samples):
    low, high = interval([[value] * samples] * problems)
    assert 0 <= low <= value <= high <= 1
    assert high - low > 0.05
    assert (low, high) == interval([[value]] * problems)  # more samples of the same problems are no new problems


def test_a_mean_that_is_rounded_to_the_end_is_at_the_end():
    table = [[1.0], [np.nextafter(1, 0)]]  # two problems that differ, and a mean of 1
    assert interval(table) == interval([[1.0], [1.0]])


@pytest.mark.parametrize("problems", [1, 2, 10, 30])
@pytest.mark.parametrize("row", [[1, 0], [1, 0, 0]])  # 10 means of 1/3 have a variance of 1e-33 in floating point
def test_equal_problems_with_spread_inside_count_once_each(problems, row):
    assert interval([row] * problems) == pytest.approx(interval([[sum(row) / len(row)]] * problems))
    assert interval([row] * problems) == pytest.approx(interval([row * 4] * problems))


def test_the_interval_holds_the_estimate_and_widens_with_the_level():
    table = np.random.default_rng(0).integers(0, 2, (40, 4))
    widths = []
    for level in (0.5, 0.8, 0.95, 0.99):
        low, high = interval(table, level)
        assert low <= avg_at_k(table) <= high
        widths.append(high - low)
    assert widths == sorted(widths)


def test_repeating_every_sample_changes_nothing():
    table = np.random.default_rng(1).random((40, 4)) < np.linspace(0, 1, 40)[:, None]  # problems differ
    assert interval(np.repeat(table, 4, axis=1)) == pytest.approx(interval(table))


def bootstrap(values) -> np.ndarray:
    """Means of all n^n resamples of n values: the bootstrap without its random part."""
    return np.array(list(itertools.product(values, repeat=len(values)))).mean(1)


TINY = [
    [[1], [0], [1], [1], [0], [1]],
    [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 1, 0]],
    [[0.25, 0.5], [0.75, 0.5], [0.9, 1.0], [0.0, 0.1]],
    [[1, 1, 1, 1], [0], [1, 0]],
]


@pytest.mark.parametrize("table", TINY)
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_is_the_score_interval_with_the_enumerated_bootstraps_variance(table, level):
    means = [np.mean(row) for row in table]
    n, p, resampled = len(means), float(np.mean(means)), bootstrap(means)
    assert resampled.mean() == pytest.approx(p)
    variance = resampled.var() * n / (n - 1)  # the bootstrap's is that of n drawn from n, too small by this factor
    observations = min(p * (1 - p) / variance, sum(map(len, table)))
    t = stats.t.ppf(0.5 + level / 2, n - 1)

    def score(truth):  # Wilson: the ends are the truths at which the estimate is t standard errors away
        return (p - truth) ** 2 - t**2 * truth * (1 - truth) / observations

    low, high = interval(table, level)
    assert low == pytest.approx(optimize.brentq(score, 0, p), abs=1e-9)
    assert high == pytest.approx(optimize.brentq(score, p, 1), abs=1e-9)


@pytest.mark.parametrize(("right", "n"), [(1, 40), (300, 1000), (9990, 10_000)])
def test_one_sample_each_gives_scipys_wilson_interval(right, n):
    wilson = stats.binomtest(right, n).proportion_ci(method="wilson")
    # Ours has Student's quantile, and n - 1 where Wilson has n: at this level the two differences cancel
    level = 1 - 2 * stats.t.sf(stats.norm.ppf(0.975) * math.sqrt((n - 1) / n), n - 1)
    assert interval([[1]] * right + [[0]] * (n - right), level) == pytest.approx(tuple(wilson), abs=1e-12)


@pytest.mark.parametrize("mean", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("spread", ["none", "wide"])
def test_the_interval_covers_the_truth_as_often_as_it_says(mean, spread):
    rng, hits, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        if spread == "none":
            chances = np.full(50, mean)
        else:
            chances = rng.beta(0.5 * mean / 0.5, 0.5 * (1 - mean) / 0.5, 50)
        low, high = interval(rng.random((50, 4)) < chances[:, None])
        hits += low <= mean <= high
    assert 0.91 <= hits / trials <= 0.995


def test_the_mean_of_independent_estimates_is_by_hand_and_has_the_normal_variance():
    assert mean_of_independent([(0.5, 0.4, 0.7)]) == pytest.approx((0.5, 0.4, 0.7))
    assert mean_of_independent([(0.5, 0.2, 0.6), (0.7, 0.3, 0.7)]) == pytest.approx((0.6, 0.35, 0.65))
    draws = np.random.default_rng(0).normal([0.2, 0.5, 0.9], [0.1, 0.2, 0.4], (100_000, 3)).mean(1)
    parts = [(0.2, 0.1, 0.3), (0.5, 0.3, 0.7), (0.9, 0.5, 1.3)]  # one standard deviation on both sides
    mean, low, high = mean_of_independent(parts)
    assert (mean, high - mean, mean - low) == pytest.approx((draws.mean(), draws.std(), draws.std()), rel=0.01)


def test_the_p_value_is_that_of_all_sign_flips():
    a, b = [[1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [1, 0]], [[0, 1], [1, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    difference = np.mean(a, axis=1) - np.mean(b, axis=1)
    flips = [abs(np.mean(difference * signs)) for signs in itertools.product([1, -1], repeat=6)]
    exact = np.mean(np.array(flips) >= abs(difference.mean()) - 1e-12)
    got = paired_difference(a, b)
    assert got[0] == pytest.approx(difference.mean())
    assert got[3] == pytest.approx(exact)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_interval_of_a_difference_is_scipys_and_the_enumerated_bootstraps(level):
    rng = np.random.default_rng(2)
    a, b = rng.random((6, 4)), rng.random((6, 4)) * 0.8
    found, low, high, _ = paired_difference(a, b, level)
    scipys = stats.ttest_rel(a.mean(1), b.mean(1)).confidence_interval(level)
    assert (low, high) == pytest.approx((scipys.low, scipys.high))
    deviation = bootstrap(a.mean(1) - b.mean(1)).std() * math.sqrt(6 / 5)
    assert high - found == pytest.approx(stats.t.ppf(0.5 + level / 2, 5) * deviation)


def test_the_p_value_of_many_problems_is_near_students():
    rng = np.random.default_rng(3)
    a, b = rng.random((400, 2)), rng.random((400, 2)) * 0.92
    assert paired_difference(a, b)[3] == pytest.approx(stats.ttest_rel(a.mean(1), b.mean(1)).pvalue, abs=0.02)


def test_the_difference_is_antisymmetric_and_seeded():
    rng = np.random.default_rng(0)
    a, b = rng.random((60, 4)) < 0.6, rng.random((60, 4)) < 0.4
    difference, low, high, p_value = paired_difference(a, b)
    assert low < difference < high
    assert 0 < p_value < 0.001  # a tenth of the 9,999 draws could not say so
    back = paired_difference(b, a)
    assert back[:3] == pytest.approx((-difference, -high, -low))
    assert back[3] == pytest.approx(p_value, abs=2e-3)
    assert paired_difference(a, b) == (difference, low, high, p_value)


def test_equal_runs_differ_by_nothing():
    table = [[1, 0], [0, 0], [1, 1]]
    assert paired_difference(table, table) == (0.0, 0.0, 0.0, 1.0)
    assert paired_difference([[0.1, 0.2, 0.3]] * 3, [[0.3, 0.2, 0.1]] * 3) == (0.0, 0.0, 0.0, 1.0)  # 3e-17 apart
    difference, low, high, _ = paired_difference([[1]], [[0]])
    assert (difference, low, high) == (1.0, -1.0, 1.0)  # one problem says nothing
    assert math.isfinite(difference)


def test_seeds_are_combined_as_scipy_does():
    values = [0.52, 0.49, 0.55, 0.5]
    mean, deviation, low, high = over_seeds(values)
    scipys = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, deviation) == pytest.approx((0.515, np.sqrt(np.sum((np.array(values) - 0.515) ** 2) / 3)))
    assert (low, high) == pytest.approx((scipys.low, scipys.high))
    scipys = stats.ttest_1samp(values, 0).confidence_interval(0.8)
    assert over_seeds(values, 0.8)[2:] == pytest.approx((scipys.low, scipys.high))
    assert over_seeds([0.3, 0.3]) == (0.3, 0.0, 0.3, 0.3)


def test_one_seed_says_nothing_of_the_spread():
    mean, *rest = over_seeds([0.4])
    assert mean == 0.4
    assert np.isnan(rest).all()


def test_samples_that_vary_less_than_chance_count_as_observations_once():
    """Scores that hardly differ between problems: no interval may be narrower than one of independent samples."""
    table = [[0.49], [0.51]] * 10
    low, high = interval(table)
    wilson = interval([[0], [1]] * 10)
    assert high - low >= 0.95 * (wilson[1] - wilson[0])


def test_intervals_stay_in_the_range_of_their_numbers():
    _, low, high, _ = paired_difference([[1], [1], [0]], [[0], [0], [0]])
    assert high == 1
    assert low > -1
    assert paired_difference([[0], [0], [0]], [[1], [1], [0]])[1] == -1


def test_a_p_value_from_draws_is_the_same_each_time():
    rng = np.random.default_rng(0)
    a, b = rng.random((40, 2)), rng.random((40, 2))  # p is far from its least value, which every seed gives
    assert paired_difference(a, b)[3] > 0.05
    assert paired_difference(a, b) == paired_difference(a, b)
    assert len({paired_difference(a, b, seed=seed)[3] for seed in range(4)}) > 1
