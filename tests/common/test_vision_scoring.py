"""The official rules of the vision benchmarks, and their structured metrics."""

import math
import random

import pytest
from scipy import stats

from common.answers import Verdict
from common.evaluation.vision import VISION
from common.evaluation.vision_scoring import (
    StructuredMetric,
    _influence,
    hallusion_units,
    mathvista_value,
    mmmu_letter,
    mmmu_open,
    mmstar_letter,
    ocrbench_contains,
    option_letter,
    wemath_letter,
    wemath_points,
    wemath_units,
    yes_or_no,
)

# --- the rules on the examples that the benchmarks' authors publish, and on what they must not read ---


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<Thought process>: <<Answer it: Area>> <Answer>: <<B>>", "B"),
        ("<Answer>: <<C: 5 cm>>.", "C"),
        ("<Answer>: <<A>> ... <Answer>: <<B>>", "A"),  # the first commitment
        ("Answer: D", "D"),
        ("Answer: Because", None),
        ("Answer: A triangle", None),
        ("B", None),  # no template; `wemath_row` reads it
    ],
)
def test_wemath_letter(text, letter):
    assert wemath_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("(b) dog", "B"),
        ("Option D.", "D"),
        ("The answer is A", "A"),
        ("A dog", None),
        ("Because", None),
        ("", None),
    ],
)
def test_mmstar_letter(text, letter):
    assert mmstar_letter(text) == letter


VOLTS = ["75 + 13.3 cos(250t - 57.7°)V", "75 + 23.3 cos(250t - 57.7°)V", "45 + 3.3 cos(250t - 57.7°)V", "95 V"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),  # validation_Electronics_28 in the authors' evaluation guide
        ("(A) or rather (C).", "C"),
        ("It is B , not A , so B .", "B"),
        (f"I get a voltage of {VOLTS[2].upper()} here", "C"),
        ("it may be 95 v", None),  # five words
        ("it may well be 95 v", "D"),
        ("none of them", None),  # there a random letter
        ("", None),
    ],
)
def test_mmmu_letter(text, letter):
    assert mmmu_letter(text, VOLTS) == letter


@pytest.mark.parametrize(
    ("text", "golds", "right"),
    [
        ("36 watts", ["30"], False),  # validation_Electronics_29 in the authors' evaluation guide
        ("30 watts", ["30"], True),
        ("The result is 1,234 m", ["1234"], True),
        ("Thus x = 1.5e3", ["1500"], True),
        ("It could be the mitral valve", ["Mitral valve", "bicuspid valve"], True),
        ("so the answer is Cb", ["b"], False),  # a single character needs a space beside it
        ("30 at first\nso 31", ["30"], False),  # a key phrase there hides the other line
        ("so 30 = x", ["30"], False),  # in the last line "=" is one, and the shortest tail counts
        ("x = 30 is 7", ["30"], False),
        ("so 30 = x\nindeed", ["30"], True),
        ("so 7 is it\n30 all over", ["30"], False),
    ],
)
def test_mmmu_open(text, golds, right):
    assert mmmu_open(text, golds) is right


MATHVISTA = {
    "multi_choice": {
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": ["hong kong", "osaka", "tokyo"],
    },
    "integer": {"question_type": "free_form", "answer_type": "integer"},
    "float": {"question_type": "free_form", "answer_type": "float", "precision": 2.0},
    "list": {"question_type": "free_form", "answer_type": "list"},
}


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("multi_choice", "(C) tokyo", "tokyo"),  # the authors' demonstration: "the answer is D (tokyo)"
        ("multi_choice", "Tokyo.", "tokyo"),
        ("multi_choice", "(D)", None),
        ("multi_choice", "kyoto", None),  # there the nearest option, tokyo
        ("integer", "13.0", 13),
        ("integer", "$13", 13),
        ("integer", "no number", None),
        ("float", "1.456", 1.46),
        ("float", "1e400", math.inf),  # a response is not to end the scoring of all others
        ("list", "[1, 2, 3]", "[1,2,3]"),
        ("list", "1, 2, 3", None),
    ],
)
def test_mathvista_value(kind, text, value):
    assert mathvista_value(text, MATHVISTA[kind]) == value


