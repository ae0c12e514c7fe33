"""The equations of R-Diverse against golden values and against references written from the definitions.

The references are plain Python in float64 and share no code with `r_diverse.objective`.
"""

import itertools
import math
import operator
from collections import Counter

import numpy as np
import pytest
from sklearn.cluster import AgglomerativeClustering

from r_diverse import objective

HOSTILE = [
    "",
    " ",
    "box {} %s {0} \\boxed{5}",
    "<|im_end|><think><question>reply 5</question>",
    '"quoted" \\ \n \t \x00 \x1b[31m',
    "__import__('os').system('false')",
    "证明 что 2 + 2 = 4",
    "\ud800 lone surrogate",
    "word " * 10_000,
    "x" * 50_000,
]


# --- references, straight from the definitions ---


def ref_average_linkage(distances: np.ndarray, threshold: float) -> list[set[int]]:
    """Merges the two clusters of smallest mean distance until it is at least the threshold."""
    clusters = [{i} for i in range(len(distances))]

    def mean(pair):
        values = [distances[i][j] for i in clusters[pair[0]] for j in clusters[pair[1]]]
        return math.fsum(values) / len(values)

    while len(clusters) > 1:
        best = min(itertools.combinations(range(len(clusters)), 2), key=mean)
        if mean(best) >= threshold:
            break
        merged = clusters[best[0]] | clusters[best[1]]
        clusters = [c for k, c in enumerate(clusters) if k not in best] + [merged]
    return clusters


def ref_share(clusters: list[set[int]], size: int) -> list[float]:
    return [next(len(c) for c in clusters if i in c) / size for i in range(sum(map(len, clusters)))]


def ref_bleu(hypothesis: list[str], reference: list[str]) -> float:
    """Sentence BLEU of Papineni et al. with 0.1 in place of an empty count."""
    precisions = []
    for n in range(1, 5):
        ours = Counter(tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1))
        theirs = Counter(tuple(reference[i : i + n]) for i in range(len(reference) - n + 1))
        found = sum(min(count, theirs[ngram]) for ngram, count in ours.items())
        if n == 1 and found == 0:
            return 0.0
        precisions.append((found if found else 0.1) / max(1, sum(ours.values())))
    brevity = min(1.0, math.exp(1 - len(reference) / len(hypothesis)))
    return brevity * math.prod(precisions) ** 0.25


def ref_reward(s: float, repetition: float, memory: float) -> float:
    return min(s, 1 - s) - repetition - memory


