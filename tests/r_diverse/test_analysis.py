"""Diversity figures against naive references, hand-counted examples and what must not change them."""

import math

import numpy as np
import pytest

from r_diverse import analysis, objective


def at(*degrees: float) -> np.ndarray:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def unit(seed: int, rows: int, dim: int = 8) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim)) + 0.7
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- repetition ---


def test_repetition_of_angles_counted_by_hand():
    now, before = at(0, 10, 60, 120), at(125, 200)  # cos 25.8 degrees = 0.9
    assert analysis.intra_repetition(now) == 0.5
    assert analysis.intra_repetition(now, threshold=0.99) == 0.0
    assert analysis.cross_repetition(now, before) == 0.25
    assert analysis.cross_repetition(now, now) == 1.0
    assert analysis.intra_repetition(at(0, 25.8)) == 1.0
    assert analysis.intra_repetition(at(0, 25.9)) == analysis.cross_repetition(at(0), at(25.9)) == 0.0


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_repetition_equals_a_naive_count(monkeypatch, block):
    monkeypatch.setattr(analysis, "BLOCK", block)
    now, before = unit(0, 60), unit(1, 45)
    within = [any(a @ b >= 0.9 for j, b in enumerate(now) if j != i) for i, a in enumerate(now)]
    across = [any(a @ b >= 0.9 for b in before) for a in now]
    assert 0 < sum(within) < 60 and 0 < sum(across) < 60
    assert analysis.intra_repetition(now) == np.mean(within)
    assert analysis.cross_repetition(now, before) == np.mean(across)


def test_repetition_at_the_ends():
    assert math.isnan(analysis.intra_repetition(np.empty((0, 3))))
    assert analysis.intra_repetition(unit(0, 1)) == 0.0
    assert analysis.intra_repetition(np.repeat(unit(0, 1), 5, axis=0)) == 1.0
    assert analysis.cross_repetition(unit(0, 4), np.empty((0, 8))) == 0.0
    # float32 rows are not exactly of length 1, and a copy must count at threshold 1
    copy = unit(2, 3).astype(np.float32)
    assert analysis.cross_repetition(copy, unit(2, 3), threshold=1.0) == 1.0


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, math.nan])
def test_repetition_rejects_a_threshold_that_is_no_cosine(threshold):
    with pytest.raises(ValueError, match="threshold="):
        analysis.intra_repetition(unit(0, 2), threshold)
    with pytest.raises(ValueError, match="threshold="):
        analysis.cross_repetition(unit(0, 2), unit(1, 2), threshold)


@pytest.mark.parametrize("bad", [[[math.nan, 1.0]], [[0.0, 0.0]], [1.0, 0.0]])
def test_rows_without_a_direction_are_refused(bad):
    with pytest.raises(ValueError, match="embedding"):
        analysis.intra_repetition(bad)


def test_cluster_sizes_of_the_golden_angles():
    rows = at(0, 10, 20, 90, 100, 180)
    assert analysis.cluster_sizes(rows).tolist() == [3, 2, 1]
    assert analysis.cluster_sizes(rows[::-1]).tolist() == [3, 2, 1]
    assert analysis.cluster_sizes(at(0, 0, 90, 90, 180, 180)).tolist() == [2, 2, 2]
    assert analysis.cluster_sizes(np.empty((0, 2))).tolist() == []


def test_cluster_sizes_explain_the_penalty():
    rows = unit(3, 200)
    sizes = analysis.cluster_sizes(rows, 0.15)
    assert sizes.sum() == 200 and len(sizes) > 3
    assert (sizes**2).sum() / 200**2 == pytest.approx(objective.repetition_penalty(rows, 0.15).mean())


def test_batch_cosines_are_the_pairs():
    rows = unit(4, 5)
    expected = [rows[i] @ rows[j] for i in range(5) for j in range(i + 1, 5)]
    np.testing.assert_allclose(analysis.batch_cosines(rows), expected)
    assert len(analysis.batch_cosines(rows[:1])) == 0


# --- duplicates ---


