"""Conditions on a real number as sets: what commas between inequalities may mean, and magnitudes."""

import pytest

from common.answers import same_answer


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("x>1, x>2", "x>1"),
        (r"x>1 \text{ and } x>2", "x>1"),
        ("0<x<2, 1<x<3", "(0,3)"),
        (r"x>0 \text{ and } x<5 \text{ and } x>2", r"\mathbb{R}"),
        (r"(-\infty,2) \sqcup (1,\infty)", r"(-\infty,1)\cup(2,\infty)"),
        (r"(-\infty,a)", "|x|<a"),
        ("|x|>a", r"(a,\infty)"),
    ],
)
def test_commas_join_only_inequalities_that_exclude_each_other(answer, gold):
    assert not same_answer(answer, gold) and not same_answer(gold, answer)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("x<1, x>2", r"(-\infty,1)\cup(2,\infty)"),
        (r"(-\infty,1) \sqcup (2,\infty)", r"(-\infty,1)\cup(2,\infty)"),
        ("(-a,a)", "|x|<a"),
        ("-a<x<a", "|x|<a"),
    ],
)
def test_the_same_set_in_other_words(answer, gold):
    assert same_answer(answer, gold) and same_answer(gold, answer)
