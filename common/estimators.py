"""Accuracy over repeated samples, with intervals that know which samples belong to one question.

`correct` is a table (problems, samples) of 0/1 or of scores in [0, 1]; rows may have unequal lengths, problems weigh
the same. What is uncertain is the choice of questions: 16 samples of 30 questions are 30 observations, not 480.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

Table = Sequence[Sequence[float]] | np.ndarray
ROUNDING = 1e-12  # equal means of problems differ by less, in floating point


def avg_at_k(correct: Table) -> float:
    """Mean score of a sample, averaged within each problem and then over problems (avg@k)."""
    return float(_problem_means(correct).mean())


def pass_at_k(correct: Table, k: int) -> float:
    """Chance that at least one of k samples of a problem is correct: unbiased, Chen et al. 2021 (arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k) for c correct among n samples, exact. Raises `ValueError` for k below 1 or above the
    length of a row, and for scores other than 0 and 1.
    """
    rows = _rows(correct)
    if k < 1 or k > min(len(row) for row in rows):
        raise ValueError(f"k must be between 1 and the {min(len(row) for row in rows)} samples of a row, got {k}")
    if any(score not in (0, 1) for row in rows for score in row):
        raise ValueError("pass@k needs scores of 0 or 1")
    return float(np.mean([1 - math.comb(len(row) - int(row.sum()), k) / math.comb(len(row), k) for row in rows]))


def maj_at_k(
    answers: Sequence[Sequence[Any]], golds: Sequence[Any], same: Callable[[Any, Any], bool] = operator.eq
) -> float:
    """Share of problems whose most frequent answer is the gold one (maj@k).

    `same` decides which answers are one class. None (no answer) never wins; a tie goes to the class that came first.
    """
    if not answers or len(answers) != len(golds):
        raise ValueError(f"answers for {len(answers)} problems and {len(golds)} golds: need one gold for each problem")
    return float(np.mean([_majority_is(row, gold, same) for row, gold in zip(answers, golds, strict=True)]))


def interval(correct: Table, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Confidence interval of avg@k, clustered by problem and never empty, not even where every sample is correct.

    Wilson's score interval with the effective number of observations p (1 - p) / Var(mean over problems) in place of n
    and Student's quantile in place of the normal one (the survey-sampling form of Dean & Pagano, 2015). Its coverage
    near 0 and 1 is close to nominal where the bootstrap's is not, and it has no random part: `seed` is there because
    the other estimators have one, and changes nothing.
    """
    _check_level(level)
    means = _problem_means(correct)
    n, p = len(means), float(means.mean())
    samples = sum(len(row) for row in _rows(correct))
    if 0 < p < 1 and np.ptp(means) > ROUNDING:
        effective = min(p * (1 - p) / (means.var(ddof=1) / n), samples)
    else:  # no spread seen between problems: all that is known is that there were n of them
        effective = n
    z = float(stats.t.ppf(0.5 + level / 2, max(n - 1, 1)))
    centre = (p + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(p * (1 - p) / effective + z * z / (4 * effective**2))
    return float(max(0.0, min(p, centre - half))), float(min(1.0, max(p, centre + half)))


def paired_difference(a: Table, b: Table, level: float = 0.95, seed: int = 0) -> tuple[float, float, float, float]:
    """Difference avg@k(a) - avg@k(b) on the same problems in the same order: (difference, low, high, p_value).

    Student's interval over the problems' differences; two-sided p-value of the sign-flip permutation test, exact for
    few problems, else from 9,999 seeded draws and never 0.
    """
    _check_level(level)
    means_a, means_b = _problem_means(a), _problem_means(b)
    if len(means_a) != len(means_b):
        raise ValueError(f"a has {len(means_a)} problems, b has {len(means_b)}: both must be on the same problems")
    difference = means_a - means_b
    mean, n = float(difference.mean()), len(difference)
    if np.abs(difference).max() < ROUNDING:
        return 0.0, 0.0, 0.0, 1.0
    if n == 1:  # one problem says nothing about others
        return mean, -1.0, 1.0, 1.0
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * difference.std(ddof=1) / math.sqrt(n)
    low, high = mean - half, mean + half
    if np.ptp(difference) < ROUNDING:  # no spread seen: all that is known, as in `interval`, is that there were n
        low, high = (2 * bound - 1 for bound in interval([[(mean + 1) / 2]] * n, level))
    test = stats.permutation_test(
        (means_a, means_b),
        lambda x, y, axis=-1: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return mean, float(max(-1.0, low)), float(min(1.0, high)), float(test.pvalue)


def mean_of_independent(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of (value, low, high) whose errors are independent, such as of benchmarks, and its interval.

    The distances of both ends from the value are added in squares, each side by itself (MOVER, Zou & Donner 2008).
    """
    values, lows, highs = np.array(parts, dtype=float).T
    mean, count = float(values.mean()), len(values)
    return mean, mean - math.hypot(*(values - lows)) / count, mean + math.hypot(*(highs - values)) / count


def over_seeds(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """One number of several trainings that differ in their seed alone: (mean, standard deviation, low, high).

    The standard deviation has n - 1 in its denominator; low and high are Student's interval of the mean. What is
    uncertain here is the training, not the choice of questions. One value says nothing of its spread: the last three
    are then NaN. The values may be of any scale, also differences between two methods with the same seeds.
    """
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values must be one finite number or more, one for each seed, got {list(values)}")
    _check_level(level)
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return mean, math.nan, math.nan, math.nan
    deviation = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * deviation / math.sqrt(n)
    return mean, deviation, mean - half, mean + half


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), such as 0.95, got {level}")


def _majority_is(row: Sequence[Any], gold: Any, same: Callable[[Any, Any], bool]) -> bool:
    classes: list[list[Any]] = []  # of answers that mean the same
    for answer in (answer for answer in row if answer is not None):
        for members in classes:
            if same(answer, members[0]) or same(members[0], answer):  # as in R-Diverse's vote: their order is chance
                members.append(answer)
                break
        else:
            classes.append([answer])
    return bool(classes) and bool(same(max(classes, key=len)[0], gold))


def _rows(correct: Table) -> list[np.ndarray]:
    rows = [np.asarray(row, dtype=float) for row in correct]
    if not rows:
        raise ValueError("no problems: the table of scores is empty")
    for number, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            raise ValueError(f"problem {number} has no samples, or the table is not (problems, samples)")
        if not ((row >= 0) & (row <= 1)).all():
            raise ValueError(f"problem {number} has a score outside [0, 1]: {row.tolist()}")
    return rows


def _problem_means(correct: Table) -> np.ndarray:
    return np.array([row.mean() for row in _rows(correct)])