def test_nearest_is_sorted_and_takes_the_first_of_equals():
    index, cosine = analysis.nearest(at(0), at(90, 30, -30, 30, 10), k=3)
    assert index.tolist() == [[4, 1, 2]]
    np.testing.assert_allclose(cosine, [np.cos(np.radians([10, 30, 30]))])
    assert analysis.nearest(at(0, 5), at(90), k=3)[0].tolist() == [[0], [0]]
    assert analysis.nearest(at(0, 5), np.empty((0, 3)))[0].shape == (2, 0)  # of no rows the dimensions say nothing
    with pytest.raises(ValueError, match="k=0"):
        analysis.nearest(at(0), at(1), k=0)
    with pytest.raises(ValueError, match="dimensions"):
        analysis.nearest(at(0), unit(0, 2))


def test_only_the_nearest_k_are_judged():
    asked = []

    def judge(a, b):
        asked.append((a, b))
        return b == "same"

    past = ["near", "nearer", "far", "same"]
    ratio = analysis.duplicate_ratio(["new"], at(0), past, at(20, 10, 80, 170), is_duplicate=judge)  # the paper's 3
    assert ratio == 0.0
    assert asked == [("new", "nearer"), ("new", "near"), ("new", "far")]
    assert analysis.duplicate_ratio(["new"], at(0), past, at(20, 10, 80, 170), k=4, is_duplicate=judge) == 1.0


def test_duplicate_ratio_with_the_local_judge():
    past = ["What is 3 + 4?", "A circle has radius 5. Find its area."]
    new = ["What is 12 + 90?", "How many primes lie below 50?"]
    assert analysis.duplicate_ratio(new, at(0, 90), past, at(0, 90)) == 0.5
    assert analysis.duplicate_ratio(new, at(0, 90), [], np.empty((0, 2))) == 0.0
    assert math.isnan(analysis.duplicate_ratio([], np.empty((0, 2)), past, at(0, 90)))
    with pytest.raises(ValueError, match="one row a question"):
        analysis.duplicate_ratio(new, at(0), past, at(0, 90))
    with pytest.raises(ValueError, match="one row a question"):
        analysis.duplicate_ratio(new, at(0, 90), past[:1], at(0, 90))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("What is 3 + 4?", "what is 1,024 + 7.5 ?", True),
        ("What is 3 + 4?", "What is 3 - 4?", False),
        ("Find x if 2x + 3 = 7.", "Find x if 9x + 1 = 4.", True),
        ("A train goes 60 km in 2 hours. How fast is it?", "A car goes 80 km in 4 hours. How fast is it?", True),
        ("A train goes 60 km in 2 hours. How fast is it?", "A train is 60 m long. How long is half of it?", False),
        ("one two three four five six seven eight nine", "one two three four x six seven eight nine", True),  # 0.8
        ("one two three four five six seven eight", "one two three four x six seven eight", False),
        ("", "", True),
        ("", "What?", False),
        ("?!", "?!", True),
        ("证明 1 + 1 = 2", "证明 3 + 5 = 8", True),
        # In scripts without spaces a clause is not one word
        (
            "5个男生和4个女生排成一排且女生不相邻的排法有多少种?",
            "6个男生和3个女生站成一排且女生不相邻的排法共有多少种?",
            True,
        ),
        ("5個のりんごを3人に分ける方法は何通りありますか?", "7個のみかんを4人に分ける方法は何通りありますか?", True),
        ("5个男生和4个女生排成一排的排法有多少种?", "求满足方程 x^2 = 4 的所有实数 x 的和。", False),
    ],
)
def test_same_wording(first, second, expected):
    assert analysis.same_wording(first, second) is expected
    assert analysis.same_wording(second, first) is expected


def test_same_wording_of_long_texts_is_fast():
    assert analysis.same_wording("a b " * 50_000, "a b " * 50_000)  # a quadratic rule would not end
    assert not analysis.same_wording("(" * 100_000, ")" * 100_000)


# --- skill map ---


def test_skill_map_keeps_distances_of_a_plane():
    plane = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0][:2]
    rows = at(5, 40, 100, 250, 300) @ plane
    points = analysis.skill_map(rows)
    between = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)  # noqa: E731
    np.testing.assert_allclose(between(points), between(rows), atol=1e-12)
    assert points.var(axis=0)[0] >= points.var(axis=0)[1]
    np.testing.assert_array_equal(points, analysis.skill_map(rows))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [np.empty((0, 4)), at(30), np.repeat(at(30), 4, axis=0), np.ones((3, 1))])
