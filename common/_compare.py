r"""Whether two normalised answers are the same: text, exact numbers, units, structure, and last their values."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

from common import _sets, _values
from common._algebra import is_readable, needs_algebra
from common._formula import Unreadable, names, parse
from common._normalise import BRACKET, BROKEN, OPENING, key
from common._units import AMBIGUOUS, PRODUCTS, conversion, decimals, is_lowest_terms, number, split_unit

__all__ = ["Comparison", "NeedsAlgebra", "Policy", "assignment", "bare", "compare"]


@dataclass(frozen=True)
class Policy:
    """Where graders differ, the choice is the caller's. The defaults are the policy of `common.answers`.

    Args:
        percent (`"unit"` or `"value"`, *optional*, defaults to `"unit"`):
            Whether 50% is 50 with a unit, so that it equals 50 and never 0.5, or the value 0.5.
        units (`"optional"`, `"required"` or `"ignored"`, *optional*, defaults to `"optional"`):
            Whether a unit may be missing on one side, must be there when the gold answer has one, or never matters.
        rounding (`bool`, *optional*, defaults to `False`):
            Whether a gold decimal stands for every value that rounds to it: 3.14 for pi, 0.33 for 1/3.
        lowest_terms (`bool`, *optional*, defaults to `False`):
            Whether a fraction that can be reduced is wrong.
    """

    percent: Literal["unit", "value"] = "unit"
    units: Literal["optional", "required", "ignored"] = "optional"
    rounding: bool = False
    lowest_terms: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("percent", ("unit", "value")), ("units", ("optional", "required", "ignored"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class NeedsAlgebra(Exception):
    """Raised in the calling process: nothing short of a computer algebra system decides this pair."""


class Outcome(NamedTuple):
    """`kind` is the kind of answer, `rule` the comparison that decided; `unreadable` is "", "prediction" or "gold"."""

    same: bool
    kind: str
    rule: str
    unreadable: str


def compare(
    p: str, g: str, deadline: float, policy: Policy, algebra: Callable[[str, str], bool | str] | None = None
) -> Outcome:
    """Compare two normalised answers before `deadline` (`time.monotonic()`), else `TimeoutError`.

    `algebra` maps (prediction, gold) to equal or not, or to "prediction" or "gold": the side that it cannot read.
    Raises `NeedsAlgebra` where it is needed and missing. An answer that makes a step fail is unreadable and ends no
    training run; `MemoryError` and `ImportError` are of the machine and pass.
    """
    comparison = Comparison(deadline, policy, algebra)
    try:
        same = comparison.same(p, g)
    except _FAILURES:
        return Outcome(False, "", "failure", "prediction")
    unreadable = "" if same else "gold" if "gold" in comparison.unreadable else "".join(comparison.unreadable)
    return Outcome(same, comparison.kind, comparison.rule, unreadable)


# ---------------------------------------------------------------------------------------------------------------------
# Taking an answer apart
# ---------------------------------------------------------------------------------------------------------------------

_NAME_PART = (
    r"[A-Za-z]|_ ?\{? ?[\w+-]+ ?\}?|\( ?-?\w+ ?\)|[|:'(),/{} ]|\\(?:angle|triangle|overline|frac|text|var\w+|alpha"
    r"|beta|gamma|delta|theta|lambda|mu|phi|omega|rho|sigma|tau|epsilon|eta|xi|psi|Delta|Omega)(?![a-zA-Z])"
)
_NAME = re.compile(rf"(?:{_NAME_PART})++")  # possessive, so that no input makes it backtrack
_QUANTITY = re.compile(  # a name in an equation, not in an inequality: m\angle 1, [ABC], P(X=2), f^{-1}(2), \sin A
    r"(?:\\(?:angle|triangle) ?\d+|_ ?\{(?:[^{}=]|\{[^{}=]*\})*+\}|\[[A-Za-z]+\]|\^ ?\{? ?-1 ?\}?(?= ?\()"
    r"|(?:(?<![A-Za-z])P|\\mathbb\{[EP]\}) ?(?:\([^()]*\))?"
    r"|\\(?:widehat|overset|frown|overrightarrow|odot|bar|hat|max|min|sin|cos|tan)(?![a-zA-Z])"
    rf"|{_NAME_PART})++"
)
_MEASURE = re.compile(r"^m ?(?=\\(?:angle|widehat|overset))")
_NAME_SUM = re.compile(r"[A-Za-z](?:_\w)?(?: ?[+] ?[A-Za-z](?:_\w)?)+")  # what contests ask for: m+n
_RELATION = re.compile(r"[=<>]|\\(?:leq|geq|neq|in(?![a-z])|subset|equiv|to(?![a-z]))")
_BRACES = re.compile(r"\\?\{(.*?)\\?\}")
_PLUS_MINUS = re.compile(r"\\[pm][pm]")
_FLIP = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # in a list with a space after its own commas
_COMMA, _CUP, _COLON, _APPROX = (re.compile(pattern) for pattern in ("[,;]", r"\\cup", ":", r"\\approx"))
_MATRIX = re.compile(
    r"(?P<factor>[^\\(\[]*|\\frac\{[^{}]*\}\{[^{}]*\}) ?(?:[(\[] ?)?\\begin ?\{[pbB]?(?:small)?(?:matrix|array)\}"
    r"(?: ?\{[clr| ]*\})?(?P<rows>.*)\\end ?\{[pbB]?(?:small)?(?:matrix|array)\}(?: ?[)\]])?"
)
_BUILDER = re.compile(r"\\\{ ?([A-Za-z]) ?(?:\\in ?\\mathbb\{R\} ?)?[|:] ?(.*)\\\}")
_BASED = re.compile(
    r"[({]?(?:\\text\{)?([0-9A-Za-z]+)\}?[)}]? ?"
    r"(?:_ ?\{? ?\(?(?:\\text\{)?(?:base ?\}? ?)?|(?:\\text\{ ?)?\(?base ?\}?)(\d+|[a-z]+)\)?\}?\)?\}?"
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASES |= {"twelve": 12, "sixteen": 16}
_HOLE = re.compile(r"([A-Za-z]) ?\\neq ?(.+)")
_INFINITE = re.compile(r"[+-]? ?\\infty")
_SET_ALGEBRA = re.compile(r"\\(?:cup|cap|setminus|mathbb|emptyset)")
_CLOCK = re.compile(r"(?i)(?:\\text\{)?(\d{1,2})(?::(\d\d))? ?(?:\\text\{)? ?([ap])\.? ?m\.?\}?")
_DATE = re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})|(\d{1,2})([-/.])(\d{1,2})\6(\d{4})")
_UNBOUNDED_ABOVE = re.compile(r"([(\[])(.+),\\infty\)")
_UNBOUNDED_BELOW = re.compile(r"\(-\\infty,(.+)([)\]])")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-df-hj-z](?![A-Za-z])")  # but e and i
_APART = re.compile(r"(?<=\d )[mshgLNJWVK]$")  # "500 m" is a length, "500m" may be a product
_MAX_ITEMS = 64  # larger collections are compared by their sorted texts

_WORD = r"[A-Za-z][a-z'-]{3,}|yes|no|none|odd|even|all|any|one|two|six|ten|not|the|of|to|red|east|west|may|dne"
_TEXT = re.compile(
    rf"(?i)(?:(?!may\s)[A-Za-z'-]{{1,3}}\s)*+(?:{_WORD})(?:[\s,.]+(?:[A-Za-z'-]+|\d+(?:st|nd|rd|th)?))*+"
)
_WRAPPED = re.compile(r"\\text\{([^{}]*)\}")
_FUNCTIONS = re.compile(
    r"(?i)(?<![a-z])(?:a?(?:sin|cos|tan|cot|sec|csc)h?|arc\w+|sqrt|log|ln|exp|gcd|lcm|theta|alpha|beta|gamma)(?![a-z])"
)


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split at the separators that lie outside all brackets; the separators themselves are kept at odd positions."""
    parts, depth, start, seen = [], 0, 0, 0
    for cut in separator.finditer(text):
        for bracket in BRACKET.findall(text, seen, cut.start()):
            depth = depth + 1 if bracket in OPENING else max(0, depth - 1)
        seen = cut.end()
        if depth == 0:
            parts += [text[start : cut.start()].strip(), cut[0]]
            start = seen
    return [*parts, text[start:].strip()]