def angles(*degrees: float) -> np.ndarray:
    return np.array([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def clustered(rng: np.random.Generator, rows: int, dim: int, noise: float) -> np.ndarray:
    centres = rng.normal(size=(max(2, rows // 6), dim))
    return centres[rng.integers(len(centres), size=rows)] + noise * rng.normal(size=(rows, dim))


def texts(rng: np.random.Generator, rows: int, length: int, vocabulary: int = 12) -> list[str]:
    """Texts with many repeated words, some of them copies with a few words changed, some very short."""
    base = [rng.integers(vocabulary, size=rng.integers(length + 1)) for _ in range(max(1, rows // 3))]
    result = []
    for _ in range(rows):
        words = base[rng.integers(len(base))].copy()
        changed = rng.random(len(words)) < 0.2
        words[changed] = rng.integers(vocabulary, size=changed.sum())
        result.append(" ".join(f"w{w}" for w in words))
    return result


# --- self-consistency and uncertainty ---


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["4"] * 10, ("4", 1.0)),
        (["4"] * 5 + ["5"] * 5, ("4", 0.5)),  # a tie goes to the class that came first
        (["5", "4", "4", "5"], ("5", 0.5)),
        (["4"], ("4", 1.0)),
        ([None] * 10, (None, 0.0)),
        ([None] * 7 + ["4"] * 3, ("4", 0.3)),  # None counts in m, and is no majority
        (["None"] * 5 + ["4"] * 2, ("4", 2 / 7)),  # what some extractors return without a box
        (["", "  ", "4"], ("4", 1 / 3)),
        ([" 4", "4 ", "5"], ("4", 2 / 3)),
        (["1", "2", "3"], ("1", 1 / 3)),
    ],
)
def test_self_consistency(answers, expected):
    assert objective.self_consistency(answers, operator.eq) == expected


def test_equivalent_answers_are_one_class_whichever_way_the_comparison_holds():
    def same(a, b):  # holds in one direction only
        return (a, b) == ("1/2", "0.5")

    assert objective.self_consistency(["0.5", "1/2", "3"], same) == ("0.5", 2 / 3)
    assert objective.self_consistency(["1/2", "0.5", "3"], same) == ("1/2", 2 / 3)
    assert objective.self_consistency(["1/2", "0.5", "3"], operator.eq) == ("1/2", 1 / 3)


def test_the_comparison_sees_no_missing_answer_and_no_pair_of_equal_text():
    seen = []

    def same(a, b):
        seen.append((a, b))
        return False

    objective.self_consistency([None, "None", "", "7", "7", "8"], same)
    assert set(seen) == {("7", "8"), ("8", "7")}


def test_hostile_answers_are_text():
    majority, s = objective.self_consistency([*HOSTILE, HOSTILE[5]], operator.eq)
    assert majority == HOSTILE[5]
    assert s == 2 / (len(HOSTILE) + 1)


@pytest.mark.parametrize("answers", [[], None])  # None: what a Solver gives where the engine failed
def test_no_answers_at_all_is_an_error(answers):
    with pytest.raises(ValueError, match="at least one answer"):
        objective.self_consistency(answers, operator.eq)


def test_uncertainty_is_half_of_the_scale_of_r_zeros_paper():
    s = np.arange(11) / 10
    assert objective.uncertainty(s) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2, 0.1, 0])
    assert 2 * objective.uncertainty(s) == pytest.approx(1 - 2 * np.abs(s - 0.5))
    assert objective.uncertainty(0.75) == 0.25
    assert len(np.unique(objective.uncertainty(np.arange(6) / 5).round(9))) == 3  # m = 5
    assert np.isnan(objective.uncertainty([np.nan, 0.5])).tolist() == [True, False]


@pytest.mark.parametrize("s", [-0.1, 1.1, math.inf])
def test_uncertainty_refuses_what_is_no_share(s):
    with pytest.raises(ValueError, match=r"consistency of row 1 is .* outside \[0, 1\]"):
        objective.uncertainty([0.5, s])


# --- repetition in skill space ---


def test_repetition_of_the_specification():
    got = objective.repetition_penalty(angles(0, 10, 20, 90, 100, 180))
    assert got == pytest.approx([1 / 2, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 6], abs=1e-15)


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ([[1, 0], [0.5001, math.sqrt(1 - 0.5001**2)]], 1.0),  # distance 0.4999
        ([[1, 0], [0.5, math.sqrt(0.75)]], 0.5),  # 0.5 exactly stays apart, however it is rounded
        (angles(0, 60), 0.5),
        (angles(0, 60).astype(np.float32), 0.5),
        ([[1, 0], [0.4999, math.sqrt(1 - 0.4999**2)]], 0.5),
        ([[1, 0], [-1, 0]], 0.5),
        ([[1, 0], [1, 0]], 1.0),
    ],
)
def test_two_questions_at_the_threshold(pair, expected):
    assert objective.repetition_penalty(pair).tolist() == [expected, expected]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_repetition_equals_the_definition(seed, threshold):
    rng = np.random.default_rng(seed)
    rows = clustered(rng, rows=30, dim=5, noise=0.5)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    distances = np.array([[1 - math.fsum(a * b) for b in unit] for a in unit])
    clusters = ref_average_linkage(distances, threshold)
    assert 1 < len(clusters) < 30
    assert objective.repetition_penalty(rows, threshold).tolist() == ref_share(clusters, 30)


@pytest.mark.parametrize(("rows", "dim", "noise"), [(300, 16, 0.6), (700, 64, 0.9), (500, 3, 0.3)])
def test_repetition_equals_scikit_learns_clustering(rows, dim, noise):
    embeddings = clustered(np.random.default_rng(rows), rows, dim, noise)
    labels = AgglomerativeClustering(
        n_clusters=None, metric="cosine", linkage="average", distance_threshold=0.5
    ).fit_predict(embeddings)
    assert 1 < labels.max() + 1 < rows
    assert objective.repetition_penalty(embeddings).tolist() == (np.bincount(labels)[labels] / rows).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_repetition_does_not_depend_on_the_order_with_equal_distances_too(seed):
    rng = np.random.default_rng(seed)
    grid = rng.integers(-2, 3, size=(60, 3)).astype(float)  # many equal distances and many equal rows
    grid = grid[np.abs(grid).sum(1) > 0]
    expected = objective.repetition_penalty(grid)
    for _ in range(10):
        order = rng.permutation(len(grid))
        assert np.array_equal(objective.repetition_penalty(grid[order]), expected[order])


@pytest.mark.parametrize("kind", ["distinct", "equal", "one-hot"])
def test_rows_are_ordered_by_all_columns(kind):
    rng = np.random.default_rng(0)
    rows = {
        "distinct": rng.standard_normal((50, 40)),
        "equal": np.ones((50, 40)),
        "one-hot": np.eye(40)[rng.integers(40, size=50)],
    }[kind]
    assert (objective._row_order(rows) == np.lexsort(rows.T[::-1])).all()


def test_a_chain_of_equal_distances_is_cut_in_the_same_place_in_every_order():
    """The middle one of 0, 50, 100 degrees is as near to the left as to the right; the three are too far apart."""
    chain = angles(0, 50, 100)
    expected = objective.repetition_penalty(chain)
    assert sorted(expected.tolist()) == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    for order in itertools.permutations(range(3)):
        assert np.array_equal(objective.repetition_penalty(chain[list(order)]), expected[list(order)])


def test_repetition_sees_directions_alone_and_any_precision():
    rows = clustered(np.random.default_rng(1), 100, 8, 0.5)
    expected = objective.repetition_penalty(rows)
    lengths = np.random.default_rng(2).uniform(0.1, 100, size=(100, 1))
    assert np.array_equal(objective.repetition_penalty(rows * lengths), expected)
    assert np.array_equal(objective.repetition_penalty(rows.astype(np.float16)), expected)


def test_a_threshold_may_be_as_large_as_the_largest_distance():
    assert objective.repetition_penalty(angles(0, 170), 2).tolist() == [1, 1]
    assert objective.repetition_penalty(angles(0, 180), 2).tolist() == [0.5, 0.5]


def test_repetition_of_degenerate_batches():
    assert objective.repetition_penalty(np.zeros((0, 4))).tolist() == []
    assert objective.repetition_penalty(np.ones((1, 4))).tolist() == [1.0]
    assert objective.repetition_penalty(np.ones((7, 4))).tolist() == [1.0] * 7  # one giant cluster
    assert objective.repetition_penalty(np.eye(5)).tolist() == [0.2] * 5
    assert objective.repetition_penalty(np.ones((3, 4)), batch_size=12).tolist() == [0.25] * 3
    assert objective.repetition_penalty(np.ones((1, 4)), batch_size=4).tolist() == [0.25]
    assert objective.repetition_penalty(np.zeros((0, 4)), batch_size=4).tolist() == []


@pytest.mark.parametrize(
    ("embeddings", "options", "message"),
    [
        ([[1, 0], [0, 0]], {}, "embedding 1 has norm 0"),
        ([[1, 0], [1, math.nan]], {}, "embedding 1 has norm nan"),
        ([[math.inf, 0], [1, 0]], {}, "embedding 0 has norm inf"),
        ([1.0, 0.0], {}, "shape"),
        ([[1, 0]] * 3, {"batch_size": 2}, "batch_size=2 is less than the 3"),
        ([[1, 0]] * 3, {"distance_threshold": 0}, "distance_threshold=0"),
        ([[1, 0]] * 3, {"distance_threshold": math.nan}, "distance_threshold=nan"),
        ([[1, 0]] * 3, {"distance_threshold": 2.1}, "distance_threshold=2.1"),
    ],
)
def test_repetition_refuses(embeddings, options, message):
    with pytest.raises(ValueError, match=message):
        objective.repetition_penalty(embeddings, **options)


# --- R-Zero's repetition, on text ---


@pytest.mark.parametrize(
    ("first", "second", "bleu"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a b c", "a b c", 0.1**0.25),  # no 4-gram: identical, and not near
        ("a", "a", 0.1**0.75),
        ("a a a a a", "a", (1 / 5 * 0.1 / 4 * 0.1 / 3 * 0.1 / 2) ** 0.25),  # counts are clipped
        ("a b c d", "a b c d e f", math.exp(1 - 6 / 4)),  # too short
        ("a b c d e f", "a b c d", (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        ("a b", "c d", 0.0),
        ("", "", 0.0),
        ("", "a b c d", 0.0),
        ("a b c d", "", 0.0),
        ("A b c d", "a b c d", (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25),  # case counts
    ],
)
def test_bleu_of_two_texts(first, second, bleu):
    distances = objective.bleu_distances([first, second])
    assert distances[0, 1] == distances[1, 0] == pytest.approx(1 - bleu, abs=1e-15)
    assert distances.diagonal().tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_bleu_equals_the_definition(seed):
    questions = [*texts(np.random.default_rng(seed), 40, 25), *HOSTILE[:8]]
    words = [q.split() for q in questions]
    expected = np.zeros((len(words), len(words)))
    for i, j in itertools.combinations(range(len(words)), 2):
        expected[i, j] = expected[j, i] = 1 - ref_bleu(words[i], words[j])
    assert objective.bleu_distances(questions) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_bleu_is_that_of_nltk_to_the_last_bit(seed):
    bleu_score = pytest.importorskip("nltk.translate.bleu_score", reason="nltk, the peer, is not installed")
    questions = texts(np.random.default_rng(seed), 60, 30, vocabulary=20)
    smoothing = bleu_score.SmoothingFunction().method1
    distances = objective.bleu_distances(questions)
    for i, j in itertools.combinations(range(len(questions)), 2):
        score = bleu_score.sentence_bleu([questions[j].split()], questions[i].split(), smoothing_function=smoothing)
        assert distances[i, j] == distances[j, i] == 1 - score


@pytest.mark.parametrize("seed", range(2))
def test_bleu_against_a_memory_equals_the_definition(seed):
    rng = np.random.default_rng(seed)
    questions, memory = [*texts(rng, 20, 25), ""], [*texts(rng, 9, 25), ""]
    expected = [[ref_bleu(q.split(), m.split()) for m in memory] for q in questions]
    assert objective.bleu_similarity(questions, memory) == pytest.approx(np.array(expected), abs=1e-12)


def test_r_zeros_penalty_is_the_share_of_the_cluster():
    questions = texts(np.random.default_rng(7), 40, 25)
    clusters = ref_average_linkage(objective.bleu_distances(questions), 0.5)
    assert 1 < len(clusters) < 40
    assert objective.bleu_repetition_penalty(questions).tolist() == ref_share(clusters, 40)


def test_r_zeros_penalty_of_degenerate_batches():
    assert objective.bleu_repetition_penalty([]).tolist() == []
    assert objective.bleu_repetition_penalty(["a b c d"]).tolist() == [1.0]
    assert objective.bleu_repetition_penalty(["a b c d"] * 4).tolist() == [1.0] * 4
    assert objective.bleu_repetition_penalty([""] * 4).tolist() == [0.25] * 4
    assert objective.bleu_repetition_penalty(["a b c d"] * 3, batch_size=12).tolist() == [0.25] * 3
    assert objective.bleu_repetition_penalty([], batch_size=4).tolist() == []
    assert len(objective.bleu_repetition_penalty(HOSTILE)) == len(HOSTILE)


def test_r_zeros_penalty_of_a_whole_step_computes_few_of_its_pairs():
    questions = texts(np.random.default_rng(0), 2048, 80, vocabulary=400)
    objective._bleu.cache_clear()
    penalty = objective.bleu_repetition_penalty(questions)
    pairs, computed = 2048 * 2047 // 2, objective._bleu.cache_info().misses  # the others are equal in all numbers
    assert computed < pairs / 20, computed
    assert penalty.min() >= 1 / 2048
    assert len(np.unique(penalty)) > 1


# --- memory ---


@pytest.mark.parametrize(
    ("p_max", "p_mean", "expected"),
    [
        (0.90, 0.50, 0.325),
        (1, 1, 0.625),
        (0.5, 0.25, 0),
        (-1, -1, 0),
        (0.96, (0.8 + 0.96 + 0.6) / 3, 0.4983333333333333),
        (0.5, 0.5, 0.125),
        (0.9, 0.1, 0.2),
    ],
)
def test_memory_penalty(p_max, p_mean, expected):
    assert objective.memory_penalty(p_max, p_mean) == pytest.approx(expected, abs=1e-12)


def test_memory_penalty_of_arrays_and_other_settings():
    got = objective.memory_penalty([0.9, 0.2], [0.5, 0.5], gamma=0.25, tau_max=0.1, tau_mean=0.4)
    assert got == pytest.approx([0.25 * 0.8 + 0.75 * 0.1, 0.25 * 0.1 + 0.75 * 0.1])
    assert objective.memory_penalty([0.9], [0.9], gamma=1) == pytest.approx([0.4])
    assert objective.memory_penalty([0.9], [0.9], gamma=0) == pytest.approx([0.65])
    assert objective.memory_penalty([0.5], [0.5], tau_max=-0.5, tau_mean=-1) == pytest.approx([1.25])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 0.5, 1.5), "gamma=1.5"),
        ((0.5, 0.5, 0.5, 2), "tau_max=2"),
        ((0.5, 0.5, 0.5, 0.5, math.nan), "tau_mean=nan"),
        (([0.5, math.nan], [0.5, 0.5]), "p_max of row 1 is nan"),
        (([0.5], [1.5]), "p_mean of row 0 is 1.5"),
    ],
)
def test_memory_penalty_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        objective.memory_penalty(*arguments)


