"""Counted work of the answer checks, so that a later change cannot lose their speed unseen."""

import json
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from common import _extract, _normalise, _values, _worker, answers
from common._compare import Outcome
from common._fingerprint import fingerprint

ROWS = [
    json.loads(line) for line in (Path(__file__).parent / "answer_pairs.jsonl").read_text("utf-8").splitlines() if line
]
PAIRS = [(answer, row["gold"]) for row in ROWS for answer in row.get("same", []) + row.get("different", [])]
LOOK_AROUND = re.compile(r"\(\?<?[=!](?:\\.|\[(?:\\.|[^\]])*\]|[^()\\])*\)")
RULES = _normalise._LATEX_RULES.rules + _normalise._PLAIN_RULES.rules


@pytest.fixture
def counts(monkeypatch):
    """Calls of what costs time; answers that need a worker get none."""
    counted = Counter()

    def counting(name, function):
        def call(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return call

    for name, owner, attribute in (
        ("points", _values._Pair, "values"),
        ("inexact steps", _values._Point, "_inexactly"),
    ):
        monkeypatch.setattr(owner, attribute, counting(name, getattr(owner, attribute)))
    monkeypatch.setattr(_worker, "ask", counting("requests", lambda *_, **__: Outcome(False, "", "", "")))
    monkeypatch.setattr(answers, "_memo", {})
    return counted


def test_work_on_the_pairs(counts):
    for answer, gold in PAIRS:
        answers.same_answer(answer, gold, timeout=60)
    assert len(PAIRS) > 4000
    assert counts["requests"] < 0.01 * len(PAIRS)  # pairs that computer algebra decides, in another process
    assert counts["points"] < 0.52 * len(PAIRS)  # at which two formulas get a value; 0.9 without fingerprints
    assert counts["inexact steps"] < 0.7 * len(PAIRS)  # of mpmath


@pytest.mark.parametrize(
    ("p", "g", "points"),
    [
        ("x(x+1)", "x^2+x", 0), ("x+1", "x+2", 0), (r"2\pi", r"\frac{6\pi^2}{3\pi}", 0), (r"2\pi", "6.28", 0),  # by
        (r"2x+4y=3", r"x+2y=\frac{3}{2}", 1), (r"2x+4y=3", "x+3y=1", 1), (r"x\sin y", r"\sin(y)x", 1),  # fingerprints
        (r"\frac{x}{y-y}", "x", 10), (r"\frac{1}{3}+\frac{1}{6}", r"\frac{1}{4}+\frac{1}{4}", 1),  # without them
        (r"e^x\cdot e^y", "e^{x+y}", 3), (r"\sec^2 x", r"\tan^2 x+1", 3), (r"2^x\cdot 3^x", "6^x", 3),  # smooth
        (r"\sqrt{x^2}", "|x|", 10), (r"x^y x^z", "x^{y+z}", 10),  # may differ on other branches
        (r"\sqrt{8}", r"2\sqrt{2}", 1),
    ],
)  # fmt: skip
def test_points_at_which_two_formulas_get_a_value(counts, p, g, points):
    answers.same_answer(p, g)
    assert counts["points"] == points


def test_a_long_response_is_searched_around_the_words_of_markers_only(monkeypatch):
    class Searched:
        """A pattern that is tried at single places, never on a whole text."""

        def __init__(self, pattern):
            self.pattern, self.tried = pattern, 0

        def match(self, text, place):
            self.tried += 1
            return self.pattern.match(text, place)

    patterns = {name: Searched(getattr(_extract, name)) for name in ("_MARKER", "_REMARK")}
    for name, pattern in patterns.items():
        monkeypatch.setattr(_extract, name, pattern)
    reasoning = r"Let $x = \frac{a}{b}$ be the number sought, a choice with no answer yet; so $\{x\}$ is it. " * 300
    assert _extract._marks(reasoning) == []
    assert patterns["_MARKER"].tried < 40 * 600  # two words in each sentence, each with the word before it
    assert _extract.boxes_of(reasoning + r"So it is $\boxed{7}$.")[0][2] == "7"


@pytest.mark.parametrize("unit", ["#", "#### ", "answer", "_answer", "答", "答案", "汉答"])
def test_no_place_is_tried_twice(unit):
    """Words of markers side by side, as in a response that repeats itself: not the square of their number."""
    tried = []

    class Searched:
        def match(self, text, place):
            tried.append(place)

    assert list(_extract._matches(Searched(), unit * 300, _extract._MARK_WORDS)) == []
    assert tried == sorted(set(tried)) and len(tried) >= 297


def test_only_what_follows_the_first_box_is_split_into_tokens(monkeypatch):
    text, seen = r"$\frac{1}{2} + \sqrt{x}$ and so on. " * 500 + r"\\boxed{7} $\boxed{\frac{3}{4}}$", []

    class Tokens:
        def finditer(self, text, start):
            seen.append(len(text) - start)
            return pattern.finditer(text, start)

    pattern = _extract._BOX_TOKEN
    monkeypatch.setattr(_extract, "_BOX_TOKEN", Tokens())
    assert [content for _, _, content in _extract.boxes_of(text)] == [r"\frac{3}{4}"]
    assert seen == [len(r"\\boxed{7} $\boxed{\frac{3}{4}}$")]


def rules_that_run(text: str) -> int:
    return sum(any(word in text for word in rule.needs) for rule in RULES)


def test_few_rules_run_on_a_text():
    texts = {text for pair in PAIRS for text in pair if len(text) < 200}
    assert sum(map(rules_that_run, texts)) < 8 * len(texts)


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_a_rule_does_nothing_where_what_it_needs_is_missing(rule):
    hypothesis = pytest.importorskip("hypothesis")
    pattern = LOOK_AROUND.sub("", rule.pattern.pattern).replace("*+", "*")  # matches this and more

    @hypothesis.settings(max_examples=30, derandomize=True, database=None, deadline=None)
    @hypothesis.given(hypothesis.strategies.from_regex(pattern))
    def check(text):
        assert any(word in text for word in rule.needs) or rule.pattern.sub(rule.to, text) == text

    check()


@pytest.mark.parametrize(
    ("p", "g"),
    [
        (r"2x(x+1)+\sin 2x", r"\sin(2x)+2x^2+2x"), (r"\frac{1}{x}-\frac{1}{x+1}", r"\frac{1}{x(x+1)}"),
        (r"(x+1)^{5/3}", r"(x+1)\sqrt[3]{x+1}^2"), (r"x^{-1}\cdot 0.5", r"\frac{1}{2x}"), (r"e^{x+x}", "e^{2x}"),
        (r"2^n\cdot 2^n", "(2^n)^2"), (r"\sqrt{2}a", r"a\sqrt 2"),
    ],
)  # fmt: skip
def test_a_fingerprint_shows_the_same_formula(p, g):
    assert fingerprint(p, Fraction(1)) == fingerprint(g, Fraction(1)) != fingerprint(p, Fraction(2))
    assert fingerprint(f"2({p})", Fraction(1)) == fingerprint(g, Fraction(2))


@pytest.mark.parametrize(
    ("p", "g"),
    [
        (r"\sqrt{x^2}", "x"), (r"x", "y"), (r"\sin x", r"\cos x"), (r"x^{1/2}", "x^{1/3}"), (r"\ln x^2", r"2\ln x"),
        ("x^{2000}", "x^{2001}"), ("x_1", "x_2"), ("(-1)^n", "1"), (r"\sin 2x", r"\sin 3x"), ("x^2", "x^3"),
    ],
)  # fmt: skip
def test_a_fingerprint_tells_formulas_apart(p, g):
    assert fingerprint(p, Fraction(1)) != fingerprint(g, Fraction(1))


def test_a_fingerprint_is_of_its_process_so_that_no_text_is_made_for_it():
    program = (
        "from fractions import Fraction; from common._fingerprint import fingerprint as f; print(f('x', Fraction(1)))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(other) != fingerprint("x", Fraction(1)) == fingerprint("x+0", Fraction(1))


@pytest.mark.parametrize(
    ("p", "g"),
    [
        ("x+(2^{61}-1)y=0", "x+2(2^{61}-1)y=0"), ("(2^{61}-1)x+y<3", "3(2^{61}-1)x+y<3"),
        (r"x+\sin(94\pi x)", "x"),  # 0 at every multiple of 1/94
        (rf"x+{2**61 - 1}(x-{_values.scattered_points()[0][0]})", "x"),  # equal at the first point
    ],
)  # fmt: skip
def test_what_vanishes_at_a_point_or_modulo_a_well_known_prime_is_seen(p, g):
    assert not answers.same_answer(p, g)


@pytest.mark.parametrize("nowhere", [r"x+\ln 0-\ln 0", r"x+\frac{0}{0}", r"x\cdot 0^0"])
def test_a_formula_without_a_value_equals_none_whatever_its_fingerprint(nowhere):
    assert not answers.same_answer(nowhere, "x")


@pytest.mark.parametrize("text", [r"\lfloor x\rfloor", "|x|", r"\frac{x}{x-x}", "ix", "0^x/0", r"\frac{0}{0}"])
def test_no_fingerprint_where_equal_arguments_are_not_enough(text):
    assert fingerprint(text, Fraction(1)) is None