def bare(text: str) -> str:
    """Without brackets that only group: `{x}`, `(x)`; a bracket round a list stays, it means something."""
    text = text.strip()
    while text[:1] in ("(", "{") and _closes(text) == len(text) - 1 and text[-1] == {"(": ")", "{": "}"}[text[0]]:
        if len(split(text[1:-1], _COMMA)) > 1:
            break
        text = text[1:-1].strip()
    return text


def _closes(text: str) -> int:
    """Index of the bracket that closes the one at the start, -1 if none does."""
    depth = 0
    for bracket in BRACKET.finditer(text):
        depth += 1 if bracket[0] in OPENING else -1
        if depth == 0:
            return bracket.start()
    return -1


def _items(text: str) -> tuple[str, list[str]]:
    """(kind, elements): "set" for braces, "list" for bare commas, "one" for neither. A plus-minus is two elements."""
    if number(text) is not None:  # 1,000
        return "one", [text]
    inner = _BRACES.fullmatch(text)
    is_set = inner and _closes(text.removeprefix("\\")) >= len(text) - 2
    parts = [part for part in split(inner[1] if is_set else text, _COMMA)[::2] if part]
    if not _PLUS_MINUS.search(text):
        return "set" if is_set else "list" if len(parts) > 1 else "one", parts
    upper = [part.replace("\\pm", "+").replace("\\mp", "-") for part in parts]
    lower = [part.replace("\\pm", "-").replace("\\mp", "+") for part in parts if _PLUS_MINUS.search(part)]
    return "set" if is_set else "list" if len(upper + lower) > 1 else "one", upper + lower


