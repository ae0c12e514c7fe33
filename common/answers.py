r"""Take the final answer out of a response, and decide whether two answers are the same.

Policy, in one place (the tests hold a table of it):

* What counts as an answer: the last (or first) balanced `\boxed{}`, else an explicit marker ("The answer is",
  "Answer:", "#### ", `<answer>`, and their equivalents in a few languages). There is no fallback to "any number".
  Only text after `</think>` counts; an unfinished `<think>` commits to nothing. Boxes joined by "and" or commas are
  one list.
* Value decides, not spelling: 0.5 = 1/2, 1{,}000 = 1000, sqrt(8) = 2 sqrt(2). Decimals are exact: 0.333 is not 1/3.
* Order is free in sets and lists ("2 or 3"), not in tuples. Bracket kinds must match. Variable names must match.
* A unit, currency or degree sign may be missing on one side; two of them must agree. A percent sign is such a unit:
  50% equals 50 and 50 percent, never 0.5.
* A gold letter A-J is a choice letter. Hedges ("5 or 7", "A or B", "5=7") are wrong.
* An equality chain ("x = 5 + 6 = 11") is right when every part of it equals the gold answer.

Comparison has layers: identical text, exact numbers, structure, and last a computer algebra check in a separate
process that is killed when it is late (`common._worker`). Nothing here evaluates code, and every input has a limit on
its size first.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache

from common import _worker

__all__ = ["Verdict", "extract_answer", "grade", "grade_many", "judge", "same_answer"]

_MAX_CHARS = 4000  # an answer, not a response; the longest gold answer of the usual benchmarks has about 300
_MAX_DEPTH = 40
_MAX_DIGITS = 1000
_MAX_EXPONENT = 2000  # of ten, in scientific notation


class Verdict(StrEnum):
    """Outcome of one check. Only `CORRECT` earns a reward; the others say why not."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    UNPARSEABLE = "unparseable"
    TIMEOUT = "timeout"
    GOLD_UNPARSEABLE = "gold_unparseable"


# ---------------------------------------------------------------------------------------------------------------------
# Extraction
# ---------------------------------------------------------------------------------------------------------------------

_TURN_END = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text)\|>|</s>")
_TURN_START = re.compile(r"\s*<\|im_start\|>\s*assistant\s*")
_BOX_TOKEN = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\(?:boxed|fbox)(?:\s+|(?=\d))(?P<bare>[^\s{}$\\,;]+)|\\.|[{}]", re.DOTALL
)
_BOX_JOIN = re.compile(
    r"(?:[\s$,;}]|\\[,;:!()\[\]]|\\q?quad|\\text\w*\s*\{|\b(?:and|or|for part \(\w\))\b|[,、和或])*", re.IGNORECASE
)
_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_MAX_MARKS = 20  # markers tried before giving up, when the nearest ones are followed by nothing
_MARKER = re.compile(
    r"""(?ix) (?:^|(?<=\n))\#{4}\s+ |
    \b(?:answers? | (?:correct|right|best)\s+(?:option|choice))\b [\s*_]* (?:\b(?:is|are)\b|[:=：]) [\s*_:：]* |
    \b(?:réponse|respuesta|resposta|risposta|antwort)\b [\s*_]* (?:\b(?:est|es|é|è|ist)\b|[:：]) [\s*_:：]* |
    (?:答案|答)\s*\**\s*(?:应该是|应为|就是|是|为|[:：])[\s*:：]*"""
)
_FILLER = re.compile(
    r"(?i)(?:for sure|definitely|clearly|simply|just|therefore|thus|indeed|certainly|probably|likely|exactly)\b[\s,:]*"
)
_SENTENCE_END = re.compile(r"\.(?=\s|$|\*)|。|\n|</?\w+>")
_REASON = re.compile(
    r"(?i)(?:,\s*(?:it|i|we|you|that|this)\b|,?\s+(?:because|since|which|as(?! well)|so)\b).*", re.DOTALL
)
_COPULA = re.compile(r"(?i)(?:the|this|that|there|its|our)\b.*\b(?:is|are|equals|equal to)\b\s*(.+)", re.DOTALL)
_COPULA_ZH = re.compile(r"[\u4e00-\u9fff].*(?:是|为|等于)\s*(.+)", re.DOTALL)


def extract_answer(response: str, which: str = "last") -> str | None:
    r"""Return the committed final answer of a response, or None when it commits to none.

    `which="last"`: the last balanced `\boxed{}`, else the last explicit marker. `which="first"`: whichever of them
    comes earliest (VA-OPD's evaluation rule; a later correction does not override). An empty box is no answer.
    """
    if which not in ("last", "first"):
        raise ValueError(f'which must be "last" or "first", not {which!r}')
    text = _own_words(response)
    boxes = _boxes(text)
    marked = None if boxes and which == "last" else _marked(text, which)
    if marked and (not boxes or marked[0] < boxes[0][0]):
        return marked[1]
    return (boxes[-1 if which == "last" else 0][2] or None) if boxes else None


