"""The equations of R-Diverse (arXiv 2602.13103) and of R-Zero (arXiv 2508.05004) as pure functions on arrays.

Nothing here knows a trainer, a model or a file: read it beside the paper, or use it in another framework. Shapes: B
questions of a whole reward batch (those of all ranks), D dimensions of the skill space, m answers to one question.
Similarities are cosines. Results are float64. Questions and answers are text that models wrote: they are compared and
counted, never evaluated.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix
from sklearn.cluster import AgglomerativeClustering

NO_ANSWER = ("", "None")
PROVE = "\u8bc1\u660e"  # the word in Chinese; R-Zero drops proof tasks by it
MAX_ORDER = 4  # of the n-grams of BLEU
TIE = 1e-7  # rounding of a cosine between float32 unit vectors, rounded up


# --- uncertainty ---


def self_consistency(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> tuple[str | None, float]:
    """Majority answer and its share s = |C*| / m of all m answers to one question.

    Equal strings are one class; so are two answers where `same` holds in either direction. An answer that could not be
    extracted (None, blank, or the text "None" that some extractors return) counts in m and is never a class. Ties go
    to the class that came first.

    Args:
        answers: the m extracted answers.
        same: whether two answers, not equal as text, mean the same. It must bound its own time.

    Returns the first form of the majority answer and s; `(None, 0.0)` if no answer could be extracted. Raises
    `ValueError` for an empty list, and for None in its place.
    """
    if answers is None or not len(answers):
        raise ValueError("self_consistency needs at least one answer; score a question without a reply as missing")
    votes = Counter(answer.strip() for answer in answers if answer is not None and answer.strip() not in NO_ANSWER)
    classes: dict[str, int] = {}
    for answer, count in votes.items():  # in order of first appearance
        known = next((other for other in classes if same(other, answer) or same(answer, other)), answer)
        classes[known] = classes.get(known, 0) + count
    if not classes:
        return None, 0.0
    majority = max(classes, key=classes.__getitem__)  # of equal counts the first
    return majority, classes[majority] / len(answers)


def uncertainty(consistency: ArrayLike) -> np.ndarray:
    """R_unc = min(s, 1 - s), in [0, 0.5], highest where half of the answers agree. NaN (not measured) stays NaN.

    R-Zero's paper writes 1 - 2 |s - 1/2|, twice this; its code and R-Diverse use this scale.
    """
    s = np.asarray(consistency, np.float64)
    _check_range("consistency", s, 0, 1, missing=True)
    return np.minimum(s, 1 - s)


# --- repetition inside a batch ---


def repetition_penalty(
    embeddings: ArrayLike, distance_threshold: float = 0.5, batch_size: int | None = None
) -> np.ndarray:
    """P_rep: share of the batch that lies in the same skill cluster, in (0, 1].

    Agglomerative clustering with average linkage on 1 - cosine, cut at `distance_threshold`; clusters at exactly that
    distance stay apart. The result does not depend on the order of the rows, equal distances included.

    Args:
        embeddings: (B, D) rows, finite and not zero; of any length, since only directions count.
        distance_threshold: R-Zero's 0.5; the paper does not disclose its own.
        batch_size: what to divide by, if the batch also has questions without an embedding. Default: B.

    Returns (B,).
    """
    if not 0 < distance_threshold <= 2:
        raise ValueError(f"distance_threshold={distance_threshold} is outside (0, 2], the range of 1 - cosine")
    unit = unit_rows(embeddings)
    # Equal distances are merged in the order of the rows, so the rows are first brought into an order of their own
    order = _row_order(unit)
    unit = unit[order]
    distances = np.clip(1 - unit @ unit.T, 0, 2)
    share = np.empty(len(unit))
    share[order] = _cluster_share(distances, distance_threshold - TIE, batch_size)
    return share


def _row_order(rows: np.ndarray) -> np.ndarray:
    """Order by the first column, then the second and so on; the first few nearly always decide."""
    few = rows[:, :8]
    order = np.lexsort(few.T[::-1])
    if (few[order[1:]] == few[order[:-1]]).all(1).any():
        order = np.lexsort(rows.T[::-1])
    return order


def bleu_repetition_penalty(
    questions: Sequence[str], distance_threshold: float = 0.5, batch_size: int | None = None
) -> np.ndarray:
    """R-Zero's P_rep: share of the batch in the same cluster of texts, by average linkage on 1 - BLEU.

    The distances equal those of nltk's `sentence_bleu` (smoothing `method1`, words between spaces) bit for bit. R-Zero
    takes BLEU in one direction only (the earlier question is the hypothesis), so its penalty depends on the order.

    Args:
        questions: B texts; "" for a question that could not be parsed, as in R-Zero.
        batch_size: what to divide by, if the batch also has questions without a text. Default: B.

    Returns (B,).
    """
    return _cluster_share(bleu_distances(questions), distance_threshold, batch_size)


def bleu_distances(questions: Sequence[str]) -> np.ndarray:
    """1 - BLEU of each pair of texts, (B, B), symmetric: of two texts the earlier is scored against the later."""
    words = [question.split() for question in questions]
    lengths = [len(text) for text in words]
    rows = [_ngram_rows(words, order) for order in range(1, MAX_ORDER + 1)]
    matches = [(ngrams @ ngrams.T).toarray() for ngrams in rows]
    distances = np.zeros((len(words), len(words)))
    for i, length in enumerate(lengths):
        columns = (m[i, i + 1 :].tolist() for m in matches)
        row = [1 - _bleu(length, *pair) for pair in zip(lengths[i + 1 :], *columns, strict=True)]
        distances[i, i + 1 :] = distances[i + 1 :, i] = row
    return distances


@lru_cache(maxsize=1 << 18)
def _bleu(length: int, reference_length: int, *matches: int) -> float:
    """BLEU of a text by its length and its numbers of 1- to 4-grams in common with one reference.

    The operations and their order are those of nltk, so that the result is the same float. Pairs of one batch have few
    different numbers, hence the cache.
    """
    if matches[0] == 0:
        return 0.0
    logs = [
        math.log((match or 0.1) / max(1, length - order))  # method1: no match counts as 0.1
        for order, match in enumerate(matches)
    ]
    brevity = 1.0 if length > reference_length else math.exp(1 - reference_length / length)
    return brevity * math.exp(math.fsum(log / MAX_ORDER for log in logs))


def bleu_similarity(questions: Sequence[str], memory: Sequence[str]) -> np.ndarray:
    """BLEU of each question against each text of a memory, (B, M): replaces the cosine in the ablation without SAM."""
    words = [text.split() for text in (*questions, *memory)]
    lengths, number = [len(text) for text in words], len(questions)
    rows = [_ngram_rows(words, order) for order in range(1, MAX_ORDER + 1)]
    similarity = np.zeros((number, len(memory)))
    for i in range(number):
        columns = ((ngrams[i] @ ngrams[number:].T).toarray()[0].tolist() for ngrams in rows)
        similarity[i] = [_bleu(lengths[i], *pair) for pair in zip(lengths[number:], *columns, strict=True)]
    return similarity


def _ngram_rows(words: list[list[str]], order: int) -> csr_matrix:
    """0/1 rows whose products count the n-grams that two texts have in common, repeated ones as often as both do."""
    columns: dict[tuple, int] = {}
    indices, ends = [], [0]
    for text in words:
        seen: Counter = Counter()
        for ngram in zip(*(text[k:] for k in range(order)), strict=False):
            seen[ngram] += 1  # the k-th occurrence is a column of its own: min(a, b) becomes a product of 0/1 rows
            indices.append(columns.setdefault((ngram, seen[ngram]), len(columns)))
        ends.append(len(indices))
    ones = np.ones(len(indices), np.int32)
    return csr_matrix((ones, indices, ends), shape=(len(words), len(columns)), dtype=np.int32)


def _cluster_share(distances: np.ndarray, threshold: float, batch_size: int | None = None) -> np.ndarray:
    number = len(distances)
    size = number if batch_size is None else batch_size
    if size < number:
        raise ValueError(f"batch_size={size} is less than the {number} questions given: pass that of the whole batch")
    if number < 2:
        return np.ones(number) / max(size, 1)
    clustering = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=threshold
    )
    labels = clustering.fit_predict(distances)
    return np.bincount(labels)[labels] / size


def cluster_sizes(shares: ArrayLike, batch_size: int | None = None) -> np.ndarray:
    """Sizes of the clusters behind P_rep, the largest first: integers whose sum is B.

    Args:
        shares: (B,) P_rep of each question, as from `repetition_penalty` or `bleu_repetition_penalty`.
        batch_size: what the shares were divided by. Default: B.
    """
    shares = np.asarray(shares, np.float64)
    whole = len(shares) if batch_size is None else batch_size
    size, rows = np.unique(np.rint(shares * whole).astype(int), return_counts=True)
    return np.repeat(size, rows // np.maximum(size, 1))[::-1]


# --- memory ---


def memory_penalty(
    p_max: ArrayLike, p_mean: ArrayLike, gamma: float = 0.5, tau_max: float = 0.5, tau_mean: float = 0.25
) -> np.ndarray:
    """P_MAP = gamma [P_max - tau_max]_+ + (1 - gamma) [P_mean - tau_mean]_+.

    `memory_penalty(1, 1)` is its upper bound, 0.625 with the paper's values. An empty memory has no P_max: its penalty
    is 0 (`MemoryBank.penalty` does that).

    Args:
        p_max, p_mean: (B,) highest and mean cosine of each question to the memory.
        gamma: weight of the first part, in [0, 1].
        tau_max, tau_mean: similarity that is free, each in [-1, 1].

    Returns (B,).
    """
    for name, value, low in (("gamma", gamma, 0), ("tau_max", tau_max, -1), ("tau_mean", tau_mean, -1)):
        if not low <= value <= 1:
            raise ValueError(f"{name}={value} is outside [{low}, 1]; the paper has 0.5, 0.5 and tau_mean 0.25")
    p_max, p_mean = np.asarray(p_max, np.float64), np.asarray(p_mean, np.float64)
    _check_range("p_max", p_max, -1, 1)
    _check_range("p_mean", p_mean, -1, 1)
    return gamma * np.maximum(p_max - tau_max, 0) + (1 - gamma) * np.maximum(p_mean - tau_mean, 0)


def replay_count(n_current: int, fraction: float = 0.3) -> int:
    """Past rows that make up a share rho of the Solver's data: floor(n_current * rho / (1 - rho)), exactly."""
    if n_current < 0 or not 0 <= fraction < 1:
        raise ValueError(f"replay needs n_current >= 0 and 0 <= fraction < 1, got {n_current} and {fraction}")
    rho = Fraction(str(fraction))  # 0.3 as three tenths; in floats 0.3 / 0.7 rounds some whole numbers down
    return math.floor(n_current * rho / (1 - rho))