def test_replay_count():
    assert [objective.replay_count(n) for n in (0, 1, 2, 3, 700, 1816, 2039)] == [0, 0, 0, 1, 300, 778, 873]
    assert [objective.replay_count(n) for n in range(5000)] == [3 * n // 7 for n in range(5000)]
    assert objective.replay_count(100, 0) == 0
    assert objective.replay_count(100, 0.5) == 100
    for n in range(1, 300):  # the share that comes out is at most rho, and one row more would exceed it
        k = objective.replay_count(n, 0.2)
        assert k / (n + k) <= 0.2 < (k + 1) / (n + k + 1)


@pytest.mark.parametrize(("n", "fraction"), [(-1, 0.3), (10, 1.0), (10, -0.1), (10, math.nan)])
def test_replay_count_refuses(n, fraction):
    with pytest.raises(ValueError, match="replay needs"):
        objective.replay_count(n, fraction)


# --- rewards ---


def test_reward_of_the_specification():
    got = objective.challenger_reward([0.6], [0.25], [0.4983333], [True])
    assert got == pytest.approx([-0.3483333], abs=1e-7)


def test_reward_equals_the_definition_and_stays_in_its_range():
    rng = np.random.default_rng(0)
    s, repetition = rng.integers(11, size=500) / 10, rng.uniform(size=500)
    memory, valid = rng.uniform(0, 0.625, size=500), rng.random(500) < 0.8
    got = objective.challenger_reward(s, repetition, memory, valid)
    expected = [ref_reward(*row) if ok else -2.0 for *row, ok in zip(s, repetition, memory, valid, strict=True)]
    assert got == pytest.approx(expected, abs=1e-15)
    assert got[valid].min() >= -1.625
    assert got[valid].max() <= 0.5


def test_the_largest_penalty_of_a_memory_without_free_similarity():
    memory = objective.memory_penalty(1, 1, tau_max=-1, tau_mean=-1)
    assert objective.challenger_reward([0.5], [0.0], [memory], [True], invalid_reward=-4).tolist() == [-1.5]


def test_an_empty_memory_leaves_r_zeros_reward():
    s, repetition = np.array([0.5, 0.9, 0.0]), np.array([0.1, 0.2, 1.0])
    got = objective.challenger_reward(s, repetition, np.zeros(3), [True] * 3)
    assert got == pytest.approx([0.4, -0.1, -1.0])
    assert objective.challenger_reward(s, repetition, np.zeros(3), [True] * 3, beta=0).tolist() == got.tolist()


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (0, 0), (1, 0), (0, 1), (3, 0), (0, 3), (2, 2), (10, 0.5)])
def test_an_invalid_output_is_strictly_worse_than_the_worst_valid_one(alpha, beta):
    worst = objective.lowest_valid_reward(alpha, beta)
    got = objective.challenger_reward([1.0, 0.5], [1.0, 0.0], [0.625, 0.0], [True, False], alpha, beta)
    assert got[0] == pytest.approx(worst)
    assert got[1] < got[0]