def _own_words(response: str) -> str:
    """The part of a response that speaks to the reader: after the thinking, before any end-of-turn token."""
    text = _TURN_START.sub("", response, count=1) if response.lstrip().startswith("<|im_start|>") else response
    end = _TURN_END.search(text)
    text = text[: end.start()] if end else text
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after
    return "" if text.lstrip().startswith("<think>") else text


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Outermost balanced boxes as (start, end, content); boxes joined by "and" or commas are one. Linear time."""
    found: list[tuple[int, int, int, int]] = []  # start, end, start and end of the content
    stack: list[tuple[int, int] | None] = []
    for token in _BOX_TOKEN.finditer(text):
        if token["box"]:
            stack.append(token.span())
        elif token["bare"]:
            found.append((*token.span(), *token.span("bare")))
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack and (opened := stack.pop()):
            while found and found[-1][0] > opened[0]:
                found.pop()
            found.append((opened[0], token.end(), opened[1], token.start()))
    return _join_boxes(text, [(start, end, text[first:last].strip()) for start, end, first, last in found])


def _join_boxes(text: str, boxes: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    joined: list[tuple[int, int, str]] = []
    for start, end, content in boxes:
        between = text[joined[-1][1] : start] if joined else ""
        is_list = 0 < len(between) <= 60 and re.search(r"(?i),|;|\band\b|\bor\b|[、和或]", between)
        if is_list and _BOX_JOIN.fullmatch(between):
            start, content = joined[-1][0], f"{joined.pop()[2]}, {content}"
        joined.append((start, end, content))
    return joined


def _marks(text: str) -> list[tuple[int, int, int]]:
    """(start, start of the content, its end or -1 where the sentence decides) of every answer marker, in order."""
    marks = [(m.start(), m.end(), -1) for m in _MARKER.finditer(text)]
    opened = None
    for tag in _TAG.finditer(text):
        if opened and tag[0][1] == "/":
            marks.append((opened.start(), opened.end(), tag.start()))
        opened = tag if tag[0][1] != "/" else None
    return sorted(marks)


def _marked(text: str, which: str) -> tuple[int, str] | None:
    """(position, answer) of the last or first marker that an answer follows."""
    marks = _marks(text)
    for start, content, end in marks[: -_MAX_MARKS - 1 : -1] if which == "last" else marks[:_MAX_MARKS]:
        clause = text[content:end] if end >= 0 else _clause(text[content : content + _MAX_CHARS])
        if answer := _clean_clause(clause, is_sentence=end < 0):
            return start, answer
    return None


def _clean_clause(clause: str, is_sentence: bool) -> str | None:
    if boxes := _boxes(clause):
        return boxes[0][2] or None
    while inner := _MARKER.search(clause):  # "Final Answer: The final answer is 5"
        clause = clause[inner.end() :]
    clause = clause.strip().strip("*_`").strip()
    while filler := _FILLER.match(clause):
        clause = clause[filler.end() :]
    if is_sentence:
        clause = _REASON.sub("", clause, count=1)
        copula = _COPULA.match(clause) or _COPULA_ZH.match(clause)
        clause = copula[1] if copula else clause
    return clause.strip(" \t\n*_`") or None


def _clause(rest: str) -> str:
    """The sentence that follows a marker; a formula between delimiters is never cut."""
    rest = rest.lstrip(" \t\n*_:：")
    opening = re.match(r"\$\$|\$|\\\(|\\\[|\\begin\{", rest)
    inside = 0
    if opening:
        closing = {"\\(": "\\)", "\\[": "\\]", "\\begin{": "\\end{"}.get(opening[0], opening[0])
        inside = max(rest.find(closing, opening.end()), 0)
        if inside and opening[0] in ("$$", "\\["):
            return rest[: inside + 2]
    end = _SENTENCE_END.search(rest, inside)
    return rest[: end.start()] if end else rest


# ---------------------------------------------------------------------------------------------------------------------
# Normal form
# ---------------------------------------------------------------------------------------------------------------------

_SYMBOLS = str.maketrans(
    dict.fromkeys("−–—‒‐‑﹣－", "-")
    | dict.fromkeys("·⋅∙×✕", "\\cdot ")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f", "")
    | dict.fromkeys("’′ʹ", "'")
    | {"÷": "/", "⁄": "/", "∕": "/", "∛": "\\sqrt[3] ", "∞": "\\infty ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in "}
    | {"≤": "\\leq ", "≥": "\\geq ", "≠": "\\neq ", "≈": "\\approx ", "°": "^\\circ ", "±": "\\pm ", "∓": "\\mp "}
    | {"∅": "\\emptyset ", "。": ".", "、": ",", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "…": "\\ldots "}
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n")
_BROKEN = "\ufffd"  # control characters, direction overrides and lone surrogates become this, which equals nothing


def _fold_unicode(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀-₉ₙ]+", lambda m: f"_{{{m[0].translate(_LOWERED)}}}", text)
    text = re.sub(r"√\s*(\d+|\w|\([^()]*\))", r"\\sqrt{\1}", text)
    return "".join(map(_fold_char, text.translate(_SYMBOLS)))


@lru_cache(maxsize=4096)
def _fold_char(char: str) -> str:
    if char.isascii():
        return char if char.isprintable() else " " if char in "\t\n\r\v\f" else _BROKEN
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn"):
        return _BROKEN
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    plain = unicodedata.normalize("NFKC", char)
    if unicodedata.category(char) == "No" and "\u2044" in plain:
        return "\\frac{{{}}}{{{}}}".format(*plain.split("\u2044"))
    name = unicodedata.name(plain[0], "") if len(plain) == 1 else ""
    if greek := re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", name):
        letter = greek[2].lower().replace("lamda", "lambda")
        return f"\\{letter if greek[1] == 'SMALL' else letter.capitalize()} "
    return plain


_OPENING, _CLOSING = "([{", ")]}"
_A = r"(?![A-Za-z])"  # end of a LaTeX command
_O = r"(?<!\\)"  # not the second half of a row break
_REWRITES = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r"(\d)\s*(?:\{\s*,\s*\}|,\s*\\!)\s*(?=\d{3})", r"\1"),
        (_O + r"\\([%#&_])", r"\1"),
        (_O + r"\\\$", "¤"),
        (_O + r"\\[,;:> ]|~|\\(?:q?quad|thinspace|enspace)" + _A + r"|\\hspace\*?\{[^{}]*\}", " "),
        (_O + r"(?:\\[()\[\]!])|\$", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?)" + _A + r"\.?", ""),
        (r"\\(?:displaystyle|textstyle|rm|bf|it|limits)" + _A, ""),
        (r"\\[dtc]frac" + _A, r"\\frac"),
        (r"\\frac\s*([0-9A-Za-z])\s*([0-9A-Za-z])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9A-Za-z])\s*(?=\{)", r"\\frac{\1}"),
        (r"(\\frac\s*\{(?:[^{}]|\{[^{}]*\})*\})\s*([0-9A-Za-z])", r"\1{\2}"),
        (r"\\frac\s+(?=\{)", r"\\frac"),
        (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}"),
        (r"\\(?:mathbf|boldsymbol|bm|mathit|mathbit|vec)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:text\w*|mbox|hbox|mathrm|mathsf|emph)\s*\{\s*([^{}]*?)\s*\}", r"\\text{\1}"),
        (r"(?<![\d})])( ?)\\text\{([^A-Za-z{}]*[A-Za-z]?[^A-Za-z{}]*)\}", r"\1\2"),
        (r"\\text\{([^A-Za-z{}]*[^mshgLKJNWV{}]?[^A-Za-z{}]*)\}", r"\1"),  # after a number, `\text{m}` is a unit
        (r"\\l?brace" + _A + r"|\\lbrace" + _A, r"\\{"),
        (r"\\rbrace" + _A, r"\\}"),
        (r"\\(?:[lr]?vert|mid)" + _A, "|"),
        (r"\\(?:leqslant|leqq|le)" + _A + "|<=", r"\\leq "),
        (r"\\(?:geqslant|geqq|ge)" + _A + "|>=", r"\\geq "),
        (r"\\lt" + _A, "<"),
        (r"\\gt" + _A, ">"),
        (r"\\ne" + _A + "|!=", r"\\neq "),
        (r"\\(?:simeq|sim)" + _A, r"\\approx "),
        (r"==|:=", "="),
        (r"\*\*", "^"),
        (r"\\(?:times|ast)" + _A + r"|\*", r"\\cdot "),
        (r"\\div" + _A, "/"),
        (r"\\[cd]?dots" + _A, r"\\ldots "),
        (r"\\varnothing" + _A + r"|\\\{\s*\\\}", r"\\emptyset "),
        (r"(?<![A-Za-z\\])(?:infinity|infty|inf|oo)" + _A, r"\\infty "),
        (r"\+\s*\\infty", r"\\infty"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree" + _A, r"\\text{degrees}"),
        (r"\\text\{\s*,?\s*(?:and|or|et|ou|und|oder)\s*,?\s*\}|\\(?:lor|vee|land|wedge)" + _A, ","),
        (r"(?<![A-Za-z\\])(?:and|or)" + _A + "|[和或]", ","),
        (r",\s*(?=,)|,\s*$", ""),
        (r"\s+", " "),
    )
]
_LEAD = re.compile(r"(?i)^\s*(?:final\s+)?answers?\b\s*(?:is\b|are\b)?[\s:]*(?=\S)")


def _normalise(text: str) -> str:
    """One spelling for one meaning: Unicode and LaTeX synonyms folded, delimiters dropped, "and" as a comma."""
    text = _fold_unicode(text).strip()
    text = _LEAD.sub("", text.strip("*").strip())
    boxes = _boxes(text)
    if len(boxes) == 1 and boxes[0][:2] == (0, len(text)):
        text = boxes[0][2]
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text)
    return re.sub(r"(?:[\s.,;:]|(?<!\\)\\)+$", "", text).strip()


def _key(text: str) -> str:
    """For the test "same text": spaces dropped, except between digits (1 1/4 is not 11/4)."""
    return re.sub(r"([_^])\{(\w)\}(?!\w)", r"\1\2", re.sub(r"(?<!\d) | (?!\d)", "", text))


_EXPLOSIVE = re.compile(
    r"(?:\^-?\w+){3}|\^\(?-?\d{6}"  # bare power towers; huge exponents
    r"|\d{5}[)}]*!|![)}\]]*!"  # huge and repeated factorials
    r"|\\binom\{[^{}]*(?:\d{5}|\^)"
)


def _within_limits(text: str) -> bool:
    """Whether a normalised answer is small enough to work on, judged by its text alone."""
    if len(text) > _MAX_CHARS or re.search(rf"\d{{{_MAX_DIGITS}}}", text):
        return False
    text = text.replace(" ", "")
    raised: list[bool] = []  # for each open bracket: is it an exponent?
    for i, char in enumerate(text):
        if char in _OPENING:
            raised.append(text[i - 1 : i] == "^")
            if len(raised) > _MAX_DEPTH or (raised[-1] and sum(raised) > 2):
                return False
        elif char in _CLOSING and raised:
            raised.pop()
    return not _EXPLOSIVE.search(re.sub(r"\^\{([^{}]*)\}", r"^\1 ", text))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------

_INT = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?!\d)|\d+"
_DECIMAL = re.compile(rf"(?:(?:{_INT})(?:\.\d*)?|\.\d+)")
_SIGNED = rf"[+-]? ?{_DECIMAL.pattern}"
_QUOTIENT = re.compile(
    rf"(?:\\frac ?\{{ ?({_SIGNED}) ?\}} ?\{{ ?({_SIGNED}) ?\}}|\(?({_SIGNED})\)? ?/ ?\(?({_SIGNED})\)?)"
)
_MIXED = re.compile(r"(\d+) ?(?:\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}|(?<= )(\d+) ?/ ?(\d+))")
_SCIENTIFIC = re.compile(rf"({_SIGNED})(?: ?(?:\\cdot|x) ?10 ?\^ ?\{{? ?([+-]?\d+) ?\}}?|[eE]([+-]?\d+))")


def _number(text: str) -> Fraction | None:
    """The exact value of a numeral: integer, decimal, fraction, mixed number or scientific notation; else None."""
    text = text.strip()
    sign = -1 if re.match(r"-(?! ?-)", text) else 1
    body = text[1:].strip() if text[:1] in ("+", "-") else text
    if _DECIMAL.fullmatch(body):
        return sign * _exact(body)
    if part := _MIXED.fullmatch(body):
        whole, top, bottom = (int(group) for group in part.groups() if group)
        return sign * (whole + Fraction(top, bottom)) if top < bottom else None
    if part := _QUOTIENT.fullmatch(body):
        top, bottom = (_exact(group) for group in part.groups() if group)
        return sign * top / bottom if bottom else None
    if part := _SCIENTIFIC.fullmatch(body):
        mantissa, power = (group for group in part.groups() if group)
        return sign * _exact(mantissa) * Fraction(10) ** int(power) if abs(int(power)) <= _MAX_EXPONENT else None
    return None


def _exact(text: str) -> Fraction:
    return Fraction(re.sub("[ ,]", "", text).rstrip("."))


_UNIT_NAMES = """
deg degrees degree | % percent pct percentage | ¤ dollars dollar USD | cent cents | € euros euro EUR | £ GBP
¥ yen yuan RMB | ₹ rupees rupee | cm centimeters centimeter centimetres centimetre | mm millimeters millimeter
m meters meter metres metre | km kilometers kilometer kilometres | inch inches | ft feet foot | mi miles mile
yd yards | s sec seconds second | min mins minutes minute | h hr hrs hours hour | day days | week weeks | month months
year years | g grams gram | kg kilograms kilogram | mg milligrams | lb lbs pounds pound | oz ounces
L liters liter litres litre | mL ml milliliters | unit units | mph | km/h kph | m/s | joules J | newtons N
watts W | volts V | Hz hertz | people persons person students student | way ways | rad radians radian
"""
_UNITS = {name: names.split()[0] for names in re.split(r"[|\n]", _UNIT_NAMES) for name in names.split()}
_AMBIGUOUS = frozenset("mshgLJNWV")  # also variables: never stripped from a gold answer
_POWER_WORD = {"square": "^2", "sq": "^2", "cubic": "^3"}
_NO_UNIT = re.compile(  # multipliers and hedges: text that changes the value before it
    r"(?i)\d|\b(?:hundred|thousand|(?:m|b|tr)illion|dozen|pi|half|halves|thirds?|quarters?"
    r"|or|and|not|maybe|perhaps|possibly|either|else|wrong|incorrect)\b"
)
_TRIGONOMETRIC = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])")  # their degrees are no unit of the result
_TRAILING_UNIT = re.compile(
    r"(?P<value>.*[\d)}\]]) ?"
    r"(?P<unit>\\text\{[^{}]*\}|%|(?:(?:square|sq|cubic)\.? )?[A-Za-z/]+|[¤€£¥₹]|[\u4e00-\u9fff]+)"
    r"(?P<power> ?\^ ?\{? ?[23] ?\}?)?"
)


def _split_unit(text: str, keep: frozenset[str] = frozenset()) -> tuple[str, str | None]:
    """`("15", "cm^2")` from `15\\text{ cm}^2`; None for no unit. Units in `keep` are left where they are."""
    if sign := re.match(r"(-? ?)([¤€£¥₹]) ?(.+)", text):
        return sign[1] + sign[3], sign[2]
    part = _TRAILING_UNIT.fullmatch(text)
    if not part or part["unit"] in keep or _TRIGONOMETRIC.search(part["value"]):
        return text, None
    wrapped = part["unit"].startswith("\\text{")
    words = part["unit"][6:-1].strip() if wrapped else part["unit"]
    lead, _, rest = words.partition(" ")
    power = _POWER_WORD.get(lead.rstrip("."), "") or re.sub(r"[^\d^]", "", part["power"] or "")
    name = rest if lead.rstrip(".") in _POWER_WORD else words
    known = _UNITS.get(name) or ("%" if name.lower().startswith("percent") else None)
    foreign = wrapped or not name.isascii()
    if not known and (not foreign or _NO_UNIT.search(name) or not name):
        return text, None
    return part["value"].strip(), (known or name.lower()) + power


_NAME = re.compile(  # possessive, so that no input makes it backtrack
    r"(?:[A-Za-z]|_ ?\{? ?\w+ ?\}?|\( ?-?\w+ ?\)|[|:'(),/{} ]|\\(?:angle|triangle|overline|frac|text|var\w+|alpha|beta"
    r"|gamma|delta|theta|lambda|mu|phi|omega|rho|sigma|tau|epsilon|eta|xi|psi|Delta|Omega)(?![a-zA-Z]))++"
)
_RELATION = re.compile(r"=|<|>|\\leq|\\geq|\\neq|\\in(?![a-z])|\\subset")
_FLIP = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
_MATRIX = re.compile(r"\\begin ?\{[pbB]?(?:matrix|array)\}(?: ?\{[clr| ]*\})?(.*)\\end ?\{[pbB]?(?:matrix|array)\}")
_WORD = r"[A-Za-z][a-z'-]{3,}|yes|no|none|odd|even|all|any|one|two|six|ten|not|the|of|to|red|east|west"
_TEXT = re.compile(rf"(?i)(?:{_WORD})(?:[\s,]+[A-Za-z'-]+)*+")
_FUNCTIONS = re.compile(
    r"(?i)(?<![a-z])(?:a?(?:sin|cos|tan|cot|sec|csc)h?|arc\w+|sqrt|log|ln|exp|gcd|lcm|theta|alpha|beta|gamma)(?![a-z])"
)


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split at the separators that lie outside all brackets; the separators themselves are kept at odd positions."""
    parts, depth, start = [], 0, 0
    cuts = {m.start(): m.end() for m in separator.finditer(text)}
    for i, char in enumerate(text):
        if depth == 0 and i in cuts and i >= start:
            parts += [text[start:i].strip(), text[i : cuts[i]]]
            start = cuts[i]
        depth = max(0, depth + (char in _OPENING) - (char in _CLOSING))
    return [*parts, text[start:].strip()]