# --- rewards of the Challenger ---


def challenger_reward(
    consistency: ArrayLike,
    repetition: ArrayLike,
    memory_penalty: ArrayLike,
    valid: ArrayLike,
    alpha: float = 1.0,
    beta: float = 1.0,
    invalid_reward: float | None = None,
) -> np.ndarray:
    """R_total = R_unc - alpha P_rep - beta P_MAP (Eq. 11), not clipped; one fixed reward for every invalid output.

    Args:
        consistency: (B,) s of each question in [0, 1], NaN where it could not be measured.
        repetition: (B,) P_rep in [0, 1].
        memory_penalty: (B,) P_MAP, 0 or more.
        valid: (B,) bool, whether the output has the required form. Where it does not, the other arrays are ignored.
        alpha, beta: weights of the penalties, 0 or more.
        invalid_reward: of an invalid output. Default: `reward_of_invalid(alpha, beta)`.

    Returns (B,); NaN where the question is valid and s is NaN: no reward, which is not the same as a low one. Raises
    `ValueError` if the reward of an invalid output is not strictly below every valid one.
    """
    if not (alpha >= 0 and beta >= 0):
        raise ValueError(f"alpha={alpha} and beta={beta} must be 0 or more: they weigh penalties")
    valid, s, repetition, memory = _same_length(valid, consistency, repetition, memory_penalty)
    _check_range("repetition", repetition[valid], 0, 1)
    _check_range("memory_penalty", memory[valid], 0, 2)
    floor = reward_of_invalid(alpha, beta) if invalid_reward is None else invalid_reward
    reward = np.full(len(valid), floor, np.float64)
    reward[valid] = uncertainty(s[valid]) - alpha * repetition[valid] - beta * memory[valid]
    if (reward[valid] <= floor).any():
        raise ValueError(
            f"invalid_reward={floor} is not below the lowest valid reward {np.nanmin(reward[valid])}: breaking the "
            f"format would pay; set it below {lowest_valid_reward(alpha, beta)}, the bound with the paper's thresholds"
        )
    return reward