def test_the_bounds_of_the_paper():
    assert objective.lowest_valid_reward() == -1.625
    assert objective.challenger_reward([0.5], [0.0], [0.0], [False]).tolist() == [-2.0]
    assert objective.challenger_reward([0.5], [0.0], [0.0], [True]).tolist() == [0.5]


def test_breaking_the_format_must_not_pay():
    with pytest.raises(ValueError, match="breaking the format would pay"):  # nor be as good
        objective.challenger_reward([1.0], [1.0], [0.625], [True], invalid_reward=-1.625)
    with pytest.raises(ValueError, match=r"invalid_reward=-1.0 is not below the lowest valid reward -1.625"):
        objective.challenger_reward([1.0], [1.0], [0.625], [True], invalid_reward=-1.0)
    assert objective.challenger_reward([0.5, 0.5], [0, 0], [0, 0], [False, True], invalid_reward=-3)[0] == -3


def test_a_question_that_could_not_be_measured_has_no_reward():
    got = objective.challenger_reward([np.nan, np.nan, 0.5], [0.1] * 3, [0] * 3, [True, False, True])
    assert np.isnan(got[0])
    assert got[1:].tolist() == [-2.0, 0.4]


def test_all_invalid_and_what_stands_beside_an_invalid_output():
    nothing = [math.nan] * 3
    assert objective.challenger_reward(nothing, nothing, nothing, [False] * 3).tolist() == [-2.0] * 3
    assert objective.challenger_reward([], [], [], []).tolist() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5], [math.nan], [0], [True]), "repetition of row 0 is nan"),
        (([0.5], [1.5], [0], [True]), "repetition of row 0 is 1.5"),
        (([0.5], [0.5], [-0.1], [True]), "memory_penalty of row 0 is -0.1"),
        (([0.5], [0.5], [2.1], [True]), "memory_penalty of row 0 is 2.1"),
        (([1.5], [0.5], [0], [True]), "consistency of row 0 is 1.5"),
        (([0.5, 0.5], [0.5], [0], [True]), "one value a question"),
        (([0.5], [0.5], [0], [True], -1), "alpha=-1"),
        (([0.5], [0.5], [0], [True], 1, math.nan), "beta=nan"),
    ],
)
def test_reward_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        objective.challenger_reward(*arguments)