_COMMA, _CUP, _COLON = re.compile("[,;]"), re.compile(r"\\cup"), re.compile(":")


def _bare(text: str) -> str:
    """Without brackets that only group: `{x}`, `(x)`; a bracket round a list stays, it means something."""
    text = text.strip()
    while text[:1] in ("(", "{") and _closes(text) == len(text) - 1 and text[-1] == {"(": ")", "{": "}"}[text[0]]:
        if len(_split(text[1:-1], _COMMA)) > 1:
            break
        text = text[1:-1].strip()
    return text


def _closes(text: str) -> int:
    """Index of the bracket that closes the first one, -1 if none does."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth <= 0:
            return i
    return -1


def _items(text: str) -> tuple[str, list[str]]:
    """(kind, elements): "set" for braces, "list" for bare commas, "one" for neither. A plus-minus is two elements."""
    inner = re.fullmatch(r"\\?\{(.*?)\\?\}", text)
    is_set = inner and _closes(text.removeprefix("\\")) >= len(text) - 2
    parts = [part for part in _split(inner[1] if is_set else text, _COMMA)[::2] if part]
    upper = [part.replace("\\pm", "+").replace("\\mp", "-") for part in parts]
    lower = [part.replace("\\pm", "-").replace("\\mp", "+") for part in parts if "\\pm" in part]
    return "set" if is_set else "list" if len(upper + lower) > 1 else "one", upper + lower


def _assignment(text: str) -> tuple[str | None, list[str]]:
    """`("x", ["5+6", "11"])` from `x = 5+6 = 11`; the name is None when the left side is more than a name."""
    parts = _split(text, _RELATION)
    if len(parts) < 3 or any(op not in ("=", "\\in") for op in parts[1::2]):
        return None, [text]
    if len(parts) > 3 and len(_split(text, _COMMA)) > 1:  # "x=1, y=2" is a list of assignments
        return None, [text]
    name = _key(parts[0]) if _NAME.fullmatch(parts[0]) else None
    return name, parts[2::2] if name else parts[::2]


def _as_interval(text: str) -> tuple[str, str] | None:
    """`("x", "[-2,7]")` from `-2 \\leq x \\leq 7`; None when it is no inequality on one name."""
    parts = _split(text, _RELATION)
    terms, ops = parts[::2], parts[1::2]
    if not ops or len(ops) > 2 or any(op not in _FLIP for op in ops):
        return None
    if ops[0] in (">", "\\geq"):  # small end first
        terms, ops = terms[::-1], [_FLIP[op] for op in reversed(ops)]
    if len(ops) == 1:
        bounded_above = _NAME.fullmatch(terms[0])
        terms = [r"-\infty", *terms] if bounded_above else [*terms, r"\infty"]
        ops = ["<", *ops] if bounded_above else [*ops, "<"]
    if not _NAME.fullmatch(terms[1]) or not {"<", "\\leq"}.issuperset(ops):
        return None
    return _key(terms[1]), f"{'(' if ops[0] == '<' else '['}{terms[0]},{terms[2]}{')' if ops[1] == '<' else ']'}"


_BASED = re.compile(r"\d+ ?_ ?\{? ?\d+ ?\}?")
_SET_ALGEBRA = re.compile(r"\\(?:cup|cap|setminus|mathbb|emptyset)")
_MAX_ITEMS = 64  # larger collections are compared by their sorted texts


def _exact_side(text: str) -> str:
    """`\\frac{1}{3}` from `\\frac{1}{3} \\approx 0.33`, but `11` from `x \\approx 11`."""
    left, *right = (part for part in _split(text, re.compile(r"\\approx"))[::2])
    return right[0] if right and (not left or _NAME.fullmatch(left)) else left


def _is_text(text: str) -> bool:
    unwrapped = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    only_text = unwrapped != text and not re.sub(r"\\text\{[^{}]*\}", "", text).strip()
    return only_text or (bool(_TEXT.fullmatch(unwrapped)) and not _FUNCTIONS.search(unwrapped))


def _fold_text(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.replace("\\text", " ")).strip().casefold()


class _NeedsAlgebra(Exception):
    """Raised in the calling process: text and exact numbers do not decide this pair."""


class _Comparison:
    """One comparison of two normalised answers. Each step returns True, False, or None for "not my kind of answer"."""

    def __init__(self, deadline: float, algebra: Callable[[str, str], bool | str] | None = None) -> None:
        self.deadline = deadline  # time.monotonic()
        self.algebra = algebra  # (prediction, gold) -> equal?, or "prediction" / "gold": the side that cannot be read
        self.unreadable: set[str] = set()

    def same(self, p: str, g: str) -> bool:
        if time.monotonic() > self.deadline:
            raise TimeoutError
        p, g = _bare(_exact_side(p)), _bare(_exact_side(g))
        if not p or not g or _key(p) == _key(g):
            return bool(p and g and _BROKEN not in p)
        for step in (
            self._numbers, self._units, self._names, self._unions, self._collections, self._relations,
            self._brackets, self._matrices, self._ratios, self._texts,
        ):  # fmt: skip
            if (result := step(p, g)) is not None:
                return result
        return self._algebra(p, g)

    def _numbers(self, p: str, g: str) -> bool | None:
        if _BASED.fullmatch(p) or _BASED.fullmatch(g):
            return False  # the same digits in the same base were settled by the text
        left, right = _number(p), _number(g)
        return None if left is None or right is None else left == right

    def _units(self, p: str, g: str) -> bool | None:
        g_value, g_unit = _split_unit(g, keep=_AMBIGUOUS)
        p_value, p_unit = _split_unit(p, keep=_AMBIGUOUS.intersection(g_value))
        if p_unit is None and g_unit is None:
            return None
        return (p_unit is None or g_unit is None or p_unit == g_unit) and self.same(p_value, g_value)

    def _names(self, p: str, g: str) -> bool | None:
        (p_name, p_parts), (g_name, g_parts) = _assignment(p), _assignment(g)
        if p_name and g_name and p_name != g_name:
            return None
        p_equation, g_equation = p_name is None and len(p_parts) > 1, g_name is None and len(g_parts) > 1
        if g_equation or (p_equation and g_name) or not (p_name or g_name or p_equation):
            return None
        return all(self.same(part, g_parts[-1]) for part in p_parts)

    def _unions(self, p: str, g: str) -> bool | None:
        p_parts, g_parts = _split(p, _CUP)[::2], _split(g, _CUP)[::2]
        if len(p_parts) == len(g_parts) == 1:
            return None
        p_parts, g_parts = (x if len(x) > 1 else _items(x[0])[1] for x in (p_parts, g_parts))
        return self._match(p_parts, g_parts) or self._algebra(p, g)

    def _collections(self, p: str, g: str) -> bool | None:
        (p_kind, p_items), (g_kind, g_items) = _items(p), _items(g)
        if p_kind == g_kind == "one" or _SET_ALGEBRA.search(p + g):
            return None
        return "one" not in (p_kind, g_kind) and self._match(p_items, g_items)

    def _match(self, p_items: list[str], g_items: list[str]) -> bool:
        """Equal as multisets. Equality is an equivalence, so that taking the first match is enough."""
        if len(p_items) != len(g_items) or len(g_items) > _MAX_ITEMS:
            return sorted(map(_key, p_items)) == sorted(map(_key, g_items))
        left = list(p_items)
        for item in g_items:
            found = next((i for i, other in enumerate(left) if self.same(other, item)), None)
            if found is None:
                return False
            del left[found]
        return True

    def _relations(self, p: str, g: str) -> bool | None:
        p_is, g_is = len(_split(p, _RELATION)) > 1, len(_split(g, _RELATION)) > 1
        if not p_is and not g_is:
            return None
        p_range, g_range = _as_interval(p), _as_interval(g)
        if p_range and g_range and p_range[0] == g_range[0]:
            return self.same(p_range[1], g_range[1])
        if p_is and g_is:
            return self._algebra(p, g)
        return bool(p_range or g_range) and self.same(p_range[1] if p_range else p, g_range[1] if g_range else g)

    def _brackets(self, p: str, g: str) -> bool | None:
        p_is, g_is = (x[0] in "([" and x[-1] in ")]" and _closes(x) == len(x) - 1 for x in (p, g))
        if not p_is and not g_is:
            return None
        if (p[0], p[-1]) != (g[0], g[-1]) or p_is != g_is:
            return self._algebra(p, g) if _SET_ALGEBRA.search(p + g) else False
        p_items, g_items = _split(p[1:-1], _COMMA)[::2], _split(g[1:-1], _COMMA)[::2]
        return len(p_items) == len(g_items) and all(map(self.same, p_items, g_items))

    def _matrices(self, p: str, g: str) -> bool | None:
        tables = [_MATRIX.fullmatch(x) for x in (p, g)]
        if not all(tables):
            return None if ("\\begin" in p and "\\begin" in g) or not any(tables) else False
        p_rows, g_rows = ([row.split("&") for row in re.split(r"\\\\", t[1].strip(" \\"))] for t in tables)
        if list(map(len, p_rows)) != list(map(len, g_rows)):
            return False
        return all(all(map(self.same, *rows)) for rows in zip(p_rows, g_rows, strict=True))

    def _ratios(self, p: str, g: str) -> bool | None:
        p_terms, g_terms = _split(p, _COLON)[::2], _split(g, _COLON)[::2]
        if len(p_terms) == 1 or len(g_terms) == 1:
            return None
        return len(p_terms) == len(g_terms) and all(map(self.same, p_terms, g_terms))

    def _texts(self, p: str, g: str) -> bool | None:
        p_text, g_text = _is_text(p), _is_text(g)
        return None if not p_text and not g_text else g_text and _fold_text(p) == _fold_text(g)

    def _algebra(self, p: str, g: str) -> bool:
        if self.algebra is None:
            raise _NeedsAlgebra
        result = self.algebra(p, g)
        if isinstance(result, str):
            self.unreadable.add(result)
        return result is True


def decide(p: str, g: str, deadline: float, algebra: Callable[[str, str], bool | str] | None = None) -> Verdict:
    """Compare two normalised answers; the worker calls this too, with its `algebra`. May raise `TimeoutError`."""
    comparison = _Comparison(deadline, algebra)
    if comparison.same(p, g):
        return Verdict.CORRECT
    if "gold" in comparison.unreadable:
        return Verdict.GOLD_UNPARSEABLE
    return Verdict.UNPARSEABLE if "prediction" in comparison.unreadable else Verdict.WRONG


# ---------------------------------------------------------------------------------------------------------------------
# Choice letters
# ---------------------------------------------------------------------------------------------------------------------

_GOLD_CHOICE = re.compile(r"\(?([A-Ja-j])\)?|(?:\(([A-J])\)|([A-J])[.:)]) .+|([A-J]) [A-Z][a-z]+")
_CHOICE = re.compile(
    r"(?i:(?:the )?(?:correct )?(?:option|choice|answer|letter)(?: is)?:? ?)?[(\[]?(?:([A-J])|([a-j])(?=\W*$))[)\]]?"
    r"(?P<rest>(?:[.,:;)]| (?:because|since|as|non|not|is (?:the )?(?:correct|right|best|true)|[(-])(?!\w)).*)?",
    re.DOTALL,
)
_SECOND_CHOICE = re.compile(
    r"(.*?)(?:[,/&.;]|\b(?:maybe|perhaps|possibly|probably|also|either))[ (]*(?!A [a-z]|I\b)[A-J](?![\w'])"
)
_NEGATION = re.compile(r"(?i)n't|\b(?:not|non|wrong|incorrect|false|rather|because|since)\b")


def gold_letter(gold: str) -> str | None:
    """The choice letter that a gold answer is or begins with ("C", "(C)", "C. Neon", "(C) Neon"); None without one."""
    found = _GOLD_CHOICE.fullmatch(_normalise(gold)) if len(gold) <= _MAX_CHARS else None
    return next(filter(None, found.groups())).upper() if found else None


def chosen_letter(answer: str) -> str | None:
    """The choice letter that a short answer commits to ("(C)", "C. Neon", "option c"); None for none and for two."""
    if len(answer) > _MAX_CHARS:
        return None
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", _normalise(answer)).replace("**", "").strip()
    found = _CHOICE.fullmatch(text)
    if not found:
        return None
    second = _SECOND_CHOICE.match(found["rest"] or "")
    if second and not _NEGATION.search(second[1]):
        return None
    return (found[1] or found[2]).upper()


# ---------------------------------------------------------------------------------------------------------------------
# Public checks
# ---------------------------------------------------------------------------------------------------------------------

_memo: dict[tuple[str, str], Verdict] = {}
_MEMO_SIZE = 20_000


def same_answer(prediction: str, gold: str, *, timeout: float = 5.0) -> bool:
    """Whether two answers (not responses) mean the same, by the policy at the top of this module.

    Never raises on any pair of strings, never evaluates code, and returns within `timeout` seconds (False then) from
    any thread, asyncio task or process. Not symmetric: `gold` is trusted.
    Raises `ImportError` where math-verify's parser is not installed: a silent False would look like a wrong answer.
    """
    return _check(_as_text(prediction), _as_text(gold), timeout) is Verdict.CORRECT


def judge(response: str, gold: str, *, which: str = "last", timeout: float = 5.0) -> Verdict:
    """Extract the answer of a response and compare it with `gold`; limits and errors are those of `same_answer`."""
    if not _as_text(gold).strip():
        return Verdict.GOLD_UNPARSEABLE
    answer = extract_answer(_as_text(response), which)
    return Verdict.NO_ANSWER if answer is None else _check(answer, _as_text(gold), timeout)


def grade(response: str, gold: str, *, which: str = "last", timeout: float = 5.0) -> bool:
    """`judge(...)` is CORRECT."""
    return judge(response, gold, which=which, timeout=timeout) is Verdict.CORRECT


def grade_many(
    responses: Sequence[str | None],
    golds: Sequence[str | None],
    *,
    workers: int | None = None,
    timeout: float = 5.0,
    which: str = "last",
) -> list[Verdict]:
    """`judge` for each pair, in order, with up to `workers` processes for the pairs that need algebra.

    `workers` defaults to the number of cores, at most 8. `timeout` is for each pair, counted from when a worker takes
    it; equal pairs are checked once. A response or gold answer that is None counts as an empty one.
    Raises `ValueError` for sequences of unequal length.
    """
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses but {len(golds)} gold answers")
    verdicts: list[Verdict | None] = []
    pending: dict[tuple[str, str], list[int]] = {}
    for i, (response, gold) in enumerate(zip(responses, golds, strict=True)):
        answer = extract_answer(_as_text(response), which)
        settled = _settle(answer or "", _as_text(gold), time.monotonic() + timeout)
        verdicts.append(settled if isinstance(settled, Verdict) else None)
        if not isinstance(settled, Verdict):
            pending.setdefault(settled, []).append(i)
    for pair, verdict in zip(pending, _ask_all(list(pending), workers, timeout), strict=True):
        for i in pending[pair]:
            verdicts[i] = verdict
    return verdicts


def exact_number(answer: str) -> Fraction | None:
    """The exact value of an answer that is a numeral, its unit left out; None for anything else."""
    if len(answer) > _MAX_CHARS or not _within_limits(text := _normalise(answer)):
        return None
    parts = _assignment(_bare(text))[1]
    return _number(_split_unit(_bare(parts[-1]))[0]) if len(parts) == 1 else None


def _as_text(value: object) -> str:
    """Data sets hold numbers and missing values in answer columns: None and NaN are no answer at all."""
    if value is None or value != value:
        return ""
    return value if isinstance(value, str) else str(value)


def _check(answer: str, gold: str, timeout: float) -> Verdict:
    deadline = time.monotonic() + timeout
    settled = _settle(answer, gold, deadline)
    return settled if isinstance(settled, Verdict) else _ask(settled, deadline - time.monotonic(), wait=False)


def _settle(answer: str, gold: str, deadline: float) -> Verdict | tuple[str, str]:
    """The verdict where text and exact numbers decide, else the normalised pair for a worker."""
    if not gold.strip():
        return Verdict.GOLD_UNPARSEABLE
    if not answer.strip():
        return Verdict.NO_ANSWER
    if answer.strip() == gold.strip():
        return Verdict.CORRECT
    if len(gold) > _MAX_CHARS or len(answer) > _MAX_CHARS:
        return Verdict.GOLD_UNPARSEABLE if len(gold) > _MAX_CHARS else Verdict.UNPARSEABLE
    p, g = (_normalise(extract_answer(text) or _own_words(text)) for text in (answer, gold))
    if not p or not g:
        return Verdict.NO_ANSWER if g else Verdict.GOLD_UNPARSEABLE
    if letter := gold_letter(g):
        chosen = chosen_letter(p)
        if chosen or g.isupper():  # a small letter may be a variable
            return Verdict.CORRECT if chosen == letter else Verdict.WRONG
    if _key(p) != _key(g) and not (_within_limits(p) and _within_limits(g)):
        return Verdict.UNPARSEABLE if _within_limits(g) else Verdict.GOLD_UNPARSEABLE
    try:
        return decide(p, g, deadline)
    except _NeedsAlgebra:
        return p, g
    except TimeoutError:
        return Verdict.TIMEOUT


def _ask(pair: tuple[str, str], timeout: float, *, wait: bool) -> Verdict:
    """Ask a worker process. With `wait`, the time until a worker is free and ready does not count."""
    if pair in _memo:
        return _memo[pair]
    reply = _worker.ask(pair, timeout, wait=wait)
    if reply is None:
        return Verdict.TIMEOUT
    if len(_memo) >= _MEMO_SIZE:
        _memo.clear()
    return _memo.setdefault(pair, Verdict(reply))


def _ask_all(pairs: list[tuple[str, str]], workers: int | None, timeout: float) -> list[Verdict]:
    if len(pairs) <= 1 or workers == 1:
        return [_ask(pair, timeout, wait=True) for pair in pairs]
    executor = ThreadPoolExecutor(_worker.at_least(workers))
    try:
        return list(executor.map(lambda pair: _ask(pair, timeout, wait=True), pairs))
    finally:
        executor.shutdown(cancel_futures=True)
