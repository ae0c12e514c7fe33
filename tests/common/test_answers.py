"""`common.answers`: what counts as the answer, what counts as equal, and the verdicts."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from common import _values
from common.answers import Policy, Verdict, check, extract_answer, grade, grade_many, judge, same_answer

pytestmark = pytest.mark.usefixtures("ready_worker")
ROOT = Path(__file__).parents[2]
CASES = ROOT.parent / "shared" / "data" / "answers" / "cases.jsonl"
PAIRS = [json.loads(line) for line in (Path(__file__).parent / "answer_pairs.jsonl").read_text("utf-8").splitlines()]
EXTRACTION = [
    # response, last, first
    (r"so \boxed{42}.", "42", "42"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", r"\frac{1}{2}"),
    (r"first \boxed{1}, then \boxed{2}", "2", "1"),
    (r"\boxed{1} and \boxed{2}", "1, 2", "1, 2"),
    (r"$\boxed{(2, 2)}$, $\boxed{(6, 2)}$", "(2, 2), (6, 2)", "(2, 2), (6, 2)"),
    (r"\boxed{1}. Wait: the answer is 2.", "1", "1"),
    (r"The answer is 3. No: \boxed{4}", "4", "3"),
    ("The answer is 3. Wait, the answer is 4.", "4", "3"),
    (r"The answer is \boxed{7}.", "7", "7"),
    (r"\boxed 7 and more", "7", "7"),
    ("**Final Answer:** **73**", "73", "73"),
    ("Final Answer: The final answer is $5x$. I hope it is correct.", "$5x$", "$5x$"),
    ("Final Answer: The largest $n$ is 34.", "34", "34"),
    ("The answer is 3.14.", "3.14", "3.14"),
    ("Answer:\n\n\\[ 9 \\]\nDone", "\\[ 9 \\]", "\\[ 9 \\]"),
    ("<answer>Paris</answer>", "Paris", "Paris"),
    ("work\n#### 1,234", "1,234", "1,234"),
    ("#### Step 1: add\n\nso\n\n\\boxed{4}", "4", "4"),  # a heading is no answer
    ("#### 1. Add\nThe answer is 4.", "4", "4"),
    ("The answer is 4.\n\n#### Explanation\nWe add.", "4", "4"),
    ("#### Final Answer\n4", "4", "4"),
    ("The answer is 42. This answer is consistent with the diagram.", "42", "42"),
    ("Answer: 42\n\nNote: the answer is in cm.", "42", "42"),
    ("To see which answer is correct, we add. The answer is 42.", "42", "42"),
    ("#### 18.\n\nQuestion: how many?", "18", "18"),
    ("#### Paris", "Paris", "Paris"),
    ("#### sqrt(2)", "sqrt(2)", "sqrt(2)"),
    ("The answer is valid.", "valid", "valid"),  # nothing else is one
    ("The answer is 12. But that answer is not valid. Hence 24.", "not valid", "12"),  # taken back
    ("The answer is 5. After rechecking the answer is found to be 6.", "6", "5"),
    ("The answer is confirmed as 7.", "7", "7"),
    ("The anſwer is 5", "5", "5"),  # the long s is an s of another case
    ("So the answer must be $5$! Well done.", "$5$", "$5$"),
    (r"The answer is \(5\)!", r"\(5\)", r"\(5\)"),
    ("The answer is $5!$", "$5!$", "$5!$"),
    ("The answer is 5!", "5!", "5!"),  # a factorial, perhaps
    ("最终答案是 42。", "42", "42"),
    ("答案：5", "5", "5"),
    ("The answer is D because A is too small", "D", "D"),
    (r"<think>\boxed{1}</think> so \boxed{2}", "2", "2"),
    (r"<think>\boxed{1} and on", None, None),
    ("The answer is 1.\n<think>\\boxed{2} and on", "1", "1"),
    ("<think>\\boxed{1}</think> The answer is 2.\n<think>Answer: 3", "2", "2"),
    ("The answer is that the value is 5.", "5", "5"),
    ("The answer is that the largest amount that cannot be made is 43.", "43", "43"),
    (r"Final answer: the probability that no two sit together is \frac{1}{3}", r"\frac{1}{3}", r"\frac{1}{3}"),
    (r"<think>x</think>The model emits `<think>` tokens, so \boxed{4}", "4", "4"),
    ("so\n\u3000Answer\n4", "4", "4"),
    ("The answer is that there is no way it is 5.", "that there is no way it is 5", "that there is no way it is 5"),
    (r"thinking \boxed{1}</think>", None, None),
    (r"\boxed{5}<|im_end|>\boxed{6}", "5", "5"),
    (r"\boxed{}", None, None),
    (r"It asks for an answer in \boxed{}. Here it is: \boxed{5}.", "5", None),  # the first is the prompt's: no answer
    (r"\boxed{{{", None, None),
    (r"\boxed{1} then \boxed{2", "1", "1"),
    (r"\boxed{185\}.", "185", "185"),
    ("**Final Answer**\n\n5", "5", "5"),
    ("The answer would be 5.", "5", "5"),
    (r"\boxed{(3, 3)} for part (a) and \boxed{(1, 1)}", "(3, 3), (1, 1)", "(3, 3), (1, 1)"),
    (r"$x=\boxed{1}$ or $x_2 = \boxed{2}$", "1, 2", "1, 2"),  # two values of one name
    (r"$x=\boxed{1}$ and $y=\boxed{2}$", "2", "1"),
    ("The answer is 5, not 6.", "5", "5"),
    ("The answer is:\n- 5", "5", "5"),  # an item of a list
    ("The answer is:\n-5", "-5", "-5"),
    ("The answers are:\n- 5.\n- **6**\n\nDone", "5, 6", "5, 6"),  # not the first item alone
    ("The answer is:\n- $$\n5\n$$", "$$\n5\n$$", "$$\n5\n$$"),
    ("The answer\nis - 5", "- 5", "- 5"),
    ("The answer is A, not B but C.", "A, not B but C", "A, not B but C"),
    ("The answer is 5, not sure, maybe 6.", "5, not sure, maybe 6", "5, not sure, maybe 6"),
    (r"$x=\boxed{5}$, $x=\boxed{5}$", "5", "5"),  # said twice
    (r"$max=\boxed{3}$, $x=\boxed{5}$", "5", "3"),
    ("答えは5です。", "5", "5"),
    ("정답은 5입니다.", "5", "5"),
    ("so it is 42", None, None),
    ("The answer is", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("response", "last", "first"), EXTRACTION)
def test_extraction(response, last, first):
    assert extract_answer(response) == last
    assert extract_answer(response, which="first") == first


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("58", Verdict.CORRECT), ("x = 58", Verdict.CORRECT), ("<think>57</think> 58", Verdict.CORRECT),
        ("57", Verdict.WRONG), (r"58, so \boxed{57}", Verdict.WRONG), ("58. Answer: 57", Verdict.WRONG),
        ("In triangle ABC, we know AB = 58", Verdict.NO_ANSWER),
        ("<think>58", Verdict.NO_ANSWER), ("", Verdict.NO_ANSWER), ("58 " * 2000, Verdict.NO_ANSWER),
    ],
)  # fmt: skip
def test_a_response_without_a_commitment_is_an_answer_as_a_whole_where_that_is_asked(response, verdict):
    assert judge(response, "58", whole=True) == verdict == grade_many([response], ["58"], whole=True)[0]
    if verdict is Verdict.CORRECT:
        assert judge(response, "58") is Verdict.NO_ANSWER


def test_extraction_refuses_an_unknown_rule():
    with pytest.raises(ValueError, match="which"):
        extract_answer("5", which="best")


EQUAL = [  # gold, prediction
    ("1000", "1,000"), ("1000", r"1{,}000"), ("1000", "1 000"), ("0.5", ".50"), ("5", "5.0"), ("7", "007"),
    ("0", "-0"),
    ("1/2", "0.5"), ("1/2", r"\dfrac12"), ("1/2", r"\frac{3}{6}"), ("1/2", "½"), ("-1/2", r"\frac{1}{-2}"),
    ("3.5", r"3\frac{1}{2}"), ("5/4", "1 1/4"), ("0.0025", r"2.5 \times 10^{-3}"), ("1500", "1.5e3"), ("-5", "−5"),
    ("5", "５"), ("5", "٥"), ("5", "5\u200b"), ("5", r"5\,\text{cm}"), (r"5\text{ cm}", "5 centimeters"),
    ("90", r"90^\circ"),
    ("12", r"\$12.00"), ("50", r"50\%"), (r"28\%", "28 percent"), ("15 cm^2", r"15\text{ square cm}"), ("2", "2m"),
    (r"2\sqrt{3}", r"\sqrt{12}"), ("x^2", "x²"), ("x^{12}", "x^12"), ("2π", r"2\pi"), ("(x+1)^2", "x^2+2x+1"),
    ("5", "x=5"), ("x=5", "5"), ("11", "x = 5+6 = 11"), (r"\frac13", r"\frac13 \approx 0.333"),
    ("11", r"x \approx 11"),
    (r"\{1,2\}", r"\{2,1\}"), ("1,2,3", r"\{3,2,1\}"), ("2 or 3", r"x=2 \text{ or } x=3"), (r"\pm 3", "3, -3"),
    ("(1,2)", r"\left(1, 2\right)"), ("[1,2)", r"1 \le x < 2"), (r"(3,\infty)", "x > 3"), ("x > 3", "3 < x"),
    (r"(-\infty,-2]\cup[2,\infty)", r"x\leq -2 \text{ or } x\geq 2"), ("y=2x+3", "y-2x=3"), ("2x+3y=6", "4x+6y=12"),
    (r"\begin{pmatrix}1\\0.5\end{pmatrix}", r"\begin{bmatrix}1\\ 1/2\end{bmatrix}"), (r"\emptyset", r"\{\}"),
    ("C", "(C)"), ("C", "c"), ("C", r"\textbf{(C)}"), ("C", "C. x = 42"), ("(D) Alina", "D"),
    ("Paris", r"\text{paris}"),
    ("(1+i)^2", "2i"), (r"\sqrt[3]{-8}", "-2"), (r"\cos 60^\circ", "1/2"), ("1/sqrt(3)", r"\frac{\sqrt{3}}{3}"),
    ("nan", "nan"), ("None", "none"), (r"\boxed{24}", "24"), ("9^{9^{9^{9}}}", "9^{9^{9^9}}"),
]  # fmt: skip
UNEQUAL = [  # gold, prediction
    ("5", "5 or 7"), ("5", r"5 \text{ or } 7"), ("5", "5, 7"), ("5", r"\{5,7\}"), ("5", r"x=5 \text{ or } x=7"),
    ("5", r"5\text{ or maybe 7}"), ("5", r"5\text{ (or 7)}"), ("A", "A, possibly B"), ("7", "5=7"), ("5", "5=7"),
    ("7", "1=2=3=4=5=6=7"), ("3", r"\pm 3"), (r"\pm 3", "3"), ("C", "A or B or C"),
    ("C", "ABC"),
    ("C", "A, B, C"), ("C", "Carbon"), ("A", "A, but maybe B"), ("A square", "A"), ("0.5", r"50\%"), ("1/3", "0.333"),
    ("1/3", "0.3333333333333333"), (r"\pi", "3.14"), (r"\pi", r"\frac{22}{7}"), ("0.3", "0.30000000000000004"),
    ("0", "0.0000001"), ("1", r"1+10^{-35}"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}"), (r"\sqrt{2}", "1.41421356237"),
    ("(1,2)", "[1,2]"), ("(1,2)", r"\{1,2\}"), ("(1,2)", "(2,1)"), ("[0,1]", "[0,1)"), ("5", "[5]"),
    ("[1,2]", "[2,1]"),
    ("x=5", "y=5"), ("x+1", "y+1"), (r"\frac{A}{B}", r"\frac{a}{b}"), ("f(x)=x+1", "g(x)=x+1"), ("2x+z=1", "1"),
    ("x > 3", "x < 3"), ("x > 3", r"x \geq 3"), ("y=2x+3", "y=2x+4"), ("|x|", "x"), (r"\sqrt{x^2}", "x"), ("2m", "2"),
    (r"5\text{ cm}", r"5\text{ m}"), (r"\$12", "12 cents"), ("2 hours", "2 minutes"), (r"1.5\text{ million}", "1.5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"), ("101_2", "101"), ("12:00", "1:00"),
    ("yes", "no"), ("no", "on"), ("x", "X"), ("42", "\u202e24"), ("42", "4\x002"), ("5", "5😀"), ("10", "4 10/3"),
    ("5", ""), ("", ""), ("5", " "), ("5", "None"), ("5", "null"), ("5", "nan"), (r"\infty", "1/0"), ("zoo", "1/0"),
    (r"\infty", r"-\infty"), ("0", r"\emptyset"), ("1,2,2", "1,1,2"), ("7", r"7 \pmod{11}"), ("1/2", "1/2 x"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "prediction"), EQUAL)
def test_same(gold, prediction):
    assert same_answer(prediction, gold)


@pytest.mark.parametrize(("gold", "prediction"), UNEQUAL)
def test_not_same(gold, prediction):
    assert not same_answer(prediction, gold)


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: ascii(row["gold"][:32]))
def test_table_of_pairs(row):
    wrong = [answer for answer in row["same"] if not same_answer(answer, row["gold"])]
    accepted = [answer for answer in row["different"] if same_answer(answer, row["gold"])]
    assert (wrong, accepted) == ([], [])


VECTOR = r"\begin{pmatrix}1\\2\end{pmatrix}"


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        # Names say which value is which
        ("2, 1", "x=1, y=2", False), (r"\{2, 1\}", "x=1, y=2", False), (r"\{1, 2\}", "x=1, y=2", False),
        ("1 or 2", "x=1, y=2", False), ("1/3, 2/3", "p=2/3, q=1/3", False), ("3, 2", "f(1)=2, f(2)=3", False),
        ("1, 2", "x=1, y=2", True), ("2/3, 1/3", "p=2/3, q=1/3", True), ("1, 2", "y=2, x=1", True),
        ("2, 1", "x_1=1, x_2=2", True), ("2, 1", "x=1, x=2", True), ("2, 1", "x=1, 2", True),
        ("(1,2)", "y=2, x=1", True), ("(1,2,3)", "z=3, x=1, y=2", True), ("(2,1)", "y=2, x=1", False),
        ("(1,2)", "q=2, p=1", False), (r"x=1 \quad y=2", "(1,2)", True), ("1000, 2", "x=1,000, y=2", True),
        ("2, 1000", "x=1,000, y=2", False),
        *(  # no assignments
            (text.replace("?", r"\quad "), text.replace("?", ""), True)
            for text in (r"f(x)=\begin{cases}1 &? x=0\\2 &? x=1\end{cases}", r"y=2\text{ where }? x=0")
        ),
        # One value in braces, or before its name
        (r"\{5\}", "5", True), (r"\{5\}", "x=5", True), (r"\{(1,2)\}", "(1,2)", True), (r"\{5\}", "6", False),
        (r"\{\{5\}\}", r"\{5\}", False), (r"\{\{5\}\}", "5", False), ("5", r"\{\{5\}\}", False),
        (r"(\{1\},2)", "(1,2)", False), (r"\{0\}", r"\emptyset", False),
        ("5=x", "5", True), ("5=x", "x=5", True), ("5=x", "6", False), ("5=7", "5", False), ("2x+3=x", "2x+3", False),
        ("a+b=c", "c", True), ("AB=x", "AB", False),
        *(
            (rf"\begin{{pmatrix}}{names}\end{{pmatrix}}=\begin{{bmatrix}}1\\2\end{{bmatrix}}", VECTOR, same)
            for names, same in ((r"x\\y", True), (r" a \\ b ", True), (r"y\\x", False), (r"x\\1", False))
        ),
        # Words are no unit of words, and powers of variables no unit of a number
        (r"\text{Evelyn}\text{ Navin}", r"\text{Evelyn}", False), (r"\text{even} \text{odd}", r"\text{even}", False),
        (r"\text{Evelyn}\text{ Navin}", "Evelyn Navin", True), (r"5\text{ cm}\text{ long}", "5", True),
        (r"\pi d^2", r"\pi", False), (r"\pi d", r"\pi", False), ("3t^2", "3", False), ("5 s^2", "5", False),
        ("15 m^2", "15", True), ("9.8 m/s^2", "9.8", True), (r"2\text{ s}^2", "2", True),
        (r"5\,\Omega", "5", True), (r"5\ \text{k}\Omega", "5000 Ω", True), ("13.6 eV", r"13.6\text{ keV}", False),
        (r"x\Omega", "x", False), (r"5\,\Omega", r"5\text{ cm}", False), ("2 keV", "2000 eV", True),
        (r"R=5\,\Omega", r"5\,\Omega", True), (r"\approx 5\Omega", r"5\Omega", True),
        (r"R=6\Omega", r"5\Omega", False),
        (r"10^3\,\Omega", r"1\text{ k}\Omega", True), (r"\frac{1}{2}\Omega", r"0.5\Omega", True),
        (r"R_1=2\Omega, R_2=3\Omega", r"2\Omega, 3\Omega", True),
        (r"2\Omega\text{ and }3\Omega", r"3\,\Omega, 2\,\Omega", True), (r"3\Omega+1", r"1+3\Omega", True),
        ("9.8 m / s^2", "9.8 m/s^2", True), ("9.8 m/ s^2", "9.8", True),
        # A letter before an option's text
        (r"\textbf{(B)}\ 12", "12", True), ("B. 12", "12", True), (r"(B)\ 12 \text{ or } (C)\ 13", "12", False),
        ("(B) 13", "12", False), ("12", "(B) 12", True), ("13", "(B) 12", False), ("neon", "(C) Neon", True),
        ("(C)12", "(B)12", False), ("(B) 12", "12B", True), ("(B) 12", "6B", False),
        ("B", "(A)(B)", False), ("-B", "(A)-(B)", False), ("(C)(D)", "(A) (C) (D)", False), ("(A) -5", "-5", True),
        # The same in other spellings
        (r"\textcolor{red}{1,234}", "1234", True), (r"\textbf{$(-1,2)$}", "(-1,2)", True),
        (r"\text{$5$ or $6$}", "5", False), (r"\frac{\color{red}{1}}{2}", "0.5", True),
        ("15:30", "3:30 p.m.", True), ("15:30", "3:30 a.m.", False), ("3:30", "3:30 p.m.", False),
        ("No real solutions", "no real solution", True), ("no solution", "one solution", False),
    ],
)  # fmt: skip
def test_names_labels_and_words(answer, gold, same):
    assert same_answer(answer, gold) is same
    assert grade(rf"So it is \boxed{{{answer}}}.", gold) is same


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        (r"\lceil\frac{n}{2}\rceil", r"\lfloor\frac{n+1}{2}\rfloor", True),
        (r"\lceil\frac{n}{3}\rceil", r"\lfloor\frac{n+1}{3}\rfloor", False),
        (r"\lfloor\frac{n}{2}\rfloor", r"\frac{2n-1+(-1)^n}{4}", True),
        (r"\lfloor\log_2 n\rfloor+1", r"\lceil\log_2(n+1)\rceil", True),
        (r"\lfloor\log_2 n\rfloor+1", r"\lceil\log_2 n\rceil", False),  # other at powers of two
        (r"\lfloor\sqrt{n-1}\rfloor", r"\lceil\sqrt{n}\rceil-1", True),
        (r"\lfloor\sqrt{n-1}\rfloor", r"\lfloor\sqrt{n}\rfloor", False),  # other at squares
        (r"mn-\lfloor\frac{m}{2}\rfloor", r"mn-\lceil\frac{m-1}{2}\rceil", True),
        (r"mn-\lfloor\frac{m}{2}\rfloor", r"mn-\lfloor\frac{n}{2}\rfloor", False),
        (r"\lceil x\rceil", r"\lfloor x\rfloor+1", False),  # other at whole numbers
        (r"\lceil\frac{x}{2}\rceil", r"\lfloor\frac{x+1}{2}\rfloor", False),
        (r"\lfloor x+1\rfloor", r"\lfloor x\rfloor+1", True),
        (r"\lfloor -x\rfloor", r"-\lceil x\rceil", True),
        (r"\lfloor\frac{n}{1000}\rfloor", "0", False),  # other at large numbers
        (r"\lfloor\frac{n}{10^6}\rfloor", "0", False),
        (r"\lfloor\frac{n}{2024}\rfloor", r"\lfloor\frac{n}{2025}\rfloor", False),
        (r"\lfloor\frac{n}{97}\rfloor", r"\lfloor\frac{n-1}{97}\rfloor", False),  # other at multiples
        (r"\lfloor\frac{n}{km}\rfloor", r"\lfloor\frac{n-1}{km}\rfloor", False),
        (r"\lfloor\frac{n}{km}\rfloor", r"\lceil\frac{n+1}{km}\rceil-1", True),
        (r"\lfloor\sqrt{2}^n\rfloor", r"\lfloor 2^{n/2}\rfloor", True),  # no rounding error at 2^{128}
    ],
)
def test_floors_of_whole_numbers_and_of_others(answer, gold, same):
    assert same_answer(answer, gold) is same and same_answer(gold, answer) is same


VANISHING = [  # prediction, gold: a part of the prediction is 0, which no number of digits shows
    *((zero, "0") for zero in (r"\sin^2\pi", r"\sin^3 \pi", r"\tan^2\pi", r"\cos^2(90^\circ)", r"\sqrt{\sin\pi}")),
    *((zero, "0") for zero in (r"(\log_2 8-3)^2", r"(e^{i\pi}+1)^2", r"(\sqrt{8}-2\sqrt{2})^2")),
    (r"\lfloor\sin\pi\rfloor", "0"),
    (r"\sqrt{1-\sin^2\pi}", "1"), (r"2\cos^2\frac{\pi}{2}-1", "-1"), (r"\sin^2(180^\circ)+3", "3"),
    (r"\lfloor(\sqrt{2}+1)(\sqrt{2}-1)\rfloor", "1"), (r"x+\sin^2\pi", "x"), (r"x=y+\cos^2\frac{\pi}{2}", "x=y"),
    (r"(\sin^2\pi, 1)", "(0, 1)"), (r"\begin{pmatrix}\sin^2\pi\\1\end{pmatrix}", r"\begin{pmatrix}0\\1\end{pmatrix}"),
    (r"[\cos^2\frac{\pi}{2}, 1]", "[0,1]"), (r"[0,\sin^2\pi+2]\cup[2,3]", "[0,3]"),
    *((no_value, None) for no_value in (r"\frac{1}{\sin^2\pi}", r"\tan^2(90^\circ)", r"\sqrt{\tan 90^\circ}+x")),
    *((no_value, None) for no_value in (r"\left(\frac{1}{\sin\pi}\right)^2", r"(\sin\pi)^{\sin\pi}")),
    (r"(10^{60}\sin\pi)^2", None),  # too few digits to see that it is 0: undecided
]  # fmt: skip
GOLDS = [
    "7", "0.5", r"\sqrt{2}", "x", r"\frac{\pi}{6}", "x^2+1", "10^{50}", "e", "3+4i", "-1", "1", "0", "(3,-4)", "(1,2)",
    "[5,7]", "2x+y=3", "x-y=3", "x=4", r"\begin{pmatrix}3\\4\end{pmatrix}", r"(-\infty,1)\cup(2,\infty)", "2^{-300}",
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "gold"), VANISHING)
def test_a_part_that_is_zero_makes_no_answer_right_for_everything(prediction, gold):
    assert gold is None or same_answer(prediction, gold)
    assert [other for other in GOLDS if other != gold and same_answer(prediction, other)] == []


@pytest.mark.parametrize(("answer", "gold"), [(r"(\pi^{-150})^3", r"\pi^{-450}"), (r"(e^{-100})^2", "e^{-200}")])
def test_a_small_number_is_not_zero(answer, gold):
    assert same_answer(answer, gold)
    assert not same_answer(answer, "0")
    assert not same_answer(answer, f"2{gold}")


def test_nothing_is_proportional_to_zero():
    assert not same_answer(r"(x+y)\sin\pi=0", "x+y=0")


@pytest.mark.parametrize("error", [ZeroDivisionError, OverflowError, ValueError, KeyError, RecursionError, TypeError])
def test_a_step_that_fails_makes_an_answer_unreadable(monkeypatch, error):
    monkeypatch.setattr(_values, "equal", Mock(side_effect=error))
    expected = Verdict.UNPARSEABLE, "x+1", "", "failure"
    assert check(r"\boxed{x+1}", "1+x") == expected
    assert grade_many([r"\boxed{x+1}"], ["1+x"]) == [Verdict.UNPARSEABLE]
    assert not same_answer("x+1", "1+x")


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_a_text_is_raised(monkeypatch, error):
    monkeypatch.setattr(_values, "equal", Mock(side_effect=error))
    with pytest.raises(error):
        same_answer("x+1", "1+x")


POLICIES = [  # policy, gold, prediction, right by default, right with the policy
    (Policy(percent="value"), "0.5", r"50\%", False, True),
    (Policy(percent="value"), "50", r"50\%", True, False),
    (Policy(percent="value"), r"50\%", r"50\%", True, True),
    (Policy(percent="value"), r"50\%", r"\frac{1}{2}", False, True),
    (Policy(units="ignored"), "5 cm", "5 km", False, True),
    (Policy(units="required"), "5 cm", "5", True, False),
    (Policy(units="required"), "5 cm", "0.05 m", True, True),
    (Policy(units="required"), "5", "5 cm", True, True),
    (Policy(rounding=True), "3.14", r"\pi", False, True),
    (Policy(rounding=True), "3.15", r"\pi", False, False),
    (Policy(rounding=True), "0.33", "1/3", False, True),
    (Policy(rounding=True), "0.33", "0.3351", False, False),
    (Policy(rounding=True), "4.123", r"\sqrt{17}", False, True),
    (Policy(rounding=True), "1/3", "0.33", False, False),
    (Policy(lowest_terms=True), "1/2", r"\frac{2}{4}", True, False),
    (Policy(lowest_terms=True), "1/2", "0.5", True, True),
    (Policy(lowest_terms=True), r"(\frac{1}{2}, 3)", r"(\frac{2}{4}, 3)", True, False),
]


@pytest.mark.parametrize(("policy", "gold", "prediction", "default", "chosen"), POLICIES)
def test_policy(policy, gold, prediction, default, chosen):
    assert same_answer(prediction, gold) is default
    assert same_answer(prediction, gold, policy=policy) is chosen
    assert grade_many([rf"\boxed{{{prediction}}}"], [gold], policy=policy)[0] == (
        Verdict.CORRECT if chosen else Verdict.WRONG
    )


def test_policy_reaches_the_workers():
    assert not same_answer(r"50\%", r"\int_{0}^{1} t dt")
    assert same_answer(r"50\%", r"\int_{0}^{1} t dt", policy=Policy(percent="value"))


def test_policy_refuses_an_unknown_choice():
    with pytest.raises(ValueError, match="percent must be one of unit, value, got 'both'"):
        Policy(percent="both")
    with pytest.raises(ValueError, match="units"):
        Policy(units="yes")


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        (r"\boxed{5}", "5", (Verdict.CORRECT, "5", "text", "text")),
        (r"\boxed{0.5}", "1/2", (Verdict.CORRECT, "0.5", "number", "number")),
        (r"\boxed{5 km}", "5 cm", (Verdict.WRONG, "5 km", "unit", "unit")),
        (r"\boxed{5 km}", "6", (Verdict.WRONG, "5 km", "unit", "number")),
        (r"\boxed{(1, 3)}", "(1, 2)", (Verdict.WRONG, "(1, 3)", "brackets", "number")),
        (r"\boxed{2x}", "x+x", (Verdict.CORRECT, "2x", "value", "value")),
        (r"\boxed{B}", "(B)", (Verdict.CORRECT, "B", "choice", "choice")),
        (r"\boxed{2}", r"\sum_{k=1}^{2} 1", (Verdict.CORRECT, "2", "value", "value")),
        (r"\boxed{2}", r"\sum_{k=0}^{\infty} \frac{1}{2^k}", (Verdict.CORRECT, "2", "value", "algebra")),
        (r"\boxed{2}", r"\int_{0}^{2} t dt", (Verdict.CORRECT, "2", "value", "algebra")),
        (r"\boxed{[1,2] \cup [2,3]}", "[1,3]", (Verdict.CORRECT, r"[1,2] \cup [2,3]", "union", "set")),
        ("five", "5", (Verdict.NO_ANSWER, None, "", "")),
        (r"\boxed{9^{9^{9^9}}}", "5", (Verdict.UNPARSEABLE, "9^{9^{9^9}}", "value", "size")),
    ],
)  # fmt: skip
def test_a_verdict_has_reasons(response, gold, expected):
    assert check(response, gold) == expected


@pytest.mark.parametrize(
    ("response", "gold", "verdict"),
    [
        (r"\boxed{5}", "5", Verdict.CORRECT),
        (r"\boxed{6}", "5", Verdict.WRONG),
        ("five, I think", "5", Verdict.NO_ANSWER),
        ("None", "None", Verdict.NO_ANSWER),
        (r"\boxed{\frac{1}{}+}", "5", Verdict.UNPARSEABLE),
        (r"\boxed{%s}" % ("9" * 5000), "5", Verdict.UNPARSEABLE),
        (r"\boxed{;=5}", "1,2", Verdict.WRONG),
        (r"\boxed{\text{ or }\approx 2.3}", "1,2", Verdict.WRONG),
        (r"\boxed{1,2}", r"\text{ or }\approx 2.3", Verdict.WRONG),
        (r"\boxed{x+1}", "", Verdict.GOLD_UNPARSEABLE),
        (r"\boxed{x+1}", r"\frac{1}{}+", Verdict.GOLD_UNPARSEABLE),
        (r"\boxed{\cancel{99} x=5}", "x=5", Verdict.UNPARSEABLE),  # the gold answer is not to blame
        (r"\boxed{\text{all } k \geq 2}", r"k \geq 2", Verdict.UNPARSEABLE),
        (r"\boxed{\cancel{9} \hbar + 1}", r"\hbar + 1", Verdict.UNPARSEABLE),
        (r"\boxed{5}", None, Verdict.GOLD_UNPARSEABLE),
        (None, "5", Verdict.NO_ANSWER),
        (r"\boxed{27}", 27.0, Verdict.CORRECT),
    ],
)
def test_verdicts(response, gold, verdict):
    assert judge(response, gold) is verdict
    assert grade(response, gold) is (verdict is Verdict.CORRECT)
    assert grade_many([response], [gold]) == [verdict]
    assert str(verdict) == verdict.value


def scored_cases():
    rows = [json.loads(line) for line in CASES.read_text("utf-8").splitlines()]
    return [row for row in rows if row["form"] != "nomarker" and row["kind"] != "arguable"]


def verdict_of(row, in_box=False):
    if row["form"] == "answer" and not in_box:
        return same_answer(row["prediction"], row["gold"], timeout=10)
    response = rf"So \boxed{{{row['prediction']}}}." if in_box else row["prediction"]
    return grade(response, row["gold"], timeout=10)


@pytest.mark.skipif(not CASES.exists(), reason="the shared answer pairs are not beside the repository")
def test_public_answer_pairs():
    rows = scored_cases()
    got = [verdict_of(row) for row in rows]
    false_positives = [row["id"] for row, right in zip(rows, got, strict=True) if right and not row["expected"]]
    false_negatives = [row["id"] for row, right in zip(rows, got, strict=True) if not right and row["expected"]]
    assert false_positives == []
    assert 1 - len(false_negatives) / len(rows) >= 0.99, false_negatives
    assert [verdict_of(row) for row in rows] == got
    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(verdict_of, rows)) == got


@pytest.mark.skipif(not CASES.exists(), reason="the shared answer pairs are not beside the repository")
def test_a_box_changes_no_verdict():
    rows = [row for row in scored_cases() if row["form"] == "answer" and "</think>" not in row["prediction"]]
    assert [row["id"] for row in rows if verdict_of(row) != verdict_of(row, in_box=True)] == []


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        *((answer, gold, True) for answer in (r"\text{5 cm}", r"\mathrm{5 cm}") for gold in ("5", r"5\text{ cm}")),
        ("5 cm", r"\text{5 cm}", True),
        (r"\text{5 cm}", "5 m", False),
        (r"\text{3/4 hour}", r"\frac{3}{4}", True),
        (r"\text{1.2e-3}", "0.0012", True),
        (r"\text{3e2}", "300", True),
        *((answer, answer[6], False) for answer in (r"\text{2 sin x}", r"\text{3AB}", r"\text{5C2}", r"\text{2log3}")),
        (r"\text{5 m/s^2}", r"5\text{ m/s}^2", True),
        (r"\text{3 apples}", r"\text{3 oranges}", False),
        (r"\text{2 or 3}", "2", False),
        (r"\text{3 dozen}", "3", False),
        (r"\text{1st place}", r"\text{1st place}", True),
        (r"\text{1st place}", "1", False),
        ("5 kPa", "5000 Pa", True),
        ("5 kPa", "5", True),
        (r"\$50K", "50", False),
        (r"\$50m", "50", False),
        (r"\$50", "50", True),
        (r"\$50 dollars", "50", True),
        (r"\$18 per day", "18 cents", False),
        *((rf"\$12{unit}", "12", True) for unit in (r"\text{ in total}", r"\text{ a day}", " people")),
        ("C or none of these", "C", False),
        ("A or it depends", "A", False),
        ("C. Neon or argon gas", "C", True),
        ("(C) Neon", "C", True),
    ],
)
def test_units_in_roman_type_thousands_of_dollars_and_hedged_letters(answer, gold, same):
    assert same_answer(answer, gold) is same
    assert grade(f"So it is \\boxed{{{answer}}}.", gold) is same