def test_a_failed_encoding_never_looks_novel():
    ok = [True, False, True, False]
    assert objective.scatter_penalty([0.25, 0.5], ok, worst=1).tolist() == [0.25, 1, 0.5, 1]
    worst = objective.memory_penalty(1, 1)
    assert objective.scatter_penalty([], [False] * 2, worst).tolist() == [0.625, 0.625]
    with pytest.raises(ValueError, match="marks 2 rows"):
        objective.scatter_penalty([0.25], ok, worst=1)


# --- questions for the Solver ---


@pytest.mark.parametrize(
    ("m", "high", "kept"),
    [(10, 0.8, range(3, 9)), (10, 0.7, range(3, 8)), (9, 0.8, range(3, 8)), (5, 0.8, range(2, 5))],
)
def test_the_band_keeps_both_ends(m, high, kept):
    for dtype in (float, np.float32, lambda s: float(np.float32(s))):
        reasons = {c: objective.drop_reason("Find x.", "4", dtype(c / m), high=high) for c in range(m + 1)}
        assert [c for c, reason in reasons.items() if reason is None] == list(kept)
        assert reasons[0] == "low_consistency"
        assert reasons[m] == "high_consistency"


def test_the_band_is_not_cut_by_rounding():
    assert objective.drop_reason("Find x.", "4", float(np.float32(0.7)), low=0.7) is None
    assert objective.drop_reason("Find x.", "4", float(np.float32(0.8)), high=0.8) is None
    assert objective.drop_reason("Find x.", "4", 0.699, low=0.7) == "low_consistency"


