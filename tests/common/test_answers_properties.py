r"""What must hold for any answer, on random ones.

HYPOTHESIS_PROFILE=fuzz runs this for long, with other examples each time; FUZZ_EXAMPLES is their number for each test.

Right and wrong are known by construction, from exact arithmetic on Python's fractions and coefficient lists; the
checker's own code has no part in it.
"""

import math
import os
import string
import time
from fractions import Fraction

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from common import _extract, answers
from common.answers import Policy, Verdict, check, exact_number, extract_answer, grade_many, judge, same_answer

FUZZ = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
SETTINGS = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "5000")) if FUZZ else 60,
    derandomize=not FUZZ,
    print_blob=FUZZ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

integers = st.integers(-10_000, 10_000)
rationals = st.builds(Fraction, integers, st.integers(1, 999))
polynomials = st.lists(st.integers(-9, 9), min_size=2, max_size=4).filter(lambda coefficients: coefficients[-1] != 0)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def spellings(value: Fraction) -> list[str]:
    """Ways to write a rational number exactly."""
    top, bottom = value.numerator, value.denominator
    sign = "-" if value < 0 else ""
    texts = [
        rf"\frac{{{top}}}{{{bottom}}}",
        f"{top}/{bottom}",
        rf"{sign}\dfrac{{{2 * abs(top)}}}{{{2 * bottom}}}",
        f"({top})/{bottom}",
    ]
    whole, rest = divmod(abs(top), bottom)
    if bottom == 1:
        texts += [
            str(top),
            f"{top:,}",
            f"{top}.00",
            f"{top:,}".replace(",", "{,}"),
            rf"\text{{{top}}}",
            str(top).replace("-", "−"),
        ]
    elif whole:
        texts += [rf"{sign}{whole}\frac{{{rest}}}{{{bottom}}}", f"{sign}{whole} {rest}/{bottom}"]
    digits = next((places for places in range(60) if 10**places % bottom == 0), None)
    if digits is not None:
        scaled = str(abs(top) * 10**digits // bottom).rjust(digits + 1, "0")
        decimal = sign + (f"{scaled[:-digits]}.{scaled[-digits:]}" if digits else scaled)
        texts += [
            decimal,
            f"{sign}{scaled}e-{digits}",
            rf"{sign}{scaled}\times 10^{{-{digits}}}",
            rf"{sign}{scaled} \cdot 10^{{-{digits}}}",
        ]
    return texts


@SETTINGS
@given(rationals, st.data())
def test_a_rational_equals_itself_in_every_spelling(value, data):
    a, b = data.draw(st.sampled_from(spellings(value))), data.draw(st.sampled_from(spellings(value)))
    assert same_answer(a, b)
    assert exact_number(a) == value


def test_what_is_no_numeral_has_no_exact_number():
    assert exact_number(r"1{,}000\text{ m}") == 1000
    assert exact_number("x") is exact_number("9^{9^{9^9}}") is None


@SETTINGS
@given(rationals, rationals, st.data())
def test_two_rationals_are_never_equal(value, other, data):
    assume(value != other)
    a, b = data.draw(st.sampled_from(spellings(value))), data.draw(st.sampled_from(spellings(other)))
    assert not same_answer(a, b)


@SETTINGS
@given(integers, st.integers(1, 40), st.sampled_from([1, -1]))
def test_there_is_no_tolerance(value, places, sign):
    close = Fraction(value) + Fraction(sign, 10**places)
    assert not same_answer(spellings(close)[0], str(value))
    decimal = f"{value}.{'0' * (places - 1)}1"
    assert not same_answer(decimal, str(value))
    assert not same_answer(rf"{value}\sqrt{{2}}+10^{{-{places}}}", rf"{value}\sqrt{{2}}")


@SETTINGS
@given(st.integers(2, 12), st.integers(-3000, 3000), st.integers(-3, 3))
def test_powers(base, exponent, shift):
    assert same_answer(f"{base}^{{{exponent}}}", rf"{base}^{{{exponent + shift}}}\cdot {base}^{{{-shift}}}")
    assert same_answer(f"{base}^{{{exponent}}}", f"{base}^{{{exponent + shift}}}") == (shift == 0)


@SETTINGS
@given(rationals, st.integers(0, 6), integers)
def test_rounding_is_half_a_unit_of_the_last_digit(value, places, other):
    gold = f"{math.copysign(1, other) * abs(other) / 10**places:.{places}f}" if places else f"{other}.0"
    digits = max(places, 1)
    right = abs(value - Fraction(gold)) <= Fraction(1, 2 * 10**digits)
    assert same_answer(spellings(value)[0], gold, policy=Policy(rounding=True)) == right


# ---------------------------------------------------------------------------------------------------------------------
# Formulas
# ---------------------------------------------------------------------------------------------------------------------


def product(left: list[int], right: list[int]) -> list[int]:
    result = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            result[i + j] += a * b
    return result


def written(coefficients: list[int], name: str = "x", power: str = "{name}^{{{i}}}") -> str:
    """Highest power first: `2x^{2}-x+3`."""
    terms = []
    for i, value in reversed(list(enumerate(coefficients))):
        factor = power.format(name=name, i=i) if i > 1 else name if i else ""
        if value:
            terms.append(f"{value:+d}{factor}" if abs(value) != 1 or not i else f"{'+' if value > 0 else '-'}{factor}")
    return "".join(terms).removeprefix("+") or "0"


@SETTINGS
@given(
    polynomials, polynomials, st.sampled_from("xynt"), st.sampled_from(["{name}^{{{i}}}", "{name}**{i}", "{name}^{i}"])
)
def test_a_product_of_polynomials_equals_its_expansion(left, right, name, power):
    expanded = written(product(left, right), name, power)
    factored = f"({written(left, name)})({written(right, name)})"
    assert same_answer(factored, expanded)
    assert same_answer(expanded, rf"\left({written(right, name)}\right)\cdot\left({written(left, name)}\right)")


@SETTINGS
@given(polynomials, polynomials, st.integers(0, 4), st.integers(-9, 9).filter(bool))
def test_a_changed_coefficient_is_wrong(left, right, place, change):
    expanded = product(left, right)
    changed = list(expanded)
    changed[place % len(changed)] += change
    assert not same_answer(written(changed), f"({written(left)})({written(right)})")
    assert not same_answer(written(expanded, "y"), written(expanded, "x")) or not any(expanded[1:])


@SETTINGS
@given(polynomials, polynomials, polynomials)
def test_quotients(top, bottom, factor):
    quotient = rf"\frac{{{written(top)}}}{{{written(bottom)}}}"
    assert same_answer(rf"\frac{{{written(product(top, factor))}}}{{{written(product(bottom, factor))}}}", quotient)
    assert same_answer(f"({written(top)})/({written(bottom)})", quotient)
    assert not same_answer(f"{quotient}+1", quotient)


@SETTINGS
@given(integers, st.integers(-50, 50).filter(bool), st.integers(2, 60), st.integers(2, 9))
def test_surds(a, b, radicand, factor):
    assume(math.isqrt(radicand) ** 2 != radicand)
    surd = rf"{a}{b:+d}\sqrt{{{radicand}}}"
    assert same_answer(rf"{b * factor}\sqrt{{{radicand}}}{a * factor:+d}", rf"{factor}({surd})")
    assert same_answer(rf"\sqrt{{{radicand * factor**2}}}", rf"{factor}\sqrt{{{radicand}}}")
    assert not same_answer(rf"{a}{-b:+d}\sqrt{{{radicand}}}", surd)
    assert not same_answer(rf"{a + 1}{b:+d}\sqrt{{{radicand}}}", surd)
    assert not same_answer(f"{a + b * math.sqrt(radicand):.12f}", surd)


@SETTINGS
@given(polynomials, polynomials, st.integers(-9, 9).filter(bool))
def test_equations_and_inequalities(left, right, factor):
    assume(left != right)
    scaled = [[factor * value for value in side] for side in (left, right)]
    assert same_answer(f"{written(scaled[0])}={written(scaled[1])}", f"{written(left)}={written(right)}+0y")
    lesser = f"{written(left)}<{written(right)}+y"
    sign = "<" if factor > 0 else ">"
    scaled_lesser = f"{written(scaled[0])}{sign}{written(scaled[1])}{factor:+d}y"
    assert same_answer(scaled_lesser, lesser)
    assert not same_answer(scaled_lesser.replace(sign, "<" if sign == ">" else ">"), lesser)


# ---------------------------------------------------------------------------------------------------------------------
# Structure
# ---------------------------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.lists(rationals, min_size=2, max_size=6), st.randoms(use_true_random=False), st.data())
def test_order_is_free_in_sets_and_counts_in_tuples(values, rng, data):
    shuffled = list(values)
    rng.shuffle(shuffled)
    gold, other = ([data.draw(st.sampled_from(spellings(value)[:2])) for value in side] for side in (values, shuffled))
    assert same_answer(rf"\{{{', '.join(other)}\}}", rf"\{{{', '.join(gold)}\}}")
    assert same_answer(" and ".join(other), "; ".join(gold))
    assert same_answer(f"({', '.join(other)})", f"({', '.join(gold)})") == (shuffled == values)
    assert not same_answer(", ".join(other[1:]), ", ".join(gold))
    assert not same_answer(f"({', '.join(gold)})", rf"\{{{', '.join(gold)}\}}")


@SETTINGS
@given(
    rationals, rationals, st.sampled_from("(["), st.sampled_from(")]"), st.sampled_from("(["), st.sampled_from(")]")
)
def test_intervals_keep_their_brackets(low, high, opening, closing, other_opening, other_closing):
    assume(low < high)
    gold = f"{opening}{low},{high}{closing}"
    same = (opening, closing) == (other_opening, other_closing)
    assert same_answer(f"{other_opening} {spellings(low)[0]}, {spellings(high)[0]} {other_closing}", gold) == same
    less = {"(": "<", "[": r"\leq ", ")": "<", "]": r"\le "}
    assert same_answer(f"{low}{less[other_opening]}x{less[other_closing]}{high}", gold) == same


ENDS = [r"-\infty", *range(-3, 4), r"\infty"]
parts = st.tuples(st.sampled_from("(["), st.integers(0, 8), st.integers(0, 8), st.sampled_from(")]")).filter(
    lambda part: part[1] < part[2]
)
unions = st.lists(parts, min_size=1, max_size=4)


def is_in(part, point):
    """Whether the half-integer `point / 2` lies in `(opening, low, high, closing)`, given by places in ENDS."""
    opening, low, high, closing = part
    low, high = 2 * (low - 4), 2 * (high - 4)
    return low < point < high or (point == low and opening == "[") or (point == high and closing == "]")


def written_set(union):
    """A part that ends at infinity is open there."""
    texts = []
    for opening, low, high, closing in union:
        texts.append(f"{'(' if low == 0 else opening}{ENDS[low]}, {ENDS[high]}{')' if high == 8 else closing}")
    return r" \cup ".join(texts)


@SETTINGS
@given(unions, unions)
def test_unions_are_equal_when_they_hold_the_same_points(left, right):
    points = range(-7, 8)
    same = all(
        any(is_in(part, point) for part in left) == any(is_in(part, point) for part in right) for point in points
    )
    assert same_answer(written_set(left), written_set(right)) == same
    holes = [point // 2 for point in points if point % 2 == 0 and not any(is_in(part, point) for part in left)]
    everything = rf"\mathbb{{R}} \setminus \{{{', '.join(map(str, holes))}\}}" if holes else r"\mathbb{R}"
    whole = all(any(is_in(part, point) for part in left) for point in points if point % 2)
    assert same_answer(everything, written_set(left)) == whole


@SETTINGS
@given(st.lists(st.lists(rationals, min_size=2, max_size=3), min_size=2, max_size=3), st.sampled_from("pbv"))
def test_matrices(rows, bracket):
    assume(len({len(row) for row in rows}) == 1)
    first, second = (
        rf"\begin{{{kind}matrix}}"
        + r"\\".join("&".join(spellings(value)[i] for value in row) for row in rows)
        + rf"\end{{{kind}matrix}}"
        for i, kind in enumerate(("p", "b"))
    )
    assert same_answer(first, second)
    rows[0][0] += 1
    changed = r"\begin{pmatrix}" + r"\\".join("&".join(map(str, row)) for row in rows) + r"\end{pmatrix}"
    assert not same_answer(changed, second)


@SETTINGS
@given(
    rationals,
    rationals,
    st.sampled_from(
        [
            "{} or {}",
            "{}, {}",
            r"\{{{}, {}\}}",
            "{}={}",
            r"{} \text{{ or }} {}",
            "either {} or {}",
            "({}, {})",
            r"{} \pm {}",
            "{} < {}",
            "x={} or x={}",
        ]
    ),
)
def test_a_hedge_is_wrong(value, other, hedge):
    assume(value != other and other != 0)
    for pair in ((value, other), (other, value)):
        assert not same_answer(hedge.format(*pair), str(value))
        assert judge(rf"\boxed{{{hedge.format(*pair)}}}", str(value)) is not Verdict.CORRECT


@SETTINGS
@given(
    st.permutations("ABCDEFGHIJ"),
    st.sampled_from(
        ["{}", "({})", "{}.", r"\text{{({})}}", "Option {}", "**{}**", "the answer is {}", r"\textbf{{{}}}"]
    ),
)
def test_letters(letters, form):
    assert same_answer(form.format(letters[0]), letters[0])
    assert not same_answer(form.format(letters[1]), letters[0])
    for hedge in ("{} or {}", "{}, {}", "{}/{}", "({}) or ({})", "{} and {}", "{}{}", "{}, maybe {}", "{}? {}?"):
        assert not same_answer(hedge.format(*letters[:2]), letters[0])


UNITS = ["cm", "km", "kg", "hours", "minutes", "dollars", "degrees", "%", "apples", "cm^2", "m/s"]


@SETTINGS
@given(rationals, st.permutations(UNITS), st.sampled_from(["{} {}", r"{}\text{{ {}}}", r"{}\,\mathrm{{{}}}"]))
def test_units(value, units, form):
    plain = spellings(value)[0]
    assume(value != 0)
    assert same_answer(form.format(plain, units[0]), plain)
    assert same_answer(plain, rf"{plain}\text{{ {units[0]}}}")
    assert not same_answer(form.format(plain, units[0]), rf"{plain}\text{{ {units[1]}}}")


# ---------------------------------------------------------------------------------------------------------------------
# Short ways give what the long ways give
# ---------------------------------------------------------------------------------------------------------------------

NUMERAL_FORMS = (
    "{}",
    "-{}",
    r"\${}",
    "${}",
    "-${}",
    "{}%",
    r"{}\%",
    "{} %",
    r"{}^\circ",
    r"{}^{{\circ}}",
    "{}°",
    "{} °",
)
NUMERAL_FORMS += ("{} degrees", r"\${}%", "{}^{{ \\circ }}", " {} ", "${}$", "{}.", ".{}", "{}/7", r"\$ {}")
NUMERAL_FORMS += (
    r"\frac{{{}}}{{7}}",
    r"\dfrac{{{}}}{{14}}",
    r"-\tfrac{{-{}}}{{7}}",
    r"$\frac{{7}}{{{}}}$",
    "7/{}",
    "-{}/7",
)
NUMERAL_FORMS += (
    r"$\${}$",
    "$${}$$",
    r"${}\%$",
    "${} cm$",
    "$-{}$",
    r"\frac{{{0}}}{{{0}}}",
    "${}/7$",
    "$ {} $",
    "{}$",
)
UNIT_WORDS = ("cm", "m", "miles", "USD", "percent", "degrees", "in", "am", "pi", "dozen", "or", "apples", "cm^2", "KM")
NUMERAL_FORMS += tuple(f"{{}}{f.replace('w', w)}" for f in (" w", r"\text{{ w}}", r"\mathrm{{w}}") for w in UNIT_WORDS)
numerals = st.builds(
    str.format,
    st.sampled_from(NUMERAL_FORMS),
    st.sampled_from(
        ["0", "5", "5.0", "05", "5.50", "1000", "1,000", "1,000.00", "2024", "12.34", "1,00", "0.05", "100"]
    ),
)


@SETTINGS
@given(numerals, numerals)
def test_plain_numerals_get_the_verdict_of_all_others(answer, gold):
    with pytest.MonkeyPatch.context() as patch:
        short = check(rf"\boxed{{{answer}}}", gold)
        patch.setattr(answers, "_settle_numerals", lambda *_: None)
        assert short == check(rf"\boxed{{{answer}}}", gold)


PIECES = (
    *("answer", "Answers", "The final answer is ", "#### ", "##", "right ", "correct option is ", "best choice: "),
    *("is ", "5", "x=3", ". ", ": ", "：", "réponse est ", "RÉPONSE : ", "respuesta es ", "Antwort ist ", "ответ: "),
    *("答案是", "答え", "정답: ", "답은 ", "<answer>", "</answer>", r"\boxed{5}", r"\boxed{", "}", "{", r"\\boxed{7}"),
    *(r"\\\boxed{8}", r"\fbox{2}", r"\boxed 3", "\\", r"\{", "box", "</think>", "<think>", "valid", "correct, "),
    *(
        "in fact ",
        "the same ",
        "A b",
        "1. ",
        "İ",
        "anſwer: ",
        "optıon",
        "’s ",
        "**",
        "_",
        ", ",
        " and ",
        "é",
        "$",
        "\n",
        " ",
        "\t",
        "\u3000",
    ),
)


@SETTINGS
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_answers_are_found_around_the_words_of_markers_as_in_the_whole_text(text):
    for pattern, words in ((_extract._MARKER, _extract._MARK_WORDS), (_extract._REMARK, ("answer",))):
        found = [m.span() for m in _extract._matches(pattern, text, words)]
        assert found == [m.span() for m in pattern.finditer(text)]
    other = r"\boxed{0}" + 99 * "-"  # split into tokens from here on
    boxes = [(start - len(other), end - len(other), box) for start, end, box in _extract.boxes_of(other + text)]
    assert boxes[1:] == _extract.boxes_of(text)


# ---------------------------------------------------------------------------------------------------------------------
# Any text
# ---------------------------------------------------------------------------------------------------------------------

FRAGMENTS = [
    *"0123456789+-*/^_=<>!()[]{}|.,;:'\"$&%#~? \n", *string.ascii_letters, "\\frac", "\\sqrt", "\\boxed{", "\\text{",
    "\\left(", "\\right)", "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "\\cup ", "\\cap ", "\\setminus ", "\\infty",
    "\\pm ", "\\sin ", "\\log_", "\\ln", "\\pi", "\\binom", "\\overline{", "\\{", "\\}", "\\mathbb{R}", "\\leq ",
    "\\neq", "\\in ", "\\approx ", "\\cdot ", "\\times", "\\div", "\\%", "\\$", "^\\circ", "\\ldots", "\\sum_{n=1}^",
    "\\int", "\\lim", "\\gcd", "\\choose", "\\over", "\\pmod", " or ", " and ", "</think>", "<think>", "<answer>",
    "</answer>", "The answer is ", "#### ", "{1}{2}", "x^{2}", "10^{", "cm", " km", "million", "°", "½", "√", "²", "−",
    "×", "π", "é", "中", "答案是", "\u200b", "\x00", "\ud800", "inf", "nan",
]  # fmt: skip
fragments = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
any_text = st.one_of(fragments, st.text(max_size=60))


@SETTINGS
@given(any_text, any_text)
def test_any_two_texts_get_a_verdict_in_time(response, gold):
    start = time.monotonic()
    result = check(response, gold, timeout=1.0)
    assert isinstance(result.verdict, Verdict)
    assert isinstance(same_answer(response, gold, timeout=1.0), bool)
    assert grade_many([response], [gold], timeout=1.0)[0] in set(Verdict)
    assert time.monotonic() - start < 15  # three checks of a second, with the start of a worker


@SETTINGS
@given(any_text)
def test_every_answer_equals_itself_and_a_missing_one_equals_nothing(text):
    assert same_answer(text, text) == bool(text.strip())
    assert not same_answer("", text)
    assert not same_answer(text, "")


@SETTINGS
@given(any_text, st.sampled_from(["last", "first"]))
def test_extraction_takes_a_part_of_the_response_or_nothing(text, which):
    answer = extract_answer(text, which)
    assert answer is None or answer.strip()
    assert (
        extract_answer(text + " \\boxed{42}") in ("42", None)
        or answer is None
        or "42" in extract_answer(text + " \\boxed{42}")
    )


formulas = st.recursive(
    st.one_of(st.integers(0, 99).map(str), st.sampled_from(["x", "y", r"\pi", "2x", "0.5", r"\frac{1}{3}"])),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", r"\cdot "]), inner).map("".join),
        inner.map(lambda text: rf"\left({text}\right)"),
        inner.map(lambda text: rf"\sqrt{{{text}}}"),
        inner.map(lambda text: rf"\sin({text})"),
        st.tuples(inner, inner).map(lambda pair: rf"\frac{{{pair[0]}}}{{{pair[1]}}}"),
        inner.map(lambda text: f"({text})^2"),
    ),
    max_leaves=6,
)


@SETTINGS
@given(formulas, formulas)
def test_equality_of_formulas_is_symmetric(left, right):
    assert same_answer(left, right, timeout=20) == same_answer(right, left, timeout=20)


zeros = st.sampled_from([
    r"\sin\pi", r"\tan\pi", r"\cos(90^\circ)", r"\cos\frac{\pi}{2}", r"\log_2 8-3", r"e^{i\pi}+1",
    r"\sqrt{8}-2\sqrt{2}", r"\ln(e^2)-2", r"\tan(45^\circ)-1", "0",
])  # fmt: skip
near_zeros = st.recursive(  # formulas in which something is zero that is not seen to be
    zeros | st.sampled_from(["1", "-2", "100", "x", "i", r"\pi", r"\frac{1}{2}"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-"), inner).map("({0[0]}){0[1]}({0[2]})".format),
        st.tuples(inner, inner).map("({0[0]})({0[1]})".format),
        st.tuples(inner, inner).map(r"\frac{{{0[0]}}}{{{0[1]}}}".format),
        st.tuples(inner, inner).map("({0[0]})^{{{0[1]}}}".format),
        st.tuples(inner, st.sampled_from(["2", "-1", "-2", "9", "-40"])).map("({0[0]})^{{{0[1]}}}".format),
        st.tuples(st.sampled_from([r"\sin", r"\tan", r"\ln", r"\sqrt", r"\exp", "abs", "floor"]), inner).map(
            lambda pair: f"{pair[0]}({pair[1]})"
        ),
    ),
    max_leaves=5,
)


@SETTINGS
@given(zeros, near_zeros, st.integers(0, 3))
def test_nothing_is_right_for_two_answers(zero, formula, power):
    for prediction in (formula, f"({zero})^{power}+{formula}", f"({formula})({zero})^{power}"):
        assert not (same_answer(prediction, "7") and same_answer(prediction, "x+1"))


DRESSES = [
    r"\,{}",
    "{} ",
    "{{{}}}",
    r"\displaystyle {}",
    "${}$",
    r"\({}\)",
    r"\boxed{{{}}}",
    r"\left({}\right)",
    "\n{}\n",
    r"{} \;",
]


@SETTINGS
@given(formulas, st.lists(st.sampled_from(DRESSES), max_size=3), st.sampled_from(["", ".", " ."]))
def test_spacing_and_redundant_braces_change_nothing(formula, dresses, end):
    dressed = formula
    for dress in dresses:
        dressed = dress.format(dressed)
    dressed += end
    assert same_answer(dressed, formula, timeout=20)
    assert same_answer(formula.replace("+", " + ").replace(r"\cdot ", r" \times "), formula, timeout=20)


@SETTINGS
@given(st.text(string.ascii_letters + string.digits + " +-,.", min_size=1, max_size=30), any_text)
def test_the_last_box_counts(answer, before):
    assume(answer.strip() and "<" not in before and "\\" not in before)
    assert extract_answer(f"{before} So \\boxed{{{answer}}} it is.") == answer.strip()