def assignment(text: str) -> tuple[str | None, list[str]]:
    """`("x", ["5+6", "11"])` from `x = 5+6 = 11`; the name is None when the left side is more than a name."""
    parts = split(text, _RELATION)
    if len(parts) < 3 or any(op not in ("=", "\\in") for op in parts[1::2]):
        return None, [text]
    if len(parts) > 3 and len(split(text, _COMMA)) > 1:  # "x=1, y=2" is a list of assignments
        return None, [text]
    name = _MEASURE.sub("", key(parts[0])) if _QUANTITY.fullmatch(parts[0]) or _is_limit(parts[0]) else None
    return name, parts[2::2] if name else parts[::2]


def _same_name(p: str, g: str) -> bool:
    """x_1 stands for x where only one side numbers its solutions."""
    return p == g or p.startswith(f"{g}_") or g.startswith(f"{p}_")


def _is_limit(text: str) -> bool:
    return text.startswith("\\lim")


def _as_interval(text: str) -> tuple[str, str] | None:
    r"""`("x", "[-2,7]")` from `-2 \leq x \leq 7`; None when it is no inequality on one name."""
    if builder := _BUILDER.fullmatch(text):
        text = builder[2]
    parts = split(text, _RELATION)
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
    return key(terms[1]), f"{'(' if ops[0] == '<' else '['}{terms[0]},{terms[2]}{')' if ops[1] == '<' else ']'}"


def _as_set(text: str) -> str:
    r"""`\mathbb{R}\setminus \{3\}` from `x \neq 3`, the inside of a set builder; any other text as it is."""
    if builder := _BUILDER.fullmatch(text):
        text = builder[2]
    parts = split(text, _RELATION)
    excluded = len(parts) == 3 and parts[1] == "\\neq" and len(parts[0]) == 1
    return rf"\mathbb{{R}}\setminus \{{{parts[2]}\}}" if excluded else text