# The demonstrations of MathVerse's scoring prompt; its fifth, an option given by its content, is for a judge only.
@pytest.mark.parametrize(
    ("kind", "gold", "answer", "right"),
    [
        ("free-form", "(-2,1]", "\\((-2, 1)\\)", False),
        ("multi-choice", "C", "B:2\u221a{3}", False),
        ("free-form", "domain: [-4, 0) and range: (-3, 1]", "Range: \\((-4, 1]\\)", False),
        ("multi-choice", "C", "null", False),
        ("free-form", "0.5 m", "50cm", True),
        ("free-form", "14", "14", True),
        ("multi-choice", "C", "C", True),
        ("multi-choice", "C", "C because (B) is far too long", True),
        ("free-form", "the red and blue lines", "The red and blue lines.", True),  # five words
        ("free-form", "all the red and blue lines", "All the red and blue lines.", False),
        ("free-form", "14", "I think that it is \\boxed{14}", True),
    ],
)
def test_mathverse(kind, gold, answer, right):
    score = VISION["mathverse"].score
    assert (score(answer, {"question_type": kind, "answer": gold}) is Verdict.CORRECT) is right


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Yes", "yes"),
        ("No, yes would be wrong.", "no"),
        ("The lines are parallel: yes.", "yes"),
        ("Is it yes or no?", None),
        ("Nobody knows", None),
    ],
)
def test_yes_or_no(text, word):
    assert yes_or_no(text) == word


@pytest.mark.parametrize(
    ("text", "answers", "formula", "right"),
    [
        ('the word is "chain".', ["CHAIN"], False, True),
        ("PEND RAGON", ["PENDRAGON"], False, False),
        ("x=\\frac{17}{5}", ["x = \\frac { 1 7 } { 5 }\n"], True, True),
        ("X=\\frac{17}{5}", ["x = \\frac { 1 7 } { 5 }\n"], True, False),
        ("26.58 dollars", ["27", "26.58"], False, True),
    ],
)
def test_ocrbench_contains(text, answers, formula, right):
    assert ocrbench_contains(text, answers, formula) is right


@pytest.mark.parametrize(
    ("name", "row", "response", "verdict"),
    [
        ("ocrbench", {"dataset": "HME100k", "answer": ["x ="]}, "x=5", Verdict.CORRECT),
        ("ocrbench", {"dataset": "IIIT5K", "answer": ["x ="]}, "x=5", Verdict.WRONG),
        ("mmmu", {"question_type": "multiple-choice", "options": "['blue', 'red']", "answer": "B"}, "Red.", "correct"),
        ("mmmu", {"question_type": "open", "answer": "30"}, "It is 30", "correct"),
        ("mmstar", {"answer": "B"}, "Answer: B", "correct"),
        ("mmstar", {"answer": "B"}, "who knows", "no_answer"),
        ("mmstar", {"answer": "B"}, "\\boxed{who knows}", "unparseable"),
    ],
)
def test_a_row_is_read_by_its_own_rule_and_then_by_ours(name, row, response, verdict):
    assert VISION[name].score(response, row) is Verdict(verdict)


def test_option_letter():
    assert [option_letter(text, ["cat", "Dog", "dog"]) for text in ("(B)", "CAT.", "dog", "D", "")] == [
        "B",
        "A",
        None,
        None,
        None,
    ]


def test_the_first_commitment_counts():
    row = {"question_type": "multi-choice", "answer": "A"}
    assert VISION["mathverse"].score("\\boxed{A} no, \\boxed{B}", row) is Verdict.CORRECT
    assert VISION["mmstar"].score("The answer is B. Wait, the answer is A.", row) is Verdict.WRONG


# --- the structured metrics ---


def wemath_records(problems: list[tuple[list[bool], bool]], sample: int = 0) -> list[dict]:
    records = []
    for i, (steps, whole) in enumerate(problems):
        kind = f"{len(steps)}steps"
        keys = [*(f"{kind}_{n + 1}" for n in range(len(steps))), f"{kind}_multi"]
        for key, right in zip(keys, [*steps, whole], strict=True):
            records.append({"id": f"{i}{key}", "ID": str(i), "key": key, "sample": sample, "score": float(right)})
    return records


def test_wemath_gives_the_published_score_of_gpt_4o():
    """Paper (arXiv 2407.01284), GPT-4o: IK 164, IG 80, strict CM 185 and RM 96, loose CM 278 and RM 3 of 525."""
    two, three = [True, True], [True, True, True]
    problems = [([True, False], False)] * 164 + [(two, False)] * 60 + [(three, False)] * 20
    problems += (
        [(two, True)] * 40 + [(three, True)] * 145 + [([False, True], True)] * 93 + [([False, False], True)] * 3
    )
    assert len(problems) == 525
    metric = StructuredMetric(wemath_units)(wemath_records(problems))
    assert (round(metric["strict"], 4), round(metric["loose"], 4)) == (0.4286, 0.6057)
    assert metric["score"] == pytest.approx((metric["strict"] + metric["loose"]) / 2)
    assert metric["interval"][0] < metric["score"] < metric["interval"][1]


def test_wemath_points():
    assert wemath_points([True, True, False], True) == (0.0, 1.0)
    assert wemath_points([True, True], False) == (0.5, 0.5)
    assert wemath_points([False, True], False) == (0.0, 0.0)