def test_skill_map_of_too_few_directions_is_the_origin(rows):
    assert analysis.skill_map(rows).tolist() == [[0.0, 0.0]] * len(rows)


# --- the table ---


def test_diversity_table():
    questions = ["What is 1 + 2?", "What is 3 + 4?", "Name a prime.", "What is 5 + 6?", "Draw a square."]
    rows, iterations = at(0, 1, 90, 2, 180), [1, 1, 1, 2, 2]
    first, second = analysis.diversity(questions, rows, iterations)
    assert (first["iteration"], first["questions"], second["questions"]) == (1, 3, 2)
    assert math.isnan(first["cross_repetition"]) and math.isnan(first["duplicate_ratio"])
    assert first["intra_repetition"] == pytest.approx(2 / 3)
    assert (first["clusters"], first["largest_cluster"]) == (2, pytest.approx(2 / 3))
    assert first["effective_clusters"] == pytest.approx(3 / 2 ** (2 / 3))  # exp of the entropy of 2/3 and 1/3
    assert first["median_cosine"] == pytest.approx(math.cos(math.radians(89)))  # of 1, 89 and 90 degrees
    assert first["mean_repetition_penalty"] == pytest.approx(objective.repetition_penalty(rows[:3]).mean())
    assert second["cross_repetition"] == second["duplicate_ratio"] == 0.5
    assert second["intra_repetition"] == 0.0
    assert second["median_cosine"] == pytest.approx(math.cos(math.radians(178)))


@pytest.mark.filterwarnings("error")
def test_an_iteration_of_one_question_has_no_cosine():
    (row,) = analysis.diversity(["What is 1 + 2?"], at(0), [1])
    assert (row["questions"], row["clusters"], row["intra_repetition"]) == (1, 1, 0.0)
    assert math.isnan(row["median_cosine"])


def test_clusters_are_cut_where_the_paper_cuts_them():
    """At cosine 0.5, which is 60 degrees."""
    for degrees, clusters in ((59, 1), (61, 2)):
        assert len(analysis.cluster_sizes(at(0, degrees))) == clusters
        (row,) = analysis.diversity(["a", "b"], at(0, degrees), [1, 1])
        assert row["clusters"] == clusters


def test_diversity_does_not_depend_on_the_order_of_rows():
    rows, iterations = unit(5, 40), np.repeat([1, 2, 4], [10, 20, 10])
    questions = [f"question {i % 7} of kind {'abc'[i % 3]}" for i in range(40)]
    order = np.random.default_rng(1).permutation(40)
    shuffled = analysis.diversity([questions[i] for i in order], rows[order], iterations[order])
    for one, other in zip(analysis.diversity(questions, rows, iterations), shuffled, strict=True):
        assert one == pytest.approx(other, nan_ok=True)


def test_diversity_needs_one_row_a_question():
    with pytest.raises(ValueError, match="pass one each"):
        analysis.diversity(["a"], at(0, 1), [1, 1])


def test_the_table_compares_with_all_iterations_before():
    rows, texts = np.eye(4)[[0, 1, 2, 3, 0, 1]], ["one", "two", "three", "four", "one", "two"]
    table = analysis.diversity(texts, rows, [1, 1, 2, 2, 3, 3])
    assert [line["cross_repetition"] for line in table[1:]] == [0.0, 1.0]
    assert [line["duplicate_ratio"] for line in table[1:]] == [0.0, 1.0]
    table = analysis.diversity(texts, rows, [1, 1, 2, 2, 3, 3], is_duplicate=lambda first, second: True)
    assert [line["duplicate_ratio"] for line in table[1:]] == [1.0, 1.0]


def test_the_thresholds_of_the_table_are_those_given():
    rows = np.array([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    (first, second) = analysis.diversity(
        ["a", "b", "c"], rows, [1, 1, 2], repetition_threshold=0.75, distance_threshold=0.1
    )
    assert (first["intra_repetition"], first["clusters"], second["cross_repetition"]) == (1.0, 2, 1.0)
    (first, second) = analysis.diversity(["a", "b", "c"], rows, [1, 1, 2])
    assert (first["intra_repetition"], first["clusters"], second["cross_repetition"]) == (0.0, 1, 0.0)