def _as_union(text: str) -> str:
    r"""`(-\infty,1)\cup (2,\infty)` from `x<1, x>2`; `(0,4)\setminus \{1\}` from `0<x<4, x \neq 1`; else `_as_set`."""
    builder = _BUILDER.fullmatch(text)
    parts = split(builder[2] if builder else text, _COMMA)
    ranges, holes = [], []
    for part in parts[::2]:
        ranges += filter(None, [_as_interval(part)])
        holes += filter(None, [_HOLE.fullmatch(part)])
    if len(ranges) == 1 and holes and len(ranges + holes) == len(parts[::2]) and ";" not in parts:
        same = all(hole[1] == ranges[0][0] for hole in holes)
        return rf"{ranges[0][1]}\setminus \{{{','.join(hole[2] for hole in holes)}\}}" if same else text
    is_union = not builder and len(ranges) == len(parts[::2]) > 1
    return r"\cup ".join(found[1] for found in ranges) if is_union else _as_set(text)


def _alternatives(text: str) -> str:
    r"""`x<2; x>3` from `\{x | x<2; x>3\}`; any other text as it is."""
    builder = _BUILDER.fullmatch(text)
    return builder[2] if builder and ";" in builder[2] else text


def _one_by_one(text: str, other: str) -> str:
    """`m=2,n=3` from `(m,n)=(2,3)` where the other side names its values; any other text as it is."""
    if text[:1] != "(" or "=" not in other:
        return text
    name, parts = assignment(text)
    if not name or len(parts) > 1 or assignment(other)[0]:
        return text
    left, right = (split(side.strip()[1:-1], _COMMA)[::2] for side in (name, parts[0]))
    return ",".join(map("{}={}".format, left, right)) if len(left) == len(right) > 1 else text


def _carried(items: list[str]) -> list[str]:
    """`x=-1, x=2` from `x=-1, 2`: a name holds until the next one."""
    if not items or "=" not in items[0]:
        return items
    carried, name = [], None
    for item in items:
        name = assignment(item)[0] or name
        carried.append(item if not name or _RELATION.search(item) else f"{name}={item}")
    return carried


def _is_symbolic(text: str) -> bool:
    """Whether a value, behind any `x =`, has names in it, so that a letter at its end may be a factor."""
    value = split(text, _RELATION)[-1]
    try:
        return bool(names(parse(value)))
    except Unreadable:
        return bool(_LETTER.search(value))


def _based(text: str) -> tuple[str, int] | None:
    """`("204", 5)` from `204_5` and `(204)_{\\text{five}}`."""
    found = _BASED.fullmatch(text)
    if not found or not (base := int(found[2]) if found[2].isdigit() else _BASES.get(found[2], 0)):
        return None
    is_number = found[1].isdigit() or (found[1].isupper() and any(map(str.isdigit, found[1])))
    return (found[1].lstrip("0"), base) if is_number else None


def _exact_side(text: str) -> str:
    r"""`\frac{1}{3}` from `\frac{1}{3} \approx 0.33`, but `11` from `x \approx 11`."""
    left, *right = split(text, _APPROX)[::2]
    return right[0] if right and (not left or _QUANTITY.fullmatch(left)) else left


def _date(text: str) -> list[int] | None:
    """The numbers of `2024-03-15` or `3/15/2024` in the order in which they stand."""
    found = _DATE.fullmatch(text)
    return [int(part) for part in found.groups() if part and part.isdigit()] if found else None


def _time_of_day(hours: str, minutes: str | None, half: str) -> tuple[int, int, str]:
    """06:00 AM and 6 a.m. are the same time."""
    return int(hours), int(minutes or 0), half.lower()


def _is_text(text: str) -> bool:
    unwrapped = _WRAPPED.sub(r"\1", text) if "\\text" in text else text
    only_text = unwrapped != text and not _WRAPPED.sub("", text).strip()
    return only_text or (bool(_TEXT.fullmatch(unwrapped)) and not _FUNCTIONS.search(unwrapped))