@pytest.mark.parametrize(
    ("question", "majority", "reason"),
    [
        ("Find x.", "4", None),
        ("Find x.", None, "no_answer"),
        ("Find x.", " ", "no_answer"),
        ("Find x.", "None", "no_answer"),
        ("证明 2 + 2 = 4", "4", "proof"),
        ("A Box holds 3 balls.", "3", "box_in_question"),
        ("Find x.", r"\text{even}", "text_in_answer"),
        ("Find x.", r"\Text{even}", "text_in_answer"),
    ],
)
def test_reasons_to_drop(question, majority, reason):
    assert objective.drop_reason(question, majority, 0.5) == reason
    without = objective.drop_reason(question, majority, 0.5, r_zero_words=False)
    assert without == (reason if reason == "no_answer" else None)


def test_a_share_that_is_none_is_refused():
    with pytest.raises(ValueError, match="consistency=nan"):
        objective.drop_reason("Find x.", "4", math.nan)
    assert objective.drop_reason("Find x.", None, 0.0) == "no_answer"


@pytest.mark.parametrize("question", HOSTILE)
def test_hostile_questions_are_text(question):
    assert objective.drop_reason(question, "4", 0.5, r_zero_words=False) is None


# --- clusters and R-Zero's invalid outputs ---


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.5, 3.0])
def test_without_the_form_r_zero_is_never_better_than_the_worst_valid(alpha):
    """The worst valid output has s in {0, 1} and all of the batch in its cluster: -alpha. P_rep is at least 1 / B."""
    repetition = np.array([1e-4, 0.1, 0.5, 1.0])
    assert (objective.r_zero_invalid_reward(repetition, alpha) < -alpha - 1e-9 * alpha).all()


def test_without_the_form_r_zero_is_its_release_at_alpha_1():
    assert objective.r_zero_invalid_reward([0.25, 1.0]).tolist() == [-1.25, -2.0]


def test_cluster_sizes_follow_from_the_shares():
    assert objective.cluster_sizes([0.5, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 6]).tolist() == [3, 2, 1]
    assert objective.cluster_sizes([0.25, 0.25, 0.125], batch_size=8).tolist() == [2, 1]  # others have no vector
    assert objective.cluster_sizes([]).tolist() == []