def r_zero_invalid_reward(repetition: ArrayLike, alpha: float = 1.0) -> np.ndarray:
    """R-Zero's reward of an invalid output: -1 - P_rep in its release, which has alpha = 1.

    For another alpha it is -max(1, alpha) - alpha P_rep, so that it stays below the lowest valid reward, -alpha.

    Args:
        repetition: (B,) P_rep of the outputs, where an invalid one counts as the empty text.
        alpha: weight of P_rep, 0 or more.
    """
    return -max(1.0, alpha) - alpha * np.asarray(repetition, np.float64)


def lowest_valid_reward(
    alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.5, tau_max: float = 0.5, tau_mean: float = 0.25
) -> float:
    """Lower bound of R_total for a valid question: all answers agree, all penalties full. -1.625 in the paper."""
    return float(-alpha - beta * memory_penalty(1.0, 1.0, gamma, tau_max, tau_mean))


def reward_of_invalid(
    alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.5, tau_max: float = 0.5, tau_mean: float = 0.25
) -> float:
    """The one reward of every invalid output, below all valid ones: -2 in the paper's setting. Not in the paper."""
    lowest = lowest_valid_reward(alpha, beta, gamma, tau_max, tau_mean)
    return min(-(max(1.0, alpha) + max(1.0, beta)), lowest - 0.375)  # 0.375 = 2 - 1.625