def _fold_text(text: str) -> str:
    text = re.sub(r"(?<=[^\W\d])-(?=[^\W\d])|[\s_.,;:!?'\"()\[\]{}$]+", " ", text.replace("\\text", " "))
    return re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", " ".join(text.split()).casefold())


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------


class Comparison:
    """One comparison. Each step returns True, False, or None for "not my kind of answer"."""

    def __init__(
        self, deadline: float, policy: Policy, algebra: Callable[[str, str], bool | str] | None = None
    ) -> None:
        self.deadline = deadline
        self.policy = policy
        self.algebra = algebra
        self.unreadable: set[str] = set()
        self.kind = self.rule = ""
        self.depth = 0

    def same(self, p: str, g: str) -> bool:
        if time.monotonic() > self.deadline:
            raise TimeoutError
        p, g = bare(_exact_side(p)), bare(_exact_side(g))
        self.depth += 1
        for kind, step in _STEPS:
            self.rule = kind
            result = step(self, p, g)
            if result is not None:
                break
        self.depth -= 1
        if self.depth == 0:
            self.kind = kind
        return bool(result)

    def _identical(self, p: str, g: str) -> bool | None:
        if not p or not g or BROKEN in p:
            return False
        return True if key(p) == key(g) and self._reduced(p, g) else None

    def _reduced(self, p: str, g: str) -> bool:
        return not self.policy.lowest_terms or is_lowest_terms(p) or not is_lowest_terms(g)

    def _numbers(self, p: str, g: str) -> bool | None:
        p_based, g_based = _based(p), _based(g)
        if p_based or g_based:
            return p_based == g_based
        left, right = number(p), number(g)
        if left is None or right is None:
            return (
                False if _INFINITE.fullmatch(p) or _INFINITE.fullmatch(g) else None
            )  # the text settled the equal ones
        return self._equal_numbers(left, right, g) and self._reduced(p, g)

    def _equal_numbers(self, left: Fraction, right: Fraction, g: str) -> bool:
        tolerance = self._tolerance(g)
        return left == right if tolerance is None else abs(left - right) <= tolerance

    def _tolerance(self, g: str) -> Fraction | None:
        """Half a unit of the last digit of a gold decimal, where the policy takes it as rounded."""
        places = decimals(g) if self.policy.rounding else None
        return None if places is None else Fraction(1, 2 * 10**places)

    def _times(self, p: str, g: str) -> bool | None:
        p_date, g_date = _date(p), _date(g)
        if g_date or (p_date and number(g) is not None):
            return p_date == g_date
        p_time, g_time = _CLOCK.fullmatch(p), _CLOCK.fullmatch(g)
        if not p_time or not g_time:
            return None
        return _time_of_day(*p_time.groups()) == _time_of_day(*g_time.groups())

    def _units(self, p: str, g: str) -> bool | None:
        apart = [letter for letter in _APART.findall(g) if not _is_symbolic(g[:-1])]
        g_value, g_unit = split_unit(g, keep=AMBIGUOUS.difference(apart))
        p_value, p_unit = split_unit(p, keep=AMBIGUOUS.intersection(g_value))
        if p_unit and not g_unit and _is_symbolic(g_value):  # \pi r^2 h is a product, x^2\text{ m} has a unit
            p_value, p_unit = split_unit(p, keep=PRODUCTS)
        if p_unit is None and g_unit is None:
            return None
        if self.policy.percent == "value":
            p_value, p_unit = _percent_as_value(p_value, p_unit)
            g_value, g_unit = _percent_as_value(g_value, g_unit)
        if self.policy.units == "required" and g_unit is not None and p_unit is None:
            return False
        if self.policy.units == "ignored" or p_unit is None or g_unit is None:
            return self.same(p_value, g_value)
        factor, left, right = conversion(p_unit, g_unit), number(p_value), number(g_value)
        if factor in (None, 1):
            return factor == 1 and self.same(p_value, g_value)
        if left is not None and right is not None:
            return self._equal_numbers(left * factor, right, g_value)
        return self.same(rf"({p_value})\cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}", g_value)

    def _names(self, p: str, g: str) -> bool | None:
        p_each, g_each = _one_by_one(p, g), _one_by_one(g, p)
        if (p_each, g_each) != (p, g):
            return self.same(p_each, g_each)
        (p_name, p_parts), (g_name, g_parts) = assignment(p), assignment(g)
        if p_name and g_name and not _same_name(p_name, g_name):
            return None
        p_equation, g_equation = p_name is None and len(p_parts) > 1, g_name is None and len(g_parts) > 1
        if g_equation or (p_equation and g_name) or not (p_name or g_name or p_equation):
            return None
        named, other = (g_parts, p_parts) if g_name else (p_parts, g_parts)
        if "=" in other[0] and len(split(named[-1], _COMMA)) > 1:  # x=-1,2 and x=-1,y=2 are compared item by item
            return None
        if p_equation and _NAME_SUM.fullmatch(p_parts[0]):
            p_parts = p_parts[1:]
        return all(self.same(part, g_parts[-1]) for part in p_parts)

    def _unions(self, p: str, g: str) -> bool | None:
        p_open, g_open = map(_alternatives, (p, g))
        if (p_open, g_open) != (p, g):
            return self.same(p_open, g_open)
        p_parts, g_parts = split(p, _CUP)[::2], split(g, _CUP)[::2]
        if len(p_parts) == len(g_parts) == 1:
            return None
        p_parts, g_parts = (x if len(x) > 1 else _items(x[0])[1] for x in (p_parts, g_parts))
        if len({found[0] for x in (p_parts, g_parts) for part in x if (found := _as_interval(part))}) > 1:
            return False  # x < 1 or y > 2
        return self._match(p_parts, g_parts) or self._values(_as_union(p), _as_union(g))

    def _collections(self, p: str, g: str) -> bool | None:
        if _BUILDER.fullmatch(p) or _BUILDER.fullmatch(g):
            return None
        p_one, g_one = self._conjunction(p), self._conjunction(g)
        if (p_one, g_one) != (p, g):
            return self.same(p_one, g_one)
        (p_kind, p_items), (g_kind, g_items) = _items(p), _items(g)
        if p_kind == g_kind == "one" or _SET_ALGEBRA.search(p + g):
            return None
        if not p_items or not g_items:  # only separators, as of an "or" with nothing before it
            return False
        if "one" in (p_kind, g_kind):
            return p_kind + g_kind in ("onelist", "listone") and self._named_tuple(p_items, g_items)
        return self._match(p_items, g_items) or (
            bool(_THOUSANDS.search(p) or _THOUSANDS.search(g))
            and self._match(*(_items(_THOUSANDS.sub("", x))[1] for x in (p, g)))
        )

    def _named_tuple(self, p_items: list[str], g_items: list[str]) -> bool:
        """`x = 1, y = 2` is the pair (1, 2); other names have no order that a reader knows."""
        named, (pair, *_) = (p_items, g_items) if len(p_items) > 1 else (g_items, p_items)
        assignments = [assignment(item) for item in named]
        names = "".join(name or "?" for name, _ in assignments)
        if not names.isalpha() or ("xyz".find(names) and "abcd".find(names)):
            return False
        values = f"({','.join(parts[-1] for _, parts in assignments)})"
        return bool(self._brackets(*((values, pair) if named is p_items else (pair, values))))

    def _conjunction(self, text: str) -> str:
        r"""`(1,4)` from `x>1, x<4`, which as alternatives would be every number; any other text as it is."""
        parts = split(text, _COMMA)
        if len(parts) != 3 or ";" in text:
            return text
        ranges = sorted(filter(None, map(_as_interval, parts[::2])), key=lambda x: x[1].startswith("(-"))
        if len(ranges) != 2 or ranges[0][0] != ranges[1][0]:
            return text
        low, high = _UNBOUNDED_ABOVE.fullmatch(ranges[0][1]), _UNBOUNDED_BELOW.fullmatch(ranges[1][1])
        try:
            overlap = low and high and _values.order(low[2], high[1], self.deadline) < 0
        except (Unreadable, _values.TooLarge):
            return text
        return f"{low[1]}{low[2]},{high[1]}{high[2]}" if overlap else text

    def _match(self, p_items: list[str], g_items: list[str]) -> bool:
        """Equal as multisets. Equality is an equivalence, so that taking the first match is enough."""
        if len(p_items) != len(g_items) or len(g_items) > _MAX_ITEMS:
            return sorted(map(key, p_items)) == sorted(map(key, g_items))
        left = list(_carried(p_items))
        for item in _carried(g_items):
            found = next((i for i, other in enumerate(left) if self.same(other, item)), None)
            if found is None:
                return False
            del left[found]
        return True

    def _relations(self, p: str, g: str) -> bool | None:
        p_parts, g_parts = split(p, _RELATION), split(g, _RELATION)
        p_range, g_range = _as_interval(p), _as_interval(g)
        if len(p_parts) == len(g_parts) == 1 and not (p_range or g_range):
            return None
        if p_range and g_range and p_range[0] == g_range[0]:
            return self.same(p_range[1], g_range[1])
        if len(p_parts) > 1 and len(g_parts) > 1:
            return self._same_relation(p_parts, g_parts)
        if p_range or g_range:
            return self.same(p_range[1] if p_range else p, g_range[1] if g_range else g)
        p_set, g_set = _as_set(p), _as_set(g)
        return (p_set, g_set) != (p, g) and bool(_SET_ALGEBRA.search(p_set) and _SET_ALGEBRA.search(g_set)) and (
            self._algebra(p_set, g_set)
        )  # fmt: skip

    def _same_relation(self, p_parts: list[str], g_parts: list[str]) -> bool:
        """Equal chains of terms; or one relation, where left minus right is the same up to a constant factor."""
        if p_parts[1::2] == g_parts[1::2] and all(map(self._match_term, p_parts[::2], g_parts[::2])):
            return True
        if len(p_parts) != 3 or len(g_parts) != 3:
            return False
        (p_left, op, p_right), (g_left, g_op, g_right) = p_parts, g_parts
        if op not in (g_op, _FLIP.get(g_op)) or op not in ("=", "\\neq", *_FLIP):
            return False
        try:
            sign = _values.proportional(f"({p_left})-({p_right})", f"({g_left})-({g_right})", self.deadline)
        except Unreadable:
            return self._algebra("".join(p_parts), "".join(g_parts))
        except _values.TooLarge:
            return False
        return sign != 0 and (op not in _FLIP or sign == (1 if op == g_op else -1))

    def _match_term(self, p: str, g: str) -> bool:
        try:
            return key(p) == key(g) or _values.equal(p, g, self.deadline)
        except (Unreadable, _values.TooLarge):
            return False

    def _brackets(self, p: str, g: str) -> bool | None:
        p_is, g_is = (x[0] in "([" and x[-1] in ")]" and _closes(x) == len(x) - 1 for x in (p, g))
        if not p_is and not g_is:
            return None
        if (p[0], p[-1]) != (g[0], g[-1]) or p_is != g_is:
            return self._grouping(p, g)
        p_items, g_items = split(p[1:-1], _COMMA)[::2], split(g[1:-1], _COMMA)[::2]
        return len(p_items) == len(g_items) and all(map(self.same, p_items, g_items))

    def _grouping(self, p: str, g: str) -> bool | None:
        if _SET_ALGEBRA.search(p + g):
            return self._algebra(p, g)
        return None if "\\begin" in p or "\\begin" in g else False

    def _matrices(self, p: str, g: str) -> bool | None:
        tables = [_matrix(x) for x in (p, g)]
        if None in tables:
            return None if ("\\begin" in p and "\\begin" in g) or tables == [None, None] else False
        p_rows, g_rows = tables
        if list(map(len, p_rows)) != list(map(len, g_rows)):
            return False
        return all(all(map(self.same, *rows)) for rows in zip(p_rows, g_rows, strict=True))

    def _ratios(self, p: str, g: str) -> bool | None:
        p_terms, g_terms = split(p, _COLON)[::2], split(g, _COLON)[::2]
        if len(p_terms) == len(g_terms) == 1:
            return None
        return len(p_terms) == len(g_terms) and all(map(self.same, p_terms, g_terms))

    def _texts(self, p: str, g: str) -> bool | None:
        p_text, g_text = _is_text(p), _is_text(g)
        return None if not p_text and not g_text else g_text and _fold_text(p) == _fold_text(g)

    def _values(self, p: str, g: str) -> bool:
        """Equal values of two formulas; what is no formula of the usual kind goes to the computer algebra system."""
        tolerance = self._tolerance(g)
        p, g = map(_plain_number, (p, g))
        try:
            if tolerance is not None:
                return _values.within(p, g, tolerance, self.deadline)
            return _values.equal(p, g, self.deadline)
        except Unreadable:
            return self._algebra(p, g)
        except _values.TooLarge:
            self.rule = "size"
            self.unreadable.add("gold" if _is_too_large(g, self.deadline) else "prediction")
            return False

    def _algebra(self, p: str, g: str) -> bool:
        if _SET_ALGEBRA.search(p) or _SET_ALGEBRA.search(g):
            same = _sets.same_set(p, g, self.deadline)
            if same is not None:
                self.rule = "set"
                return same
        self.rule = "algebra"
        if needs_algebra(p) and needs_algebra(g) and _loosened(p) == _loosened(g):
            return True
        for side, text in (("gold", g), ("prediction", p)):
            if not is_readable(text):
                self.unreadable.add(side)
        if self.unreadable or not (needs_algebra(p) or needs_algebra(g)):
            return False
        if self.algebra is None:
            raise NeedsAlgebra
        result = self.algebra(p, g)
        if isinstance(result, str):
            self.unreadable.add(result)
        return result is True


