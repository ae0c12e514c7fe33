"""Diversity of the questions of a run: the figures of R-Diverse (arXiv 2602.13103), as pure functions on arrays.

Shapes: N questions of one iteration, M of all earlier ones, D dimensions of the skill space. Embeddings are unit
vectors of `SkillEncoder`, only its `ok` rows. The paper asks GPT-4o for duplicates and does not say how it measures
repetition: here both are local rules, written below, that give the same result anywhere.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike
from sklearn.decomposition import PCA

from . import objective

BLOCK = 1024  # rows compared at a time
ROUNDING = 1e-6  # of a cosine between float32 unit vectors
# Thai to Lao, Burmese, Khmer, kana, Chinese characters: written without spaces, so that each one counts as a word
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


# --- repetition (Fig. 1a) ---


def intra_repetition(embeddings: ArrayLike, threshold: float = 0.9) -> float:
    """Share of the questions with another one of the same iteration at cosine `threshold` or more.

    Args:
        embeddings: (N, D) unit vectors.
        threshold: in (0, 1]; the paper does not disclose its own.

    Returns a share in [0, 1]; NaN for no questions.
    """
    rows = objective.unit_rows(embeddings)
    _check_threshold(threshold)
    repeated = np.zeros(len(rows), bool)
    for start in range(0, len(rows), BLOCK):
        cosines = rows[start : start + BLOCK] @ rows.T
        own = np.arange(len(cosines))
        cosines[own, own + start] = -np.inf  # a question does not repeat itself
        repeated[start : start + BLOCK] = cosines.max(axis=1, initial=-np.inf) >= threshold - ROUNDING
    return _share(repeated)


def cross_repetition(embeddings: ArrayLike, earlier: ArrayLike, threshold: float = 0.9) -> float:
    """Share of the questions with one of an earlier iteration at cosine `threshold` or more.

    Args:
        embeddings: (N, D) unit vectors.
        earlier: (M, D) of all iterations before. Without any the share is 0.
        threshold: in (0, 1].

    Returns a share in [0, 1]; NaN for no questions.
    """
    _check_threshold(threshold)
    _, cosines = nearest(embeddings, earlier, k=1)
    return _share((cosines >= threshold - ROUNDING).any(axis=1))


def cluster_sizes(embeddings: ArrayLike, distance_threshold: float = 0.5) -> np.ndarray:
    """Sizes of the skill clusters behind P_rep, the largest first: integers whose sum is N."""
    return objective.cluster_sizes(objective.repetition_penalty(embeddings, distance_threshold))


def batch_cosines(embeddings: ArrayLike) -> np.ndarray:
    """Cosines of all pairs of questions, (N (N - 1) / 2,).

    A median above 0.5 says that the thresholds of the method do not fit the encoder: one cluster holds nearly all
    questions and P_rep is the same for each.
    """
    rows = objective.unit_rows(embeddings)
    return (rows @ rows.T)[np.triu_indices(len(rows), 1)]


# --- duplicates of past questions (Fig. 4) ---


def nearest(embeddings: ArrayLike, earlier: ArrayLike, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar earlier questions of each question, the most similar first; of equal ones the first.

    Returns rows of `earlier` and cosines, (N, k) each; fewer columns if M < k.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    queries, rows = objective.unit_rows(embeddings), objective.unit_rows(earlier)
    if len(queries) and len(rows) and queries.shape[1] != rows.shape[1]:
        raise ValueError(f"embeddings have {queries.shape[1]} dimensions, earlier ones {rows.shape[1]}")
    columns = min(k, len(rows))
    index, cosine = np.empty((len(queries), columns), np.int64), np.empty((len(queries), columns))
    for start in range(0, len(queries) if columns else 0, BLOCK):
        cosines = queries[start : start + BLOCK] @ rows.T
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :columns]
        index[start : start + BLOCK] = order
        cosine[start : start + BLOCK] = np.take_along_axis(cosines, order, axis=1)
    return index, cosine


def duplicate_ratio(
    questions: Sequence[str],
    embeddings: ArrayLike,
    earlier_questions: Sequence[str],
    earlier_embeddings: ArrayLike,
    k: int = 3,
    is_duplicate: Callable[[str, str], bool] | None = None,
) -> float:
    """Share of the questions that the judge calls a duplicate of one of their k nearest earlier questions.

    Args:
        questions, embeddings: N texts and (N, D) unit vectors.
        earlier_questions, earlier_embeddings: M texts and (M, D) of all iterations before.
        k: the paper's 3.
        is_duplicate: judge of two texts. Default: `same_wording`; the paper asks GPT-4o.

    Returns a share in [0, 1]; NaN for no questions.
    """
    judge = same_wording if is_duplicate is None else is_duplicate
    index, _ = nearest(embeddings, earlier_embeddings, k)
    if len(questions) != len(index) or len(earlier_questions) != len(earlier_embeddings):
        raise ValueError(
            f"{len(questions)} questions and {len(earlier_questions)} earlier ones do not fit to their embeddings: "
            "pass one row a question"
        )
    found = [any(judge(q, earlier_questions[j]) for j in row) for q, row in zip(questions, index, strict=True)]
    return _share(np.array(found, bool))


def same_wording(first: str, second: str, threshold: float = 0.8) -> bool:
    """Local judge: whether two questions are one question with other numbers or a few other words.

    Dice coefficient of the word pairs of both texts, with every number replaced by one mark, at `threshold` or more.
    """
    a, b = _word_pairs(first), _word_pairs(second)
    return 2 * (a & b).total() >= threshold * (a.total() + b.total())


def _word_pairs(text: str) -> Counter[tuple[str, str]]:
    marked = re.sub(r"\d+(?:[.,]\d+)*", "0", text.lower())
    words = _WORD.findall(marked)
    return Counter(pairwise(["", *words, ""])) if words else Counter()


# --- skill map ---


def skill_map(embeddings: ArrayLike) -> np.ndarray:
    """(N, D) -> (N, 2): the two main axes of all rows together (PCA), with fixed signs.

    Pass the rows of all iterations at once, so that the points of each lie on the same map.
    """
    rows = objective.unit_rows(embeddings)
    points = np.zeros((len(rows), 2))
    axes = min(2, *rows.shape)
    if len(rows) > 1 and np.ptp(rows, axis=0).any():
        points[:, :axes] = PCA(axes, svd_solver="full").fit_transform(rows)
    return points


# --- one table ---


def diversity(
    questions: Sequence[str],
    embeddings: ArrayLike,
    iterations: ArrayLike,
    repetition_threshold: float = 0.9,
    distance_threshold: float = 0.5,
    is_duplicate: Callable[[str, str], bool] | None = None,
) -> list[dict[str, float]]:
    """The figures of each iteration in order: the rows of a run's diversity table.

    Args:
        questions: N texts of all iterations.
        embeddings: (N, D) unit vectors.
        iterations: (N,) integers.

    Keys: iteration, questions, intra_repetition, cross_repetition and duplicate_ratio (against all iterations before;
    NaN in the first, which has none), clusters, effective_clusters (exp of the entropy of their shares),
    largest_cluster (share of the questions), mean_repetition_penalty, median_cosine.
    """
    rows, iterations = objective.unit_rows(embeddings), np.asarray(iterations)
    if not len(questions) == len(rows) == len(iterations):
        raise ValueError(
            f"{len(questions)} questions, {len(rows)} embeddings and {len(iterations)} iterations: pass one each"
        )
    table = []
    for iteration in np.unique(iterations).tolist():
        now, before = np.flatnonzero(iterations == iteration), np.flatnonzero(iterations < iteration)
        sizes = cluster_sizes(rows[now], distance_threshold)
        cosines = batch_cosines(rows[now])
        texts, past = [questions[i] for i in now], [questions[i] for i in before]
        cross = duplicates = float("nan")
        if len(before):
            cross = cross_repetition(rows[now], rows[before], repetition_threshold)
            duplicates = duplicate_ratio(texts, rows[now], past, rows[before], is_duplicate=is_duplicate)
        table.append(
            {
                "iteration": iteration,
                "questions": len(now),
                "intra_repetition": intra_repetition(rows[now], repetition_threshold),
                "cross_repetition": cross,
                "duplicate_ratio": duplicates,
                "clusters": len(sizes),
                "effective_clusters": _effective(sizes),
                "largest_cluster": float(sizes[0] / len(now)),
                "mean_repetition_penalty": float((sizes.astype(float) ** 2).sum() / len(now) ** 2),
                "median_cosine": float(np.median(cosines)) if len(cosines) else float("nan"),
            }
        )
    return table


def _effective(sizes: np.ndarray) -> float:
    """How many clusters of equal size have the same entropy."""
    share = sizes / sizes.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _share(found: np.ndarray) -> float:
    return float(found.mean()) if len(found) else float("nan")


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is outside (0, 1]: it is the cosine of a repetition")
