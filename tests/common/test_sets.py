"""Conditions on a real number as sets: what commas between inequalities may mean, and magnitudes."""

import pytest

from common import _sets, answers
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
        (r"\{y|x \neq 1\}", r"\mathbb{R}\setminus\{1\}"),
        (r"\mathbb{R}\setminus\{x=1, y=2\}", r"\mathbb{R}\setminus\{1,2\}"),
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
        (r"x>a \text{ or } x<-a", "|x|>a"),
        (r"\{x|x<a \text{ or } x>b\}", r"(-\infty,a)\cup(b,\infty)"),
        (r"x \neq \frac{\pi}{2}+k\pi", r"x \ne k\pi+\frac{\pi}{2}"),
        (r"x>1 \cap x<4", "(1,4)"),
        (r"x \neq 1 \cap x>0", r"(0,1)\cup(1,\infty)"),
        ("x>=a and x<=b", "[a,b]"),
        ("x>=a and x<=b", r"x\leq b, x\geq a"),
        (r"x>2m, x<3n", "x<3n and x>2m"),
        ("x<a and x>-a", "(-a,a)"),
        ("x>a, x<-a", r"x<-a \text{ or } x>a"),
        ("x>a, x<-a", r"(-\infty,-a)\cup(a,\infty)"),
        ("x<4 and x>-1", "(-1,4)"),
        (r"n\geq 1, n\leq k", r"1\leq n\leq k"),
        (r"all reals except $x=\pm 1$", r"|x|\ne1"),
        (r"\{x \mid x>a, x \leq b\}", "(a,b]"),
        (r"|x|\ne1", r"x\ne\pm1"),
        (r"|x|\ne\sqrt{2}", r"\mathbb{R}\setminus\{\sqrt{2},-\sqrt{2}\}"),
        ("all real numbers except 2", r"x\ne2"),
        (r"\text{All reals except } x=\frac{1}{2} \text{ and }3", r"x\ne\frac{1}{2}, 3"),
        (r"\text{all real numbers except 2}", r"\mathbb{R}\setminus\{2\}"),
        (r"all real numbers except $x = 2$", "all real numbers except x=2"),
        ("All real numbers except $x=1$ and $x=2$", r"x\ne1,2"),
        (r"the reals except $\{1,2\}$", r"\mathbb{R}\setminus\{x=1, x=2\}"),
        (r"\{y|y>1\}", r"\{x|x>1\}"),
    ],
)
def test_the_same_set_in_other_words(answer, gold):
    assert same_answer(answer, gold) and same_answer(gold, answer)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"x<a \text{ or } x\ge b", r"(-\infty,a)\cup(b,\infty)"),
        (r"x>a \text{ or } x<b", r"(-\infty,a)\cup(b,\infty)"),
        (r"x\ne a", r"\mathbb{R}\setminus\{b\}"),
        (r"\{(0,1),(2,3)\}", r"(0,1)\cup(2,3)"),
        (r"x<2a", r"x<2x"),
        (r"x\in(1,4)", "1<y<4"),
        (r"\{y|x>1\}", r"(1,\infty)"),
        (r"x>a, x\le b", "[a,b]"),
        ("x>=a and x<=b", "x>=a or x<=b"),
        ("x>a, x<-a", "(a,-a)"),
        (r"x<a, x>b", "(b,a)"),
        (r"|x|\ne1", r"x\ne1"),
        ("all real numbers except 3", r"x\ne2"),
        ("all real numbers except 2", "2"),
    ],
)
def test_names_as_endpoints_and_pairs(answer, gold, monkeypatch):
    monkeypatch.setattr(answers._worker, "ask", None)  # without computer algebra
    assert not answers.same_answer(answer, gold) and not answers.same_answer(gold, answer)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\mathbb{N}", r"(0,\infty)"),
        (r"\mathbb{Z}\setminus\{2\}", r"(-\infty,2)\cup(2,\infty)"),
        (r"\mathbb{R}\setminus\mathbb{Q}", r"\mathbb{R}"),
        (r"\mathbb{Q}", r"\{1,2\}\cup\{3\}"),
        (r"\{\emptyset\}", r"\emptyset"),
        ("2x", r"\mathbb{R}"),
        (r"\sqrt{2}", r"(-\infty,1)\cup(2,\infty)"),
    ],
)
def test_no_computer_algebra_for_what_is_plainly_another_set_or_none(answer, gold, monkeypatch):
    monkeypatch.setattr(answers._worker, "ask", None)
    assert not answers.same_answer(answer, gold) and not answers.same_answer(gold, answer)


def test_sets_that_may_be_equal_to_scattered_ones_are_left_to_computer_algebra():
    more = r"\{1,2,3,\ldots\}", r"\{n \in \mathbb{Z} : n>0\}"
    for other in (
        r"\mathbb{R}\cup\mathbb{Z}",
        r"\mathbb{Z}\cup\{1\}",
        r"A\cup B",
        "A",
        r"\mathbb{R}\setminus A",
        *more,
    ):
        assert _sets.same_set(other, r"\mathbb{Z}", float("inf")) is None
        assert _sets.same_set(other, r"(0,1)\cup(2,3)", float("inf")) is None


def test_all_numbers_but_those_of_an_interval_are_left_unread():
    for gold in ("all real numbers except $[1,2]$", r"\text{all real numbers except (1,2)}"):
        assert answers.judge(r"\boxed{(-\infty,1)\cup(2,\infty)}", gold) is answers.Verdict.GOLD_UNPARSEABLE


def test_sets_of_many_named_endpoints_are_not_tried():
    text = r"\cup ".join(f"({n}a,{n + 1}a)" for n in range(0, 20, 2))
    assert _sets.same_set(text, text, float("inf")) is None