def scatter_penalty(values: ArrayLike, ok: ArrayLike, worst: float) -> np.ndarray:
    """Penalties of the rows that have an embedding, and `worst` for the others: a failed encoding never looks novel.

    Args:
        values: one penalty for each true row of `ok`, in order.
        ok: (B,) bool.
        worst: the penalty's upper bound: 1 for P_rep, `memory_penalty(1, 1)` for P_MAP, 0 if the memory is empty.

    Returns (B,).
    """
    ok, values = np.asarray(ok, bool), np.asarray(values, np.float64)
    if values.shape != (ok.sum(),):
        raise ValueError(f"values has shape {values.shape}, but ok marks {ok.sum()} rows; pass one penalty for each")
    result = np.full(len(ok), worst, np.float64)
    result[ok] = values
    return result


# --- questions for the Solver ---


def drop_reason(
    question: str,
    majority: str | None,
    consistency: float,
    low: float = 0.3,
    high: float = 0.8,
    r_zero_words: bool = True,
) -> str | None:
    """Why a labelled question is not used to train the Solver; None if it is.

    "no_answer": there is no label. "low_consistency", "high_consistency": s is outside [low, high], ends included:
    3 to 8 of 10 answers with the paper's band, 3 to 7 with high=0.7. "proof", "box_in_question", "text_in_answer":
    R-Zero's word rules, which also drop good questions ("A box holds ..."); `r_zero_words=False` turns them off.
    """
    if majority is None or majority.strip() in NO_ANSWER:
        return "no_answer"
    if not 0 <= consistency <= 1:
        raise ValueError(f"consistency={consistency} of a labelled question is outside [0, 1]")
    if r_zero_words:
        if PROVE in question:
            return "proof"
        if "box" in question.lower():
            return "box_in_question"
        if "text" in majority.lower():
            return "text_in_answer"
    # A share that was averaged or stored as float32 equals its decimal only up to rounding
    if consistency < low - TIE:
        return "low_consistency"
    return "high_consistency" if consistency > high + TIE else None


# --- checks ---


def unit_rows(embeddings: ArrayLike) -> np.ndarray:
    """(B, D) float64 rows of length 1. Raises `ValueError` for a row without a direction: not finite, or all 0."""
    rows = np.asarray(embeddings, np.float64)
    if rows.ndim != 2:
        raise ValueError(f"embeddings must have shape (questions, dimensions), got {rows.shape}")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = ~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0))
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"embedding {row} has norm {norms[row, 0]}: a direction needs finite numbers that are not all 0; leave "
            "failed encodings out and give them the full penalty"
        )
    return rows / norms


def _same_length(valid: ArrayLike, *columns: ArrayLike) -> Iterable[np.ndarray]:
    arrays = [np.asarray(valid, bool), *(np.asarray(column, np.float64) for column in columns)]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1:
        names = ("valid", "consistency", "repetition", "memory_penalty")
        shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(names, arrays, strict=True))
        raise ValueError(f"one value a question is needed in each array, got {shapes}")
    return arrays


def _check_range(name: str, values: np.ndarray, low: float, high: float, missing: bool = False) -> None:
    good = (values >= low - TIE) & (values <= high + TIE)
    if missing:
        good |= np.isnan(values)
    if not good.all():
        row = int((~good.ravel()).argmax())
        raise ValueError(f"{name} of row {row} is {values.ravel()[row]}, outside [{low}, {high}]: check its source")
