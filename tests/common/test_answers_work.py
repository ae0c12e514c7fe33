"""Counted work of the answer checks, so that a later change cannot lose their speed unseen."""

import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from common import _normalise, _values, _worker, answers
from common._compare import Outcome
from common._fingerprint import fingerprint

ROWS = [
    json.loads(line) for line in (Path(__file__).parent / "answer_pairs.jsonl").read_text("utf-8").splitlines() if line
]
PAIRS = [(answer, row["gold"]) for row in ROWS for answer in row.get("same", []) + row.get("different", [])]
LOOK_AROUND = re.compile(r"\(\?<?[=!](?:\\.|\[(?:\\.|[^\]])*\]|[^()\\])*\)")
RULES = _normalise._LATEX_RULES + _normalise._PLAIN_RULES


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
    assert counts["points"] < 0.62 * len(PAIRS)  # at which two formulas get a value; 0.9 without fingerprints
    assert counts["inexact steps"] < 0.85 * len(PAIRS)  # of mpmath


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


@pytest.mark.parametrize("text", [r"\lfloor x\rfloor", "|x|", r"\frac{x}{x-x}", "ix", "0^x/0", r"\frac{0}{0}"])
def test_no_fingerprint_where_equal_arguments_are_not_enough(text):
    assert fingerprint(text, Fraction(1)) is None