_STEPS: tuple[tuple[str, Callable[[Comparison, str, str], bool | None]], ...] = (
    ("text", Comparison._identical),
    ("number", Comparison._numbers),
    ("time", Comparison._times),
    ("unit", Comparison._units),
    ("assignment", Comparison._names),
    ("union", Comparison._unions),
    ("collection", Comparison._collections),
    ("relation", Comparison._relations),
    ("brackets", Comparison._brackets),
    ("matrix", Comparison._matrices),
    ("ratio", Comparison._ratios),
    ("words", Comparison._texts),
    ("value", Comparison._values),
)


def _loosened(text: str) -> str:
    """Without what LaTeX does not see in a formula that nothing here reads: spaces, braces round one character or
    command."""
    return re.sub(r"([_^])\{(\w|\\[a-z]+)\}", r"\1\2", key(text))


_EXPONENT = re.compile(r"\d[eE][-+]?\d")


def _plain_number(text: str) -> str:
    """`1/100000` from `1e-5`, which a formula would read as a product with Euler's number."""
    value = number(text) if _EXPONENT.search(text) else None
    return text if value is None else f"{value.numerator}/{value.denominator}"


def _is_too_large(text: str, deadline: float) -> bool:
    try:
        return not _values.equal(text, text, deadline)
    except _values.TooLarge:
        return True
    except Unreadable:  # a sum of too many terms
        return False


def _percent_as_value(value: str, unit) -> tuple[str, object]:
    return (rf"({value})/100", None) if unit is not None and unit.powers == (("%", 1),) else (value, unit)


def _matrix(text: str) -> list[list[str]] | None:
    """Rows of cells, each times the factor before the matrix."""
    table = _MATRIX.fullmatch(text)
    if not table:
        return None
    rows = [row.split("&") for row in re.sub(r"(?: |\\\\)+$", "", table["rows"]).split("\\\\")]
    factor = table["factor"].strip()
    factor = f"{factor}1" if factor in ("-", "+") else factor
    return [[f"({factor})\\cdot ({cell})" for cell in row] for row in rows] if factor else rows