def test_a_problem_that_is_cut_is_left_out():
    records = wemath_records([([True, True], True), ([True, True], True)])
    metric = StructuredMetric(wemath_units)
    assert metric(records[:-1])["score"] == metric(records[:3])["score"] == 1.0
    assert metric(records[:2]) == {"score": None, "interval": None, "strict": None, "loose": None}


def hallusion_records(seed: int, sets: int = 12, samples: int = 4) -> list[dict]:
    draw = random.Random(seed)
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    records = []
    for group in range(sets):
        for figure in range(1 + group % 3):
            for question in range(2):
                values = ("VD", "map", str(group), str(figure), str(question))
                for sample in range(samples):
                    score = float(draw.random() < 0.3 + 0.05 * group)
                    records.append(dict(zip(names, values, strict=True)) | {"sample": sample, "score": score})
    return records


def test_hallusionbench_components_are_averaged_over_the_samples_before_the_formula():
    records = hallusion_records(0)
    groups = {
        "aAcc": ("set_id", "figure_id", "question_id"),
        "fAcc": ("set_id", "figure_id"),
        "qAcc": ("set_id", "question_id"),
    }
    runs = {name: [] for name in groups}
    for sample in range(4):  # the official scores of each run, by another way
        run = [record for record in records if record["sample"] == sample]
        for name, columns in groups.items():
            units = {tuple(r[c] for c in columns) for r in run}
            wrong = {tuple(r[c] for c in columns) for r in run if not r["score"]}
            runs[name].append(1 - len(wrong) / len(units))
    metric = StructuredMetric(hallusion_units)(records)
    for name, values in runs.items():
        assert metric[name] == pytest.approx(sum(values) / 4)
    assert metric["score"] == pytest.approx(sum(map(sum, runs.values())) / 12)


def test_the_clusters_of_hallusionbench_are_its_sets():
    clusters = {name: len(values) for name, values in hallusion_units(hallusion_records(0)).items()}
    sets = {(r["category"], r["subcategory"], r["set_id"]) for r in hallusion_records(0)}
    assert len(sets) > len({unit[:2] for unit in sets}) and set(clusters.values()) == {len(sets)}


def test_with_one_value_a_cluster_intervals_and_differences_are_students():
    draw = random.Random(1)
    a, b = ([{"id": i, "score": draw.choice([0.0, 0.5, 1.0])} for i in range(30)] for _ in range(2))
    metric = StructuredMetric(lambda records: {"x": {str(r["id"]): [r["score"]] for r in records}})
    scores_a, scores_b = [r["score"] for r in a], [r["score"] for r in b]
    assert metric(a)["interval"] == pytest.approx(
        stats.t.interval(0.95, 29, loc=metric(a)["score"], scale=stats.sem(scores_a))
    )
    test = stats.ttest_rel(scores_a, scores_b)
    low, high = test.confidence_interval()
    assert metric.difference(a, b) == pytest.approx((metric(a)["score"] - metric(b)["score"], low, high, test.pvalue))
    with pytest.raises(ValueError, match="different questions"):
        metric.difference(a, b[:-1])


def test_a_clusters_pull_is_the_slope_of_the_headline_over_its_weight():
    """With several values a cluster and two components; the slopes by differences of the weighted headline."""
    units = {
        "a": {"x": [1.0, 0.0, 0.5], "y": [1.0], "z": [0.0, 0.0]},
        "b": {"x": [0.0, 1.0], "y": [1.0, 1.0, 0.5]},  # and z has none
    }

    def headline_of(weights: dict[str, float]) -> float:
        rates = []
        for clusters in units.values():
            total = sum(weights[name] * sum(values) for name, values in clusters.items())
            rates.append(total / sum(weights[name] * len(values) for name, values in clusters.items()))
        return sum(rates) / len(rates)

    ones, step = dict.fromkeys("xyz", 1.0), 1e-6
    pulls = {n: (headline_of(ones | {n: 1 + step}) - headline_of(ones | {n: 1 - step})) / (2 * step) for n in "xyz"}
    assert _influence(units)[2] == pytest.approx(pulls)  # the interval below is cut at both ends
    spread = (3 / 2 * sum(pull**2 for pull in pulls.values())) ** 0.5 * stats.t.ppf(0.975, 2)
    found = StructuredMetric(lambda records: units)([])
    assert found["score"] == pytest.approx(headline_of(ones))
    expected = [max(0.0, found["score"] - spread), min(1.0, found["score"] + spread)]
    assert found["interval"] == pytest.approx(expected, rel=1e-6)


def test_intervals_are_never_empty():
    metric = StructuredMetric(wemath_units)
    right, wrong = ([([value, value], value)] * 6 for value in (True, False))
    low, high = metric(wemath_records(right))["interval"]
    assert low < 0.9 and high == 1.0
    assert metric.difference(wemath_records(right), wemath_records(right)) == (0.0, 0.0, 0.0, 1.0)
    assert metric.difference(wemath_records(right), wemath_records(wrong))[0] == 1.0
